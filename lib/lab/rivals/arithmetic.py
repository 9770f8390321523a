"""Operations that a training step makes for a token, counted from a model's sizes.

A multiplication and an addition are two. The backward pass makes twice as many as the forward
pass, as is usual (Kaplan et al. 2020, section 2.1). Left out is what is small beside the products:
norms, gates, softmax.
"""

import math

from torch import nn

from lib.lab.rivals.hybrid import Selective
from lib.lab.rivals.lstm import LSTMMixer
from lib.lab.rivals.matched import body
from lib.lab.rivals.s4d import S4DMixer
from lib.lab.rivals.transformer import Attention
from lib.mamba.mamba2 import Mamba2Mixer
from lib.mamba.mamba3 import Mamba3Mixer
from lib.mamba.model import LanguageModel, MambaMixer
from lib.scan.ssd import CHUNK

FORWARD_AND_BACKWARD = 3


def operations(model: LanguageModel, batch: int, length: int) -> float:
    """Operations for each token of a training step on `batch` sequences of `length` tokens."""
    embedding = model.backbone.embeddings.weight  # also the output layer, which is a product
    products = 2 * (body(model) + embedding.numel())
    mixing = sum(
        mixing_operations(layer.mixer, model, batch, length) for layer in model.backbone.layers
    )
    return FORWARD_AND_BACKWARD * (products + mixing)


def mixing_operations(mixer: nn.Module, model: LanguageModel, batch: int, length: int) -> float:
    """Forward operations for a token in which tokens meet one another;
    a layer's weights are not in it.
    """
    if isinstance(mixer, Attention):
        window = mixer.window
        reach = window if model.carries else sum(min(t + 1, window) for t in range(length)) / length
        return 4 * reach * mixer.width  # queries by keys, weights by values
    if isinstance(mixer, Selective):
        mixer = mixer.mamba
    if isinstance(mixer, MambaMixer):
        # as a parallel scan: Gu, in issue 110 of state-spaces/mamba
        return 9 * mixer.config.d_inner * mixer.config.d_state
    if isinstance(mixer, Mamba2Mixer | Mamba3Mixer):
        config = mixer.config
        chunk = min(CHUNK, length)
        # C by B: once for each head in Mamba-3, once for all in Mamba-2
        products = config.n_head if isinstance(mixer, Mamba3Mixer) else 1
        inside = 2 * chunk * (products * config.d_state + config.d_inner)  # and their mask by x
        return inside + 4 * config.d_inner * config.d_state  # into a chunk's state, and out of it
    if isinstance(mixer, S4DMixer):
        # by FFT, the fewest that are known; in chunks, as it runs here, they are more and faster
        channels = mixer.config.d_inner
        points = 2 * length  # padded, so that the end does not run into the beginning
        # of a row of reals, and their product
        transforms = 3 * 2.5 * points * math.log2(points) + 6 * (length + 1)
        # complex powers and sums, once for all rows
        kernel = 16 * length * mixer.config.d_state / 2
        return channels * (transforms + kernel / batch) / length
    if isinstance(mixer, LSTMMixer):
        return 0  # all its products are by weights
    raise TypeError(f"the operations of {type(mixer).__name__} are not known")
