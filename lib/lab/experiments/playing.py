"""What the compared models play: one opening of the validation split, continued by each of them.

With the models of part (a) (equal tokens, first seed), the same seed and the same way of drawing. Kept as
tokens, so that a notebook can show and play them.
"""

from lib.env.schema import Count
from lib.generate.player import continuations, hear_prompt
from lib.lab.experiments.likelihood import spec
from lib.lab.experiments.runs import best_model
from lib.music.notes import read_midi
from lib.music.tokens import first_seconds


def run(lab) -> dict:
    """The prompt, and each architecture's continuation; kept one by one."""
    chosen, likelihood = lab.protocol.playing, lab.protocol.likelihood
    piece = min((p for p in lab.found if p.split == "validation"), key=lambda p: p.path.name)
    tokenizer = lab.streams(lab.protocol.grid_ms)[1]
    music, rates = read_midi(piece.path), lab.read("likelihood").get("rates", {})
    result = {
        "composer": piece.composer,
        "title": piece.title,
        "year": piece.year,
        "prompt_seconds": chosen.prompt_seconds,
        "prompt": first_seconds(tokenizer, music, chosen.prompt_seconds).tolist(),
        "played": [],
    }
    for arch in likelihood.archs:
        one = spec(
            lab,
            arch,
            lr=rates.get(arch, likelihood.rates[0]),
            seed=likelihood.seeds[0],
            budget="tokens",
        )

        def work(one=one):
            model = best_model(lab.place(one.name), lab.device)
            start, _, begin = hear_prompt(model, tokenizer, music, chosen.prompt_seconds)
            return [
                int(t)
                for t in continuations(
                    model, tokenizer, [start], [chosen.seed], until=begin + chosen.seconds
                )[1][0]
            ]

        result["played"].append(
            {"arch": arch, "tokens": lab.once(f"playing-{arch}", work, list[Count])}
        )
        lab.write("playing", result)
    return result


def table(result: dict) -> str:
    """How much each played, in words."""
    return "\n".join(
        f"- {row['arch']}: {len(row['tokens'])} tokens after {len(result['prompt'])} of {result['title']}"
        for row in result["played"]
    )
