"""Any folder of MIDI files as performances with a split of their own.

A piece must not be learnt from in one file and judged in another, so files that share a piece go
to one side together. What they share is told by their notes. Strokes that fall together are a
chord, whose keys are put in order; eight steps in a row from key to key are a shingle (Broder
1997), which neither a transposition nor another tempo changes. Two files are near copies where
they have a tenth of the shorter one's shingles in common; copies of copies belong together as
well. That finds a piece in which up to a fifth of the notes are others, and most performances of
one piece by two pianists (measured in data/results/own_midi.json). It does not find an arrangement
with other voices, or a short passage that two pieces share.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.env.errors import UserError, os_errors
from lib.music.maestro import Performance
from lib.music.notes import Music, read_midi

ENDINGS = (".mid", ".midi", ".rmi")
FEWEST = 50  # notes of a file that is worth learning from
STEPS = 8  # from key to key, in a shingle: a byte each, 64 bits in all
NEAR = 0.1  # share of the shorter file's shingles
TOGETHER = 0.35  # of the third quartile of the times between strokes: nearer ones are one chord
HELD_OUT = 0.1  # of the files, for validation and as many for the test


@dataclass(frozen=True)
class Found:
    """A file that can be learnt from."""

    performance: Performance  # its split is "train" until it is known better
    shingles: np.ndarray  # distinct ones, uint64 of shape (S,), sorted
    content: str  # a hash of the steps from key to key: copies in another key or tempo share it


def read_folder(folder: str | Path, say=print) -> list[Performance]:
    """Every MIDI file in a folder, and below it, that can be learnt from, with its split.

    What is left out is said, a line a kind. About a tenth of the files is for validation, a tenth
    for the test, chosen by a hash of their content: the same folder is always split the same way.
    Raises `UserError` where there is no folder, or fewer than three different pieces in it.
    """
    found = gather(folder, say)
    groups = together([one.shingles for one in found])
    if len(set(groups)) < 3:
        raise UserError(
            f"{folder} has {pieces_in(groups)} to learn from: it takes three different "
            "ones, as one is kept to choose the weights by and one to measure them"
        )
    splits = split(groups, [one.content for one in found])
    performances = [replace(one.performance, split=side) for one, side in zip(found, splits)]
    say(told(performances, groups))
    return performances


def gather(folder: str | Path, say=print) -> list[Found]:
    """Every MIDI file in a folder, and below it, that has enough notes.

    What is left out is said, a line a kind. Raises `UserError` where there is no folder, or no MIDI
    file in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name one with MIDI files")
    with os_errors(f"read {folder}"):
        paths = sorted(p for p in below(folder) if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise UserError(f"there is no MIDI file in {folder}: name a folder with .mid files")
    found, left_out = read_all(paths, folder)
    for kind, files in left_out.items():
        if len(files) == 1:
            say(f"left out 1 file ({files[0]}): it {kind}")
        else:
            say(f"left out {len(files)} files (the first is {files[0]}): each {kind}")
    return found


def below(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it, linked folders too, each folder once.

    A link to what the folder itself lies in is left out.
    """
    root, seen = Path(os.path.realpath(folder)), set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(os.path.realpath(here))
        if place in seen or (place != root and root.is_relative_to(place)):
            folders.clear()
            continue
        seen.add(place)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(here, name)), name))
        yield from (Path(here, name) for name in names)


def pieces_in(groups: np.ndarray) -> str:
    """So many pieces, in words."""
    pieces = len(set(groups))
    if pieces == 1 and len(groups) > 1:
        return f"1 piece in {len(groups)} copies"
    return "no piece" if not pieces else f"{pieces} piece{'s' if pieces > 1 else ''}"


def told(performances: list[Performance], groups: np.ndarray) -> str:
    """The split in a line."""
    sides = Counter(p.split for p in performances)
    near = len(groups) - len(set(groups))
    return (
        f"{len(performances)} files: {sides['train']} to learn from, {sides['validation']} to "
        f"choose the weights by, {sides['test']} to measure them; near copies, which stay "
        f"together: {near}"
    )


def read_all(paths: list[Path], folder: Path) -> tuple[list[Found], dict[str, list[str]]]:
    """The files that can be learnt from, and the names of the others by what is wrong with them."""
    found: list[Found] = []
    left_out: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    for path in tqdm(paths, desc="reading", unit=" files", leave=False, disable=None):
        try:
            music = read_midi(path)
            kind = unfit(music, seen)
        except UserError as error:
            kind = kind_of_fault(str(error), path)
        if kind:
            left_out.setdefault(kind, []).append(str(path.relative_to(folder)))
        else:
            seen.add(music.notes.tobytes())
            found.append(describe(path, music, path.relative_to(folder).as_posix()))
    return found, left_out


def unfit(music: Music, seen: set[bytes]) -> str:
    """Why a file that was read is left out; "" where it is not."""
    if len(music.notes) < FEWEST:
        return f"has fewer than {FEWEST} notes"
    return "has the same notes as another file" if music.notes.tobytes() in seen else ""


def kind_of_fault(sentence: str, path: Path) -> str:
    """A reader's sentence without the file's name, its details and what to do about it."""
    if not sentence.startswith(f"{path} "):
        return "cannot be read"
    return sentence.removeprefix(f"{path} ").split(":")[0].split(",")[0]


def describe(path: Path, music: Music, title: str) -> Found:
    """A file's facts, and what tells whether it is a copy of another."""
    steps = key_steps(music.notes)
    content = hashlib.sha256(steps.tobytes()).hexdigest()
    performance = Performance(path, "", title, 0, "train", music.seconds)
    return Found(performance, shingles(steps), content)


def key_steps(notes: np.ndarray) -> np.ndarray:
    """The way from key to key, chord after chord, int8 of shape (notes - 1,)."""
    gaps = np.diff(notes["start"])
    begins = np.append(True, gaps > TOGETHER * np.quantile(gaps, 0.75))
    chord = np.cumsum(begins)
    order = np.lexsort((notes["pitch"], chord))
    return np.diff(notes["pitch"][order].astype(np.int8))


def shingles(steps: np.ndarray) -> np.ndarray:
    """The different runs of eight steps, each as one number: uint64 of shape (S,), sorted."""
    runs = np.lib.stride_tricks.sliding_window_view(steps, STEPS)
    return np.unique(np.ascontiguousarray(runs).view(np.uint64))


def together(found: list[np.ndarray]) -> np.ndarray:
    """The group of each file, int of shape (files,), by their shingles: near copies share one."""
    from scipy.sparse.csgraph import connected_components

    if not found:
        return np.zeros(0, int)
    near = in_common(found)
    near.data = near.data >= NEAR
    near.eliminate_zeros()
    return connected_components(near, directed=False)[1]


def in_common(found: list[np.ndarray]):
    """The share of the shorter one's shingles that two files have in common.

    A sparse array (files, files): of thousands of files most pairs have none.
    """
    from scipy.sparse import csr_array

    sizes = np.array([len(mine) for mine in found])
    _, column = np.unique(np.concatenate(found), return_inverse=True)
    row_ends = np.append(0, np.cumsum(sizes))
    table = csr_array((np.ones(len(column), np.int32), column, row_ends))
    shared = (table @ table.T).tocoo()
    shares = shared.data / np.minimum(sizes[shared.row], sizes[shared.col])
    return csr_array((shares, (shared.row, shared.col)), shape=shared.shape)


def split(groups: np.ndarray, contents: list[str]) -> list[str]:
    """The side of each file: whole groups, in the order of the smallest hash in each.

    The first groups are for the test, until they hold a tenth of the files, the next ones for
    validation, and at least one stays to learn from. A group that would make a side larger than
    two tenths is passed over: many takes of one piece are to learn from, if anything else is there.
    """
    members = [np.flatnonzero(groups == group).tolist() for group in range(groups.max() + 1)]
    members.sort(key=lambda files: min(contents[i] for i in files))
    sides = ["train"] * len(groups)
    wanted = HELD_OUT * len(groups)
    for side, leave in (("test", 2), ("validation", 1)):
        count = 0
        while count < wanted and len(members) > leave:
            fitting = [files for files in members if count + len(files) <= 2 * wanted]
            if count and not fitting:
                break
            files = fitting[0] if fitting else min(members, key=len)
            members.remove(files)
            count += len(files)
            for i in files:
                sides[i] = side
    return sides
