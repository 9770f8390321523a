"""Claims about lone notebooks: the first cell fetches the course, installs what is missing,
leaves torch alone.

Colab is pretended: an empty folder with nothing but the notebook, a fresh virtual environment with
a module `google.colab`, the repository served from a local address, and wheels from a local folder
in place of a package index. `python -m lib.lab.pages lone` does the same in earnest, with
everything to install.
"""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from lib.env import install
from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.lab.pages import address, stamp
from lib.lab.pages import lone as colab_check

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
TINY = "music-tiny-thing"

# Runs in the pretended Colab: the first cell of each lone notebook, twice, each in its own folder.
DRIVER = """
import io, json, os, sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
import google.colab

def tiny():
    try:
        return version("music-tiny-thing")
    except PackageNotFoundError:
        return None

for book in sys.argv[1:]:
    os.chdir(os.path.dirname(book))
    cells = json.load(open(book, encoding="utf-8"))["cells"]
    first = "".join(next(c for c in cells if c["cell_type"] == "code")["source"])
    path, report = list(sys.path), {"before": tiny(), "torch_before": version("torch"), "said": []}
    for _ in range(2):
        with redirect_stdout(io.StringIO()) as said:
            names = {}
            exec(first, names)
        report["said"].append(said.getvalue())
    from lib import env
    report |= {"after": tiny(), "torch_after": version("torch"), "root": str(names["root"]),
               "lib": env.__file__, "quick": names["run"].quick, "there": sorted(os.listdir("."))}
    print("REPORT" + json.dumps(report))
    for name in [n for n in sys.modules if n.partition(".")[0] == "lib"]:
        del sys.modules[name]
    sys.path[:] = path
"""


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def wheel(folder, name, number, needs=()):
    """A wheel of one empty module, made by hand."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{number}.dist-info"
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}",
        *(f"Requires-Dist: {n}" for n in needs),
    ]
    with zipfile.ZipFile(folder / f"{module}-{number}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}.py", "")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n"
        )


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A pretended Colab: its Python, its environment variables,
    and the served repository's work tree.
    """
    place = tmp_path_factory.mktemp("colab")
    venv.create(place / "python", with_pip=False)
    python = place / "python" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True)
    site = Path(asked.stdout.strip())
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").write_text("")
    # all that is installed here is there too, pip included; what is installed there stays there
    (site / "here.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )

    wheels = place / "wheels"
    wheels.mkdir()
    wheel(wheels, TINY, "1.0", needs=["torch"])
    wheel(wheels, TINY, "2.0", needs=["torch>=99"])
    wheel(wheels, "torch", "99.0")  # what pip must not take

    served = place / "served"
    shutil.copytree(ROOT / "lib", served / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data" / "results", served / "data" / "results")
    wanted = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    (served / "requirements.txt").write_text(f"{wanted}{TINY}==1.0  # made up\n", encoding="utf-8")
    git(served, "init", "-q")
    git(served, "add", ".")
    git(served, "commit", "-q", "-m", "served")

    hidden = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "GIT_")) and name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    there = hidden | {
        "MUSIC_REPO": served.as_uri(),
        "MUSIC_QUICK": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }
    return python, there, served


def lone_copies(folder, names):
    books = []
    for name in names:
        (folder / name).mkdir()
        books.append(shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / name))
    return [str(book) for book in books]


def run_first_cells(pretended, books, **changed):
    python, there, _ = pretended
    return subprocess.run(
        [str(python), "-c", DRIVER, *books],
        env=there | changed,
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_each_notebook_starts_alone_twice_and_leaves_torch(pretended, tmp_path):
    names = env.notebook_names()
    done = run_first_cells(pretended, lone_copies(tmp_path, names))
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [
        json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("REPORT")
    ]
    assert len(reports) == len(names)
    for number, (name, report) in enumerate(zip(names, reports)):
        assert report["there"] == [f"{name}.ipynb", "course"]
        assert Path(report["lib"]) == Path(report["root"]) / "lib" / "env" / "__init__.py"
        assert Path(report["root"]).resolve() == (tmp_path / name / "course").resolve()
        assert report["quick"] is True
        # torch: the same version before and after, and it is the one that runs this test
        assert report["torch_before"] == report["torch_after"] == version("torch")
        # the first notebook really lacked a package and really got it; the others found it there
        assert report["before"] == (None if number == 0 else "1.0") and report["after"] == "1.0"
        assert ("installing a package" in report["said"][0]) is (number == 0)
        assert "installing" not in report["said"][1] and "quick run" in report["said"][1]


def test_what_wants_another_torch_fails_in_one_sentence(pretended, tmp_path):
    """Pip has such a torch at hand, and would take it without the constraint."""
    python, there, served = pretended
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", served.as_uri(), str(other))
    text = (other / "requirements.txt").read_text(encoding="utf-8")
    (other / "requirements.txt").write_text(
        text.replace(f"{TINY}==1.0", f"{TINY}==2.0"), encoding="utf-8"
    )
    git(other, "commit", "-q", "-am", "wants another torch")
    books = lone_copies(tmp_path, env.notebook_names()[:1])
    done = run_first_cells(pretended, books, MUSIC_REPO=other.as_uri())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("pip could not install what the course needs (")
    ask = "from importlib.metadata import version; print(version('torch'))"
    assert subprocess.check_output(
        [str(python), "-c", ask], env=there, text=True
    ).strip() == version("torch")


@pytest.mark.parametrize("missing", ["repository", "git"])
def test_no_way_to_the_repository_is_one_sentence(pretended, tmp_path, missing):
    books = lone_copies(tmp_path, env.notebook_names()[:1])
    nowhere = (tmp_path / "nowhere").as_uri()
    changed = {"MUSIC_REPO": nowhere} if missing == "repository" else {"PATH": str(tmp_path)}
    done = run_first_cells(pretended, books, **changed)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("git could not fetch the course from ") and "check the network" in last
    assert os.listdir(Path(books[0]).parent) == [Path(books[0]).name]


def test_no_package_index_is_one_sentence(pretended, tmp_path):
    python, there, _ = pretended
    subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", TINY], env=there, check=True)
    done = run_first_cells(
        pretended, lone_copies(tmp_path, env.notebook_names()[:1]), PIP_FIND_LINKS=""
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (
        f"No matching distribution found for {TINY}==1.0" in done.stderr
        and "run this cell again" in done.stderr
    )


# ---- what counts as missing


@pytest.fixture
def asked(monkeypatch):
    """What pip would have been asked to do: nothing is installed."""
    calls = []

    def run(command, **_):
        keep = Path(command[command.index("--constraint") + 1]).read_text()
        calls.append((command, keep))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    return calls


def test_only_what_is_missing_is_installed_and_torch_is_pinned(asked, monkeypatch):
    lines = [
        ("numpy>=1", "there"),
        ("no-such-thing==3", "missing"),
        ("torch<0.1", "too new"),
        ("pytest>=99", "tests"),
    ]
    monkeypatch.setattr(install, "requirements", lambda: lines)
    said = []
    install.install_missing(said.append)
    ((command, keep),) = asked
    assert (
        command[-1] == "no-such-thing==3"
        and "torch<0.1" not in command
        and "pytest>=99" not in command
    )
    assert f"torch=={version('torch')}\n" in keep
    assert said[0].endswith("was not tested, <0.1 was; it is left as it is") and said[0].startswith(
        "torch "
    )
    assert said[1].startswith("installing a package")


def test_nothing_missing_nothing_done(asked, monkeypatch):
    monkeypatch.setattr(install, "requirements", lambda: [("numpy>=1", "there")])
    install.install_missing(pytest.fail)
    assert not asked


def test_a_machine_without_packaging_still_finds_out(monkeypatch):
    def no_packaging(*_):
        raise UserError("packaging is missing")

    monkeypatch.setattr(install, "check", no_packaging)
    monkeypatch.setattr(
        install,
        "requirements",
        lambda: [("numpy>=1", ""), ("no-such-thing==3", ""), ("torch>99", "")],
    )
    assert install.missing() == ["no-such-thing==3"]


def test_a_package_replaced_while_loaded_asks_for_a_restart(asked, monkeypatch):
    monkeypatch.setattr(install, "requirements", lambda: [("no-such-thing==3", "missing")])
    versions = iter([{"numpy": "1.26", "pip": "1"}, {"numpy": "2.4", "pip": "1"}])
    monkeypatch.setattr(install, "_loaded", lambda: next(versions))
    with pytest.raises(UserError, match="^numpy was replaced .* restart the kernel"):
        install.install_missing(lambda _: None)


def test_what_is_loaded_has_its_version():
    import numpy

    assert install._loaded()["numpy"] == numpy.__version__


def test_what_is_never_installed_is_never_imported():
    """No notebook and no module of lib imports the packages that a lone notebook does without."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "lib").rglob("*.py")
        if path.name not in ("lone.py", "stamp.py", "teaching.py")
    ]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    words = {
        word
        for text in sources
        for line in text.splitlines()
        if line.lstrip().startswith(("import ", "from "))
        for word in line.replace(".", " ").split()[1:2]
    }
    assert {"numpy", "torch"} <= words and not words & set(install.NOT_NEEDED)


def test_pip_reason_is_the_last_error():
    text = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for x.\nnote\n"
    assert install.pip_reason(text) == "No matching distribution found for x"
    assert (
        install.pip_reason("") == "it gave no reason"
        and install.pip_reason("python: No module named pip") != ""
    )


# ---- the address


def test_the_address_stands_in_one_place():
    """In the code only in lib/lab/pages/address.py; in notebooks and README only as stamped."""
    for path in [
        *ROOT.glob("lib/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("notebooks/*.py"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert text.count(address.REPOSITORY) == (path.name == "address.py"), path.name
    assert address.REPOSITORY in address.first_cell()


def test_a_fork_is_stamped_everywhere(monkeypatch):
    monkeypatch.setattr(address, "REPOSITORY", "https://github.com/ada/piano.git")
    name = env.notebook_names()[0]
    old = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    new = stamp.notebook(old, name)
    assert (
        new.count("https://github.com/ada/piano.git") == 1
        and new.count("/github/ada/piano/blob/main/") == 1
    )
    assert stamp.notebook(new, name) == new
    outputs = [[cell.get("outputs") for cell in json.loads(text)["cells"]] for text in (old, new)]
    assert outputs[0] == outputs[1]
    readme = stamp.readme((ROOT / "README.md").read_text(encoding="utf-8"))
    assert readme.count("/github/ada/piano/blob/main/") == len(env.notebook_names())


def test_colab_opens_from_github_only(monkeypatch):
    monkeypatch.setattr(address, "REPOSITORY", "https://example.org/ada/piano")
    with pytest.raises(UserError, match="from GitHub only"):
        address.badge("00_tour")


def test_a_notebook_that_lost_its_first_cell_is_not_overwritten():
    import nbformat

    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# x"), nbformat.v4.new_code_cell("1 + 1")]
    )
    with pytest.raises(UserError, match="first code cell of 00_x.ipynb"):
        stamp.notebook(nbformat.writes(book), "00_x")


# ---- the check in earnest, its parts


def test_colab_check_knows_its_notebooks():
    assert colab_check.choose(["00", "07_mamba"]) == ["00_tour", "07_mamba"]
    assert colab_check.choose([]) == env.notebook_names()
    with pytest.raises(UserError, match="no notebook is called '77'"):
        colab_check.choose(["00", "77"])


def test_colab_check_stops_at_the_first_sound():
    import nbformat

    def cell(*html):
        outputs = [nbformat.v4.new_output("display_data", {"text/html": text}) for text in html]
        return nbformat.v4.new_code_cell("x", outputs=outputs)

    book = nbformat.v4.new_notebook(
        cells=[cell(), cell("<img>"), cell("<p>", "<audio controls>"), cell("<audio>")]
    )
    cut, plays = colab_check.to_first_sound(book)
    assert plays and len(cut.cells) == 3
    silent, plays = colab_check.to_first_sound(nbformat.v4.new_notebook(cells=[cell("<img>")]))
    assert not plays and len(silent.cells) == 1


def test_colab_minutes_name_notebooks_and_keep_torch():
    found = env.read_results("colab")
    assert set(found) <= set(env.notebook_names())
    for entry in found.values():
        assert (
            entry["torch_before_and_after"] and entry["run"]["device"] and entry["run"]["command"]
        )
        assert (
            entry.get("minutes_to_first_sound", entry.get("minutes_to_the_end"))
            >= entry["minutes_of_first_cell"]
        )
