"""A thousand damaged inputs: each ends in music or in one sentence, fast, with nothing left behind.

The inputs are walked in a process of its own, so that a crash of a C++ library fails the test and
not the test run. By hand, at a larger scale:  python tests/music/test_fuzz.py 20000 [SEED]
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from lib.env.errors import UserError  # noqa: E402
from lib.music.midi import read_events  # noqa: E402
from lib.music.notes import (  # noqa: E402
    MAX_SECONDS,
    NOTE,
    Music,
    crop,
    make_notes,
    read_midi,
    sustain,
    write_midi,
)

COUNT, SEED = 1000, 0
CPU_SECONDS = 10.0  # of a slow processor, for one input through one target
MEGABYTES = 2000  # peak of the whole process


# --- what every input goes through ----------------------------------------------------------


def valid(music: Music) -> None:
    """The promises of `Music`."""
    notes, pedal = music.notes, music.pedal
    assert notes.dtype == NOTE and len(notes)
    assert np.isfinite(notes["start"]).all() and (notes["start"] >= 0).all()
    assert (notes["end"] >= notes["start"]).all() and (notes["end"] < MAX_SECONDS).all()
    assert (np.diff(notes["start"]) >= 0).all()
    assert ((notes["pitch"] >= 21) & (notes["pitch"] <= 108)).all()
    assert ((notes["velocity"] >= 1) & (notes["velocity"] <= 127)).all()
    assert pedal.ndim == 2 and pedal.shape[1] == 2 and np.isfinite(pedal).all()
    assert (pedal[:, 0] <= pedal[:, 1]).all() and (np.diff(pedal.ravel()) >= 0).all()
    assert 0 <= music.seconds <= MAX_SECONDS


def read(path: Path, _: Path) -> None:
    music = read_midi(path)
    valid(music)
    ringing = sustain(music)
    valid(ringing)
    assert len(ringing.notes) == len(music.notes) and not len(ringing.pedal)
    part = crop(music, 1.0, 5.0)
    if len(part.notes):
        valid(part)
        assert part.notes["start"].max() < 4.0


def write_back(path: Path, folder: Path) -> None:
    music = read_midi(path)
    write_midi(music, folder / "again.mid")
    again = read_midi(folder / "again.mid")
    valid(again)
    assert len(again.notes) == len(music.notes)
    assert np.abs(again.notes["start"] - music.notes["start"]).max() < 0.001  # half a tick, 0.52 ms


def tokens(path: Path, _: Path) -> None:
    """Notes to tokens and back; a piece of hours is cut, as a prompt would be."""
    music = crop(read_midi(path), 0, 600)
    back = tokens.tokenizer.decode(tokens.tokenizer.encode(music))
    assert len(back.notes) <= len(music.notes)
    assert len(back.notes) > 0 or not len(music.notes)


def play(path: Path, folder: Path) -> None:
    """The command that continues a file: three files, whole, or one sentence and none."""
    from lib.generate.player import generate

    music = generate(*play.model, read_midi(path), prompt_seconds=2, seconds=0.3, seed=1)
    write_midi(music, folder / "played.mid")
    valid(read_midi(folder / "played.mid"))


# HOOK: name, function(path of the input, an empty folder to write into), every how many inputs.
# A function may raise `UserError` and nothing else; what it writes must be whole.
TARGETS: list[tuple[str, Callable[[Path, Path], None], int]] = [
    ("read", read, 1),
    ("write_back", write_back, 4),
    ("tokens", tokens, 2),
    ("play", play, 3),
]


# --- the inputs -----------------------------------------------------------------------------

FOREIGN = [
    b"",
    b"\0",
    b"M",
    b"MThd",
    b"MThd\0\0\0\6",
    b"MThd\0\0\0\6\0\0\0\1\1\xe0",
    b"\xff" * 100,
    b"MThd\0\0\0\6\0\1\xff\xff\1\xe0MTrk\xff\xff\xff\xff\0\x90\x40\x40",
    b"RIFF\x24\0\0\0WAVEfmt ",
    b"MThd\0\0\0\6\0\0\0\1\0\0MTrk\0\0\0\4\0\xff\x2f\0",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"MThd\0\0\0\6\0\0\0\1\xe7\x28MTrk\0\0\0\4\0\xff\x2f\0",
    b"PK\3\4" + bytes(60),
    b"\x7fELF\2\1",
    "Für Elise, for piano".encode(),
    "MThd für Elise".encode("utf-16"),
    b"<html>404</html>",
    b'{"notes": []}',
    b"%PDF-1.7",
    b"\x1f\x8b\x08\0" + bytes(20),
    b"ID3\4\0\0",
    b"OggS" + bytes(30),
    b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\x0c\0\x99\x40\x40\x60\x89\x40\0\0\xff\x2f\0",  # drums
]


def good_files(folder: Path) -> list[bytes]:
    """MIDI bytes that we write ourselves, and the two shortest of the sample where it is here."""
    rng, made = np.random.default_rng(0), []
    for count in (1, 12, 300):
        start = np.sort(rng.uniform(0, 0.3 * count, count))
        notes = make_notes(
            start,
            start + rng.uniform(0.02, 2, count),
            rng.integers(21, 109, count),
            rng.integers(1, 128, count),
        )
        pedal = np.sort(rng.uniform(0, 0.3 * count, (count // 4, 2)).ravel()).reshape(-1, 2)
        write_midi(Music(notes, pedal), folder / "good.mid")
        made.append((folder / "good.mid").read_bytes())
    sample = (ROOT / "data" / "maestro-sample").glob("*.mid")
    return made + sorted((p.read_bytes() for p in sample), key=len)[:2]


def number(value: int) -> bytes:
    """A MIDI variable-length number."""
    out = bytes([value & 127])
    while value := value >> 7:
        out = bytes([value & 127 | 128]) + out
    return out


def unusual(rng: random.Random) -> bytes:
    """MIDI that is whole, or nearly, and that nobody would write."""
    tracks = rng.choice([0, 1, 1, 2, 9])
    claimed = tracks if rng.random() < 0.8 else rng.randrange(20)
    out = b"MThd\0\0\0\6" + bytes([0, rng.choice([0, 1, 1, 2]), 0, claimed])
    out += rng.choice([1, 96, 480, 32767]).to_bytes(2)
    for _ in range(tracks):
        body, run, keys = b"", 0, [rng.randrange(128) for _ in range(3)]
        for _ in range(rng.choice([0, 1, 5, 100])):
            body += number(rng.choice([0, 0, 1, 60, 480, 2**21 if rng.random() < 0.05 else 9]))
            kind = rng.random()
            if kind < 0.2:
                meta = rng.choice([1, 3, 5, 6, 0x51, 0x58, 0x59, 0x54, 0x7F, rng.randrange(128)])
                size = rng.choice([0, 1, 2, 3, 4, 5, 6, 150])
                body += b"\xff" + bytes([meta]) + number(size) + rng.randbytes(size)
            elif kind < 0.23:
                size, run = rng.choice([0, 1, 150]), 0
                body += b"\xf0" + number(size) + rng.randbytes(size)
            else:
                status = rng.choice([0x80, 0x90, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0])
                status |= rng.choice([0, 0, 0, 0, 1, 9, 15])
                status = run if run and rng.random() < 0.3 else status
                body += b"" if status == run and rng.random() < 0.7 else bytes([status])
                run = status
                body += bytes([64 if status & 0xF0 == 0xB0 else rng.choice(keys)])
                body += b"" if status & 0xE0 == 0xC0 else bytes([rng.choice([0, 64, 127])])
        body += b"\0\xff\x2f\0" if rng.random() < 0.8 else b""
        out += b"XFIH\0\0\0\3abc" if rng.random() < 0.1 else b""
        out += b"MTrk" + len(body).to_bytes(4) + body
    return out + (rng.randbytes(rng.randrange(12)) if rng.random() < 0.2 else b"")


def damaged(good: list[bytes], seed: int, index: int) -> bytes:
    """Input number `index`: truncated, flipped, overwritten, cut, stuffed, spliced, foreign …"""
    rng = random.Random(f"{seed} {index}")
    if index < len(FOREIGN):
        return FOREIGN[index]
    data, kind = bytearray(rng.choice(good)), rng.randrange(11)
    at, many = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 64])
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(many):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(many):
            where = rng.randrange(min(len(data), rng.choice([40, 300, 10**9])))
            data[where] = rng.choice([0, 255, 127, 128, rng.randrange(256)])
    elif kind == 3:
        del data[at : at + rng.randrange(1, 60)]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.randrange(1, 60))
    elif kind == 5:
        return bytes(data[:at]) + rng.choice(good)[rng.randrange(1, 60) :]
    elif kind == 6:
        body = rng.randbytes(rng.randrange(300))
        return b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk" + rng.choice([len(body), 9999]).to_bytes(4) + body
    elif kind <= 8:  # a low bit or two: most of these are still music, another one
        for _ in range(min(many, 2)):
            data[rng.randrange(22, len(data))] ^= 1 << rng.randrange(6)
    else:
        return unusual(rng)
    return bytes(data)


# --- the process that walks them ------------------------------------------------------------


class TooSlow(BaseException):
    """Not an `Exception`, so that no handler takes it for a damaged file."""


def ring(*_) -> None:
    raise TooSlow


def walk(count: int, seed: int, home: Path) -> dict:
    """Every input through every target; the last index is on the disk in case we crash."""
    from lib.generate.player import load_model
    from lib.mamba.model import MambaConfig, MambaLM
    from lib.music.tokens import Tokenizer

    _, shipped = load_model()
    # what a model plays is no matter here: a small one that knows nothing,
    # with the tokens of the shipped one
    model = MambaLM(MambaConfig(shipped.vocab_size, d_model=16, n_layer=1, d_state=2)).eval()
    tokens.tokenizer, play.model = Tokenizer(), (model, shipped)  # made once, outside the clock
    good, outcomes, failures, slowest = good_files(home), {}, [], 0.0
    path, out = home / "input.mid", home / "out"
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, ring)
    for index in range(count):
        path.write_bytes(damaged(good, seed, index))
        for name, target, every in TARGETS:
            if index % every:
                continue
            out.mkdir()
            (home / "last").write_text(f"input {index} of seed {seed}, target {name}")
            begin, outcome = time.process_time(), "music"
            try:
                if hasattr(signal, "setitimer"):  # processor time: a busy machine is no fault
                    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                target(path, out)
            except UserError as error:
                outcome = str(error).replace(str(path), "FILE")
                if "\n" in outcome or list(out.iterdir()):
                    failures.append(f"input {index}, {name}: {outcome!r}, {list(out.iterdir())}")
            except BaseException as error:  # noqa: BLE001  what must never come out
                failures.append(f"input {index}, {name}: {error!r}")
            finally:
                if hasattr(signal, "setitimer"):
                    signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - begin)
            for left in out.iterdir():
                if left.suffix in (".part", ".tmp"):
                    failures.append(f"input {index}, {name}: {left.name} is left behind")
                left.unlink()
            out.rmdir()
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    left = {p.name for p in home.iterdir()} - {"good.mid", "input.mid", "last"}
    if left:
        failures.append(f"left beside the input: {left}")
    return {
        "outcomes": outcomes,
        "failures": failures[:20],
        "slowest": slowest,
        "megabytes": peak(),
    }


def peak() -> float:
    """Peak memory of this process in MB, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else SEED
    with tempfile.TemporaryDirectory() as home:
        print(json.dumps(walk(count, seed, Path(home)), indent=1, ensure_ascii=False))


# --- the tests ------------------------------------------------------------------------------


def test_thousand_damaged_inputs_end_in_music_or_a_sentence(tmp_path):
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path;"
        "import test_fuzz as t;print(json.dumps(t.walk(t.COUNT, t.SEED, Path(sys.argv[3]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    last = (tmp_path / "last").read_text() if (tmp_path / "last").exists() else "the start"
    assert done.returncode == 0, f"the process ended at {last}: {done.stderr[-1500:]}"
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert result["outcomes"]["music"] > 100, "the fuzz also reaches what lies behind the reader"
    assert len(result["outcomes"]) >= 5, "and every kind of refusal"
    assert result["slowest"] < CPU_SECONDS and result["megabytes"] < MEGABYTES


def track(body: bytes, *, end: bytes = b"\0\xff\x2f\0", size: int | None = None) -> bytes:
    """A file with one track."""
    body += end
    length = (len(body) if size is None else size).to_bytes(4)
    return b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk" + length + body


NOTE_ON_OFF = b"\0\x90\x40\x40\x60\x80\x40\0"
# each of these ended the process, read foreign memory or asked for gigabytes in symusic 0.5.9
TRAPS = {
    "key 200": track(b"\0\x9f\xc8\xc8\x60\x8f\xc8\0"),
    "cut in an event": track(NOTE_ON_OFF + b"\0\x90", end=b""),
    "cut in a time": track(NOTE_ON_OFF + b"\x81", end=b""),
    "cut in a text": track(NOTE_ON_OFF + b"\0\xff\1\x90", end=b""),
    "endless track": track(NOTE_ON_OFF, size=0xFFFFFFF0),
    "nothing to run on": track(b"\0\x40\x40" + NOTE_ON_OFF),
    "running on after system exclusive": track(NOTE_ON_OFF + b"\0\xf0\1\x41\0\x40\x40"),
    "a time of five bytes": track(b"\x81\x80\x80\x80\0\x90\x40\x40" + NOTE_ON_OFF),
    "no ticks a quarter": track(NOTE_ON_OFF).replace(b"\1\xe0", b"\0\0"),
    "half a track behind": track(NOTE_ON_OFF).replace(b"\0\1\1\xe0", b"\0\2\1\xe0") + b"MT",
}
WHOLE = {  # and these too, though a player plays them
    "a tempo of one byte": track(b"\0\xff\x51\1\7" + NOTE_ON_OFF),
    "no tempo at all": track(b"\0\xff\x51\3\0\0\0" + NOTE_ON_OFF),
    "ticks past 31 bits": track(NOTE_ON_OFF + b"\xff\xff\xff\x7f\xb0\x40\x40" * 9),
    "film frames": track(NOTE_ON_OFF).replace(b"\1\xe0", b"\xe7\x28"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap):
    with pytest.raises(ValueError, match="^its "):
        read_events(TRAPS[trap])


@pytest.mark.parametrize("trap", WHOLE)
def test_a_trap_that_is_music_is_read(tmp_path, trap):
    (tmp_path / "x.mid").write_bytes(WHOLE[trap])
    assert read_midi(tmp_path / "x.mid").notes["pitch"].tolist() == [64]


def monster(kind: str, size: int) -> bytes:
    """A file of `size` bytes that is as hard to read as such a file can be."""
    body = {
        "strokes that are never released": b"\0\x90\x40\x40" + b"\0\x40\x40" * (size // 3),
        "strokes, then their releases": b"\0\x90\x40\x40"
        + b"\0\x40\x40" * (size // 6)
        + b"\0\x40\0" * (size // 6),
        "every key on every channel": b"".join(
            bytes((0, 0x90 | i % 16, i // 16 % 128, 64)) for i in range(size // 4)
        ),
        "a pedal that never rests": b"\0\x90\x40\x40\0\xb0\x40\x40"
        + b"\0\x40\0\0\x40\x40" * (size // 6),
        "pedals on every channel": b"".join(
            bytes((0, 0xB0 | i % 16, 64, 127 * (i // 16 % 2))) for i in range(size // 4)
        ),
        "silences": b"\0\x90\x40\x40\0\xb0\x7b\0" + b"\0\x7b\0" * (size // 3),
        "programs": b"\0\xc0\0" + b"\0\0" * (size // 2),
        "empty texts": b"\0\xff\1\0" * (size // 4),
        "tempos": b"\0\xff\x51\3\7\xa1\x20" * (size // 7),
        "kinds in turn": b"\0\xc0\0\0\x90\x40\x40" * (size // 7),
        "real time": b"\0\xf8" * (size // 2),
    }
    if kind == "tracks":
        return b"MThd\0\0\0\6\0\1\xff\xff\1\xe0" + (b"MTrk\0\0\0\4\0\x90\x40\x40" * 65535)[:size]
    return track(NOTE_ON_OFF + body[kind])


MONSTERS = [
    "strokes that are never released",
    "strokes, then their releases",
    "every key on every channel",
    "a pedal that never rests",
    "pedals on every channel",
    "silences",
    "programs",
    "empty texts",
    "tempos",
    "kinds in turn",
    "real time",
    "tracks",
]


@pytest.mark.parametrize("kind", MONSTERS)
def test_time_grows_with_the_bytes_and_not_with_their_square(tmp_path, kind):
    """At a tenth of the largest size that is read: no loop over a loop hides in the reader."""
    (tmp_path / "x.mid").write_bytes(monster(kind, 1_000_000))
    begin = time.process_time()
    assert len(read_midi(tmp_path / "x.mid").notes)
    assert time.process_time() - begin < CPU_SECONDS


if __name__ == "__main__":
    main()
