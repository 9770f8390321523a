"""Claims about lib.mamba beside other people's Mambas:
the same weights give the same numbers, both ways.
"""

import json
import subprocess
import sys
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from made_up import sdist
from safetensors.torch import save_file
from torch.nn import functional as F

from lib import mamba
from lib.env.errors import UserError
from lib.env.paths import DATA, ROOT
from lib.lab.peers import block as mamba_peers
from lib.lab.peers import scans as peers
from lib.mamba.model import MambaConfig, MambaLM, MambaMixer
from lib.scan import cpu as scan_cpu
from lib.scan.selective import BACKENDS
from lib.scan.triton_interpreter import fast_interpreter
from lib.train.optim import parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")

SHIPPED = DATA / "model"

# float32: a logit near 1 is a sum of some hundreds of products, in their order and in ours
LOGITS = 1e-5
GRADIENTS = 1e-4  # of the largest of a parameter's gradients: sums over all positions too

TEN = [  # odd widths, N of 4 to 64, K, rank of delta, biases on and off, tied and untied
    MambaConfig(50, 24, 2, 4),
    MambaConfig(17, 33, 3, 5, d_conv=2, expand=1, dt_rank=7),
    MambaConfig(97, 40, 1, 64, tied=False),
    MambaConfig(64, 15, 2, 16, d_conv=3, expand=3, bias=True),
    MambaConfig(31, 65, 1, 8, dt_rank=1, conv_bias=False),
    MambaConfig(101, 48, 2, 32, bias=True, conv_bias=False, tied=False),
    MambaConfig(11, 7, 5, 13, d_conv=5, dt_rank=3, tied=False),
    MambaConfig(80, 64, 2, 16, d_conv=4, dt_rank=8, norm_eps=1e-3),
    MambaConfig(23, 21, 2, 6, d_conv=2, expand=3, bias=True, tied=False),
    MambaConfig(260, 100, 1, 4, expand=1, dt_rank=11),
]
ten = pytest.mark.parametrize("config", TEN, ids=lambda c: f"M{c.d_model}-N{c.d_state}-K{c.d_conv}")


def shaken(model, seed):
    """Random noise on every parameter, so that no bias is zero and no norm one:
    a swap would show.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def ours(config, seed=0):
    torch.manual_seed(seed)
    return shaken(MambaLM(config), seed)


def tokens(config, batch, length, seed=1):
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def off(a, b):
    """The largest |difference|."""
    return (a - b).abs().max().item()


# ---- transformers -------------------------------------------------------------------------


def theirs(config, seed=0):
    from transformers import MambaConfig as Theirs
    from transformers import MambaForCausalLM

    torch.manual_seed(seed)
    return shaken(
        MambaForCausalLM(
            Theirs(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                num_hidden_layers=config.n_layer,
                state_size=config.d_state,
                conv_kernel=config.d_conv,
                expand=config.expand,
                time_step_rank=config.rank,
                use_bias=config.bias,
                use_conv_bias=config.conv_bias,
                tie_word_embeddings=config.tied,
                layer_norm_epsilon=config.norm_eps,
                use_cache=False,
            )
        ),
        seed,
    )


def logits_and_gradients(model, ids):
    """Logits (B, L, V), and the gradient of the loss in every parameter, by name."""
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(our_model, their_model, ids):
    our_logits, our_gradients = logits_and_gradients(our_model, ids)
    their_logits, their_gradients = logits_and_gradients(their_model, ids)
    assert off(our_logits, their_logits) <= LOGITS
    assert our_gradients.keys() == their_gradients.keys()
    for name, theirs in their_gradients.items():
        assert off(our_gradients[name], theirs) <= GRADIENTS * theirs.abs().max().item(), name


@ten
def test_weights_made_by_transformers_give_their_logits_and_gradients(tmp_path, config):
    model = theirs(config)
    model.save_pretrained(tmp_path)
    opened = mamba.load(tmp_path)
    assert opened.config == MambaConfig(**{**vars(config), "dt_rank": config.rank})
    assert_same(opened, model, tokens(config, 2, 33))


@ten
def test_transformers_opens_ours_and_gives_our_logits_and_gradients(tmp_path, config):
    from transformers import AutoModelForCausalLM

    model = ours(config)
    mamba.save(model, tmp_path)
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    # nothing missing, nothing left over, nothing that did not fit
    assert not any(report.values()), report
    opened.config.use_cache = False
    assert_same(model, opened.eval(), tokens(config, 2, 33))


def test_the_shipped_checkpoint_plays_the_same_tokens_in_transformers():
    """Greedy, 96 tokens from the beginning of a piece; 1 is BOS."""
    from transformers import AutoModelForCausalLM

    count = 96
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    start = torch.tensor([[1]])
    expected = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
    )[0, 1:].tolist()
    own = mamba.load(SHIPPED)
    logits, state = own.prefill(start)
    played = []
    for _ in range(count):
        # as min_new_tokens does: 2 is EOS
        logits = logits.index_fill(1, torch.tensor(2), -torch.inf)
        played.append(logits.argmax().item())
        logits, state = own.step(torch.tensor(played[-1:]), state)
    assert played == expected
    assert len(set(played)) > 10  # not one token over and over


# ---- mamba-ssm's block --------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    try:
        return mamba_peers.block()
    except UserError as error:
        pytest.skip(str(error))


def their_mixer(official, config):
    torch.manual_seed(3)
    return shaken(
        official(
            config.d_model,
            config.d_state,
            config.d_conv,
            config.expand,
            config.rank,
            bias=config.bias,
            conv_bias=config.conv_bias,
        ),
        3,
    )


def memory(config, batch):
    return (
        torch.zeros(batch, config.d_conv - 1, config.d_inner),
        torch.zeros(batch, config.d_inner, config.d_state),
    )


@ten
def test_block_of_mamba_ssm_gives_our_outputs_and_gradients(official, config):
    theirs = their_mixer(official, config)
    mixer = MambaMixer(config)
    mixer.load_state_dict(theirs.state_dict())  # the same names and shapes, or it raises
    u = torch.randn(2, 65, config.d_model, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(4))
    found = {}
    for name, model in (("ours", lambda u: mixer(u, memory(config, 2))[0]), ("theirs", theirs)):
        here = u.clone().requires_grad_()
        y = model(here)
        parameters = dict((mixer if name == "ours" else theirs).named_parameters())
        gradients = torch.autograd.grad((y * weight).sum(), [here, *parameters.values()])
        found[name] = y.detach(), dict(zip(("u", *parameters), gradients, strict=True))
    expected = found["theirs"][0]
    assert off(found["ours"][0], expected) <= LOGITS
    for name, gradient in found["theirs"][1].items():
        assert off(found["ours"][1][name], gradient) <= GRADIENTS * gradient.abs().max().item(), (
            name
        )


@pytest.mark.parametrize("config", TEN[:4], ids=lambda c: f"M{c.d_model}")
def test_step_of_mamba_ssm_gives_our_step(official, config):
    theirs = their_mixer(official, config)
    mixer = MambaMixer(config).eval()
    mixer.load_state_dict(theirs.state_dict())
    state, cache = memory(config, 2), theirs.allocate_inference_cache(2, 9)
    random = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for _ in range(9):
            u = torch.randn(2, config.d_model, generator=random)
            y, state = mixer.step(u, state)
            expected, *cache = theirs.step(u[:, None], *cache)
            assert off(y, expected[:, 0]) <= LOGITS
        assert off(state[1], cache[1]) <= LOGITS


def test_block_of_mamba_ssm_has_our_initial_values(official):
    """A and D to the bit; the biases of delta from the same draw."""
    config = MambaConfig(8, 24, 1, 7, dt_rank=3)
    theirs, mixer = official(24, 7, dt_rank=3), MambaMixer(config)
    assert torch.equal(theirs.A_log, mixer.A_log) and torch.equal(theirs.D, mixer.D)
    for model in (theirs, mixer):
        delta = F.softplus(model.dt_proj.bias)
        assert delta.min() >= 0.00099 and delta.max() <= 0.101
        assert model.dt_proj.weight.abs().max() <= 3**-0.5


def test_loading_the_block_leaves_no_module_behind(official):
    """In a Python of its own, where nobody else has imported anything like it."""
    code = (
        "import sys; from lib.lab.peers import block; block.block()\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('mamba_ssm', 'einops', 'causal_conv1d', 'selective_scan_cuda')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "bring, words",
    [
        (sdist(b"other code", mamba_peers.FILE), "wrong checksum"),
        (lambda requirement, work, what, **options: None, "damaged"),
        (sdist(b"", "elsewhere.py"), "damaged"),
    ],
)
def test_wrong_archive_is_said_and_nothing_is_kept(bring, words, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "pip_download", bring)
    with pytest.raises(peers.Unreachable, match=words):
        mamba_peers.block_file(tmp_path, say=str)
    assert not list(tmp_path.glob("**/*.py")) and not list(tmp_path.glob("*/"))


# ---- mamba-ssm's checkpoints --------------------------------------------------------------


def official_names(model):
    """The state dict as mamba-ssm's MambaLMHeadModel has it, and the config.json that it writes."""
    weights = {
        k.replace("embeddings", "embedding"): v.clone() for k, v in model.state_dict().items()
    }
    weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"].clone())
    c = model.config
    return weights, {
        "d_model": c.d_model,
        "d_intermediate": 0,
        "n_layer": c.n_layer,
        "vocab_size": c.vocab_size - 3,
        "ssm_cfg": {},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": c.tied,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_of_mamba_ssm_opens(tmp_path, tied):
    """Their vocabulary of 45 is padded up to 48."""
    model = ours(MambaConfig(48, 20, 2, 5, tied=tied))
    weights, config = official_names(model)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened, ids = mamba.load(tmp_path), tokens(model.config, 2, 17)
    assert opened.config.tied == tied and opened.config.vocab_size == 48
    assert torch.equal(opened(ids), model(ids))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 49}))
    with pytest.raises(UserError):
        mamba.load(tmp_path)


def test_pickle_is_refused_in_one_sentence(tmp_path):
    weights, config = official_names(ours(TEN[0]))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pickle, which may run code.*model.safetensors$") as error:
        mamba.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layers.1.mixer.D",
        "backbone.norm_f.weight",
        "backbone.layers.0.mixer.out_proj.weight",
        "backbone.layers.1.norm.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "misfit"])
def test_tensor_that_is_missing_or_does_not_fit_is_named(name, damage):
    weights = dict(ours(TEN[0]).state_dict())
    tensor = weights.pop(name)
    if damage == "misfit":
        weights[name] = torch.cat([tensor, tensor])
    with pytest.raises(UserError, match=f"need {name} of shape .* but hold") as error:
        mamba.from_weights(weights)
    assert "\n" not in str(error.value)
    assert ("nothing" in str(error.value)) == (damage == "missing")


@pytest.mark.parametrize(
    "name", ["backbone.layers.0.norm.bias", "backbone.layers.0.mixer.Wqkv.weight", "rotary"]
)
def test_extra_tensor_is_named(name):
    """A LayerNorm's bias, an attention layer, anything else."""
    with pytest.raises(UserError, match=f"hold {name}, which a Mamba"):
        mamba.from_weights(dict(ours(TEN[0]).state_dict()) | {name: torch.zeros(3)})


def test_weights_of_another_kind_are_one_sentence():
    with pytest.raises(UserError, match="not those of a Mamba") as error:
        mamba.from_weights({"wte.weight": torch.zeros(5, 4)})
    assert "\n" not in str(error.value)


# ---- one model, read in three ways --------------------------------------------------------

LONG = 2_049
# the loop goes a step at a time, and the interpreted kernel in blocks of 32:
# eight borders of them, and one step more
SHORT = {"loop": 257, "triton": 257}


def agrees(a, b):
    """To 1e-5: logits here reach 2, states less."""
    assert off(a, b) <= 1e-5, off(a, b)


@contextmanager
def shapes_unchecked():
    """For thousands of calls with the same shapes:
    to check those takes ten times as long as a step.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def stepped():
    """A model, 2,049 tokens, the logits of `step` at each position and the last state."""
    model = ours(MambaConfig(29, 9, 2, 4, d_conv=3), seed=6)
    ids = tokens(model.config, 1, LONG, seed=7)
    state, found = model.new_state(1), []
    with torch.inference_mode(), shapes_unchecked():
        for token in ids.unbind(1):
            logits, state = model.step(token, state)
            found.append(logits)
    return model, ids, torch.stack(found, 1), state


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_segments_and_whole_agree_at_every_position(stepped, backend):
    model, ids, by_step, _ = stepped
    available(backend)
    length = SHORT.get(backend, LONG)
    every_reading(model, ids[:, :length], by_step[:, :length], backend)


@pytest.mark.gpu
def test_step_segments_and_whole_agree_at_every_position_on_a_gpu(stepped):
    model, ids, by_step, _ = stepped
    try:
        model.cuda()
        for backend in ("parallel", "triton"):
            every_reading(model, ids.cuda(), by_step.cuda(), backend)
    finally:
        model.cpu()


def test_step_ends_in_the_state_of_forward(stepped):
    model, ids, _, state = stepped
    _, last = model(ids, return_state=True)
    for (window, h), (expected_window, expected_h) in zip(state, last, strict=True):
        agrees(window, expected_window)
        agrees(h, expected_h)


def available(backend):
    if backend == "cpu" and not scan_cpu.available():
        pytest.skip("no C++ compiler here")
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed here")
        if torch.cuda.is_available():
            pytest.skip("not interpreted where there is a GPU")
        fast_interpreter()


@torch.inference_mode()
def every_reading(model, ids, by_step, backend):
    """Whole, and in segments of odd lengths, against `step`."""
    whole = model(ids, backend=backend)
    agrees(whole, by_step)
    state, parts, begin = None, [], 0
    for end in (
        *(end for end in (1, 3, 64, 65, 256, 700, 1024, 2048) if end < ids.shape[1]),
        ids.shape[1],
    ):
        logits, state = model(ids[:, begin:end], state, return_state=True, backend=backend)
        parts.append(logits)
        begin = end
    agrees(torch.cat(parts, 1), by_step)


# ---- initial values -----------------------------------------------------------------------

WHOLE = MambaConfig(64, 96, 3, 16, bias=True)


@pytest.fixture(scope="module")
def fresh():
    torch.manual_seed(0)
    return MambaLM(WHOLE)


def test_A_starts_as_minus_1_to_minus_N_everywhere(fresh):
    for layer in fresh.backbone.layers:
        A = -torch.exp(layer.mixer.A_log)
        # exp(log(n)) is n to two roundings
        torch.testing.assert_close(A, -torch.arange(1.0, 17).expand(192, 16), rtol=3e-7, atol=0)


def test_delta_starts_in_the_published_range_everywhere(fresh):
    for layer in fresh.backbone.layers:
        delta = F.softplus(layer.mixer.dt_proj.bias)
        assert delta.min() >= WHOLE.dt_min * 0.999 and delta.max() <= WHOLE.dt_max * 1.001
        assert delta.min() < 0.002 and delta.max() > 0.05  # and uses it
        assert layer.mixer.dt_proj.weight.abs().max() <= WHOLE.rank**-0.5


def test_D_and_norms_start_at_one_and_biases_at_zero(fresh):
    assert torch.equal(fresh.backbone.norm_f.weight, torch.ones(96))
    for layer in fresh.backbone.layers:
        assert torch.equal(layer.norm.weight, torch.ones(96)) and torch.equal(
            layer.mixer.D, torch.ones(192)
        )
        assert not layer.mixer.in_proj.bias.any() and not layer.mixer.out_proj.bias.any()


def test_out_proj_starts_smaller_in_a_deeper_model(fresh):
    """Divided by the root of the number of layers,
    so that the residual does not grow with depth.
    """
    for layer in fresh.backbone.layers:
        # uniform in +-1/sqrt(fan in) before, as every linear layer
        assert 0.95 < layer.mixer.out_proj.weight.abs().max() * (3 * 192) ** 0.5 <= 1


def test_no_weight_decay_where_it_would_pull_at_time_itself(fresh):
    decay, free = parameter_groups(fresh, 0.1)
    assert decay["weight_decay"] == 0.1 and free["weight_decay"] == 0
    names = {id(p): name for name, p in fresh.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in (decay, free))
    assert decayed | spared == set(names.values()) and not decayed & spared
    endings = ("A_log", "mixer.D", "bias", "norm.weight", "norm_f.weight", "conv1d.weight")
    assert spared == {name for name in names.values() if name.endswith(endings)}
    assert (
        "backbone.layers.0.mixer.dt_proj.bias" in spared
        and "backbone.layers.0.mixer.A_log" in spared
    )
