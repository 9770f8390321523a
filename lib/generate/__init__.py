"""Playing: a prompt, what may follow, one token drawn after another, for as long as you like."""

from lib.generate.control import Controls
from lib.generate.grammar import Grammar, NoteReader
from lib.generate.moment import Moment, hear
from lib.generate.player import (
    MODEL,
    Player,
    continuations,
    generate,
    load_model,
    play,
    prompt_end,
    sample,
    variations,
)
from lib.generate.sampling import Sampling, draw
