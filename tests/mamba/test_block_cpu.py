"""Claims about lib.mamba.block_cpu: convolution, block and loss are those of plain PyTorch,
with every gradient.
"""

import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba import block_cpu
from lib.mamba import model as mamba
from lib.mamba.model import MambaConfig, MambaLM, MambaMixer

pytestmark = [
    pytest.mark.skipif(not block_cpu.available(), reason="no C++ compiler here"),
    pytest.mark.usefixtures("one_thread"),
]

LENGTHS = [1, 2, 3, 63, 64, 65, 67, 129, 257]  # around its shares of 64 steps


def problem(length, channels, K, bias=True, batch=2):
    random = torch.Generator().manual_seed(length + channels + K)
    draw = lambda *shape: torch.randn(shape, generator=random).requires_grad_()
    return {
        "x": draw(batch, length, channels),
        "taps": draw(channels, K),
        "bias": draw(channels) if bias else None,
        "before": draw(batch, K - 1, channels),
    }


def by_torch(x, taps, bias, before):
    """The same by torch's conv1d, in float64."""
    both = torch.cat([before, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(both, taps[:, None], bias, groups=len(taps))).transpose(1, 2)


def result_and_gradients(call, given, weight):
    leaves = [t for t in given.values() if t is not None]
    y = call(**given)
    return y.detach(), *torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves)


def assert_close(given, weight):
    exact = result_and_gradients(
        by_torch,
        {k: t if t is None else t.detach().double().requires_grad_() for k, t in given.items()},
        weight,
    )
    for ours, theirs in zip(
        result_and_gradients(block_cpu.convolve_silu, given, weight), exact, strict=True
    ):
        # float32: some ten roundings of the largest; a tap's gradient sums over all steps
        assert ours.shape == theirs.shape
        assert ours.numel() == 0 or (ours - theirs).abs().max() <= 3e-6 * theirs.abs().max()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels, K", [(1, 4), (7, 1), (16, 2), (33, 3), (50, 5)])
def test_convolution_is_torch_s_with_every_gradient(length, channels, K):
    given = problem(length, channels, K, bias=channels != 33)
    assert_close(given, torch.randn(given["x"].shape))


def test_input_may_be_a_view():
    """Half of in_proj's output, and a gradient that is not laid out as the output is."""
    given = problem(65, 12, 4)
    given["x"] = torch.randn(2, 65, 24).chunk(2, -1)[0].detach().requires_grad_()
    given["x"].data = torch.randn(2, 65, 24).chunk(2, -1)[0]
    assert not given["x"].is_contiguous()
    assert_close(given, torch.randn(2, 12, 65).transpose(1, 2))


def test_digits_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(block_cpu, "ONE_THREAD", 0)
    given, found, threads = problem(257, 40, 4), [], torch.get_num_threads()
    weight = torch.randn(2, 257, 40)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(result_and_gradients(block_cpu.convolve_silu, given, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_nothing_is_left_unwritten(monkeypatch):
    """Where memory comes filled with NaN, none of it is in the results."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: empty(t, **how).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: torch.full(shape, torch.nan))
    given = problem(65, 17, 4)
    assert all(
        t.isfinite().all()
        for t in result_and_gradients(block_cpu.convolve_silu, given, torch.ones(2, 65, 17))
    )


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(9, 12, 1, 4),
        MambaConfig(9, 7, 1, 3, d_conv=2, conv_bias=False),
        MambaConfig(9, 5, 1, 2, d_conv=1),
        MambaConfig(9, 5, 1, 2, d_conv=6),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_mixer_convolves_alike_with_and_without_the_kernel(config, length, monkeypatch):
    """Outputs, what is remembered, and the gradients of both;
    the last by what reaches the first input.
    """
    torch.manual_seed(0)
    mixer = MambaMixer(config)
    x, before = (
        torch.randn(2, length, config.d_inner),
        torch.randn(2, config.d_conv - 1, config.d_inner),
    )
    found = []
    for ready in (True, False):
        monkeypatch.setattr(mamba.block_cpu, "available", lambda ready=ready: ready)
        here, earlier = x.clone().requires_grad_(), before.clone().requires_grad_()
        y, after = mixer.convolve(here, earlier)
        assert after.shape == before.shape
        found.append(
            (
                y,
                after,
                *torch.autograd.grad(
                    y.square().sum() + after.sin().sum(), [here, earlier, mixer.conv1d.weight]
                ),
            )
        )
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-5)


def test_float64_goes_through_plain_pytorch():
    mixer = MambaMixer(MambaConfig(9, 12, 1, 4))
    y, after = mixer.convolve(torch.randn(2, 9, 24, dtype=torch.float64), torch.zeros(2, 3, 24))
    assert y.dtype == after.dtype == torch.float64


def test_bfloat16_is_rounded_once():
    """Computed in float32: as exact as the eight bits of the answer, its gradient too."""
    mixer = MambaMixer(MambaConfig(9, 12, 1, 4))
    x, before = torch.randn(2, 67, 24).bfloat16().requires_grad_(), torch.randn(2, 3, 24).bfloat16()
    weight = torch.randn(2, 67, 24).bfloat16()
    y, after = mixer.convolve(x, before)
    (dx,) = torch.autograd.grad((y * weight).sum(), x)
    assert y.dtype == after.dtype == dx.dtype == torch.bfloat16
    wide = x.detach().double().requires_grad_()
    exact = by_torch(
        wide,
        *(t.detach().bfloat16().double() for t in (mixer.conv1d.weight[:, 0], mixer.conv1d.bias)),
        before.double(),
    )
    (exact_dx,) = torch.autograd.grad((exact * weight.double()).sum(), wide)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=2**-8, atol=1e-5)


# -- the block and the loss ------------------------------------------------------------------------
SIZES = [
    MambaConfig(37, 40, 2, 16),
    MambaConfig(64, 24, 1, 5, d_conv=2),
    MambaConfig(9, 7, 2, 3, d_conv=1, tied=False),
    MambaConfig(33, 48, 1, 24, bias=True, conv_bias=False, expand=3),
]


def of(model, tokens, targets, state, dtype=None):
    """The loss, the state after it, and every gradient: of the weights, and of the state before."""
    state = [tuple(t.detach().clone().requires_grad_() for t in memory) for memory in state]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss, after = model(tokens, state, return_state=True, targets=targets)
    wish = loss + sum(t.float().sin().sum() for memory in after for t in memory)
    leaves = [*model.parameters(), *(t for memory in state for t in memory)]
    grads = torch.autograd.grad(wish, leaves, allow_unused=True)
    zeros = [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]
    return loss.detach(), [t.detach() for memory in after for t in memory], zeros


def setting(config, length, batch=3):
    torch.manual_seed(length)
    model = MambaLM(config)
    tokens = torch.randint(config.vocab_size, (batch, length + 1))
    targets = tokens[:, 1:].clone()
    targets[0, length // 2 :] = -1  # a piece that has ended
    state = [
        (torch.randn_like(window), torch.randn_like(h)) for window, h in model.new_state(batch)
    ]
    # row 1 has jumped: its state is zero
    state = [tuple(t.index_fill(0, torch.tensor(1), 0) for t in memory) for memory in state]
    return model, tokens[:, :-1], targets, state


@pytest.mark.parametrize("length", [1, 2, 13, 65])
@pytest.mark.parametrize("config", SIZES, ids=str)
def test_the_fused_model_is_the_plain_one_with_every_gradient(config, length, monkeypatch):
    """In float32: loss, state and all gradients, of the weights and of the state before."""
    found = setting(config, length)
    assert block_cpu.suits(found[0].backbone.layers[0], torch.zeros(1, 1, config.d_model))
    fused = of(*found)
    monkeypatch.setattr(block_cpu, "precision", lambda x: None)
    plain = of(*found)
    torch.testing.assert_close(fused[0], plain[0], rtol=2e-6, atol=1e-5)
    for ours, theirs in zip(fused[1] + fused[2], plain[1] + plain[2], strict=True):
        # sums of some thousand float32 products, in another order
        assert ours.shape == theirs.shape
        assert not ours.numel() or (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max() + 1e-6


@pytest.mark.parametrize("config", SIZES[:2], ids=str)
def test_in_bfloat16_the_fused_model_is_as_close_to_float32_as_the_plain_one(config, monkeypatch):
    """Its errors are those of autocast in plain PyTorch, up to a half more;
    nothing else is lost.
    """
    found = setting(config, 65)
    fused = of(*found, torch.bfloat16)
    monkeypatch.setattr(block_cpu, "precision", lambda x: None)
    plain, right = of(*found, torch.bfloat16), of(*found)

    def errors(which):
        return [
            ((a.float() - b).norm() / (b.norm() + 1e-12)).item()
            for a, b in zip(which[2], right[2], strict=True)
        ]

    assert abs(fused[0] / right[0] - 1) < 2**-8
    for ours, theirs in zip(errors(fused), errors(plain), strict=True):
        assert ours <= 1.5 * theirs + 2**-8


def test_dropout_draws_the_same_mask_fused_and_plain(monkeypatch):
    model, *rest = setting(MambaConfig(37, 40, 2, 16, dropout=0.4), 33)
    model.train()
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(block_cpu, "precision", lambda x: None)
        torch.manual_seed(5)
        found.append(of(model, *rest))
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)
    model.eval()
    assert not torch.equal(of(model, *rest)[0], found[1][0])


def test_who_listens_inside_a_block_hears_it():
    """Hooks at inner modules, other dtypes and named backends take the plain path."""
    model, tokens, *_ = setting(SIZES[0], 5)
    heard, block = [], model.backbone.layers[0]
    x = torch.zeros(1, 5, 40)
    hook = block.mixer.x_proj.register_forward_hook(lambda *a: heard.append(1))
    assert not block_cpu.suits(block, x)
    model(tokens)
    assert heard
    hook.remove()
    assert block_cpu.suits(block, x)
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not block_cpu.suits(block, x)
    everywhere.remove()
    assert block_cpu.suits(block, x)
    assert not block_cpu.suits(block, x.double()) and not block_cpu.suits(block.double(), x)


def test_the_loss_of_each_token_is_torch_s():
    """With a target that does not count, a vocabulary of any size, and logits far from zero."""
    for size in (1, 15, 16, 17, 64, 333):
        torch.manual_seed(size)
        model = MambaLM(MambaConfig(size, 24, 1, 4))
        x, targets = 30 * torch.randn(2, 9, 24), torch.randint(size, (2, 9))
        targets[1, 3] = -1
        with torch.no_grad():
            model.backbone.embeddings.weight.mul_(50)
            logits = model.logits(x).flatten(0, 1)
            theirs = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
            torch.testing.assert_close(
                model.nats(x, targets).flatten(), theirs, rtol=1e-5, atol=2e-4
            )


def test_a_step_keeps_less_memory_than_the_plain_path(monkeypatch):
    """What autograd keeps between forward and backward, in bytes,
    bfloat16 against autocast in plain PyTorch.
    """
    model, tokens, targets, state = setting(MambaConfig(256, 32, 3, 16), 513)

    def kept():
        sizes = {}
        note = lambda t: (
            sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
        )
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(tokens, state, targets=targets)
        del loss
        return sum(sizes.values())

    fused = kept()
    monkeypatch.setattr(block_cpu, "precision", lambda x: None)
    assert fused < 0.75 * kept()


def test_what_would_read_foreign_memory_is_refused_in_a_sentence():
    model, tokens, targets, state = setting(SIZES[0], 9)
    layer, x = model.backbone.layers[0], torch.zeros(3, 9, 40)
    loss = lambda wrong: block_cpu.cross_entropy(
        x, layer.norm.weight, model.head, wrong, 1e-5, torch.float32, True
    )
    for wrong in (targets[:, :-1], targets.int(), targets.float()):
        with pytest.raises(UserError, match="whole numbers of shape"):
            loss(wrong)
    with pytest.raises(UserError, match="a target is 37, and the vocabulary has 37"):
        loss(torch.full_like(targets, 37))
    before, h = state[0]
    for wrong in ((before[:1], h), (before, h[:, :5]), (before.to("meta"), h)):
        with pytest.raises(UserError, match="this layer needs"):
            block_cpu.block(layer, x, wrong)
