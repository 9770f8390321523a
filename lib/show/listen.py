"""Hear a piece: notes to sound, to an MP3 file, to a player in the page.

Everything comes from pip packages and works offline. `midirenderer` plays the notes with the
piano of the sound font `TimGM6mb.sf2`, which lies inside the installed `pretty_midi`. Where
one of the two is missing, a small piano made of decaying sines takes over and says so once.
"""

import base64
import importlib.util
import io
import math
from functools import cache, partial
from pathlib import Path

import numpy as np

from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.music.notes import Music, crop, sustain
from lib.show.moving_roll import player_html

PEAK = 0.9  # loudest sample after normalising
TAIL = 1.5  # seconds that the sound goes on after the last note
FADE = 1.0  # seconds, at the end of the tail
LONGEST = 2 * 3600  # seconds of music that one call renders (1.3 GB of samples)
PLAYER_RATE = 24_000  # Hz in a page: under 0.1 % of a piano's energy lies above 12 kHz
PLAYER_LEVEL = 0.8  # a little smaller still, as every clip lies in a notebook
MP3_LEVEL = 0.7  # of variable bit rate: 0.3 MB a minute at 44,100 Hz

_NATIVE = 48_000  # Hz, the only rate of midirenderer
_CHUNK = 120  # seconds rendered at a time, so that memory stays bounded
_BEFORE = 20  # seconds played before each chunk and thrown away: notes that still ring
_AFTER = 1  # and after it, so that resampling has no edge at the seam
_VOLUMES = (127, 90, 64, 45, 32, 16, 8)  # MIDI volumes, tried till nothing clips


def render(music: Music, *, rate: int = 44_100) -> np.ndarray:
    """The piece as sound: float32, mono, shape (samples,), peak 0.9; silence stays silence.

    The pedal is honoured: `notes.sustain` turns it into longer notes, as the tokens do. The
    sound lasts `music.seconds` + 1.5 s, the end faded. Raises `UserError` above two hours.
    """
    return _finish(_play(music, rate), rate)


def save_mp3(music: Music, path: str | Path, *, rate: int = 44_100) -> None:
    """Write the piece as a mono MP3 (0.3 MB a minute), whole or not at all."""
    data = mp3_bytes(render(music, rate=rate), rate)
    with atomic_write(path) as part:
        part.write_bytes(data)


def player(
    music: Music,
    title: str = "",
    seconds: float | None = None,
    *,
    prompt_seconds: float | None = None,
):
    """A piano roll that moves with its sound, for a notebook page: MP3 embedded, no network.

    Ten seconds take about 65 KB. `seconds` plays only the beginning; what comes before
    `prompt_seconds` is shaded. Where scripts are stripped the roll stands still and the audio
    control remains. Returns an IPython `HTML` object.
    """
    from IPython.display import HTML

    if seconds is not None:
        music = crop(sustain(music), 0, seconds)
    sound = _play(music, PLAYER_RATE)
    if seconds is not None:
        sound = sound[: math.ceil((seconds + TAIL) * PLAYER_RATE)]
    data = mp3_bytes(_finish(sound, PLAYER_RATE), PLAYER_RATE, level=PLAYER_LEVEL)
    source = "data:audio/mpeg;base64," + base64.b64encode(data).decode()
    length = len(sound) / PLAYER_RATE
    return HTML(player_html(source, music, length, title, prompt_seconds))


def check(audio: np.ndarray, rate: int = 44_100) -> dict:
    """What can be said of a mono sound without hearing it.

    `peak` and `rms` on a scale where 1 is full, `seconds`, `clipped` (the fraction of samples
    at full scale) and `silent` (nothing louder than -60 dB).
    """
    size = np.abs(np.asarray(audio, "f8"))
    peak = float(size.max(initial=0.0))
    return {
        "peak": peak,
        "rms": float(np.sqrt(np.mean(size**2))) if len(size) else 0.0,
        "seconds": len(size) / rate,
        "clipped": float(np.mean(size >= 0.999)) if len(size) else 0.0,
        "silent": peak < 1e-3,
    }


def mp3_bytes(audio: np.ndarray, rate: int, level: float = MP3_LEVEL) -> bytes:
    """Mono sound as the bytes of an MP3 file with variable bit rate.

    `rate` is one that MP3 knows: 16, 22.05, 24, 32, 44.1 or 48 kHz. Encoded in blocks: one
    call with a very long sound has crashed the library.
    """
    import soundfile

    out = io.BytesIO()
    with soundfile.SoundFile(
        out, "w", rate, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=level
    ) as file:
        for begin in range(0, len(audio), 10 * rate):
            file.write(audio[begin : begin + 10 * rate])
    return out.getvalue()


def _finish(sound: np.ndarray, rate: int) -> np.ndarray:
    """Fade the end, then normalise the peak, in place."""
    fade = min(len(sound), round(FADE * rate))
    if fade:
        sound[-fade:] *= 0.5 + 0.5 * np.cos(np.linspace(0, np.pi, fade, dtype="f4"))
    peak = max(sound.max(initial=0), -sound.min(initial=0))
    if peak > 0:
        sound *= PEAK / peak
    return sound


def _play(music: Music, rate: int) -> np.ndarray:
    """The piece as sound at its own loudness: float32 (samples,), full scale at 1."""
    total = music.seconds + TAIL
    if not total <= LONGEST + TAIL:
        raise UserError(
            f"a piece of {total / 3600:.1f} hours is too long to play: give at most two hours"
        )
    notes = sustain(music).notes
    font = _font()
    synth = partial(_midirenderer, font) if font else _sines
    out = np.zeros(math.ceil(total) * rate, "f4")
    for volume in _VOLUMES:
        if _fill(out, notes, rate, volume, synth):
            break
    return out[: round(total * rate)]


def _fill(out, notes, rate, volume, synth) -> bool:
    """Render chunk by chunk into `out` at one volume; False as soon as one chunk clips.

    Each chunk begins early enough for the notes that ring into it, so the seams are exact:
    the renderer works in blocks of 64 samples, of which a second holds a whole number.
    """
    length = len(out) // rate
    for begin in range(0, length, _CHUNK):
        end = min(begin + _CHUNK, length)
        first = max(0, begin - _BEFORE)
        last = min(length, end + _AFTER)
        within = (notes["start"] >= first) & (notes["start"] < last)
        near = notes[within & (notes["end"] > begin - 4)].copy()
        if not len(near):
            continue
        near["start"] -= first
        near["end"] -= first
        sound = synth(near, last - first, volume)
        if sound is None:
            return False
        if last > end:  # resampling joins the last sample to the first: meet it at zero
            sound[-_AFTER * _NATIVE :] *= np.linspace(1, 0, _AFTER * _NATIVE, dtype="f4")
        sound = _resample(sound, rate)
        out[begin * rate : end * rate] = sound[(begin - first) * rate : (end - first) * rate]
    return True


def _resample(sound: np.ndarray, rate: int) -> np.ndarray:
    """From 48 kHz to `rate`, for whole seconds: the spectrum is cut or extended with zeros."""
    if rate == _NATIVE:
        return sound
    size = len(sound) // _NATIVE * rate
    spectrum = np.fft.rfft(sound)[: size // 2 + 1]
    return np.fft.irfft(spectrum, size) * (size / len(sound))


def _find(package: str, name: str) -> Path | None:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    paths = [Path(p) / name for p in (spec.submodule_search_locations or [])] if spec else []
    return next((p for p in paths if p.is_file()), None)


@cache
def _font() -> bytes | None:
    """The sound font's bytes, or None (said once) where the renderer or the font is missing."""
    try:
        import midirenderer  # noqa: F401 - no wheel on macOS with an Intel processor
    except ImportError:
        missing = "midirenderer"
    else:
        font = _find("pretty_midi", "TimGM6mb.sf2")
        if font:
            return font.read_bytes()
        missing = "the sound font of pretty_midi"
    print(f"sound: {missing} is not installed here, so a simple built-in piano plays")
    return None


def _midirenderer(font: bytes, notes: np.ndarray, seconds: int, volume: int):
    """Notes (in seconds from 0) played with the sound font: float32 (seconds * 48,000,).

    None where the sound clips: the renderer writes 16 bits, so a lower volume must be tried.
    """
    import midirenderer
    import soundfile

    wave = midirenderer.render_wave_from(font, _midi_bytes(notes, seconds, volume))
    sound, rate = soundfile.read(io.BytesIO(wave), dtype="float32", always_2d=True)
    assert rate == _NATIVE, f"midirenderer gave {rate} Hz"
    if np.abs(sound).max(initial=0) >= 0.999:
        return None
    mono = np.zeros(seconds * _NATIVE, "f4")
    size = min(len(mono), len(sound))
    mono[:size] = sound[:size].mean(axis=1)
    return mono


def _midi_bytes(notes: np.ndarray, seconds: float, volume: int) -> bytes:
    """A MIDI file in memory, 960 ticks a second, with an event at the end to set its length."""
    import symusic

    start = np.round(notes["start"] * 960).astype("i4")
    end = np.round(notes["end"] * 960).astype("i4")
    duration = np.maximum(end - start, 1)
    score = symusic.Score(480)
    score.tempos.append(symusic.Tempo(0, 120))
    track = symusic.Track("Piano", 0, False)
    track.notes = symusic.Note.from_numpy(
        start, duration, notes["pitch"].astype("i1"), notes["velocity"].astype("i1")
    )
    track.controls.append(symusic.ControlChange(0, 7, volume))
    track.controls.append(symusic.ControlChange(math.ceil(seconds * 960), 1, 0))
    score.tracks.append(track)
    return score.dumps_midi()


@cache
def _tone(pitch: int) -> np.ndarray:
    """Eight seconds of one string: up to ten partials, the high ones dying first. float32."""
    time = np.arange(8 * _NATIVE, dtype="f4") / _NATIVE
    pitch_hz = 440 * 2 ** ((pitch - 69) / 12)
    decay = 0.35 * 2 ** ((pitch - 60) / 18)  # a second; high strings ring shorter
    tone = np.zeros_like(time)
    for k in range(1, 11):
        hertz = k * pitch_hz * math.sqrt(1 + 3e-4 * k * k)  # a stiff string is slightly sharp
        if hertz < 11_000:
            partial_tone = np.sin(2 * np.pi * hertz * time) * np.exp(-decay * k * time)
            tone += partial_tone / k**1.6
    attack = round(0.004 * _NATIVE)
    tone[:attack] *= np.linspace(0, 1, attack, dtype="f4")
    return tone


def _sines(notes: np.ndarray, seconds: int, volume: int) -> np.ndarray:
    """The stand-in piano: the same arguments and result as `_midirenderer`, without the font."""
    out = np.zeros(seconds * _NATIVE, "f4")
    release = np.exp(-np.arange(round(0.5 * _NATIVE), dtype="f4") / (0.08 * _NATIVE))
    for start, end, pitch, velocity in notes.tolist():
        begin = round(start * _NATIVE)
        held = round((end - start) * _NATIVE)
        sound = _tone(pitch)[: held + len(release)].copy()
        dying = sound[held:]
        dying *= release[: len(dying)]
        room = out[begin : begin + len(sound)]
        loudness = 0.2 * (velocity / 127) ** 2 * (volume / 127) ** 2
        room += sound[: len(room)] * loudness
    return out
