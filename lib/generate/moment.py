"""A place in a piece from which a model can go on: kept, forked, and saved to disk.

Whatever has been read, a `Moment` has the same size: the model's state, the odds of the next token,
and where the grammar stands.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.env.errors import UserError
from lib.env.files import whole
from lib.generate.grammar import Grammar
from lib.mamba.model import MambaLM, State
from lib.music.token_names import BAR_LINE
from lib.music.tokens import Tokenizer

SEGMENT = 512  # tokens read at once: what a layer makes of them stays in a processor's cache
KEPT = 256  # last tokens remembered, for `Sampling.repetition`
FORMAT = "moment 1"


@dataclass(frozen=True)
class Moment:
    """Everything needed to go on. Playing on from one leaves it as it was, so it can be forked."""

    logits: Tensor  # of the next token, (1, V)
    state: State  # of one row
    grammar: Grammar
    recent: tuple[int, ...] = ()  # the last tokens
    seed: int | None = None  # whose dice were thrown so far
    drawn: int = 0  # how many of them: with the same seed, playing goes on as if it had never stopped

    def nbytes(self) -> int:
        """Bytes of the model's state."""
        return sum(part.nbytes for layer in self.state for part in layer)


@torch.inference_mode()
def hear(model: MambaLM, tokenizer: Tokenizer, ids, moment: Moment | None = None, *, begin: float = 0.0) -> Moment:
    """Read tokens (L,), BOS first unless they go on from `moment`, however many there are.

    They are read in segments of 512 with the parallel form of the model. With `begin` the clock then
    runs on in silence to that second.
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
    from safetensors.torch import save_file

    tensors = {"logits": moment.logits, "recent": torch.tensor(moment.recent, dtype=torch.int64)}
    for i, (window, h) in enumerate(moment.state):
        tensors |= {f"{i}.window": window, f"{i}.h": h}
    grammar = moment.grammar
    facts = {"bar": grammar.bar, "position": grammar.position, "end": grammar.end, "struck": sorted(grammar.struck),
             "seed": moment.seed, "drawn": moment.drawn}
    with whole(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part,
                  metadata={"format": FORMAT, "model": fingerprint(model), "facts": json.dumps(facts)})


def load(path: str | Path, model: MambaLM, tokenizer: Tokenizer) -> Moment:
    """Open what `save` wrote. Raises `UserError` when it is missing, damaged, or another model's."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the name")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or holds no state: save it again") from error
    if notes.get("format") != FORMAT:
        raise UserError(f"{path} holds no state of playing: give a file that --keep-state wrote")
    if notes.get("model") != fingerprint(model):
        raise UserError(f"the state in {path} belongs to another model: play it on with the one that made it")
    wanted = {"logits": (1, model.config.vocab_size), "recent": (len(tensors.get("recent", ())),)}
    for i, (window, h) in enumerate(model.new_state()):
        wanted |= {f"{i}.window": tuple(window.shape), f"{i}.h": tuple(h.shape)}
    try:
        if {name: tuple(t.shape) for name, t in tensors.items()} != wanted:
            raise ValueError("shapes")
        if not all(torch.isfinite(t).all() and (t.dtype == torch.float32 or name == "recent")
                   for name, t in tensors.items()):
            raise ValueError("numbers")
        grammar, facts = Grammar(tokenizer), json.loads(notes["facts"])
        recent = tuple(tensors["recent"].tolist())
        grammar.bar, grammar.position, grammar.end = int(facts["bar"]), int(facts["position"]), facts["end"]
        grammar.struck = {int(pitch) for pitch in facts["struck"]}
        if not (grammar.bar >= -1 and grammar.position >= -1 and grammar.end in grammar.rules.allowed
                and all(0 <= pitch < 128 for pitch in grammar.struck)
                and all(0 <= token < tokenizer.vocab_size for token in recent)):
            raise ValueError("facts")
        seed = None if facts["seed"] is None else int(facts["seed"])
        drawn = int(facts["drawn"])
        dice(seed or 0, drawn)  # raises for numbers that make no sense
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the state in {path} is damaged: save it again") from error
    state = [(tensors[f"{i}.window"], tensors[f"{i}.h"]) for i in range(model.config.n_layer)]
    return Moment(tensors["logits"], state, grammar, recent, seed, drawn)


def dice(seed: int, drawn: int = 0) -> np.random.Generator:
    """The dice of a seed after so many throws."""
    if drawn < 0:
        raise ValueError("a negative number of throws")
    return np.random.Generator(np.random.PCG64(seed).advance(drawn))
