"""What is chosen about a training run: sizes, data, schedule, precision; and the named presets."""

import math
from dataclasses import dataclass, fields

import torch
from torch import nn

from lib.env.errors import UserError
from lib.env.machine import choose_device

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `steps` or `minutes`, whichever is reached first, ends it, or `patience`."""

    d_model: int = 256
    n_layer: int = 5
    d_state: int = 16
    dropout: float = 0.0  # on each block's output
    batch: int = 8  # sequences a step, of all processes together
    length: int = 512  # tokens a sequence
    carry: int = 8  # sequences that follow one another in a piece before a row jumps; 1: every state starts empty
    copies: bool = True  # also the augmented copies that the streams hold
    transpose: int = 0  # semitones, down or up, drawn at each jump; needs streams of base tokens
    louder: int = 0  # levels of loudness, softer or louder, likewise
    steps: int = 1_000_000
    minutes: float = 60.0
    patience: int = 0  # validations without a new best after which the run ends; 0: never
    lr: float = 3e-3  # at the end of the warm-up
    warmup: float = 0.02  # share of the run
    final_lr: float = 0.05  # share of `lr` left at the end of the cosine
    optimizer: str = "adamw"  # or muon, for the blocks' matrices alone
    weight_decay: float = 0.1  # not on A_log, D, norms and biases
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of all gradients together
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    accumulate: int = 1  # parts that a batch is read in, one after another: less memory, the same gradient
    recompute: bool = False  # gradient checkpointing: keep only what goes into a block, compute it again backward
    compile: bool = False  # torch.compile; see `python -m lib.lab.bench train` for what it does here
    eval_every: int = 500  # steps between validations
    eval_tokens: int = 100_000  # of whole validation pieces, about
    save_every: int = 200  # steps between checkpoints to resume from
    seed: int = 0

    def __post_init__(self):
        for name in ("d_model", "n_layer", "d_state", "batch", "length", "carry", "steps", "accumulate", "eval_every",
                     "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} makes no sense: give at least 1")
        for name in ("dropout", "warmup", "final_lr", "beta2"):
            if not 0 <= getattr(self, name) < 1 and (name, getattr(self, name)) != ("final_lr", 1):
                raise UserError(f"{name}={getattr(self, name)} is a share: give a number from 0 to below 1")
        for name in ("minutes", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be above 0 and finite")
        for name in ("transpose", "louder", "patience", "weight_decay", "seed"):
            if not 0 <= getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)} is below 0: give 0 or more")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer {self.optimizer!r} is unknown: choose {' or '.join(OPTIMIZERS)}")
        if self.batch % self.accumulate:
            raise UserError(f"batch={self.batch} cannot be read in {self.accumulate} equal parts: change accumulate")


# the data and the model decide these together: a run goes on only with the same
FIXED = ("d_model", "n_layer", "d_state", "batch", "length", "carry", "copies", "transpose", "louder", "seed",
         "optimizer")

PRESETS = {
    # seconds: for tests, and to see that everything works
    "quick": TrainConfig(d_model=64, n_layer=2, d_state=8, batch=4, length=128, steps=60, minutes=1.0,
                         lr=5e-3, eval_every=30, eval_tokens=6_000, save_every=30),
    # an evening on two or more CPU cores
    "laptop": TrainConfig(minutes=90.0),
    # a T4, within one session
    "colab": TrainConfig(d_model=384, n_layer=8, dropout=0.1, batch=32, minutes=150.0, lr=2e-3, patience=6,
                         eval_tokens=200_000, save_every=500),
    # one large GPU, about 600 million tokens
    "h100": TrainConfig(d_model=512, n_layer=12, dropout=0.1, batch=64, length=1024, steps=9_200, minutes=600.0,
                        lr=2e-3, eval_every=250, eval_tokens=400_000, save_every=250),
}


def add_options(parser) -> None:
    """An option for every field of `TrainConfig`."""
    for field in fields(TrainConfig):
        kind = truth if isinstance(field.default, bool) else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=None, metavar=kind.__name__)


def truth(text: str) -> bool:
    """A yes or no of the command line."""
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "yes", "1")


def given(args) -> dict:
    """The fields that the command line named."""
    return {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices decay; A, D, norms, biases and the convolution do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or name.endswith(("A_log", "A_imag")) or "conv1d" in name
        (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizers(model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters, or for what is left by Muon, which takes the matrices inside the blocks.

    Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest matrix whose singular values are
    all about one; scaled as in Liu et al. (2025, eq. 4), it shares AdamW's learning rate and weight decay.
    The keys are the names that their numbers have in a checkpoint.
    """
    decay, rest = parameter_groups(model, config.weight_decay)
    inner = {id(p) for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    matrices = [p for p in decay["params"] if id(p) in inner] if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    decay["params"] = [p for p in decay["params"] if id(p) not in taken]
    chosen = {"optimizer": torch.optim.AdamW([decay, rest], lr=config.lr, betas=(0.9, config.beta2),
                                             fused=device.type == "cuda")}
    if matrices:
        chosen["muon"] = torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay,
                                          adjust_lr_fn="match_rms_adamw")
    return chosen


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `final_lr`; `progress` goes from 0 to 1."""
    if progress < config.warmup:
        return config.lr * min(1.0, max(progress, 1e-3) / config.warmup)
    x = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * x)))


def choose_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products, None for float32: bf16 only where the device computes in it."""
    if wanted == "auto":
        wanted = choose_device()[1] if device.type == "cuda" else "fp32"
    choices = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted not in choices:
        raise UserError(f"precision {wanted!r} is unknown: choose auto, {', '.join(choices)}")
    return choices[wanted]


def recompute(model: nn.Module) -> None:
    """Gradient checkpointing: each block keeps its input alone, and computes the rest again backward."""
    from torch.utils.checkpoint import checkpoint

    def wrap(forward):
        def again(*args):
            return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)
        return again

    for layer in model.backbone.layers:
        layer.mixer.forward = wrap(layer.mixer.forward)
