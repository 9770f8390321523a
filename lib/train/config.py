"""What is chosen about a training run: sizes, data, schedule, precision; and the named presets."""

import inspect
import math
import re
from dataclasses import dataclass, fields

from lib.env.errors import UserError

OPTIMIZERS = ("adamw", "muon")
AT_LEAST_ONE = (
    "d_model",
    "n_layer",
    "d_state",
    "batch",
    "length",
    "carry",
    "steps",
    "accumulate",
    "eval_every",
    "eval_tokens",
    "save_every",
)
SHARES = ("dropout", "warmup", "hold", "final_lr", "beta2")
POSITIVE = ("minutes", "lr", "clip")
NOT_NEGATIVE = ("transpose", "louder", "patience", "weight_decay", "seed")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. What is reached first ends it: `steps`, `minutes` or `patience`."""

    d_model: int = 256  # width of the residual
    n_layer: int = 5  # blocks
    d_state: int = 16  # numbers of state a channel
    dropout: float = 0.0  # on each block's output
    batch: int = 8  # sequences a step, of all processes together
    length: int = 512  # tokens a sequence
    carry: int = 8  # sequences a row reads on in a piece before it jumps; 1: all start empty
    copies: bool = True  # also the augmented copies that the streams hold
    transpose: int = 0  # semitones, down or up, drawn at each jump; needs streams of base tokens
    louder: int = 0  # levels of loudness, softer or louder, likewise
    steps: int = 1_000_000  # after which the run ends
    minutes: float = 60.0  # of training, after which it ends
    patience: int = 0  # validations without a new best after which the run ends; 0: never
    lr: float = 3e-3  # at the end of the warm-up
    warmup: float = 0.02  # share of the run
    hold: float = 0.0  # share of the run at the full rate, before the cosine begins
    final_lr: float = 0.05  # share of `lr` left at the end of the cosine
    optimizer: str = "adamw"  # or muon, for the blocks' matrices alone
    weight_decay: float = 0.1  # not on A_log, D, norms and biases
    beta2: float = 0.95  # of Adam: how slowly its mean of squares forgets
    clip: float = 1.0  # largest norm of all gradients together
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    accumulate: int = 1  # parts that a batch is read in: less memory, the same gradient
    recompute: bool = False  # gradient checkpointing: keep what goes into a block, no more
    compile: bool = False  # torch.compile; `python -m lib.lab.bench train` says what it does here
    eval_every: int = 500  # steps between validations
    eval_tokens: int = 100_000  # of whole validation pieces, about
    save_every: int = 200  # steps between checkpoints to resume from
    seed: int = 0  # of weights, crops and dropout

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name}={value} makes no sense: give at least 1")
        for name in SHARES:
            value = getattr(self, name)
            stays = name == "final_lr" and value == 1  # a rate that does not come down
            if not 0 <= value < 1 and not stays:
                raise UserError(f"{name}={value} is a share: give a number from 0 to below 1")
        if self.warmup + self.hold >= 1:
            raise UserError(
                f"warmup={self.warmup} and hold={self.hold} leave no time for the rate "
                "to come down: together they must stay below 1"
            )
        for name in POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name}={value} must be above 0 and finite")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"{name}={value} makes no sense: give 0 or more, and a finite one")
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed} has more than 63 bits: give a smaller number")
        if self.optimizer not in OPTIMIZERS:
            choices = " or ".join(OPTIMIZERS)
            raise UserError(f"optimizer {self.optimizer!r} is unknown: choose {choices}")
        if self.batch % self.accumulate:
            raise UserError(
                f"batch={self.batch} cannot be read in {self.accumulate} equal parts: "
                "change accumulate"
            )


# the data and the model decide these together: a run goes on only with the same
FIXED = (
    "d_model",
    "n_layer",
    "d_state",
    "batch",
    "length",
    "carry",
    "copies",
    "transpose",
    "louder",
    "seed",
    "optimizer",
)

PRESETS = {
    # seconds: for tests, and to see that everything works
    "quick": TrainConfig(
        d_model=64,
        n_layer=2,
        d_state=8,
        batch=4,
        length=128,
        steps=60,
        minutes=1.0,
        lr=5e-3,
        eval_every=30,
        eval_tokens=6_000,
        save_every=30,
    ),
    # an evening on two or more CPU cores
    "laptop": TrainConfig(minutes=90.0),
    # a T4, within one session
    "colab": TrainConfig(
        d_model=384,
        n_layer=8,
        dropout=0.1,
        batch=32,
        minutes=150.0,
        lr=2e-3,
        patience=6,
        eval_tokens=200_000,
        save_every=500,
    ),
    # one large GPU, about 600 million tokens
    "h100": TrainConfig(
        d_model=512,
        n_layer=12,
        dropout=0.1,
        batch=64,
        length=1024,
        steps=9_200,
        minutes=600.0,
        lr=2e-3,
        eval_every=250,
        eval_tokens=400_000,
        save_every=250,
    ),
}


def add_options(parser) -> None:
    """An option for every field of `TrainConfig`, explained by the comment behind it."""
    explained = dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(TrainConfig), re.M))
    for field in fields(TrainConfig):
        kind = truth if isinstance(field.default, bool) else type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        text = explained[field.name].replace("%", "%%")
        parser.add_argument(option, type=kind, default=None, metavar=kind.__name__, help=text)


def truth(text: str) -> bool:
    """A yes or no of the command line."""
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "yes", "1")


def given(args) -> dict:
    """The fields that the command line named."""
    chosen = {field.name: getattr(args, field.name) for field in fields(TrainConfig)}
    return {name: value for name, value in chosen.items() if value is not None}
