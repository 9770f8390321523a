"""Claims about lib.generate.jam: it listens, comes in, stops,
and carries one state through it all.
"""

import mido
import numpy as np
import pytest
import torch
from mido import Message

from lib import mamba
from lib.env.errors import UserError
from lib.generate import jam
from lib.generate.grammar import NoteReader
from lib.generate.jam import Ear, File, Partner, session
from lib.generate.moment import hear
from lib.generate.player import MODEL
from lib.music.notes import Music, make_notes, read_midi, write_midi
from lib.music.tokens import Tokenizer


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.now = 100.0  # clocks do not begin at zero

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module")
def tiny():
    """A model of random weights with the shipped words."""
    tokenizer = Tokenizer.load(MODEL)
    torch.manual_seed(3)
    return mamba.MambaLM(
        mamba.MambaConfig(tokenizer.vocab_size, d_model=16, n_layer=2, d_state=4)
    ).eval(), tokenizer


class Table:
    """A partner at a table: what it sends is kept with its time."""

    def __init__(self, tiny, **options):
        self.clock = Clock()
        self.sent = []
        self.partner = Partner(*tiny, self.send, self.clock, **options)

    def send(self, pitch, velocity):
        self.sent.append((self.clock.now, pitch, velocity))

    def play(self, events, seconds):
        """Messages at seconds from now on, and time until then."""
        begin = self.clock.now
        left = sorted(events, key=lambda event: event[0])

        def messages():
            while left and begin + left[0][0] <= self.clock.now:
                yield left.pop(0)[1]

        while self.clock.now < begin + seconds:
            for message in messages():
                self.partner.message(message)
            self.partner.tick()
            self.clock.wait(0.001)


def key(at, pitch, lasts=0.2):
    return [
        (at, Message("note_on", note=pitch, velocity=70)),
        (at + lasts, Message("note_off", note=pitch)),
    ]


def scale(notes=12, gap=0.25, first=60):
    return [event for i in range(notes) for event in key(i * gap, first + i)]


def pedal(at, control=jam.SOFT, value=127):
    return (at, Message("control_change", control=control, value=value))


def test_it_says_nothing_until_two_seconds_of_silence_and_then_comes_in_at_once(tiny):
    table = Table(tiny)
    table.play(scale(), 4.9)  # the last key comes up at 2.95 s
    assert not table.sent
    table.play([], 0.2)
    assert table.sent and table.sent[0][0] == pytest.approx(104.95, abs=0.005)
    assert len(table.partner.delays) == 1


def test_the_pedal_asks_for_the_takeover_before_the_silence_does(tiny):
    table = Table(tiny)
    table.play([*scale(4), pedal(0.97)], 1.0)
    first, _, velocity = table.sent[0]
    assert velocity > 0 and first == pytest.approx(100.97, abs=0.015)


def test_the_right_pedal_and_a_pedal_before_any_note_ask_for_nothing(tiny):
    table = Table(tiny)
    table.play([pedal(0.1), pedal(1.0)], 5)
    assert not table.partner.playing and not table.sent
    table.play([*scale(4), pedal(0.5, control=64), pedal(0.6, control=64, value=0)], 1.5)
    assert not table.partner.playing


def test_a_key_stops_it_and_every_key_that_it_held_comes_up(tiny):
    table = Table(tiny)
    table.play([*scale(4), pedal(1.0)], 3)
    assert table.partner.playing
    struck = len(table.sent)
    table.play(key(0, 48), 0.1)
    assert not table.partner.playing and struck
    down = set()
    for _, pitch, velocity in table.sent:
        (down.add if velocity else down.discard)(pitch)
    assert not down


def session_of_turns(tiny):
    """You, it, you, it, you."""
    table = Table(tiny, seed=5)
    table.play([*scale(9), pedal(2.3)], 6)
    table.play([*scale(7, 0.3, 50), pedal(2.2)], 5)
    table.play(scale(3, 0.2, 70), 0.7)
    return table


def test_no_token_is_read_twice_and_the_state_is_that_of_everything_that_was_heard(
    tiny, monkeypatch
):
    read = []
    truly = jam.hear

    def counted(model, tokenizer, ids, moment=None, **options):
        read.extend(int(i) for i in ids)
        return truly(model, tokenizer, ids, moment, **options)

    monkeypatch.setattr(jam, "hear", counted)
    table = session_of_turns(tiny)
    partner = table.partner
    assert len(partner.delays) == 2 and not partner.playing
    afresh = hear(*tiny, partner.tokens)
    torch.testing.assert_close(partner.moment.logits, afresh.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(partner.moment.state, afresh.state):
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-4, rtol=1e-3)
    assert len(read) < len(partner.tokens), "what it drew itself is not read again"
    drawn = len(partner.tokens) - len(read)
    assert drawn > 10


def test_what_it_drew_ahead_and_nobody_heard_is_forgotten(tiny):
    table = Table(tiny, seed=5)
    table.play([*scale(9), pedal(2.3)], 6)
    heard = {(pitch, velocity > 0) for _, pitch, velocity in table.sent}
    table.play(key(0, 108), 0.05)
    partner = table.partner
    notes = NoteReader(tiny[1]).notes(partner.tokens)
    theirs = notes[notes["start"] > 2.29]
    assert len(theirs) and theirs["start"].max() <= 6.0
    assert {(int(pitch), True) for pitch in theirs["pitch"]} <= heard
    strokes = [event for event in table.sent if event[2]]
    assert len(strokes) == len(theirs)
    assert partner.moment.grammar.end in ("Duration", "Bar", "Position")


def test_what_you_play_becomes_the_tokens_that_a_file_of_it_would_be(tiny):
    model, tokenizer = tiny
    rng = np.random.default_rng(0)
    start = np.cumsum(rng.choice([0.0, 0.1, 0.37], 60)).round(2)
    pitch = rng.permutation(np.arange(30, 90))
    music = Music(make_notes(start - start[0], start - start[0] + 0.3, pitch, np.full(60, 70)))
    table = Table(tiny, silence=5)
    events = [event for s, e, p, v in music.notes.tolist() for event in key(s, p, e - s)]
    table.play(events, music.seconds + 4.5)
    wanted = [int(t) for t in tokenizer.encode(music) if tokenizer.pieces[int(t)]]
    assert table.partner.tokens == wanted


def test_what_still_sounds_at_the_end_is_kept_and_all_that_waited_for_it(tiny):
    table = Table(tiny)
    held = [(0.0, Message("note_on", note=36, velocity=70))]
    table.play([*held, *[e for i in range(20) for e in key(0.25 + i * 0.5, 60 + i % 12)]], 10.5)
    table.partner.end()
    notes = NoteReader(table.partner.tokenizer).notes(table.partner.tokens)
    assert len(notes) == 21 and notes["pitch"][0] == 36
    assert notes["end"][0] == pytest.approx(10.5, abs=0.3)
    assert notes["pitch"][1:].tolist() == [60 + i % 12 for i in range(20)]


def test_a_pedal_that_was_down_before_the_first_key_lets_it_ring(tiny):
    table = Table(tiny)
    table.play([pedal(0.0, control=64), *key(0.1, 60), pedal(1.1, control=64, value=0)], 1.5)
    (note,) = table.partner.ear.notes
    assert note.end == pytest.approx(1.0, abs=0.01)


def test_the_pedal_lets_notes_ring_and_a_key_struck_again_ends_them():
    ear = Ear()
    ear.press(True, 0.0)
    ear.strike(60, 70, 0.1)
    ear.release(60, 0.2)
    ear.strike(62, 70, 0.3)
    ear.release(62, 0.4)
    assert ear.whole_bars(5.0) == 0.0, "nothing has ended"
    ear.strike(60, 80, 1.0)
    ear.release(60, 1.1)
    ear.press(False, 1.5)
    assert ear.whole_bars(5.0) == 4.0 and not ear.keys_down
    taken = ear.take(4.0, 5.0)
    assert taken["end"].tolist() == [1.0, 1.5, 1.5] and not ear.notes


def test_a_key_that_is_held_does_not_count_as_silence(tiny):
    table = Table(tiny)
    table.play([(0, Message("note_on", note=60, velocity=70))], 5)
    assert not table.partner.playing
    table.play([(0, Message("note_on", note=60, velocity=0))], 2.1)  # an "off" in another spelling
    assert table.partner.playing


def test_a_file_plays_in_the_place_of_a_keyboard(tiny, tmp_path):
    clock = Clock()
    begin = clock.now
    start = 3 + np.arange(6) * 0.3
    music = Music(make_notes(start, start + 0.2, 60 + np.arange(6), np.full(6, 70)))
    sent, said = [], []
    partner = Partner(*tiny, lambda *note: sent.append(note), clock)
    session(
        partner,
        File(music, lambda: clock() - begin).messages,
        pause=clock.wait,
        until=begin + 6,
        say=said.append,
    )
    assert sent and said[0].startswith("takeover 1: its first note came after ")
    assert not partner.playing, "no key stays down when the session ends"


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny):
    """The command beside a clock of its own, with a file to play and a file to keep."""
    clock = Clock()
    monkeypatch.setattr(jam, "load_model", lambda folder: tiny)
    monkeypatch.setattr(jam.time, "monotonic", clock)
    monkeypatch.setattr(jam.time, "sleep", clock.wait)
    start = np.arange(8) * 0.2
    notes = make_notes(start, start + 0.1, 60 + np.arange(8), np.full(8, 70))
    write_midi(Music(notes), tmp_path / "a.mid")
    return clock


class Ports:
    """A keyboard that plays for a second, and a piano, each lost at a second of the clock."""

    def __init__(self, clock, *, lost_in=np.inf, lost_out=np.inf):
        self.clock = clock
        self.zero = clock()
        self.lost_in = lost_in
        self.lost_out = lost_out
        self.left = scale(4)

    def iter_pending(self):
        now = self.clock() - self.zero
        if now >= self.lost_in:
            raise SystemError("MidiInAlsa: unknown device")
        while self.left and self.left[0][0] <= now:
            yield self.left.pop(0)[1]

    def send(self, message):
        if self.clock() - self.zero >= self.lost_out:
            raise SystemError("MidiOutAlsa: error sending message")


@pytest.mark.parametrize("lost", [{"lost_in": 4.5}, {"lost_out": 4.5}])
def test_a_port_that_is_lost_is_a_sentence_and_what_was_played_is_kept(
    desk, tmp_path, monkeypatch, capsys, lost
):
    ports = Ports(desk, **lost)
    monkeypatch.setattr(jam, "open_ports", lambda source, sink: (ports, ports))
    path = tmp_path / "both.mid"
    with pytest.raises(UserError, match="^the MIDI port was lost: connect it again$"):
        jam.main(["--in", "a", "--out", "b", "--seconds", "60", "--keep", str(path)])
    assert f"{path}: what both of you played" in capsys.readouterr().out
    notes = read_midi(path).notes
    assert (notes["pitch"][:4] == 60 + np.arange(4)).all()
    assert len(notes) > 4 and notes["start"].max() < desk() - ports.zero, "no more than was heard"


def test_a_fault_of_ours_is_not_called_a_lost_port(tiny, monkeypatch):
    table = Table(tiny)
    monkeypatch.setattr(table.partner, "tick", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session(table.partner, list, pause=table.clock.wait)


def test_where_nothing_was_played_nothing_is_kept(desk, tmp_path, monkeypatch, capsys):
    ports = Ports(desk)
    ports.left = []
    monkeypatch.setattr(jam, "open_ports", lambda source, sink: (ports, ports))
    path = tmp_path / "both.mid"
    jam.main(["--in", "a", "--out", "b", "--seconds", "0.5", "--keep", str(path)])
    assert not path.exists() and "nothing was played" in capsys.readouterr().out


def test_what_was_kept_before_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(jam, "load_model", lambda folder: pytest.fail("too late"))
    path = tmp_path / "both.mid"
    path.write_text("mine")
    with pytest.raises(UserError, match="both.mid exists already: give --keep another name"):
        jam.main(["--mock", "a.mid", "--keep", str(path)])
    assert path.read_text() == "mine"


@pytest.mark.parametrize("held", ["input", "output"])
def test_a_port_that_another_program_holds_is_a_sentence_and_none_stays_open(monkeypatch, held):
    closed = []

    class Entrance:
        def close(self):
            closed.append(True)

    def busy(name):
        raise SystemError("MidiInAlsa::openPort: ALSA error creating port")

    monkeypatch.setattr(mido, "get_input_names", lambda: ["Yamaha"])
    monkeypatch.setattr(mido, "get_output_names", lambda: ["Synth"])
    monkeypatch.setattr(mido, "open_input", lambda name: Entrance())
    monkeypatch.setattr(mido, "open_output", lambda name: pytest.fail("too late"))
    monkeypatch.setattr(mido, f"open_{held}", busy)
    name = {"input": "Yamaha", "output": "Synth"}[held]
    says = f"port '{name}' cannot be opened .*: does another program hold it"
    with pytest.raises(UserError, match=says):
        jam.open_ports("Yamaha", "Synth")
    assert closed == ([True] if held == "output" else [])


def test_the_command_plays_a_file_at_it_and_keeps_what_was_played(desk, tmp_path, capsys):
    notes = read_midi(tmp_path / "a.mid").notes
    write_midi(Music(notes, np.array([[0.0, 1.0]])), tmp_path / "a.mid")
    jam.main(
        ["--mock", str(tmp_path / "a.mid"), "--seconds", "6", "--keep", str(tmp_path / "both.mid")]
    )
    said = capsys.readouterr().out
    assert "takeover 1" in said and "in 1 takeovers" in said
    notes = read_midi(tmp_path / "both.mid").notes
    assert (notes["pitch"][:8] == 60 + np.arange(8)).all() and len(notes) > 8
    assert notes["end"][0] == pytest.approx(1.0, abs=0.02), "the file's pedal holds the first note"


@pytest.mark.parametrize(
    "words, says",
    [
        (["--mock", "a.mid", "--in", "x"], "leave out --in and --out"),
        (["--in", "Yamaha"], "belong together: name both ports"),
        (["--out", "Yamaha"], "belong together: name both ports"),
        (["--silence", "0"], "outside 0.2 to 60"),
        (["--pedal", "64"], "64 has music to do"),
        (["--mock", "nowhere.mid"], "there is no file"),
        (["--mock", "a.mid", "--mock-seconds", "0"], "mock-seconds 0.0 is outside"),
        (["--mock", "a.mid", "--mock-seconds", "nan"], "mock-seconds nan is outside"),
        (["--seconds", "0"], "seconds 0.0 is outside"),
        (["--seconds", "-3"], "seconds -3.0 is outside"),
        (["--seed", "-1"], "seed -1 is outside"),
        (["--in", "", "--out", ""], "--in names nothing"),
        (["--in", "Yamaha", "--out", ""], "--out names nothing"),
        (["--mock-seconds", "3"], "how much of a --mock is played: name one"),
        (["--in", "a", "--out", "b", "--mock-seconds", "3"], "how much of a --mock is played"),
        (["--seconds", "5"], "ports are only listed: .* leave out --seconds"),
        (["--keep", "k.mid"], "ports are only listed: .* leave out --keep"),
        (["--temperature", "99"], "temperature 99.0 is outside"),
        (["--top-p", "0"], "top-p 0.0 is outside"),
        (["--density", "9"], "density 9.0 is outside"),
        (["--mock", "a.mid", "--keep", "/"], "is a folder: give the name of a file"),
        (["--mock", "a.mid", "--keep", "/proc/nowhere/both.mid"], "could not write /proc/nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(words, says):
    with pytest.raises(UserError, match=says):
        jam.main(words)


def test_a_missing_package_a_missing_driver_and_a_wrong_port_are_each_a_sentence(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'rtmidi'")

    def broken():
        raise RuntimeError("error creating ALSA sequencer client object")

    monkeypatch.setattr(mido, "get_input_names", missing)
    with pytest.raises(UserError, match="requirements-jam.txt"):
        jam.main([])
    monkeypatch.setattr(mido, "get_input_names", broken)
    with pytest.raises(UserError, match="ALSA"):
        jam.main([])
    with pytest.raises(UserError, match="no MIDI port is called 'Casio': there is Yamaha, Through"):
        jam.one_of(["Yamaha", "Through"], "Casio")
    with pytest.raises(UserError, match="more than one"):
        jam.one_of(["Yamaha 1", "Yamaha 2"], "Yamaha")
    assert jam.one_of(["Yamaha 1", "Through"], "Yam") == "Yamaha 1"
