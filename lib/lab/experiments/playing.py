"""What the compared models play: one opening of the validation split, continued by each of them.

With the models of the race (all tokens, first seed), the same seed and the same way of drawing.
Kept as tokens, so that a notebook can show and play them.
"""

from lib.env.schema import Count
from lib.generate.player import continuations, hear_prompt
from lib.lab.experiments.entries import kept_as, shown
from lib.lab.experiments.runs import Spec
from lib.music.maestro import Performance
from lib.music.notes import read_midi
from lib.music.tokens import Tokenizer, first_seconds


def run(lab) -> dict:
    """The prompt, and each architecture's continuation; kept one by one."""
    chosen = lab.protocol.playing
    piece, tokenizer = opening(lab)
    prompt = first_seconds(tokenizer, read_midi(piece.path), chosen.prompt_seconds)
    result = {
        "composer": piece.composer,
        "title": piece.title,
        "year": piece.year,
        "prompt_seconds": chosen.prompt_seconds,
        "prompt": prompt.tolist(),
        "played": [{"arch": one.arch, "tokens": continued(lab, one)} for one in shown(lab)],
    }
    lab.write("playing", result)
    return result


def opening(lab) -> tuple[Performance, Tokenizer]:
    """The performance that is begun, and the tokenizer that all models read."""
    held_out = (p for p in lab.found if p.split == "validation")
    piece = min(held_out, key=lambda p: p.path.name)
    return piece, lab.streams(lab.protocol.grid_ms)[1]


def continued(lab, one: Spec) -> list[int]:
    """The tokens that an architecture plays after the opening, by the weights of this run; kept."""
    chosen = lab.protocol.playing

    def work():
        piece, tokenizer = opening(lab)
        model = lab.model(one, lab.base)
        music = read_midi(piece.path)
        start, _, begin = hear_prompt(model, tokenizer, music, chosen.prompt_seconds)
        until = begin + chosen.seconds
        played = continuations(model, tokenizer, [start], [chosen.seed], until=until)[1]
        return [int(token) for token in played[0]]

    return lab.once(f"{kept_as(one)}-playing", work, list[Count])


def table(result: dict) -> str:
    """How much each played, in words."""
    return "\n".join(
        f"- {row['arch']}: {len(row['tokens'])} tokens "
        f"after {len(result['prompt'])} of {result['title']}"
        for row in result["played"]
    )
