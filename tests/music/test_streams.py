"""Claims about lib.music.streams: what is in them, and that they appear whole or not at all."""

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.music import encode as module
from lib.music.encode import FORMAT, Augmentation, build, fingerprint
from lib.music.maestro import Performance
from lib.music.notes import HIGHEST, Music, augment, make_notes, read_midi, sustain, write_midi
from lib.music.streams import INDEX, TOKENS, Streams
from lib.music.tokens import TokenConfig, Tokenizer

BASE = TokenConfig(vocab_size=None)
MERGED = TokenConfig(vocab_size=620)
ONE = Augmentation(copies=1)


def quiet(*args, **kwargs):
    pass


def some_music(seed, count=150):
    rng = np.random.default_rng(seed)
    start = np.sort(rng.uniform(0, 30, count))
    notes = make_notes(
        start,
        start + rng.uniform(0.02, 2, count),
        rng.integers(40, 80, count),
        rng.integers(20, 110, count),
    )
    return Music(sustain(Music(notes)).notes, np.array([[1.0, 4.0], [6.0, 11.0], [12.0, 29.0]]))


@pytest.fixture
def found(tmp_path):
    """Five short pieces on disk: three of train, one of validation, one of test."""
    out = []
    for seed, split in enumerate(("train", "validation", "train", "test", "train")):
        path = tmp_path / "midi" / f"{seed}.mid"
        write_midi(some_music(seed), path)
        out.append(Performance(path, "Composer", f"Title {seed}", 2004, split, 30.0))
    return out


def make(found, tmp_path, config=BASE, augmentation=ONE, say=quiet):
    return build(
        found, config, augmentation, folder=tmp_path / "cache", progress=False, workers=1, say=say
    )


def folders(tmp_path):
    cache = tmp_path / "cache"
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


# ---- what is in them --------------------------------------------------------------------------


def test_each_piece_is_one_contiguous_run_in_a_memory_mapped_uint16_file(found, tmp_path):
    streams, tokenizer = make(found, tmp_path)
    assert isinstance(streams.tokens, np.memmap) and streams.tokens.dtype == np.uint16
    assert not streams.tokens.flags.writeable
    ends = np.cumsum([p.length for p in streams.pieces])
    assert [p.offset for p in streams.pieces] == [0, *ends[:-1]] and ends[-1] == len(streams.tokens)
    for piece in streams.pieces:
        ids = streams.stream(piece)
        assert ids[0] == tokenizer.bos == streams.bos and ids[-1] == tokenizer.eos
        assert np.count_nonzero(ids == tokenizer.bos) == np.count_nonzero(ids == tokenizer.eos) == 1
        assert tokenizer.notes_of[ids].sum() == piece.notes
    assert streams.vocab_size == tokenizer.vocab_size > streams.tokens.max()


def test_splits_are_kept_and_only_train_pieces_have_copies(found, tmp_path):
    streams, _ = make(found, tmp_path, augmentation=Augmentation(copies=2))
    for split in ("train", "validation", "test"):
        names = [p.name for p in streams.select(split)]
        assert names == [p.path.name for p in found if p.split == split]
        copies = streams.select(split, copies=True)
        assert len(copies) == len(names) * (3 if split == "train" else 1)
    assert [p.copy for p in streams.select("train", copies=True)] == [0, 1, 2] * 3


def test_copy_0_is_the_piece_and_copy_1_its_drawn_change(found, tmp_path):
    streams, tokenizer = make(found, tmp_path, MERGED)
    for number, performance in enumerate(found):
        music = sustain(read_midi(performance.path))
        for piece in (p for p in streams.pieces if p.name == performance.path.name):
            change = ONE.draw(number, piece.copy)
            wanted = tokenizer.encode(Music(augment(music.notes, **change)), end=True)
            assert np.array_equal(streams.stream(piece), wanted)


def test_augmentation_is_the_same_at_every_run_and_differs_between_seeds_and_copies():
    draw = Augmentation(seed=3).draw
    assert draw(7, 2) == draw(7, 2)
    drawn = [str(d) for d in (draw(7, 1), draw(7, 2), draw(8, 1), Augmentation(seed=4).draw(7, 1))]
    assert len(set(drawn)) == 4
    assert draw(7, 0) == {"semitones": 0, "stretch": 1.0, "velocity": 0}
    many = [Augmentation().draw(i, 1) for i in range(300)]
    assert {d["semitones"] for d in many} == set(range(-5, 6))
    assert all(0.95 <= d["stretch"] <= 1.05 and abs(d["velocity"]) <= 8 for d in many)


def test_merges_come_from_train_pieces_only(found, tmp_path):
    _, before = make(found, tmp_path, MERGED)
    held_out = next(p for p in found if p.split == "validation")
    write_midi(some_music(77, count=400), held_out.path)
    streams, after = make(found, tmp_path, MERGED)
    assert len(folders(tmp_path)) == 2  # it was built again
    assert after.pieces == before.pieces
    train = next(p for p in found if p.split == "train")
    write_midi(some_music(78, count=400), train.path)
    assert make(found, tmp_path, MERGED)[1].pieces != before.pieces


def test_a_given_tokenizer_is_used_as_it_is(found, tmp_path):
    _, known = make(found[:3], tmp_path, MERGED)
    learnt, _ = make(found, tmp_path, MERGED)
    reused, tokenizer = build(
        found,
        None,
        ONE,
        folder=tmp_path / "cache",
        tokenizer=known,
        progress=False,
        workers=1,
        say=quiet,
    )
    assert tokenizer.pieces == known.pieces == Tokenizer.load(reused.folder).pieces
    piece = reused.select("test")[0]
    assert (
        reused.stream(piece).tolist() == known.encode(read_midi(found[3].path), end=True).tolist()
    )
    assert reused.folder != learnt.folder and reused.vocab_size == known.vocab_size
    with pytest.raises(UserError, match="use those settings, or give none"):
        build(found, BASE, ONE, folder=tmp_path / "cache", tokenizer=known, say=quiet)


def test_several_workers_give_the_same_streams(found, tmp_path):
    # more than 20, or one process does it all
    many = [
        Performance(p.path, p.composer, f"{p.title} {i}", p.year, p.split, p.seconds)
        for i in range(5)
        for p in found
    ]
    one = make(many, tmp_path)[0]
    two = build(many, BASE, ONE, folder=tmp_path / "two", workers=2, progress=False, say=quiet)[0]
    assert np.array_equal(one.tokens, two.tokens) and one.pieces == two.pieces


# ---- the cache --------------------------------------------------------------------------------


def test_a_second_run_reads_the_cache(found, tmp_path, monkeypatch):
    first, _ = make(found, tmp_path, MERGED)
    monkeypatch.setattr(module, "encode_piece", lambda *a, **k: pytest.fail("it encoded again"))
    said = []
    second, tokenizer = make(found, tmp_path, MERGED, say=said.append)
    assert np.array_equal(first.tokens, second.tokens) and first.pieces == second.pieces
    assert tokenizer.vocab_size == MERGED.vocab_size
    assert len(said) == 1 and "from the cache" in said[0]


def test_other_settings_or_files_go_to_another_folder(found):
    ids = {
        fingerprint(files, config, change)["id"]
        for files, config, change in (
            (found, BASE, ONE),
            (found, MERGED, ONE),
            (found, TokenConfig(16, vocab_size=None), ONE),
            (found, TokenConfig(pedal="drop", vocab_size=None), ONE),
            (found, BASE, Augmentation(copies=2)),
            (found, BASE, Augmentation(copies=1, seed=1)),
            (found[:-1], BASE, ONE),
        )
    }
    assert len(ids) == 7
    assert fingerprint(list(reversed(found)), BASE, ONE) == fingerprint(found, BASE, ONE)
    assert fingerprint(found, BASE, ONE)["format"] == FORMAT


def test_files_that_changed_since_the_cache_was_made_are_not_taken_for_the_old(found, tmp_path):
    """Not by another byte at the same length, nor in another order, by which copies are drawn."""
    mine = []
    for performance in found:
        path = tmp_path / performance.path.name
        path.write_bytes(performance.path.read_bytes())
        mine.append(replace(performance, path=path))
    streams, _ = make(mine, tmp_path)
    with pytest.raises(UserError, match="or their order, have changed.*delete that folder"):
        make(mine[::-1], tmp_path)
    whole = mine[0].path.read_bytes()
    mine[0].path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="have changed since .*tokens-.* delete that folder"):
        make(mine, tmp_path)
    mine[0].path.write_bytes(whole)
    assert np.array_equal(make(mine, tmp_path)[0].tokens, streams.tokens)


def test_a_copy_that_is_transposed_off_the_keyboard_is_none(tmp_path):
    """And the streams can be read, with the copies that are left."""
    start = np.arange(20) * 0.25
    rows = []
    for i, key in enumerate((HIGHEST, 60)):
        path = tmp_path / f"{i}.mid"
        write_midi(Music(make_notes(start, start + 0.2, np.full(20, key), np.full(20, 64))), path)
        rows.append(Performance(path, "composer", f"{i}", 2000, "train", 5.0))
    many = Augmentation(copies=12)
    streams, _ = build(rows, BASE, many, folder=tmp_path / "cache", progress=False, say=quiet)
    copies = {"0.mid": [], "1.mid": []}
    for piece in streams.pieces:
        copies[piece.name].append(piece.copy)
    up = [n for n in range(1, 13) if many.draw(0, n)["semitones"] > 0]
    assert copies["1.mid"] == list(range(13))
    assert copies["0.mid"] == [n for n in range(13) if n not in up] and up


@pytest.mark.parametrize("where", ["np.save", "encode"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_build_leaves_nothing(found, tmp_path, monkeypatch, where, error):
    def stop(*args, **kwargs):
        raise error

    if where == "encode":
        monkeypatch.setattr(module, "encode_piece", stop)
    else:
        monkeypatch.setattr(module.np, "save", stop)
    with pytest.raises(error):
        make(found, tmp_path)
    assert folders(tmp_path) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(found, tmp_path, monkeypatch):
    def full(file, array):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(UserError, match="could not write token streams.*the disk is full"):
        make(found, tmp_path)
    assert folders(tmp_path) == []


def test_a_damaged_cache_is_one_sentence(found, tmp_path):
    streams, _ = make(found, tmp_path)
    folder = streams.folder
    index, tokens = (folder / INDEX).read_bytes(), (folder / TOKENS).read_bytes()
    shorter = json.loads(index)
    shorter["pieces"].pop()
    damages = [
        (INDEX, index[:200]),
        (INDEX, b""),
        (INDEX, b"[]"),
        (INDEX, b'{"pieces": 3}'),
        (INDEX, b"\xff\xfe"),
        (INDEX, json.dumps(shorter).encode()),
        (TOKENS, tokens[:-10]),
        (TOKENS, tokens[:40]),
        (TOKENS, b""),
        (TOKENS, b"no numpy file"),
        (TOKENS, tokens.replace(b"<u2", b"<i2")),
    ]
    for name, content in damages:
        for file, whole in ((INDEX, index), (TOKENS, tokens)):
            (folder / file).unlink()
            (folder / file).write_bytes(content if file == name else whole)
        with pytest.raises(UserError, match="is damaged .*: delete that folder") as caught:
            make(found, tmp_path)
        assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
    assert np.array_equal(make(found, tmp_path)[0].tokens, np.load(streams.folder / TOKENS))


def test_missing_streams_say_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match="no token streams in .*run python -m lib.music encode"):
        Streams.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--tokenizer", str(ROOT / "data" / "model"), "--grid-ms", "20"],
            "leave out --grid-ms, --pedal",
        ),
        (
            ["--tokenizer", str(ROOT / "data" / "model"), "--vocab-size", "0"],
            "leave out --grid-ms, --pedal",
        ),
        (["--vocab-size", "100"], "leaves no room for merges"),
        (["--copies", "-1"], "-1 copies make no sense"),
    ],
)
def test_the_command_refuses_what_it_could_not_do_before_it_reads_a_file(words, says, monkeypatch):
    monkeypatch.setattr(module, "performances", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(UserError, match=says):
        module.main(words)


# ---- what goes in -----------------------------------------------------------------------------


def test_a_broken_file_is_left_out_and_named(found, tmp_path):
    found[0].path.write_bytes(b"MThd and no more")
    said = []
    streams, _ = make(found, tmp_path, say=said.append)
    assert [p.name for p in streams.select("train")] == ["2.mid", "4.mid"]
    assert len(said) == 1 and said[0].startswith("left out:") and "0.mid" in said[0]


def test_without_train_pieces_there_is_nothing_to_learn_from(found, tmp_path):
    with pytest.raises(UserError, match="no training piece"):
        make([p for p in found if p.split != "train"], tmp_path)
    for p in found:
        p.path.write_bytes(b"")
    with pytest.raises(UserError, match="no training piece could be read"):
        make(found, tmp_path)
    assert folders(tmp_path) == []


def test_streams_can_be_read_without_any_music_library(found, tmp_path):
    streams, _ = make(found, tmp_path, MERGED)
    code = f"""
import sys
for name in ("miditok", "symusic", "muspy", "tokenizers", "pretty_midi", "mido", "torch"):
    sys.modules[name] = None  # importing it raises ImportError
from lib.music.streams import Streams
streams = Streams.load({str(streams.folder)!r})
print(len(streams.tokens), streams.tokens.dtype, len(streams.select("train", copies=True)))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(len(streams.tokens)), "uint16", "6"]


def test_the_tokenizer_beside_the_streams_is_theirs(found, tmp_path):
    streams, tokenizer = make(found, tmp_path, MERGED)
    beside = Tokenizer.load(streams.folder)
    assert beside.pieces == tokenizer.pieces and beside.config == MERGED
    assert sorted(p.name for p in streams.folder.iterdir()) == sorted(
        [INDEX, TOKENS, "tokenizer.json", "tokens.json"]
    )


def test_fewer_than_one_process_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match="-3 processes encode nothing"):
        module.main(["nowhere", "--workers", "-3"])
