"""Claims about lib.mamba: step is forward, segments are the whole, checkpoints come back."""

import copy
import inspect
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba import checkpoint
from lib.mamba import model as mamba
from lib.mamba.model import MambaConfig, MambaLM
from lib.mamba.step_cpu import Stepper, stepper

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


def test_what_the_model_cannot_read_is_one_sentence():
    model = make()
    ids = tokens(CONFIGS[0], 2, 5)
    state = model.new_state(2)
    for call, says in (
        (lambda: model(ids + 50), "outside the vocabulary of 50"),
        (lambda: model(ids, state[:1]), "has 1 layers, the model 2"),
        (lambda: model(ids, model.new_state(3)), "one of 3 rows, and tokens have 2"),
        (lambda: model(ids, model.new_state(1), backend="loop"), "one of 1 rows"),
        (lambda: model.prefill(ids[:, :0]), "one token at least"),
        (lambda: model.step(ids[:, 0], state[:1]), "has 1 layers, the model 2"),
        (lambda: model.step(ids[:, 0], model.new_state(1)), "one of 1 rows"),
        (lambda: model.step(ids[:, :1], state), r"tokens of shape \(B,\)"),
        (lambda: model.step(ids[:, 0], None), "take `new_state`"),
    ):
        with pytest.raises(UserError, match=says):
            call()
    assert torch.equal(model(ids.to(torch.uint16)), model(ids)), "streams hold 16 bits"


class Adapted(torch.nn.Linear):
    """A projection with a low-rank adapter beside it (Hu et al. 2021)."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.down = torch.nn.Parameter(torch.randn(2, linear.in_features))
        self.up = torch.nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def adapt(model):
    for layer in model.backbone.layers:
        layer.mixer.in_proj = Adapted(layer.mixer.in_proj)


def other_norm(model):
    for layer in model.backbone.layers:
        layer.norm = torch.nn.LayerNorm(24)


def no_dropout(model):
    for layer in model.backbone.layers:
        layer.dropout = torch.nn.Identity()


@pytest.mark.parametrize("change", [adapt, other_norm, no_dropout])
def test_modules_that_were_replaced_are_the_ones_that_run(change):
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    change(model)
    logits = model(ids)
    torch.testing.assert_close(logits, model(ids, backend="loop"), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    last, _ = model.prefill(ids)
    assert stepper(model, 2) is None
    state = model.new_state(2)
    for column in ids.unbind(1):
        one, state = model.step(column, state)
    torch.testing.assert_close(one, last, rtol=1e-4, atol=1e-5)


def test_whoever_listens_at_a_module_hears_it():
    model, ids, heard = make().train(), tokens(CONFIGS[0], 2, 7), []
    model.backbone.norm_f.register_forward_hook(lambda *_: heard.append("norm"))
    layer = model.backbone.layers[0].mixer.in_proj
    layer.register_full_backward_hook(lambda *_: heard.append("gradient"))
    model(ids[:, :-1], targets=ids[:, 1:]).backward()
    assert heard == ["norm", "gradient"]
    with pytest.raises(UserError, match="was replaced or has a hook"):
        Stepper(model, 2)


def scaled(model):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    model.backbone.embeddings = Scaled.from_pretrained(model.backbone.embeddings.weight)


def patched(model):
    linear = model.backbone.layers[0].mixer.in_proj
    linear.forward = lambda x: 2 * torch.nn.functional.linear(x, linear.weight)


def other_class(model):
    class Louder(MambaLM):
        def logits(self, x):
            return 2 * super().logits(x)

    model.__class__ = Louder


@pytest.mark.parametrize("change", [scaled, patched, other_class])
def test_the_whole_model_step_never_plays_another_model(change):
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    change(model)
    assert stepper(model, 2) is None
    torch.testing.assert_close(model(ids), model(ids, backend="loop"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "loop", "parallel"])
def test_recomputing_changes_no_gradient(backend):
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    found = []
    for model.recomputes in (False, True):
        model.zero_grad()
        model(ids[:, :-1], targets=ids[:, 1:], backend=backend).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("backend", ["auto", "loop", "parallel"])
def test_torch_func_differentiates_the_model_on_every_path(backend):
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    given = (ids[:, :-1],), {"targets": ids[:, 1:], "backend": backend}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, *given))(weights)
    model(*given[0], **given[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_any_whole_type_are_taken(dtype):
    model, ids = make().to(dtype), tokens(CONFIGS[0], 2, 7)
    wanted = model(ids[:, :-1], targets=ids[:, 1:])
    for kind in (torch.uint16, torch.int32, torch.uint8):
        assert model(ids[:, :-1].to(kind), targets=ids[:, 1:].to(kind)) == wanted


def test_a_dropout_that_was_put_to_rest_rests():
    model, ids = make(replace(CONFIGS[0], dropout=0.5)).train(), tokens(CONFIGS[0], 2, 7)
    for layer in model.backbone.layers:
        layer.dropout.eval()
    assert torch.equal(model(ids), model(ids))


def test_a_copy_of_a_model_that_recomputes_has_weights_of_its_own():
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    model.recomputes = True
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    wanted = twin(ids)
    torch.testing.assert_close(model(ids, backend="loop"), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(ids), wanted)


def test_every_way_to_the_cross_entropy_has_the_same_gradient():
    model, ids = make(), tokens(CONFIGS[0], 2, 7)
    weight = torch.rand(2, 6)

    def gradients(model):
        x, _ = model.residual(ids[:, :-1])
        (model.nats(x, ids[:, 1:]) * weight.to(x.dtype)).sum().backward()
        return [p.grad.float() for p in model.parameters()]

    exact = gradients(copy.deepcopy(model).double())
    torch.testing.assert_close(gradients(model), exact, rtol=1e-3, atol=1e-5)


def test_torch_s_own_ensemble_of_models_learns():
    models, ids = [make(seed=seed) for seed in (1, 2)], tokens(CONFIGS[0], 2, 7)
    weights, _ = torch.func.stack_module_state(models)

    def loss(weights):
        given = (ids[:, :-1],), {"targets": ids[:, 1:]}
        return torch.func.functional_call(models[0], weights, *given)

    torch.func.vmap(loss)(weights).sum().backward()
    for number, model in enumerate(models):
        model(ids[:, :-1], targets=ids[:, 1:]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(weights[name].grad[number], parameter.grad)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("total", [True, False])
def test_targets_mean_the_same_on_the_fused_and_on_the_plain_path(dtype, total):
    config = CONFIGS[0]
    model, ids = make(config).to(dtype), tokens(config, 2, 3)
    with torch.no_grad():
        x, _ = model.residual(ids)
        exact = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="none")
        kept = exact.view(2, 3) * torch.tensor([[1, 0, 1], [0, 1, 1]])
        targets = ids.clone()
        targets[0, 1], targets[1, 0] = -1, -100  # both count nothing
        nats = model.nats(x, targets, total=total)
        torch.testing.assert_close(nats, kept.sum() if total else kept, rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match=r"targets of shape \(2, 3\).*not \(3, 2\)"):
            # without the tests' own check of shapes
            inspect.unwrap(type(model).nats)(model, x, ids.view(3, 2), total=total)
        targets[0, 0] = config.vocab_size
        with pytest.raises(UserError, match="a target is 50, and the vocabulary has 50 tokens"):
            model.nats(x, targets, total=total)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"d_conv": 0}, "d_conv is below 1"),
        ({"d_state": 0}, "d_state is below 1"),
        ({"expand": 0}, "expand is below 1"),
        ({"dt_min": 0.0}, "both above 0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "not between 0.2 and 0.1"),
    ],
)
def test_sizes_that_make_no_model_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        replace(CONFIGS[0], **wrong)
