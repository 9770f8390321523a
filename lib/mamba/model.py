"""Mamba: the block and the language model, in plain PyTorch (Gu and Dao 2023, section 3.4).

Parameter names are the official ones, and a checkpoint is a folder that transformers opens as a
`MambaForCausalLM`. The model runs in two ways that give the same numbers: `forward` over a whole
sequence (training, prompts), and `step`, one token at a time from a state of constant size.

`Block` and `LanguageModel` know nothing of Mamba but that a layer reads, answers and remembers; the
rivals of `lib.lab.rivals` are built of them too.

Shapes are part of the signatures: B batch, L length, M = d_model, D = d_inner, N = d_state, V the
vocabulary, W = K - 1 the inputs that the convolution remembers. The tests check them at every call
(jaxtyping).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lib.env.errors import UserError
from lib.mamba import block_cpu
from lib.scan.operators import wants_derivative
from lib.scan.selective import selective_scan, selective_step

# One layer's memory: two tensors of three axes, the batch first. Zeros are the memory of nothing:
# whatever the architecture, a row is emptied by filling it with zeros and dropped by slicing.
Memory = tuple[Float[Tensor, "B _ _"], Float[Tensor, "B _ _"]]
State = list[Memory]  # one a layer
# Mamba's: the last K-1 inputs of the convolution, and the state h
MambaMemory = tuple[Float[Tensor, "B W D"], Float[Tensor, "B D N"]]


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

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layer", "d_state", "d_conv", "expand")
        small = [name for name in sizes if getattr(self, name) < 1]
        if small:
            raise UserError(f"a Mamba needs at least one of each: {small[0]} is below 1")
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError(
                f"steps begin between dt_min and dt_max, both above 0, "
                f"not between {self.dt_min:g} and {self.dt_max:g}"
            )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32; in float64 where it is float64.

    Sums, rates and the residual are kept so.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def step_bias(size: int, dt_min: float, dt_max: float) -> Tensor:
    """A bias (size,) whose softplus is log-uniform in [dt_min, dt_max]: the first step sizes."""
    low = math.log(dt_min)
    high = math.log(dt_max)
    delta = torch.exp(torch.rand(size) * (high - low) + low).clamp(min=1e-4)
    return delta + torch.log(-torch.expm1(-delta))  # softplus backwards


def scale_output(mixer: nn.Module, n_layer: int) -> None:
    """Outputs smaller with depth, as published, and no bias at first."""
    mixer.out_proj.weight /= math.sqrt(n_layer)
    for linear in (mixer.in_proj, mixer.out_proj):
        if linear.bias is not None:
            linear.bias.zero_()


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019), in the dtype of the weight.

    It is computed in float32, or in float64 where the weight is float64.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*any M"]) -> Float[Tensor, "*any M"]:
        weight = precise(self.weight)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(self.weight.dtype)


class MambaMixer(nn.Module):
    """The Mamba block's inside: (B, L, d_model) to (B, L, d_model).

    `conv1d` and `dt_proj` hold weights and are not called: who replaces them changes nothing.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        d_state = config.d_state
        rank = config.rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = nn.Conv1d(
            d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias
        )
        self.x_proj = nn.Linear(d_inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise as published: delta log-uniform in [dt_min, dt_max], outputs scaled down."""
        config = self.config
        nn.init.uniform_(self.dt_proj.weight, -(config.rank**-0.5), config.rank**-0.5)
        self.dt_proj.bias.copy_(step_bias(config.d_inner, config.dt_min, config.dt_max))
        scale_output(self, config.n_layer)

    @property
    def A(self) -> Float[Tensor, "D N"]:
        """The rates: negative, so that what is remembered decays."""
        return -torch.exp(precise(self.A_log))

    def new_memory(self, batch: int = 1) -> MambaMemory:
        """The memory before the first position: zeros."""
        config = self.config
        like = precise(self.D)
        window = like.new_zeros(batch, config.d_conv - 1, config.d_inner)
        h = like.new_zeros(batch, config.d_inner, config.d_state)
        return window, h

    def convolve(
        self, x: Float[Tensor, "B L D"], before: Float[Tensor, "B W D"]
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B W D"]]:
        """SiLU of the causal depthwise convolution of x, of which `before` came earlier.

        Returns the result and the last K-1 inputs, for whoever goes on from here.
        """
        length = x.shape[1]
        window = self.config.d_conv - 1
        before = before.to(x.dtype)
        newest = x[:, max(0, length - window) :]
        after = torch.cat([before, newest], 1)[:, -window:]  # a copy: x need not live on
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # (D, K)
        bias = self.conv1d.bias.to(x.dtype) if self.config.conv_bias else None
        if length and _suits_cuda(x, window) and (fast := fast_convolution()) is not None:
            y = fast(
                x.transpose(1, 2),
                taps,
                bias,
                initial_states=before.transpose(1, 2),
                activation="silu",
            )
            return y.transpose(1, 2), after
        if length and _suits_cpu(x, window) and block_cpu.available():
            return block_cpu.convolve_silu(x, taps, bias, before), after
        padded = torch.cat([before, x], 1)
        y = torch.zeros((), dtype=x.dtype, device=x.device) if bias is None else bias
        for k in range(self.config.d_conv):
            y = torch.addcmul(y, padded[:, k : k + length], taps[:, k])
        return F.silu(y), after

    def split(
        self, x: Float[Tensor, "*any D"]
    ) -> tuple[Float[Tensor, "*any D"], Float[Tensor, "*any N"], Float[Tensor, "*any N"]]:
        """delta before its bias, B and C: the selection, from the input itself."""
        config = self.config
        low, B, C = self.x_proj(x).split([config.rank, config.d_state, config.d_state], -1)
        return F.linear(low, self.dt_proj.weight), B, C

    def forward(
        self, u: Float[Tensor, "B L M"], memory: MambaMemory, backend: str = "auto"
    ) -> tuple[Float[Tensor, "B L M"], MambaMemory]:
        """The layer's output, and its memory after the last position."""
        before, h0 = memory
        x, z = self.in_proj(u).chunk(2, -1)  # (B, L, D) each
        x, after = self.convolve(x, before)
        delta, B, C = self.split(x)
        y, h = selective_scan(
            x, delta, self.A, B, C, self.D, z, self.dt_proj.bias, True, h0, True, backend
        )
        return self.out_proj(y), (after, h)

    def step(
        self, u: Float[Tensor, "B M"], memory: MambaMemory
    ) -> tuple[Float[Tensor, "B M"], MambaMemory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        before, h = memory
        x, z = self.in_proj(u).chunk(2, -1)
        x, after = self.convolve(x[:, None], before)
        x = x[:, 0]
        delta, B, C = self.split(x)
        y, h = selective_step(h, x, delta, self.A, B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y), (after, h)


def _suits_cuda(x: Tensor, window: int) -> bool:
    """Their kernel wants 2 to 4 taps, and channels side by side, in eights: (B, D, L) by views."""
    return x.is_cuda and 1 <= window <= 3 and x.shape[2] % 8 == 0


def _suits_cpu(x: Tensor, window: int) -> bool:
    known = x.dtype in (torch.float32, torch.bfloat16)
    return x.device.type == "cpu" and known and window < block_cpu.MOST_TAPS


@functools.cache
def fast_convolution():
    """The official CUDA kernel, `causal_conv1d_fn`, or None where it is not installed."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    return causal_conv1d_fn


class Block(nn.Module):
    """x + mixer(norm(x)), the residual kept in float32.

    `config` has d_model, norm_eps and dropout. A mixer has `forward(u, memory)` with u (B, L, M)
    and `step(u, memory)` with u (B, M), both giving a result of u's shape and the memory after it,
    and `new_memory(batch)`.
    """

    grows = False  # whether its memory grows with what was read, as that of attention does

    def __init__(self, config: Any, mixer: nn.Module):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "B L M"], memory: Memory, **options
    ) -> tuple[Float[Tensor, "B L M"], Memory]:
        """The residual after this layer, and the memory after it. The mixer gets the options."""
        y, memory = self.mixer(self.norm(x), memory, **options)
        return x + self.dropout(y).to(x.dtype), memory

    def step(self, x: Float[Tensor, "B M"], memory: Memory) -> tuple[Float[Tensor, "B M"], Memory]:
        """One position. The same numbers as `forward`, from the memory alone."""
        y, memory = self.mixer.step(self.norm(x), memory)
        return x + y, memory


class MambaBlock(Block):
    """A block around `MambaMixer`; one fused pass where the CPU can."""

    def __init__(self, config: MambaConfig):
        super().__init__(config, MambaMixer(config))

    def inside_as_made(self) -> bool:
        """Whether no module inside was replaced or is listened at: then the weights say all."""
        mixer = self.mixer
        if not block_cpu.as_made(mixer, MambaMixer):
            return False
        parts = {
            RMSNorm: [self.norm],
            nn.Dropout: [self.dropout],
            nn.Conv1d: [mixer.conv1d],
            nn.Linear: [mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj],
        }
        return all(block_cpu.as_made(one, kind) for kind, ones in parts.items() for one in ones)

    def forward(
        self, x: Float[Tensor, "B L M"], memory: MambaMemory, backend: str = "auto"
    ) -> tuple[Float[Tensor, "B L M"], MambaMemory]:
        """The residual after this layer, and the memory after it; fused where `backend` is auto."""
        if backend == "auto" and block_cpu.suits(self, x):
            return block_cpu.block(self, x, memory)
        return super().forward(x, memory, backend=backend)


class LanguageModel(nn.Module):
    """Tokens to logits: embedding, blocks, norm, and the embedding again as the output layer.

    `config` has vocab_size, d_model and norm_eps. Blocks that come from a generator draw their
    first weights after the embedding has drawn its own.
    """

    carries = True  # whether it trains and is judged with its state carried from segment to segment
    # gradient checkpointing: in training a block keeps what goes into it, and computes the rest
    # again on the way back
    recomputes = False

    def __init__(self, config: Any, blocks: Iterable[Block]):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone.layers = nn.ModuleList(blocks)
        self.backbone.norm_f = RMSNorm(config.d_model, config.norm_eps)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    @property
    def grows(self) -> bool:
        """Whether the state grows with what was read."""
        return any(layer.grows for layer in self.backbone.layers)

    def parameter_count(self) -> int:
        """Numbers that are learnt, each once: a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        return [layer.mixer.new_memory(batch) for layer in self.backbone.layers]

    @property
    def head(self) -> Float[Tensor, "V M"]:
        """The weights of the output layer."""
        return self.backbone.embeddings.weight

    def logits(self, x: Float[Tensor, "*any M"]) -> Float[Tensor, "*any V"]:
        """The residual to logits, by the last norm and the output layer."""
        return F.linear(self.backbone.norm_f(x), self.head)

    def nats(
        self, x: Float[Tensor, "B L M"], targets: Integer[Tensor, "B L"], *, total: bool = False
    ) -> Tensor:
        """The cross entropy of the residual's predictions in nats, (B, L), or its sum with `total`.

        A target below 0 counts nothing. Raises `UserError` for targets of another shape or beyond
        the vocabulary.
        """
        if targets.shape != x.shape[:2]:
            raise UserError(
                f"the model needs targets of shape {tuple(x.shape[:2])}, as its tokens have, "
                f"not {tuple(targets.shape)}"
            )
        targets = targets.long()  # streams hold 16 bits
        norm, dtype = self.backbone.norm_f, block_cpu.precision(x)
        suits = dtype is not None and self.head.dtype == torch.float32
        # the fused rows have no gradient, their sum has
        suits = suits and (total or not wants_derivative(x, norm.weight, self.head))
        if suits and block_cpu.as_made(norm, RMSNorm):
            return block_cpu.cross_entropy(
                x, norm.weight, self.head, targets, norm.eps, dtype, total
            )
        logits = precise(self.logits(x)).flatten(0, 1)
        reduction = "sum" if total else "none"
        wanted = targets.flatten().clamp(min=-1)
        try:
            nats = F.cross_entropy(logits, wanted, ignore_index=-1, reduction=reduction)
        except IndexError:  # a GPU looks at this itself, and ends the process
            raise UserError(
                f"a target is {int(wanted.max())}, and the vocabulary has {len(self.head)} tokens"
            ) from None
        return nats if total else nats.view(targets.shape)

    def residual(
        self, tokens: Integer[Tensor, "..."], state: State | None = None, **options
    ) -> tuple[Float[Tensor, "B L M"], State]:
        """tokens (B, L) to what the last block leaves, and the state after the last token.

        The blocks get the options. Raises `UserError` for tokens or a state of another shape.
        """
        layers = self.backbone.layers
        if tokens.dim() != 2:
            raise UserError(f"the model needs tokens of shape (B, L), not {tuple(tokens.shape)}")
        if state is None:
            state = self.new_state(tokens.shape[0])
        x = self._embed(tokens, state)
        after = []
        for layer, memory in zip(layers, state):
            if self.recomputes and torch.is_grad_enabled():
                x, memory = checkpoint(layer, x, memory, use_reentrant=False, **options)
            else:
                x, memory = layer(x, memory, **options)
            after.append(memory)
        return x, after

    def _embed(self, tokens: Integer[Tensor, "..."], state: State) -> Float[Tensor, "... M"]:
        """The residual before the first block.

        Raises `UserError` for what are no tokens of the vocabulary, and for a state of other
        layers or rows.
        """
        layers, rows = self.backbone.layers, tokens.shape[0]
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise UserError(f"the model reads whole numbers as tokens, not {tokens.dtype}")
        if len(state) != len(layers):
            raise UserError(
                f"the state has {len(state)} layers, the model {len(layers)}: take `new_state`"
            )
        for memory in state:
            if any(part.shape[0] != rows for part in memory):
                raise UserError(
                    f"the state is one of {memory[0].shape[0]} rows, and tokens have {rows}: "
                    "take `new_state`"
                )
        try:
            # streams hold 16 bits, which the embedding does not take
            return precise(self.backbone.embeddings(tokens.long()))
        except IndexError as error:  # on a CPU
            raise UserError(
                f"a token is outside the vocabulary of {self.config.vocab_size}: "
                "was it made by another tokenizer?"
            ) from error

    def forward(
        self,
        tokens: Integer[Tensor, "..."],
        state: State | None = None,
        *,
        return_state: bool = False,
        last_only: bool = False,
        targets: Integer[Tensor, "..."] | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, State]:
        """tokens (B, L) to logits at every position (B, L, V).

        With `last_only` they are at the last position alone (B, 1, V). With `state` the sequence
        goes on from there; `return_state` also gives the state after the last token, so that a long
        piece can be read in segments. The state that is given is not changed. With `targets` (B, L)
        the result is the sum of their cross entropies in nats instead; a target of -1 counts
        nothing. The options go to the blocks: Mamba's know `backend`.
        """
        x, after = self.residual(tokens, state, **options)
        if targets is None:
            result = self.logits(x[:, -1:] if last_only else x)
        else:
            result = self.nats(x, targets, total=True)
        return (result, after) if return_state else result

    @torch.inference_mode()
    def prefill(
        self, tokens: Integer[Tensor, "B L"], state: State | None = None
    ) -> tuple[Float[Tensor, "B V"], State]:
        """Read a prompt at once: logits of the next token and the state.

        They are made in inference mode, as those of `step` are: to train from such a state, clone
        it first. Raises `UserError` for a prompt of no token.
        """
        if not tokens.numel():
            raise UserError("a prompt needs one token at least: take `new_state` for none")
        logits, state = self(tokens, state, return_state=True, last_only=True)
        return logits[:, -1], state

    @torch.inference_mode()
    def step(
        self, tokens: Integer[Tensor, "..."], state: State | None
    ) -> tuple[Float[Tensor, "B V"], State]:
        """Read one token a sequence, tokens (B,): logits of the next and the new state.

        An attention layer writes into the cache that it is given: to go on twice from one moment,
        copy the state first. Raises `UserError` for tokens or a state of another shape.
        """
        if tokens.dim() != 1 or state is None:
            raise UserError(
                "a step reads tokens of shape (B,) and goes on from a state: take `new_state`"
            )
        x = self._embed(tokens, state)
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            x, memory = layer.step(x, memory)
            after.append(memory)
        return self.logits(x), after


class MambaLM(LanguageModel):
    """Mamba blocks; the output layer is the embedding, or `lm_head` where `tied` is False.

    `lm_head` holds weights and is not called.
    """

    def __init__(self, config: MambaConfig):
        super().__init__(config, (MambaBlock(config) for _ in range(config.n_layer)))
        if not config.tied:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def head(self) -> Float[Tensor, "V M"]:
        """The weights of the output layer."""
        return self.backbone.embeddings.weight if self.config.tied else self.lm_head.weight
