"""Does the fused step learn what the plain one learns, and what does Muon buy?

`python -m lib.lab.bench curves`: models of the shipped size read the same small batches
(4 x 256 tokens) from the same first weights, a few seeds each: by the fused block in bfloat16,
by the plain modules under autocast (the way the fused one replaced), and by the fused block
with Muon for the blocks' matrices. Writes data/results/curves.json, run by run, and goes on there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor
from torch.nn import functional as F

from lib.env import machine as env
from lib.env.errors import UserError
from lib.env.files import write_json
from lib.env.paths import RESULTS
from lib.lab.bench.timing import note
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.streams import Streams
from lib.scan import cpu as scan_cpu
from lib.train.batches import Batches
from lib.train.config import TrainConfig
from lib.train.optim import learning_rate, optimizers

ARMS = {  # name: (optimiser, fused)
    "fused": ("adamw", True),
    "plain": ("adamw", False),
    "muon": ("muon", True),
}
WINDOW = 10  # steps that a number of a curve is the mean of
LAST = 3  # numbers of a curve that a run's figure is the mean of


def loss_of(model: MambaLM, tokens: Tensor, targets: Tensor, fused: bool) -> Tensor:
    """Nats a token: with `fused` as the trainer takes it, else by plain modules around our scan."""
    count = (targets >= 0).sum()
    with torch.autocast("cpu", torch.bfloat16):
        if fused:
            return model(tokens, targets=targets) / count
        logits = model(tokens, backend="cpu")
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


def run(streams: Streams, arm: str, seed: int, steps: int) -> list[float]:
    """The loss, in nats a token, as means over `WINDOW` steps."""
    optimizer, fused = ARMS[arm]
    config = TrainConfig(
        n_layer=8, batch=4, length=256, steps=steps, carry=1, seed=seed, optimizer=optimizer
    )
    torch.manual_seed(seed)
    model = MambaLM(
        MambaConfig(streams.vocab_size, config.d_model, config.n_layer, config.d_state)
    ).train()
    batches = Batches(streams, streams.select("train"), config)
    chosen = optimizers(model, config, torch.device("cpu"))
    losses = []
    for step in range(steps):
        for one in chosen.values():
            for group in one.param_groups:
                group["lr"] = learning_rate(step / steps, config)
        batch = torch.from_numpy(batches.next()[0])
        loss = loss_of(model, batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous(), fused)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for one in chosen.values():
            one.step()
            one.zero_grad(set_to_none=True)
        losses.append(loss.item())
    starts = range(0, steps - WINDOW + 1, WINDOW)
    return [round(float(np.mean(losses[start : start + WINDOW])), 4) for start in starts]


def summary(runs: dict[str, list[float]], seeds: list[int]) -> dict:
    """Each arm's mean and spread over seeds at the end,
    and its paired difference from the fused one.
    """
    ends = {
        arm: np.array([np.mean(runs[f"{arm} {seed}"][-LAST:]) for seed in seeds])
        for arm in ARMS
        if all(f"{arm} {seed}" in runs for seed in seeds)
    }
    found = {}
    for arm, end in ends.items():
        found[arm] = {
            "mean": float(end.mean()),
            "lowest": float(end.min()),
            "highest": float(end.max()),
        }
        if arm != "fused" and "fused" in ends:
            gap = end - ends["fused"]
            half = float(t.ppf(0.975, len(seeds) - 1) * gap.std(ddof=1) / len(seeds) ** 0.5)
            found[arm] |= {"minus_fused": float(gap.mean()), "half_interval": half}
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.lab.bench curves", description=__doc__.split("\n")[0]
    )
    parser.add_argument("streams", help="a folder that python -m lib.music encode wrote")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "curves.json")
    args = parser.parse_args(argv)
    if args.steps < LAST * WINDOW or args.seeds < 2:
        raise UserError(
            f"curves need at least {LAST * WINDOW} steps and 2 seeds: raise --steps or --seeds"
        )
    if not scan_cpu.available():
        raise UserError("the fused step needs a C++ compiler (g++ or clang++): install one")
    scan_cpu.keep_memory()
    streams, seeds = Streams.load(args.streams), list(range(args.seeds))
    result = (
        json.loads(args.out.read_text()) if args.out.exists() else {"steps": args.steps, "runs": {}}
    )
    if result["steps"] != args.steps:
        raise UserError(
            f"{args.out} holds runs of {result['steps']} steps: give --steps {result['steps']}, "
            "or another --out"
        )
    for seed in seeds:
        for arm in ARMS:
            if f"{arm} {seed}" not in result["runs"]:
                curve = run(streams, arm, seed, args.steps)
                result["runs"][f"{arm} {seed}"] = curve
                note(f"{arm}, seed {seed}: {np.mean(curve[-LAST:]):.4f} nats a token at the end")
                write_json(args.out, result)
    result |= env.provenance(
        env.command_line("python", "-m", "lib.lab.bench", "curves", str(args.streams))
    )
    result |= {
        "seeds": seeds,
        "threads": torch.get_num_threads(),
        "streams": streams.settings,
        "train_pieces": len(streams.select("train")),
    }
    result["summary"] = summary(result["runs"], seeds)
    write_json(args.out, result)
    for arm, one in result["summary"].items():
        gap = (
            f", {one['minus_fused']:+.4f} ± {one['half_interval']:.4f} against fused"
            if "minus_fused" in one
            else ""
        )
        print(
            f"{arm}: {one['mean']:.4f} ({one['lowest']:.4f} to {one['highest']:.4f}) "
            f"nats a token{gap}"
        )
