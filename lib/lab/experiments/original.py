"""Part (e): the original's recipe in small, what each repair is worth alone,
and what is lost without it.

Theirs: 20,000 byte-pair tokens learnt on all files, overlapping chunks split at random, no
augmentation, no regularisation, a rate that is cut tenfold after each third, a repetition penalty
of 0.9. Each arm is trained on a few performances, read many times, until it has learnt them by
heart; each is stopped where its own validation liked it best, as its author would have. What is
compared is bits per note of whole performances of the official validation split that no arm has
seen or selected on. The penalty acts on sampling: an arm that has it is judged by the distribution
that it would draw from.

Not theirs: our size and number of steps, and a rate that suits them;
the 10 ms grid and pedal-extended notes of the other parts, so that bits compare.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.env.schema import Number
from lib.lab.experiments.intervals import difference, interval, mean_bits, show_difference, within
from lib.lab.experiments.runs import Spec, best_model
from lib.lab.rivals.windows import model_bits
from lib.music.encode import Augmentation, build
from lib.music.streams import Piece, Streams
from lib.train.bits import counting_baselines


@dataclass(frozen=True)
class Recipe:
    """What is repaired."""

    vocabulary: bool = False  # fewer merges
    merges: bool = False  # learnt on the train split alone
    split: bool = False  # the official one, of whole performances, which rows read on in
    augmentation: bool = False  # transposed, stretched, louder and softer copies
    regularisation: bool = False  # dropout and weight decay
    schedule: bool = False  # warm-up and cosine
    penalty: bool = False  # none


REPAIRS = tuple(field.name for field in fields(Recipe))
ALL = Recipe(**dict.fromkeys(REPAIRS, True))
NOTHING, EVERYTHING = "nothing", "everything"
ARMS = {
    NOTHING: Recipe(),
    **{name: Recipe(**{name: True}) for name in REPAIRS},
    EVERYTHING: ALL,
    **{f"all but {name}": replace(ALL, **{name: False}) for name in REPAIRS},
}


def run(lab) -> dict:
    """One row an arm, written when all have ended."""
    items = [(name, seed) for seed in lab.protocol.original.seeds for name in ARMS]
    found = dict(zip(items, lab.all(measured, items), strict=True))
    _, pieces = data(lab, Recipe())
    notes = np.array([piece.notes for piece in pieces])
    rows = []
    for name in ARMS:
        outcomes = [found[name, seed] for seed in lab.protocol.original.seeds]
        bits, plain = (np.array([one[key] for one in outcomes]) for key in ("bits", "plain"))
        rows.append(
            {
                "arm": name,
                **{
                    key: outcomes[0][key]
                    for key in ("vocabulary", "tokens_a_note", "parameters", "steps", "counting")
                },
                "bits": bits.round(3).tolist(),
                "bits_per_note": mean_bits(bits, notes),
                "without_penalty": mean_bits(plain, notes),
                "curves": [one["curve"] for one in outcomes],
            }
        )
    compare(rows, notes)
    train, _ = chosen_performances(lab)
    result = {
        "trained_on": [p.path.name for p in train],
        "pieces": [p.name for p in pieces],
        "notes": notes.tolist(),
        "arms": rows,
    }
    lab.write("original", result)
    return result


def compare(rows: list[dict], notes: np.ndarray) -> None:
    """Put into each row what its repairs gain, and what is lost without the one that it lacks."""
    bits = {row["arm"]: np.array(row["bits"]) for row in rows}

    def minus(first: str, second: str) -> dict:
        if trained_as(first) == trained_as(second):  # the penalty changes no training
            return within(bits[first] - bits[second], notes)
        return difference(bits[first], bits[second], notes)

    for row in rows:
        row["interval_95"] = interval(bits[row["arm"]], notes)
        row["gain"] = minus(NOTHING, row["arm"])
        row["lost"] = minus(row["arm"], EVERYTHING)


def measured(lab, item: tuple[str, int]) -> dict:
    """What an arm came to with one seed: its curves, and the bits of each held-out piece."""
    name, seed = item
    recipe = ARMS[name]
    streams, judge = data(lab, recipe)
    rate = streams.tokens_a_note(copies=True)
    one = spec(lab, trained_as(name), recipe, streams, seed)
    outcome = lab.train(one, streams, judge)
    each = steps_a_pass(lab, streams)
    curve = [
        {
            "pass": row["step"] / each,
            "train": row["train_bits_per_token"] * rate,
            "own_validation": row["validation_bits_per_note"],
            "held_out": bits,
        }
        for row, bits in zip(outcome["log"], outcome["judged"], strict=True)
    ]
    return {
        "vocabulary": streams.vocab_size,
        "tokens_a_note": rate,
        "parameters": outcome["parameters"],
        "steps": outcome["steps"],
        "counting": counting_baselines(streams, judge),
        "curve": curve,
        **bits_of(lab, f"{name}-seed{seed}", one, recipe, streams, judge),
    }


def trained_as(name: str) -> str:
    """The arm whose training an arm shares: the penalty changes none."""
    recipe = replace(ARMS[name], penalty=False)
    return next(key for key, other in ARMS.items() if replace(other, penalty=False) == recipe)


def spec(lab, name: str, recipe: Recipe, streams: Streams, seed: int) -> Spec:
    """The training run of an arm: so many passes over the notes of its performances."""
    chosen = lab.protocol.original
    each = steps_a_pass(lab, streams)
    share = chosen.dropout if recipe.regularisation else 0.0
    config = replace(
        lab.protocol.config,
        batch=chosen.batch,
        length=chosen.length,
        carry=chosen.carry if recipe.split else 1,
        transpose=0,
        louder=0,
        dropout=share,
        weight_decay=share,
        lr=chosen.lr,
        steps=each * chosen.passes,
        eval_every=each * chosen.every,
        save_every=each * chosen.every,
        seed=seed,
    )
    cut_every = 0 if recipe.schedule else math.ceil(config.steps / 3)
    folder = f"original/{name.replace(' ', '-')}-seed{seed}"
    return Spec(folder, "mamba", replace(chosen.size, dropout=share), config, cut_every=cut_every)


def steps_a_pass(lab, streams: Streams) -> int:
    """Steps that read as many notes as the performances have."""
    chosen = lab.protocol.original
    tokens = streams.settings["notes"] * streams.tokens_a_note(copies=True)
    return max(1, round(tokens / (chosen.batch * chosen.length)))


# ---- the data of an arm ----------------------------------------------------------------------


def data(lab, recipe: Recipe) -> tuple[Streams, list[Piece]]:
    """(Streams, pieces to measure on) of an arm.

    In the streams "validation" is what the arm selects on: a fifth of its chunks,
    or performances of the official validation split. Those that all are measured on are "test".
    """
    chosen = lab.protocol.original
    copies = chosen.copies if recipe.augmentation else 0
    base, tokenizer = base_streams(lab, copies)
    vocabulary = chosen.repaired_vocabulary if recipe.vocabulary else chosen.vocabulary
    if vocabulary is not None:
        tokenizer = learnt(lab, vocabulary, "train" if recipe.merges else "all")
    notes = sum(piece.notes for piece in base.select("train"))
    name = f"{base.settings['id']}-{vocabulary}-{recipe.merges}-{recipe.split}"
    streams = merged(base, tokenizer, {"id": name, "notes": notes})
    test = streams.select("test")
    if not recipe.split:
        train = streams.select("train", copies=True)
        bars = sum(int(tokenizer.bars_of[streams.stream(piece)].sum()) for piece in train)
        bar = round(sum(piece.length for piece in train) / max(1, bars))  # tokens
        parts = chunks(
            streams, tokenizer, train, chosen.length, overlap=min(bar, chosen.length // 2)
        )
        streams = replace(streams, pieces=[*parts, *test])
    return streams, test


def chosen_performances(lab) -> tuple[list, list]:
    """Performances to train on, and those to select and to be measured on, alternating;
    no title is on two sides.
    """
    chosen = lab.protocol.original
    shortest, longest = chosen.seconds
    rng = np.random.default_rng(0)
    sides = []
    taken: set[tuple[str, str]] = set()
    for split, count in (("train", chosen.pieces), ("validation", 2 * chosen.measured)):
        fit = [p for p in lab.found if p.split == split and shortest <= p.seconds <= longest]
        order = [fit[i] for i in rng.permutation(len(fit))]
        side = []
        for performance in order:
            title = performance.composer, performance.title
            if len(side) < count and title not in taken:
                side.append(performance)
                taken.add(title)
        if len(side) < count:
            raise UserError(
                f"only {len(side)} {split} performances of {shortest:g} to {longest:g} seconds "
                f"are here, and {count} are needed: name the whole of MAESTRO in MAESTRO_DIR"
            )
        sides.append(side)
    return sides[0], sides[1]


def base_streams(lab, copies: int):
    """(Streams, Tokenizer) of the chosen performances in base tokens;
    those to be measured on are "test".
    """
    from lib.music.tokens import TokenConfig

    train, others = chosen_performances(lab)
    held_out = [replace(p, split="test") for p in others[::2]]
    config = TokenConfig(lab.protocol.grid_ms, "extend", None)
    return build(
        [*train, *held_out, *others[1::2]],
        config,
        Augmentation(copies=copies),
        folder=lab.cache,
        workers=1,
        progress=False,
        say=lab.say,
    )


def learnt(lab, vocabulary: int, where: str):
    """A tokenizer whose merges are learnt on train performances, or on "all":
    the held-out ones too, their mistake.
    """
    from lib.music.tokens import TokenConfig, Tokenizer

    chosen = lab.protocol.original
    train, held_out = chosen_performances(lab)
    base, _ = base_streams(lab, 0)
    folder = lab.cache / f"merges-{base.settings['id']}-{chosen.merged}-{vocabulary}-{where}"
    if not (folder / "tokens.json").exists():
        names = sorted(piece.name for piece in lab.base.select("train"))
        names = set(np.random.default_rng(2).permutation(names)[: chosen.merged].tolist())
        names |= {p.path.name for p in (train if where == "train" else [*train, *held_out])}
        tokenizer = Tokenizer(TokenConfig(lab.protocol.grid_ms, "extend", vocabulary))
        pieces = [piece for piece in lab.base.pieces if piece.name in names]
        tokenizer.learn([lab.base.stream(piece)[1:-1] for piece in pieces])
        tokenizer.save(folder)
    return Tokenizer.load(folder)


def merged(base: Streams, tokenizer, settings: dict) -> Streams:
    """The same pieces in a tokenizer's merged tokens, in memory."""
    pieces = []
    arrays = []
    offset = 0
    for piece in base.pieces:
        inside = tokenizer.merge(base.stream(piece)[1:-1])
        ids = np.concatenate([[tokenizer.bos], inside, [tokenizer.eos]]).astype(np.uint16)
        pieces.append(replace(piece, offset=offset, length=len(ids)))
        arrays.append(ids)
        offset += len(ids)
    return Streams(
        np.concatenate(arrays), pieces, tokenizer.vocab_size, int(tokenizer.bos), settings
    )


def chunks(
    streams: Streams, tokenizer, pieces: list[Piece], length: int, overlap: int
) -> list[Piece]:
    """Overlapping chunks of all pieces, a fifth of them "validation" at random:
    the same music on both sides.

    A copy's chunk goes where that of the performance itself went; validation has no copies.
    """
    out = []
    for number, name in enumerate(dict.fromkeys(piece.name for piece in pieces)):
        copies = [piece for piece in pieces if piece.name == name]
        rng = np.random.default_rng([1, number])
        longest = max(piece.length for piece in copies)
        held_out = rng.random(longest) < 0.2  # by the number of the chunk
        for piece in copies:
            begins = range(0, max(1, piece.length - length), length - overlap)
            for chunk, begin in enumerate(begins):
                if held_out[chunk] and piece.copy:
                    continue
                end = min(piece.length, begin + length + 1)
                ids = streams.tokens[piece.offset + begin : piece.offset + end]
                notes = int(tokenizer.notes_of[ids[1:]].sum())
                split = "validation" if held_out[chunk] else "train"
                if notes:
                    out.append(
                        replace(
                            piece,
                            offset=piece.offset + begin,
                            length=len(ids),
                            notes=notes,
                            split=split,
                        )
                    )
    return out


# ---- what it is measured by ------------------------------------------------------------------


def bits_of(
    lab, name: str, one: Spec, recipe: Recipe, streams: Streams, pieces: list[Piece]
) -> dict:
    """Bits of each measured piece, as the arm would draw and without its penalty; kept."""

    def work():
        model = best_model(lab.place(one.name), lab.device)
        plain = model_bits(model, streams, pieces).tolist()
        if recipe.penalty:
            return {"bits": plain, "plain": plain}
        bits = penalised_bits(model, streams, pieces, lab.protocol.original.penalty)
        return {"bits": bits.tolist(), "plain": plain}

    return lab.once(f"original-{name.replace(' ', '-')}", work, dict[str, list[Number]])


@torch.inference_mode()
def penalised_bits(
    model, streams: Streams, pieces: list[Piece], penalty: float, segment: int = 256
) -> np.ndarray:
    """Bits of whole pieces under a repetition penalty (Keskar et al. 2019), float64 (pieces,).

    The logits of tokens that the piece has had already are divided by the penalty where positive
    and multiplied by it where negative: above 1 they lose, below 1 they gain.
    """
    bits = np.zeros(len(pieces))
    for number, piece in enumerate(pieces):
        ids = torch.from_numpy(streams.stream(piece).astype(np.int64)).to(model.device)
        seen = torch.zeros(streams.vocab_size, dtype=torch.bool, device=model.device)
        state = None
        for begin in range(0, piece.length - 1, segment):
            part = ids[begin : begin + segment + 1]
            logits, state = model(part[None, :-1], state, return_state=True)
            # up to and with the input
            had = F.one_hot(part[:-1], streams.vocab_size).cumsum(0).bool() | seen
            seen = had[-1]
            logits = logits[0].float()
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            nats = F.cross_entropy(torch.where(had, changed, logits), part[1:], reduction="sum")
            bits[number] += nats.item() / math.log(2)
    return bits


def table(result: dict) -> str:
    """What each repair is worth alone, and what is lost without it, in Markdown."""
    arms = {arm["arm"]: arm for arm in result["arms"]}
    lines = [
        "| repair | alone, bits a note | it gains (95 %) | all but this, bits a note "
        "| it was worth (95 %) |",
        "|---|---|---|---|---|",
    ]
    for name in (NOTHING, *REPAIRS, EVERYTHING):
        alone = arms[name]
        without = arms.get(f"all but {name}")
        gains = "" if name == NOTHING else show_difference(alone["gain"])
        rest = (
            " | "
            if without is None
            else f"{without['bits_per_note']:.2f} | {show_difference(without['lost'])}"
        )
        lines.append(f"| {name} | {alone['bits_per_note']:.2f} | {gains} | {rest} |")
    return "\n".join(lines)
