"""MAESTRO as one list of `Performance`, from the first source that works.

The sources, in order: a folder or zip that the user names (argument or MAESTRO_DIR);
data/maestro-v3.0.0; the official zip, whose address and checksum come from MusPy; and ten real
performances from the source distribution of MidiTok, fetched through pip.

    python -m lib.music [FOLDER] [--quick] [--no-download]

MAESTRO: Hawthorne et al., "Enabling Factorized Piano Music Modeling and Generation with the
MAESTRO Dataset", ICLR 2019, licence CC BY-NC-SA 4.0. It is fetched, never shipped.
"""

import csv
import os
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from lib.env.errors import UserError, os_errors
from lib.env.files import check_regular, only_one, sha256_of
from lib.env.paths import DATA, ROOT
from lib.music import ten
from lib.music.download import MAX_TABLE, Unreachable, entries, fetch, need_space, reading, unpack

NAME = "maestro-v3.0.0"
OFFICIAL_SHA256 = "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c"  # as MusPy
SPLITS = ("train", "validation", "test")
COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "duration")
MIDI = (".midi", ".mid")
WANTED = (*MIDI, ".csv", ".json", "")  # what is unpacked; "" is LICENSE and README
TABLE = "maestro*.csv"
MARK = ".muspy.success"  # the file by which MusPy knows that a dataset is complete
ORIGIN = "ORIGIN"  # says in its first line which zip the folder was unpacked from


@dataclass(frozen=True)
class Performance:
    """One recorded performance, with the facts that MAESTRO's table gives."""

    path: Path  # the MIDI file
    composer: str  # canonical_composer
    title: str  # canonical_title, the same for every performance of a piece
    year: int  # of the piano competition
    split: str  # the official one: "train", "validation" or "test"
    seconds: float  # duration of the recording


def performances(
    folder: str | Path | None = None, *, quick: bool = False, download: bool = True, say=print
) -> list[Performance]:
    """Every performance of the first source that works, in the order of MAESTRO's table.

    `folder`: a folder or zip in MAESTRO's layout (or name it in MAESTRO_DIR). `quick`: the ten
    real pieces. `download=False`: use only what is on the disk. `say` gets a line that names the
    source. Raises `UserError`, one sentence, when what was named is unusable or nothing is found.
    """
    named = folder or os.environ.get("MAESTRO_DIR")
    official, small = DATA / NAME, DATA / "maestro-sample"
    if named:
        place = Path(named).expanduser()
        if place.is_file():
            place = _from_zip(place, say)
        found = read_folder(place)
        return _use(_few(found) if quick else found, place, say)
    if official.is_dir() and not (quick and ten.whole(small)):
        found = read_folder(official)
        _mark(official)
        return _use(_few(found) if quick else found, official, say)
    reasons = [] if download else ["downloading is switched off"]
    if download and not quick:
        try:
            _from_muspy(say)
            return _use(read_folder(official), official, say)
        except Unreachable as error:
            reasons.append(str(error))
            say(f"MAESTRO cannot be downloaded now: {error}")
    if download and not ten.whole(small):
        try:
            ten.fetch_ten(small, say)
        except Unreachable as error:
            reasons.append(str(error))
    if not ten.whole(small):
        network = "connect to a network, or " if download else ""
        raise UserError(
            f"no MAESTRO was found ({'; '.join(reasons)}): {network}"
            "name MAESTRO's folder or MIDI zip as an argument or in MAESTRO_DIR"
        )
    return _use([Performance(small / name, *facts) for name, *facts, _ in ten.TEN], small, say)


def _use(found: list[Performance], place: Path, say) -> list[Performance]:
    """Say in a line which source this is, and return it."""
    place = place.resolve()
    where = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else place.name
    many = "performances" if len(found) > len(ten.TEN) else "performances (a small sample)"
    note = origin(place)
    say(f"MAESTRO: {len(found):,} {many} from {where}" + (f" ({note})" if note else ""))
    return found


def origin(folder: Path) -> str:
    """Which zip a folder was unpacked from, or "" where nobody noted it."""
    try:
        return (folder / ORIGIN).read_text("utf-8").splitlines()[0][:200]
    except (OSError, UnicodeDecodeError, IndexError):
        return ""


def read_folder(folder: str | Path) -> list[Performance]:
    """The performances of a folder in MAESTRO's layout, every row and file checked."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder or zip {folder}: check the name")
    with os_errors(f"read {folder}"):
        tables = sorted(folder.glob(TABLE)) or sorted(folder.glob(f"*/{TABLE}"))
    if len(tables) != 1:
        raise UserError(
            f"{folder} has {'more than one' if tables else 'no'} {TABLE} in it: "
            f"name the folder that holds {NAME}.csv"
        )
    table, found, missing = tables[0], [], []
    size = check_regular(table).st_size
    if size > MAX_TABLE:
        raise UserError(
            f"{table} has {size / 1e6:,.0f} MB, far more than MAESTRO's table: get MAESTRO again"
        )
    try:
        with os_errors(f"read {table}"), table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for column in COLUMNS:
                if column not in (rows.fieldnames or ()):
                    raise UserError(f"{table} has no column {column}: it is not MAESTRO's table")
            for row in rows:
                found.append(_performance(row, table, rows.line_num))
                path = found[-1].path
                if not (path.is_file() and path.stat().st_size):
                    missing.append(row["midi_filename"])
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} is damaged: get MAESTRO again") from error
    if not found:
        raise UserError(f"{table} lists no performances: get MAESTRO again")
    if missing:
        raise UserError(
            f"{table.parent} is incomplete: {len(missing):,} of {len(found):,} files "
            f"are missing or empty (first {missing[0]}), so get MAESTRO again"
        )
    return found


def _performance(row: dict, table: Path, line: int) -> Performance:
    """One row of the table, checked."""
    try:
        composer, title, split, year, name, seconds = (row[c].strip() for c in COLUMNS)
        year, seconds, windows = int(year), float(seconds), PureWindowsPath(name)
        good = (
            split in SPLITS
            and 0 < seconds < 86_400
            and 1900 < year < 2200
            and windows.suffix.lower() in MIDI
            and "\0" not in name
            and not windows.anchor
            and ".." not in windows.parts
        )
    except (AttributeError, ValueError):  # a short row, a word for a number
        good = False
    if not good:
        raise UserError(f"{table} has a row that makes no sense (line {line}): get MAESTRO again")
    return Performance(table.parent / name, composer, title, year, split, seconds)


def _few(found: list[Performance]) -> list[Performance]:
    """The ten of the sample out of a whole MAESTRO; of another collection eight, one and one."""
    by_name = {p.path.name: p for p in found}
    same = [by_name.get(PurePosixPath(row[-1]).name) for row in ten.TEN]
    if all(same):
        return same
    return [
        p
        for split, n in zip(SPLITS, (8, 1, 1), strict=True)
        for p in [p for p in found if p.split == split][:n]
    ]


def _mark(folder: Path) -> None:
    """Let `muspy.MAESTRODatasetV3` open the folder and the one above; a courtesy, so no error."""
    for place in (folder, folder.parent):
        with suppress(OSError):
            (place / MARK).touch()


def _from_muspy(say) -> None:
    """Fetch the official zip (address, size and checksum from MusPy) and unpack it into data/."""
    say("MAESTRO is not here yet: asking for the official zip (58 MB, once)")
    try:
        from muspy import MAESTRODatasetV3  # takes 4 s, so only here
    except ImportError as error:
        raise Unreachable("MusPy is not installed, see requirements.txt") from error
    source = MAESTRODatasetV3._sources["maestro"]
    with only_one(DATA / "maestro-lock", say):
        if (DATA / NAME).is_dir():  # another process was faster
            return
        archive = DATA / source["filename"]
        if not archive.is_file() or sha256_of(archive) != source["sha256"]:
            need_space(DATA, 3 * source["size"])
            fetch(source["url"], archive, size=source["size"], sha256=source["sha256"], say=say)
        _unpack(archive, DATA / NAME, f"the official {archive.name}")
        archive.unlink(missing_ok=True)


def _from_zip(archive: Path, say) -> Path:
    """Unpack a zip that the user names into data/, unless its files are there already."""
    if not zipfile.is_zipfile(archive):
        raise UserError(
            f"{archive} is neither a folder nor a whole zip: name MAESTRO's folder or its MIDI zip"
        )
    digest, target = sha256_of(archive), DATA / NAME
    note = f"the official {archive.name}"
    if digest != OFFICIAL_SHA256:
        note = f"{archive.name}, not the official zip, sha256 {digest[:12]}…\n{digest}"
        say(
            f"{archive.name} has another checksum than the official zip: its structure, its files' "
            "own checksums and their number are checked instead"
        )
    with only_one(DATA / "maestro-lock", say):
        if not target.is_dir():
            say(f"unpacking {archive.name} into {target.parent.name}/{target.name}")
            _unpack(archive, target, note)
        elif not _same_files(archive, target):
            raise UserError(f"{target} holds other files than {archive}: move that folder away")
    return target


def _unpack(archive: Path, target: Path, note: str) -> None:
    """Unpack MAESTRO's zip to `target`, its files counted against its table."""

    def check(work: Path) -> None:
        try:
            listed = len(read_folder(work))
        except UserError as error:  # the reader knows the zip, not the folder beside the target
            raise UserError(str(error).replace(str(work), str(archive))) from error
        there = sum(p.suffix.lower() in MIDI for p in work.rglob("*"))
        if there != listed:
            raise UserError(
                f"{archive} holds {there:,} MIDI files but its table lists {listed:,}: "
                "get MAESTRO again"
            )
        (work / ORIGIN).write_text(note + "\n", "utf-8")

    unpack(archive, target, suffixes=WANTED, marker=TABLE, check=check)
    _mark(target)


def _same_files(archive: Path, folder: Path) -> bool:
    """Whether every MIDI file and table of the zip is in the folder, with the same bytes."""
    with os_errors(f"read {archive}"), reading(archive) as zipped:
        for name, entry in entries(zipped, archive, (*MIDI, ".csv"), TABLE).items():
            mine = folder / name
            if not mine.is_file() or mine.stat().st_size != entry.file_size:
                return False
            if zlib.crc32(mine.read_bytes()) != entry.CRC:
                return False
    return True


def leaking_titles(found: list[Performance]) -> set[tuple[str, str]]:
    """The (composer, title) pairs with performances in more than one split.

    MAESTRO means to keep a piece within one split; where it does not, a model has seen the piece.
    """
    splits: dict[tuple[str, str], set[str]] = {}
    for p in found:
        splits.setdefault((p.composer, p.title), set()).add(p.split)
    return {piece for piece, where in splits.items() if len(where) > 1}


def counts(found: list[Performance]) -> dict[str, tuple[int, float]]:
    """For each split, how many performances and how many hours."""
    mine = {split: [p.seconds for p in found if p.split == split] for split in SPLITS}
    return {split: (len(seconds), sum(seconds) / 3600) for split, seconds in mine.items()}


def summary(found: list[Performance]) -> str:
    """A small table of performances and hours per split, and the titles that cross splits."""
    table = counts(found)
    table["all"] = tuple(map(sum, zip(*table.values(), strict=True)))
    leaks = sorted(leaking_titles(found))
    return "\n".join(
        [
            f"{'split':<12}{'performances':>12}{'hours':>9}",
            *(f"{split:<12}{number:>12,}{hours:>9.2f}" for split, (number, hours) in table.items()),
            f"titles that cross splits: {len(leaks)}",
            *(f"  {composer}: {title}" for composer, title in leaks),
        ]
    )
