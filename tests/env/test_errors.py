"""Claims about lib.env.errors and lib.env.files: a command ends in words, on any terminal,
with any name.
"""

import json
import os
import signal
import subprocess
import sys

import pytest

from lib.env.errors import UserError, cli
from lib.env.files import write_json, write_text
from lib.env.paths import ROOT

LATIN = os.fsdecode(b"F\xfcr Elise")  # a name that was written on a machine of another time


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=os.environ | environment
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=str,
)
def test_what_a_terminal_cannot_show_is_escaped(environment):
    code = (
        "from lib.env.errors import UserError, cli\n"
        f"def main(argv):\n    print({LATIN!r}, 'Pr\\u00e9lude')\n"
        f"    raise UserError({LATIN!r} + ' is no file')\n"
        "cli(main)"
    )
    done = run(code, **environment)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"F\\udcfcr Elise" in done.stdout and b"error: F\\udcfcr Elise is no file" in done.stderr


def test_a_sentence_stays_a_sentence_whatever_a_stranger_s_file_says():
    shown = str(UserError("a fact is " + "x" * 20_000_000 + "\x1b[31m\0: choose another"))
    assert len(shown) < 2100 and shown.startswith("a fact is xxx")
    assert shown.endswith("x\\x1b[31m\\x00: choose another") and "\x1b" not in shown
    assert str(UserError("Prélude ❄ are letters")) == "Prélude ❄ are letters"


def test_a_name_that_is_no_utf8_is_the_same_after_json(tmp_path):
    write_json(tmp_path / "a.json", {LATIN: [LATIN, "Pr\u00e9lude"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        LATIN: [LATIN, "Pr\u00e9lude"]
    }
    write_text(tmp_path / "a.txt", LATIN)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "F\\udcfcr Elise"


COMMANDS = [
    "lib.env",
    "lib.music",
    "lib.train",
    "lib.generate",
    "lib.lab.bench",
    "lib.lab.experiments",
    "lib.lab.judge",
    "lib.lab.pages",
    "lib.lab.release",
]


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows sends a signal to itself in another way"
)
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_still_importing_is_one_word(command, tmp_path):
    """It comes the moment a module that every command needs is looked for."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {command!r} + ".__main__" or name == "lib.env.errors":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
""")
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


def test_an_interruption_that_a_library_turned_into_an_error_is_still_one_word(capsys):
    def main(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import") from None

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            cli(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_an_error_that_nobody_asked_for_is_not_hidden():
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ZeroDivisionError):
            cli(lambda argv: 1 / 0)
    finally:
        signal.signal(signal.SIGINT, before)
