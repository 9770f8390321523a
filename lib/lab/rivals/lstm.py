"""An LSTM language model: one-layer LSTMs in residual blocks (Hochreiter and Schmidhuber 1997)."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.mamba.model import Block, LanguageModel, Memory
from lib.scan import native
from lib.scan.parallel import without_autocast


@dataclass(frozen=True)
class LSTMConfig:
    """Sizes of an LSTM language model."""

    vocab_size: int
    d_model: int = 448  # width of the residual stream and of each LSTM
    n_layer: int = 2
    dropout: float = 0.0  # on each block's output, in training
    norm_eps: float = 1e-5


class LSTMMixer(nn.Module):
    """(B, L, M) to (B, L, M) by torch's fused LSTM; its memory is h and c, each (B, 1, M)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.lstm = nn.LSTM(width, width, batch_first=True)
        # remember at first (Jozefowicz et al. 2015); gates come as i, f, g, o
        with torch.no_grad():
            self.lstm.bias_ih_l0.zero_()
            self.lstm.bias_hh_l0.zero_()
            self.lstm.bias_ih_l0[width : 2 * width] = 1

    def new_memory(self, batch: int = 1) -> Memory:
        """h and c, each (B, 1, M), before the first token: zeros."""
        zeros = self.lstm.weight_hh_l0.new_zeros(batch, 1, self.width)
        return zeros, zeros.clone()

    def forward(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """u (B, L, M) to (B, L, M), and h and c after it."""
        if not u.shape[1]:
            return u, memory
        h, c = (t.transpose(0, 1).to(u.dtype).contiguous() for t in memory)
        # torch has no LSTM in bfloat16 for processors of narrower vectors
        narrow = u.device.type == "cpu" and not native.units().startswith("AVX-512")
        with without_autocast(u.device) if narrow else nullcontext():
            y, (h, c) = self.lstm(u, (h, c))
        return y, (h.transpose(0, 1), c.transpose(0, 1))

    def step(self, u: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One position, written out: the fused call costs more than its arithmetic at length 1."""
        h, c = (t[:, 0] for t in memory)
        lstm = self.lstm
        from_input = F.linear(u, lstm.weight_ih_l0, lstm.bias_ih_l0)
        from_memory = F.linear(h, lstm.weight_hh_l0, lstm.bias_hh_l0)
        i, f, g, o = (from_input + from_memory).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h, (h[:, None], c[:, None])


class LSTMLM(LanguageModel):
    """x + LSTM(norm(x)), `n_layer` times."""

    def __init__(self, config: LSTMConfig):
        super().__init__(
            config, [Block(config, LSTMMixer(config.d_model)) for _ in range(config.n_layer)]
        )
