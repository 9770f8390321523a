"""A claim about lib.generate: a prompt may be called anything,
and the terminal may know few letters.
"""

import os
import subprocess
import sys

import pytest

from lib.env.paths import ROOT
from lib.music.notes import Music, make_notes, write_midi


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
def test_a_prompt_may_be_called_anything(tmp_path):
    """Bytes that are no UTF-8, two dollars, letters that no font here has,
    on a terminal of ASCII.
    """
    stem = os.fsdecode(b"F\xfcr $x_$ " + "\u3042".encode())
    write_midi(Music(make_notes([0], [1], [60], [80])), tmp_path / f"{stem}.mid")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lib.generate", "--prompt", f"{stem}.mid", "--seconds", "0.5"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Warning" not in done.stderr
        and "F\\udcfcr $x_$ \\u3042-seed1.mid, .mp3 and .png" in done.stdout
    )
    played = {path.name for path in (tmp_path / "out").iterdir()}
    assert played == {f"{stem}-seed1{kind}" for kind in (".mid", ".mp3", ".png")}
