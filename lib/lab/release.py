"""Turn a finished run into the shipped model: `python -m lib.lab.release RUN`.

Takes the run's best checkpoint, stores it in half precision in data/model, opens it again from
there, and measures what was stored: bits per note of whole validation and test pieces.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import atomic_write, write_json, write_text
from lib.env.machine import command_line, provenance
from lib.generate.player import generate
from lib.music.maestro import DATA, leaking_titles
from lib.music.streams import Streams
from lib.music.tokens import Tokenizer
from lib.show.listen import save_mp3
from lib.show.plots import save_roll
from lib.train import checkpoints
from lib.train.bits import counting_baselines, interval, piece_bits
from lib.train.checkpoints import LAST, LOG_FIELDS

# The header is what the Hub of Hugging Face reads: https://huggingface.co/docs/hub/model-cards
CARD = """---
license: cc-by-nc-sa-4.0
library_name: transformers
tags:
- music
- midi
- piano
- mamba
- symbolic-music
model-index:
- name: {name}
  results:
  - task:
      type: text-generation
      name: symbolic piano music
    dataset:
      type: maestro
      name: MAESTRO v3.0.0
      split: test
    metrics:
    - type: bits_per_note
      name: bits per note, whole pieces, grid of {grid:g} ms
      value: {test_bits_per_note:.2f}
---

# Model card: a small Mamba that plays the piano

A Mamba language model of {params:,} parameters over REMI tokens with byte-pair encoding
({vocab} tokens, a grid of {grid:g} ms, notes lengthened by the sustain pedal). It continues a piano
piece or starts one from nothing.

| | |
|---|---|
| architecture | Mamba (Gu and Dao 2023): {n_layer} layers, d_model {d_model}, d_state {d_state}, tied embeddings |
| files | `config.json` and `model.safetensors` in float16, as transformers' `MambaForCausalLM` reads them; `tokenizer.json` (MidiTok), `tokens.json` |
| trained on | {device}, {precision} matrix products, {hours:.2f} hours, {steps:,} steps, {tokens_seen:,} tokens{before} |
| validation, whole pieces | {validation_bits_per_note:.2f} bits per note |
| test, whole pieces | {test_bits_per_note:.2f} bits per note (95 % interval over pieces {low:.2f} to {high:.2f}) |
| test without the titles that cross splits | {test_bits_per_note_without_leaks:.2f} bits per note |
| uniform, unigram and bigram models on the same test tokens | {uniform:.2f}, {unigram:.2f} and {bigram:.2f} bits per note |

Every number is in `data/results/model.json` with its command; the curve is in
`data/results/training_log.csv`. The checkpoint was chosen by validation bits per note on a fixed
subset of whole validation pieces; the test split was evaluated once for each release, after that choice.

## Data

{data}

Merges were learnt and the model was trained on the official train split only ({pieces} performances,
and {copies} copies of each, transposed by up to {semitones} semitones, {stretch:.0%} slower or faster, a little
softer or louder). {leaks} titles cross the official splits, which is why the test split is also quoted
without them.

## Licence

MAESTRO is by Hawthorne et al. (ICLR 2019) and is licensed CC BY-NC-SA 4.0. These weights were made
from it and carry the same terms: name the source, no commercial use, share alike.

## Limits

- It is small. It keeps a texture and a hand position for some seconds; it has no plan for a piece.
- It knows performances of competition pianists from the piano repertoire, and nothing else.
- Bits per note hold for this grid only; they cannot be set beside those of another time resolution.
- Byte-pair encoding makes the figures upper bounds: the same notes have other spellings.
- Nobody has rated its music. Passages that it shares with training pieces are counted in notebook 09, section 9.
"""

NAME = "music-with-state-spaces"  # of the model, in its card


def earlier(init: dict | None, n_layer: int = 0) -> str:
    """What the card says of the weights that a run started from,
    and how much training was behind them.
    """
    if not init:
        return ""
    known = (
        f"{init['hours']:.2f} hours, {init['steps']:,} steps, {init['tokens']:,} tokens"
        if "steps" in init
        else "training that is not known"
    )
    layers = init.get("n_layer", n_layer)
    fewer = f" ({layers} layers then)" if layers < n_layer else ""
    return f"; part of it by the weights in {init['folder']} from which it started{fewer}: {known}"


def whole_log(run: list[dict], log: Path, init: dict | None) -> list[dict]:
    """The rows of a run's log, after those in `log` of the weights it started from,
    if that is their log.

    Steps, tokens and minutes count on. The earlier training must be known,
    and its last row agree with it.
    """
    if not init or "steps" not in init or not log.is_file():
        return run
    with open(log, newline="") as file:
        before = list(csv.DictReader(file))
    if not before or int(before[-1]["step"]) != init["steps"]:
        return run
    later = []
    for row in run:
        minutes = row["minutes"] + 60 * init["hours"]
        later.append(
            row
            | {
                "step": row["step"] + init["steps"],
                "tokens": row["tokens"] + init["tokens"],
                "minutes": round(minutes, 3),
            }
        )
    return before + later


def open_run(folder: Path) -> tuple[dict, dict | None]:
    """A run, and what is known of the weights that it started from.

    `UserError` where there is none.
    """
    if not (folder / LAST).is_file():
        raise UserError(f"{folder} is no folder of a run: it needs {LAST}")
    run = checkpoints.read(folder)[1]
    init = run.get("init")
    # some earlier runs name a folder in their configuration
    if init is None and run["config"].get("init"):
        # asked now: it may be the folder that is replaced
        init = checkpoints.history(Path(run["config"]["init"]))
    return run, init


def measure(model: mamba.MambaLM, streams: Streams) -> dict:
    """Bits per note of the validation and of the test split, whole pieces,
    and of models that count.
    """
    leaks = leaking_titles(streams.pieces)
    test = streams.select("test")
    validation = streams.select("validation")
    bits = piece_bits(model, streams, test, progress=True)
    validation_bits = piece_bits(model, streams, validation, progress=True)
    notes = np.array([p.notes for p in test])
    clean = np.array([(p.composer, p.title) not in leaks for p in test])
    return {
        "validation_bits_per_note": float(validation_bits.sum() / sum(p.notes for p in validation)),
        "validation_pieces": len(validation),
        "test_bits_per_note": float(bits.sum() / notes.sum()),
        "test_pieces": len(test),
        "test_interval_95": list(interval(bits, notes)),
        "test_bits_per_note_without_leaks": float(bits[clean].sum() / notes[clean].sum()),
        "test_pieces_without_leaks": int(clean.sum()),
        "leaking_titles": sorted(map(list, leaks)),
        "test_baselines": counting_baselines(streams, test),
        "bits_per_token": float(bits.sum() / sum(p.length - 1 for p in test)),
    }


def training(run: dict, init: dict | None, streams: Streams) -> dict:
    """What stands behind the weights: steps, hours, tokens and notes,
    those before the run counted too.
    """
    best = min(run["log"], key=lambda row: row["validation_bits_per_note"])
    # the card says what is not known, so it is not counted
    before = {"steps": 0, "hours": 0, "tokens": 0} | (init or {})
    tokens_seen = best["tokens"] + before["tokens"]
    train = streams.select("train")
    notes_a_token = sum(p.notes for p in train) / sum(p.length for p in train)
    return {
        "steps": best["step"] + before["steps"],
        "hours": best["minutes"] / 60 + before["hours"],
        "tokens_seen": tokens_seen,
        "train_notes_seen": round(tokens_seen * notes_a_token),
        "precision": run["config"]["precision"],
        "training": run["config"],
        "init": init,
        "pieces": len(train),
    }


def sizes(model: mamba.MambaLM, tokenizer: Tokenizer) -> dict:
    """How large the model is, and what it reads."""
    config = model.config
    return {
        "params": model.parameter_count(),
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "d_state": config.d_state,
        "vocab": config.vocab_size,
        "grid": tokenizer.config.grid_ms,
    }


def card(result: dict) -> str:
    """The model card of a measured model."""
    low, high = result["test_interval_95"]
    before = earlier(result["init"], result["n_layer"])
    leaks = len(result["leaking_titles"])
    return CARD.format(
        name=NAME,
        low=low,
        high=high,
        leaks=leaks,
        before=before,
        **result["test_baselines"],
        **result,
    )


def main(argv: list[str] | None = None) -> None:
    """Store a run's best checkpoint as the shipped model, and measure it."""
    parser = argparse.ArgumentParser(prog="python -m lib.lab.release", description=main.__doc__)
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run of lib.train")
    add("--streams", type=Path, required=True, help="folder of the token streams it was trained on")
    add(
        "--out", type=Path, default=DATA / "model", help="folder of the model (default: data/model)"
    )
    add("--data", required=True, help="one honest sentence on where the MIDI files come from")
    args = parser.parse_args(argv)
    streams = Streams.load(args.streams)
    run, init = open_run(args.run)
    if run["settings"] != streams.settings:
        raise UserError(f"{args.streams} are not the token streams that {args.run} was trained on")
    mamba.save(mamba.load(args.run / "best"), args.out, dtype=torch.float16)
    tokenizer = Tokenizer.load(args.streams)
    tokenizer.save(args.out)

    model = mamba.load(args.out)  # what was stored is what is measured
    command = command_line(
        "python", "-m", "lib.lab.release", str(args.run), "--streams", str(args.streams)
    )
    result = {
        **sizes(model, tokenizer),
        **training(run, init, streams),
        **measure(model, streams),
        "data": args.data,
        **streams.settings["augmentation"],
        **provenance(command, seed=run["config"]["seed"]),
    }
    log = DATA / "results" / "training_log.csv"
    rows = whole_log(run["log"], log, init)
    write_json(DATA / "results" / "model.json", result)
    with atomic_write(log) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    write_text(args.out / "README.md", card(result))
    # the piece that `python -m lib.generate --seconds 30` plays
    music = generate(model, tokenizer, seconds=30, seed=1)
    save_roll(
        music, DATA / "results" / "tour_roll.png", title="30 seconds from the shipped model, seed 1"
    )
    save_mp3(music, DATA / "results" / "tour.mp3")
    low, high = result["test_interval_95"]
    print(
        f"{args.out.name}: validation {result['validation_bits_per_note']:.2f}, test "
        f"{result['test_bits_per_note']:.2f} bits a note ({low:.2f} to {high:.2f})"
    )


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)
