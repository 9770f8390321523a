"""Claims about lib.generate: what it plays is decodable, repeatable and asked for."""

import itertools
import os
import re
import subprocess
import sys

import mido
import numpy as np
import pretty_midi
import pytest
import symusic
import torch

from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.generate.__main__ import main
from lib.generate.grammar import FOLLOWS, Grammar
from lib.generate.moment import dice, hear
from lib.generate.player import (
    MODEL,
    Player,
    continuations,
    generate,
    load_model,
    prompt_end,
    sample,
    variations,
)
from lib.generate.sampling import Sampling, draw
from lib.music.notes import Music, make_notes, read_midi, write_midi
from lib.music.tokens import TokenConfig, Tokenizer, first_seconds
from lib.show.listen import check


@pytest.fixture(scope="module")
def shipped():
    return load_model()


@pytest.fixture(scope="module")
def opening():
    """Five seconds of a scale, made here."""
    start = np.arange(20) * 0.25
    return Music(make_notes(start, start + 0.3, 60 + np.arange(20), np.full(20, 70)))


def same(a, b):
    return len(a.notes) == len(b.notes) and (a.notes == b.notes).all()


def test_the_same_seed_plays_the_same_notes_and_another_seed_others(shipped):
    one, two, other = (generate(*shipped, seconds=8, seed=s) for s in (1, 1, 2))
    assert len(one.notes) > 5 and same(one, two) and not same(one, other)


def test_the_length_is_what_was_asked_for(shipped):
    music = generate(*shipped, seconds=8, seed=3)
    assert music.notes["start"].max() < 8 and music.notes["end"].max() <= 8
    assert music.notes["start"].max() > 4  # it did not fall silent in the first half


def test_a_continuation_keeps_its_prompt_and_goes_on(shipped, opening):
    music = generate(*shipped, opening, prompt_seconds=4, seconds=6, seed=1)
    first = music.notes[music.notes["start"] < 3.9]
    assert len(first) == 16 and (first["pitch"] == 60 + np.arange(16)).all()
    np.testing.assert_allclose(first["start"], np.arange(16) * 0.25, atol=0.005)
    assert (music.notes["start"] >= 4).sum() > 3 and music.notes["start"].max() < 10


def test_a_short_prompt_is_read_whole(shipped, opening):
    music = generate(*shipped, opening, prompt_seconds=60, seconds=5, seed=1)
    assert (music.notes["start"] <= 4.76).sum() >= 20
    assert 5.05 <= music.notes["start"][20:].min() and music.notes["start"].max() < 5.05 + 5


def phrase(*rows, pedal=()):
    """Rows of (start, end, key)."""
    start, end, pitch = np.array(rows, float).T
    return Music(
        make_notes(start, end, pitch, np.full(len(rows), 70)), np.array(pedal, float).reshape(-1, 2)
    )


def test_a_prompt_is_heard_out_to_the_end_of_its_last_chord(shipped):
    chord = phrase((0, 0.5, 60), (0.5, 1, 62), (1, 7, 48), (1, 7, 64))
    for seed in range(3):
        music = generate(*shipped, chord, prompt_seconds=10, seconds=4, seed=seed)
        assert prompt_end(chord, 10) == 7
        assert music.notes["start"][4:].min() >= 7 and 7 < music.notes["start"].max() < 11
        assert music.notes["end"][2:4].tolist() == [7, 7]


def test_the_pedal_under_the_last_chord_belongs_to_the_prompt():
    assert prompt_end(phrase((0, 1, 60), pedal=[(0.5, 3)]), 10) == 3
    assert prompt_end(phrase((0, 30, 60)), 10) == 10
    assert prompt_end(phrase((0, 0, 60)), 10) == 0.01, "a note without length is heard too"


def test_a_key_held_across_the_cut_sounds_on_unless_it_is_struck_again(shipped):
    held = phrase((0, 20, 24), *((i / 2, i / 2 + 0.4, 60 + i % 5) for i in range(30)))
    music = generate(*shipped, held, prompt_seconds=5, seconds=16, seed=1)
    bass = music.notes[music.notes["pitch"] == 24]
    assert bass["start"][0] == 0 and bass["end"][0] == min([20, *bass["start"][1:]])
    assert (music.notes["start"] < 5).sum() == 11
    alone = generate(*shipped, phrase((0, 20, 36)), prompt_seconds=10, seconds=4, seed=1).notes
    assert alone["end"][0] >= 10 and alone["start"][1:].min() >= 10


def test_silence_before_the_first_note_is_left_out(shipped, opening):
    late = Music(opening.notes.copy())
    for edge in ("start", "end"):
        late.notes[edge] += 50
    one, two = (
        generate(*shipped, piece, prompt_seconds=3, seconds=4, seed=1) for piece in (opening, late)
    )
    assert (one.notes["pitch"] == two.notes["pitch"]).all()
    assert (
        np.abs(one.notes["start"] - two.notes["start"]).max() < 1e-9 and one.notes["start"][0] == 0
    )


def test_a_prompt_comes_back_as_it_was_played(shipped):
    played = phrase((0.0, 0.333, 60), (0.2345, 0.9, 64), (0.9, 1.2, 67))
    played.notes["velocity"] = 61, 62, 63
    music = generate(*shipped, played, seconds=2, seed=1)
    assert (music.notes[:3] == played.notes).all()


def test_a_prompt_without_a_note_is_one_sentence(shipped):
    with pytest.raises(UserError, match="no note"):
        generate(*shipped, Music(make_notes([], [], [], [])), seconds=2)


def test_the_prompt_changes_what_follows(shipped, opening):
    tokenizer = shipped[1]
    other = Music(
        make_notes(
            opening.notes["start"],
            opening.notes["end"],
            opening.notes["pitch"] - 30,
            opening.notes["velocity"],
        )
    )
    one, two = (
        [t for t, _ in sample(*shipped, first_seconds(tokenizer, m, 4), until=8, seed=5)]
        for m in (opening, other)
    )
    assert one != two


def test_sampling_from_the_recurrent_state_is_sampling_from_the_whole_prefix(shipped):
    """The tokens that the state gives are those that rereading the prefix each time gives."""
    model, tokenizer = shipped
    ids = [tokenizer.bos]
    tokens = [t for t, _ in sample(model, tokenizer, np.array(ids, np.uint16), until=3, seed=4)]
    grammar, random = Grammar(tokenizer), dice(4)
    grammar.read(ids[0])
    for token in tokens[:40]:
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0, -1]
        p = Sampling().probabilities(grammar.mask(logits))
        assert int(draw(p[None], torch.tensor([random.random()]))) == token
        grammar.read(token)
        ids.append(token)


def test_every_token_sequence_decodes_without_an_error(shipped):
    """MidiTok's own count of ungrammatical tokens is zero, inside merged tokens too."""
    from miditok import TokSequence

    model, tokenizer = shipped
    for seed in range(3):
        ids = [
            t
            for t, _ in sample(
                model,
                tokenizer,
                np.array([tokenizer.bos], np.uint16),
                until=10,
                seed=seed,
                # nearly noise
                sampling=Sampling(temperature=3.0, top_p=1.0),
            )
        ]
        names = [n for token in tokenizer.names(ids) for n in token]
        kinds = ["start"] + [n.split("_")[0] for n in names]
        assert all(b in FOLLOWS[a] for a, b in zip(kinds, kinds[1:]))
        sequence = TokSequence(tokens=names, ids=[tokenizer.base.vocab[n] for n in names])
        assert len(names) > 20
        assert tokenizer.base.tokens_errors(sequence) == 0
        position = -1
        for name in names:
            if name == "Bar_None":
                position = -1
            elif name.startswith("Position"):
                step = int(name.split("_")[1])
                assert step > position
                position = step


def test_the_mask_holds_inside_long_merges():
    """A tokenizer with so many merges that tokens hold whole chords and bars,
    and logits that know nothing.
    """
    from miditok import TokSequence

    rng, tokenizer = (
        np.random.default_rng(0),
        Tokenizer(TokenConfig(grid_ms=125, vocab_size=900, velocities=2)),
    )
    bar = [(0.0, 48), (0.0, 64), (0.5, 67), (1.0, 60), (1.0, 64), (1.0, 72)]
    start, pitch = np.array(
        [(2 * i + t, p + rng.integers(0, 3)) for i in range(200) for t, p in bar]
    ).T
    tokenizer.learn(
        [
            tokenizer.encode_base(
                Music(make_notes(start, start + 0.25, pitch, np.full(len(start), 70)))
            )
        ]
    )
    assert max(map(len, tokenizer.pieces)) > 8  # several notes in one token
    random, grammar, ids = dice(1), Grammar(tokenizer), []
    grammar.read(tokenizer.bos)
    for _ in range(3000):
        p = torch.softmax(
            grammar.mask(torch.from_numpy(random.normal(0, 2, tokenizer.vocab_size))), 0
        )
        ids.append(int(draw(p[None], torch.tensor([random.random()]))))
        grammar.read(ids[-1])
    assert sum(len(tokenizer.pieces[i]) > 3 for i in ids) > 100
    names = [n for token in tokenizer.names(ids) for n in token]
    sequence = TokSequence(tokens=names, ids=[tokenizer.base.vocab[n] for n in names])
    assert tokenizer.base.tokens_errors(sequence) == 0
    struck = [(round(n["start"], 3), n["pitch"]) for n in tokenizer.decode(ids).notes]
    assert len(set(struck)) == len(struck)  # nor is a key struck twice at one instant


def test_rows_side_by_side_play_what_each_plays_alone(shipped, opening):
    """Other seeds and prompts beside it change nothing, nor does the end of a neighbour."""
    model, tokenizer = shipped
    ids = first_seconds(tokenizer, opening, 3)
    starts = [hear(model, tokenizer, [tokenizer.bos]), hear(model, tokenizer, ids, begin=3.0)] * 3
    _, together = continuations(model, tokenizer, starts, list(range(6)), until=7)
    for seed, (start, tokens) in enumerate(zip(starts, together)):
        assert continuations(model, tokenizer, [start], [seed], until=7)[1] == [tokens]
    assert len({tuple(tokens) for tokens in together}) == 6
    assert len({len(tokens) for tokens in together}) > 1


def test_variations_are_the_pieces_of_their_seeds(shipped, opening):
    many = variations(*shipped, opening, seeds=[5, 3], seconds=4, prompt_seconds=3)
    for seed, music in zip([5, 3], many):
        assert same(music, generate(*shipped, opening, seed=seed, seconds=4, prompt_seconds=3))


def test_playing_without_a_compiler_is_the_same_music(shipped, monkeypatch):
    """The model's own step in PyTorch takes over where there is no whole-model step."""
    fast = generate(*shipped, seconds=4, seed=6)
    monkeypatch.setattr("lib.mamba.step_cpu.stepper", lambda model, batch=1: None)
    slow = generate(*shipped, seconds=4, seed=6)
    assert same(fast, slow)
    player = Player(*shipped, [hear(*shipped, [shipped[1].bos])] * 3, [1, 2, 3])
    player.step()
    player.keep([2, 0])
    assert len(player.step()) == 2 and player.state[0][1].shape[0] == 2
    assert [(line.row, line.seed) for line in player.lines] == [(2, 3), (0, 1)]


def test_a_repeated_key_is_discouraged(shipped):
    """A heavy penalty, over the last 64 tokens, leaves fewer keys struck again soon."""

    def again(repetition):
        pieces = [
            generate(*shipped, seconds=8, seed=s, repetition=repetition).notes["pitch"]
            for s in range(4)
        ]
        return np.mean([p[i] in p[max(0, i - 8) : i] for p in pieces for i in range(8, len(p))])

    assert again(50.0) < 0.7 * again(1.0)


def test_at_one_instant_ten_keys_are_enough(shipped):
    tokenizer = shipped[1]
    single = {t[0]: i for i, t in enumerate(tokenizer.pieces) if len(t) == 1}
    grammar = Grammar(tokenizer)
    for name in ("BOS_None", "Bar_None", "Position_0"):
        grammar.read(single[name])
    for pitch in range(40, 50):
        assert torch.isfinite(
            grammar.mask(torch.zeros(tokenizer.vocab_size))[single[f"Pitch_{pitch}"]]
        )
        for name in (f"Pitch_{pitch}", "Velocity_63", "Duration_0.10.50"):
            grammar.read(single[name])
    masked = grammar.mask(torch.zeros(tokenizer.vocab_size))
    assert masked[single["Pitch_60"]] == -torch.inf and masked[single["Position_0"]] == -torch.inf
    assert masked[single["Position_1"]] == 0 and masked[single["Bar_None"]] == 0


def test_a_key_is_struck_once_at_an_instant(shipped):
    tokenizer = shipped[1]
    single = {t[0]: i for i, t in enumerate(tokenizer.pieces) if len(t) == 1}
    grammar = Grammar(tokenizer)
    for name in (
        "BOS_None",
        "Bar_None",
        "Position_0",
        "Pitch_60",
        "Velocity_63",
        "Duration_0.10.50",
    ):
        grammar.read(single[name])
    masked = grammar.mask(torch.zeros(tokenizer.vocab_size))
    assert masked[single["Pitch_60"]] == -torch.inf and masked[single["Pitch_61"]] == 0
    merged = [
        i for i, names in enumerate(tokenizer.pieces) if len(names) > 1 and names[0] == "Pitch_60"
    ]
    assert merged and (masked[merged] == -torch.inf).all()
    grammar.read(single["Position_1"])
    assert grammar.mask(torch.zeros(tokenizer.vocab_size))[single["Pitch_60"]] == 0


def test_a_long_prompt_that_ends_in_silence_is_followed_by_its_bar_lines(shipped):
    model, tokenizer = shipped
    start = np.repeat(np.arange(200) * 0.005, 1)
    notes = make_notes(start, start + 0.1, 30 + np.arange(200) % 60, np.full(200, 70))
    for prompt in (notes[:9], notes):
        ids = tokenizer.encode(Music(prompt))
        first = [
            t for t, _ in itertools.islice(sample(*shipped, ids, begin=8.0, until=9, seed=1), 3)
        ]
        assert first == [int(tokenizer.base["Bar_None"])] * 3, len(ids)


def test_sampling_keeps_to_its_time(shipped):
    times = [
        now for _, now in sample(*shipped, np.array([shipped[1].bos], np.uint16), until=4, seed=2)
    ]
    assert times == sorted(times) and 2 < times[-1] < 4


def test_the_mask_never_forbids_real_music(shipped):
    """Real pieces must be possible: otherwise the model could not continue them."""
    from lib.music.maestro import performances

    tokenizer = shipped[1]
    for performance in performances(quick=True, say=lambda text: None)[:3]:
        ids = first_seconds(tokenizer, read_midi(performance.path), 60)
        grammar = Grammar(tokenizer)
        grammar.read(int(ids[0]))
        for token in ids[1:]:
            assert torch.isfinite(grammar.mask(torch.zeros(tokenizer.vocab_size))[int(token)])
            grammar.read(int(token))


def test_the_command_writes_midi_sound_and_picture(tmp_path, capsys):
    import soundfile

    out = tmp_path / "out"
    main(["--seconds", "6", "--seed", "1", "--variations", "2", "--out", str(out)])
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(f"new-seed{s}.{e}" for s in (1, 2) for e in ("mid", "mp3", "png"))
    path = out / "new-seed1.mid"
    notes = read_midi(path).notes
    assert len(notes) == len(symusic.Score(path).tracks[0].notes)
    assert len(notes) == len(pretty_midi.PrettyMIDI(str(path)).instruments[0].notes)
    assert len(notes) == sum(m.type == "note_on" and m.velocity > 0 for m in mido.MidiFile(path))
    audio, rate = soundfile.read(out / "new-seed1.mp3")
    facts = check(audio, rate)
    assert (
        not facts["silent"]
        and facts["clipped"] == 0
        and facts["peak"] > 0.3
        and facts["seconds"] > 5
    )
    assert (out / "new-seed1.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_goes_on_from_a_state(tmp_path, capsys):
    """What comes after four seconds is what nine seconds have there, from the last onset on."""
    main(["--seconds", "4", "--seed", "3", "--keep-state", "--out", str(tmp_path / "a")])
    main(
        [
            "--state",
            str(tmp_path / "a" / "new-seed3.safetensors"),
            "--seed",
            "3",
            "--seconds",
            "4",
            "--out",
            str(tmp_path / "b"),
        ]
    )
    main(["--seconds", "9", "--seed", "3", "--out", str(tmp_path / "c")])
    later = read_midi(tmp_path / "b" / "new-seed3-seed3.mid").notes
    straight = read_midi(tmp_path / "c" / "new-seed3.mid").notes
    rest = straight[straight["start"] >= 4]
    count = min(len(later), len(rest))
    assert count > 5 and (later["pitch"][:count] == rest["pitch"][:count]).all()
    late = rest["start"][:count] - later["start"][:count]
    first = read_midi(tmp_path / "a" / "new-seed3.mid").notes
    np.testing.assert_allclose(late, first["start"].max(), atol=0.003)  # of ticks of a millisecond
    said = f"the state after its last onset, at second {first['start'].max():.2f} of 4, for --state"
    assert said in capsys.readouterr().out


def test_the_second_of_a_state_is_counted_in_the_file_at_its_tempo(tmp_path, capsys):
    main(["--seconds", "4", "--seed", "4", "--tempo", "2", "--keep-state", "--out", str(tmp_path)])
    last = read_midi(tmp_path / "new-seed4.mid").notes["start"].max()
    said = re.search("at second ([0-9.]+) of 4, for --state", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(last, abs=0.01)  # the second is said to a hundredth


def test_the_command_streams_into_one_file(tmp_path, capsys):
    main(["--stream", "--seconds", "6", "--seed", "2", "--out", str(tmp_path)])
    notes = read_midi(tmp_path / "new-seed2-stream.mid").notes
    assert 3 < notes["start"].max() < 6 and "notes" in capsys.readouterr().out
    main(["--seconds", "6", "--seed", "2", "--out", str(tmp_path)])
    assert (read_midi(tmp_path / "new-seed2.mid").notes["pitch"] == notes["pitch"]).all()


def shell(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lib.generate", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def drums(path):
    score, track = symusic.Score(480), symusic.Track("drums", 0, True)
    track.notes.append(symusic.Note(0, 100, 40, 80))
    score.tracks.append(track)
    path.write_bytes(score.dumps_midi())


PROMPTS = {
    "no file": (lambda p: None, "no file"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "no midi": (lambda p: p.write_text("a letter to my aunt"), "not a MIDI file"),
    "drums": (drums, "drums"),
    "a folder": (lambda p: p.mkdir(), "prompt.mid is a folder: give the name of a MIDI file"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_bad_prompt_is_one_sentence_and_writes_nothing(tmp_path, capsys, case):
    make, words = PROMPTS[case]
    make(tmp_path / "prompt.mid")
    with pytest.raises(UserError, match=words) as error:
        main(
            [
                "--prompt",
                str(tmp_path / "prompt.mid"),
                "--seconds",
                "3",
                "--out",
                str(tmp_path / "out"),
            ]
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_name_is_refused_and_does_not_play_from_nothing(monkeypatch):
    monkeypatch.setattr("lib.generate.__main__.load_model", lambda folder: pytest.fail("too late"))
    with pytest.raises(UserError, match="--prompt names nothing"):
        main(["--prompt", ""])
    with pytest.raises(UserError, match="--from names nothing"):
        main(["--from", "", "--to", ""])
    with pytest.raises(UserError, match="--to names nothing"):
        main(["--from", "a.mid", "--to", ""])


def test_a_tokenizer_with_pedal_tokens_is_refused_and_the_option_named():
    tokenizer = Tokenizer(TokenConfig(grid_ms=125, vocab_size=None, pedal="tokens"))
    with pytest.raises(UserError, match="--pedal extend"):
        Grammar(tokenizer)


def test_a_users_mistake_shows_no_traceback(tmp_path):
    done = shell("--prompt", "nowhere.mid", cwd=tmp_path)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--top-k", "-3"],
        ["--min-p", "1"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--variations", "0"],
        ["--seed", "-1"],
        ["--model", "nowhere"],
        ["--repetition", "0.9"],
        ["--density", "9"],
        ["--tempo", "0"],
        ["--state", "nowhere"],
        ["--stream", "--tempo", "2"],
        ["--stream", "--variations", "2"],
        ["--stream", "--seconds", "-1"],
        ["--prompt", "a.mid", "--state", "b"],
        ["--stream", "--keep-state"],
        ["--prompt-seconds", "5"],
        ["--rows", "8"],
        ["--prompt", ""],
        ["--from", "", "--to", ""],
    ],
)
def test_a_bad_setting_is_one_sentence(tmp_path, arguments):
    with pytest.raises(UserError) as error:
        main([*arguments, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_folder_cannot_be_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        main(["--seconds", "3", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "mine"


def test_where_nothing_can_be_written_nothing_is_played(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.generate.__main__.load_model", lambda folder: pytest.fail("too late"))
    (tmp_path / "a.mid").write_text("mine")
    for folder in (tmp_path / "a.mid" / "sub", "/proc/nowhere"):
        with pytest.raises(UserError) as error:
            main(["--seconds", "3", "--out", str(folder)])
        assert str(error.value).startswith(f"could not write into {folder}: ")
        assert "new-seed1" not in str(error.value), "nobody has asked for that file"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mid"]


def test_a_second_try_keeps_the_first_and_long_names_are_cut(tmp_path, shipped, opening):
    prompt = tmp_path / f"{'夜' * 80}.mid"
    write_midi(opening, tmp_path / "short.mid")
    (tmp_path / "short.mid").rename(prompt)
    for temperature in ("1", "0.5", "0.5"):
        words = ["--prompt", str(prompt), "--seconds", "0.5", "--temperature", temperature]
        main([*words, "--out", str(tmp_path / "out")])
    stem = f"{'夜' * 26}-seed1"
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}{n}.{e}" for n in ("", "-2", "-3") for e in ("mid", "mp3", "png")}


def test_the_shipped_folder_is_small_and_complete():
    names = {p.name for p in MODEL.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokens.json",
        "README.md",
    } <= names
    assert sum(p.stat().st_size for p in MODEL.iterdir()) < 25e6
