"""Where the repository lies: found in this one place, and asked for everywhere else."""

import os
from pathlib import Path


def own_folder() -> Path:
    """A folder of this user's own, for what can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "music-with-state-spaces"


_around = Path(__file__).resolve().parents[2]
# a package that pip installed has no repository around it
ROOT = _around if (_around / "requirements.txt").is_file() else own_folder()
DATA = ROOT / "data"  # the shipped model and results, and what is downloaded
RESULTS = DATA / "results"
CACHE = DATA / "cache"
RUNS = DATA / "runs"
