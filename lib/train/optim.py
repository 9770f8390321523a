"""What a step of training does beside the model.

That is optimisers, the learning rate, and precision.
"""

import math

import torch
from torch import nn

from lib.env.errors import UserError
from lib.env.machine import choose_device
from lib.scan import native
from lib.train.config import TrainConfig
from lib.train.muon import Muon


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices decay; A, D, norms, biases and the convolution do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        spared = name.endswith(("A_log", "A_imag", "bias")) or "conv1d" in name
        (rest if spared or parameter.dim() < 2 else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def optimizers(
    model: nn.Module, config: TrainConfig, device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    """AdamW for all parameters but those of Muon, which may take the matrices inside the blocks.

    Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest matrix whose singular
    values are all about one; scaled as in Liu et al. (2025, eq. 4), it shares AdamW's learning rate
    and weight decay. The keys are the names that their numbers have in a checkpoint.
    """
    decay, rest = parameter_groups(model, config.weight_decay)
    inner = {id(p) for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2}
    matrices = [p for p in decay["params"] if id(p) in inner] if config.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    decay["params"] = [p for p in decay["params"] if id(p) not in taken]
    chosen = {
        "optimizer": torch.optim.AdamW(
            [decay, rest],
            lr=config.lr,
            betas=(0.9, config.beta2),
            fused=device.type in ("cuda", "cpu"),
        )
    }
    if matrices:
        chosen["muon"] = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay)
    return chosen


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Linear warm-up, `hold`, then a cosine down to `final_lr`; `progress` goes from 0 to 1.

    A rate that is held (Hu et al. 2024, MiniCPM, section 4) lets a run be made longer while it is
    under way: the length must be known only when the cosine begins.
    """
    if progress < config.warmup:
        return config.lr * min(1.0, max(progress, 1e-3) / config.warmup)
    begin = config.warmup + config.hold
    x = min(1.0, max(0.0, progress - begin) / (1 - begin))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * x)))


def choose_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products, None for float32: bf16 only where the device computes in it."""
    if wanted == "auto" and device.type == "cpu":
        wanted = "bf16" if native.bfloat16_is_fast() else "fp32"
    elif wanted == "auto":
        wanted = choose_device()[1] if device.type == "cuda" else "fp32"
    choices = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted not in choices:
        raise UserError(f"precision {wanted!r} is unknown: choose auto, {', '.join(choices)}")
    return choices[wanted]
