"""Operations that a training step makes for a token, counted from a model's sizes.

A multiplication and an addition are two. The backward pass makes twice as many as the forward
pass, as is usual (Kaplan et al. 2020, section 2.1). One rule for all: what is needed by the form
that runs here counts, and what a mask throws away does not. So attention meets earlier tokens
alone, and Mamba-2 and S4D, which run in chunks, meet the earlier ones of a chunk and one state.
Mamba's scan is the recurrence; as a parallel scan it would be nine for each state in place of seven
(Gu, in issue 110 of state-spaces/mamba).

Left out is what is small beside the products: norms, gates, softmax, and what is made once for a
whole batch, as S4D's kernel.
"""

from torch import nn

from lib.lab.rivals.hybrid import Selective
from lib.lab.rivals.lstm import LSTMMixer
from lib.lab.rivals.s4d import S4DMixer
from lib.lab.rivals.transformer import Attention
from lib.mamba.mamba2 import Mamba2Mixer
from lib.mamba.mamba3 import Mamba3Mixer
from lib.mamba.model import LanguageModel, MambaMixer
from lib.scan import ssd, ssm

FORWARD_AND_BACKWARD = 3
SCAN = 7  # Δ·A, its exponential, that times h, plus Δx·B (two), times C, and the sum over states


def operations(model: LanguageModel, length: int, carry: int = 1) -> float:
    """Operations for each token of a training step on sequences of `length` tokens, of which a row
    reads `carry` on end before it jumps.
    """
    embedding = model.backbone.embeddings.weight  # also the output layer, which is a product
    weights = embedding.numel() + sum(weights_of(module) for module in model.modules())
    read = carry * length if model.carries else length  # with what a model remembers
    mixing = sum(mixing_operations(layer.mixer, read) for layer in model.backbone.layers)
    return FORWARD_AND_BACKWARD * (2 * weights + mixing)


def weights_of(module: nn.Module) -> int:
    """Weights of a layer that each token is multiplied by, once."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.LSTM):
        return sum(weight.numel() for weight in module.parameters(False) if weight.dim() > 1)
    return 0


def mixing_operations(mixer: nn.Module, length: int) -> float:
    """Forward operations for a token in which tokens meet one another, over `length` of them;
    a layer's weights are not in it.
    """
    if isinstance(mixer, Attention):
        window = mixer.window
        reach = sum(min(t + 1, window) for t in range(length)) / length
        return 4 * reach * mixer.width  # queries by keys, weights by values
    if isinstance(mixer, Selective):
        mixer = mixer.mamba
    if isinstance(mixer, MambaMixer):
        return SCAN * mixer.config.d_inner * mixer.config.d_state
    if isinstance(mixer, Mamba2Mixer | Mamba3Mixer):
        config = mixer.config
        chunk = min(ssd.CHUNK, length)
        # C by B: once for each head in Mamba-3, once for all in Mamba-2
        products = config.n_head if isinstance(mixer, Mamba3Mixer) else 1
        inside = 2 * pairs(chunk) * (products * config.d_state + config.d_inner)
        state = config.d_inner * config.d_state
        return inside + 4 * state + 2 * state / chunk  # into a chunk's state, out of it, handed on
    if isinstance(mixer, S4DMixer):
        channels, states, chunk = mixer.config.d_inner, mixer.config.d_state, ssm.CHUNK
        # the same with a kernel for each channel; complex numbers are handed on
        return channels * (2 * pairs(chunk) + 4 * states + 4 * states / chunk)
    if isinstance(mixer, LSTMMixer):
        return 0  # all its products are by weights
    raise TypeError(f"the operations of {type(mixer).__name__} are not known")


def pairs(chunk: int) -> float:
    """Steps of its chunk that a step reads, itself among them, on average."""
    return (chunk + 1) / 2
