"""Claims about the doors of the kernels of a block and a model:
nothing that comes through ends the process.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_block_cpu import assert_close, by_torch, result_and_gradients

from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.mamba import block_cpu
from lib.mamba.model import MambaBlock, MambaConfig, MambaLM
from lib.mamba.step_cpu import Stepper

pytestmark = [
    pytest.mark.skipif(not block_cpu.available(), reason="no C++ compiler here"),
    pytest.mark.usefixtures("one_thread"),
]

CONFIG = MambaConfig(11, 8, 1, 3)
BAD = {
    "elsewhere": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "whole": lambda t: t.long(),
    "sparse": lambda t: t.to_sparse(),
    "numpy": lambda t: t.numpy(),
    "one element": lambda t: t.flatten()[:1],
    "nothing": lambda t: None,
}


def convolution(length=5, channels=6, K=4, batch=2):
    return {
        "x": torch.randn(batch, length, channels),
        "taps": torch.randn(channels, K),
        "bias": torch.randn(channels),
        "before": torch.randn(batch, K - 1, channels),
    }


def refused(call, *arguments, **named):
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- every operator, and every function with a way to a kernel of its own ---------------------


@pytest.fixture(scope="module")
def odd_calls():
    """The operators' names, and what became of some five thousand calls,
    each with one odd argument.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork: a call that ends its process would end the tests")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/odd_calls.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    operators, *calls = map(json.loads, done.stdout.splitlines())
    return operators, calls


def test_every_operator_gets_odd_arguments(odd_calls):
    operators, calls = odd_calls
    assert operators and set(operators) <= {door for door, *_ in calls}


def test_an_argument_that_does_not_fit_is_refused_by_every_operator(odd_calls):
    """Of another shape, device, dtype or layout; many a one ended the process,
    or gave what lay in memory.
    """
    _, calls = odd_calls
    assert not [call for *call, wanted, came in calls if wanted == "refused" and came != "refused"]


def test_an_argument_that_lies_anywhere_in_memory_is_read_right_by_every_operator(odd_calls):
    _, calls = odd_calls
    assert not [call for *call, wanted, came in calls if wanted == "right" and came != "right"]


def test_an_argument_of_another_precision_is_read_right_or_refused(odd_calls):
    _, calls = odd_calls
    assert not [
        call
        for *call, wanted, came in calls
        if wanted == "either" and came not in ("right", "refused")
    ]


# ---- the convolution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, bad",
    [
        (name, bad)
        for name in ("x", "taps", "bias", "before")
        for bad in BAD
        if (name, bad) != ("bias", "nothing")
    ],
)
def test_the_convolution_refuses_what_does_not_fit(name, bad):
    given = convolution()
    assert "the convolution needs" in refused(
        block_cpu.convolve_silu, **given | {name: BAD[bad](given[name])}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_convolution_reads_float32_and_bfloat16_alone(dtype):
    """Halves were read as if they were floats: beyond their end."""
    given = convolution()
    assert "float32, bfloat16" in refused(
        block_cpu.convolve_silu, **given | {"x": given["x"].to(dtype)}
    )


def test_the_convolution_has_one_to_eight_taps():
    for K in (0, 9):
        given = convolution() | {
            "taps": torch.randn(6, K),
            "before": torch.randn(2, max(K - 1, 0), 6),
        }
        assert "K from 1 to 8" in refused(block_cpu.convolve_silu, **given)


@pytest.mark.parametrize("K", [1, 4])
def test_a_convolution_over_no_step_has_gradients_of_zero(K):
    given = {k: t.requires_grad_() for k, t in convolution(0, K=K).items()}
    y, *gradients = result_and_gradients(block_cpu.convolve_silu, given, torch.ones(2, 0, 6))
    assert y.shape == (2, 0, 6)
    for gradient, tensor in zip(gradients, given.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def random_convolution(seed):
    """Odd shapes, with a bias or without one, of an input that lies in memory in several ways."""
    random = np.random.default_rng(seed)
    batch, channels, K = (int(random.integers(1, top)) for top in (5, 40, 9))
    length = int(random.choice([1, 2, 7, 16, 17, 64, 66]))
    given = {k: t.requires_grad_() for k, t in convolution(length, channels, K, batch).items()}
    if random.integers(2):
        given["bias"] = None
    if random.integers(2):  # the batch inside
        given["x"].data = torch.randn(length, batch, channels).transpose(0, 1)
    if random.integers(2):  # a part of longer rows
        given["x"].data = torch.randn(batch, length, channels + 5)[..., 2 : 2 + channels]
    return given


def test_any_shape_of_the_convolution_is_torch_s_with_every_gradient(monkeypatch):
    """Forty random shapes, among them one step in rows that lie apart,
    in memory that comes filled with NaN.
    """
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: empty(t, **how).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: torch.full(shape, torch.nan))
    for seed in range(40):
        given = random_convolution(seed)
        assert_close(given, torch.randn(given["x"].shape))


def test_numbers_that_are_only_marked_as_negative_are_negative():
    given = convolution()
    given["before"] = torch.complex(torch.zeros(2, 3, 6), given["before"]).conj().imag
    assert given["before"].is_neg()
    torch.testing.assert_close(
        block_cpu.convolve_silu(**given), by_torch(**given), rtol=1e-5, atol=1e-5
    )


# ---- the fused block ------------------------------------------------------------------------


def block_and_input(length=5, config=CONFIG, batch=2):
    memory = (
        torch.randn(batch, config.d_conv - 1, config.d_inner),
        torch.randn(batch, config.d_inner, config.d_state),
    )
    return MambaBlock(config), torch.randn(batch, length, config.d_model), memory


@pytest.mark.parametrize("bad", BAD)
def test_the_block_refuses_what_does_not_fit(bad):
    module, x, (before, h) = block_and_input()
    for wrong in ((BAD[bad](before), h), (before, BAD[bad](h))):  # neither may be left out
        assert "this layer needs" in refused(block_cpu.block, module, x, wrong)


@pytest.mark.parametrize("bad", BAD)
def test_the_block_refuses_an_input_that_does_not_fit(bad):
    module, x, memory = block_and_input()
    assert " x " in refused(block_cpu.block, module, BAD[bad](x), memory)


def test_the_block_refuses_weights_that_lie_elsewhere_or_are_no_float32():
    for spoil in (
        lambda m: m.norm.to("meta"),
        lambda m: m.mixer.dt_proj.double(),
        lambda m: m.to("meta"),
    ):
        module, x, memory = block_and_input()
        spoil(module)
        assert not block_cpu.suits(module, x)
        assert "the fused block takes" in refused(block_cpu.block, module, x, memory)


def test_weights_may_lie_in_memory_as_they_like():
    """A weight that is every second number of something, or that lies transposed."""
    module, x, memory = block_and_input()
    expected, _ = module(x, memory)
    for p in module.parameters():
        p.data = (
            p.data.t().contiguous().t()
            if p.dim() == 2
            else torch.stack([p.data, p.data * 0], -1)[..., 0]
        )
    assert not module.mixer.A_log.is_contiguous() and not module.norm.weight.is_contiguous()
    found, _ = module(x, memory)
    torch.testing.assert_close(found, expected)


def random_block(seed):
    random = np.random.default_rng(seed)
    draw = lambda top: int(random.integers(1, top))
    config = MambaConfig(
        11,
        draw(30),
        1,
        draw(20),
        d_conv=draw(8),
        expand=draw(4),
        bias=bool(seed % 2),
        conv_bias=bool(seed % 3),
        dt_rank=draw(5),
    )
    return block_and_input(int(random.choice([1, 2, 3, 12, 13, 65])), config, draw(6))


@pytest.mark.parametrize("seed", range(12))
def test_any_block_is_the_plain_one_with_every_gradient(seed, monkeypatch):
    module, x, memory = random_block(seed)
    leaves = [t.requires_grad_() for t in (x, *memory)]
    assert block_cpu.suits(module, x)
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(block_cpu, "precision", lambda x: None)
        y, after = module(x, memory, "auto" if fused else "loop")
        wish = sum(
            (t * torch.arange(1, 1 + t.numel()).view(t.shape).cos()).sum() for t in (y, *after)
        )
        found.append([y, *after, *torch.autograd.grad(wish, [*leaves, *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        # float32: sums over all positions, in another order
        assert not ours.numel() or (ours - theirs).abs().max() <= 5e-5 * theirs.abs().max() + 1e-6


# ---- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, bad",
    [
        *((name, bad) for name in ("x", "norm", "head") for bad in BAD),
        *(("targets", bad) for bad in BAD if bad != "whole"),
    ],
)
def test_the_loss_refuses_what_does_not_fit(name, bad):
    given = {
        "x": torch.randn(2, 3, 8),
        "norm": torch.ones(8),
        "head": torch.randn(11, 8),
        "targets": torch.zeros(2, 3, dtype=torch.long),
    }
    wrong = given | {name: BAD[bad](given[name])}
    for total in (True, False):
        assert "the loss needs" in refused(
            block_cpu.cross_entropy, *wrong.values(), 1e-5, torch.float32, total
        )


def test_the_loss_of_no_position_is_zero():
    x, head = torch.zeros(2, 0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.zeros(2, 0, dtype=torch.long)
    loss = block_cpu.cross_entropy(x, torch.ones(8), head, targets, 1e-5, torch.float32, True)
    loss.backward()
    assert loss == 0 and not head.grad.any()


# ---- the whole-model step -------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, says",
    [
        ([1.5, 2.0], "needs tokens in one of int64"),
        ([True, False], "not bool"),
        ([1, 2, 3], r"shape \(2,\)"),
        (torch.zeros(2, dtype=torch.long, device="meta"), "one device"),
        ([[1], [1, 2]], "a token a row"),
        (["a", "b"], "a token a row"),
        ([2**70, 1], "a token a row"),
        (torch.ones(2, dtype=torch.cfloat), "complex64"),
    ],
)
def test_the_step_reads_whole_numbers_alone(tokens, says):
    fast = Stepper(MambaLM(CONFIG), 2)
    with pytest.raises(UserError, match=says):
        fast.step(tokens)
    assert not any(t.any() for memory in fast.state() for t in memory)


@pytest.mark.parametrize("state", [[], [(1, 2)], [1], 7, [(torch.zeros(2, 3, 16), None)]], ids=str)
def test_what_is_no_state_is_refused(state):
    assert "the state is not one of this model" in refused(Stepper(MambaLM(CONFIG), 2).load, state)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "a", 2**62, True])
def test_what_is_no_number_of_rows_is_refused(batch):
    """The sizes of 2^62 rows overflowed: memory of no size was made, and written to."""
    assert "no number of sequences" in refused(Stepper, MambaLM(CONFIG), batch)


@pytest.mark.parametrize("bad", ["elsewhere", "complex", "whole"])
def test_the_step_refuses_a_state_that_does_not_fit_and_keeps_its_own(bad):
    model = MambaLM(CONFIG)
    fast = Stepper(model, 2)
    fast.step([1, 2])
    before = fast.state()
    ((window, h),) = model.new_state(2)
    for wrong in ((BAD[bad](window), h), (window, BAD[bad](h))):
        assert "the step needs" in refused(fast.load, [wrong])
    assert all(
        torch.equal(a, b) for mine, other in zip(fast.state(), before) for a, b in zip(mine, other)
    )


def test_a_model_that_lies_in_two_places_has_no_step():
    model = MambaLM(CONFIG)
    model.backbone.norm_f.to("meta")
    assert "takes a model on a CPU" in refused(Stepper, model)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda m: setattr(m.backbone, "embeddings", torch.nn.Embedding(3, 8)),
            r"embeddings of shape \(11, 8\)",
        ),
        (
            lambda m: setattr(m.backbone.layers[0].mixer, "D", torch.nn.Parameter(torch.ones(1))),
            r"D of shape \(16,\)",
        ),
        (lambda m: m.backbone.layers.append(MambaBlock(CONFIG)), "a model of 1 layers"),
        (lambda m: setattr(m.backbone.norm_f, "weight", None), "a tensor as norm_f"),
    ],
)
def test_a_model_whose_weights_are_not_those_of_its_configuration_has_no_step(spoil, says):
    """A table of three words was read as one of eleven: beyond its end."""
    model = MambaLM(CONFIG)
    spoil(model)
    with pytest.raises(UserError, match=says):
        Stepper(model)


def random_model(seed):
    """A model, some with more taps than the fused convolution has, and a number of rows."""
    random = np.random.default_rng(seed)
    draw = lambda top: int(random.integers(1, top))
    yes = lambda: bool(random.integers(2))
    config = MambaConfig(
        draw(90),
        draw(40),
        draw(4),
        draw(20),
        d_conv=draw(11),
        expand=draw(4),
        dt_rank=draw(6),
        bias=yes(),
        conv_bias=yes(),
        tied=yes(),
    )
    return MambaLM(config).eval(), draw(10)


@pytest.mark.parametrize("seed", range(40))
def test_the_step_of_any_model_is_its_own(seed):
    """The worst error of 80 was 3.2e-5."""
    model, rows = random_model(seed)
    config = model.config
    _, state = model.prefill(torch.randint(config.vocab_size, (rows, 3)))
    fast = Stepper(model, rows)
    fast.load(state)
    for _ in range(4):
        tokens = torch.randint(config.vocab_size, (rows,))
        expected, state = model.step(tokens, state)
        found = fast.step(tokens.to((torch.int64, torch.int32, torch.uint8)[seed % 3]))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)
    for mine, theirs in zip(fast.state(), state, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_convolution_without_taps_is_refused_in_a_sentence():
    x, before = torch.randn(1, 2, 3), torch.randn(1, 3, 3)
    operators = torch.ops.state_space_music
    assert "taps" in refused(operators.convolve_silu_cpu, x, None, None, before)
    assert "taps" in refused(operators.convolve_silu_cpu_backward, x, None, None, before, x)
