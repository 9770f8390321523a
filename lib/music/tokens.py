"""Notes to REMI tokens to byte-pair-encoded tokens, and back, with MidiTok.

REMI (Huang and Yang 2020) writes a piece as bars; inside a bar a `Position`, and after it the
`Pitch`, `Velocity` and `Duration` of each note that begins there. Every MAESTRO file says
120 BPM, so a bar is two seconds of clock. Byte-pair encoding then gives frequent neighbours
a token of their own; it is learnt on training pieces only.
"""

import json
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from lib.env.errors import UserError
from lib.env.files import atomic_write
from lib.env.schema import read_json
from lib.music.notes import HIGHEST, LOWEST, Music, clip_repeats, crop, make_notes, sustain
from lib.music.token_names import count_in, is_music
from lib.music.tokens_schema import AGAIN, load_merges

BEAT = 0.5  # seconds a quarter note lasts at 120 BPM
BAR = 4 * BEAT  # seconds
TICKS = 480  # ticks a quarter note of the scores handed to MidiTok
KINDS = "REMI", "TSD", "MIDILike"  # as MidiTok names them
BPE_MODEL = "tokenizer.json"
SETTINGS = "tokens.json"


@dataclass(frozen=True)
class TokenConfig:
    """How music becomes tokens. The defaults are justified by the table of notebook 02."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # of the file that keeps it

    grid_ms: float = 10.0  # onsets are rounded to this, and durations up to 1 s
    pedal: str = "extend"  # "extend" notes by the sustain pedal, write it as "tokens", or "drop" it
    vocab_size: int | None = 1024  # after byte-pair encoding; None: base tokens only
    velocities: int = 32  # loudness levels
    # the language of the tokens; "TSD" and "MIDILike" are for comparisons: nothing here plays them
    kind: str = "REMI"

    def __post_init__(self):
        if not 4 <= self.grid_ms <= 125:
            raise UserError(
                f"grid_ms={self.grid_ms} is outside 4 to 125: 10 keeps expressive timing"
            )
        if self.pedal not in ("extend", "tokens", "drop"):
            raise UserError(f"pedal={self.pedal!r} is unknown: choose extend, tokens or drop")
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r} is unknown: choose {', '.join(KINDS)}")
        if self.kind != "REMI" and self.vocab_size is not None:
            raise UserError(
                f"{self.kind} is here for comparisons, without merges: give vocab_size=None"
            )
        if self.vocab_size is not None and not self.vocab_size <= 65_535:
            raise UserError(
                f"vocab_size={self.vocab_size} does not fit 16 bits: choose at most 65535"
            )
        if not 1 <= self.velocities <= 127:
            raise UserError(
                f"velocities={self.velocities} is outside 1 to 127: MIDI knows no other loudness"
            )

    @property
    def steps(self) -> int:
        """Grid steps in a beat of half a second."""
        return round(1000 * BEAT / self.grid_ms)


def _import():
    """MidiTok, without its log and without tqdm's remark that Jupyter has no widgets."""
    logging.getLogger("miditok").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import miditok
    return miditok


def _miditok(config: TokenConfig):
    """An untrained MidiTok tokenizer with our settings."""
    miditok = _import()
    fine = config.steps
    pedals = config.pedal == "tokens"
    return getattr(miditok, config.kind)(
        miditok.TokenizerConfig(
            pitch_range=(LOWEST, HIGHEST),  # MidiTok's upper end is inclusive
            # steps a beat for notes of up to 1 s, 4 s and 16 s:
            # a pedalled bass note rings that long
            beat_res={(0, 2): fine, (2, 8): min(fine, 10), (8, 32): min(fine, 4)},
            num_velocities=config.velocities,
            special_tokens=["PAD", "BOS", "EOS"],
            use_sustain_pedals=pedals,
            sustain_pedal_duration=pedals,
            use_pitchdrum_tokens=False,
            use_time_signatures=False,
            use_tempos=False,
            use_chords=False,
            use_rests=False,
            use_programs=False,
        )
    )


class Tokenizer:
    """REMI and byte-pair encoding behind two verbs, `encode` and `decode`.

    `base` is MidiTok's tokenizer. `pieces[i]` lists the base tokens (names such as
    ``"Pitch_60"``) that token ``i`` stands for: one for a base token, more for a merge.
    """

    def __init__(self, config: TokenConfig = TokenConfig(), base=None):
        self.config = config
        self.base = base or _miditok(config)
        self._refresh()
        size = config.vocab_size
        if size is not None and size <= self.base_size:
            raise UserError(
                f"vocab_size={size} leaves no room for merges: there are "
                f"{self.base_size} base tokens; choose more, or none (None, --vocab-size 0)"
            )

    def _refresh(self):
        model = self.base._model
        if model is None:
            names = {i: name for name, i in self.base.vocab.items()}
            self.pieces = [(names[i],) for i in range(len(names))]
        else:
            expand = self.base._vocab_learned_bytes_to_tokens
            learnt = [model.id_to_token(i) for i in range(model.get_vocab_size())]
            self.pieces = [tuple(expand[token]) for token in learnt]
        self.pad = self.base["PAD_None"]
        self.bos = self.base["BOS_None"]
        self.eos = self.base["EOS_None"]
        self.notes_of = count_in(
            self.pieces, "NoteOn" if self.config.kind == "MIDILike" else "Pitch"
        )
        self.bars_of = count_in(self.pieces, "Bar")

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def base_size(self) -> int:
        """Base tokens: what MidiTok calls `len(tokenizer.vocab)`, not `len(tokenizer)`."""
        return len(self.base.vocab)

    def __repr__(self):
        # one further token is a mark, for no music
        merges = sum(len(names) > 1 for names in self.pieces)
        return (
            f"Tokenizer({self.base_size} base tokens + {merges} merges, {self.config.grid_ms:g} ms)"
        )

    def _score(self, music: Music):
        import symusic

        if self.config.pedal == "extend":
            music = sustain(music)

        def ticks(seconds: np.ndarray) -> np.ndarray:
            return np.round(seconds * (TICKS / BEAT)).astype("i4")

        notes = music.notes
        start = ticks(notes["start"])
        duration = np.maximum(ticks(notes["end"]) - start, 1)
        pitch = notes["pitch"].astype("i1")
        velocity = notes["velocity"].astype("i1")
        track = symusic.Track("Piano", 0, False)
        track.notes = symusic.Note.from_numpy(start, duration, pitch, velocity)
        if self.config.pedal == "tokens":
            down = ticks(music.pedal[:, 0])
            up = ticks(music.pedal[:, 1])
            track.pedals = symusic.Pedal.from_numpy(down, np.maximum(up - down, 1))
        score = symusic.Score(TICKS)
        score.tempos.append(symusic.Tempo(0, 120))
        score.tracks.append(track)
        return score

    def encode_base(self, music: Music) -> np.ndarray:
        """Base tokens, uint16 of shape (L,), without BOS and EOS."""
        if not len(music.notes):
            return np.zeros(0, np.uint16)
        sequences = self.base.encode(self._score(music), encode_ids=False)
        return np.asarray(sequences[0].ids, np.uint16)

    def merge(self, base_ids: np.ndarray) -> np.ndarray:
        """Byte-pair encode base tokens: uint16 of shape (L,) to uint16 of shape (L',)."""
        if self.base._model is None or not len(base_ids):
            return np.asarray(base_ids, np.uint16)
        from miditok import TokSequence

        sequence = TokSequence(ids=[int(i) for i in base_ids])
        self.base.encode_token_ids(sequence)
        return np.asarray(sequence.ids, np.uint16)

    def encode(self, music: Music, *, begin: bool = True, end: bool = False) -> np.ndarray:
        """Token ids of a piece, uint16 of shape (L,); BOS and EOS where asked for."""
        ids = self.merge(self.encode_base(music))
        return np.concatenate([[self.bos] * begin, ids, [self.eos] * end]).astype(np.uint16)

    def names(self, ids) -> list[tuple[str, ...]]:
        """The base tokens inside each token."""
        return [self.pieces[int(i)] for i in ids]

    def decode(self, ids) -> Music:
        """The music that token ids of shape (L,) stand for; ungrammatical tokens are left out."""
        from miditok import TokSequence

        ids = np.asarray(ids)
        strange = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(strange):
            raise UserError(
                f"token {strange[0]} is not in this vocabulary of {self.vocab_size}: "
                "use the tokenizer that made the tokens"
            )
        names = [name for inside in self.names(ids) for name in inside if is_music(name)]
        silence = Music(make_notes([], [], [], []))
        if not names:
            return silence
        sequence = TokSequence(tokens=names, ids=[self.base.vocab[name] for name in names])
        score = self.base.decode([sequence])
        if not score.tracks:
            return silence
        seconds = BEAT / score.tpq  # a tick
        columns = score.tracks[0].notes.numpy()
        start = columns["time"] * seconds
        end = start + columns["duration"] * seconds
        notes = make_notes(start, end, columns["pitch"], columns["velocity"])
        pedals = score.tracks[0].pedals.numpy()
        down = pedals["time"] * seconds
        up = down + pedals["duration"] * seconds
        # rounding can make a note reach into the next one on its key: a piano string cannot
        return Music(clip_repeats(notes), np.stack([down, up], 1))

    def learn(self, base_streams: list[np.ndarray]) -> None:
        """Learn byte-pair merges from base tokens of training pieces, up to `vocab_size`."""
        size = self.config.vocab_size
        if size is None:
            return
        # each piece as MidiTok's learner reads it: a letter a base token
        pieces = [
            self.base._ids_to_bytes([[int(i) for i in stream]], as_one_str=True)
            for stream in base_streams
            if len(stream)
        ]
        with _no_blank_lines():
            self.base.train(vocab_size=size, iterator=pieces)
        self._refresh()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder: MidiTok's file and our settings."""
        folder = Path(folder)
        with atomic_write(folder / BPE_MODEL) as part:
            self.base.save(part)
        with atomic_write(folder / SETTINGS) as part:
            part.write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Open a tokenizer that `save` wrote. Raises `UserError` when it is missing or damaged."""
        folder = Path(folder)
        if not (folder / BPE_MODEL).is_file() or not (folder / SETTINGS).is_file():
            raise UserError(f"no tokenizer in {folder}: it needs {BPE_MODEL} and {SETTINGS}")
        config = read_json(folder / SETTINGS, TokenConfig, do=AGAIN)
        base = _miditok(config)
        load_merges(folder / BPE_MODEL, base)
        return cls(config, base)


@contextmanager
def _no_blank_lines():
    """The trainer's progress bars print blank lines where there is no terminal: drop them."""
    if os.isatty(1):
        yield
        return
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def round_trip(tokenizer: Tokenizer, music: Music) -> dict[str, np.ndarray | float]:
    """What the tokens keep of a piece, against what a listener hears (pedal included).

    Returns `onset_ms` and `duration_ms`, absolute errors of shape (notes,), `kept`, the share
    of notes that survive (two strokes of one key in one step are heard as one), and
    `tokens_per_note`.
    """
    heard = sustain(music).notes
    ids = tokenizer.encode(music, begin=False)
    back = sustain(tokenizer.decode(ids)).notes
    onset = []
    duration = []
    for pitch in np.unique(heard["pitch"]):
        ours, theirs = _partners(heard[heard["pitch"] == pitch], back[back["pitch"] == pitch])
        onset.append(np.abs(ours["start"] - theirs["start"]))
        lasted = ours["end"] - ours["start"]
        lasts = theirs["end"] - theirs["start"]
        duration.append(np.abs(lasted - lasts))
    return {
        "onset_ms": np.concatenate(onset) * 1e3,
        "duration_ms": np.concatenate(duration) * 1e3,
        "kept": len(np.unique(back[["start", "pitch"]])) / len(heard),
        "tokens_per_note": len(ids) / len(heard),
    }


def _partners(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Notes on one key, before and after, beside one another."""
    if len(ours) != len(theirs) and len(ours) and len(theirs):
        # a repeated key fell into one step of the grid: the nearest is what is left
        nearest = [np.abs(ours["start"] - start).argmin() for start in theirs["start"]]
        return ours[nearest], theirs
    count = min(len(ours), len(theirs))
    return ours[:count], theirs[:count]


def prompt_music(music: Music, seconds: float, pedal: str = "extend") -> Music:
    """What begins in the first `seconds` from the first note on; that note comes at second 0.

    Keys that are held when these seconds are over are not cut: with the pedal, they sound on.
    """
    first = float(music.notes["start"].min(initial=np.inf))
    return crop(sustain(music) if pedal == "extend" else music, first, first + seconds)


def first_seconds(tokenizer: Tokenizer, music: Music, seconds: float) -> np.ndarray:
    """Tokens of a prompt, BOS included: see `prompt_music`."""
    return tokenizer.encode(prompt_music(music, seconds, tokenizer.config.pedal))
