"""How often does playing fall silent or get stuck? `python -m lib.lab.experiments.breath`.

Sixteen seeds from nothing, sixty seconds each, at three temperatures, and what may help at the low
ones: another filter, a floor under the temperature of the clock, a price on keys just struck.
Writes data/results/breath.json, setting by setting, and goes on where it stopped.
"""

import argparse
from statistics import median

from lib.env import machine as env
from lib.env.errors import cli
from lib.env.files import write_json
from lib.generate.breath import (
    FEWEST_KEYS,
    LONGEST_REST,
    different_keys,
    longest_rest,
    short_of_breath,
)
from lib.generate.moment import fingerprint
from lib.generate.player import load_model, variations
from lib.generate.sampling import Sampling

COMMAND = "python -m lib.lab.experiments.breath"
NAME = "breath"
SECONDS = 60.0
SEEDS = list(range(1, 17))
HELP = {
    "as it is": {},
    "min-p 0.1": {"min_p": 0.1, "top_p": 1.0},
    "clock at 1": {"clock_temperature": 1.0},
    "repetition 1.5": {"repetition": 1.5},
    "clock at 1, repetition 1.5": {"clock_temperature": 1.0, "repetition": 1.5},
}
TEMPERATURES = (1.0, 0.7, 0.3)


def measure(model, tokenizer, sampling: Sampling) -> dict:
    """Keys, silence and notes of every seed, and how many are short of breath."""
    pieces = variations(model, tokenizer, seeds=SEEDS, seconds=SECONDS, sampling=sampling)
    rows = []
    for seed, music in zip(SEEDS, pieces):
        rest, _ = longest_rest(music.notes, 0.0, SECONDS)
        rows.append(
            {
                "seed": seed,
                "keys": different_keys(music.notes, 0.0, SECONDS),
                "longest_rest": round(rest, 2),
                "notes": len(music.notes),
                "short_of_breath": bool(short_of_breath(music.notes, 0.0, SECONDS)),
            }
        )
    return {
        "few_keys": sum(row["keys"] < FEWEST_KEYS for row in rows),
        "worst_rest": max(row["longest_rest"] for row in rows),
        "long_rests": sum(row["longest_rest"] > LONGEST_REST for row in rows),
        "short_of_breath": sum(row["short_of_breath"] for row in rows),
        "median_keys": median(row["keys"] for row in rows),
        "median_notes_a_second": median(row["notes"] for row in rows) / SECONDS,
        "pieces": rows,
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Play at low temperatures, measure.")
    parser.parse_args(argv)
    model, tokenizer = load_model()
    mark = fingerprint(model)
    known = env.read_results(NAME)
    if known.get("model") != mark:
        known = {"model": mark}  # another model's pieces do not belong beside these
    known.setdefault("settings", {})
    for name in HELP:
        for temperature in TEMPERATURES:
            key = f"temperature {temperature:g}, {name}"
            if key in known["settings"] or (temperature == 1 and HELP[name]):
                continue
            found = measure(model, tokenizer, Sampling(temperature, **HELP[name]))
            known["settings"][key] = found
            known.update(env.provenance(COMMAND, seed=SEEDS[0]))
            known |= {"seconds": SECONDS, "fewest_keys": FEWEST_KEYS, "longest_rest": LONGEST_REST}
            write_json(env.RESULTS / f"{NAME}.json", known)
            print(
                f"{key}: {found['few_keys']} with few keys, "
                f"worst rest {found['worst_rest']:.1f} s, "
                f"{found['short_of_breath']} short of breath, {found['median_keys']:g} keys, "
                f"{found['median_notes_a_second']:.1f} notes/s",
                flush=True,
            )


if __name__ == "__main__":
    cli(main)
