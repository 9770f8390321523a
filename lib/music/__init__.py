"""MAESTRO to notes to tokens.

`performances` finds it, `Music` holds a piece, `Tokenizer` writes it as tokens.
"""

from lib.music.encode import build
from lib.music.maestro import Performance, performances
from lib.music.notes import Music, crop, make_notes, read_midi, sustain, write_midi
from lib.music.streams import Streams
from lib.music.tokens import TokenConfig, Tokenizer, first_seconds
