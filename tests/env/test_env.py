"""lib.env: what the machine has, said in words; a start that is the same every time."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch

from lib.env import __main__ as command
from lib.env import install
from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.machine import command_line
from lib.env.paths import ROOT

spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


# ---- requirements


def test_a_reference_kernel_that_was_built_without_cuda_is_said(monkeypatch):
    monkeypatch.setattr(install, "version", lambda name: "9")
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in install.optional_kernels()
    monkeypatch.setattr(install, "find_spec", lambda name: name)
    assert "as a reference only" in install.optional_kernels()


def test_every_requirement_has_a_reason():
    pairs = install.requirements()
    assert len(pairs) > 10
    assert all(len(reason.split()) >= 2 for _, reason in pairs), pairs


def test_music_libraries_are_pinned_and_torch_is_a_range():
    wanted = {w.split(">")[0].split("=")[0]: w for w, _ in install.requirements()}
    for name in ("muspy", "miditok", "symusic", "midirenderer", "pretty_midi"):
        assert "==" in wanted[name]
    assert wanted["torch"].endswith(",<2.14") and ">=" in wanted["torch"]
    assert 'sys_platform == "linux"' in wanted["triton"]


@pytest.mark.skipif(not os.environ.get("CI"), reason="CI installs exactly requirements.txt")
def test_a_fresh_installation_has_every_requirement():
    assert [
        c.text for c in map(install.check, (w for w, _ in install.requirements())) if not c.ok
    ] == []


def test_check_says_what_to_do(monkeypatch):
    assert install.check("numpy>=1", "arrays").ok
    assert install.check('numpy==0; sys_platform == "none"').ok
    missing = install.check("no-such-package-here>=2,<3", "nothing")
    assert not missing.ok and 'pip install "no-such-package-here<3,>=2"' in missing.text
    monkeypatch.setattr(install, "version", lambda name: "2.15.0")
    newer = install.check("torch>=2.8,<2.14", "the model")
    assert not newer.ok and "torch 2.15.0 was not tested" in newer.text
    monkeypatch.setattr(install, "version", lambda name: "2.13.0+cpu")
    assert install.check("torch>=2.8,<2.14").ok


def test_importing_env_is_light():
    heavy = "torch numpy muspy miditok symusic matplotlib IPython tokenizers".split()
    code = f"import sys, lib.env; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_report_names_what_is_missing(monkeypatch):
    lines = []
    monkeypatch.setattr(command, "requirements", lambda: [("no-such-package-here", "nothing")])
    assert command.report(say=lines.append) is False
    text = "\n".join(lines)
    assert "FIX   no-such-package-here is missing" in text
    assert "precision" in text and "minutes" in text


def test_report_survives_a_broken_torch(monkeypatch):
    def broken():
        raise OSError("libtorch.so: cannot open\nmore")

    lines = []
    monkeypatch.setattr(command, "choose_device", broken)
    command.report(say=lines.append)
    assert any("torch does not start (libtorch.so: cannot open)" in line for line in lines)


def test_command_line_in_plain_words(capsys, monkeypatch):
    monkeypatch.setattr(command, "requirements", lambda: [("numpy>=1", "arrays")])
    command.main([])
    out = capsys.readouterr().out
    assert out.count("OK  ") == 2 and "FIX" not in out  # Python and numpy
    assert "device" in out and "precision" in out and "full run, quick run" in out
    monkeypatch.setattr(command, "requirements", lambda: [("numpy>=1", "arrays"), ("numpy<1", "")])
    with pytest.raises(SystemExit, match="1"):
        command.main([])
    assert "FIX   numpy" in capsys.readouterr().out


def test_old_python_is_one_sentence(monkeypatch):
    monkeypatch.setattr(env, "OLDEST_PYTHON", (9, 9))
    with pytest.raises(UserError, match="needs 9.9 or newer"):
        env.start()


# ---- device and precision


@pytest.mark.parametrize(
    "capability, precision",
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_bf16_only_from_capability_8(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    device, chosen, why = env.choose_device()
    assert (device, chosen) == ("cuda", precision)
    assert f"{capability[0]}.{capability[1]}" in why


def test_cpu_computes_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert env.choose_device()[:2] == ("cpu", "fp32")
    assert env.device_name().startswith("CPU, ")


# ---- start


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_start_sets_every_seed_and_may_run_twice(capsys):
    env.start(seed=3)
    first = draws()
    env.start(seed=3)
    assert draws() == first
    env.start(seed=4)
    assert all(a != b for a, b in zip(draws(), first))
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    "value, quick", [("1", True), ("true", True), ("0", False), ("", False), (None, False)]
)
def test_quick_or_full(monkeypatch, capsys, value, quick):
    monkeypatch.delenv("MUSIC_QUICK", raising=False)
    if value is not None:
        monkeypatch.setenv("MUSIC_QUICK", value)
    assert env.start().quick is quick
    out = capsys.readouterr().out
    assert ("quick run" in out) is quick and ("full run" in out) is not quick
    assert f"python {sys.version_info.major}.{sys.version_info.minor}" in out


def test_the_tests_run_the_notebooks_quickly():
    if os.environ.get("MUSIC_QUICK") == "0":
        pytest.skip("the full run was asked for")
    assert env.is_quick()


@pytest.mark.parametrize(
    "minutes, device, words",
    [
        (0.3, None, "full run (under a minute)"),
        (1.2, None, "full run (about a minute)"),
        (7.4, None, "full run (about 7 minutes)"),
        (7.4, "a slow card", "full run (about 7 minutes on a slow card)"),
    ],
)
def test_start_says_how_long_it_takes(monkeypatch, tmp_path, capsys, minutes, device, words):
    entry = {"full_minutes": minutes, "full_run": {"device": device or env.device_name()}}
    (tmp_path / "notebooks.json").write_text(json.dumps({"00_tour": entry}))
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    monkeypatch.setenv("MUSIC_QUICK", "0")
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/notebooks/00_tour.ipynb")
    monkeypatch.delenv("MUSIC_NOTEBOOK", raising=False)
    env.start()
    assert capsys.readouterr().out.rstrip().endswith(words)


# ---- results and files


def test_provenance_names_device_versions_command_seed():
    found = env.provenance("python x.py", seed=5)
    assert found["command"] == "python x.py" and found["seed"] == 5 and found["device"]
    assert {"python", "torch", "numpy"} <= set(found["versions"])


# ---- notebooks/execute.py


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A made-up notebooks folder and results folder."""
    monkeypatch.setattr(execute, "FOLDER", tmp_path)
    monkeypatch.setattr(env, "RESULTS", tmp_path / "results")
    for name in ("MUSIC_QUICK", "MUSIC_NOTEBOOK"):
        monkeypatch.setenv(name, "1")  # so that they come back as they were
    return tmp_path


def write_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


NOISY = """import os, sys
from tqdm import tqdm
for i in tqdm(range(3)): pass
print("quick" if os.environ.get("MUSIC_QUICK") else "full", os.environ["MUSIC_NOTEBOOK"])"""


def test_execute_runs_cleans_and_measures(folder, capsys):
    path = folder / "00_tour.ipynb"
    write_notebook(path, NOISY, "1 + 1")
    execute.main(["00", "--quick"])
    assert nbformat.read(path, 4).cells[0].execution_count is None  # quick: not written back
    execute.main(["00_tour"])
    book = nbformat.read(path, 4)
    assert [c["metadata"] for c in book.cells] == [{}, {}]
    assert [o.get("text") for o in book.cells[0].outputs] == ["full 00_tour\n"]
    measured = json.loads((folder / "results" / "notebooks.json").read_text())["00_tour"]
    assert set(measured) == {"full_minutes", "full_run", "quick_minutes", "quick_run"}
    assert measured["quick_run"]["command"] == "python notebooks/execute.py 00_tour --quick"
    assert sorted(p.name for p in folder.iterdir()) == ["00_tour.ipynb", "results"]


def test_execute_drops_progress_bars_and_nothing_else():
    bars = "  0%|          | 0/3 [00:00<?, ?it/s]\r100%|###| 3/3 [00:01<00:00, 9.1it/s]\n"
    bars += "note: 12it [01:02:03, 4.5it/s]\n"
    assert execute.final_text(bars, drop_bars=True) == ""
    warning = "python3.11/site-packages/x.py:21: UserWarning: 50% [12] of 3/s\n"
    assert execute.final_text(bars + warning, drop_bars=True) == warning
    assert execute.final_text("a\rb\r\nc\n", drop_bars=False) == "b\nc\n"


def test_printed_text_is_put_together_wherever_it_was_cut():
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    outputs = [
        stream("stdout", "a\n"),
        stream("stdout", "b\n"),
        stream("stderr", "c"),
        stream("stdout", "d"),
    ]
    assert [(out.name, out.text) for out in execute.joined(outputs)] == [
        ("stdout", "a\nb\n"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_execute_writes_nothing_when_a_cell_fails(folder):
    path = folder / "01_bad.ipynb"
    write_notebook(path, "raise ValueError('no such piece')")
    before = path.read_bytes()
    with pytest.raises(UserError, match="01_bad.ipynb stopped .ValueError: no such piece"):
        execute.main(["01"])
    assert path.read_bytes() == before and not (folder / "results").exists()


def test_execute_explains_wrong_names_and_files(folder):
    with pytest.raises(UserError, match="no notebooks"):
        execute.main([])
    (folder / "02_x.ipynb").write_text("{ not a notebook")
    with pytest.raises(UserError, match="no notebook is called '77'"):
        execute.main(["77"])
    with pytest.raises(UserError, match="02_x.ipynb is not a notebook"):
        execute.main(["02"])


def test_a_command_is_kept_without_the_paths_of_one_machine(tmp_path):
    words = "python", "-m", "lib.lab.bench", "--out", str(tmp_path / "a b"), "--lengths", "64,128"
    assert command_line(*words) == "python -m lib.lab.bench --out 'a b' --lengths 64,128"
    assert (
        command_line(f"--result={tmp_path}/b.json", "data/x.json") == "--result=b.json data/x.json"
    )
