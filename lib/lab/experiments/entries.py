"""Who trains in the race of part (a), and how.

Its runs, as the protocol and the search decide them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lib.env.errors import UserError
from lib.lab.experiments.runs import Spec


def spec(lab, arch: str, *, lr: float, warmup: float, seed: int, tokens: int) -> Spec:
    """One run; runs with the same choices are one run."""
    chosen, config = lab.protocol.race, lab.protocol.config
    config = replace(
        config,
        lr=lr,
        warmup=warmup,
        seed=seed,
        precision=chosen.precision,
        dropout=lab.protocol.size.dropout,
        steps=max(1, tokens // (config.batch * config.length)),
    )
    name = f"race/{arch}-lr{lr:g}-warmup{warmup:g}-seed{seed}-steps{config.steps}"
    return Spec(name, arch, lab.protocol.size, config)


def trial(lab, arch: str, lr: float, warmup: float) -> Spec:
    """A short run that looks for a rate and a warm-up: the first seed."""
    chosen = lab.protocol.race
    return spec(lab, arch, lr=lr, warmup=warmup, seed=chosen.seeds[0], tokens=chosen.trial_tokens)


def whole(lab, arch: str, best: dict) -> Spec:
    """The first seed's run of all tokens with this rate and warm-up."""
    chosen = lab.protocol.race
    return spec(lab, arch, **best, seed=chosen.seeds[0], tokens=chosen.tokens)


def best_of(rows: Iterable[dict]) -> dict:
    """The rate and the warm-up of the run that validation likes best."""
    return choice(min(rows, key=lambda row: row["validation_bits_per_note"]))


def choice(row: dict) -> dict:
    """What a run was tried for: its rate and its warm-up."""
    return {"lr": row["lr"], "warmup": row["warmup"]}


def settings(lab, arch: str) -> dict[str, float]:
    """The rate and the warm-up that the race chose; at the quick scale, where it may not have yet,
    the middle rate and the first warm-up.

    Raises `UserError` where the race has not chosen.
    """
    chosen = lab.protocol.race
    best = lab.read("race").get("best", {})
    if arch not in best and lab.protocol.scale != "quick":
        raise UserError("the race comes first: python -m lib.lab.experiments --only race")
    default = {"lr": chosen.rates[len(chosen.rates) // 2], "warmup": chosen.warmups[0]}
    return best.get(arch, default)


def near(rows: list[dict], tie: float) -> list[dict]:
    """The runs that come as near as `tie` bits a note to the best of them."""
    least = min(row["validation_bits_per_note"] for row in rows)
    return [row for row in rows if row["validation_bits_per_note"] <= least + tie]


def tied(rows: list[dict], tie: float) -> list[dict]:
    """The best rate and warm-up of some trials; behind it those of the smallest rate
    that comes as near as `tie` bits a note, where that is another.
    """
    best = best_of(rows)
    gentle = choice(min(near(rows, tie), key=lambda row: row["lr"]))
    return [best] if best == gentle else [best, gentle]


def entries(lab, best: dict[str, dict]) -> Iterator[Spec]:
    """Two seeds of all, then the shorter budgets, then the other seeds, one by one: so a race
    that is cut short has some of everything.
    """
    chosen = lab.protocol.race

    def seeds(numbers: slice) -> Iterator[Spec]:
        for number, seed in list(enumerate(chosen.seeds))[numbers]:
            for arch in chosen.archs:
                if number < chosen.few or arch in chosen.headline:
                    yield spec(lab, arch, **best[arch], seed=seed, tokens=chosen.tokens)

    yield from seeds(slice(2))
    for tokens in chosen.budgets:
        for arch in chosen.archs:
            yield spec(lab, arch, **best[arch], seed=chosen.seeds[0], tokens=tokens)
    yield from seeds(slice(2, None))


def is_shown(lab, one: Spec) -> bool:
    """Is this the run of its architecture that the other parts look into:
    the first seed, all tokens?
    """
    return one.config.seed == lab.protocol.race.seeds[0] and is_whole(lab, one)


def is_whole(lab, one: Spec) -> bool:
    """Does a run read all tokens?"""
    config = one.config
    return config.steps == max(1, lab.protocol.race.tokens // (config.batch * config.length))


def shown(lab) -> list[Spec]:
    """That run of every architecture.

    Raises `UserError` where the race has not chosen its rates yet.
    """
    best = lab.read("race").get("best")
    if not best:
        raise UserError("the race comes first: python -m lib.lab.experiments --only race")
    return [one for one in entries(lab, best) if is_shown(lab, one)]


def kept_as(one: Spec) -> str:
    """The name of a run among what is kept."""
    return one.name.replace("/", "-")
