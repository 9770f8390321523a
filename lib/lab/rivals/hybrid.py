"""Mamba with one or two attention layers, as in Jamba and Samba: the original authors' future work."""

from dataclasses import dataclass

from lib.env.errors import UserError
from lib.lab.rivals.transformer import TransformerBlock
from lib.mamba.model import LanguageModel, MambaBlock, MambaConfig


@dataclass(frozen=True)
class HybridConfig(MambaConfig):
    """Sizes of a hybrid: a Mamba's, and those of the Transformer layers among its layers."""

    attention: tuple[int, ...] = (2,)  # which layers are Transformer layers, counted from 0
    n_head: int = 4
    d_feed: int = 256  # width inside their feed-forward part
    window: int = 512  # positions that they attend to
    rope_base: float = 10_000.0

    def __post_init__(self):
        object.__setattr__(self, "attention", tuple(self.attention))  # JSON knows lists only
        if any(not 0 <= i < self.n_layer for i in self.attention):
            raise UserError(
                f"attention in layers {self.attention} does not fit {self.n_layer} layers, counted from 0"
            )
        if not self.tied:
            raise UserError(
                "the hybrid's embedding is its output layer: tied=False is Mamba's alone"
            )


class HybridLM(LanguageModel):
    """Mamba blocks, and Transformer blocks where `attention` says so."""

    def __init__(self, config: HybridConfig):
        super().__init__(config, [
            TransformerBlock(config) if i in config.attention else MambaBlock(config)
            for i in range(config.n_layer)])
        self.register_load_state_dict_pre_hook(_rename)


def _rename(model: HybridLM, weights: dict, *_) -> None:
    """Weights of before, in which the Mamba layers stood one name deeper, still fit."""
    for name in [name for name in weights if ".mixer.mamba." in name]:
        weights[name.replace(".mixer.mamba.", ".mixer.")] = weights.pop(name)
