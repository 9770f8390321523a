"""A place in a piece from which a model can go on: kept, forked, and saved to disk.

Whatever has been read, a `Moment` has the same size: the model's state, the odds of the next token,
and where the grammar stands.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lib.env.errors import UserError
from lib.env.schema import Count, parse
from lib.env.tensors import open_tensors, save_tensors
from lib.generate.grammar import Grammar
from lib.mamba.model import MambaLM, State
from lib.music.token_names import BAR_LINE
from lib.music.tokens import Tokenizer

SEGMENT = 512  # tokens read at once: what a layer makes of them stays in a processor's cache
KEPT = 256  # last tokens remembered, for `Sampling.repetition`
FORMAT = "moment 1"
AGAIN = "save it again with --keep-state"


@dataclass(frozen=True)
class Facts:
    """What a saved moment says beside its tensors."""

    bar: Annotated[int, Field(ge=-1, le=10**8)]  # six years of music
    position: Annotated[int, Field(ge=-1, le=10**4)]  # in the bar
    end: str  # what the last token ends with, a key of `lib.generate.grammar.FOLLOWS`
    struck: Annotated[list[Annotated[int, Field(ge=0, le=127)]], Field(max_length=128)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None
    drawn: Count


@dataclass(frozen=True)
class Moment:
    """Everything needed to go on. Playing on from one leaves it as it was, so it can be forked."""

    logits: Tensor  # of the next token, (1, V)
    state: State  # of one row
    grammar: Grammar
    recent: tuple[int, ...] = ()  # the last tokens
    seed: int | None = None  # whose dice were thrown so far
    # how many dice were thrown: with the same seed, playing goes on as if it had never stopped
    drawn: int = 0

    def nbytes(self) -> int:
        """Bytes of the model's state."""
        return sum(part.nbytes for layer in self.state for part in layer)


@torch.inference_mode()
def hear(
    model: MambaLM, tokenizer: Tokenizer, ids, moment: Moment | None = None, *, begin: float = 0.0
) -> Moment:
    """Read tokens (L,), BOS first unless they go on from `moment`, however many there are.

    They are read in segments of 512 with the parallel form of the model.
    With `begin` the clock then runs on in silence to that second.
    """
    grammar = moment.grammar.copy() if moment else Grammar(tokenizer)
    ids = [int(t) for t in ids]
    for token in ids:
        grammar.read(token)
    ids += grammar.wait(begin, tokenizer.base[BAR_LINE]) if begin else []
    if not ids:
        if moment is None:
            raise UserError("there is no token to read: begin a piece with the token BOS")
        return replace(moment, grammar=grammar)
    logits, state = None, moment.state if moment else None
    for segment in torch.tensor([ids], device=model.device).split(SEGMENT, 1):
        logits, state = model.prefill(segment, state)
    recent = ((moment.recent if moment else ()) + tuple(ids))[-KEPT:]
    return Moment(logits.float(), state, grammar, recent)


def fingerprint(model: MambaLM) -> str:
    """A hash of a model's weights: a state means something to one model only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(moment: Moment, model: MambaLM, path: str | Path) -> None:
    """Write a moment as one safetensors file, whole or not at all."""
    tensors = {"logits": moment.logits, "recent": torch.tensor(moment.recent, dtype=torch.int64)}
    for i, (window, h) in enumerate(moment.state):
        tensors |= {f"{i}.window": window, f"{i}.h": h}
    grammar = moment.grammar
    facts = Facts(
        grammar.bar,
        grammar.position,
        grammar.end,
        sorted(grammar.struck),
        moment.seed,
        moment.drawn,
    )
    save_tensors(
        tensors,
        path,
        {"format": FORMAT, "model": fingerprint(model), "facts": json.dumps(asdict(facts))},
    )


def load(path: str | Path, model: MambaLM, tokenizer: Tokenizer) -> Moment:
    """Open what `save` wrote.

    Raises `UserError` when it is missing, damaged, or another model's.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"there is no file {path}: check the name")
    with open_tensors(path, do=AGAIN, device=str(model.device)) as file:
        notes = file.metadata() or {}
        if notes.get("format") != FORMAT:
            raise UserError(
                f"{path} holds no state of playing: give a file that --keep-state wrote"
            )
        if notes.get("model") != fingerprint(model):
            raise UserError(
                f"the state in {path} belongs to another model: "
                "play it on with the one that made it"
            )
        _check_shapes({name: file.get_slice(name) for name in file.keys()}, model, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    facts = parse(notes.get("facts", ""), Facts, where=str(path), do=AGAIN)
    grammar, recent = Grammar(tokenizer), tensors["recent"].tolist()
    for sound, what in (
        (all(t.isfinite().all() for t in tensors.values()), "a number in it is none"),
        (all(0 <= token < tokenizer.vocab_size for token in recent), "its last tokens are none"),
        (
            facts.end in grammar.rules.allowed,
            f"end is {facts.end[:40]!r}, which no token ends with",
        ),
    ):
        if not sound:
            raise UserError(f"{path} is damaged ({what}): {AGAIN}")
    grammar.bar, grammar.position, grammar.end = facts.bar, facts.position, facts.end
    grammar.struck = frozenset(facts.struck)
    state = [(tensors[f"{i}.window"], tensors[f"{i}.h"]) for i in range(model.config.n_layer)]
    return Moment(tensors["logits"], state, grammar, tuple(recent), facts.seed, facts.drawn)


def _check_shapes(found: dict, model: MambaLM, path: Path) -> None:
    """Raise `UserError` unless the tensors of a file are those of a moment.

    `found` are slices, yet to be read.
    """
    wanted = {"logits": ((1, model.config.vocab_size), "F32"), "recent": (None, "I64")}
    for i, (window, h) in enumerate(model.new_state()):
        wanted |= {f"{i}.window": (tuple(window.shape), "F32"), f"{i}.h": (tuple(h.shape), "F32")}
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            raise UserError(f"{path} is damaged ({name} is missing): {AGAIN}")
        if name not in wanted:
            raise UserError(f"{path} is damaged ({name[:80]} is no part of a state): {AGAIN}")
        shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
        fits = (
            len(shape) == 1 and shape[0] <= KEPT if name == "recent" else shape == wanted[name][0]
        )
        if not fits or dtype != wanted[name][1]:
            raise UserError(
                f"{path} is damaged ({name} has shape {shape} and type {dtype}): {AGAIN}"
            )


def dice(seed: int, drawn: int = 0) -> np.random.Generator:
    """The dice of a seed after so many throws."""
    return np.random.Generator(np.random.PCG64(seed).advance(drawn))
