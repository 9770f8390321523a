"""Part (e): the original's recipe at our size, and what each repair is worth alone.

Theirs: 20,000 byte-pair tokens learnt on all files, overlapping chunks split at random, no augmentation,
batch 1, a rate of 1e-4 cut tenfold every three epochs, a repetition penalty of 0.9. Each arm repairs one
of these; the last repairs all. What is compared is bits per note of whole performances of the official
validation split that no arm has seen or selected on. The penalty acts on sampling: an arm that has it is
judged by the distribution that it would draw from.

Not theirs: our size, the 10 ms grid and pedal-extended notes of the other parts (so that bits compare),
part of the train split.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from lib.env.schema import Number
from lib.lab.experiments.runs import Spec, best_model
from lib.lab.experiments.tokens import drawn
from lib.lab.rivals.windows import model_bits
from lib.music.streams import Piece, Streams
from lib.train.bits import interval


@dataclass(frozen=True)
class Recipe:
    """What is repaired."""

    vocabulary: bool = False  # fewer merges
    merges: bool = False  # learnt on the train split alone
    split: bool = False  # whole performances, the official split
    augmentation: bool = False  # transposed, stretched, louder and softer copies
    schedule: bool = False  # a higher rate with warm-up and cosine
    penalty: bool = False  # none


REPAIRS = tuple(field.name for field in fields(Recipe))
ARMS = {"original": Recipe(), **{name: Recipe(**{name: True}) for name in REPAIRS},
        "all repaired": Recipe(**dict.fromkeys(REPAIRS, True))}


def run(lab) -> dict:
    """One row an arm, written as they come."""
    result = {"arms": []}
    for recipe in ARMS.values():  # build the streams one by one: arms share some
        lab.left()
        data(lab, recipe)
    lab.all(trained, dict.fromkeys(map(twin, ARMS)))
    for (name, recipe), (outcome, kept) in zip(ARMS.items(), lab.all(measured_arm, ARMS), strict=True):
        streams, measured = data(lab, recipe)
        notes = np.array([p.notes for p in measured])
        bits = np.array(kept["bits"])
        result["arms"].append({
            "arm": name, "vocabulary": streams.vocab_size, "parameters": outcome["parameters"], "tokens": outcome["tokens"],
            "best_step": outcome["best_step"], "steps": outcome["steps"],
            "own_validation": outcome["validation_bits_per_note"], "pieces": len(notes), "bits": kept["bits"],
            "bits_per_note": float(bits.sum() / notes.sum()), "interval_95": interval(bits, notes),
            "without_penalty": float(sum(kept["plain"]) / notes.sum())})
        first = np.array(result["arms"][0]["bits"])
        gain = first - bits
        result["arms"][-1]["gain"] = {"bits_per_note": float(gain.sum() / notes.sum()), "interval_95": interval(gain, notes)}
    lab.write("original", result)
    return result


def twin(name: str) -> str:
    """The arm whose training an arm shares: the penalty changes none."""
    recipe = replace(ARMS[name], penalty=False)
    return next(key for key, other in ARMS.items() if replace(other, penalty=False) == recipe)


def trained(lab, name: str) -> dict:
    """The outcome of an arm's training."""
    streams, _ = data(lab, ARMS[name])
    return lab.train(spec(lab, name, ARMS[name], streams), streams)


def measured_arm(lab, name: str) -> tuple[dict, dict]:
    """(outcome, bits of the measured pieces) of an arm whose training has ended."""
    recipe = ARMS[name]
    streams, measured = data(lab, recipe)
    one = spec(lab, twin(name), recipe, streams)
    return lab.train(one, streams), bits_of(lab, name, one, recipe, streams, measured)


def spec(lab, name: str, recipe: Recipe, streams: Streams) -> Spec:
    """The training run of an arm: so many passes over its own training tokens."""
    chosen, size = lab.protocol.original, lab.protocol.size
    copies = 1 + 2 * recipe.augmentation  # as many passes over each performance, its copies counted
    tokens = sum(p.length - 1 for p in streams.select("train", copies=True)) / copies
    epoch = max(1, round(tokens / chosen.length))  # steps: batch 1
    config = replace(lab.protocol.config, batch=1, length=chosen.length, carry=1, transpose=0, louder=0, weight_decay=0.0,
                     dropout=0.0, lr=chosen.lr, steps=chosen.epochs * epoch, eval_every=max(1, epoch))
    if recipe.schedule:
        config = replace(config, lr=chosen.repaired_lr)
    return Spec(f"original/{name.replace(' ', '-')}", "mamba", replace(size, dropout=0.0), config,
                cut_every=0 if recipe.schedule else 3 * epoch)


def data(lab, recipe: Recipe):
    """(Streams, pieces to measure on) of an arm.

    In the streams "validation" is what the arm selects on: a fifth of the chunks, or half of the official
    validation pieces; the other half is measured on, always.
    """
    chosen = lab.protocol.original
    vocabulary = chosen.repaired_vocabulary if recipe.vocabulary else chosen.vocabulary
    tokenizer, copies = None, 2 * recipe.augmentation
    if vocabulary is not None and not recipe.merges:
        tokenizer = learnt_on_all(lab, vocabulary)
    streams, tokenizer = lab.streams(lab.protocol.grid_ms, vocabulary, copies, tokenizer)
    names = sorted({p.name for p in streams.select("train")})
    names = set(np.random.default_rng(0).permutation(names)[: chosen.pieces].tolist())
    own, measured = halves(streams.select("validation"))
    measured = drawn(measured, chosen.measured)
    pool = [p for p in streams.pieces if p.split == "train" and p.name in names]
    if not recipe.split:
        bar = round(sum(p.length for p in pool) / max(1, sum(
            int(tokenizer.bars_of[streams.stream(p)].sum()) for p in pool)))  # tokens
        pool, own = chunks(streams, tokenizer, pool, chosen.length, overlap=min(bar, chosen.length // 2)), []
    arm = "-".join(f"{name}{getattr(recipe, name):d}" for name in REPAIRS if name != "penalty")
    settings = streams.settings | {"id": f"{streams.settings['id']}-{arm}"}
    return replace(streams, pieces=[*pool, *own], settings=settings), measured


def learnt_on_all(lab, vocabulary: int):
    """A tokenizer whose merges are learnt on all files, the test split's too: their mistake."""
    from lib.music.tokens import TokenConfig, Tokenizer

    folder = lab.cache / f"merges-{lab.base.settings['id']}-{vocabulary}"
    if not (folder / "tokens.json").exists():
        tokenizer = Tokenizer(TokenConfig(lab.protocol.grid_ms, "extend", vocabulary))
        tokenizer.learn([lab.base.stream(p)[1:-1] for p in lab.base.pieces])
        tokenizer.save(folder)
    return Tokenizer.load(folder)


def halves(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Two halves of a split, drawn once; where there is one piece, it is both."""
    order = np.random.default_rng(3).permutation(len(pieces))
    first, second = ([pieces[i] for i in sorted(half)] for half in np.array_split(order, 2))
    return first or second, second or first


def chunks(streams: Streams, tokenizer, pieces: list[Piece], length: int, overlap: int) -> list[Piece]:
    """Overlapping chunks of all pieces, a fifth of them "validation" at random: the same music on both sides.

    A copy's chunk goes where that of the performance itself went; validation has no copies.
    """
    out = []
    for number, name in enumerate(dict.fromkeys(p.name for p in pieces)):
        rng = np.random.default_rng([1, number])
        most = max(p.length for p in pieces if p.name == name)
        held_out = rng.random(most) < 0.2  # by the number of the chunk
        for piece in (p for p in pieces if p.name == name):
            for chunk, begin in enumerate(range(0, max(1, piece.length - length), length - overlap)):
                if held_out[chunk] and piece.copy:
                    continue
                ids = streams.tokens[piece.offset + begin : piece.offset + min(piece.length, begin + length + 1)]
                notes = int(tokenizer.notes_of[ids[1:]].sum())
                if notes:
                    out.append(replace(piece, offset=piece.offset + begin, length=len(ids), notes=notes,
                                       split="validation" if held_out[chunk] else "train"))
    return out


def bits_of(lab, name: str, one: Spec, recipe: Recipe, streams: Streams, measured: list[Piece]) -> dict:
    """Bits of each measured piece, as the arm would draw and without its penalty; kept."""
    def work():
        model = best_model(lab.place(one.name), lab.device)
        plain = model_bits(model, streams, measured).tolist()
        if recipe.penalty:
            return {"bits": plain, "plain": plain}
        return {"bits": penalised_bits(model, streams, measured, lab.protocol.original.penalty).tolist(), "plain": plain}
    return lab.once(f"original-{name.replace(' ', '-')}", work, dict[str, list[Number]])


@torch.inference_mode()
def penalised_bits(model, streams: Streams, pieces: list[Piece], penalty: float, segment: int = 256) -> np.ndarray:
    """Bits of whole pieces under a repetition penalty (Keskar et al. 2019), float64 (pieces,).

    The logits of tokens that the piece has had already are divided by the penalty where positive and
    multiplied by it where negative: above 1 they lose, below 1 they gain.
    """
    bits = np.zeros(len(pieces))
    for number, piece in enumerate(pieces):
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64)).to(model.device)
        seen = torch.zeros(streams.vocab_size, dtype=torch.bool, device=model.device)
        state = None
        for begin in range(0, piece.length - 1, segment):
            part = ids[begin : begin + segment + 1]
            logits, state = model(part[None, :-1], state, return_state=True)
            had = F.one_hot(part[:-1], streams.vocab_size).cumsum(0).bool() | seen  # up to and with the input
            seen, logits = had[-1], logits[0].float()
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            bits[number] += F.cross_entropy(torch.where(had, changed, logits), part[1:], reduction="sum").item() / math.log(2)
    return bits


def table(result: dict) -> str:
    """What each repair is worth, in Markdown."""
    lines = ["| repaired | bits a note (95 %) | worth (95 %) | on its own validation | vocabulary |", "|---|---|---|---|---|"]
    for arm in result["arms"]:
        low, high = arm["interval_95"]
        gain = arm["gain"]
        worth = "" if arm["arm"] == "original" else (f"{gain['bits_per_note']:+.2f} ({gain['interval_95'][0]:+.2f} to "
                                                     f"{gain['interval_95'][1]:+.2f})")
        lines.append(f"| {'nothing' if arm['arm'] == 'original' else arm['arm']} | {arm['bits_per_note']:.2f} ({low:.2f} to "
                     f"{high:.2f}) | {worth} | {arm['own_validation']:.2f} | {arm['vocabulary']:,} |")
    return "\n".join(lines)
