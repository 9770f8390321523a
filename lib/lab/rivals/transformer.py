"""A Transformer language model as they are built today: rotary positions (Su et al. 2021), RMS
norms, SwiGLU (Shazeer 2020), torch's `scaled_dot_product_attention`, a key-value cache allocated
once.

Each position attends to the last `window` positions, itself included. The cache is a ring of
`window` slots: position p lies in slot p mod window. Keys are kept rotated by their own position,
so a product with a query depends on their distance alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.model import Block, LanguageModel, Memory, RMSNorm, precise


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer language model."""

    vocab_size: int
    d_model: int = 192  # width of the residual stream
    n_layer: int = 4
    n_head: int = 3  # heads, each of d_model / n_head numbers, which must be even
    d_feed: int = 512  # width inside the feed-forward part
    # positions that one attends to, itself included: also the length of the cache
    window: int = 512
    # train and judge with the cache carried on (Transformer-XL), or on windows read afresh
    carries: bool = False
    rope_base: float = 10_000.0
    dropout: float = 0.0  # on the output of attention and of the feed-forward part, in training
    norm_eps: float = 1e-5


@torch.no_grad()
def initialise(linear: nn.Linear, scale: float = 1.0) -> None:
    """Normal weights of standard deviation `scale` / √inputs."""
    nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))


class SwiGLU(nn.Module):
    """(…, M) to (…, M): silu(gate) * up, projected back."""

    def __init__(self, width: int, inner: int, n_layer: int):
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        initialise(self.in_proj)
        initialise(self.out_proj, scale=1 / math.sqrt(2 * n_layer))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, M) to (…, M)."""
        gate, up = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * up)


class Attention(nn.Module):
    """Causal attention over a window: (B, L, M) to (B, L, M).

    Its memory: the ring of keys and values, (B, 2 · heads · window, size), each head's slots side
    by side as attention reads them; and how many positions have been read, (B, 1, 1), a float that
    is exact up to 16 million. Rows may have read different numbers of them.
    """

    def __init__(
        self, width: int, n_head: int, window: int, n_layer: int, rope_base: float = 10_000.0
    ):
        super().__init__()
        if width % (2 * n_head) or window < 1:
            raise UserError(
                f"attention needs a width that splits into {n_head} heads of even size "
                f"and a window of at least 1, not {width} and {window}"
            )
        self.width, self.n_head, self.window = width, n_head, window
        self.carries = True  # where not, a training crop leaves nothing behind it
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        initialise(self.in_proj)
        initialise(self.out_proj, scale=1 / math.sqrt(2 * n_layer))
        half = width // n_head // 2
        # no buffer: they stay float64 whatever the model's dtype
        self.frequencies = rope_base ** (-torch.arange(half, dtype=torch.float64) / half)

    def new_memory(self, batch: int = 1) -> Memory:
        """An empty ring, and 0 positions read."""
        weight = self.out_proj.weight
        ring = weight.new_zeros(batch, 2 * self.n_head * self.window, self.width // self.n_head)
        return ring, precise(weight[:0]).new_zeros(batch, 1, 1)

    def unused_bytes(self, memory: Memory, read: int) -> int:
        """Bytes of the slots that are still empty after `read` positions, at batch 1."""
        free = max(0, self.window - read)
        return free * 2 * self.width * memory[0].element_size()

    def noise(self, memory: Memory, position: int, random: torch.Generator) -> Memory:
        """A memory of these sizes, for measuring, as if `position` random tokens had been read."""
        ring, read = memory
        ring = torch.randn(ring.shape, generator=random, device=ring.device)
        return ring, torch.full_like(read, position)

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """x (B, heads, L, size) with its pairs of numbers turned by the positions `at` (B, L)."""
        # in float64: far positions stay exact
        self.frequencies = self.frequencies.to(at.device)  # copied once
        angle = at.double()[:, None, :, None] * self.frequencies
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def project(self, u: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, heads, L, size), keys and values (B, 2 · heads, L, size),
        of u (B, L, M) at positions (B, L).
        """
        q, k, v = self.in_proj(u).unflatten(2, (3 * self.n_head, -1)).transpose(1, 2).chunk(3, 1)
        return self.rotate(q, at), torch.cat([self.rotate(k, at), v], 1)

    def slots(self, ring: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """The ring as (B, 2 · heads, window, size),
        and the index of positions `at` (B, L) in it.
        """
        ring = ring.unflatten(1, (2 * self.n_head, self.window))
        return ring, (at % self.window)[:, None, :, None].expand(
            -1, ring.shape[1], -1, ring.shape[3]
        )

    def forward(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """u (B, L, M) to (B, L, M), and the ring with the last `window` positions."""
        ring, position = memory
        start = position[:, 0].long()  # (B, 1)
        length = u.shape[1]
        at = start + torch.arange(length, device=u.device)
        q, new = self.project(u, at)
        before = min(int(start.max()), self.window - 1)  # remembered positions still in reach
        both, exists = new, None
        if before:
            past = start - before + torch.arange(before, device=u.device)
            slots, index = self.slots(ring, past)
            remembered = slots.gather(2, index).to(new.dtype)
            both = torch.cat([remembered, new], 2)
            if int(start.min()) < before:  # some rows have read less
                exists = F.pad(past >= 0, (0, length), value=True)
        y = self.attend(q, both, exists).transpose(1, 2).flatten(2)
        if self.training and not self.carries:
            return self.out_proj(y), memory
        first = max(0, length - self.window)  # what came earlier is out of reach for good
        slots, index = self.slots(ring, at[:, first:])
        # no gradient into an earlier segment, as in Transformer-XL (Dai et al. 2019)
        newest = new[:, :, first:].detach().to(ring.dtype)
        ring = slots.scatter(2, index, newest).flatten(1, 2)
        return self.out_proj(y), (ring, position + length)

    def attend(self, q: Tensor, both: Tensor, exists: Tensor | None) -> Tensor:
        """Queries (B, heads, L, size) over keys and values (B, 2 · heads, S, size),
        of which the last L are their own.

        `exists` (B, S) is False where a row has no such position. Queries go in blocks of the
        window's length, so that no mask is longer than two windows.
        """
        length = q.shape[2]
        before = both.shape[2] - length  # positions that are only keys and values
        parts = [q[:, :, :0]]
        for begin in range(0, length, self.window):
            end = min(length, begin + self.window)
            first = max(0, before + begin - self.window + 1)
            last = before + end
            queries = q[:, :, begin:end]
            k, v = both[:, :, first:last].chunk(2, 1)
            if before + begin == 0:  # the plain triangle, for which there are fast kernels
                parts.append(F.scaled_dot_product_attention(queries, k, v, is_causal=True))
                continue
            row = torch.arange(before + begin, last, device=q.device)[:, None]
            column = torch.arange(first, last, device=q.device)
            mask = (column <= row) & (column > row - self.window)
            if exists is not None:
                mask = mask & exists[:, None, None, first:last]
            parts.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask))
        return torch.cat(parts, 2)

    def step(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One position: its key and value are written into the given ring, nothing is copied."""
        ring, position = memory
        at = position[:, 0].long()
        q, new = self.project(u[:, None], at)
        slots, index = self.slots(ring, at)
        slots.scatter_(2, index, new.to(ring.dtype))
        least, most = int(at.min()), int(at.max())
        used = min(most + 1, self.window)
        mask = None
        if least < most and least < used:  # some rows have read less
            mask = (torch.arange(used, device=u.device) <= at)[:, None, None]
        k, v = slots[:, :, :used].chunk(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.flatten(1)), (ring, position + 1)


class TransformerBlock(Block):
    """x + attention(norm(x)), then x + feed(norm_feed(x)).

    `config` is a `TransformerConfig`, or has the same fields (`lib.lab.rivals.hybrid`).
    """

    grows = True

    def __init__(self, config):
        super().__init__(
            config,
            Attention(
                config.d_model, config.n_head, config.window, config.n_layer, config.rope_base
            ),
        )
        self.norm_feed = RMSNorm(config.d_model, config.norm_eps)
        self.feed = SwiGLU(config.d_model, config.d_feed, config.n_layer)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The residual x (B, L, M) after this layer, and the memory after it."""
        x, memory = super().forward(x, memory)
        return x + self.dropout(self.feed(self.norm_feed(x))).to(x.dtype), memory

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The same for one position, x (B, M)."""
        x, memory = super().step(x, memory)
        return x + self.feed(self.norm_feed(x)), memory


class TransformerLM(LanguageModel):
    """Attention and SwiGLU, `n_layer` times."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config, [TransformerBlock(config) for _ in range(config.n_layer)])
        self.carries = config.carries
        for layer in self.backbone.layers:
            layer.mixer.carries = config.carries
