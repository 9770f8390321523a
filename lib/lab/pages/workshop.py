"""A room without a network: everything that the course needs,
in one folder that is known to be complete.

    python -m lib.lab.pages workshop FOLDER           make it, or finish what is there, and check it
    python -m lib.lab.pages workshop FOLDER --check   check it, fetch nothing

The folder holds a wheel of every package (`wheels/`), the repository as git knows it with the
shipped model and ten real performances (`course.zip`), the requirements, a page that says how to
install without a network, and what the teacher carries (`teaching/`: lib/lab/pages/teaching.py).
`bundle.json` names every wheel with its checksum. A bundle serves one kind of machine and one
version of Python: those of the machine that makes it.

Each file appears whole or not at all, so a second call goes on where the first was stopped.
"""

import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib.env import machine as env
from lib.env.errors import UserError, os_errors
from lib.env.files import atomic_write, sha256_of, write_text
from lib.env.install import pip_reason
from lib.lab.pages import address, teaching
from lib.music import ten

WHEELS, COURSE, LIST, TEACHING = "wheels", "course.zip", "bundle.json", "teaching"
SAMPLE = "data/maestro-sample"
MODEL = tuple(
    f"data/model/{name}"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokens.json")
)
BATCH = 10  # packages a call of pip: what a stop can lose

PAGE = """\
# Music with state spaces, for a room without a network

For Python {python} on {platform}. Copy this folder to each machine, open a shell in it, and run

    python -m venv room
    room/bin/python -m pip install --no-index --find-links wheels -r requirements.txt
    room/bin/python -m zipfile -e course.zip .
    room/bin/jupyter lab course/notebooks/00_tour.ipynb

On Windows write `room\\Scripts\\` for `room/bin/`. `room/bin/python -m lib.env`, run in `course`, says
what is there. With `MUSIC_QUICK=1` in the environment every notebook makes its quick run.

Nothing works? `teaching/index.html`, opened in a browser, has every notebook as a page, with its figures and sounds.
It also has the decks, the papers to print, and the solutions of the exercises: give participants a copy without
`teaching/solutions.html`. The exercises alone are in `teaching/exercises`: copy them into `course/notebooks`.

`course/data/maestro-sample` holds ten performances of MAESTRO (Hawthorne and others, ICLR 2019, licence
CC BY-NC-SA 4.0), which every notebook takes where there is no network. To use all of MAESTRO, bring its
MIDI zip and name it in MAESTRO_DIR.
"""


def here() -> dict[str, str]:
    """The kind of machine that a bundle made here serves."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": sysconfig.get_platform(),
    }


# ---- pip ----------------------------------------------------------------------------------


def _pip(*arguments: str, doing: str, offline: bool = False) -> str:
    """Run pip; its standard output. `offline`: no settings of this machine may lend it a source."""
    there = dict(os.environ)
    if offline:
        there = {name: value for name, value in there.items() if not name.startswith("PIP_")}
        there["PIP_CONFIG_FILE"] = os.devnull
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", env=there
    )
    if done.returncode:
        if "No space left" in done.stderr:
            raise UserError("the disk is full: free some space and run it again")
        raise UserError(f"pip could not {doing}: {pip_reason(done.stderr)}")
    return done.stdout


def resolve(requirements: Path) -> list[str]:
    """Every package that the requirements need, as "name==version";
    torch in the version that is here.
    """
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    try:
        pin = f"torch=={version('torch').partition('+')[0]}"
    except PackageNotFoundError:
        pin = ""
    with tempfile.TemporaryDirectory() as scratch:
        keep = Path(scratch) / "keep.txt"
        keep.write_text(pin, encoding="utf-8")
        report = _pip(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--report",
            "-",
            "--constraint",
            str(keep),
            "-r",
            str(requirements),
            doing="find out which packages the course needs",
        )
    found = [package["metadata"] for package in json.loads(report)["install"]]
    return sorted(
        f"{canonicalize_name(data['name'])}=={Version(data['version'])}" for data in found
    )


def _package(wheel: str) -> str:
    """ "name==version" of a wheel's file name; "" where it is none."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        name, number, *_ = parse_wheel_filename(wheel)
    except InvalidWheelFilename:
        return ""
    return f"{name}=={number}"


# ---- making -------------------------------------------------------------------------------


def read_list(folder: Path) -> dict:
    """bundle.json of a bundle, or an empty list where there is none."""
    path = folder / LIST
    try:
        with os_errors(f"read {path}"):
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: delete it and make the bundle again")
    return {"packages": [], "wheels": {}} | found


def _write_list(folder: Path, bundle: dict) -> None:
    write_text(folder / LIST, json.dumps(bundle, indent=1) + "\n")


def make(folder: Path, say=print) -> None:
    """Make the bundle, or what is missing of it."""
    wanted = env.ROOT / "requirements.txt"
    kind = here() | {"requirements": sha256_of(wanted)}
    write_text(folder / "requirements.txt", wanted.read_text(encoding="utf-8"))
    write_text(folder / "README.md", PAGE.format(**kind))
    bundle = read_list(folder)
    if {key: bundle.get(key) for key in kind} != kind:
        say("finding out which packages the course needs")
        bundle |= kind | {"packages": resolve(folder / "requirements.txt")}
        _write_list(folder, bundle)
    _fetch_wheels(folder, bundle, say)
    if not ten.whole(env.ROOT / SAMPLE):
        ten.fetch_ten(env.ROOT / SAMPLE, say)
    pack(folder / COURSE)
    packed = sha256_of(folder / COURSE)
    if bundle.get(TEACHING) != packed or not (folder / TEACHING / "index.html").is_file():
        teaching.main(folder / TEACHING, say)
        bundle[TEACHING] = packed
        _write_list(folder, bundle)


def _fetch_wheels(folder: Path, bundle: dict, say) -> None:
    """Bring the wheels that are missing or damaged, some at a time, and drop those of no use."""
    wheels, part = folder / WHEELS, folder / f"{WHEELS}.part"
    with os_errors(f"write {wheels}"):
        wheels.mkdir(parents=True, exist_ok=True)
        part.mkdir(exist_ok=True)
        for path in [*part.glob("*"), *wheels.glob("*")]:  # left by a stop, or of another version
            if path.parent == part or _package(path.name) not in bundle["packages"]:
                path.unlink()
        missing = [package for package, _ in lacking_wheels(folder, bundle)]
        for begin in range(0, len(missing), BATCH):
            say(
                f"fetching packages {begin + 1} to {min(begin + BATCH, len(missing))} "
                f"of {len(missing)}"
            )
            _pip(
                "wheel",
                "--no-deps",
                "--wheel-dir",
                str(part),
                *missing[begin : begin + BATCH],
                doing="fetch what the course needs",
            )
            for path in sorted(part.glob("*.whl")):
                bundle["wheels"][path.name] = sha256_of(path)
                os.replace(path, wheels / path.name)
            _write_list(folder, bundle)
        part.rmdir()
    bundle["wheels"] = {
        name: digest for name, digest in bundle["wheels"].items() if (wheels / name).exists()
    }
    _write_list(folder, bundle)


def lacking_wheels(folder: Path, bundle: dict) -> Iterator[tuple[str, str]]:
    """(package, what is wrong) for each package without a whole wheel."""
    known = {_package(name): name for name in bundle["wheels"]}
    for package in bundle["packages"]:
        name = known.get(package)
        if name is None or not (folder / WHEELS / name).is_file():
            yield package, f"the wheel of {package}"
        elif sha256_of(folder / WHEELS / name) != bundle["wheels"][name]:
            yield package, f"a whole {WHEELS}/{name}: its checksum is wrong"


def course_files() -> dict[str, Path]:
    """What goes into course.zip: each name in it and the file it comes from."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z"], cwd=env.ROOT, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            "the bundle is made from a git clone of the course: get one with git clone"
        ) from error
    names = [name for name in done.stdout.decode().split("\0") if name]
    names += [f"{SAMPLE}/{name}" for name in [*(row[0] for row in ten.TEN), "README"]]
    return {
        f"{address.FOLDER}/{name}": env.ROOT / name for name in names if (env.ROOT / name).is_file()
    }


def pack(path: Path) -> None:
    """Write course.zip, whole; the same files give the same bytes."""
    with atomic_write(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(course_files().items()):
            entry = zipfile.ZipInfo(name)  # without the date, which would make each packing another
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


# ---- checking -----------------------------------------------------------------------------


def lacking(folder: Path) -> Iterator[str]:
    """What a bundle lacks, a phrase each; nothing where it is ready.

    Every file is read, pip is asked.
    """
    bundle = read_list(folder)
    if not bundle["packages"]:
        yield f"{LIST}, the list of packages"
        return
    for name in ("README.md", "requirements.txt"):
        if not (folder / name).is_file():
            yield name
    if bundle.get("requirements") != sha256_of(env.ROOT / "requirements.txt"):
        yield "the packages of requirements.txt as it is now"
    broken = [what for _, what in lacking_wheels(folder, bundle)]
    yield from broken
    course = list(lacking_course(folder / COURSE))
    yield from course
    index = folder / TEACHING / "index.html"
    if not index.is_file() or (not course and bundle.get(TEACHING) != sha256_of(folder / COURSE)):
        yield f"{TEACHING}/, what the teacher carries"
    served = {key: bundle.get(key) for key in here()}
    if not broken and served == here() and (folder / "requirements.txt").is_file():
        try:  # the proof: an installation without a network, but for the writing
            _pip(
                "install",
                "--dry-run",
                "--ignore-installed",
                "--no-index",
                "--find-links",
                str(folder / WHEELS),
                "-r",
                str(folder / "requirements.txt"),
                doing="install from the wheels alone",
                offline=True,
            )
        except UserError as error:
            yield f"a package that another one needs ({error})"


def lacking_course(path: Path) -> Iterator[str]:
    """What course.zip lacks: files of the repository, the model, the ten performances."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = {item.filename: item for item in archive.infolist()}
            damaged = archive.testzip()
            now = course_files()
            stale = [
                name
                for name, file in now.items()
                if name not in there
                or (name != damaged and archive.read(name) != file.read_bytes())
            ]
    except (OSError, zipfile.BadZipFile):
        yield f"a whole {COURSE}"
        return
    if damaged:
        yield f"a whole {damaged} in {COURSE}"
    for what, names in (
        ("the model", MODEL),
        ("the sample", [f"{SAMPLE}/{row[0]}" for row in ten.TEN]),
    ):
        gone = [name for name in names if f"{address.FOLDER}/{name}" not in there]
        if gone:
            yield f"{what} in {COURSE} ({', '.join(gone[:3])}{', …' if len(gone) > 3 else ''})"
    if stale:
        more = f" and {len(stale) - 1} more files" if len(stale) > 1 else ""
        yield f"the repository as it is now ({stale[0].partition('/')[2]}{more} changed)"


def main(folder: Path, *, check_only: bool = False, say=print) -> None:
    """Make (or only check) the bundle; says "ready", or UserError with all that is missing."""
    if check_only and not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: make it with python -m lib.lab.pages workshop {folder}"
        )
    if not check_only:
        make(folder, say)
    missing = list(lacking(folder))
    if missing:
        for what in missing:
            say(f"missing: {what}")
        many = f"{len(missing)} things are" if len(missing) > 1 else "one thing is"
        raise UserError(
            f"not ready, {many} missing: "
            f"run python -m lib.lab.pages workshop {folder}, with a network"
        )
    bundle = read_list(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    kind = f"Python {bundle['python']} on {bundle['platform']}"
    other = (
        ""
        if {key: bundle[key] for key in here()} == here()
        else f", not this Python {platform.python_version()}"
    )
    say(f"ready: {folder}, {len(bundle['packages'])} packages, {size:,.0f} MB, for {kind}{other}")
