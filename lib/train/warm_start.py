"""The model that a run begins with: fresh, or warm, with the weights of another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import sha256_of
from lib.env.schema import read_json
from lib.mamba.config_schema import WEIGHTS
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.streams import Streams
from lib.music.tokens import BPE_MODEL, SETTINGS
from lib.music.tokens_schema import AGAIN
from lib.train import checkpoints
from lib.train.config import TrainConfig

TOKENIZER_FILES = (BPE_MODEL, SETTINGS)


def sizes_of(streams: Streams, config: TrainConfig) -> MambaConfig:
    """The Mamba that these choices ask for."""
    return MambaConfig(
        streams.vocab_size, config.d_model, config.n_layer, config.d_state, dropout=config.dropout
    )


def warm_start(folder: str | Path, streams: Streams, config: TrainConfig) -> tuple[MambaLM, dict]:
    """The weights in a checkpoint folder, deepened to the run's layers, and what is known of them.

    Raises `UserError` where their sizes or their tokens are not the run's.
    """
    model = mamba.load(folder)
    history = checkpoints.history(Path(folder)) | {"n_layer": model.config.n_layer}
    history["weights"] = sha256_of(Path(folder) / WEIGHTS)
    _check_sizes(folder, model.config, sizes_of(streams, config))
    _check_tokens(folder, streams)
    model = mamba.deepen(model, config.n_layer)
    for layer in model.backbone.layers:
        layer.dropout.p = config.dropout
    return model, history


def _check_sizes(folder: str | Path, has: MambaConfig, wanted: MambaConfig) -> None:
    """Only layers may be fewer than the run wants."""
    if has.n_layer < wanted.n_layer:
        has = replace(has, n_layer=wanted.n_layer)
    for name in ("vocab_size", "d_model", "n_layer", "d_state"):
        theirs = getattr(has, name)
        ours = getattr(wanted, name)
        if theirs != ours:
            raise UserError(
                f"the weights in {folder} have {name}={theirs}, the run {name}={ours}: start from "
                "a checkpoint of the same sizes and tokens, or of fewer layers"
            )


def _check_tokens(folder: str | Path, streams: Streams) -> None:
    """Where both have a tokenizer, it is the same.

    The versions of the libraries that wrote it down may differ.
    """
    if streams.folder is None:
        return
    for name in TOKENIZER_FILES:
        ours = Path(streams.folder) / name
        theirs = Path(folder) / name
        if ours.exists() and theirs.exists() and _content(ours) != _content(theirs):
            raise UserError(
                f"the weights in {folder} speak other tokens than these streams "
                f"({name} differs): build the streams with that tokenizer's settings"
            )


def _content(path: Path) -> dict[str, Any]:
    """What a file of a tokenizer says, without the versions that wrote it.

    Raises `UserError` where it is damaged.
    """
    found = read_json(path, dict[str, Any], do=AGAIN)
    if path.name == SETTINGS:
        return {"kind": "REMI"} | found  # files of before knew no other language
    return {key: value for key, value in found.items() if not key.endswith("_version")}
