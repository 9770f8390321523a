"""Claims about lib.music.folder: any folder of MIDI files, split so that copies stay together."""

import numpy as np
import pytest

from lib.env.errors import UserError
from lib.music.folder import FEWEST, in_common, key_steps, read_folder, shingles, split
from lib.music.notes import HIGHEST, LOWEST, Music, make_notes, write_midi


def melody(seed: int, notes: int = 120) -> Music:
    """Notes and chords that wander about the keyboard."""
    rng = np.random.default_rng(seed)
    start = np.cumsum(rng.choice([0.0, 0.15, 0.3], notes))
    pitch = np.clip(60 + np.cumsum(rng.integers(-7, 8, notes)), LOWEST + 12, HIGHEST - 12)
    return Music(make_notes(start, start + 0.2, pitch, np.full(notes, 70)))


def changed(music: Music, semitones=0, stretch=1.0, others=0, seed=0) -> Music:
    """A copy in another key and tempo, with so many keys replaced."""
    notes = music.notes.copy()
    pitch = notes["pitch"].astype(int) + semitones
    place = np.random.default_rng(seed).choice(len(notes), others, replace=False)
    pitch[place] += 3
    return Music(
        make_notes(notes["start"] * stretch, notes["end"] * stretch, pitch, notes["velocity"])
    )


def fill(folder, pieces: dict[str, Music]):
    for name, music in pieces.items():
        write_midi(music, folder / f"{name}.mid")


def sides(folder) -> dict[str, str]:
    return {p.path.stem: p.split for p in read_folder(folder, say=lambda text: None)}


COPIES = [
    dict(semitones=5),
    dict(stretch=1.5),
    dict(stretch=0.6, semitones=-3),
    dict(others=12),
    dict(others=12, stretch=1.25, semitones=2),
]


@pytest.mark.parametrize("how", COPIES, ids=str)
def test_a_near_copy_is_known_and_another_piece_is_not(how):
    pieces = [melody(1), changed(melody(1), **how), melody(2)]
    shares = in_common([shingles(key_steps(m.notes)) for m in pieces])
    assert shares[0, 1] >= 0.3 and shares[0, 2] < 0.02


def test_linked_folders_are_read_once_and_no_circle_is_walked(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "own").mkdir()
    fill(tmp_path / "elsewhere", {name: melody(i) for i, name in enumerate("abc")})
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "up").symlink_to(tmp_path)
    fill(tmp_path, {"beside": melody(9)})
    assert set(sides(tmp_path / "own")) == set("abc")


def test_what_files_have_in_common_is_kept_for_those_alone_that_have_something():
    runs = [shingles(key_steps(melody(seed, notes=60).notes)) for seed in range(300)]
    shares = in_common([*runs, runs[7]])
    assert shares.nnz < 301 * 301 / 4 and shares[7, 300] == shares[300, 7] == 1


def test_copies_of_a_piece_land_on_one_side_however_they_are_called(tmp_path):
    for piece in range(8):
        fill(
            tmp_path,
            {f"{piece}-{i}": changed(melody(piece), **how) for i, how in enumerate(COPIES)},
        )
    found = sides(tmp_path)
    assert len(found) == 40
    for piece in range(8):
        assert len({found[f"{piece}-{i}"] for i in range(5)}) == 1
    assert set(found.values()) == {"train", "validation", "test"}


def test_a_copy_of_a_copy_belongs_to_the_first_too():
    groups = np.array([0, 1, 0, 2, 1])
    found = split(groups, ["e", "d", "c", "b", "a"])
    assert found[0] == found[2] and found[1] == found[4]
    assert sorted(set(found)) == ["test", "train", "validation"]
    assert found[3] == "test", "the smallest hash comes first, of the groups that fit"


def test_the_split_hangs_on_the_content_and_not_on_names_or_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fill(one, {f"{i:02}": melody(i) for i in range(12)})
    fill(two / "deeper", {f"{11 - i:02}": melody(i) for i in range(12)})
    first, second = sides(one), sides(two)
    assert all(first[f"{i:02}"] == second[f"{11 - i:02}"] for i in range(12))
    assert list(first.values()).count("test") == list(first.values()).count("validation") == 2


def test_what_is_left_out_is_said_in_a_line_a_kind(tmp_path):
    fill(tmp_path, {f"{i}": melody(i) for i in range(4)})
    fill(tmp_path, {"same": melody(0), "short": melody(9, FEWEST - 1)})
    (tmp_path / "words.MID").write_bytes(b"these are words")
    (tmp_path / "empty.mid").write_bytes(b"")
    (tmp_path / "void.midi").write_bytes(b"")
    (tmp_path / "damaged.mid").write_bytes((tmp_path / "0.mid").read_bytes()[:-30])
    (tmp_path / "notes.txt").write_text("no music, and nobody asks")
    said = []
    assert len(read_folder(tmp_path, said.append)) == 4
    assert sorted(said[:-1]) == sorted(
        [
            "left out 1 file (same.mid): it has the same notes as another file",
            f"left out 1 file (short.mid): it has fewer than {FEWEST} notes",
            "left out 1 file (words.MID): it is not a MIDI file",
            "left out 2 files (the first is empty.mid): each is empty",
            "left out 1 file (damaged.mid): it is a damaged MIDI file",
        ]
    )
    assert said[-1].startswith("4 files: 2 to learn from, 1 to choose the weights by, 1 to measure")


def test_a_folder_that_cannot_be_used_is_told_why_in_a_sentence(tmp_path):
    def fault(folder):
        with pytest.raises(UserError) as error:
            read_folder(folder, say=lambda text: None)
        return str(error.value)

    assert "there is no folder" in fault(tmp_path / "nowhere")
    assert "no MIDI file" in fault(tmp_path)
    fill(tmp_path, {"one": melody(1)})
    assert "1 piece to learn from" in fault(tmp_path)
    fill(tmp_path, {f"copy{i}": changed(melody(1), semitones=i) for i in range(1, 4)})
    assert "1 piece in 4 copies" in fault(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mid").write_bytes(b"MThd")
    assert "no piece to learn from" in fault(tmp_path / "bad")
    assert "there is no folder" in fault(tmp_path / "one.mid")


@pytest.mark.parametrize("takes, others", [(30, 20), (40, 10), (50, 2), (9, 9)])
def test_many_takes_of_one_piece_do_not_fill_a_side(takes, others):
    """They are to learn from; the sides that measure hold about a tenth each."""
    groups = np.append(np.zeros(takes, int), 1 + np.arange(others))
    for seed in range(20):
        random = np.random.default_rng(seed)
        contents = [f"{number:020}" for number in random.integers(2**60, size=len(groups))]
        found = np.array(split(groups, contents))
        assert (found[:takes] == "train").all()
        for side in ("test", "validation"):
            assert 1 <= (found == side).sum() <= 2 + len(groups) // 5


def test_copies_of_one_piece_alone_still_leave_a_side_to_learn_from():
    found = split(np.repeat([0, 1, 2], 4), [f"{i:02}" for i in range(12)])
    assert sorted(set(found)) == ["test", "train", "validation"]
