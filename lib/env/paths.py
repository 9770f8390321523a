"""Where the repository lies: found in this one place, and asked for everywhere else."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"  # the shipped model and results, and what is downloaded
RESULTS = DATA / "results"
CACHE = DATA / "cache"
RUNS = DATA / "runs"
