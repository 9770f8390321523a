"""Claims about lib.lab.rivals.arithmetic: what it counts is what the models multiply."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lib.lab.rivals.arithmetic import SCAN, mixing_operations, operations, pairs
from lib.lab.rivals.matched import ARCHS, Size, build
from lib.scan import loop, ssd, ssm

SIZE = Size(64, 4, 16, window=32)


def counted(model, rows: int, length: int, backward: bool = True) -> float:
    """Operations a token that torch counts: all products but those of fused attention."""
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(100, (rows, length)))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / (rows * length)


def mixing(model, length: int) -> float:
    return sum(mixing_operations(layer.mixer, length) for layer in model.backbone.layers)


def test_the_products_by_weights_are_those_that_torch_counts():
    model = build("transformer", 100, SIZE)
    weights = operations(model, 32) - 3 * mixing(model, 32)
    assert counted(model, 2, 32) == pytest.approx(weights)


def test_what_a_state_space_model_only_keeps_is_no_product():
    for arch, kept in (("lstm", ()), ("mamba", ("A_log",)), ("s4d", ("A_log", "A_imag", "ssm.C"))):
        model = build(arch, 100, SIZE)
        weights = operations(model, 32) - 3 * mixing(model, 32)
        named = model.named_parameters()
        large = [(name, p.numel()) for name, p in named if p.dim() > 1]
        assert weights == 6 * sum(count for name, count in large if not name.endswith(kept))


@pytest.mark.parametrize(("arch", "chunk"), [("s4d", ssm.CHUNK), ("mamba2", ssd.CHUNK)])
def test_chunks_cost_what_torch_counts_but_for_what_their_masks_throw_away(arch, chunk):
    model, length = build(arch, 100, SIZE), 4 * chunk
    config = model.config
    columns = config.d_inner if arch == "s4d" else config.d_inner + config.d_state
    masked = config.n_layer * columns * 2 * (chunk - pairs(chunk))
    handed = {"s4d": 4, "mamba2": 2}[arch] * config.d_inner * config.d_state / chunk  # no products
    weights = (operations(model, length) - 3 * mixing(model, length)) / 3
    here = mixing(model, length) + masked - config.n_layer * handed
    # torch counts the short convolution as well, and what is made once for all rows
    found = counted(model, 16, length, backward=False)
    assert found == pytest.approx(weights + here, rel=0.02)


def test_a_query_meets_the_keys_before_it_and_no_others():
    model = build("transformer", 100, Size(64, 4, 16, window=3))
    width = model.config.d_model
    afresh = mixing_operations(model.backbone.layers[0].mixer, 5)
    assert afresh == pytest.approx(4 * width * (1 + 2 + 3 + 3 + 3) / 5)
    # a row that reads on meets what it has kept, but for its first steps after a jump
    carried = build("transformer_xl", 100, Size(64, 4, 16, window=3))
    more = operations(carried, 5, carry=2) - operations(carried, 5)
    reach = (1 + 2 + 8 * 3) / 10 - (1 + 2 + 3 * 3) / 5
    assert more == pytest.approx(3 * carried.config.n_layer * 4 * width * reach)
    assert operations(model, 5, carry=2) == operations(model, 5)


class OnStates(TorchDispatchMode):
    """Counts what is computed number by number on the states (B, D, N) of a step, and sums of them."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers = numbers
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if name in ("mul", "add", "exp"):
            self.count += result.numel() == self.numbers
        elif name in ("bmm", "mv", "mm"):  # a product and an addition of each
            self.count += 2 * any(t.numel() == self.numbers for t in tensors)
        return result


def test_a_scan_makes_seven_operations_for_each_state():
    """The loop's own, counted at one step of time."""
    batch, channels, states = 2, 7, 5
    x, delta = torch.randn(2, batch, 1, channels)
    A = -torch.rand(channels, states)
    B, C = torch.randn(2, batch, 1, states)
    with OnStates(batch * channels * states) as found:
        loop(x, delta, A, B, C, torch.randn(batch, channels, states))
    assert found.count == SCAN


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_counted(arch):
    model = build(arch, 100, SIZE)
    assert 4 * model.parameter_count() < operations(model, 64) < 15 * model.parameter_count()


def test_attention_costs_more_with_its_reach_and_a_state_does_not():
    for arch, grows in (("transformer", True), ("mamba", False), ("lstm", False)):
        model = build(arch, 100, Size(64, 4, 16, window=256))
        assert (operations(model, 256) > 1.05 * operations(model, 32)) == grows
