"""A notebook opened alone, as on Colab: where it fetches the course from, and what it installs.

The address stands here and nowhere else. It is the home that is planned for the course; a fork puts its
own there and runs `python -m lib.lab.pages stamp`, which writes it into the first cell and the badge of
every notebook and into the README. Whoever runs a notebook may name another source in MUSIC_REPO:
anything that `git clone` takes, a folder on the disk too.

`python -m lib.lab.pages lone` tries it all (`lib.lab.pages.lone`).
"""

import importlib
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

from lib.env import machine as env
from lib.env.errors import UserError

REPOSITORY = "https://github.com/music-with-state-spaces/music-with-state-spaces"
BRANCH = "main"  # from which Colab opens the notebooks
FOLDER = "course"  # the name of the clone, beside a lone notebook
COLAB = "https://colab.research.google.com"

# Never changed where it is installed: torch fits the machine's GPU and Triton fits torch, and the
# widgets fit the page that shows the notebook.
KEPT = ("torch", "torchvision", "torchaudio", "triton", "ipywidgets")
# Never installed: a lone notebook is open already, and runs no tests.
NOT_NEEDED = ("jupyterlab", "nbformat", "nbclient", "pytest", "nbmake", "beartype", "ruff", "codespell")

_FIRST_CELL = """\
import os, sys
from pathlib import Path
url = os.environ.get("MUSIC_REPO", "ADDRESS")
here, course, mark = Path.cwd(), Path.cwd() / "FOLDER", Path("lib", "env.py")
root = next((p for p in (here, *here.parents, course) if (p / mark).exists()), course)
if not (root / mark).exists():  # alone, as on Colab: fetch the course
    os.environ["GIT_TERMINAL_PROMPT"] = "0"  # no address is worth a password
    if os.system(f'git clone -q --depth 1 "{url}" FOLDER'):
        sys.exit(f"git could not fetch the course from {url}: check the network, or name another in MUSIC_REPO")
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
            f"Colab opens notebooks from GitHub only, and REPOSITORY in lib/lab/pages/address.py is {REPOSITORY}: "
            "write https://github.com/OWNER/NAME there"
        )
    return f"{COLAB}/github/{owner[1]}/blob/{BRANCH}/notebooks/{name}.ipynb"


def badge(name: str) -> str:
    """The button "Open in Colab" of a notebook, in Markdown."""
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link(name)})"


# ---- what is installed --------------------------------------------------------------------


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(say=print) -> list[str]:
    """The requirements of the notebooks that this Python lacks, or has in a version that was not tested.

    What is in `KEPT` counts as missing only where there is none at all; another version than the
    tested ones is told and left alone.
    """
    lacking = []
    for wanted, reason in env.requirements():
        name = re.match(r"[\w.-]+", wanted)[0]
        if name in NOT_NEEDED:
            continue
        try:
            found = env.check(wanted, reason)
        except UserError:  # even `packaging`, which compares versions, is missing
            found = env.Check(_installed(name) is not None, "")
        if found.ok:
            continue
        if name in KEPT and _installed(name):
            say(f"{found.text.partition(': run pip')[0]}; it is left as it is")
        else:
            lacking.append(wanted)
    return lacking


def _loaded() -> dict[str, str]:
    """The version of every package of which a module is loaded in this process."""
    homes = packages_distributions()
    loaded = {name.partition(".")[0] for name in list(sys.modules)}
    return {home: version(home) for name in loaded for home in homes.get(name, ())}


def install_missing(say=print) -> None:
    """Install what `missing` names, with pip, and leave torch and its kin exactly as they are.

    Nothing happens where nothing is missing, so it may run again and again. Raises UserError, one
    sentence: no network, or a package was replaced that is loaded already.
    """
    lacking = missing(say)
    if not lacking:
        return
    many = f"{len(lacking)} packages" if len(lacking) > 1 else "a package"
    say(f"installing {many} that the course needs: once, and it may take a few minutes")
    before = _loaded()
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        pins = [f"{name}=={_installed(name)}\n" for name in KEPT if _installed(name)]
        keep.write_text("".join(pins), encoding="utf-8")
        # without compiling every module to bytecode: the few that are imported are compiled then
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile", "--retries", "2",
                   "--disable-pip-version-check", "--constraint", str(keep), *lacking]
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(
            f"pip could not install what the course needs ({pip_reason(done.stderr)}): "
            "check the network and run this cell again"
        )
    importlib.invalidate_caches()
    after = _loaded()
    replaced = sorted(name for name, was in before.items() if after.get(name, was) != was)
    if replaced:
        raise UserError(
            f"{', '.join(replaced)} was replaced while an older version was in use: "
            "restart the kernel (on Colab: Runtime, Restart session) and run this cell again"
        )


def pip_reason(stderr: str) -> str:
    """Pip's last complaint as the inside of a sentence."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:] or ["it gave no reason"]
    return re.sub(r"^error:\s*", "", errors[-1], flags=re.IGNORECASE).rstrip(".")[:200]
