"""What each way of writing music as tokens costs and keeps: `python -m lib.lab.bench tokens`.

Time grids and treatments of the pedal are compared without byte-pair encoding; then vocabularies
of several sizes at the coarsest and the finest grid. Merges are learnt on pieces of the train
split; everything else is measured on held-out validation pieces.
"""

import argparse
from collections.abc import Callable

import numpy as np

from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.machine import RESULTS, provenance
from lib.music.maestro import Performance, leaking_titles
from lib.music.notes import Music, read_midi
from lib.music.token_names import count_in
from lib.music.tokens import TokenConfig, Tokenizer, round_trip

GRIDS = (62.5, 31.25, 16.0, 10.0)  # milliseconds; the first is MidiTok's default
PEDALS = ("extend", "tokens", "drop")
SIZES = (1024, 2048, 5000, 20_000)  # vocabularies after byte-pair encoding
TRAIN, HELD_OUT = 60, 12  # pieces


def sample(
    found: list[Performance], *, train: int = TRAIN, held_out: int = HELD_OUT, seed: int = 0
) -> tuple[list[Performance], list[Performance]]:
    """The same train and validation pieces at every run; titles that cross splits are left out."""
    leaks, chosen = leaking_titles(found), []
    for split, number in (("train", train), ("validation", held_out)):
        mine = [p for p in found if p.split == split and (p.composer, p.title) not in leaks]
        if not mine:
            raise UserError(f"there is no {split} piece in this list: give more of MAESTRO")
        rows = np.random.default_rng(seed).permutation(len(mine))[:number]
        chosen.append([mine[i] for i in sorted(rows)])
    return chosen[0], chosen[1]


def read(pieces: list[Performance]) -> list[Music]:
    """The notes and pedal of every piece."""
    return [read_midi(p.path) for p in pieces]


def base_row(
    config: TokenConfig,
    train: list[Music],
    held_out: list[Music],
    done: Callable[[], None] = lambda: None,
) -> tuple[dict, Tokenizer, list, list]:
    """One line of the table without byte-pair encoding.

    Errors are against what a listener hears, the pedal included, over all held-out notes.
    Returns the row, the tokenizer and the base tokens of both samples, for `merged_rows`.
    """
    tokenizer = Tokenizer(config)
    streams: tuple[list, list] = ([], [])
    for music in train:
        streams[0].append(tokenizer.encode_base(music))
        done()
    onset, duration, kept, notes = [], [], 0.0, 0
    for music in held_out:
        streams[1].append(tokenizer.encode_base(music))
        found = round_trip(tokenizer, music)
        onset.append(found["onset_ms"])
        duration.append(found["duration_ms"])
        kept += found["kept"] * len(music.notes)
        notes += len(music.notes)
        done()
    onset_ms, duration_ms = np.concatenate(onset), np.concatenate(duration)
    row = {
        "grid_ms": config.grid_ms,
        "pedal": config.pedal,
        "bpe": None,
        "vocabulary": tokenizer.base_size,
        "tokens_per_note_train": _ratio(streams[0], train),
        "tokens_per_note": _ratio(streams[1], held_out),
        "onset_ms_median": _round(np.median(onset_ms)),
        "onset_ms_p95": _round(np.percentile(onset_ms, 95)),
        "duration_ms_median": _round(np.median(duration_ms)),
        "duration_ms_p95": _round(np.percentile(duration_ms, 95)),
        "notes_kept": round(kept / notes, 5),
        "intervals_within_a_step": round(_short_intervals(held_out, config.grid_ms), 4),
        "order_bits_per_note": round(_order_bits(tokenizer, streams[1]) / notes, 3),
    }
    return row, tokenizer, *streams


def merged_rows(
    row: dict,
    base_train: list,
    base_held_out: list,
    train: list[Music],
    held_out: list[Music],
    sizes=SIZES,
    done: Callable[[], None] = lambda: None,
) -> list[dict]:
    """The same line with byte-pair encoding of several sizes, learnt on `base_train` alone.

    Merging loses nothing: expanded again, every held-out stream is checked to be the base tokens,
    so the errors are those of `row`.
    """
    rows = []
    for size in sizes:
        tokenizer = Tokenizer(TokenConfig(row["grid_ms"], row["pedal"], size))
        tokenizer.learn(base_train)
        merged = [[], []]
        for streams, out in ((base_train, merged[0]), (base_held_out, merged[1])):
            for stream in streams:
                out.append(tokenizer.merge(stream))
                done()
        vocabulary = tokenizer.base.vocab
        for ids, stream in zip(merged[1], base_held_out, strict=True):
            back = [vocabulary[name] for names in tokenizer.names(ids) for name in names]
            if not np.array_equal(back, stream):
                raise AssertionError("byte-pair encoding changed the music")
        rows.append(
            row
            | {
                "bpe": size,
                "vocabulary": tokenizer.vocab_size,
                "tokens_per_note_train": _ratio(merged[0], train),
                "tokens_per_note": _ratio(merged[1], held_out),
                "longest_merge": max(map(len, tokenizer.pieces)),
                "merges_of_two_notes": int((tokenizer.notes_of > 1).sum()),
            }
        )
    return rows


def survey(train: list[Music], held_out: list[Music], *, progress: bool = True) -> list[dict]:
    """All lines of the table: grids x pedals, then vocabularies at the first and last grid."""
    from tqdm import tqdm

    pieces, rows = len(train) + len(held_out), []
    total = pieces * (len(GRIDS) * len(PEDALS) + 2 * len(SIZES))
    with tqdm(total=total, unit="piece", disable=not progress) as bar:

        def done():
            bar.update()

        for grid in GRIDS:
            for pedal in PEDALS:
                bar.set_description(f"{grid:g} ms, pedal {pedal}")
                row, _, base_train, base_held_out = base_row(
                    TokenConfig(grid, pedal, None), train, held_out, done
                )
                rows.append(row)
                if pedal == "extend" and grid in (GRIDS[0], GRIDS[-1]):
                    bar.set_description(f"{grid:g} ms, learning merges")
                    rows += merged_rows(row, base_train, base_held_out, train, held_out, done=done)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, which also reads well in a terminal."""
    head = (
        "grid",
        "pedal",
        "BPE",
        "vocabulary",
        "tokens a note",
        "… in train",
        "onset error, ms",
        "duration error, ms",
        "notes kept",
    )
    lines = [head, ("---:", "---", "---:", "---:", "---:", "---:", "---:", "---:", "---:")]
    for r in rows:
        lines.append(
            (
                f"{r['grid_ms']:g} ms",
                r["pedal"],
                f"{r['bpe']:,}" if r["bpe"] else "none",
                f"{r['vocabulary']:,}",
                f"{r['tokens_per_note']:.2f}",
                f"{r['tokens_per_note_train']:.2f}",
                f"{r['onset_ms_median']:.1f} / {r['onset_ms_p95']:.1f}",
                f"{r['duration_ms_median']:.0f} / {r['duration_ms_p95']:.0f}",
                f"{100 * r['notes_kept']:.1f} %",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "| "
        + " | ".join(
            c.rjust(w) if i > 1 else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def _short_intervals(pieces: list[Music], grid_ms: float) -> float:
    """Which share of the times from one onset to the next is at most one step of the grid."""
    gaps = np.concatenate([np.diff(m.notes["start"]) for m in pieces])
    return float(np.mean(gaps <= grid_ms / 1000))


def _order_bits(tokenizer: Tokenizer, streams: list[np.ndarray]) -> float:
    """Bits that tell in which order the notes of each step are written: log2 k! for k notes.

    MidiTok keeps the order in which they were struck, which nobody hears within a step.
    """
    steps = count_in(tokenizer.pieces, "Position")
    bits = np.concatenate(([0.0], np.cumsum(np.log2(np.arange(1, 200)))))
    total = 0.0
    for stream in streams:
        step = np.cumsum(steps[stream])[tokenizer.notes_of[stream] > 0]
        total += bits[np.minimum(np.unique(step, return_counts=True)[1], 199)].sum()
    return total


def _ratio(streams: list[np.ndarray], pieces: list[Music]) -> float:
    """Tokens a note over all pieces together."""
    return round(sum(map(len, streams)) / sum(len(m.notes) for m in pieces), 4)


def _round(value: float) -> float:
    return round(float(value), 2)


def main(argv: list[str] | None = None) -> None:
    """Measure grids, pedals and vocabularies; write data/results/tokens.json."""
    from lib.music.maestro import performances

    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench tokens", description=main.__doc__
    )
    parser.add_argument(
        "folder", nargs="?", help="MAESTRO, as a folder or a zip (default: what is found)"
    )
    parser.add_argument(
        "--train", type=int, default=TRAIN, help="pieces to learn merges on (%(default)s)"
    )
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT, help="validation pieces (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which pieces are drawn (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="the ten sample pieces; nothing is written"
    )
    args = parser.parse_args(argv)
    if args.train < 1 or args.held_out < 1:
        raise UserError("--train and --held-out count pieces: give at least 1 of each")
    found = performances(args.folder, quick=args.quick)
    train, held_out = sample(found, train=args.train, held_out=args.held_out, seed=args.seed)
    musics = read(train), read(held_out)
    rows = survey(*musics)
    print(table(rows))
    if args.quick:
        return
    command = f"python -m lib.lab.bench tokens --train {args.train} --held-out {args.held_out}"
    result = provenance(command, seed=args.seed) | {
        "source": "MAESTRO v3.0.0",
        "rows": rows,
        "sample": {
            name: {
                "pieces": len(pieces),
                "notes": sum(len(m.notes) for m in music),
                "files": [p.path.name for p in pieces],
            }
            for name, pieces, music in zip(("train", "held_out"), (train, held_out), musics)
        },
    }
    write_json(RESULTS / "tokens.json", result, "data/results/tokens.json")
    print(f"in data/results/tokens.json: {len(train)} train and {len(held_out)} held-out pieces")
