"""What the rivals of Mamba have in common: embedding, blocks, norm, tied output; whole or step by step.

A model reads a whole sequence (`forward`) or one token at a time from a state (`step`), and both give
the same numbers. A state is a list, one memory a layer; a memory is a pair of float tensors with three
axes, rows of the batch first. Zeros are the memory of nothing. So whoever trains or evaluates can
empty a row by filling it with zeros and drop rows by slicing, whatever the architecture.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.model import RMSNorm

Memory = tuple[Tensor, Tensor]
State = list[Memory]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feed(norm_feed(x)) where there is a feed-forward part.

    A mixer has `forward(u, memory)` with u (B, L, M), `step(u, memory)` with u (B, M), both giving a
    result of u's shape and the memory after it, and `new_memory(batch)`. The residual stays in float32.
    """

    def __init__(self, width: int, mixer: nn.Module, feed: nn.Module | None = None, *, dropout: float = 0.0,
                 norm_eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(width, norm_eps)
        self.mixer = mixer
        self.norm_feed = RMSNorm(width, norm_eps) if feed is not None else None
        self.feed = feed
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The residual x (B, L, M) after this layer, and the memory after it."""
        return self._add(x, *self.mixer(self.norm(x), memory))

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The same for one position, x (B, M)."""
        return self._add(x, *self.mixer.step(self.norm(x), memory))

    def _add(self, x: Tensor, y: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        x = x + self.dropout(y).float()
        if self.feed is not None:
            x = x + self.dropout(self.feed(self.norm_feed(x))).float()
        return x, memory


class LanguageModel(nn.Module):
    """Tokens to logits through blocks; the same interface as `lib.mamba.MambaLM`."""

    carries = True  # whether it trains and is judged with its state carried from segment to segment

    def __init__(self, config, blocks: list[Block]):
        """`config` has vocab_size, d_model and norm_eps at least."""
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

    def parameter_count(self) -> int:
        """Numbers that are learnt, each once."""
        return sum(p.numel() for p in self.parameters())

    def new_state(self, batch: int = 1) -> State:
        """The state before the first token: zeros."""
        return [layer.mixer.new_memory(batch) for layer in self.backbone.layers]

    def logits(self, x: Tensor) -> Tensor:
        """The residual (…, M) to logits (…, V); the embedding is the output layer too."""
        return F.linear(self.backbone.norm_f(x), self.backbone.embeddings.weight)

    def forward(self, tokens: Tensor, state: State | None = None, *, return_state: bool = False,
                last_only: bool = False):
        """tokens (B, L) to logits at every position (B, L, V), or at the last (B, 1, V) with `last_only`.

        With `state` the sequence goes on from there; `return_state` also gives the state after the last
        token. The state that is given is not changed.
        """
        if tokens.dim() != 2:
            raise UserError(f"the model needs tokens of shape (B, L), not {tuple(tokens.shape)}")
        if state is not None and len(state) != len(self.backbone.layers):
            raise UserError(f"the state has {len(state)} layers, the model {len(self.backbone.layers)}: "
                            "take `new_state`")
        state = state or self.new_state(len(tokens))
        x = self.backbone.embeddings(tokens).float()
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            x, memory = layer(x, memory)
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
        """Read one token a sequence (B,): logits of the next (B, V) and the new state.

        An attention layer writes into the cache that it is given: to go on twice from one moment,
        copy the state first (`copy_state`).
        """
        x = self.backbone.embeddings(tokens)
        after = []
        for layer, memory in zip(self.backbone.layers, state):
            x, memory = layer.step(x, memory)
            after.append(memory)
        return self.logits(x), after


def copy_state(state: State) -> State:
    """A state of one's own."""
    return [tuple(t.clone() for t in memory) for memory in state]


@torch.no_grad()
def initialise(*linears: nn.Linear, scale: float = 1.0) -> None:
    """Normal weights of standard deviation `scale` / √inputs, zero biases."""
    for linear in linears:
        nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
        if linear.bias is not None:
            linear.bias.zero_()
