"""The README's table of results: each number from data/results, with what it is compared with and
the command.

`ROWS` says what the table holds. Every machine that has measured a row fills it from a file of its
own, and what was measured on none says so. `python -m lib.lab.pages stamp` puts the table into the
README.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from lib.env import machine as env
from lib.lab.experiments.intervals import show_difference
from lib.lab.experiments.original import EVERYTHING, NOTHING, REPAIRS
from lib.lab.rivals.matched import LABELS


@dataclass(frozen=True)
class Row:
    """One question of the table, and how a result answers it."""

    name: str  # its results are data/results/NAME.json or NAME_MACHINE.json
    what: str
    command: str
    says: Callable[[dict], str]  # a result in words, "" where it does not hold the answer
    sizes: Callable[[dict], str] = lambda found: ""  # of what a result measured, after `what`
    options: bool = False  # whether the command is shown with the options that it had

    def lines(self) -> list[tuple[str, str, str, str]]:
        """(what, measured, command, device), once for each result that holds the answer."""
        lines = []
        for found in _results(self.name):
            measured = self.says(found)
            if measured:
                command = found["command"] if self.options else self.command
                lines.append((self.what + self.sizes(found), measured, command, found["device"]))
        return lines


def _results(name: str) -> list[dict]:
    """What every machine has measured under this name."""
    paths = [*env.RESULTS.glob(f"{name}.json"), *sorted(env.RESULTS.glob(f"{name}_*.json"))]
    return [env.read_results(path.stem) for path in paths]


def table() -> str:
    """The rows in Markdown, and the machines. With several machines each line names its own."""
    answers = [(row, row.lines()) for row in ROWS]
    devices = sorted({device for _, lines in answers for *_, device in lines})
    text = ["| what | measured | by |", "|---|---|---|"]
    for row, lines in answers:
        for what, measured, command, device in lines:
            place = f", on {device}" if len(devices) > 1 else ""
            text.append(f"| {what}{place} | {measured} | `{command}` |")
        if not lines:
            text.append(f"| {row.what} | {env.UNKNOWN} | `{row.command}` |")
    if all(device.startswith("CPU") for device in devices):
        text.append(f"| the same on a GPU | {env.UNKNOWN} | the same commands |")
    if devices:
        text.append(f"\nMeasured on: {'; '.join(devices)}.")
    return "\n".join(text)


# ---- a result in words --------------------------------------------------------------------


# what a CPU does with freed memory; a GPU has one way
ALLOCATORS = {
    "tuned": ["where freed memory is kept"],
    "default": ["where it goes back to the system"],
}
PEERS = {
    "mambapy": "mambapy takes {} as long",
    "mamba_ssm_reference": "the reference of mamba-ssm {}",
    "mamba_ssm_cuda": "the CUDA kernel of mamba-ssm {}",
}


def _scan(found: dict) -> str:
    length, dtype = found["key_length"], found["dtypes"][0]
    ours = next(
        row
        for row in found["rows"]
        if (row["contender"], row["length"], row["dtype"], row["allocator"])
        == (found["ours"], length, dtype, found["allocators"][0])
    )
    took = ours["forward_backward"]["median_ms"]
    milliseconds = f"{took:.{int(took < 10)}f} ms"
    said = [milliseconds]
    for allocator in found["allocators"]:  # what a page fault costs, all of them pay
        place = found["key"].get(f"{dtype}, {allocator} allocator", {})
        beside = [
            sentence.format(_range([place[name]["forward_backward"]]))
            for name, sentence in PEERS.items()
            if name in place
        ]
        if beside:
            said.append(", ".join([*ALLOCATORS.get(allocator, []), *beside]))
    return "; ".join(said)


def _scan_sizes(found: dict) -> str:
    shape = found["shape"]
    return (
        f" (B {shape['batch']}, L {found['key_length']:,}, D {shape['d_inner']:,}, "
        f"N {shape['d_state']}, {found['dtypes'][0]})"
    )


def _generation(found: dict) -> str:
    speeds = found["key"]["tokens_per_second"].values()
    times = found["key"]["times_as_long"]
    caches = [times[cache] for cache in ("gpt2", "gpt2_static")]
    better = [min(cache[length] for cache in caches) for length in times["gpt2"]]
    first, *_, last = sorted(found["positions"])
    return (
        f"{min(speeds):,} to {max(speeds):,} tokens/s, "
        f"as fast after {last:,} tokens as after {first:,}; "
        f"Mamba in transformers takes {_range(times['transformers_mamba'].values())} as long, "
        f"GPT-2 with the better of its two caches {_range(better)}"
    )


def _generation_sizes(found: dict) -> str:
    ours = found["contenders"][found["ours"]]
    return f", {ours['parameters'] / 1e6:.1f} million parameters, one piece"


def _training(found: dict) -> str:
    speed = {
        name: _pick(found, "rows", name)["tokens_per_second"]
        for name in ("ours", "ours_bf16", "transformer_bf16", "mambapy")
    }
    transformer = speed["ours_bf16"] / speed["transformer_bf16"]
    mambapy = speed["ours"] / speed["mambapy"]
    return (
        f"{speed['ours_bf16']:,.0f} tokens/s in bfloat16, where an equal Transformer takes "
        f"{transformer:.2f} × as long; {speed['ours']:,.0f} in float32, "
        f"where mambapy takes {mambapy:.1f} ×"
    )


def _training_sizes(found: dict) -> str:
    millions = _pick(found, "rows", "ours")["parameters"] / 1e6
    tokens = f"{found['sizes']['batch']} × {found['key_length']:,} tokens"
    return f", {millions:.1f} million parameters, {tokens}, freed memory kept"


def _pick(found: dict, part: str, contender: str) -> dict:
    """The row of a contender at the key length, with freed memory kept, as `lib.train` does."""
    place = (contender, found["key_length"], "tuned")
    return next(
        row for row in found[part] if (row["contender"], row["length"], row["allocator"]) == place
    )


def _resume(found: dict) -> str:
    end = "the same weights at the end" if found["same_end"] else "other weights at the end"
    return (
        f"{found['kills']} kills, {found['damaged']} damaged files, "
        f"at most {found['most_lost']} steps lost; {end}"
    )


def _model(found: dict) -> str:
    if not found.get("test_interval_95"):
        return ""
    low, high = found["test_interval_95"]
    beside = ", ".join(f"{name} {bits:.1f}" for name, bits in found["test_baselines"].items())
    return f"{found['test_bits_per_note']:.2f} ({low:.2f} to {high:.2f}); {beside}"


def _difference(budget: str) -> Callable[[dict], str]:
    def says(found: dict) -> str:
        rows = found.get("summary", {}).get("budgets", {}).get(budget, {})
        compared = [arch for arch in ("transformer", "transformer_xl", "lstm") if arch in rows]
        return "; ".join(
            f"{LABELS[arch]} {show_difference(rows[arch]['first_minus_this'])}" for arch in compared
        )

    return says


def _repairs(found: dict) -> str:
    arms = {arm["arm"]: arm for arm in found["arms"]}
    before, after = arms[NOTHING]["bits_per_note"], arms[EVERYTHING]
    alone = {name: arms[name]["gain"] for name in REPAIRS}
    first, second = sorted(alone, key=lambda name: alone[name]["bits_per_note"], reverse=True)[:2]
    best = "; ".join(f"{name} alone {show_difference(alone[name])}" for name in (first, second))
    return f"{before:.2f}; all repairs gain {show_difference(after['gain'])}; {best}"


def _range(times: Collection[float]) -> str:
    low, high = f"{min(times):,.0f}", f"{max(times):,.0f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


BENCH, EXPERIMENTS = "python -m lib.lab.bench", "python -m lib.lab.experiments"
ROWS = (
    Row(
        "scan",
        "selective scan, forward and backward",
        f"{BENCH} scan",
        _scan,
        _scan_sizes,
        options=True,
    ),
    Row("generate", "generation", f"{BENCH} generate", _generation, _generation_sizes),
    Row("train", "a training step", f"{BENCH} train", _training, _training_sizes),
    Row(
        "interruptions",
        "a training run that is killed again and again",
        f"{BENCH} interruptions",
        _resume,
    ),
    Row(
        "model",
        "the shipped model, bits a note on whole test pieces (95 %)",
        "python -m lib.lab.release",
        _model,
    ),
    Row(
        "experiments_race",
        "Mamba minus its rivals, equal tokens, bits a note on test pieces "
        "(95 %, over seeds and pieces)",
        f"{EXPERIMENTS} --only race --jobs 2",
        _difference("tokens"),
        options=True,
    ),
    Row(
        "experiments_race",
        "Mamba minus its rivals, equal arithmetic, bits a note on test pieces "
        "(95 %, over seeds and pieces)",
        f"{EXPERIMENTS} --only race --jobs 2",
        _difference("arithmetic"),
        options=True,
    ),
    Row(
        "experiments_original",
        "the original's recipe in small, a few performances read many times: "
        "bits a note on performances never seen, "
        "and what repairs gain (95 %, over seeds and pieces)",
        f"{EXPERIMENTS} --only original --jobs 2",
        _repairs,
    ),
)
