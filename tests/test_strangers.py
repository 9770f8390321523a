"""Claims about every file that a stranger may give:
it is used, or refused in one sentence, and soon.

Each kind of file is written, then spoilt in one place at a time: every fact of its JSON is taken
away or replaced by what it is not, every tensor by one of another kind, its header by one that
lies. All of it happens in a process of its own, so that a crash fails the test and not the test
run. The test opens every third file. All of them, by hand, with the counts for CONTRIBUTING.md:

    python tests/test_strangers.py
"""

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import wrong_facts  # noqa: E402
from made_up import TINY, make_streams, quiet, store  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lib.env.errors import UserError  # noqa: E402

SECONDS = 30.0  # of a slow processor, for one file: what hides a loop over a loop takes minutes
MEGABYTES = 2000  # peak of the process
SPOILT = Iterator[tuple[str, Callable[[], object]]]  # what was changed, and the work that meets it


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


# --- a kind of file each ------------------------------------------------------------------------


def checkpoints(home: Path) -> SPOILT:
    """A model's config.json, in two makers' names, and model.safetensors."""
    from lib.mamba import checkpoint
    from lib.mamba.config_schema import check_checkpoint
    from lib.mamba.model import MambaConfig, MambaLM

    checkpoint.save(MambaLM(MambaConfig(16, d_model=8, n_layer=1, d_state=2)), home)
    config, weights = home / "config.json", home / "model.safetensors"
    whole = weights.read_bytes()
    ours = json.loads(config.read_text())
    theirs = {
        "d_model": 8,
        "n_layer": 1,
        "vocab_size": 15,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }

    def use():
        check_checkpoint(home)
        model = checkpoint.load(home)
        return model(torch.tensor([[1, 2, 3]]))

    for description in (ours, theirs):
        write_text(config, json.dumps(description))
        yield "", use
        for what, text in wrong_facts.texts(description):
            write_text(config, text)
            yield what, use
    write_text(config, json.dumps(ours))
    tensors, notes = wrong_facts.opened(weights)
    for name in tensors:
        for what, changed in wrong_facts.spoilt(tensors, name):
            save_file(changed, weights, notes)
            yield what, use
    for what, data in wrong_facts.headers(whole):
        weights.write_bytes(data)
        yield what, use


def tokenizers(home: Path) -> SPOILT:
    """A model's tokens.json and tokenizer.json, with the merges in it."""
    from lib.music.notes import Music, make_notes
    from lib.music.tokens import TokenConfig, Tokenizer

    music = Music(
        make_notes(np.arange(0, 9, 0.5), np.arange(1, 10, 0.5), np.arange(60, 78), np.full(18, 60))
    )
    made = Tokenizer(TokenConfig(grid_ms=125, vocab_size=250, velocities=2))
    made.learn([made.encode_base(music)] * 3)
    made.save(home)
    settings, path = home / "tokens.json", home / "tokenizer.json"
    ours, theirs = json.loads(settings.read_text()), json.loads(path.read_text())
    model = json.loads(theirs["_model"])

    def use():
        found = Tokenizer.load(home)
        return found.decode(found.encode(music))

    yield "", use
    for what, text in wrong_facts.texts(ours):
        write_text(settings, text)
        yield what, use
    write_text(settings, json.dumps(ours))
    sizes = ["beat_res", "num_velocities", "special_tokens"]
    few = {**theirs, "config": {name: theirs["config"][name] for name in sizes}}
    for what, text in wrong_facts.texts(few):
        write_text(path, text)
        yield what, use
    for what, text in wrong_facts.texts(model):
        write_text(path, json.dumps({**few, "_model": text}))
        yield f"_model, {what}", use
    for name, value in asked_for():
        write_text(path, json.dumps({**theirs, "config": {**theirs["config"], name: value}}))
        yield f"config.{name}: {str(value)[:30]}", use
    known = model["model"]["vocab"]
    for what, change in {
        "a token of five million letters": {"vocab": known | {"!" * 5_000_000: len(known)}},
        "a million tokens": {"vocab": {f"t{i}": i for i in range(1_000_000)}},
        "a million merges": {"merges": [["!", "!"]] * 1_000_000},
        "a token too many": {"vocab": known | {"!!": len(known)}},
        "a gap": {"vocab": known | {"!!": 10**9}},
        "two tokens of one number": {"vocab": known | {"!!": 0}},
        "a merge of nothing": {"merges": [["", ""]]},
        "a merge of strangers": {"merges": [["x", "❄"]]},
    }.items():
        write_text(
            path,
            json.dumps(
                {**theirs, "_model": json.dumps({**model, "model": {**model["model"], **change}})}
            ),
        )
        yield what, use
    for size in (0, 5, 999, 9_999):
        path.write_bytes(json.dumps(theirs).encode()[:size])
        yield f"{size} bytes of it", use
    os.truncate(path, 300_000_000)
    yield "300 MB", use


def asked_for() -> Iterator[tuple[str, object]]:
    """Settings of MidiTok's that ask for a vocabulary of any size."""
    yield from (
        ("beat_res", {f"0_{beats}": steps})
        for beats, steps in ((1000, 1000), (10_000, 1000), (100_000_000, 1000), (2, 10**9), (2, -1))
    )
    yield from (
        ("pitch_range", [0, 10**7]),
        ("num_velocities", 10**9),
        ("nb_velocities", 10**9),
        ("nb_tempos", 10**9),
        ("special_tokens", ["a"] * 1_000_000),
        ("max_bar_embedding", 10**9),
        ("tempo_range", [1, 10**9]),
        ("num_tempos", 10**9),
        ("use_tempos", True),
        ("time_signature_range", {"8": list(range(1_000_000))}),
        ("chord_maps", {"x": [1] * 1_000_000}),
        ("max_pitch_interval", 10**8),
        ("beat_res_rest", {"0_9999": 9999}),
        ("programs", list(range(1_000_000))),
        ("control_change_n_bins", 10**9),
        ("vocab", 5),
        ("encode", None),
    )


def rivals(home: Path) -> SPOILT:
    """The checkpoint of another architecture."""
    from lib.lab.rivals import matched

    for arch in ("transformer", "hybrid"):  # which have every size that there is
        folder = home / arch
        matched.save(
            matched.build(arch, 16, matched.Size(d_model=32, n_layer=2, d_state=4)), folder
        )

        def use(folder=folder):
            return matched.load(folder)(torch.tensor([[1, 2, 3]]))

        yield "", use
        description = json.loads((folder / "config.json").read_text())
        for what, text in wrong_facts.texts(description):
            write_text(folder / "config.json", text)
            yield f"{arch}, {what}", use


def moments(home: Path) -> SPOILT:
    """A place in a piece that was saved with --keep-state."""
    from lib.generate import moment
    from lib.generate.player import Player, hear
    from lib.mamba.model import MambaConfig, MambaLM
    from lib.music.tokens import TokenConfig, Tokenizer

    tokenizer, path = Tokenizer(TokenConfig(grid_ms=62.5, vocab_size=None)), home / "x.safetensors"
    model = MambaLM(MambaConfig(tokenizer.vocab_size, d_model=8, n_layer=1, d_state=2)).eval()
    moment.save(
        hear(model, tokenizer, [tokenizer.bos, *tokenizer.base["Bar_None"] * np.ones(2, int)]),
        model,
        path,
    )

    def use():
        found = moment.load(path, model, tokenizer)
        player = Player(model, tokenizer, [found], [1 if found.seed is None else found.seed])
        return [player.step() for _ in range(5)]

    yield "", use
    whole, (tensors, notes) = path.read_bytes(), wrong_facts.opened(path)
    for name in tensors:
        for what, changed in wrong_facts.spoilt(tensors, name):
            save_file(changed, path, notes)
            yield what, use
    for name in notes:
        save_file(tensors, path, {k: v for k, v in notes.items() if k != name})
        yield f"no {name}", use
    save_file(tensors, path)
    yield "no metadata", use
    for what, text in wrong_facts.texts(json.loads(notes["facts"])):
        save_file(tensors, path, notes | {"facts": text})
        yield what, use
    for what, data in wrong_facts.headers(whole):
        path.write_bytes(data)
        yield what, use


def runs(home: Path) -> SPOILT:
    """A training run's folder, to go on from."""
    from lib.train import checkpoints as files
    from lib.train.config import FIXED
    from lib.train.trainer import Trainer

    streams, folder = make_streams(), home / "run"

    def started(optimizer: str):
        """A run at its first step, and the work that goes on from there."""
        shutil.rmtree(folder, ignore_errors=True)
        config = replace(TINY, steps=1, save_every=1, eval_every=1, optimizer=optimizer)
        Trainer(streams, config, folder, device="cpu", say=quiet).run(progress=False)

        def use():
            files.history(folder / "best")
            trainer = Trainer(
                streams, replace(config, steps=2), folder, device="cpu", resume=True, say=quiet
            )
            trainer.validate()
            return trainer.train_step()

        return use, folder / files.LAST

    for optimizer in ("muon", "adamw"):
        use, path = started(optimizer)
        yield "", use
        whole, (tensors, notes) = path.read_bytes(), wrong_facts.opened(path)
        text = {"run": notes["run"]}  # without the checksum, which a stranger can make right
        for name in sorted(
            name for name in tensors if name.startswith("muon") == (optimizer == "muon")
        )[::4]:
            for what, changed in wrong_facts.spoilt(tensors, name):
                save_file(changed, path, text)
                yield what, use
    facts = json.loads(notes["run"])
    facts["config"] = {name: facts["config"][name] for name in FIXED}  # the others are not compared
    for what, text in wrong_facts.texts(facts):
        save_file(tensors, path, {"run": text})
        yield what, use
    for what, data in wrong_facts.headers(whole):
        path.write_bytes(data)
        yield what, use


def streams(home: Path) -> SPOILT:
    """A folder of token streams: its index and its array."""
    from lib.music.streams import INDEX, TOKENS, Streams
    from lib.train.batches import Batches, base_names, validation_pieces

    made = store(make_streams(), home, names=[f"Pitch_{i}" for i in range(11)])
    index, whole = json.loads((home / INDEX).read_text()), (home / TOKENS).read_bytes()

    def use():
        found = Streams.load(home)
        crops = Batches(found, found.select("train"), TINY)
        names = base_names(found)
        rates = [piece.length / piece.notes for piece in validation_pieces(found, 100)]
        return (
            [names[token] for piece in found.pieces for token in found.stream(piece)],
            crops.next(),
            rates,
        )

    yield "", use
    for what, text in wrong_facts.texts(index):
        write_text(home / INDEX, text)
        yield what, use
    write_text(home / INDEX, json.dumps(index))
    for what, data in npy_files(made.tokens, whole):
        (home / TOKENS).write_bytes(data)
        yield what, use


def npy_files(tokens: np.ndarray, whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Arrays whose header lies, or is no header."""

    def saved(array) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    for kind in ("<i2", ">u2", "u1", "<u4", "<f8", "?", "<c8", "S2", "<U1", "<M8[s]"):
        yield kind, saved(tokens.astype(kind if "M8" not in kind else "<i8").astype(kind))
    yield "two dimensions", saved(tokens.reshape(1, -1))
    yield "one number", saved(tokens[0])
    yield "empty", saved(tokens[:0])
    yield "one token less", saved(tokens[:-1])
    yield "one token more", saved(np.append(tokens, tokens[:1]))
    yield "tokens beyond the vocabulary", saved(np.full_like(tokens, 60_000))
    yield "a table with names", saved(np.zeros(len(tokens), [("a", "<u2")]))
    yield "objects", whole[:10] + whole[10:].replace(b"'<u2'", b"'|O' ", 1)
    shapes = (
        b"(10000000000,)",
        b"(-1,)",
        b"(1.5,)",
        b"(None,)",
        b"'x'",
        b"(2**99,)",
        b"(1e9,)",
        b"()",
        b"(0,)",
        b"((1,),)",
        b"(9223372036854775808,)",
        b"(True,)",
        b"[3]",
    )
    for shape in shapes:
        text = b"{'descr': '<u2', 'fortran_order': False, 'shape': %s}" % shape
        yield f"shape {shape.decode()}", header(text) + whole[128:]
    deep = b"(" * 3000 + b")" * 3000
    for text in (
        deep,
        b"[" * 9000,
        b"1+1",
        b"",
        b"{",
        b"__import__('os')",
        b"{'descr': '<u2'}",
        b"\xff\xfe",
        b"{1: 2}",
        b"{'descr': '<u2', 'fortran_order': 3, 'shape': (3,)}",
        b"{'descr': 7, 'fortran_order': False, 'shape': (3,)}",
        b"{'descr': [[[]]], 'fortran_order': False, 'shape': (3,)}",
        b"9" * 9000,
        b"-" * 9000 + b"1",
    ):
        yield f"header {text[:20]!r}", header(text) + whole[128:]
    for version in (b"\0\0", b"\2\0", b"\3\0", b"\x09\0", b"\xff\xff"):
        yield f"version {version!r}", whole[:6] + version + whole[8:]
    for size in (0, 5, 9, 60, 128, len(whole) - 1):
        yield f"{size} bytes of it", whole[:size]
    zipped = io.BytesIO()
    np.savez(zipped, tokens)
    yield "a zip of arrays", zipped.getvalue()
    yield "an unfinished zip", b"PK\3\4" + bytes(60)
    yield "a pickle", b"\x80\4cposix\nsystem\n(S'true'\ntR."


def header(text: bytes) -> bytes:
    """A numpy header with this text."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text + b"\n"


def tables(home: Path) -> SPOILT:
    """MAESTRO's table, a cell at a time, and tables that are too large."""
    from lib.music.maestro import read_folder, summary

    names = [
        "canonical_composer",
        "canonical_title",
        "split",
        "year",
        "midi_filename",
        "audio_filename",
        "duration",
    ]
    rows = [
        ["Béla Bartók", f"Piece {i}", split, "2018", f"{i}.midi", f"{i}.wav", "60.5"]
        for i, split in enumerate(("train", "validation", "test"))
    ]
    for row in rows:
        (home / row[4]).write_bytes(b"MThd")
    path = home / "maestro.csv"

    def use():
        return summary(read_folder(home))

    def written(lines) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)

    written([names, *rows])
    yield "", use
    cells = [
        "",
        "x",
        "-1",
        "0",
        "1.5",
        "1e10",
        "10000000000",
        "nan",
        "inf",
        "9" * 5000,
        "../x.midi",
        "/x.midi",
        "C:x.midi",
        "a\0.midi",
        "\n",
        '"',
        "x" * 200_000,
        "❄" * 300 + ".midi",
    ]
    for line in range(len(rows) + 1):
        for column in range(len(names)):
            for cell in cells:
                changed = [list(row) for row in [names, *rows]]
                changed[line][column] = cell
                written(changed)
                yield f"line {line}, column {column}: {cell[:20]!r}", use
    large = 2_000_000  # just below what is read at all
    for what, text in (
        ("commas", b"," * large),
        ("lines of nothing", b"\n" * large),
        ("quotes", b'"' * large),
        ("one word", b"x" * large),
        ("no UTF-8", b"\xff" * 9),
        ("empty", b""),
        ("zeros", bytes(999)),
    ):
        path.write_bytes(text)
        yield what, use
        path.write_bytes((",".join(names) + "\n").encode() + text)
        yield f"{what} below the names", use
    for count in (70_000, 1_000_000):
        path.write_text(",".join(names) + "\n" + "a,b,train,2018,0.midi,c,1\n" * count)
        yield f"{count:,} rows", use
    with path.open("wb") as file:
        file.truncate(500_000_000)
    yield "500 MB", use


def zips(home: Path) -> SPOILT:
    """A zip in MAESTRO's layout, or nearly."""
    from lib.music.download import unpack
    from lib.music.maestro import MIDI, TABLE, WANTED, read_folder

    path = home / "x.zip"
    good = {
        "maestro/maestro.csv": b"canonical_composer,canonical_title,split,year,midi_filename,duration\n"
        b"Bach,Air,train,2018,2018/a.midi,60\n",
        "maestro/2018/a.midi": b"MThd" * 9,
    }

    def use():
        target = home / "out"
        try:
            unpack(
                path,
                target,
                suffixes=WANTED,
                marker=TABLE,
                check=lambda folder: read_folder(folder),
            )
            return [p for p in target.rglob("*") if p.suffix in MIDI]
        finally:
            shutil.rmtree(target, ignore_errors=True)
            assert not list(home.glob("*.part"))

    def written(files: dict[str, bytes]) -> bytes:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
        return path.read_bytes()

    whole = written(good)
    yield "", use
    for name in (
        "../up.midi",
        "/root.midi",
        "C:\\x.midi",
        "a\\..\\..\\x.midi",
        "maestro/\0.midi",
        "maestro/" + "x" * 300 + ".midi",
        "maestro/2018",
        "maestro/2018/a.midi/b.midi",
        "more/maestro.csv",
        "❄.midi",
        "maestro/con.midi",
        "." * 300,
    ):
        written(good | {name: b"MThd"})
        yield f"an entry {name[:30]!r}", use
    for megabytes in (2, 3, 50):
        written(good | {"maestro/maestro.csv": b"," * (megabytes * 1_000_000)})
        yield f"a table of {megabytes} MB of commas", use
    written(good | {"maestro/x.json": bytes(3_000_000)})
    yield "a JSON of 3 MB", use
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        yield f"{size} bytes of it", use
    random = np.random.default_rng(0)
    for number in range(300):
        data = bytearray(whole)
        for _ in range(random.choice([1, 2, 9])):
            data[random.integers(len(data))] = random.choice(
                [0, 1, 127, 128, 255, random.integers(256)]
            )
        path.write_bytes(data)
        yield f"noise {number}", use
    for count in (100_000, 1_000_000):
        entry = (
            struct.pack(
                "<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0
            )
            + b"a"
        )
        end = struct.pack(
            "<4s4H2LH",
            b"PK\5\6",
            0,
            0,
            min(count, 65535),
            min(count, 65535),
            len(entry) * count,
            0,
            0,
        )
        path.write_bytes(entry * count + end)
        yield f"{count:,} entries", use
        far = struct.pack(
            "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entry) * count, 0
        )
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(entry) * count, 1)
        path.write_bytes(entry * count + far + locator + end[:12] + b"\0\0\0\0" + end[16:])
        yield f"{count:,} entries in a zip64 that says there are none", use


def outcomes(home: Path) -> SPOILT:
    """What an experiment keeps of a run that has ended, and of its results."""
    from lib.lab.experiments.protocol import SCALES
    from lib.lab.experiments.runner import Lab
    from lib.lab.experiments.runs import OUTCOME, Spec, train
    from lib.lab.rivals.matched import Size

    data, folder = make_streams(), home / "one"
    spec = Spec("one", "lstm", Size(d_model=16, n_layer=1, d_state=4), replace(TINY, steps=2))
    train(spec, data, folder, device="cpu", say=quiet)
    kept = json.loads((folder / OUTCOME).read_text())

    def use():
        found = train(spec, data, folder, device="cpu", say=quiet)
        return found["tokens"] / 3, found["log"][-1]["validation_bits_per_note"] / 2

    yield "", use
    for what, text in wrong_facts.texts(kept):
        # the protocol is compared as a whole
        if not what.startswith(("spec.config.", "spec.size.")):
            write_text(folder / OUTCOME, text)
            yield what, use

    lab = Lab(SCALES["quick"], home, results=home, cache=home, found=[], say=quiet)
    result = {"protocol": lab._protocol("race"), "best": {"mamba": {"lr": 0.003, "warmup": 0.1}}}

    def read():
        best = lab.read("race").get("best", {}).get("mamba", {"lr": 1.0, "warmup": 0.0})
        return best["lr"] * 2 + best["warmup"]

    write_text(lab.path("race"), json.dumps(result))
    yield "", read
    for what, text in wrong_facts.texts(result):
        write_text(lab.path("race"), text)
        yield f"result, {what}", read


def ratings(home: Path) -> SPOILT:
    """What a listener's page exported."""
    from lib.lab.judge.listening_page import analyse, read_ratings, report

    path = home / "ratings.json"
    answers = [{"choice": choice, "clips": ["real/0", "model/1"]} for choice in ("a", "same", "b")]
    good = {"format": "listening 1", "listener": "one", "ratings": answers}

    def use():
        return report(analyse(read_ratings([path]), draws=5))

    write_text(path, json.dumps(good))
    yield "", use
    for what, text in wrong_facts.texts(good):
        write_text(path, text)
        yield what, use


def notes(home: Path) -> SPOILT:
    """The kept notes of every performance."""
    from lib.music import maestro
    from lib.music.library import note_arrays, opening
    from lib.music.notes import NOTE, Music, make_notes, write_midi

    write_midi(Music(make_notes([0.0, 1.0], [1.0, 2.0], [60, 62], [64, 64])), home / "a.mid")
    found = [
        maestro.Performance(home / "a.mid", "Bach", "Air", 2018, split, 2.0)
        for split in ("train", "test")
    ]
    good = note_arrays(found, folder=home, progress=False)
    path = next(home.glob("notes-*.npz"))

    def use():
        return [opening(one, 1.0) for one in note_arrays(found, folder=home, progress=False)]

    yield "", use
    whole, rows = path.read_bytes(), np.concatenate(good)
    lengths = np.array([2, 2])
    for what, other in {
        "negative": [5, -1],
        "too long": [2, 3],
        "floats": [2.0, 2.0],
        "one": [4],
        "a square": [[2, 2]],
        "three": [2, 1, 1],
        "a number": 4,
        "huge": [2**62, 2**62],
        "texts": ["2", "2"],
    }.items():
        np.savez(path, notes=rows, lengths=np.array(other))
        yield f"lengths {what}", use
    for what, other in {
        "plain": np.zeros(4),
        "a square": np.zeros((2, 2), NOTE),
        "none": np.zeros(0, NOTE),
        "one": np.zeros((), NOTE),
    }.items():
        np.savez(path, notes=other, lengths=lengths)
        yield f"notes {what}", use
    for name in ("notes", "lengths"):
        np.savez(path, **{name: rows})
        yield f"only {name}", use
    for text in (
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000,)}",
        b"(" * 3000,
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (-2,)}",
    ):
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("notes.npy", header(text) + bytes(64))
            zipped.writestr("lengths.npy", header(text) + bytes(64))
        yield f"header {text[:50]!r}", use
    random = np.random.default_rng(0)
    for number in range(200):
        data = bytearray(whole)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        yield f"a bit, {number}", use
    for size in range(0, len(whole), 23):
        path.write_bytes(whole[:size])
        yield f"{size} bytes of it", use


KINDS = {
    "checkpoint folders": checkpoints,
    "tokenizers": tokenizers,
    "checkpoints of rivals": rivals,
    "saved moments": moments,
    "run folders": runs,
    "folders of token streams": streams,
    "tables": tables,
    "zips": zips,
    "outcomes and results of experiments": outcomes,
    "listeners' ratings": ratings,
    "kept notes": notes,
}


# --- the process that walks them ----------------------------------------------------------------


def walk(name: str, home: Path, every: int = 1) -> dict:
    """Every file of a kind, or every so many: how many were made, tried and used,
    and what failed.
    """
    made, tried, used, failures, slowest = 0, 0, 0, [], 0.0
    for what, work in KINDS[name](home):
        made += bool(what)
        if what and made % every:
            continue
        begin = time.process_time()
        try:
            work()
            used += 1
        except UserError as error:
            if not what or "\n" in str(error) or not 20 < len(str(error)) < 800:
                failures.append(f"{what or 'the whole file'}: {str(error)[:300]}")
        except BaseException as error:  # noqa: BLE001  what must never come out
            failures.append(f"{what}: {type(error).__name__} {str(error)[:200]}")
        took = time.process_time() - begin
        if took > SECONDS:
            failures.append(f"{what}: {took:.1f} s")
        slowest = max(slowest, took)
        tried += bool(what)
    return {
        "made": made,
        "tried": tried,
        "used": used,
        "failures": failures,
        "slowest": round(slowest, 2),
        "megabytes": peak(),
    }


def peak() -> int:
    """Peak memory of this process in MB, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1_000_000 if sys.platform == "darwin" else 1000
    )


def main() -> None:
    torch.set_num_threads(1)
    every = int(os.environ.get("EVERY", "1"))
    found = {}
    for name in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as home:
            torch.manual_seed(0)
            found[name] = walk(name, Path(home), every)
    print(json.dumps(found, indent=1, ensure_ascii=False))


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EVERY": "3"},
    )
    assert done.returncode == 0, f"the process ended: {done.stderr[-1500:]}"
    return json.loads(done.stdout)


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_is_used_or_refused_in_one_sentence(found, kind):
    result = found[kind]
    assert result["failures"] == []
    assert 0 < result["used"] < result["tried"] / 2, "most of what was spoilt is found out"
    assert result["megabytes"] < MEGABYTES and result["slowest"] < SECONDS


def test_contributing_says_how_many_were_tried(found):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind, result in found.items():
        assert f"| {kind} | {result['made']:,} |" in text


if __name__ == "__main__":
    main()
