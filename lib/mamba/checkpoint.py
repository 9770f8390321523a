"""A Mamba's checkpoint, a folder that transformers opens too; a model made deeper to train on."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.tensors import load_tensors, save_tensors
from lib.mamba.config_schema import AGAIN, CONFIG, WEIGHTS, check_checkpoint
from lib.mamba.model import MambaConfig, MambaLM

# What a configuration may say of the computation, where `MambaLM` knows one way,
# in one or two spellings
ONLY = {
    "model_type": ["mamba"],
    "architectures": [["MambaForCausalLM"], ["MambaLMHeadModel"]],
    "hidden_act": ["silu", "swish"],
    "activation": ["silu", "swish"],
    "rms_norm": [True],
    "layer": ["Mamba1"],
    "d_intermediate": [0],
    "attn_layer_idx": [[]],
    "num_experts": [0],
    "quantization_config": [None],
    "time_step_limit": [[0.0, float("inf")]],
    "dt_limit": [[0.0, float("inf")]],
    "embedding_multiplier": [1],
    "residual_multiplier": [1],
    "logits_scaling": [1],
    "lm_head_multiplier": [1],
}

# What the weights show too, in transformers' words and in mamba-ssm's:
# the attribute of `MambaConfig` that it is
SIZES = {
    "hidden_size": "d_model",
    "d_model": "d_model",
    "num_hidden_layers": "n_layer",
    "n_layer": "n_layer",
    "state_size": "d_state",
    "d_state": "d_state",
    "conv_kernel": "d_conv",
    "d_conv": "d_conv",
    "expand": "expand",
    "intermediate_size": "d_inner",
    "d_inner": "d_inner",
    "time_step_rank": "rank",
    "dt_rank": "rank",
    "use_bias": "bias",
    "bias": "bias",
    "use_conv_bias": "conv_bias",
    "conv_bias": "conv_bias",
    "tie_word_embeddings": "tied",
    "tie_embeddings": "tied",
}

# What else transformers and mamba-ssm write down: how weights began, are kept or are computed with,
# how they fit texts and labels, how a text is drawn. None of it changes what this model computes.
NO_MATTER = set(
    """
    vocab_size layer_norm_epsilon pad_vocab_size_multiple ssm_cfg attn_cfg initializer_range
    rescale_prenorm_residual time_step_min time_step_max time_step_scale time_step_floor
    time_step_init_scheme dt_min dt_max dt_init dt_scale dt_init_floor torch_dtype dtype device
    residual_in_fp32 fused_add_norm use_fast_path use_mambapy use_associative_scan use_cache
    layer_idx use_bfloat16 torchscript tf_legacy_loss chunk_size_feed_forward pruned_heads
    transformers_version _name_or_path name_or_path _commit_hash _attn_implementation_autoset
    is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder finetuning_task task_specific_params problem_type id2label label2id
    num_labels tokenizer_class prefix pad_token_id bos_token_id eos_token_id sep_token_id
    decoder_start_token_id return_dict output_attentions output_hidden_states output_scores
    return_dict_in_generate max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens
""".split()
)


def save(model: MambaLM, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors, whole or not at all, as transformers reads them.

    Raises `UserError` for another model than a `MambaLM`.
    """
    if not isinstance(model, MambaLM):
        kind = type(model).__name__
        raise UserError(f"a {kind} is no Mamba of transformers: save its state_dict yourself")
    config, folder = model.config, Path(folder)
    description = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "intermediate_size": config.d_inner,
        "time_step_rank": config.rank,
        "time_step_min": config.dt_min,
        "time_step_max": config.dt_max,
        "layer_norm_epsilon": config.norm_eps,
        "use_bias": config.bias,
        "use_conv_bias": config.conv_bias,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    save_tensors({name: t.to(dtype) for name, t in model.state_dict().items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, description)


def load(folder: str | Path, device: str | torch.device = "cpu") -> MambaLM:
    """Open a checkpoint folder, in float32: ours, transformers' `MambaForCausalLM`, or mamba-ssm's.

    It needs config.json and model.safetensors; pickles (pytorch_model.bin) are never opened.
    Raises `UserError` when something is missing or damaged, is no Mamba, or is one that computes
    anything else than `MambaLM` does.
    """
    folder = Path(folder)
    check_files(folder)
    description = check_checkpoint(folder)
    check_computation(folder, description)
    weights = load_tensors(folder / WEIGHTS, do=AGAIN)
    try:
        model = from_weights(weights, description.get("layer_norm_epsilon", 1e-5))
    except UserError as error:
        raise UserError(f"the checkpoint in {folder} cannot be opened, {error}: {AGAIN}") from error
    config = model.config
    for name, wanted, found in sizes(description, config, "lm_head.weight" in weights):
        if wanted not in (None, "auto", found):
            theirs, ours = json.dumps(wanted)[:80], json.dumps(found)
            raise UserError(
                f"{folder / CONFIG} and {WEIGHTS} are of two models, "
                f"{name} is {theirs} in the one and {ours} in the other: {AGAIN}"
            )
    model.config = replace(
        config,
        dt_min=description.get("time_step_min", config.dt_min),
        dt_max=description.get("time_step_max", config.dt_max),
    )
    return model.to(device).eval()


def check_files(folder: Path) -> None:
    """Refuse a folder without weights that can be read as they are, and say why."""
    if not (folder / WEIGHTS).is_file():
        if any(folder.glob("*.safetensors.index.json")):
            raise UserError(
                f"the weights in {folder} are cut into several files: save them as one {WEIGHTS}, "
                "with save_pretrained(…, max_shard_size='100GB') of transformers"
            )
        if any(folder.glob("pytorch_model*.bin*")):
            raise UserError(
                f"the weights in {folder} are a pickle, which may run code: "
                f"save them again as {WEIGHTS}"
            )
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"no checkpoint in {folder}: it needs {CONFIG} and {WEIGHTS}")


def check_computation(folder: Path, description: Mapping) -> None:
    """Refuse a model that computes anything else than `MambaLM` does, by what its config.json says.

    The names are those of transformers, of mamba-ssm and of their kin. What is said of training
    alone, as where delta begins, is no matter; nor is the residual's precision, as all is
    float32 here. A name that nobody here knows may change everything, so that whoever knows it
    has to decide.
    """
    for name, value in said(description):
        text = json.dumps(value)[:80]
        if name in ONLY and value not in (*ONLY[name], None):
            raise UserError(
                f"the model in {folder} is another than the Mamba of this course: its {CONFIG} "
                f"says that {name} is {text}, here it is {json.dumps(ONLY[name][0])}"
            )
        if value is not None and not (name in ONLY or name in SIZES or name in NO_MATTER):
            raise UserError(
                f"the model in {folder} may be another than the Mamba of this course: its {CONFIG} "
                f"says that {name[:80]} is {text}, which is not known here; "
                "if that changes nothing of what the model computes, delete the line"
            )


def said(description: Mapping) -> Iterator[tuple[str, Any]]:
    """All that config.json says, name by name.

    mamba-ssm says what its block is like in a table of its own.
    """
    yield from description.items()
    yield from (description.get("ssm_cfg") or {}).items()


def sizes(
    description: Mapping, config: MambaConfig, has_head: bool
) -> Iterator[tuple[str, Any, Any]]:
    """(name, what config.json says, what the weights are), under every name by which it says so."""
    vocab_size = description["vocab_size"]
    # a file with d_model is mamba-ssm's, which pads the vocabulary up to a multiple
    if "d_model" in description and vocab_size != config.vocab_size:
        multiple = description.get("pad_vocab_size_multiple", 8)
        vocab_size = -(-vocab_size // multiple) * multiple
    yield "vocab_size", vocab_size, config.vocab_size
    for name, value in said(description):
        attribute = SIZES.get(name)
        # not tied by its word: an output layer of its own, which may be the embedding once more
        again = attribute == "tied" and not value and has_head
        if attribute and not again:
            yield name, value, getattr(config, attribute)


def from_weights(weights: Mapping[str, Tensor], norm_eps: float = 1e-5) -> MambaLM:
    """A model out of named tensors, ours, transformers' or mamba-ssm's.

    Every size is read off them. Raises `UserError` naming the first tensor that is missing or does
    not fit.
    """
    weights = {
        k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in weights.items()
    }
    embeddings, head = weights.get("backbone.embeddings.weight"), weights.get("lm_head.weight")
    layer = {k.removeprefix("backbone.layers.0.mixer."): v for k, v in weights.items()}
    try:
        d_inner, d_state = layer["A_log"].shape
        vocab_size, d_model = embeddings.shape
        config = MambaConfig(
            vocab_size,
            d_model,
            len({k.split(".")[2] for k in weights if k.startswith("backbone.layers.")}),
            d_state,
            layer["conv1d.weight"].shape[-1],
            d_inner // d_model,
            layer["dt_proj.weight"].shape[1],
            norm_eps=norm_eps,
            bias="in_proj.bias" in layer,
            conv_bias="conv1d.bias" in layer,
            tied=head is None or torch.equal(head, embeddings),
        )
    except (
        KeyError,
        AttributeError,
        ValueError,
        IndexError,
        ZeroDivisionError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"these weights are not those of a Mamba language model: {error}"
        ) from error
    if d_inner != config.d_inner:
        raise UserError(
            f"the weights have {d_inner} channels, which is no multiple of their width {d_model}"
        )
    with torch.device("meta"):  # no memory yet: a few small tensors may ask for a huge model
        wanted = {k: v.shape for k, v in MambaLM(config).state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights or weights[name].shape != shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise UserError(f"the weights need {name} of shape {tuple(shape)}, but hold {found}")
        # float4 passes for floating-point, but its numbers are packed in pairs
        if not weights[name].is_floating_point() or "float4" in str(weights[name].dtype):
            raise UserError(
                f"the weights hold {name} in {weights[name].dtype}, "
                "which is no floating-point number that is read here"
            )
    if extra := weights.keys() - wanted.keys() - {"lm_head.weight"}:
        raise UserError(
            f"the weights hold {min(extra)[:80]}, which a Mamba of this kind does not have"
        )
    model = MambaLM(config)
    model.load_state_dict({k: weights[k].float() for k in wanted})
    return model.eval()


def deepen(model: MambaLM, n_layer: int) -> MambaLM:
    """The same function in more layers, to train on; raises `UserError` where `n_layer` is smaller.

    New blocks are spread evenly. Each is a copy of the block below it (stacking, Gong et al. 2019)
    whose `out_proj` is zero, so that the function is kept (Chen et al. 2016).
    """
    old = model.config.n_layer
    if n_layer < old:
        raise UserError(
            f"a model of {old} layers cannot be deepened to {n_layer}: give at least {old}"
        )
    # the old block of each new one, 0 0 1 1 2 …
    sources = [at * old // n_layer for at in range(n_layer)]
    deeper = MambaLM(replace(model.config, n_layer=n_layer)).to(model.device)
    deeper.load_state_dict(model.state_dict(), strict=False)
    for at, source in enumerate(sources):
        block = deeper.backbone.layers[at]
        block.load_state_dict(model.backbone.layers[source].state_dict())
        if at and sources[at - 1] == source:
            nn.init.zeros_(block.mixer.out_proj.weight)
            if model.config.bias:
                nn.init.zeros_(block.mixer.out_proj.bias)
    return deeper
