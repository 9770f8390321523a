"""Claims about checkpoints of other makers: what the model here does not compute is refused,
for its true reason.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.env.errors import UserError
from lib.mamba import checkpoint
from lib.mamba.model import MambaConfig, MambaLM


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(MambaLM(MambaConfig(19, 16, 2, 3)), tmp_path)
    return tmp_path


def say(folder, **said):
    """Let config.json say something else."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def refused(folder):
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "falcon_mamba"},
        {"model_type": "mamba2"},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu"},
        {"architectures": ["MambaForSequenceClassification"]},
        {"rms_norm": False},
        {"d_intermediate": 64},
        {"attn_layer_idx": [1]},
        {"ssm_cfg": {"layer": "Mamba2"}},
        {"time_step_limit": [0.01, 0.5]},
        {"ssm_cfg": {"dt_limit": [0.0, 1.0]}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"logits_scaling": 2.0},
        {"activation": "relu"},
        {"ssm_cfg": {"activation": "relu"}},
    ],
    ids=json.dumps,
)
def test_another_computation_is_refused_and_named(folder, said):
    ((name, value),) = (said["ssm_cfg"] if "ssm_cfg" in said else said).items()
    say(folder, **said)
    assert f"says that {name} is {json.dumps(value)}" in refused(folder)


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_act": "swish"},
        {"residual_in_fp32": False},
        {"use_mambapy": True},
        {"time_step_scale": 3.0},
        {"time_step_rank": "auto"},
        {"rms_norm": True},
        {"attn_layer_idx": []},
        {"ssm_cfg": {}},
        {"time_step_limit": [0.0, float("inf")]},
        {"ssm_cfg": None},
        {"something_of_next_year": None},
        {
            "ssm_cfg": {
                "d_state": 3,
                "bias": False,
                "dt_rank": "auto",
                "dt_init": "random",
                "activation": "silu",
            }
        },
        {"id2label": {"0": "A"}, "temperature": 0.7, "torchscript": False, "pruned_heads": {}},
    ],
    ids=str,
)
def test_what_says_the_same_or_is_no_matter_opens(folder, said):
    model = checkpoint.load(folder)
    say(folder, **said)
    ids = torch.arange(12)[None]
    assert torch.equal(checkpoint.load(folder)(ids), model(ids))


@pytest.mark.parametrize(
    "said",
    [
        {"final_logit_softcapping": 30.0},
        {"use_bcdt_rms": True},
        {"auto_map": {"AutoModelForCausalLM": "modeling.X"}},
        {"norm_epsilon": 0.5},
        {"lm_head_bias": True},
        {"adapter_config": {"r": 8}},
        {"something_of_next_year": 5},
        {"ssm_cfg": {"ngroups": 2}},
        {"x" * 10_000: "y" * 10_000},
    ],
    ids=lambda said: str(said)[:60],
)
def test_what_nobody_here_knows_is_named_and_what_to_do(folder, said):
    say(folder, **said)
    sentence = refused(folder)
    (name,) = said.get("ssm_cfg", said)
    assert (
        f"says that {name[:80]} is " in sentence
        and "delete the line" in sentence
        and len(sentence) < 600
    )


def test_a_table_that_is_none_is_damaged(folder):
    say(folder, ssm_cfg="x")
    assert "is damaged (ssm_cfg is 'x'" in refused(folder)


MAKERS = {  # what a config.json of each maker and year held beside the sizes
    "transformers 4": {
        "d_inner": 32,
        "d_model": 16,
        "n_layer": 2,
        "fused_add_norm": True,
        "initializer_range": 0.1,
        "rms_norm": True,
        "pad_vocab_size_multiple": 1,
        "rescale_prenorm_residual": False,
        "ssm_cfg": {},
        "time_step_floor": 0.0001,
        "time_step_init_scheme": "random",
        "time_step_scale": 1.0,
        "transformers_version": "4.39.0.dev0",
        "use_cache": True,
        "use_mambapy": False,
        "torch_dtype": "float32",
        "_name_or_path": "x",
    },
    "mamba-ssm 2": {
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "ssm_cfg": {"layer": "Mamba1"},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": True,
    },
}


@pytest.mark.parametrize("maker", MAKERS)
def test_what_other_makers_write_down_opens(folder, maker):
    model = checkpoint.load(folder)
    say(folder, **MAKERS[maker])
    assert torch.equal(
        checkpoint.load(folder)(torch.arange(12)[None]), model(torch.arange(12)[None])
    )


@pytest.mark.parametrize(
    "said",
    [
        {"use_bias": True},
        {"use_conv_bias": False},
        {"state_size": 4},
        {"conv_kernel": 3},
        {"expand": 3},
        {"intermediate_size": 48},
        {"time_step_rank": 2},
        {"num_hidden_layers": 3},
        {"vocab_size": 20},
        {"bias": True},
        {"d_inner": 48},
        {"ssm_cfg": {"bias": True}},
        {"ssm_cfg": {"d_state": 4}},
        {"ssm_cfg": {"expand": 3}},
    ],
    ids=str,
)
def test_a_configuration_of_another_model_is_refused(folder, said):
    (name,) = said.get("ssm_cfg", said)
    say(folder, **said)
    assert f"are of two models, {name} is" in refused(folder)


def test_the_output_layer_is_the_one_that_the_configuration_says(tmp_path):
    """transformers would play the embedding where the configuration ties it,
    and draw one where it does not.
    """
    checkpoint.save(MambaLM(MambaConfig(19, 16, 1, 3, tied=False)), tmp_path / "own")
    say(tmp_path / "own", tie_word_embeddings=True)
    assert "tie_word_embeddings" in refused(tmp_path / "own")
    checkpoint.save(MambaLM(MambaConfig(19, 16, 1, 3)), tmp_path / "tied")
    say(tmp_path / "tied", tie_word_embeddings=False)
    assert "tie_word_embeddings" in refused(tmp_path / "tied")


def test_weights_in_several_files_get_their_own_sentence(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "cut into several files" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, dtype):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "backbone.layers.1.mixer.A_log"
    save_file(weights | {name: weights[name].to(dtype)}, path)
    assert name in refused(folder) and str(dtype) in refused(folder)


def test_numbers_of_four_bits_are_refused_and_those_of_eight_are_read(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "backbone.layers.1.mixer.out_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, path)
    assert checkpoint.load(folder).backbone.layers[1].mixer.out_proj.weight.dtype == torch.float32
    save_file(weights | {name: weights[name].to(torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    assert name in refused(folder)


def test_a_vocabulary_that_was_made_larger_by_transformers_opens(folder):
    """Its config.json keeps mamba-ssm's names, and gives the size as it is, not yet padded."""
    say(folder, d_model=16, n_layer=2, pad_vocab_size_multiple=8)
    assert checkpoint.load(folder).config.vocab_size == 19
    say(folder, vocab_size=18)
    assert "vocab_size is 24 in the one and 19 in the other" in refused(folder)


@pytest.mark.parametrize("said", ["2", "x" * 2_000_000])
def test_a_size_that_is_a_text_is_shown_as_one(folder, said):
    say(folder, d_state=said)
    assert f'd_state is "{said[:79]}' in refused(folder) and len(refused(folder)) < 600


def test_a_few_small_tensors_cannot_ask_for_a_huge_model():
    """Two long vectors would make a matrix of 4 TB:
    no memory is taken before the shapes are seen.
    """
    layer = {
        "A_log": torch.zeros(2**20, 1),
        "conv1d.weight": torch.zeros(1, 1, 4),
        "dt_proj.weight": torch.zeros(1, 1),
    }
    weights = {f"backbone.layers.0.mixer.{name}": tensor for name, tensor in layer.items()}
    with pytest.raises(UserError, match="the weights need"):
        checkpoint.from_weights(weights | {"backbone.embeddings.weight": torch.zeros(1, 2**20)})


def test_channels_that_are_no_multiple_of_the_width_are_named():
    weights = dict(MambaLM(MambaConfig(19, 16, 1, 3)).state_dict())
    weights["backbone.embeddings.weight"] = torch.zeros(19, 20)
    with pytest.raises(UserError, match="32 channels, which is no multiple of their width 20"):
        checkpoint.from_weights(weights)


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_a_model_of_transformers_with_another_activation_is_refused(tmp_path, activation):
    transformers = pytest.importorskip(
        "transformers", reason="the tests' own reference is not installed"
    )
    config = transformers.MambaConfig(
        vocab_size=19, hidden_size=16, num_hidden_layers=1, hidden_act=activation
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    assert f'hidden_act is "{activation}"' in refused(tmp_path)
