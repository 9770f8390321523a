"""Claims about Mamba-2: transformers' model agrees, a step is the forward pass,
the state stays as large.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.lab.peers import language_models
from lib.lab.peers.language_models import ours_of_mamba2
from lib.mamba.mamba2 import GatedRMSNorm, Mamba2Config, Mamba2LM

CONFIG = Mamba2Config(29, d_model=24, n_layer=2, d_state=10, head_dim=12, d_conv=4)
SHAPES = [
    CONFIG,
    replace(CONFIG, head_dim=48, d_state=3, bias=True, conv_bias=False),
    replace(CONFIG, n_layer=1, d_conv=2),
]


def make(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = Mamba2LM(config).eval()
    # as after training: nothing stays at a value at which a mistake could hide
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".D", "norm.weight", "norm_f.weight", "bias")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(batch, length, seed=1):
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", SHAPES, ids=["two heads and more", "one head", "one layer"])
@pytest.mark.parametrize("length", [1, 63, 257])  # theirs works in chunks of 256
def test_logits_and_gradients_are_those_of_transformers(config, length):
    ours = make(config)
    theirs = language_models.mamba2(ours).eval()
    ids = tokens(2, length)
    targets = tokens(2, length, seed=2).flatten()
    found = ours(ids)
    wanted = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    F.cross_entropy(found.flatten(0, 1), targets).backward()
    F.cross_entropy(wanted.flatten(0, 1), targets).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4)
        nothing_yet = length == 1 and "A_log" in name  # the first step has nothing to forget
        assert nothing_yet or parameter.grad.abs().max() > 0, name


def test_weights_of_transformers_become_ours():
    transformers = language_models.package()
    torch.manual_seed(3)
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=29,
            hidden_size=24,
            num_hidden_layers=2,
            state_size=10,
            num_heads=4,
            head_dim=12,
            n_groups=1,
            tie_word_embeddings=True,
        )
    ).eval()
    ours = ours_of_mamba2(theirs.state_dict(), CONFIG)
    ids = tokens(2, 70)
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_names_of_mamba_ssm_are_taken_too():
    model = make()
    theirs = {name.replace("embeddings", "embedding"): t for name, t in model.state_dict().items()}
    theirs["lm_head.weight"] = theirs["backbone.embedding.weight"].clone()
    ids = tokens(1, 9)
    assert torch.equal(ours_of_mamba2(theirs, CONFIG)(ids), model(ids))


def test_weights_that_do_not_fit_are_refused_in_one_sentence():
    weights = make().state_dict()
    with pytest.raises(UserError, match="one group"):
        ours_of_mamba2(weights, replace(CONFIG, d_state=11))
    with pytest.raises(UserError, match="output layer of their own"):
        ours_of_mamba2(weights | {"lm_head.weight": torch.zeros(29, 24)}, CONFIG)
    with pytest.raises(UserError, match="do not split into heads"):
        replace(CONFIG, head_dim=7)


@pytest.mark.parametrize("config", SHAPES, ids=["two heads and more", "one head", "one layer"])
def test_step_is_forward_at_every_position_and_the_state_stays_as_large(config):
    model = make(config)
    ids = tokens(2, 140)
    wanted, last = model(ids, return_state=True)
    state = model.new_state(2)
    sizes = {tuple(t.shape for memory in state for t in memory)}
    for at, column in enumerate(ids.unbind(1)):
        logits, state = model.step(column, state)
        torch.testing.assert_close(logits, wanted[:, at], rtol=2e-5, atol=2e-5)
        sizes.add(tuple(t.shape for memory in state for t in memory))
    assert len(sizes) == 1
    for ours, theirs in zip(state, last):
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(ours[1], theirs[1], rtol=2e-5, atol=2e-5)


def test_the_loop_and_the_chunks_are_one_model():
    model, ids = make(), tokens(2, 130)
    torch.testing.assert_close(model(ids, backend="loop"), model(ids), rtol=1e-5, atol=1e-5)


def test_the_gate_stands_before_the_norm():
    norm = GatedRMSNorm(6, 1e-5)
    y, z = torch.randn(2, 6), torch.randn(2, 6)
    gated = y * z * torch.sigmoid(z)
    wanted = gated / (gated.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(y, z), wanted)


def test_the_gates_of_autocast_leave_the_state_in_float32():
    model, ids = make(), tokens(2, 70)
    wanted = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(ids, return_state=True)
    assert all(h.dtype == torch.float32 for _, h in state)
    assert (logits.float() - wanted).norm() < 0.05 * wanted.norm()


def test_a_fresh_block_begins_as_published():
    torch.manual_seed(0)
    config = replace(CONFIG, d_model=512, head_dim=4)
    mixer = Mamba2LM(replace(config, n_layer=1)).backbone.layers[0].mixer
    delta = F.softplus(mixer.dt_bias)
    assert 0.001 <= delta.min() < 0.002 and 0.05 < delta.max() <= 0.1
    assert -16 <= mixer.A.min() < -14 and -3 < mixer.A.max() <= -1
    assert torch.all(mixer.D == 1)
