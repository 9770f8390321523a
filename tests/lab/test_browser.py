"""Claims about lib.lab.browser and data/play.html:
the page plays what `lib` plays, alone, in a real browser.

Where Chromium or Chrome is missing, the page is still held to its sources,
its weights and its table.
"""

import base64
import json
import re
import time
import zlib

import numpy as np
import pytest
import torch
from browser import browser, found

from lib.env.errors import UserError
from lib.generate.control import Controls
from lib.generate.grammar import NoteReader
from lib.generate.moment import dice, hear
from lib.generate.player import Player, load_model, prompt_end
from lib.generate.sampling import Sampling
from lib.lab.browser import build
from lib.lab.browser.__main__ import main
from lib.music.notes import Music, make_notes, read_midi, sustain, write_midi
from lib.music.tokens import first_seconds, prompt_music

STEPS = 200  # tokens a run: logits differ by some 2e-5, so once in thousands a token may be another


@pytest.fixture(scope="module")
def shipped():
    return load_model()


@pytest.fixture(scope="module")
def text():
    return build.PAGE.read_text(encoding="utf-8")


def part(text, name):
    return re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', text, re.DOTALL)[1]


def bytes_of(text, name):
    return zlib.decompress(base64.b64decode(part(text, name)))


# ---- the file -------------------------------------------------------------------------------


def test_the_page_is_made_from_the_sources_and_the_model_that_lie_here():
    assert not build.stale(), "run python -m lib.lab.browser"


def test_the_page_holds_the_shipped_weights_and_what_lib_says_of_the_vocabulary(text, shipped):
    model, tokenizer = shipped
    large, embeddings = build.weights(model)
    assert bytes_of(text, "weights") == large and bytes_of(text, "embeddings") == embeddings
    assert json.loads(part(text, "facts")) == json.loads(json.dumps(build.facts(model, tokenizer)))
    assert bytes_of(text, "wasm").startswith(b"\0asm")


def test_the_page_names_no_other_address_and_keeps_its_size(text):
    rest = re.sub(r"[A-Za-z0-9+/=]{1000,}", "", text)
    assert not re.search(
        r"""\b(src|href)\s*=\s*["']|@import|\bfetch\(|XMLHttpRequest|importScripts""", rest
    )
    assert build.PAGE.stat().st_size <= build.LARGEST


def test_another_source_or_model_makes_the_page_stale(tmp_path, monkeypatch):
    assert build.stale(tmp_path / "none.html")
    for name in ("config.json", "tokens.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((build.MODEL / name).read_bytes())
    before = build.made_from(tmp_path)
    assert before == build.made_from()
    (tmp_path / "tokens.json").write_text("{}")
    assert build.made_from(tmp_path) != before
    monkeypatch.setattr(build, "made_from", lambda: "another")
    assert build.stale()
    with pytest.raises(UserError, match="stale: run python -m lib.lab.browser"):
        main(["--check"])


def test_without_a_compiler_for_webassembly_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(UserError, match="pip install -r requirements-optional.txt"):
        main(["--out", str(tmp_path / "play.html")])
    assert not list(tmp_path.iterdir())


# ---- the program in it, beside lib ----------------------------------------------------------

needs_browser = pytest.mark.skipif(found() is None, reason="needs Chromium or Chrome")
# Runs in the page before its scripts: its weights stay there, for a model of the test's own.
KEEP_WEIGHTS = "Element.prototype.remove = function () {};"
MODEL = """(async () => {
  const program = $("engine").textContent + "\\nreturn { Dice, Rules, Grammar, Encoder, Model, Player };";
  globalThis.lib = new Function(program)();
  const [wasm, weights, embeddings] = await Promise.all(["wasm", "weights", "embeddings"].map(unpack));
  lib.rules = new lib.Rules(facts.table);
  const model = new lib.Model(wasm, new Float32Array(weights), widen(embeddings), facts.sizes, facts.epsilon);
  lib.player = new lib.Player(model, lib.rules);
  lib.play = (tokens, begin, seed, settings, steps) => {
    lib.player.start(tokens, begin, seed);
    lib.player.set(settings);
    while (lib.player.unread.length) lib.player.step();
    const first = Array.from(lib.player.logits), choices = [], played = [], notes = [];
    for (let i = 0; i < steps; i++) {
      if (i % 50 === 0) choices.push(lib.player.grammar.choices());
      notes.push(...lib.player.step());
      played.push(lib.player.last);
    }
    return { first, played, choices, notes, last: Array.from(lib.player.logits) };
  };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        page.open(build.PAGE.as_uri(), before=KEEP_WEIGHTS)
        page.until("!$('play').disabled")
        page.run(MODEL)
        yield page


def call(page, function, *arguments):
    """What a function of the page gives for arguments that JSON can hold."""
    return page.run(f"({function})(...{json.dumps(arguments)})")


def some_music(seed, seconds=12.0, count=90):
    """Chords, repeats, notes of all lengths and strengths, and bars without a note."""
    rng = np.random.default_rng(seed)
    start = np.sort(
        rng.choice([0.0, 1.0, 7.0], count) + rng.integers(0, 400, count) * seconds / 1600
    )
    length = rng.choice([0.004, 0.05, 0.3, 1.5, 5.0, 18.0], count)
    pedal = np.array([[0.5, 1.7], [2.0, 2.5]]) if seed % 2 else np.zeros((0, 2))
    return Music(
        make_notes(
            start, start + length, rng.integers(21, 109, count), rng.integers(1, 128, count)
        ),
        pedal,
    )


@needs_browser
def test_the_dice_are_those_of_numpy(page):
    for seed in (0, 1, 7, 2026, 2**31, 2**32 + 5, 2**53 - 1):
        ours = dice(seed).random(20).tolist()
        assert (
            page.run(f"(d => Array.from({{length: 20}}, () => d.throw()))(new lib.Dice({seed}n))")
            == ours
        )


@needs_browser
@pytest.mark.parametrize(
    "seed, sampling, controls, prompt",
    [
        (1, Sampling(), Controls(), None),
        (0, Sampling(0.6, min_p=0.05), Controls(-3, -3, -3), 4),
        (2**53 - 1, Sampling(1.4), Controls(3, 3, 3), 9),
        (3, Sampling(0, top_p=1), Controls(density=1), 3),
    ],
)
def test_the_same_seed_plays_the_same_tokens_as_lib(
    page, shipped, seed, sampling, controls, prompt
):
    model, tokenizer = shipped
    tokens, begin = [tokenizer.bos], 0.0
    if prompt:
        music = some_music(prompt)
        begin = prompt_end(music, prompt)
        tokens = first_seconds(tokenizer, music, begin).tolist()
    start = hear(model, tokenizer, tokens, begin=begin)
    player = Player(model, tokenizer, [start], [seed], sampling, controls)
    allowed, played = [], []
    for i in range(STEPS):
        if i % 50 == 0:
            allowed.append(np.flatnonzero(player.grammars[0].may_follow()).tolist())
        played += player.step()
    settings = {
        "temperature": sampling.temperature,
        "topP": sampling.top_p,
        "minP": sampling.min_p,
        "density": controls.density,
        "register": controls.register,
        "loudness": controls.loudness,
    }
    theirs = call(page, "lib.play", tokens, begin, seed, settings, STEPS)
    assert theirs["played"] == played and theirs["choices"] == allowed
    for logits, name in ((start.logits, "first"), (player.logits, "last")):
        assert torch.allclose(torch.tensor(theirs[name]), logits[0], atol=2e-4, rtol=0), name
    notes = NoteReader(tokenizer, start.grammar).notes(played).tolist()
    assert np.allclose(
        sorted(theirs["notes"], key=lambda note: (note[0], note[2])), notes, atol=1e-9
    )


@needs_browser
@pytest.mark.parametrize("seed", range(4))
def test_a_file_becomes_the_opening_that_lib_makes_of_it(page, shipped, tmp_path, seed):
    _, tokenizer = shipped
    write_midi(some_music(seed), tmp_path / "opening.mid")
    data = base64.b64encode((tmp_path / "opening.mid").read_bytes()).decode()
    opening = page.run(
        f"firstSeconds(readMidi(Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0))), 10)"
    )
    music = read_midi(tmp_path / "opening.mid")
    end = prompt_end(music, 10)
    assert opening["split"] == pytest.approx(end, abs=1e-6)
    assert np.allclose(opening["notes"], prompt_music(music, end).notes.tolist(), atol=1e-6)
    tokens = call(page, "(notes) => new lib.Encoder(lib.rules).encode(notes)", opening["notes"])
    assert tokens == first_seconds(tokenizer, music, end).tolist()


def midi_file(*tracks, behind=b""):
    """A file of 480 ticks a quarter note."""
    chunks = b"".join(b"MTrk" + len(t).to_bytes(4) + t for t in tracks)
    return b"MThd" + bytes([0, 0, 0, 6, 0, 1, 0, len(tracks), 1, 224]) + chunks + behind


GM_RESET = b"\x00\xf0\x05\x7e\x7f\x09\x01\xf7"
SLOW = b"\x00\xff\x51\x03\x0f\x42\x40"  # 60 BPM
STRIKE, LET_UP = b"\x00\x90\x3c\x50", b"\x83\x60\x80\x3c\x00"  # a quarter note apart
END_AT_ONCE, END_LATER = b"\x00\xff\x2f\x00", b"\x87\x40\xff\x2f\x00"
FOREIGN = {
    "a reset before the tempo": midi_file(
        GM_RESET + SLOW + END_AT_ONCE, STRIKE + LET_UP + END_AT_ONCE
    ),
    "a message of the system inside a note": midi_file(
        STRIKE + GM_RESET + b"\x00\xf8" + LET_UP + END_AT_ONCE
    ),
    "a key that never comes up": midi_file(STRIKE + END_LATER),
    "all notes off": midi_file(STRIKE + b"\x83\x60\xb0\x7b\x00" + END_LATER),
    "a pedal that a reset lifts": midi_file(
        b"\x00\xb0\x40\x7f" + STRIKE + LET_UP + b"\x83\x60\xb0\x79\x00" + END_LATER
    ),
    "all sound off on another channel": midi_file(
        b"\x00\xb0\x40\x7f" + STRIKE + LET_UP + b"\x83\x60\xb1\x78\x00" + END_LATER
    ),
    "all sound off under the pedal": midi_file(
        b"\x00\xb0\x40\x7f" + STRIKE + LET_UP + b"\x83\x60\xb0\x78\x00" + END_LATER
    ),
    "all notes off in another track": midi_file(
        STRIKE + END_LATER, b"\x83\x60\xb0\x7b\x00" + END_AT_ONCE
    ),
    "something behind the last track": midi_file(STRIKE + LET_UP + END_AT_ONCE, behind=b"MTrk" * 3),
}


@needs_browser
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_read_as_lib_reads_them(page, tmp_path, name):
    (tmp_path / "foreign.mid").write_bytes(FOREIGN[name])
    data = base64.b64encode(FOREIGN[name]).decode()
    notes = page.run(f"readMidi(Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0)))")
    ours = sustain(read_midi(tmp_path / "foreign.mid")).notes.tolist()
    assert len(notes) == 1 and np.allclose(notes, ours, atol=1e-9)


@needs_browser
def test_however_long_it_plays_the_model_needs_no_more_memory(page):
    grown = page.run("""(() => {
      const memory = lib.player.model.exports.memory, settings = { temperature: 1, topP: 0.95, minP: 0, density: 0,
        register: 0, loudness: 0 };
      lib.play([facts.table.bos], 0, 5, settings, 50);
      const before = memory.buffer.byteLength;
      lib.play([facts.table.bos], 0, 5, settings, 600);
      return memory.buffer.byteLength - before;
    })()""")
    assert grown == 0


@needs_browser
def test_the_piano_sounds_louder_when_struck_harder_never_clips_and_falls_silent(page):
    # held by a name, as the protocol would let go of a promise that nobody holds
    played = page.run("""globalThis.rendering = (async () => {
      const levels = async (notes) => {
        const context = new OfflineAudioContext(2, 44100 * 4, 44100), piano = new Piano(context);
        for (const [start, end, pitch, velocity] of notes) piano.strike(pitch, velocity, start, end);
        const wave = (await context.startRendering()).getChannelData(0);
        const most = (from, to) =>
          wave.subarray(from * 44100, to * 44100).reduce((a, b) => Math.max(a, Math.abs(b)), 0);
        return [most(0, 0.1), most(0.1, 1), most(3.5, 4)];
      };
      const chord = Array.from({ length: 10 }, (_, i) => [0.1, 1, 36 + 6 * i, 127]);
      return [await levels([[0.1, 1, 60, 20]]), await levels([[0.1, 1, 60, 110]]), await levels(chord),
        await levels([[0.1, 1, 21, 90]]), await levels([[0.1, 1, 108, 90]])];
    })()""")
    soft, loud, chord, lowest, highest = played
    assert 0.003 < soft[1] < 0.3 * loud[1] and loud[1] < chord[1] < 1
    assert min(lowest[1], highest[1]) > 0.03
    for before, _, after in played:
        assert before == 0 and after < 0.003


# ---- as a reader meets it -------------------------------------------------------------------


def drop(page, data):
    """Give the page a file, as if it had been chosen."""
    text = base64.b64encode(data).decode()
    page.run(f"open(new File([Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0))], 'x'))")


@needs_browser
@pytest.mark.parametrize("before", ["", "delete globalThis.Worker;"], ids=["worker", "slices"])
def test_it_opens_from_disk_plays_pauses_and_saves_and_asks_for_nothing(page, tmp_path, before):
    page.open(build.PAGE.as_uri(), before=before)
    page.until("!$('play').disabled")
    page.run("$('play').click()")
    page.until("piece.notes.length > 15 && seconds() > 1")
    page.run("$('play').click()")
    page.until("piece.state === 'paused'")
    assert page.run("$('play').textContent") == "Go on"
    rest = page.run("seconds()")
    time.sleep(0.3)
    assert page.run("seconds()") == pytest.approx(rest, abs=0.02)
    theirs, saved = page.run("[piece.notes, Array.from(writeMidi(piece.notes))]")
    (tmp_path / "saved.mid").write_bytes(bytes(saved))
    back = read_midi(tmp_path / "saved.mid").notes
    assert len(back) == len(theirs)
    assert np.allclose(np.sort(back["start"]), sorted(note[0] for note in theirs), atol=1e-3)
    assert page.requests() == [build.PAGE.as_uri()] and not page.errors()


@needs_browser
def test_the_page_plays_the_same_piece_again_for_the_same_seed(page):
    pieces = []
    for seed in (0, 0, 1):
        page.run(f"$('seed').value = {seed}; $('seed').onchange()")
        page.until("piece.state === 'playing' && piece.notes.length >= 15")
        pieces.append(page.run("piece.notes.slice(0, 15)"))
    assert pieces[0] == pieces[1] != pieces[2]


@needs_browser
def test_a_file_that_is_no_music_is_one_sentence_and_playing_goes_on(page):
    page.run("start()")
    page.until("piece.state === 'playing'")
    header = b"MThd\0\0\0\6\0\1\0\1\1\xe0"
    drums = header + b"MTrk\0\0\0\x0c\0\x99\x24\x50\x10\x89\x24\0\0\xff\x2f\0"
    for data, words in (
        (b"", "empty"),
        (b"hello", "not a MIDI file"),
        (header[:9], "damaged"),
        (header + b"MTrk\0\0\0\xff", "damaged"),
        (header, "no notes"),
        (drums, "no notes"),
        (header[:12] + b"\0\0" + drums[14:], "damaged"),
    ):
        drop(page, data)
        page.until(f"$('says').textContent.includes('{words}')", seconds=10)
    assert page.run("piece.state") == "playing" and not page.errors()


@needs_browser
def test_what_a_reader_plays_becomes_the_opening_and_the_model_takes_over(page):
    for letter in "adg":
        for kind in ("keyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=letter,
                code=f"Key{letter.upper()}",
                windowsVirtualKeyCode=ord(letter.upper()),
            )
    assert page.run("piece.state") == "listening"
    page.until("piece.state === 'playing' && piece.notes.length > 6")
    notes, split = page.run("piece.notes"), page.run("piece.split")
    assert [note[2] for note in notes[:3]] == [60, 64, 67]
    assert split > 2 and all(note[0] < split for note in notes[:3])
    assert all(note[0] >= split - 0.011 for note in notes[3:])  # within a step of the grid
    assert not page.errors()


@needs_browser
def test_what_was_played_more_than_an_hour_ago_is_let_go(page):
    page.run("piece.number++; piece.state = 'idle'")  # nobody adds to it
    page.run(
        "piece.notes = Array.from({length: 7200}, (_, i) => [i, i + 0.5, 60, 60]); "
        "piece.zero = piano.now - 7200;"
        "tick()"
    )
    assert 3590 <= page.run("piece.notes.length") <= 3610
