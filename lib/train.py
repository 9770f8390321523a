"""Train a Mamba on token streams: `python -m lib.train`.

The loop is the plain one: AdamW, warm-up and cosine, clipped gradients, validation in bits per
note, the best checkpoint kept. A run lives in one folder and goes on where it stopped.
"""

import argparse
import csv
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import mamba
from lib.env import choose_device
from lib.errors import UserError
from lib.evaluate import bits_per_note
from lib.files import whole
from lib.mamba import MambaConfig, MambaLM
from lib.streams import Piece, Streams

LAST, LOG = "last.safetensors", "log.csv"
TOKENIZER_FILES = ("tokenizer.json", "tokens.json")
LOG_FIELDS = ["step", "tokens", "minutes", "lr", "train_bits_per_token", "validation_bits_per_note"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `steps` or `minutes`, whichever is reached first, ends it."""

    d_model: int = 256
    n_layer: int = 5
    d_state: int = 16
    dropout: float = 0.0
    batch: int = 8  # sequences a step
    length: int = 512  # tokens a sequence
    carry: int = 8  # sequences that follow one another in a piece before a row jumps elsewhere
    steps: int = 1_000_000
    minutes: float = 60.0
    lr: float = 3e-3  # at the end of the warm-up
    warmup: float = 0.02  # share of the run
    final_lr: float = 0.05  # share of `lr` left at the end of the cosine
    weight_decay: float = 0.1  # not on A_log, D, norms and biases
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of all gradients together
    precision: str = "auto"  # auto, fp32, bf16 or fp16
    eval_every: int = 500  # steps between validations
    eval_tokens: int = 100_000  # of whole validation pieces, about
    save_every: int = 200  # steps between checkpoints to resume from
    seed: int = 0


PRESETS = {
    "quick": TrainConfig(d_model=64, n_layer=2, d_state=8, batch=4, length=128, steps=60, minutes=1.0,
                         lr=5e-3, eval_every=30, eval_tokens=6_000, save_every=30),
    "laptop": TrainConfig(minutes=90.0),
}


class Crops:
    """Batches of crops, each row reading on in its piece for `carry` crops, then jumping.

    `next()` gives tokens of shape (B, L+1), with -1 behind a piece's end, and the rows that
    jumped, whose state must be emptied. `position` and `load` make it resumable.
    """

    def __init__(self, streams: Streams, pieces: list[Piece], config: TrainConfig):
        if not pieces:
            raise UserError("there is no training piece in these streams: build them from the train split")
        self.streams, self.pieces, self.config = streams, pieces, config
        self.rng = np.random.default_rng(config.seed)
        weights = np.array([p.length for p in pieces], float)
        self.weights = weights / weights.sum()  # a long piece is met more often: each token equally
        # rows jump at different times, so that no step sees only fresh states
        self.rows = [[0, 0, 0] for _ in range(config.batch)]  # piece, next token, crops left
        self.first = True

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        length = self.config.length
        tokens = np.full((len(self.rows), length + 1), -1, np.int64)
        jumped = np.zeros(len(self.rows), bool)
        for i, (piece, at, left) in enumerate(self.rows):
            if left == 0 or at >= self.pieces[piece].length - 1:
                jumped[i] = True
                piece = int(self.rng.choice(len(self.pieces), p=self.weights))
                # a fifth of the visits begin at the beginning: openings are what a listener meets first
                room = max(1, self.pieces[piece].length - length)
                at = 0 if self.rng.random() < 0.2 else int(self.rng.integers(room))
                left = int(self.rng.integers(1, self.config.carry + 1)) if self.first else self.config.carry
            part = self.streams.stream(self.pieces[piece])[at : at + length + 1]
            tokens[i, : len(part)] = part
            self.rows[i] = [piece, at + length, left - 1]
        self.first = False
        return tokens, jumped

    def position(self) -> dict:
        return {"rows": self.rows, "first": self.first, "rng": self.rng.bit_generator.state}

    def load(self, position: dict) -> None:
        self.rows, self.first = position["rows"], position["first"]
        self.rng.bit_generator.state = position["rng"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices decay; A_log, D, norms, biases and the convolution do not."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.dim() < 2 or name.endswith("A_log") or "conv1d" in name
        (rest if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


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


def validation_pieces(streams: Streams, tokens: int) -> list[Piece]:
    """A fixed, spread-out handful of whole validation pieces of about so many tokens."""
    pieces = streams.select("validation") or streams.select("train")[:1]
    chosen, total = [], 0
    for piece in np.random.default_rng(7).permutation(np.array(pieces, object)):
        if not chosen or total + piece.length <= tokens:
            chosen.append(piece)
            total += piece.length
    return chosen


class Trainer:
    """One run in one folder: `Trainer(streams, config, folder).run()`.

    The folder holds `last.safetensors` (everything needed to go on), `log.csv`, `run.json` and
    `best/`, the checkpoint with the lowest validation bits per note.
    """

    def __init__(self, streams: Streams, config: TrainConfig, folder: str | Path, *,
                 device: str | None = None, resume: bool = False, say=print):
        self.streams, self.config, self.folder, self.say = streams, config, Path(folder), say
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = choose_precision(config.precision, self.device)
        if self.device.type == "cpu":
            from lib import scan_cpu

            scan_cpu.build(say)
            scan_cpu.keep_memory()
        torch.manual_seed(config.seed)
        self.model = MambaLM(MambaConfig(streams.vocab_size, config.d_model, config.n_layer, config.d_state,
                                         dropout=config.dropout)).to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.lr,
                                           betas=(0.9, config.beta2), fused=self.device.type == "cuda")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.crops = Crops(streams, streams.select("train", copies=True), config)
        self.held_out = validation_pieces(streams, config.eval_tokens)
        self.state = self.model.new_state(config.batch)
        self.step, self.tokens, self.seconds, self.best, self.log = 0, 0, 0.0, math.inf, []
        if resume and (self.folder / LAST).exists():
            self._load()
        elif (self.folder / LAST).exists():
            raise UserError(f"{self.folder} holds a run already: add --resume to go on, or choose another --out")

    # -- going on after an interruption --------------------------------------------------------
    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()}
        for i, layer in enumerate(self.state):
            tensors |= {f"state.{i}.{j}": t for j, t in enumerate(layer)}
        tensors["rng"] = torch.get_rng_state()
        return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}

    def _save(self) -> None:
        from safetensors.torch import save_file

        facts = {"config": asdict(self.config), "settings": self.streams.settings, "step": self.step,
                 "tokens": self.tokens, "seconds": self.seconds, "best": self.best, "log": self.log,
                 "crops": self.crops.position(), "scaler": self.scaler.state_dict()}
        with whole(self.folder / LAST) as part:
            save_file(self._tensors(), part, metadata={"run": json.dumps(facts)})
        with whole(self.folder / LOG) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_FIELDS)
            writer.writeheader()
            writer.writerows(self.log)

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / LAST, "pt") as file:
                facts = json.loads(file.metadata()["run"])
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder / LAST} is damaged: delete {self.folder} and start again") from error
        if facts["settings"].get("id") != self.streams.settings.get("id"):
            raise UserError(f"the token streams are not those that {self.folder} was trained on: "
                            "build them with the same settings, or choose another --out")
        shape = ("d_model", "n_layer", "d_state", "batch", "length", "carry", "seed")
        for name in shape:
            if facts["config"][name] != getattr(self.config, name):
                raise UserError(f"{self.folder} was trained with {name}={facts['config'][name]}, not "
                                f"{getattr(self.config, name)}: resume with the same, or choose another --out")
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.model.load_state_dict(part("model."))
        state: dict[int, dict] = {}
        for name, tensor in part("optimizer.").items():
            number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        layers = part("state.")
        self.state = [tuple(layers[f"{i}.{j}"].to(self.device) for j in range(2)) for i in range(len(self.state))]
        torch.set_rng_state(tensors["rng"])
        self.crops.load(facts["crops"])
        self.scaler.load_state_dict(facts["scaler"])
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]
        self.best, self.log = facts["best"], facts["log"]
        self.say(f"resuming at step {self.step} after {self.seconds / 60:.1f} minutes")

    # -- one step ------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end, by steps or by minutes, whichever is further on."""
        return max(self.step / self.config.steps, self.seconds / 60 / self.config.minutes)

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss in bits per token."""
        self.model.train()
        tokens, jumped = self.crops.next()
        tokens = torch.from_numpy(tokens).to(self.device)
        fresh = torch.from_numpy(jumped).to(self.device)[:, None, None]
        self.state = [tuple(t.detach().float().masked_fill(fresh, 0) for t in layer) for layer in self.state]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.progress, self.config)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits, self.state = self.model(tokens[:, :-1].clamp(min=0), self.state, return_state=True)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        value = loss.item()
        if not math.isfinite(value) or (self.precision is not torch.float16 and not torch.isfinite(norm)):
            raise UserError(f"the loss is no longer a number at step {self.step}: resume from the last checkpoint "
                            "with a smaller --lr")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int((tokens[:, 1:] >= 0).sum())
        return value / math.log(2)

    def validate(self) -> float:
        """Bits per note of the fixed validation pieces; a new best is kept as a checkpoint."""
        bits = bits_per_note(self.model, self.streams, self.held_out, autocast=self.precision)
        if bits < self.best:
            self.best = bits
            mamba.save(self.model, self.folder / "best")
            for name in TOKENIZER_FILES:  # so that `python -m lib.generate --model …/best` plays
                if self.streams.folder and (self.streams.folder / name).exists():
                    shutil.copyfile(self.streams.folder / name, self.folder / "best" / name)
        return bits

    def run(self, progress: bool = True) -> list[dict]:
        """Train to the end of `steps` or `minutes`; returns the rows of the log."""
        from tqdm import tqdm

        recent: list[float] = []
        clock = time.monotonic() - self.seconds
        with tqdm(total=1.0, initial=min(1.0, self.progress), disable=not progress, desc="training",
                  bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
            while self.progress < 1:
                recent = [*recent[-99:], self.train_step()]
                self.seconds = time.monotonic() - clock
                done = self.progress >= 1
                if self.step % self.config.eval_every == 0 or done:
                    bits = self.validate()
                    self.log.append(dict(zip(LOG_FIELDS, (
                        self.step, self.tokens, round(self.seconds / 60, 3),
                        round(self.optimizer.param_groups[0]["lr"], 7), round(float(np.mean(recent)), 4),
                        round(bits, 4)), strict=True)))
                    if progress:
                        tqdm.write(f"step {self.step}: {np.mean(recent):.3f} bits a token, validation "
                                   f"{bits:.2f} bits a note", file=bar.fp)
                if self.step % self.config.save_every == 0 or done:
                    self._save()
                bar.set_postfix_str(f"step {self.step}, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s, "
                                    f"{np.mean(recent):.2f} bits/token, best {self.best:.2f} bits/note")
                bar.update(max(0.0, min(1.0, self.progress) - bar.n))
        return self.log


def main(argv: list[str] | None = None) -> None:
    """Train a Mamba on MAESTRO's token streams."""
    parser = argparse.ArgumentParser(prog="python -m lib.train", description=main.__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument("--out", default=None, help="folder of the run (default: data/runs/PRESET)")
    parser.add_argument("--streams", help="folder of token streams (default: built from what lib.data finds)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    for field in fields(TrainConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=None)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    config = replace(PRESETS[args.preset], **given)
    if args.streams:
        streams = Streams.load(args.streams)
    else:
        from lib.data import performances
        from lib.streams import build

        streams, _ = build(performances(quick=args.preset == "quick"))
    folder = Path(args.out or Path(__file__).resolve().parents[1] / "data" / "runs" / args.preset)
    trainer = Trainer(streams, config, folder, device=args.device, resume=args.resume)
    train = streams.select("train", copies=True)
    print(f"{trainer.model.parameter_count():,} parameters, {sum(p.length for p in train):,} training tokens "
          f"(augmented copies included), on {trainer.device} in {trainer.precision or torch.float32}")
    print(", ".join(f"{k}={v}" for k, v in asdict(config).items()))
    trainer.run()
    print(f"best validation: {trainer.best:.2f} bits a note, kept in {folder.name}/best")


if __name__ == "__main__":
    from lib.errors import cli

    cli(main)
