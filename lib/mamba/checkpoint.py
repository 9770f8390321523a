"""A Mamba's checkpoint: a folder that transformers opens too, and a model made deeper to train on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.env.errors import UserError
from lib.env.files import whole, write_json
from lib.mamba.model import MambaConfig, MambaLM

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: MambaLM, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors, whole or not at all, as transformers reads them."""
    from safetensors.torch import save_file

    config, folder = model.config, Path(folder)
    description = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "state_size": config.d_state,
        "conv_kernel": config.d_conv, "expand": config.expand, "intermediate_size": config.d_inner,
        "time_step_rank": config.rank, "time_step_min": config.dt_min, "time_step_max": config.dt_max,
        "layer_norm_epsilon": config.norm_eps, "use_bias": config.bias, "use_conv_bias": config.conv_bias,
        "hidden_act": "silu", "residual_in_fp32": True, "tie_word_embeddings": config.tied,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    with whole(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_json(folder / CONFIG, description)


def load(folder: str | Path, device: str | torch.device = "cpu") -> MambaLM:
    """Open a checkpoint folder, in float32: ours, transformers' `MambaForCausalLM`, or mamba-ssm's.

    It needs config.json and model.safetensors; pickles (pytorch_model.bin) are never opened.
    Raises `UserError` when something is missing, damaged or not a Mamba.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if (folder / "pytorch_model.bin").exists() and not (folder / WEIGHTS).is_file():
        raise UserError(f"the weights in {folder} are a pickle, which may run code: save them again as {WEIGHTS}")
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"no checkpoint in {folder}: it needs {CONFIG} and {WEIGHTS}")
    try:
        c = json.loads((folder / CONFIG).read_text())
        model = from_weights(load_file(folder / WEIGHTS), c.get("layer_norm_epsilon", 1e-5))
        sizes = model.config.vocab_size, model.config.d_model, model.config.n_layer
        # transformers' names, and mamba-ssm's, which pads the vocabulary up to a multiple
        said = (c.get("vocab_size"), c.get("hidden_size", c.get("d_model")),
                c.get("num_hidden_layers", c.get("n_layer")))
        if "d_model" in c:
            said = (-(-said[0] // c.get("pad_vocab_size_multiple", 8)) * c.get("pad_vocab_size_multiple", 8), *said[1:])
        if sizes != said:
            raise UserError(f"{CONFIG} speaks of sizes {said}, the weights of {sizes}")
        model.config = replace(model.config, dt_min=c.get("time_step_min", 0.001), dt_max=c.get("time_step_max", 0.1))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"the checkpoint in {folder} is damaged or not a Mamba: fetch it again") from error
    return model.to(device).eval()


def from_weights(weights: Mapping[str, Tensor], norm_eps: float = 1e-5) -> MambaLM:
    """A model out of named tensors, ours, transformers' or mamba-ssm's; every size is read off them.

    Raises `UserError` naming the first tensor that is missing or does not fit.
    """
    weights = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in weights.items()}
    embeddings, head = weights.get("backbone.embeddings.weight"), weights.get("lm_head.weight")
    layer = {k.removeprefix("backbone.layers.0.mixer."): v for k, v in weights.items()}
    try:
        d_inner, d_state = layer["A_log"].shape
        vocab_size, d_model = embeddings.shape
        config = MambaConfig(
            vocab_size, d_model, len({k.split(".")[2] for k in weights if k.startswith("backbone.layers.")}), d_state,
            layer["conv1d.weight"].shape[-1], d_inner // d_model, layer["dt_proj.weight"].shape[1], norm_eps=norm_eps,
            bias="in_proj.bias" in layer, conv_bias="conv1d.bias" in layer,
            tied=head is None or torch.equal(head, embeddings))
    except (KeyError, AttributeError, ValueError) as error:
        raise UserError(f"these weights are not those of a Mamba language model: {error}") from error
    model = MambaLM(config)
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights or weights[name].shape != shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise UserError(f"the weights need {name} of shape {tuple(shape)}, but hold {found}")
    if extra := weights.keys() - wanted.keys() - {"lm_head.weight"}:
        raise UserError(f"the weights hold {min(extra)}, which a Mamba of this kind does not have")
    model.load_state_dict({k: weights[k].float() for k in wanted})
    return model.eval()


def deepen(model: MambaLM, n_layer: int) -> MambaLM:
    """The same function in more layers, to train on; raises `UserError` where `n_layer` is smaller.

    New blocks are spread evenly. Each is a copy of the block below it (stacking, Gong et al. 2019) whose
    `out_proj` is zero, so that the function is kept (Chen et al. 2016).
    """
    old = model.config.n_layer
    if n_layer < old:
        raise UserError(f"a model of {old} layers cannot be deepened to {n_layer}: give at least {old}")
    sources = [at * old // n_layer for at in range(n_layer)]  # the old block of each new one, 0 0 1 1 2 …
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
