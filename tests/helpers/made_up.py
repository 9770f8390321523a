"""Made-up token streams, tiny runs and archives for the tests."""

import io
import tarfile

import numpy as np

from lib.lab.bench.interruptions import store
from lib.music.streams import Piece, Streams
from lib.train.config import TrainConfig

__all__ = ["TINY", "make_streams", "quiet", "sdist", "store"]

TINY = TrainConfig(
    d_model=16,
    n_layer=1,
    d_state=4,
    batch=3,
    length=20,
    steps=12,
    minutes=100,
    lr=1e-2,
    eval_every=6,
    eval_tokens=200,
    save_every=4,
    precision="fp32",
)


def make_streams(
    vocab=11, lengths=(70, 41, 20, 90), splits=("train", "train", "validation", "test")
):
    """Made-up streams: token 1 begins a piece, 2 ends it, the rest counts upwards and around."""
    pieces, arrays, offset = [], [], 0
    for i, (length, split) in enumerate(zip(lengths, splits)):
        body = 3 + (np.arange(length - 2) + 5 * i) % (vocab - 3)
        arrays.append(np.concatenate([[1], body, [2]]).astype(np.uint16))
        pieces.append(
            Piece(f"piece{i}", "composer", f"title{i}", split, 0, offset, length, length // 3, 10.0)
        )
        offset += length
    return Streams(np.concatenate(arrays), pieces, vocab, 1, {"id": "made-up"})


def quiet(*args, **kwargs):
    pass


def sdist(content: bytes, file: str):
    """A stand-in for `pip_download` that brings an archive of mamba-ssm with this one file."""

    def bring(requirement, work, what, **options):
        with tarfile.open(work / "mamba_ssm-2.3.2.post1.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo(f"mamba_ssm-2.3.2.post1/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    return bring
