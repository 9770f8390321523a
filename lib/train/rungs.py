"""Three rungs for a new model to climb before anyone trusts it: `python -m lib.lab.bench rungs`.

They are the three experiments of the original work, made into a test. A model that cannot learn
the sequence 0 … 1999 by heart has a bug, and so has one that cannot learn one piece. Only then
MAESTRO.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib.music.streams import Piece, Streams
from lib.train.config import TrainConfig
from lib.train.trainer import Trainer

NEAR_ZERO = 0.02  # bits a token
HEART = TrainConfig(
    d_model=64,
    n_layer=2,
    batch=4,
    length=250,
    carry=8,
    steps=1500,
    minutes=30.0,
    lr=1e-2,
    weight_decay=0.0,
    eval_every=10**9,
    save_every=10**9,
)


@dataclass(frozen=True)
class Rung:
    """What came of one rung."""

    name: str
    passed: bool
    loss: float  # bits a token at the end (rung 3: bits a note on validation pieces)
    steps: int
    said: str


def by_heart(ids: np.ndarray, vocab_size: int) -> Streams:
    """One sequence (L,) as the whole data set, for training and for validation."""
    ids = np.asarray(ids, np.uint16)
    piece = Piece("one", "", "one sequence", "train", 0, 0, len(ids), len(ids), 1.0)
    return Streams(ids, [piece], vocab_size, int(ids[0]), {"id": f"by heart {len(ids)}"})


def memorise(
    streams: Streams,
    folder: Path,
    config: TrainConfig = HEART,
    *,
    build: Callable[[], nn.Module] | None = None,
    watch: Callable[[Trainer], None] | None = None,
    device: str | None = None,
) -> Trainer:
    """Train until the loss is near zero and each token is the likeliest, or to `config`'s end."""
    ids = torch.from_numpy(np.asarray(streams.tokens, np.int64))[None]

    def stop_when_known(trainer):
        last = trainer.losses[-10:]
        if trainer.step % 5 == 0 and len(last) == 10 and float(np.mean(last)) < NEAR_ZERO:
            trainer.stop_asked = _known(trainer.model, ids.to(trainer.device))
        if watch:
            watch(trainer)

    # a piece shorter than a crop would be mostly padding
    config = replace(config, length=min(config.length, len(streams.tokens) - 1))
    quiet, keep_none = (lambda text: None), (lambda model, folder: None)
    trainer = Trainer(
        streams, config, folder, device=device, build=build, save=keep_none, say=quiet
    )
    trainer.run(progress=False, watch=stop_when_known)
    return trainer


@torch.inference_mode()
def _known(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether each token of (1, L) is the likeliest after those before it: it can be recited."""
    likeliest = model.eval()(ids[:, :-1]).argmax(-1)
    return bool((likeliest == ids[:, 1:]).all())


@torch.inference_mode()
def recite(model: nn.Module, first: int, count: int) -> np.ndarray:
    """The likeliest continuation of one token: `count` tokens, the first included, int64."""
    model.eval()
    state = model.new_state(1)
    tokens = [first]
    for _ in range(count - 1):
        token = torch.tensor([tokens[-1]], device=model.device)
        logits, state = model.step(token, state)
        tokens.append(int(logits.argmax(-1)))
    return np.array(tokens)


def climb(name: str, ids: np.ndarray, vocab_size: int, folder: Path, **options) -> Rung:
    """One of the two rungs that are learnt by heart: loss near zero, the sequence played back."""
    trainer = memorise(by_heart(ids, vocab_size), folder, **options)
    loss = float(np.mean(trainer.losses[-10:]))
    right = recite(trainer.model, int(ids[0]), len(ids)) == ids
    passed = bool(loss < NEAR_ZERO and right.all())
    said = (
        f"{loss:.3f} bits a token after {trainer.step} steps, "
        f"{right.sum():,} of {len(ids):,} tokens right"
    )
    return Rung(name, passed, loss, trainer.step, said)
