"""The README's table of results: each number from data/results, with what it is compared with and the command.

What was not measured says so. `python -m lib.lab.pages stamp` puts the table into the README.
"""

from lib.env import machine as env
from lib.lab.experiments.figures import load
from lib.lab.experiments.likelihood import show
from lib.lab.rivals.matched import LABELS


def table() -> str:
    """Rows of (what, measured, command) in Markdown, and the machine."""
    rows = [row() for row in (_scan, _generation, _training, _resume, _model, _race, _race_in_time, _repairs)]
    rows.append(("the same on a GPU", env.UNKNOWN, "the same commands"))
    places = {env.read_results(name).get("device") for name in ("scan_cpu_2_cores", "generate_cpu_2_cores", "train_cpu")}
    lines = ["| what | measured | by |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n\nMeasured on: " + "; ".join(sorted(filter(None, places))) + "."


def _scan() -> tuple[str, str, str]:
    found = env.read_results("scan_cpu_2_cores")
    what = "selective scan, forward and backward (B 4, L 1,024, D 256, N 16, float32)"
    command = f"`{found.get('command', 'python -m lib.lab.bench scan')}`"
    if not found:
        return what, env.UNKNOWN, command
    key, length = found["key"], found["key_length"]
    ms = next(row["forward_backward"]["median_ms"] for row in found["rows"]
              if (row["contender"], row["length"], row["allocator"]) == (found["ours"], length, "tuned"))
    times = {name: [key[f"float32, {kind} allocator"][name]["forward_backward"] for kind in ("tuned", "default")]
             for name in ("mambapy", "mamba_ssm_reference")}
    text = (f"{ms:.0f} ms; mambapy takes {_range(times['mambapy'])} as long, the reference of mamba-ssm "
            f"{_range(times['mamba_ssm_reference'])}")
    return what, text, command


def _range(times: list[float]) -> str:
    return f"{min(times):,.0f} to {max(times):,.0f} ×"


def _generation() -> tuple[str, str, str]:
    found = env.read_results("generate_cpu_2_cores").get("key")
    what, command = "generation, 3.8 million parameters, one piece", "`python -m lib.lab.bench generate`"
    if not found:
        return what, env.UNKNOWN, command
    speeds, times = found["tokens_per_second"].values(), found["times_as_long"]
    better = [min(times[cache][length] for cache in ("gpt2", "gpt2_static")) for length in times["gpt2"]]
    text = (f"{min(speeds):,} to {max(speeds):,} tokens/s, as fast after 32,768 tokens as after 512; Mamba in transformers takes "
            f"{_range(times['transformers_mamba'].values())} as long, GPT-2 with the better of its two caches "
            f"{_range(better)}")
    return what, text, command


def _training() -> tuple[str, str, str]:
    found = env.read_results("train_cpu")
    what, command = "a training step, 2.9 million parameters, 4 × 1,024 tokens", "`python -m lib.lab.bench train`"
    if not found:
        return what, env.UNKNOWN, command

    def pick(rows, contender):
        return next(row for row in rows if (row["contender"], row["length"], row["allocator"]) == (contender, 1024, "default"))

    speed = pick(found["rows"], "ours")["tokens_per_second"]
    times = {name: pick(found["ratios"], name)["times"] for name in ("mambapy", "transformer")}
    return what, (f"{speed:,.0f} tokens/s; mambapy takes {times['mambapy']:.1f} × as long, an equal Transformer "
                  f"{times['transformer']:.2f} ×"), command


def _resume() -> tuple[str, str, str]:
    found = env.read_results("interruptions")
    what, command = "a training run that is killed again and again", "`python -m lib.lab.bench interruptions`"
    if not found:
        return what, env.UNKNOWN, command
    return what, (f"{found['kills']} kills, {found['damaged']} damaged files, at most {found['most_lost']} steps lost; "
                  + ("the same weights at the end" if found["same_end"] else "other weights at the end")), command


def _model() -> tuple[str, str, str]:
    found = env.read_results("model")
    what, command = "the shipped model, bits a note on whole test pieces (95 %)", "`python -m lib.lab.release`"
    if not found.get("test_interval_95"):
        return what, env.UNKNOWN, command
    low, high = found["test_interval_95"]
    beside = ", ".join(f"{name} {bits:.1f}" for name, bits in found["test_baselines"].items())
    return what, f"{found['test_bits_per_note']:.2f} ({low:.2f} to {high:.2f}); {beside}", command


def _race() -> tuple[str, str, str]:
    return _difference("tokens")


def _race_in_time() -> tuple[str, str, str]:
    return _difference("minutes")


def _difference(budget: str) -> tuple[str, str, str]:
    found = load("likelihood")
    what = (f"Mamba minus Transformer, equal {'tokens' if budget == 'tokens' else 'time'}, bits a note on test pieces "
            "(95 % over pieces, not over seeds)")
    command = "`python -m lib.lab.experiments --only likelihood --jobs 2`"
    rows = found.get("summary", {}).get("budgets", {}).get(budget, {})
    if "transformer" not in rows:
        return what, env.UNKNOWN, command
    best = min(rows, key=lambda arch: rows[arch]["bits_per_note"])
    text = show(rows["transformer"]["first_minus_this"], "+")
    if rows[best]["first_minus_this"]:
        text += f"; but the {LABELS[best]} wins: Mamba minus {LABELS[best]} {show(rows[best]['first_minus_this'], '+')}"
    return what, text, command


def _repairs() -> tuple[str, str, str]:
    what = ("the original's recipe at our size, seven passes over six performances, bits a note on held-out pieces, "
            "and what repairs gain (95 %)")
    command = "`python -m lib.lab.experiments --only original --jobs 2`"
    arms = {arm["arm"]: arm for arm in load("original").get("arms", [])}
    if "all repaired" not in arms:
        return what, env.UNKNOWN, command
    before, after = arms["original"]["bits_per_note"], arms["all repaired"]
    gains = {name: arms[name]["gain"]["bits_per_note"] for name in ("vocabulary", "schedule")}
    return what, (f"{before:.2f}; all repairs gain {show(after['gain'])}; fewer merges alone {gains['vocabulary']:.2f}, "
                  f"the schedule alone {gains['schedule']:.2f}"), command
