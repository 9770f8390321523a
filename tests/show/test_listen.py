"""Claims about `lib.show.listen`: what is heard is what the notes say."""

import base64
import errno
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lib.env.errors import UserError
from lib.music.notes import NOTE, Music, make_notes
from lib.show import listen

RATE = 44_100


def some_music(seconds=6.0, count=60, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, seconds - 1, count)
    notes = make_notes(
        start,
        start + rng.uniform(0.05, 1.0, count),
        rng.integers(30, 95, count),
        rng.integers(30, 110, count),
    )
    return Music(notes, np.array([[0.5, 2.0], [2.5, 4.0]]))


def one_note(pitch=60, velocity=80, end=1.0, pedal=()):
    return Music(
        make_notes([0.0], [end], [pitch], [velocity]), np.asarray(pedal, "f8").reshape(-1, 2)
    )


def energy(audio, begin, end, rate=RATE):
    return float(np.mean(audio[round(begin * rate) : round(end * rate)].astype("f8") ** 2))


def clip_bytes(page):
    source = re.search(r'src="data:audio/mpeg;base64,([^"]+)"', page.data).group(1)
    return base64.b64decode(source)


@pytest.fixture(params=["sound font", "built-in"])
def piano(request, monkeypatch):
    """Both instruments: the sound font's, and the one that stands in where it is missing."""
    if request.param == "built-in":
        monkeypatch.setattr(listen, "_font", lambda: None)
    elif listen._font() is None:
        pytest.skip("midirenderer has no wheel for this machine")


@pytest.mark.parametrize("rate", [22_050, 32_000, 44_100, 48_000])
def test_sound_is_mono_float_audible_unclipped_with_peak_0_9_and_right_length(piano, rate):
    music = some_music()
    audio = listen.render(music, rate=rate)
    facts = listen.check(audio, rate)
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert facts["peak"] == pytest.approx(0.9, abs=1e-4) and facts["clipped"] == 0
    assert not facts["silent"] and facts["rms"] > 0.02
    assert facts["seconds"] == pytest.approx(music.seconds + listen.TAIL, abs=1 / rate)


def test_sound_begins_at_once_and_ends_faded(piano):
    audio = listen.render(one_note(end=2.0))
    assert np.argmax(np.abs(audio) > 0.05) < 0.05 * RATE
    assert abs(audio[-1]) < 1e-4


def test_same_notes_give_the_same_samples(piano):
    assert np.array_equal(listen.render(some_music()), listen.render(some_music()))


def test_silence_stays_silence(piano):
    audio = listen.render(Music(np.zeros(0, NOTE)))
    facts = listen.check(audio)
    assert facts["silent"] and facts["peak"] == 0 and np.isfinite(audio).all()
    assert facts["seconds"] == pytest.approx(listen.TAIL)
    assert clip_bytes(listen.player(Music(np.zeros(0, NOTE))))


def test_pedal_makes_a_short_note_ring_longer(piano):
    dry = listen.render(one_note(end=0.2))
    wet = listen.render(one_note(end=0.2, pedal=[[0.1, 3.0]]))
    assert energy(wet, 1.0, 1.5) > 30 * energy(dry, 1.0, 1.5)
    assert energy(wet, 2.0, 2.9) > 0


def test_a_note_struck_before_the_pedal_went_down_does_not_ring(piano):
    short = listen.render(one_note(end=0.2, pedal=[[0.5, 3.0]]))
    assert energy(short, 1.0, 1.5) < 1e-2 * energy(short, 0.0, 0.2)


def test_higher_velocity_is_louder_before_normalising(piano):
    peaks = [np.abs(listen._play(one_note(velocity=v), RATE)).max() for v in (30, 60, 90, 120)]
    assert peaks == sorted(peaks) and peaks[-1] > 3 * peaks[0]


@pytest.mark.parametrize("pitch", [33, 45, 57, 69, 81, 93])
def test_strongest_frequency_is_the_pitch_or_a_low_harmonic(piano, pitch):
    audio = listen.render(one_note(pitch, 90, end=2.0))[: 2 * RATE]
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    ratio = np.argmax(spectrum) / 2 / (440 * 2 ** ((pitch - 69) / 12))
    harmonic = max(1, round(ratio))
    assert harmonic <= (6 if pitch < 50 else 2)
    # a third of a semitone: pianos are tuned stretched
    assert abs(12 * np.log2(ratio / harmonic)) < 0.33


def test_a_key_struck_twice_is_heard_twice(piano):
    music = Music(make_notes([0, 1.0], [1.0, 2.0], [60, 60], [90, 90]))
    audio = listen.render(music)
    assert energy(audio, 1.02, 1.2) > 1.5 * energy(audio, 0.75, 0.95)


def test_chunks_join_without_a_seam(piano, monkeypatch):
    music = some_music(seconds=14, count=120)
    whole = listen.render(music)
    monkeypatch.setattr(listen, "_CHUNK", 4)
    assert np.abs(listen.render(music) - whole).max() < 1e-3  # of 0.9; 16-bit steps are 3e-4


def test_a_crowd_of_loud_notes_does_not_clip():
    rng = np.random.default_rng(0)
    start = np.repeat(np.arange(0, 2, 0.2), 40)
    music = Music(
        make_notes(start, start + 1, rng.integers(21, 109, len(start)), np.full(len(start), 127))
    )
    facts = listen.check(listen.render(music))
    assert facts["clipped"] == 0 and facts["peak"] == pytest.approx(0.9, abs=1e-4)


def test_a_clipped_chunk_is_rendered_again_at_a_lower_volume(monkeypatch):
    tried = []

    def loud(font, notes, seconds, volume):
        tried.append(volume)
        return None if volume > 64 else np.full(seconds * 48_000, 0.5, "f4")

    monkeypatch.setattr(listen, "_font", lambda: b"font")
    monkeypatch.setattr(listen, "_midirenderer", loud)
    assert not listen.check(listen.render(one_note()))["silent"]
    assert tried == [127, 90, 64]


def test_more_than_two_hours_is_one_sentence():
    with pytest.raises(UserError, match="too long to play.*two hours"):
        listen.render(one_note(end=3 * 3600))


@pytest.mark.parametrize("missing", ["midirenderer", "font"])
def test_a_missing_renderer_or_font_is_said_once_and_the_built_in_piano_plays(
    missing, monkeypatch, capsys
):
    if missing == "font":
        if listen._font() is None:
            pytest.skip("midirenderer has no wheel for this machine")
        monkeypatch.setattr(listen, "_find", lambda *_: None)
    else:
        monkeypatch.setitem(__import__("sys").modules, "midirenderer", None)
    listen._font.cache_clear()
    try:
        for _ in range(2):
            assert not listen.check(listen.render(one_note()))["silent"]
    finally:
        listen._font.cache_clear()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "built-in piano" in said


def test_mp3_reads_back_audible_unclipped_and_of_the_same_length(tmp_path):
    music = some_music(seconds=12, count=150)
    path = tmp_path / "new folder" / "piece.mp3"
    listen.save_mp3(music, path)
    audio, rate = soundfile.read(path)
    facts = listen.check(audio, rate)
    assert rate == RATE and audio.ndim == 1
    assert facts["seconds"] == pytest.approx(music.seconds + listen.TAIL, abs=0.1)
    assert 0.8 < facts["peak"] < 0.97 and facts["clipped"] == 0  # MP3 moves peaks a little
    assert path.stat().st_size / facts["seconds"] * 60 < 500_000
    assert [p.name for p in path.parent.iterdir()] == ["piece.mp3"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "piece.mp3"
    path.write_bytes(b"old")
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="disk is full"):
        listen.save_mp3(one_note(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["piece.mp3"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(UserError, match="could not write"):
        listen.save_mp3(one_note(), tmp_path / "file" / "piece.mp3")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_player_embeds_a_small_clip_and_needs_no_network():
    music = some_music(seconds=30, count=300)
    page = listen.player(music, "Thirty seconds", seconds=10)
    page_without_names = page.data.replace("xmlns='http://www.w3.org/2000/svg'", "")
    assert "http" not in page_without_names
    assert len(page.data) < 75_000
    audio, rate = soundfile.read(io.BytesIO(clip_bytes(page)))
    assert rate == listen.PLAYER_RATE
    assert listen.check(audio, rate)["seconds"] == pytest.approx(10 + listen.TAIL, abs=0.1)
    assert not listen.check(audio, rate)["silent"]


def test_player_escapes_its_title_and_labels_itself():
    page = listen.player(one_note(), title='"Für" <b>Elise</b> & co')
    assert "<b>" not in page.data and "&lt;b&gt;Elise" in page.data
    label = re.search(r'aria-label="([^"]+)"', page.data).group(1)
    assert label.startswith("&quot;Für&quot;") and label.endswith("seconds of sound")
    assert 'aria-label="Piano, 2 seconds of sound"' in listen.player(one_note()).data


def test_check_counts_what_is_there():
    facts = listen.check(np.array([0.0, 1.0, -1.0, 0.0]), rate=2)
    assert facts == {
        "peak": 1.0,
        "rms": pytest.approx(0.5**0.5),
        "seconds": 2.0,
        "clipped": 0.5,
        "silent": False,
    }
    assert listen.check(np.zeros(0))["silent"]
