"""Claims about the rivals: equal size, causal, step = forward = segments, checkpoints come back."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.lab.rivals import matched, windows
from lib.lab.rivals.hybrid import HybridConfig
from lib.lab.rivals.matched import ARCHS, Size, build
from lib.lab.rivals.s4d import S4DLM, S4DConfig
from lib.lab.rivals.transformer import Attention, TransformerConfig, TransformerLM
from lib.music.streams import Piece, Streams
from lib.train.bits import piece_bits
from lib.train.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")

TINY, VOCAB = Size(d_model=16, n_layer=2, d_state=4, window=9, fixed_state=6), 23


def make(arch, size=TINY, seed=0):
    torch.manual_seed(seed)
    return build(arch, VOCAB, size).eval()


def tokens(batch, length, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(a, b):
    # float32, two orders of summation: 2e-5 is 200 roundings of a logit near 1
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def by_steps(model, ids, state=None):
    state, logits = state or model.new_state(len(ids)), []
    for column in ids.unbind(1):
        one, state = model.step(column, state)
        logits.append(one)
    return torch.stack(logits, 1), state


def copy_state(state):
    """One's own: a step writes into the cache that it is given."""
    return [tuple(t.clone() for t in memory) for memory in state]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [Size(), Size(512, 12), Size(48, 3, 8), TINY])
def test_all_have_the_parameters_of_the_mamba(arch, size):
    ours = size.mamba(738)
    wanted = matched._count(ours)
    assert abs(matched._count(matched.config_of(arch, 738, size)) / wanted - 1) <= 0.03


def test_parameters_are_counted_without_the_embedding():
    for arch in ARCHS:
        model = make(arch)
        assert matched.body(model) == model.parameter_count() - VOCAB * model.config.d_model
        # the search counts the same, on no device
        assert matched.body(model) == matched._count(model.config)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("length", [1, 2, 9, 33])  # the window is 9: below it, at it, beyond it
def test_step_matches_forward(arch, length):
    model, ids = make(arch), tokens(2, length)
    whole, last = model(ids, return_state=True)
    logits, state = by_steps(model, ids)
    same(logits, whole)
    for ours, theirs in zip(state, last):
        for a, b in zip(ours, theirs):
            same(a, b)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cuts", [(0, 1, 3, 32, 33), (0, 9, 18, 33), (0, 20, 21, 33)])
def test_segments_match_the_whole(arch, cuts):
    model, ids = make(arch), tokens(2, 33)
    whole, state, parts = model(ids), None, []
    for begin, end in itertools.pairwise(cuts):
        before = copy_state(state) if state else None
        logits, after = model(ids[:, begin:end], state, return_state=True)
        if state:  # reading leaves the state that it was given alone
            assert all(torch.equal(a, b) for x, y in zip(before, state) for a, b in zip(x, y))
        parts.append(logits)
        state = after
    same(torch.cat(parts, 1), whole)
    same(
        by_steps(model, ids[:, :5], copy_state(state))[0],
        model(torch.cat([ids, ids[:, :5]], 1))[:, 33:],
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_that_were_emptied_begin_again_and_others_go_on(arch):
    """What the trainer does at a jump: zeros in a row of the state are the memory of nothing."""
    model, ids, more = make(arch), tokens(3, 14), tokens(3, 7, seed=2)
    _, state = model(ids, return_state=True)
    fresh = torch.tensor([False, True, False])[:, None, None]
    state = [tuple(t.float().masked_fill(fresh, 0) for t in layer) for layer in state]
    for logits in (model(more, state), by_steps(model, more, copy_state(state))[0]):
        same(logits[0], model(torch.cat([ids, more], 1))[0, 14:])
        same(logits[1], model(more)[1])
    # what evaluation does when a piece ends
    alive = [tuple(t[:2] for t in layer) for layer in state]
    same(model(more[:2], alive), model(more, state)[:2])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_model_is_causal_and_every_parameter_learns(arch):
    model, ids = make(arch), tokens(1, 30)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % VOCAB
    before, after = model(ids), model(changed)
    # an FFT spreads its rounding over all positions
    torch.testing.assert_close(
        before[:, :20], after[:, :20], rtol=0, atol=1e-5 if arch == "s4d" else 1e-6
    )
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 0
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_at_the_start_is_ln_of_the_vocabulary_and_falls(arch):
    model, ids = make(arch, replace(TINY, window=64)), tokens(2, 21)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(VOCAB)) < 0.1
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_prefill_is_the_last_position_and_a_checkpoint_comes_back(arch, tmp_path):
    model, ids = make(arch), tokens(2, 12)
    same(model.prefill(ids)[0], model(ids)[:, -1])
    matched.save(model, tmp_path)
    again = matched.load(tmp_path)
    assert torch.equal(again(ids), model(ids)) and again.carries == model.carries
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_names_in_the_weights_of_a_hybrid_are_those_of_before():
    names = make("hybrid").state_dict()
    assert {
        "backbone.layers.0.mixer.mamba.A_log",
        "backbone.layers.1.mixer.in_proj.weight",
        "backbone.layers.1.norm_feed.weight",
        "backbone.layers.1.feed.out_proj.weight",
    } <= set(names)


def test_a_model_says_whether_its_state_grows():
    assert [arch for arch in ARCHS if make(arch).grows] == [
        "transformer",
        "transformer_xl",
        "hybrid",
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_of_a_rival_is_the_sum_of_its_cross_entropies(arch):
    model, ids = make(arch), tokens(2, 12)
    targets = tokens(2, 12, seed=2)
    targets[0, 3] = -1
    wanted = F.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    torch.testing.assert_close(model(ids, targets=targets), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "cut", "config", "size"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, damage):
    matched.save(make("lstm"), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        facts = json.loads(config.read_text()) | (
            {"d_model": 3} if damage == "size" else {"strange": 1}
        )
        config.write_text(json.dumps(facts))
    with pytest.raises(UserError) as error:
        matched.load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_built_is_one_sentence():
    with pytest.raises(UserError, match="unknown"):
        build("rwkv", VOCAB)
    with pytest.raises(UserError, match="3 %"):
        build("s4d", VOCAB, Size(d_model=3, n_layer=1, d_state=1, fixed_state=64))
    with pytest.raises(UserError, match="even"):
        Attention(10, 4, 8, 1)
    with pytest.raises(UserError, match="does not fit"):
        HybridConfig(VOCAB, 16, 2, attention=(2,))
    with pytest.raises(UserError, match=r"\(B, L\)"):
        make("lstm")(torch.zeros(4, dtype=torch.long))
    with pytest.raises(UserError, match="new_state"):
        make("lstm")(tokens(1, 3), make("mamba").new_state() * 3)


def test_the_fixed_system_is_known_again_after_every_change_of_its_parameters():
    model, ids = make("s4d"), tokens(1, 10)
    for change in (
        lambda: None,
        lambda: model.backbone.layers[0].mixer.ssm.log_delta.add_(0.5),
        lambda: model.load_state_dict(make("s4d", seed=7).state_dict()),
    ):
        with torch.no_grad():
            change()
        same(by_steps(model, ids)[0], model(ids).detach())
    with torch.inference_mode():  # such parameters do not count their changes
        model = make("s4d")
        same(by_steps(model, ids)[0], model(ids))


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_that_a_model_knew_before_a_training_step_is_used_after_it(arch):
    """A fused optimiser changes the numbers, and the tensors do not count it."""
    model, ids = make(arch), tokens(1, 10)
    with torch.inference_mode():
        model(ids)
        by_steps(model, ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(ids, targets=tokens(1, 10, seed=2)).backward()
    optimizer.step()
    fresh = make(arch, seed=7)
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        wanted = fresh(ids)
        same(model(ids), wanted)
        same(by_steps(model, ids)[0], wanted)


def test_weight_decay_spares_the_systems_rates():
    model = make("s4d")
    spared = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "A_imag", "log_delta", "D")):
            assert id(parameter) in spared, name
        elif name.endswith(("proj.weight", "ssm.C")):
            assert id(parameter) not in spared, name


@pytest.mark.parametrize("arch", ["mamba2", "mamba3", "s4d"])
def test_weight_decay_spares_every_bias(arch):
    model = make(arch)
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    biases = [name for name, p in model.named_parameters() if "bias" in name and id(p) in decayed]
    assert not biases


def test_the_systems_states_are_no_coarser_under_autocast():
    model = make("s4d").backbone.layers[0].mixer.ssm
    x = torch.randn(2, 70, model.d_model)
    wanted = model(x, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, return_state=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_reads_and_steps(arch, dtype):
    ids, exact = tokens(2, 12), make(arch).double()
    model = make(arch).to(dtype)
    logits, (steps, _) = model(ids), by_steps(model, ids)
    assert logits.dtype == steps.dtype == dtype
    close = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logits.double(), exact(ids), **close)
    torch.testing.assert_close(steps.double(), exact(ids), **close)
    with torch.autocast("cpu", torch.bfloat16):
        by_steps(make(arch), ids)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_trains_under_autocast_on_any_processor(arch):
    model, ids = make(arch).train(), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids[:, :-1], targets=ids[:, 1:])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_where_each_crop_begins_afresh_training_leaves_the_cache_alone():
    """Its outputs and gradients are those of the one that carries, on the first crop."""
    ids, found = tokens(2, 12), {}
    for arch in ("transformer", "transformer_xl"):
        model = make(arch).train()
        state = model.new_state(2)
        logits, after = model(ids, state, return_state=True)
        logits.sum().backward()
        found[arch] = [logits.detach(), *(p.grad for p in model.parameters())]
        kept = all(map(torch.equal, *map(list, zip(*((a[0], b[0]) for a, b in zip(state, after))))))
        assert kept == (arch == "transformer")
        _, judged = model.eval()(ids, model.new_state(2), return_state=True)
        assert judged[0][1].tolist() == [[[12.0]]] * 2
    assert all(map(torch.equal, found["transformer"], found["transformer_xl"]))


def test_a_transformer_in_bfloat16_counts_beyond_256():
    model = make("transformer").bfloat16()
    _, state = model.prefill(tokens(1, 300))
    assert state[0][1].item() == 300


def test_a_convolution_without_a_bias_has_none():
    model = S4DLM(S4DConfig(VOCAB, 8, 1, 4, conv_bias=False))
    model(tokens(1, 5)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def attention_by_hand(layer, u):
    """Attention over the window, position by position, rotation as a complex product."""
    q, k, v = layer.in_proj(u).double().chunk(3, -1)
    size, out = layer.width // layer.n_head, []
    turn = torch.exp(1j * torch.arange(u.shape[1])[:, None] * layer.frequencies)
    for head in range(layer.n_head):
        part = slice(head * size, (head + 1) * size)
        pairs = [torch.complex(*t[..., part].chunk(2, -1)) * turn for t in (q, k)]
        scores = (pairs[0][:, :, None] * pairs[1][:, None].conj()).sum(-1).real / math.sqrt(size)
        i, j = torch.arange(u.shape[1])[:, None], torch.arange(u.shape[1])
        scores = scores.masked_fill((j > i) | (j <= i - layer.window), -torch.inf)
        out.append(torch.softmax(scores, -1) @ v[..., part])
    return layer.out_proj(torch.cat(out, -1).float())


def test_attention_is_the_textbook_one_with_rotary_positions_and_a_window():
    torch.manual_seed(0)
    layer, u = Attention(12, 3, 7, 1), torch.randn(2, 25, 12)
    same(layer(u, layer.new_memory(2))[0], attention_by_hand(layer, u))


def test_attention_depends_on_distances_alone():
    """The same tokens give the same logits 100,000 windows later:
    turned keys, turned queries, float64 angles.
    """
    model, ids = make("transformer"), tokens(1, 40)
    _, state = model(ids, return_state=True)
    far = []
    for layer, (ring, at) in zip(model.backbone.layers, copy_state(state)):
        keys, values = ring.unflatten(1, (-1, 9)).chunk(2, 1)
        # 900,000 is a multiple of 9: the same slots
        keys = layer.mixer.rotate(keys, torch.full((1, 9), 900_000))
        far.append((torch.cat([keys, values], 1).flatten(1, 2).detach(), at + 900_000))
    same(by_steps(model, ids[:, :12], far)[0], by_steps(model, ids[:, :12], copy_state(state))[0])


def test_the_cache_is_allocated_once_and_a_step_writes_into_it():
    model = make("transformer")
    state = model.new_state(1)
    addresses = [ring.data_ptr() for ring, _ in state]
    for column in tokens(1, 30).unbind(1):
        _, state = model.step(column, state)
        assert [ring.data_ptr() for ring, _ in state] == addresses


def test_bytes_of_a_state_grow_with_the_cache_up_to_its_window_and_not_at_all_elsewhere():
    for arch in ARCHS:
        model = make(arch)
        state = model.new_state()
        sizes = [matched.state_bytes(model, state, n) for n in (1, 5, 9, 100)]
        if arch in ("transformer", "transformer_xl"):
            per_token = 2 * 4 * 2 * model.config.d_model  # layers, bytes, keys and values
            assert np.diff(sizes).tolist() == [4 * per_token, 4 * per_token, 0]
        elif arch == "hybrid":
            assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
        else:
            assert len(set(sizes)) == 1


# ---- whole pieces in windows ---------------------------------------------------------------


def make_streams(lengths=(40, 2, 17, 10), vocab=VOCAB):
    rng, pieces, arrays, offset = np.random.default_rng(0), [], [], 0
    for i, length in enumerate(lengths):
        arrays.append(rng.integers(vocab, size=length).astype(np.uint16))
        pieces.append(
            Piece(f"p{i}", "composer", f"t{i}", "test", 0, offset, length, max(1, length // 3), 1.0)
        )
        offset += length
    return Streams(np.concatenate(arrays), pieces, vocab, 1, {})


@pytest.mark.parametrize("window, stride", [(9, None), (9, 9), (4, 1), (1, 1), (100, None)])
def test_every_token_counts_once_with_the_context_that_its_window_gives(window, stride):
    model, streams = make("mamba"), make_streams()
    found = windows.window_nats(
        model, streams, streams.pieces, window=window, stride=stride, batch=3
    )
    step = stride or max(1, window // 2)
    for piece, nats in zip(streams.pieces, found):
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64))
        assert len(nats) == piece.length - 1
        for target in range(1, piece.length):
            # the first window that holds the target
            begin = max(0, -(-(target - window) // step)) * step
            logits = model(ids[None, begin:target])[0, -1]
            assert nats[target - 1] == pytest.approx(
                F.cross_entropy(logits, ids[target]).item(), abs=1e-4
            )


@pytest.mark.parametrize("arch", ["mamba", "transformer", "transformer_xl", "hybrid"])
def test_a_piece_is_judged_in_the_way_of_its_architecture(arch):
    model, streams = make(arch), make_streams()
    found = windows.model_bits(model, streams, streams.pieces, batch=2)
    nats = windows.token_nats(model, streams, streams.pieces)
    np.testing.assert_allclose(found, [n.sum() / math.log(2) for n in nats], rtol=1e-5)
    carried = piece_bits(model, streams, streams.pieces)
    if arch == "transformer":
        assert abs(found[0] - carried[0]) > 1e-3  # windows read afresh are not the cache carried on
        whole = TransformerLM(replace(model.config, window=64))
        whole.load_state_dict(model.state_dict())
        np.testing.assert_allclose(
            windows.model_bits(whole, streams, streams.pieces)[1:3],
            piece_bits(whole, streams, streams.pieces)[1:3],
            rtol=1e-5,
        )
    else:
        np.testing.assert_allclose(found, carried, rtol=1e-5)


def test_windows_that_leave_gaps_are_refused():
    streams = make_streams()
    with pytest.raises(UserError, match="stride"):
        windows.window_bits(make("lstm"), streams, streams.pieces, window=4, stride=5)


def test_a_transformer_of_any_shape_is_its_steps():
    torch.manual_seed(0)
    model = TransformerLM(TransformerConfig(VOCAB, 24, 3, 3, 17, window=5)).eval()
    ids = tokens(3, 18)
    same(by_steps(model, ids)[0], model(ids))
