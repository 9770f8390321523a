"""The rivals of Mamba behind one door: `build(arch, vocab_size, size)`, all of one size.

`Size` is that of a Mamba; a rival gets the width at which its parameters, without the embedding,
come nearest to that Mamba's. All have `lib.mamba.MambaLM`'s interface: forward, prefill, step,
new_state, parameter_count, device.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ConfigDict
from torch import nn
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.schema import read_json
from lib.env.tensors import load_tensors, save_tensors
from lib.lab.rivals.hybrid import HybridConfig, HybridLM
from lib.lab.rivals.lstm import LSTMLM, LSTMConfig
from lib.lab.rivals.s4d import S4DLM, S4DConfig
from lib.lab.rivals.transformer import TransformerConfig, TransformerLM
from lib.mamba.checkpoint import CONFIG, WEIGHTS
from lib.mamba.mamba2 import Mamba2Config, Mamba2LM
from lib.mamba.mamba3 import Mamba3Config, Mamba3LM
from lib.mamba.model import LanguageModel, MambaConfig, MambaLM, State

LABELS = {
    "lstm": "LSTM",
    "transformer": "Transformer",
    "transformer_xl": "Transformer, cache carried",
    "s4d": "S4D (fixed SSM)",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3, not MIMO",
    "hybrid": "Mamba + attention",
}
ARCHS = tuple(LABELS)
CLASSES = {
    "LSTMLM": (LSTMLM, LSTMConfig),
    "TransformerLM": (TransformerLM, TransformerConfig),
    "S4DLM": (S4DLM, S4DConfig),
    "Mamba2LM": (Mamba2LM, Mamba2Config),
    "Mamba3LM": (Mamba3LM, Mamba3Config),
    "HybridLM": (HybridLM, HybridConfig),
}
AGAIN = "train it again"
TOLERANCE = 0.03  # how far a rival's parameters may be from Mamba's


@dataclass(frozen=True)
class Size:
    """The Mamba that all are matched to, and what is no matter of size."""

    d_model: int = 256
    n_layer: int = 4
    d_state: int = 16
    window: int = 512  # positions that attention reaches back to
    dropout: float = 0.0
    fixed_state: int = 64  # states a channel of S4D, as published

    def mamba(self, vocab_size: int) -> MambaConfig:
        return MambaConfig(
            vocab_size, self.d_model, self.n_layer, self.d_state, dropout=self.dropout
        )


def build(arch: str, vocab_size: int, size: Size = Size()) -> LanguageModel:
    """A fresh model of this architecture, matched to the Mamba of this size;
    weights by torch's seed.

    Raises `UserError` for an unknown architecture, or a size that cannot be matched within 3 %.
    """
    return _make(config_of(arch, vocab_size, size))


@functools.cache
def config_of(arch: str, vocab_size: int, size: Size = Size()):
    """The sizes that `build` takes, as the architecture's own configuration."""
    if arch not in ARCHS:
        raise UserError(f"architecture {arch!r} is unknown: choose {', '.join(ARCHS)}")
    ours = size.mamba(vocab_size)
    if arch == "mamba":
        return ours
    wanted = _count(ours)
    found = {
        "lstm": _lstm,
        "s4d": _s4d,
        "mamba2": partial(_heads, Mamba2Config),
        "mamba3": partial(_heads, Mamba3Config),
        "hybrid": _hybrid,
        "transformer": _transformer,
        "transformer_xl": _transformer,
    }[arch](vocab_size, size, wanted)
    if arch == "transformer_xl":
        found = replace(found, carries=True)
    if abs(_count(found) / wanted - 1) > TOLERANCE:
        raise UserError(
            f"no {LABELS[arch]} has within 3 % of this Mamba's {wanted:,} parameters: "
            "choose a larger d_model"
        )
    return found


def _lstm(vocab_size: int, size: Size, wanted: int) -> LSTMConfig:
    """Half as many layers, and wider: each is a sequence of small steps, which no machine likes."""
    start = LSTMConfig(vocab_size, n_layer=max(1, round(size.n_layer / 2)), dropout=size.dropout)
    return _widen(lambda width: replace(start, d_model=width), wanted)


def _s4d(vocab_size: int, size: Size, wanted: int) -> S4DConfig:
    start = S4DConfig(
        vocab_size, n_layer=size.n_layer, d_state=size.fixed_state, dropout=size.dropout
    )
    return _widen(lambda width: replace(start, d_model=width), wanted)


def _heads(kind: type, vocab_size: int, size: Size, wanted: int) -> Mamba2Config | Mamba3Config:
    """Mamba's width and layers, and a larger state.

    Into the state goes what its step and its decays no longer cost.
    """
    channels = MambaConfig(vocab_size, size.d_model).d_inner
    # the widest head that leaves two or more of them
    head = next(p for p in (64, 32, 16, 8, 4, 2, 1) if channels % p == 0 and channels > p)
    start = kind(vocab_size, size.d_model, size.n_layer, head_dim=head, dropout=size.dropout)
    return _widen(lambda d_state: replace(start, d_state=d_state), wanted)


def _transformer(vocab_size: int, size: Size, wanted: int) -> TransformerConfig:
    """As many layers, heads of about 64,
    and a feed-forward part 8/3 as wide as the residual, then fitted.
    """
    heads = max(1, round(size.d_model / 80))
    start = TransformerConfig(
        vocab_size, n_layer=size.n_layer, n_head=heads, window=size.window, dropout=size.dropout
    )
    step = 8 * heads if size.d_model >= 64 else 2 * heads
    rough = _widen(
        lambda n: replace(start, d_model=n * step, d_feed=max(1, n * step * 8 // 3)), wanted
    )
    return _widen(lambda feed: replace(rough, d_feed=feed), wanted)


def _hybrid(vocab_size: int, size: Size, wanted: int) -> HybridConfig:
    """Mamba's width and layers; one layer in the middle is a Transformer's,
    two from eight layers on.
    """
    layers = size.n_layer
    attention = (layers // 2,) if layers < 8 else (layers // 3, 2 * layers // 3)
    heads = max(1, round(size.d_model / 64))
    while size.d_model % (2 * heads):
        heads -= 1
        if not heads:
            raise UserError(f"attention needs an even width, not d_model={size.d_model}")
    start = HybridConfig(
        **asdict(size.mamba(vocab_size)), attention=attention, n_head=heads, window=size.window
    )
    return _widen(lambda feed: replace(start, d_feed=feed), wanted)


def _widen(config: Callable[[int], object], wanted: int):
    """Of `config(1)`, `config(2)`, …, which grow,
    the one whose number of parameters is nearest to `wanted`.

    Matrix units like multiples of 8:
    one of them is taken where it is within half of what is allowed.
    """

    def nearest(step):
        low, high = 1, 2
        while _count(config(high * step)) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if _count(config(middle * step)) < wanted else (low, middle)
        return min(
            (config(n * step) for n in (low, high)), key=lambda one: abs(_count(one) - wanted)
        )

    round_one = nearest(8)
    return round_one if abs(_count(round_one) / wanted - 1) <= TOLERANCE / 2 else nearest(1)


@functools.cache
def _count(config) -> int:
    """Parameters of a configuration without the embedding; nothing is allocated."""
    with torch.device("meta"):
        return body(_make(config))


def _make(config) -> LanguageModel:
    for cls, kind in CLASSES.values():
        if type(config) is kind:
            return cls(config)
    return MambaLM(config)


def body(model: nn.Module) -> int:
    """Parameters without the embedding and, where it is not the same, the output layer."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if "embeddings" not in name and "lm_head" not in name
    )


def state_bytes(model: LanguageModel, state: State, read: int) -> int:
    """Bytes of a state (batch 1) in use after `read` tokens:
    of a cache, only the slots that are filled.
    """
    total = 0
    for layer, memory in zip(model.backbone.layers, state):
        total += sum(t.nbytes for t in memory)
        if layer.grows:
            total -= layer.mixer.unused_bytes(memory, read)
    return total


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, whole or not at all;
    a Mamba as `lib.mamba.save` does.
    """
    if isinstance(model, MambaLM):
        return mamba.save(model, folder)
    save_tensors(model.state_dict(), Path(folder) / WEIGHTS)
    description = {"architecture": type(model).__name__, **asdict(model.config)}
    write_json(Path(folder) / CONFIG, description)


class Description(TypedDict, total=False):
    """The fact of a config.json that says whose it is."""

    __pydantic_config__ = ConfigDict(extra="allow")
    architecture: str


def load(folder: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Open what `save` wrote. Raises `UserError` when something is missing or damaged."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"no checkpoint in {folder}: it needs {CONFIG} and {WEIGHTS}")
    description = read_json(folder / CONFIG, Description, do=AGAIN)
    if description.get("architecture") not in CLASSES:
        return mamba.load(folder, device)
    cls, kind = CLASSES[description["architecture"]]
    config = read_json(folder / CONFIG, kind, do=AGAIN)
    if strange := description.keys() - {"architecture", *asdict(config)}:
        raise UserError(
            f"{folder / CONFIG} is damaged "
            f"({min(strange)[:80]} is no fact of this architecture): {AGAIN}"
        )
    _check_sizes(config, folder / CONFIG)
    weights = load_tensors(folder / WEIGHTS, do=AGAIN)
    try:
        with torch.device("meta"):  # so that a false size costs no memory
            wanted = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        if {name: tensor.shape for name, tensor in weights.items()} != wanted:
            raise ValueError("other tensors than its configuration says")
        model = cls(config)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"the checkpoint in {folder} is damaged: {AGAIN}") from error
    return model.to(device).eval()


def _check_sizes(config, path: Path) -> None:
    """Raise `UserError` for a size that no model has."""
    most = {"n_layer": 1024, "dropout": 1, "norm_eps": 1}
    for name, value in asdict(config).items():
        least = 0 if name in ("dropout", "dt_rank") else 1e-12
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and not least <= value <= most.get(name, 2**20)
        ):
            raise UserError(
                f"{path} is damaged ({name} is {value}, a size that no model has): {AGAIN}"
            )
