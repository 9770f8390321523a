"""Claims about lib.lab.rivals.arithmetic: what it counts is what the models multiply."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.lab.rivals.arithmetic import mixing_operations, operations
from lib.lab.rivals.matched import ARCHS, Size, build

SIZE = Size(64, 4, 16, window=32)


@pytest.mark.parametrize("arch", ARCHS)
def test_operations_are_six_for_each_weight_and_little_more(arch):
    model = build(arch, 100, SIZE)
    weights = 6 * model.parameter_count()
    assert weights <= operations(model, 2, 64) < 2.5 * weights


def test_the_products_by_weights_are_those_that_torch_counts():
    length = 32
    model = build("transformer", 100, SIZE)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(100, (2, length))).sum().backward()
    # without attention, which this counter does not know
    counted = counter.get_total_flops() / (2 * length)
    mixing = sum(
        mixing_operations(layer.mixer, model, 2, length) for layer in model.backbone.layers
    )
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counted == pytest.approx(operations(model, 2, length) - 3 * mixing - 6 * norms)


def test_a_query_meets_the_keys_before_it_and_no_others():
    model = build("transformer", 100, Size(64, 4, 16, window=3))
    width = model.config.d_model
    afresh = mixing_operations(model.backbone.layers[0].mixer, model, 1, 5)
    assert afresh == pytest.approx(4 * width * (1 + 2 + 3 + 3 + 3) / 5)
    carried = build("transformer_xl", 100, Size(64, 4, 16, window=3))
    assert mixing_operations(carried.backbone.layers[0].mixer, carried, 1, 5) == pytest.approx(
        4 * width * 3
    )


def test_attention_costs_more_with_its_reach_and_a_state_does_not():
    for arch, grows in (("transformer", True), ("mamba", False), ("lstm", False)):
        model = build(arch, 100, Size(64, 4, 16, window=256))
        assert (operations(model, 2, 256) > 1.05 * operations(model, 2, 32)) == grows
