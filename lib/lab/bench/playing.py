"""Everything that is claimed of playing, measured in one go: `python -m lib.lab.bench playing`.

Plays a hundred pieces and sets them beside real music and noise, proves each control, times a long
prompt and a whole command, plays on for 200,000 tokens, and counts the bits of the test split.
Writes data/results/generation.json and the hundred pieces into a folder. It reads the shipped
model, whatever that is, and takes some ten minutes on two cores.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json
from lib.env.machine import RESULTS, command_line, provenance
from lib.env.schema import read_json
from lib.generate.control import Controls
from lib.generate.endless import GrowingMidi, forever
from lib.generate.grammar import NoteReader
from lib.generate.moment import SEGMENT, fingerprint, hear
from lib.generate.player import MODEL, Player, continuations, load_model, variations
from lib.lab.bench.timing import note
from lib.lab.judge import anchors
from lib.lab.judge.bigram import BigramLM
from lib.lab.judge.likelihood import likelihood
from lib.lab.judge.memorisation import keys, longest_repeat
from lib.lab.rivals.matched import body
from lib.music.encode import Augmentation, build
from lib.music.library import excerpt
from lib.music.maestro import ROOT, performances
from lib.music.notes import Music, read_midi, write_midi
from lib.music.tokens import first_seconds
from lib.show import plots

LEVEL = 1.0  # at which the controls are proved
TEMPO = 1.5
POINTS = 20  # of the curves along the endless piece


def pieces(model, tokenizer, found, args) -> dict:
    """A hundred pieces from nothing, seeds in order, none picked and none left out."""
    from miditok import TokSequence

    start = hear(model, tokenizer, [tokenizer.bos])
    notes, tokens = continuations(
        model, tokenizer, [start] * args.pieces, list(range(args.pieces)), until=args.seconds
    )
    notes = [excerpt(n, 0, args.seconds) for n in notes]
    errors = 0.0
    for ids in tokens:
        names = [name for token in tokenizer.names(ids) for name in token]
        sequence = TokSequence(tokens=names, ids=[tokenizer.base.vocab[name] for name in names])
        errors += tokenizer.base.tokens_errors(sequence) * len(names)
    for seed, n in enumerate(notes):
        write_midi(Music(n), args.out / f"seed{seed}.mid")
    anchor = anchors.anchors(found, tokenizer, args.seconds, progress=False)
    pairs = counted(tokenizer, found, args)
    result = anchors.compare(anchor, {"model": notes, "bigram": pairs})
    shared = anchors.passages(anchor, {"model": notes, "bigram": pairs, "noise": anchor.noise})
    ours, real = ([longest_repeat(keys(n)) for n in group] for group in (notes, anchor.real))
    return {
        "count": len(notes),
        "tokens": sum(map(len, tokens)),
        "invalid_tokens": round(errors),
        "empty": result["empty"]["model"],
        "longest_exact_repetition": {
            "model": max(ours),
            "real": max(real),
            "stuck": sum(r > max(real) for r in ours),
        },
        "comparison": result,
        "passages": shared,
    }


def counted(tokenizer, found, args) -> list[np.ndarray]:
    """As many pieces of the bigram, which keeps to the grammar and knows the last token alone."""
    streams, _ = build(
        found, None, Augmentation(copies=0), tokenizer=tokenizer, progress=False, say=note
    )
    model = BigramLM(streams)
    start = hear(model, tokenizer, [tokenizer.bos])
    notes, _ = continuations(
        model, tokenizer, [start] * args.pieces, list(range(args.pieces)), until=args.seconds
    )
    return [excerpt(n, 0, args.seconds) for n in notes]


def _attribute(name: str, notes: np.ndarray, seconds: float) -> float:
    """What a control is meant to move."""
    if name == "density":
        return len(notes) / seconds
    if name == "tempo":  # onsets a second of music, chords counted once
        gaps = np.diff(notes["start"])
        return float(1 / np.median(gaps[gaps > 0.03])) if (gaps > 0.03).any() else 0.0
    return float(notes["pitch" if name == "register" else "velocity"].mean()) if len(notes) else 0.0


def controls(model, tokenizer, found, args) -> dict:
    """Each control up and down beside the model's own way, the same seeds:
    a paired test over seeds.
    """
    from scipy.stats import wilcoxon

    seeds, seconds = list(range(args.seeds)), 30.0
    play = lambda asked: variations(model, tokenizer, seeds=seeds, seconds=seconds, controls=asked)
    plain, out = play(Controls()), {}
    for name in ("density", "register", "loudness", "tempo"):
        for sign in (1, -1):
            value = TEMPO**sign if name == "tempo" else LEVEL * sign
            moved = play(Controls(**{name: value}))
            before, after = (
                np.array([_attribute(name, m.notes, seconds) for m in group])
                for group in (plain, moved)
            )
            change = sign * (after - before)
            out[f"{name} {value:+.3g}" if name != "tempo" else f"tempo x {value:.3g}"] = {
                "before": float(before.mean()),
                "after": float(after.mean()),
                "seeds": len(seeds),
                "in_the_stated_direction": int((change > 0).sum()),
                "wilcoxon_p_one_sided": float(wilcoxon(change, alternative="greater").pvalue),
            }
    return out


def _rate(work: Callable[[], None], operations: float) -> float:
    """Operations a second of a call."""
    begin = time.perf_counter()
    work()
    return operations / (time.perf_counter() - begin)


def prefill(model, tokenizer, found, args) -> dict:
    """A prompt of ten minutes, against the machine's own rate of multiplying matrices, in turns.

    Every token is multiplied by the weights of the blocks; by the output layer, only the last of
    each segment in which the prompt is read.
    """
    whole_pieces = sorted((p for p in found if p.split == "test"), key=lambda p: -p.seconds)
    minutes = min(600.0, whole_pieces[0].seconds)
    begin = time.perf_counter()
    ids = first_seconds(tokenizer, read_midi(whole_pieces[0].path), minutes)
    encoding = time.perf_counter() - begin
    segments = math.ceil(len(ids) / SEGMENT)
    operations = 2.0 * (body(model) * len(ids) + model.head.numel() * segments)
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    rates: dict[str, list[float]] = {"matmul": [], "prefill": []}
    for turn in range(8):
        one = {
            "matmul": _rate(lambda: torch.mm(a, b), 2.0 * size**3),
            "prefill": _rate(lambda: hear(model, tokenizer, ids), operations),
        }
        if turn:  # the first warms up
            for name, rate in one.items():
                rates[name].append(rate)
    median = {name: float(np.median(r)) for name, r in rates.items()}
    return {
        "prompt_seconds": minutes,
        "tokens": len(ids),
        "encoding_seconds": encoding,
        "seconds": operations / median["prefill"],
        "matmul_gflops": median["matmul"] / 1e9,
        "prefill_gflops": median["prefill"] / 1e9,
        "share": median["prefill"] / median["matmul"],
        "threads": torch.get_num_threads(),
    }


def continuation(model, tokenizer, found, args) -> dict:
    """`python -m lib.generate` as a user types it: 60 seconds, with MP3 and picture."""
    prompt = next(p for p in found if p.split == "test").path
    with tempfile.TemporaryDirectory() as folder:
        line = [
            sys.executable,
            "-m",
            "lib.generate",
            "--prompt",
            str(prompt),
            "--seconds",
            "60",
            "--model",
            str(args.model),
            "--out",
            folder,
        ]
        begin = time.perf_counter()
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
        took = time.perf_counter() - begin
        if done.returncode:
            raise UserError(f"the command failed: {done.stderr.strip().splitlines()[-1]}")
        files = sorted(Path(folder).iterdir())
        return {"seconds": took, "files": {p.suffix: p.stat().st_size for p in files}}


def _resident() -> int | None:
    """Bytes of this process in memory; Linux only."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def stream(model, tokenizer, found, args) -> dict:
    """One piece that goes on: time and memory along its tokens, its file growing on the disk."""
    player = Player(model, tokenizer, [hear(model, tokenizer, [tokenizer.bos])], [0])
    every, rows, times = max(1, args.stream_tokens // POINTS), [], []
    with tempfile.TemporaryDirectory() as folder, GrowingMidi(Path(folder) / "endless.mid") as midi:
        clock = time.perf_counter()
        for count, (notes, seconds) in enumerate(forever(player, NoteReader(tokenizer)), 1):
            for one in notes:
                midi.add(*one)
            if count % 100 == 0:
                midi.flush()
                times.append((time.perf_counter() - clock) / 100)
                clock = time.perf_counter()
            if count % every == 0:
                rows.append(
                    {
                        "tokens": count,
                        "music_seconds": seconds,
                        "ms_a_token": 1e3 * float(np.median(times)),
                        "resident_bytes": _resident(),
                        "state_bytes": player.moment().nbytes(),
                        "notes": midi.notes,
                    }
                )
                times = []
            if count >= args.stream_tokens:
                break
        midi.flush()
        size = midi.path.stat().st_size
    return {"tokens": args.stream_tokens, "file_bytes": size, "curve": rows}


def bits(model, tokenizer, found, args) -> dict:
    """Bits per note of the whole test split."""
    return likelihood(model, tokenizer, [p for p in found if p.split == "test"])


PARTS = {
    "pieces": pieces,
    "controls": controls,
    "prefill": prefill,
    "continuation": continuation,
    "stream": stream,
    "bits": bits,
}


def main(argv: list[str]) -> None:
    """Measure everything that is claimed of playing, and write data/results/generation.json."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench playing", description=main.__doc__
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="folder of a checkpoint (default: the shipped one)",
    )
    parser.add_argument("--pieces", type=int, default=100, help="to play (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each (%(default)s)")
    parser.add_argument(
        "--seeds", type=int, default=30, help="of the test of each control (%(default)s)"
    )
    parser.add_argument(
        "--stream-tokens", type=int, default=200_000, help="of the endless piece (%(default)s)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="measure only these, keep the others",
    )
    parser.add_argument("--quick", action="store_true", help="the ten sample pieces only")
    parser.add_argument(
        "--out", type=Path, default=Path("out/hundred"), help="folder for the pieces (%(default)s)"
    )
    parser.add_argument(
        "--result",
        type=Path,
        default=RESULTS / "generation.json",
        help="(data/results/generation.json)",
    )
    args = parser.parse_args(argv)
    if (
        args.pieces < 8
        or args.seeds < 5
        or args.stream_tokens < 100 * POINTS
        or not 10 <= args.seconds <= 600
    ):
        raise UserError(
            "these numbers are too small to say anything: "
            f"eight pieces of ten seconds, five seeds and {100 * POINTS:,} tokens are the least"
        )
    model, tokenizer = load_model(args.model)
    found = performances(quick=args.quick, say=note)
    mark = fingerprint(model)
    result = read_json(args.result, dict, do="delete it") if args.result.is_file() else {}
    if result.get("model") != mark:
        result = {}  # another model's numbers do not belong beside these
    line = command_line("python", "-m", "lib.lab.bench", "playing", *argv)
    result |= {"model": mark, "parameters": model.parameter_count(), **provenance(line)}
    for part in args.parts:
        begin = time.perf_counter()
        result[part] = PARTS[part](model, tokenizer, found, args)
        result.setdefault("measured_by", {})[part] = line
        note(f"{part}: {time.perf_counter() - begin:.0f} s")
        write_json(args.result, result)  # after each part, so that an interruption loses little
    if "pieces" in args.parts:
        with atomic_write(args.out / "evaluation.png") as file:
            file.write_bytes(plots.png_bytes(anchors.plot(result["pieces"]["comparison"])))
    print(summary(result))


def summary(result: dict) -> str:
    """The answers in a few lines."""
    lines = []
    if "pieces" in result:
        p = result["pieces"]
        mean = {n: r["mean_overlap_area"] for n, r in p["comparison"]["overlap"].items()}
        copied = p["comparison"]["copied"]
        again = p["longest_exact_repetition"]
        lines += [
            f"{p['count']} pieces: {p['invalid_tokens']} invalid tokens, "
            f"{p['empty']} empty, {again['stuck']} stuck "
            f"(longest repetition {again['model']} notes, real {again['real']})",
            "mean overlap area: " + ", ".join(f"{n} {v:.3f}" for n, v in mean.items()),
        ]
        shared = p["passages"]
        lines += [
            f"most surprising passage shared with train, {group}: {row['most_bits']:.0f} bits, "
            f"{row['above']:.0%} above the {shared['threshold_bits']:.0f} of chance"
            for group, row in shared["groups"].items()
        ]
        lines += [
            f"longest passage shared with train, {kind}: {rows['model']['longest']} notes; "
            f"unrelated real pieces {rows['real']['longest']}"
            for kind, rows in copied.items()
        ]
    for name, row in result.get("controls", {}).items():
        lines.append(
            f"{name}: {row['before']:.3g} to {row['after']:.3g}, "
            f"{row['in_the_stated_direction']} of {row['seeds']} seeds, "
            f"p {row['wilcoxon_p_one_sided']:.1e}"
        )
    if "prefill" in result:
        p = result["prefill"]
        lines.append(
            f"prompt of {p['prompt_seconds'] / 60:.0f} minutes, {p['tokens']:,} tokens: "
            f"{p['seconds']:.2f} s, "
            f"{p['share']:.0%} of the matrix rate of {p['matmul_gflops']:.0f} GFLOP/s"
        )
    if "continuation" in result:
        seconds = result["continuation"]["seconds"]
        lines.append(f"60 seconds from the command line, MP3 and picture included: {seconds:.1f} s")
    if "stream" in result:
        first, last = (result["stream"]["curve"][i] for i in (0, -1))
        lines.append(
            f"endless: {first['ms_a_token']:.2f} ms a token at {first['tokens']:,}, "
            f"{last['ms_a_token']:.2f} at {last['tokens']:,}; state {last['state_bytes']:,} bytes"
        )
        if first["resident_bytes"] and last["resident_bytes"]:
            lines[-1] += (
                f"; process {first['resident_bytes'] / 2**20:.0f} and "
                f"{last['resident_bytes'] / 2**20:.0f} MiB"
            )
    if "bits" in result:
        for name in ("native", "dequantised_10_ms"):
            low, high = result["bits"][name]["interval_95"]
            bits = result["bits"][name]["bits_per_note"]
            lines.append(f"bits per note, {name}: {bits:.2f} ({low:.2f} to {high:.2f})")
    return "\n".join(lines)
