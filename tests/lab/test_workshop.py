"""Claims about the workshop kit: a bundle is complete or says what it lacks,
and it goes on after a stop.

The bundle here is a tiny one: two made-up wheels from a local folder, a small repository, ten small
files in place of the ten performances. One test has pip itself make, prove and install it; in the
others a stand-in takes pip's place, which starts slowly.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from test_colab import git, wheel

from lib.env import machine as env
from lib.env.errors import UserError
from lib.lab.pages import __main__ as command
from lib.lab.pages import workshop
from lib.music import ten

TEN = [row[0] for row in ten.TEN]


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small course with a package index of two wheels; returns its folder."""
    root, index = tmp_path / "course", tmp_path / "index"
    index.mkdir()
    wheel(index, "music-tiny-thing", "1.0", needs=["music_Smaller.thing"])
    wheel(index, "music-smaller-thing", "0.5")
    for name in (*workshop.MODEL, "README.md", "notebooks/00_tour.ipynb"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "notebooks" / "00_tour.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    (root / "requirements.txt").write_text("music-tiny-thing==1.0  # made up\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    (root / "untracked.txt").write_text("no part of the course")

    def fetch(folder, say):
        folder.mkdir(parents=True)
        for name in (*TEN, "README"):
            (folder / name).write_bytes(b"MThd")

    monkeypatch.setattr(env, "ROOT", root)
    # the version of torch, which is not asked for here
    monkeypatch.setattr(workshop, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(ten, "fetch_ten", fetch)
    monkeypatch.setattr(ten, "whole", lambda folder: all((folder / name).is_file() for name in TEN))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return root


@pytest.fixture
def pip(course, tmp_path, monkeypatch):
    """A stand-in for pip, which knows the two wheels, and for the teacher's pages;
    returns the list of pip's calls.
    """
    calls = []

    def stand_in(command, *arguments, doing, offline=False):
        calls.append(command)
        if "--report" in arguments:
            named = [("music_tiny.Thing", "1.0"), ("music-smaller-thing", "0.5")]
            named = named[("music-tiny" not in (course / "requirements.txt").read_text()) :]
            return json.dumps(
                {"install": [{"metadata": {"name": n, "version": v}} for n, v in named]}
            )
        if command == "wheel":
            where = Path(arguments[arguments.index("--wheel-dir") + 1])
            for package in arguments[arguments.index("--wheel-dir") + 2 :]:
                name = package.replace("-", "_").replace("==", "-")
                shutil.copy(tmp_path / "index" / f"{name}-py3-none-any.whl", where)
        return ""

    monkeypatch.setattr(workshop, "_pip", stand_in)
    monkeypatch.setattr(
        workshop.teaching, "files", lambda: {"index.html": b"made", "pages/00_tour.html": b"made"}
    )
    return calls


@pytest.fixture
def bundle(pip, tmp_path):
    """A whole bundle of the small course."""
    workshop.main(tmp_path / "bundle", say=lambda _: None)
    pip.clear()
    return tmp_path / "bundle"


def missing(folder):
    """What a check alone says is missing, a line each."""
    said = []
    with pytest.raises(
        UserError, match="not ready, .* missing: run python -m lib.lab.pages workshop"
    ):
        workshop.main(folder, check_only=True, say=said.append)
    return [line.removeprefix("missing: ") for line in said]


def test_pip_itself_makes_proves_and_installs(course, tmp_path, monkeypatch):
    """The page's commands, from `--no-index` on,
    bring the packages and the course into a fresh environment.
    """
    folder, said = tmp_path / "bundle", []
    workshop.main(folder, say=said.append)
    assert said[-1].startswith(
        f"ready: {folder}, 2 packages, 1 MB, for Python {sys.version_info.major}."
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "bundle.json",
        "course.zip",
        "requirements.txt",
        "teaching",
        "wheels",
    ]

    lines = [
        line.strip()
        for line in (folder / "README.md").read_text().splitlines()
        if line.startswith("    ")
    ]
    assert (
        lines[0] == "python -m venv room"
        and lines[3] == "room/bin/jupyter lab course/notebooks/00_tour.ipynb"
    )
    python = fresh_python(tmp_path / "room")
    there = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    there["PIP_CONFIG_FILE"] = os.devnull
    for line in lines[1:3]:
        program, *arguments = line.split()
        assert program == "room/bin/python"
        subprocess.run([python, *arguments], cwd=folder, env=there, check=True, capture_output=True)
    subprocess.run([python, "-c", "import music_tiny_thing, music_smaller_thing"], check=True)
    assert (
        folder / "course" / "data" / "model" / "config.json"
    ).read_text() == "data/model/config.json"

    # every file of a list is whole, the list lacks a dependency, and still it is found out
    found = workshop.read_list(folder)
    found["packages"].remove("music-smaller-thing==0.5")
    (folder / "bundle.json").write_text(json.dumps(found))
    (folder / "wheels" / "music_smaller_thing-0.5-py3-none-any.whl").unlink()
    (what,) = missing(folder)
    assert what.startswith(
        "a package that another one needs (pip could not install from the wheels alone: "
    )

    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        UserError, match="pip could not find out which packages .*No matching distribution"
    ):
        workshop.main(tmp_path / "another", say=lambda _: None)


def fresh_python(folder):
    """A virtual environment that borrows the pip of this one,
    and nothing that the bundle brings.
    """
    import pip

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    place = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(place) / "here.pth").write_text(str(Path(pip.__file__).parents[1]))
    return python


def test_course_zip_holds_what_git_knows_the_model_and_the_sample(bundle):
    with zipfile.ZipFile(bundle / "course.zip") as archive:
        names = set(archive.namelist())
    assert {f"course/{name}" for name in workshop.MODEL} < names
    assert {f"course/data/maestro-sample/{name}" for name in TEN} < names
    assert "course/untracked.txt" not in names
    kind = workshop.here()
    assert f"Python {kind['python']} on {kind['platform']}" in (bundle / "README.md").read_text()


def test_a_second_call_fetches_nothing(bundle, pip):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    said = []
    workshop.main(bundle, say=said.append)
    workshop.main(bundle, check_only=True, say=said.append)
    # the teacher's pages are not made again
    assert [line.split(":")[0] for line in said] == ["ready", "ready"]
    assert pip == ["install", "install"]  # the two proofs
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before


def test_a_stop_loses_one_batch(pip, tmp_path, monkeypatch):
    folder, whole_pip = tmp_path / "bundle", workshop._pip

    def stopped(*arguments, **options):
        if pip.count("wheel"):
            raise UserError("pip could not fetch what the course needs: no network")
        return whole_pip(*arguments, **options)

    monkeypatch.setattr(workshop, "BATCH", 1)
    monkeypatch.setattr(workshop, "_pip", stopped)
    with pytest.raises(UserError, match="no network"):
        workshop.main(folder, say=lambda _: None)
    assert len(list((folder / "wheels").glob("*.whl"))) == 1
    (folder / "wheels.part" / "half.whl").write_bytes(b"half")
    monkeypatch.setattr(workshop, "_pip", whole_pip)
    pip.clear()
    said = []
    workshop.main(folder, say=said.append)
    assert pip == ["wheel", "install"]  # one package, and the proof; nothing is resolved again
    assert said[0] == "fetching packages 1 to 1 of 1" and said[-1].startswith("ready: ")
    assert not (folder / "wheels.part").exists()


@pytest.mark.parametrize(
    "what, words",
    [
        (
            "wheels/music_smaller_thing-0.5-py3-none-any.whl",
            "the wheel of music-smaller-thing==0.5",
        ),
        ("README.md", "README.md"),
        ("requirements.txt", "requirements.txt"),
        ("course.zip", "a whole course.zip"),
        ("bundle.json", "bundle.json, the list of packages"),
        ("teaching/index.html", "teaching/, what the teacher carries"),
    ],
)
def test_what_is_gone_is_named_and_made_again(bundle, what, words):
    (bundle / what).unlink()
    assert missing(bundle) == [words]
    workshop.main(bundle, say=lambda _: None)
    assert (bundle / what).is_file()


@pytest.mark.parametrize(
    "what, words",
    [
        (
            "wheels/music_tiny_thing-1.0-py3-none-any.whl",
            "a whole wheels/music_tiny_thing-1.0-py3-none-any.whl: its checksum is wrong",
        ),
        ("course.zip", "a whole course.zip"),
    ],
)
def test_damage_is_found_and_mended(bundle, what, words):
    content = (bundle / what).read_bytes()
    (bundle / what).write_bytes(content[: len(content) // 2])
    assert missing(bundle) == [words]
    workshop.main(bundle, say=lambda _: None)


def test_a_model_that_is_not_there_is_named(pip, course, tmp_path):
    (course / "data" / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="one thing is missing"):
        workshop.main(tmp_path / "bundle", say=lambda _: None)
    assert missing(tmp_path / "bundle") == [
        "the model in course.zip (data/model/model.safetensors)"
    ]


def test_a_course_that_changed_is_named(bundle, course):
    (course / "README.md").write_text("new")
    assert missing(bundle) == ["the repository as it is now (README.md changed)"]
    (course / "requirements.txt").write_text("music-smaller-thing  # another\n")
    found = missing(bundle)
    assert found[0] == "the packages of requirements.txt as it is now"
    assert found[1] == "the repository as it is now (README.md and 1 more files changed)"
    workshop.main(bundle, say=lambda _: None)
    assert [path.name for path in (bundle / "wheels").iterdir()] == [
        "music_smaller_thing-0.5-py3-none-any.whl"
    ]


def test_pages_of_another_course_are_named(bundle, course):
    (course / "README.md").write_text("new")
    workshop.pack(bundle / "course.zip")
    assert missing(bundle) == ["teaching/, what the teacher carries"]


def test_another_machine_says_for_whom_it_is(bundle, pip, monkeypatch):
    monkeypatch.setattr(workshop, "here", lambda: {"python": "3.99", "platform": "abacus"})
    said = []
    workshop.main(bundle, check_only=True, say=said.append)
    assert ", not this Python " in said[-1] and not pip


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_list_is_one_sentence(bundle, content):
    (bundle / "bundle.json").write_text(content)
    with pytest.raises(UserError, match="bundle.json is damaged: delete it"):
        workshop.main(bundle)


def test_no_folder_and_no_git_are_one_sentence_each(course, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        workshop.main(tmp_path / "nowhere", check_only=True)
    monkeypatch.setattr(env, "ROOT", tmp_path)
    with pytest.raises(UserError, match="made from a git clone"):
        workshop.course_files()


def test_command_line(pip, tmp_path, capsys):
    command.main(["workshop", str(tmp_path / "bundle")])
    command.main(["workshop", str(tmp_path / "bundle"), "--check"])
    assert capsys.readouterr().out.count("ready: ") == 2
    with pytest.raises(SystemExit):
        command.main(["--check"])
    assert "python -m lib.lab.pages" in capsys.readouterr().err
