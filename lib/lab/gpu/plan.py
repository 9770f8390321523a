"""The GPU hour on paper: which steps there are, in which order, and how long each may take."""

from dataclasses import dataclass

STREAMS = "streams"  # what a step may need: the base token streams, in all their parts


@dataclass(frozen=True)
class Step:
    """One thing that is measured, in a process of its own."""

    name: str
    limit: float  # minutes after which it is stopped
    least: float  # minutes below which it is not begun
    expected: str  # minutes on one large GPU, and how they were reckoned: nothing here was timed
    what: str
    needs: str = ""
    goes_on: bool = False  # whether a second call goes on where the first was stopped


STEPS = (
    Step(
        "correct",
        2,
        0.5,
        "1: 42 cases, each a loop over time in float64",
        "the Triton scan and all its gradients against the loop, three dtypes, odd sizes",
    ),
    Step(
        "peer",
        3,
        1,
        "2 to 3: a compiler on all cores, for this GPU's generation alone",
        "mamba-ssm's CUDA scan, built from its sources; if it cannot be, the step says why",
    ),
    Step(
        "scan",
        3,
        1,
        "2: six contenders, nine rounds of milliseconds, the rest is start-up",
        "the scan against length, beside mamba-ssm's kernel or else plain PyTorch",
    ),
    Step(
        "tiles",
        1.5,
        0.5,
        "1: 12 tilings, of which most is the compiler's",
        "block sizes and warps of the Triton kernels, from a short list",
    ),
    Step(
        "train_step",
        1,
        0.5,
        "0.5: four contenders, ten steps each",
        "a training step of 20 million parameters, beside a Transformer's",
    ),
    Step(
        "flagship",
        9,
        8,
        "9: it takes what it gets; the schedule is one of minutes",
        "20 million parameters trained on base tokens, transposed as they are read",
        STREAMS,
        goes_on=True,
    ),
    Step(
        "race",
        9.4,
        3,
        "8: 2 billion tokens at a million parameters, 8 runs side by side",
        "the race of notebook 10 at 40 million tokens a run",
        STREAMS,
        goes_on=True,
    ),
)


def step_of(name: str) -> Step:
    """The step of this name."""
    return next(step for step in STEPS if step.name == name)


def table() -> str:
    """The plan in Markdown."""
    lines = [
        "| step | limit, minutes | expected, not measured | what | needs |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.name} | {s.limit:g} | {s.expected} | {s.what} | {s.needs or 'nothing'} |"
        for s in STEPS
    ]
    return "\n".join([*lines, f"together at most {sum(s.limit for s in STEPS):g} minutes"])
