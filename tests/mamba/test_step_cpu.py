"""Claims about lib.mamba.step_cpu: the whole-model step is `MambaLM.step`, for any model,
from any state.
"""

import sys

import pytest
import torch
from test_parity import SHIPPED, TEN, off, ours, ten, tokens

from lib import mamba
from lib.env.errors import UserError
from lib.generate import player as generate
from lib.lab.bench import timing
from lib.mamba import step_cpu
from lib.mamba.model import MambaConfig, MambaLM
from lib.mamba.step_cpu import Stepper, stepper

pytestmark = pytest.mark.usefixtures("one_thread")

needs_compiler = pytest.mark.skipif(not step_cpu.KERNEL.available(), reason="no C++ compiler here")

# float32: a logit near 1 is a sum of some hundreds of products, in their order and in ours
CLOSE = 1e-5


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(step_cpu.KERNEL, "available", lambda: False)


def by_definition(model, ids, state=None):
    """Logits (B, L, V) of `MambaLM.step`, and the state behind the last token."""
    state, rows = state or model.new_state(len(ids)), []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        rows.append(logits)
    return torch.stack(rows, 1), state


def by_stepper(fast, ids):
    return torch.stack([fast.step(token) for token in ids.unbind(1)], 1)


def assert_same_state(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        for a, b in zip(mine, other, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert a.numel() == 0 or off(a, b) <= CLOSE * max(1, b.abs().max())


# ---- the same numbers ---------------------------------------------------------------------


@needs_compiler
@ten
@pytest.mark.parametrize("batch", [1, 5])
def test_whole_model_step_is_step(config, batch):
    """Logits at each of 33 positions and the state behind them:
    odd widths, biases, tied or not, some rows at once.
    """
    model = ours(config)
    ids = tokens(config, batch, 33)
    expected, state = by_definition(model, ids)
    fast = Stepper(model, batch)
    assert off(by_stepper(fast, ids), expected) <= CLOSE
    assert_same_state(fast.state(), state)


@needs_compiler
@pytest.mark.parametrize("d_conv, d_state", [(1, 4), (2, 64), (3, 17), (4, 1), (4, 64), (7, 4)])
def test_any_window_and_any_number_of_states(d_conv, d_state):
    model = ours(MambaConfig(19, 9, 2, d_state, d_conv=d_conv, expand=3))
    ids = tokens(model.config, 3, 12)
    assert off(by_stepper(Stepper(model, 3), ids), by_definition(model, ids)[0]) <= CLOSE


@needs_compiler
def test_two_thousand_steps_do_not_drift():
    """Against the whole sequence at once, at every position of 2,049."""
    model = ours(MambaConfig(29, 17, 2, 6, d_conv=3), seed=6)
    ids = tokens(model.config, 1, 2049, seed=7)
    with torch.inference_mode():
        whole = model(ids)
    assert off(by_stepper(Stepper(model), ids), whole) <= CLOSE


@needs_compiler
def test_shipped_model_steps_alike():
    """Its logits pass ten: five digits of the largest."""
    model = mamba.load(SHIPPED)
    ids = tokens(model.config, 1, 65)
    expected, _ = by_definition(model, ids)
    assert off(by_stepper(Stepper(model), ids), expected) <= CLOSE * expected.abs().max()


@needs_compiler
def test_digits_do_not_depend_on_the_number_of_threads():
    model = ours(MambaConfig(100, 90, 3, 16))
    fast, threads = Stepper(model, 2), torch.get_num_threads()
    assert not fast._small, "large enough to be shared out"
    ids, found = tokens(model.config, 2, 9), []
    try:
        for n in (1, 2, 3, 11):
            torch.set_num_threads(n)
            fast.load()
            found.append(by_stepper(fast, ids))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


# ---- its state ----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    "config", TEN[:4] + [MambaConfig(9, 16, 1, 1, d_conv=1)], ids=lambda c: f"M{c.d_model}"
)
def test_it_goes_on_from_a_prompt_and_hands_its_state_back(config):
    """prefill, then the stepper, then `step` again: as if `step` had read it all."""
    model = ours(config)
    ids = tokens(config, 2, 30)
    expected, last = by_definition(model, ids)
    _, state = model.prefill(ids[:, :11])
    fast = Stepper(model, 2)
    fast.load(state)
    assert_same_state(fast.state(), state)
    found = by_stepper(fast, ids[:, 11:20])
    rest, end = by_definition(model, ids[:, 20:], fast.state())
    assert off(torch.cat([found, rest], 1), expected[:, 11:]) <= CLOSE
    assert_same_state(end, last)


@needs_compiler
def test_state_comes_back_to_the_bit():
    model = ours(TEN[1])
    _, state = model.prefill(tokens(TEN[1], 2, 9))
    fast = Stepper(model, 2)
    fast.load(state)
    for mine, other in zip(fast.state(), state):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@needs_compiler
def test_load_without_a_state_begins_anew():
    model = ours(TEN[0])
    fast, ids = Stepper(model), tokens(TEN[0], 1, 7)
    first = by_stepper(fast, ids)
    assert not torch.equal(by_stepper(fast, ids), first), "it remembers"
    fast.load()
    assert torch.equal(by_stepper(fast, ids), first)


@needs_compiler
def test_what_it_gave_is_never_written_over():
    fast = Stepper(ours(TEN[0]))
    logits, state = fast.step([3]), fast.state()
    kept = logits.clone(), [tuple(t.clone() for t in layer) for layer in state]
    fast.step([4])
    assert torch.equal(logits, kept[0])
    assert all(
        torch.equal(a, b)
        for mine, other in zip(state, kept[1])
        for a, b in zip(mine, other, strict=True)
    )


@needs_compiler
def test_weights_are_those_of_the_moment_when_it_was_made():
    model = ours(TEN[0])
    fast = Stepper(model)
    before = fast.step([3])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fast.load()
    assert torch.equal(fast.step([3]), before)


@needs_compiler
@pytest.mark.skipif(
    sys.platform != "linux", reason="a process's highest memory is read from Linux's /proc"
)
def test_memory_does_not_grow_with_the_piece():
    """Over 4,096 tokens by less than a MiB; the logits alone, were they kept, would be 4."""
    fast = Stepper(ours(MambaConfig(260, 24, 2, 4)))
    size, token = fast.state_bytes(), torch.zeros(1, dtype=torch.long)

    def play(count):
        for _ in range(count):
            token.copy_(fast.step(token).argmax(-1))

    play(100)  # what the first calls ever set up is not counted
    assert timing.peak_bytes(lambda: play(4096), "cpu") < 2**20
    assert fast.state_bytes() == size


# ---- what it refuses ----------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("token", [-1, 50, 2**40])
def test_foreign_token_is_one_sentence_and_nothing_is_read(token):
    fast = Stepper(ours(TEN[0]), 2)
    fast.step([3, 4])
    before = fast.state()
    with pytest.raises(
        UserError, match=rf"{token}.*outside the vocabulary of 50.*another tokenizer"
    ) as error:
        fast.step([3, token])
    assert "\n" not in str(error.value)
    assert all(
        torch.equal(a, b)
        for mine, other in zip(fast.state(), before)
        for a, b in zip(mine, other, strict=True)
    )


@needs_compiler
@pytest.mark.parametrize("given", [[1], [1, 2, 3], [[1, 2]], 1])
def test_tokens_of_a_wrong_shape_are_one_sentence(given):
    with pytest.raises(UserError, match=r"tokens of shape \(2,\), not \("):
        Stepper(ours(TEN[0]), 2).step(torch.tensor(given))


@needs_compiler
def test_state_of_another_model_is_one_sentence():
    fast = Stepper(ours(TEN[0]), 2)
    for state in (
        ours(TEN[1]).new_state(2),
        ours(TEN[0]).new_state(1),
        ours(TEN[0]).new_state(2)[:1],
    ):
        with pytest.raises(UserError, match="not one of this model with 2 rows"):
            fast.load(state)


@needs_compiler
def test_a_state_that_was_made_with_gradients_is_taken():
    model = ours(TEN[0])
    ids = torch.zeros(2, 3, dtype=torch.long)
    logits, state = model(ids, return_state=True)
    fast = Stepper(model, 2)
    fast.load(state)
    wanted, _ = model.step(ids[:, 0], state)
    torch.testing.assert_close(fast.step(ids[:, 0]), wanted, rtol=1e-4, atol=1e-5)


def test_no_rows_is_one_sentence():
    with pytest.raises(UserError, match="batch 0 is no number of sequences"):
        Stepper(ours(TEN[0]), 0)


def test_model_elsewhere_is_refused_in_one_sentence_or_steps_by_itself():
    model = ours(TEN[0]).to("meta")
    with pytest.raises(UserError, match="takes a model on a CPU"):
        Stepper(model)
    assert stepper(model) is None


def test_missing_compiler_is_one_sentence_or_plain_pytorch(no_compiler):
    with pytest.raises(UserError, match="needs a C.. compiler"):
        Stepper(ours(TEN[0]))
    assert stepper(ours(TEN[0])) is None


@needs_compiler
def test_playing_gives_the_same_notes_with_and_without_it(monkeypatch):
    shipped = generate.load_model()
    made = []
    monkeypatch.setattr(
        step_cpu.Stepper,
        "step",
        lambda self, tokens, step=Stepper.step: made.append(1) or step(self, tokens),
    )
    with_it = generate.generate(*shipped, seconds=3, seed=1)
    assert len(made) > 10, "it was used"
    monkeypatch.setattr(step_cpu.KERNEL, "available", lambda: False)
    count, without = len(made), generate.generate(*shipped, seconds=3, seed=1)
    assert len(made) == count
    assert len(with_it.notes) > 5 and (with_it.notes == without.notes).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 64, 65])
@pytest.mark.parametrize("config", [MambaConfig(37, 40, 2, 16), MambaConfig(50, 21, 1, 5)], ids=str)
def test_any_number_of_rows_is_the_model_s_own_step(config, rows):
    """Few rows are shared by the threads, many are dealt out:
    the numbers are the same, to float32's rounding.
    """
    torch.manual_seed(rows)
    model = MambaLM(config).eval()
    fast, state = Stepper(model, rows, "float32"), model.new_state(rows)
    for _ in range(3):
        tokens = torch.randint(config.vocab_size, (rows,))
        wanted, state = model.step(tokens, state)
        torch.testing.assert_close(fast.step(tokens), wanted, rtol=1e-4, atol=1e-5)


def test_weights_in_float16_lose_what_float16_loses_and_no_more():
    """The default is exact: float16 where it holds every weight to the bit, else float32."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(37, 40, 2, 16)).eval()
    tokens = [torch.randint(37, (2,)) for _ in range(4)]
    plain, halves, default = (Stepper(model, 2, kind) for kind in ("float32", "float16", "auto"))
    for token in tokens:
        right, short = plain.step(token), halves.step(token)
        assert torch.equal(default.step(token), right)
        assert 0 < (short - right).abs().max() < 2**-8 * right.abs().max()
    for p in step_cpu._matrices(model):
        p.data = p.half().float()
    assert step_cpu.exact_in_float16(model)
    plain, default = Stepper(model, 2, "float32"), Stepper(model, 2)
    for token in tokens:  # the same products, in an order of their own
        torch.testing.assert_close(default.step(token), plain.step(token), rtol=1e-5, atol=1e-6)


def test_weights_that_cannot_be_kept_so_are_refused_in_a_sentence():
    model = MambaLM(MambaConfig(9, 8, 1, 4)).eval()
    with pytest.raises(UserError, match="weights 'int3' are unknown"):
        Stepper(model, 1, "int3")
    model.backbone.embeddings.weight.data[0, 0] = 40
    with pytest.raises(UserError, match="too large to be kept in float16"):
        Stepper(model, 1, "float16")


@needs_compiler
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_step_does_not_follow_torch_s_default_dtype(default):
    """What C++ writes into is float32, whatever an empty tensor would be just now."""
    model = ours(TEN[0])
    ids = tokens(TEN[0], 1, 5)
    right = by_stepper(Stepper(model), ids)
    earlier = Stepper(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(by_stepper(earlier, ids), right)
        assert torch.equal(by_stepper(Stepper(model), ids), right)
    finally:
        torch.set_default_dtype(before)
