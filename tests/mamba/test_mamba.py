"""Claims about lib.mamba: step is forward, segments are the whole, checkpoints come back."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba import checkpoint
from lib.mamba import model as mamba
from lib.mamba.model import MambaConfig, MambaLM

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = [
    MambaConfig(50, 24, 2, 4),
    MambaConfig(17, 33, 3, 5, d_conv=2, expand=1, dt_rank=7),
    MambaConfig(9, 16, 1, 1, d_conv=1, expand=3),
]


def make(config=CONFIGS[0], seed=0):
    torch.manual_seed(seed)
    return MambaLM(config).eval()


def tokens(config, batch, length, seed=1):
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 65])
def test_step_matches_forward(config, length):
    model, ids = make(config), tokens(config, 2, length)
    whole, last = model(ids, return_state=True)
    state = model.new_state(2)
    for t in range(length):
        logits, state = model.step(ids[:, t], state)
        # float32, two orders of summation: 1e-5 is 100 roundings of a logit near 1
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(state, last):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_segments_match_the_whole(config):
    model, ids = make(config), tokens(config, 2, 65)
    whole, last = model(ids, return_state=True)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 3), (3, 64), (64, 65)):
        logits, state = model(ids[:, begin:end], state, return_state=True)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state[-1][1], last[-1][1], rtol=1e-5, atol=1e-5)


def test_prefill_is_the_last_position_of_forward():
    model, ids = make(), tokens(CONFIGS[0], 3, 20)
    logits, _ = model.prefill(ids)
    torch.testing.assert_close(logits, model(ids)[:, -1])


def test_the_model_is_causal():
    """A later token must not change an earlier prediction."""
    model, ids = make(), tokens(CONFIGS[0], 1, 30)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_the_state_is_of_constant_size():
    model = make()
    sizes = {
        sum(
            t.numel()
            for layer in model(tokens(CONFIGS[0], 1, n), return_state=True)[1]
            for t in layer
        )
        for n in (1, 2, 100)
    }
    assert len(sizes) == 1


def test_loss_at_the_start_is_ln_of_the_vocabulary():
    config = MambaConfig(1024, 64, 2)
    model, ids = make(config), tokens(config, 4, 65)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    # the first logits are small random numbers (std 0.02 * sqrt(64) = 0.16),
    # so half their variance above
    assert abs(loss - math.log(1024)) < 0.05


def test_parameters_are_counted_by_the_formula():
    c = MambaConfig(1024, 256, 5)
    block = (
        2 * c.d_inner * c.d_model
        + c.d_inner * (c.d_conv + 1)
        + (c.rank + 2 * c.d_state) * c.d_inner
        + (c.rank + 1) * c.d_inner
        + c.d_inner * c.d_state
        + c.d_inner
        + c.d_inner * c.d_model
        + c.d_model
    )
    assert (
        make(c).parameter_count()
        == c.vocab_size * c.d_model + c.n_layer * block + c.d_model
        == 2_452_480
    )


def test_initial_delta_lies_where_published():
    """softplus(dt_proj.bias) is log-uniform between dt_min and dt_max."""
    delta = F.softplus(make(MambaConfig(8, 256, 1)).backbone.layers[0].mixer.dt_proj.bias)
    assert delta.min() >= 0.00099 and delta.max() <= 0.101
    assert abs(delta.log().mean() - math.log(0.01)) < 0.2  # the middle of the range, on a log scale


def test_parameter_names_are_the_official_ones():
    names = {n.split("layers.0.")[-1] for n, _ in make().named_parameters() if "layers.0." in n}
    assert names == {
        "norm.weight",
        "mixer.in_proj.weight",
        "mixer.conv1d.weight",
        "mixer.conv1d.bias",
        "mixer.x_proj.weight",
        "mixer.dt_proj.weight",
        "mixer.dt_proj.bias",
        "mixer.A_log",
        "mixer.D",
        "mixer.out_proj.weight",
    }


def test_every_parameter_gets_a_gradient():
    model, ids = make(), tokens(CONFIGS[0], 2, 20)
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_checkpoint_comes_back(tmp_path, config):
    model = make(config)
    checkpoint.save(model, tmp_path / "m")
    again = checkpoint.load(tmp_path / "m")
    assert again.config == config.__class__(**{**config.__dict__, "dt_rank": config.rank})
    assert torch.equal(again(tokens(config, 1, 9)), model(tokens(config, 1, 9)))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "mamba"
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_half_precision_halves_the_file_and_keeps_the_logits(tmp_path):
    model = make(MambaConfig(64, 64, 2))
    checkpoint.save(model, tmp_path / "full")
    checkpoint.save(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    ids = tokens(model.config, 1, 30)
    torch.testing.assert_close(
        checkpoint.load(tmp_path / "half")(ids), model(ids), rtol=0, atol=5e-3
    )


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign", "config", "size"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, damage):
    checkpoint.save(make(), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "foreign":
        weights.write_bytes(b"MThd" * 100)
    elif damage == "config":
        config.write_text("{")
    else:
        config.write_text(config.read_text().replace('"hidden_size": 24', '"hidden_size": 25'))
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path)
    assert "\n" not in str(error.value)


def test_tokens_of_a_wrong_shape_are_one_sentence():
    with pytest.raises(UserError, match=r"shape \(B, L\)"):
        make()(torch.zeros(5, dtype=torch.long))


class OnAGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def official_convolution(calls):
    """A stand-in for `causal_conv1d_fn` that checks what the kernel behind it asks for."""

    def convolve(x, weight, bias=None, initial_states=None, activation=None):
        calls.append(x.shape)
        batch, dim, length = x.shape
        assert (
            x.stride(1) == 1
            and x.stride(2) > 1
            and x.stride(2) % 8 == x.stride(0) % 8 == dim % 8 == 0
        )
        assert (
            weight.shape == (dim, weight.shape[1])
            and 2 <= weight.shape[1] <= 4
            and activation == "silu"
        )
        assert (
            initial_states.shape == (batch, dim, weight.shape[1] - 1)
            and initial_states.stride(1) == 1
        )
        assert weight.dtype == x.dtype == initial_states.dtype and (
            bias is None or bias.dtype == x.dtype
        )
        return F.silu(
            F.conv1d(torch.cat([initial_states, x], 2), weight[:, None], bias, groups=dim)
        )

    return convolve


@pytest.mark.parametrize(
    "config, used",
    [
        (MambaConfig(9, 12, 1, 4), True),
        (MambaConfig(9, 12, 1, 4, d_conv=2, conv_bias=False), True),
        (MambaConfig(9, 33, 1, 4, expand=1), False),
        (MambaConfig(9, 12, 1, 4, d_conv=5), False),
        (MambaConfig(9, 12, 1, 4, d_conv=1), False),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 20])
def test_official_convolution_is_used_on_a_gpu_where_it_can_be(config, used, length, monkeypatch):
    """On half of in_proj's output, as it comes;
    where channels or taps do not suit it, ours goes on.
    """
    mixer, calls = mamba.MambaMixer(config), []
    torch.manual_seed(0)
    x = torch.randn(2, length, 2 * config.d_inner).chunk(2, -1)[0]
    before = torch.randn(2, config.d_conv - 1, config.d_inner)
    monkeypatch.setattr(mamba, "fast_convolution", lambda: official_convolution(calls))
    expected = mixer.convolve(x, before)
    assert not calls
    found = mixer.convolve(x.as_subclass(OnAGPU), before)
    assert len(calls) == used
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers, n_layer", [(1, 2), (3, 5), (5, 8), (2, 2), (2, 7)])
def test_a_deepened_model_is_the_same_function_and_learns_in_every_layer(layers, n_layer):
    torch.manual_seed(layers)
    model = MambaLM(MambaConfig(11, 16, layers, 4))
    deeper = checkpoint.deepen(model, n_layer)
    tokens = torch.randint(11, (2, 17))
    logits = deeper(tokens)
    assert torch.equal(logits, model(tokens)) and len(deeper.backbone.layers) == n_layer
    logits.logsumexp(-1).sum().backward()
    assert all(layer.mixer.out_proj.weight.grad.abs().max() > 0 for layer in deeper.backbone.layers)
    with pytest.raises(UserError, match=f"at least {n_layer}"):
        checkpoint.deepen(deeper, n_layer - 1)
