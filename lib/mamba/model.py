"""Mamba: the block and the language model, in plain PyTorch (Gu and Dao 2023, section 3.4).

Parameter names are the official ones, and a checkpoint is a folder that transformers opens as a
`MambaForCausalLM`. The model runs in two ways that give the same numbers: `forward` over a whole
sequence (training, prompts), and `step`, one token at a time from a state of constant size.

Shapes are part of the signatures: B batch, L length, M = d_model, D = d_inner, N = d_state, W = K - 1
the inputs that the convolution remembers, V the vocabulary. The tests check them at every call
(jaxtyping).
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.env.files import whole, write_json
from lib.mamba import block_cpu
from lib.scan.selective import selective_scan, selective_step

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# One layer's memory: the last K-1 inputs of the convolution, and the state h
Memory = tuple[Float[Tensor, "B W D"], Float[Tensor, "B D N"]]
State = list[Memory]  # one a layer


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
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    tied: bool = True  # the embedding is the output layer too

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

    def forward(self, x: Float[Tensor, "*any M"]) -> Float[Tensor, "*any M"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class MambaMixer(nn.Module):
    """The Mamba block's inside: (B, L, d_model) to (B, L, d_model)."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        d_inner, d_state, rank = config.d_inner, config.d_state, config.rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias)
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
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
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                linear.bias.zero_()

    def convolve(self, x: Float[Tensor, "B L D"], before: Float[Tensor, "B W D"],
                 ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B W D"]]:
        """SiLU of the causal depthwise convolution of x, of which `before` came earlier.

        Returns the result and the last K-1 inputs, for whoever goes on from here.
        """
        before, length = before.to(x.dtype), x.shape[1]
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # (D, K)
        bias = self.conv1d.bias.to(x.dtype) if self.config.conv_bias else None
        window = self.config.d_conv - 1
        after = torch.cat([before, x[:, max(0, length - window) :]], 1)[:, -window:]  # a copy: x need not live on
        # their kernel wants 2 to 4 taps, and channels side by side, in eights: (B, D, L) by views
        suits = x.is_cuda and length and 1 <= window <= 3 and x.shape[2] % 8 == 0
        if suits and (fast := fast_convolution()) is not None:
            y = fast(x.transpose(1, 2), taps, bias, initial_states=before.transpose(1, 2), activation="silu")
            return y.transpose(1, 2), after
        suits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and window < block_cpu.MOST_TAPS
        if length and suits and block_cpu.available():
            return block_cpu.convolve_silu(x, taps, bias, before), after
        padded = torch.cat([before, x], 1)
        y = torch.zeros((), dtype=x.dtype, device=x.device) if bias is None else bias
        for k in range(self.config.d_conv):
            y = torch.addcmul(y, padded[:, k : k + length], taps[:, k])
        return F.silu(y), after

    def split(self, x: Float[Tensor, "*any D"],
              ) -> tuple[Float[Tensor, "*any D"], Float[Tensor, "*any N"], Float[Tensor, "*any N"]]:
        """delta before its bias, B and C: the selection, from the input itself."""
        config = self.config
        low, B, C = self.x_proj(x).split([config.rank, config.d_state, config.d_state], -1)
        return F.linear(low, self.dt_proj.weight), B, C

    def forward(self, u: Float[Tensor, "B L M"], state: Memory, backend: str = "auto",
                ) -> tuple[Float[Tensor, "B L M"], Memory]:
        """The layer's output, and its memory after the last position."""
        before, h0 = state
        x, z = self.in_proj(u).chunk(2, -1)  # (B, L, D) each
        x, after = self.convolve(x, before)
        delta, B, C = self.split(x)
        y, h = selective_scan(x, delta, -torch.exp(self.A_log.float()), B, C, self.D.float(), z,
                              self.dt_proj.bias.float(), True, h0, True, backend)
        return self.out_proj(y), (after, h)

    def step(self, u: Float[Tensor, "B M"], state: Memory) -> tuple[Float[Tensor, "B M"], Memory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        before, h = state
        x, z = self.in_proj(u).chunk(2, -1)
        x, after = self.convolve(x[:, None], before)
        x = x[:, 0]
        delta, B, C = self.split(x)
        y, h = selective_step(h, x, delta, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (after, h)


@functools.cache
def fast_convolution():
    """The official CUDA kernel, `causal_conv1d_fn`, or None where it is not installed."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    return causal_conv1d_fn


class MambaBlock(nn.Module):
    """x + mixer(norm(x)), the residual kept in float32."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B L M"], memory: Memory, backend: str = "auto",
                ) -> tuple[Float[Tensor, "B L M"], Memory]:
        """The residual after this layer, and the memory after it; fused where `backend` is auto and the CPU can."""
        if backend == "auto" and block_cpu.suits(self, x):
            return block_cpu.block(self, x, memory)
        y, memory = self.mixer(self.norm(x), memory, backend)
        return x + self.dropout(y).float(), memory

    def step(self, x: Float[Tensor, "B M"], memory: Memory) -> tuple[Float[Tensor, "B M"], Memory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        y, memory = self.mixer.step(self.norm(x), memory)
        return x + y, memory


class MambaLM(nn.Module):
    """Tokens to logits: embedding, blocks, norm, and the embedding again (or `lm_head`) as the output layer."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.n_layer))
        self.backbone.norm_f = RMSNorm(config.d_model, config.norm_eps)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    def parameter_count(self) -> int:
        """Numbers that are learnt, each once: a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros, whatever has been read so far."""
        config = self.config
        zeros = lambda *shape: torch.zeros(batch, *shape, device=self.device)
        return [(zeros(config.d_conv - 1, config.d_inner), zeros(config.d_inner, config.d_state))
                for _ in range(config.n_layer)]

    @property
    def head(self) -> Float[Tensor, "V M"]:
        """The output layer: the embedding, or `lm_head`."""
        return (self.backbone.embeddings if self.config.tied else self.lm_head).weight

    def logits(self, x: Float[Tensor, "*any M"]) -> Float[Tensor, "*any V"]:
        """The residual to logits, by the last norm and the output layer."""
        return F.linear(self.backbone.norm_f(x), self.head)

    def nats(self, x: Float[Tensor, "B L M"], targets: Int[Tensor, "B L"], *, total: bool = False) -> Tensor:
        """The cross entropy of the residual's predictions in nats, (B, L), or its sum with `total`.

        A target of -1 counts nothing.
        """
        dtype = block_cpu.precision(x)
        if dtype is not None and self.head.dtype == torch.float32:
            norm = self.backbone.norm_f
            return block_cpu.cross_entropy(x, norm.weight, self.head, targets, norm.eps, dtype, total)
        logits = self.logits(x).float().flatten(0, 1)
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum" if total else "none")
        return nats if total else nats.view(targets.shape)

    def residual(self, tokens: Int[Tensor, "..."], state: State | None = None, backend: str = "auto",
                 ) -> tuple[Float[Tensor, "B L M"], State]:
        """tokens (B, L) to what the last block leaves, and the state after the last token."""
        if tokens.dim() != 2:
            raise UserError(f"the model needs tokens of shape (B, L), not {tuple(tokens.shape)}")
        if state is not None and len(state) != self.config.n_layer:
            raise UserError(f"the state has {len(state)} layers, the model {self.config.n_layer}: take `new_state`")
        state = state or self.new_state(len(tokens))
        x = self.backbone.embeddings(tokens).float()
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            x, memory = layer(x, memory, backend)
            after.append(memory)
        return x, after

    def forward(self, tokens: Int[Tensor, "..."], state: State | None = None, *, return_state: bool = False,
                last_only: bool = False, targets: Int[Tensor, "..."] | None = None, backend: str = "auto",
                ) -> Tensor | tuple[Tensor, State]:
        """tokens (B, L) to logits at every position (B, L, V), or at the last (B, 1, V) with `last_only`.

        With `state` the sequence goes on from there; `return_state` also gives the state after
        the last token, so that a long piece can be read in segments. With `targets` (B, L) the result is
        the sum of their cross entropies in nats instead; a target of -1 counts nothing.
        """
        x, after = self.residual(tokens, state, backend)
        if targets is None:
            result = self.logits(x[:, -1:] if last_only else x)
        else:
            result = self.nats(x, targets, total=True)
        return (result, after) if return_state else result

    @torch.inference_mode()
    def prefill(self, tokens: Int[Tensor, "B L"], state: State | None = None) -> tuple[Float[Tensor, "B V"], State]:
        """Read a prompt at once: logits of the next token and the state."""
        logits, state = self(tokens, state, return_state=True, last_only=True)
        return logits[:, -1], state

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"], state: State) -> tuple[Float[Tensor, "B V"], State]:
        """Read one token a sequence: logits of the next and the new state."""
        x = self.backbone.embeddings(tokens)
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            x, memory = layer.step(x, memory)
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
