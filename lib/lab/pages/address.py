"""Where a notebook that is opened alone, as on Colab, fetches the course from.

What it installs stands in `lib.env.install`.

The address stands here and nowhere else. It is the home that is planned for the course; a fork puts
its own there and runs `python -m lib.lab.pages stamp`, which writes it into the first cell and the
badge of every notebook and into the README. Whoever runs a notebook may name another source in
MUSIC_REPO: anything that `git clone` takes, a folder on the disk too.

`python -m lib.lab.pages lone` tries it all (`lib.lab.pages.lone`).
"""

import re

from lib.env.errors import UserError

REPOSITORY = "https://github.com/music-with-state-spaces/music-with-state-spaces"
BRANCH = "main"  # from which Colab opens the notebooks
FOLDER = "course"  # the name of the clone, beside a lone notebook
COLAB = "https://colab.research.google.com"

_FIRST_CELL = """\
import os, sys
from pathlib import Path
url = os.environ.get(
    "MUSIC_REPO", "ADDRESS")
here, course, mark = Path.cwd(), Path.cwd() / "FOLDER", Path("lib", "env")
root = next((p for p in (here, *here.parents, course) if (p / mark).exists()), course)
if not (root / mark).exists():  # alone, as on Colab: fetch the course
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # no address is worth a password
    if os.system(f'git clone -q --depth 1 "{url}" FOLDER'):
        sys.exit(f"git could not fetch the course from {url}: "
                 "check the network, or name another in MUSIC_REPO")
sys.path.insert(0, str(root))
from lib.env import start
run = start(seed=0, alone=root == course)"""


def first_cell() -> str:
    """The first code cell of every notebook, the same in all."""
    return _FIRST_CELL.replace("ADDRESS", REPOSITORY).replace("FOLDER", FOLDER)


def link(name: str) -> str:
    """The address at which Colab opens the notebook `name`. UserError where Colab cannot."""
    owner = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", REPOSITORY)
    if not owner:
        raise UserError(
            "Colab opens notebooks from GitHub only, and REPOSITORY in lib/lab/pages/address.py "
            f"is {REPOSITORY}: write https://github.com/OWNER/NAME there"
        )
    return f"{COLAB}/github/{owner[1]}/blob/{BRANCH}/notebooks/{name}.ipynb"


def badge(name: str) -> str:
    """The button "Open in Colab" of a notebook, in Markdown."""
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link(name)})"
