"""Mamba: the block and the language model, in plain PyTorch (Gu and Dao 2023, section 3.4).

Parameter names are the official ones, and a checkpoint is a folder that transformers opens as a
`MambaForCausalLM`. The model runs in two ways that give the same numbers: `forward` over a whole
sequence (training, prompts), and `step`, one token at a time from a state of constant size.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.errors import UserError
from lib.files import whole
from lib.scan import selective_scan, selective_step

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# One layer's memory: the last K-1 inputs of the convolution (B, K-1, D), the state h (B, D, N).
State = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MambaConfig:
    """Sizes of a Mamba language model."""

    vocab_size: int
    d_model: int = 256  # width of the residual stream
    n_layer: int = 4
    d_state: int = 16  # N, numbers a channel remembers
    d_conv: int = 4  # K, taps of the convolution
    expand: int = 2  # channels of the scan: d_inner = expand * d_model
    dt_rank: int = 0  # rank of delta's projection; 0 means ceil(d_model / 16)
    dt_min: float = 0.001  # delta starts between these two, log-uniformly
    dt_max: float = 0.1
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on each block's output, in training

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class MambaMixer(nn.Module):
    """The Mamba block's inside: (B, L, d_model) to (B, L, d_model)."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        d_inner, d_state, rank = config.d_inner, config.d_state, config.rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Initialise as published: delta log-uniform in [dt_min, dt_max], outputs scaled down."""
        config = self.config
        nn.init.uniform_(self.dt_proj.weight, -config.rank**-0.5, config.rank**-0.5)
        spread = math.log(config.dt_max) - math.log(config.dt_min)
        delta = torch.exp(torch.rand(config.d_inner) * spread + math.log(config.dt_min)).clamp(min=1e-4)
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # softplus backwards
        self.out_proj.weight /= math.sqrt(config.n_layer)

    def convolve(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution of x (B, L, D), of which `before` (B, K-1, D) came earlier.

        Returns the result and the last K-1 inputs, for whoever goes on from here.
        """
        padded = torch.cat([before.to(x.dtype), x], 1)
        taps, length = self.conv1d.weight[:, 0].to(x.dtype), x.shape[1]
        y = self.conv1d.bias.to(x.dtype)
        for k in range(self.config.d_conv):
            y = torch.addcmul(y, padded[:, k : k + length], taps[:, k])
        return y, padded[:, length:]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta before its bias (…, D), B and C (…, N): the selection, from the input itself."""
        config = self.config
        low, B, C = self.x_proj(x).split([config.rank, config.d_state, config.d_state], -1)
        return F.linear(low, self.dt_proj.weight), B, C

    def forward(self, u: Tensor, state: tuple[Tensor, Tensor], backend: str = "auto"):
        """u (B, L, d_model) and the layer's state; returns the output and the new state."""
        before, h0 = state
        x, z = self.in_proj(u).chunk(2, -1)  # (B, L, D) each
        x, after = self.convolve(x, before)
        x = F.silu(x)
        delta, B, C = self.split(x)
        y, h = selective_scan(x, delta, -torch.exp(self.A_log.float()), B, C, self.D.float(), z,
                              self.dt_proj.bias.float(), True, h0, True, backend)
        return self.out_proj(y), (after, h)

    def step(self, u: Tensor, state: tuple[Tensor, Tensor]):
        """One position: u (B, d_model). The same numbers as `forward`, from the state alone."""
        before, h = state
        x, z = self.in_proj(u).chunk(2, -1)
        window = torch.cat([before, x[:, None]], 1)  # (B, K, D)
        x = F.silu((window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias)
        delta, B, C = self.split(x)
        delta = F.softplus(delta + self.dt_proj.bias)
        y, h = selective_step(h, x, delta, -torch.exp(self.A_log), B, C, self.D)
        return self.out_proj(y * F.silu(z)), (window[:, 1:], h)


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), the residual kept in float32."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)
        self.dropout = nn.Dropout(config.dropout)


class MambaLM(nn.Module):
    """Tokens to logits: embedding, blocks, norm, and the embedding again as the output layer."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.backbone.norm_f = RMSNorm(config.d_model, config.norm_eps)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros, whatever has been read so far."""
        config = self.config
        zeros = lambda *shape: torch.zeros(batch, *shape, device=self.device)  # noqa: E731
        return [(zeros(config.d_conv - 1, config.d_inner), zeros(config.d_inner, config.d_state))
                for _ in range(config.n_layer)]

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.backbone.norm_f(x), self.backbone.embeddings.weight)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_state: bool = False,
                last_only: bool = False, backend: str = "auto"):
        """tokens (B, L) to logits (B, L, V), or (B, 1, V) with `last_only`.

        With `state` the sequence goes on from there; `return_state` also gives the state after
        the last token, so that a long piece can be read in segments.
        """
        if tokens.dim() != 2:
            raise UserError(f"the model needs tokens of shape (B, L), not {tuple(tokens.shape)}")
        state = state or self.new_state(len(tokens))
        x = self.backbone.embeddings(tokens).float()
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            y, memory = layer.mixer(layer.norm(x), memory, backend)
            x = x + layer.dropout(y).float()
            after.append(memory)
        logits = self.logits(x[:, -1:] if last_only else x)
        return (logits, after) if return_state else logits

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read a prompt (B, L) at once: logits of the next token (B, V) and the state."""
        logits, state = self(tokens, state, return_state=True, last_only=True)
        return logits[:, -1], state

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token a sequence (B,): logits of the next (B, V) and the new state."""
        x = self.backbone.embeddings(tokens)
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            y, memory = layer.mixer.step(layer.norm(x), memory)
            x = x + y
            after.append(memory)
        return self.logits(x), after


def save(model: MambaLM, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors, whole or not at all, as transformers reads them."""
    from safetensors.torch import save_file

    config, folder = model.config, Path(folder)
    description = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": config.vocab_size,
        "hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "state_size": config.d_state,
        "conv_kernel": config.d_conv, "expand": config.expand, "intermediate_size": config.d_inner,
        "time_step_rank": config.rank, "time_step_min": config.dt_min, "time_step_max": config.dt_max,
        "layer_norm_epsilon": config.norm_eps, "use_bias": False, "use_conv_bias": True,
        "hidden_act": "silu", "residual_in_fp32": True, "tie_word_embeddings": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    with whole(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with whole(folder / CONFIG) as part:
        part.write_text(json.dumps(description, indent=1) + "\n")


def load(folder: str | Path, device: str | torch.device = "cpu") -> MambaLM:
    """Open a checkpoint folder, in float32. Raises `UserError` when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"no checkpoint in {folder}: it needs {CONFIG} and {WEIGHTS}")
    try:
        c = json.loads((folder / CONFIG).read_text())
        config = MambaConfig(c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["state_size"],
                             c["conv_kernel"], c["expand"], c["time_step_rank"], c["time_step_min"],
                             c["time_step_max"], c["layer_norm_epsilon"])
        model = MambaLM(config)
        model.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the checkpoint in {folder} is damaged or not a Mamba of ours: fetch it again") from error
    return model.to(device).eval()
