"""Train a Mamba on token streams: `python -m lib.train --preset NAME`, or with `torchrun` on many GPUs.

The loop is the plain one: AdamW (or Muon), warm-up and cosine, clipped gradients, validation in bits per
note, the best checkpoint kept. A run lives in one folder and goes on where it stopped.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import on_disk
from lib.mamba.model import MambaConfig, MambaLM
from lib.music.streams import Streams
from lib.train import checkpoints, distributed
from lib.train.batches import Crops, content, validation_pieces
from lib.train.bits import piece_bits
from lib.train.checkpoints import LAST, LOG, LOG_FIELDS
from lib.train.config import FIXED, PRESETS, TrainConfig
from lib.train.optim import choose_precision, learning_rate, optimizers, parameter_groups, recompute

__all__ = ["LAST", "LOG", "PRESETS", "Crops", "TrainConfig", "Trainer", "choose_precision", "learning_rate",
           "parameter_groups", "validation_pieces"]

TOKENIZER_FILES = ("tokenizer.json", "tokens.json")
KEPT = {"optimizer": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}  # tensors a parameter
RECENT = 100  # steps that the training loss in the log is the mean of


class Trainer:
    """One run in one folder: `Trainer(streams, config, folder).run()`.

    The folder holds the last two checkpoints (everything needed to go on), `log.csv` and `best/`,
    the model with the lowest validation bits per note. `init` is a checkpoint folder whose weights
    the run starts from, with a fresh optimiser. `build` makes another model than a Mamba of the
    configured sizes, with the same interface; `save` writes it into a folder.
    """

    def __init__(self, streams: Streams, config: TrainConfig, folder: str | Path, *, device: str | None = None,
                 resume: bool = False, init: str | Path | None = None, build: Callable[[], nn.Module] | None = None,
                 save: Callable[[nn.Module, Path], None] = mamba.save, say=print):
        self.world, self.device = distributed.start(device)
        self.streams, self.config, self.folder = streams, config, Path(folder)
        self.say = say if self.world.first else lambda text: None
        self.save_model = save
        self.precision = choose_precision(config.precision, self.device)
        self.rows = self.world.mine(config.batch)  # ours of the global batch
        if (self.rows.stop - self.rows.start) % config.accumulate:
            raise UserError(f"{self.rows.stop - self.rows.start} rows a process cannot be read in {config.accumulate} "
                            "equal parts: change --accumulate or --batch")
        if self.device.type == "cpu":
            from lib.scan import cpu as scan_cpu

            scan_cpu.build(self.say)
            scan_cpu.keep_memory()
        torch.manual_seed(config.seed)
        self.model, self.init = (build().to(self.device), None) if build else self._build(init)
        self.optimizers = optimizers(self.model, config, self.device)
        if config.recompute:
            recompute(self.model)
        self.wrapped = distributed.wrap(self.model, self.world)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        torch.manual_seed(config.seed + 1 + self.world.rank)  # each process drops out others
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.crops = Crops(streams, streams.select("train", copies=config.copies), config)
        self.held_out = validation_pieces(streams, config.eval_tokens)
        self.data = content(streams)
        self.state = self.model.new_state(self.rows.stop - self.rows.start)
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, math.inf
        self.log, self.losses, self.stop_asked = [], [], False
        if checkpoints.exists(self.folder) and not resume:
            raise UserError(f"{self.folder} holds a run already: add --resume to go on, or choose another --out")
        if resume and checkpoints.exists(self.folder):
            self._load()
        elif resume:
            self.say(f"nothing to resume in {self.folder.name} yet: starting at the beginning")
        self.seen = checkpoints.stamp(self.folder)

    def _build(self, init: str | Path | None) -> tuple[MambaLM, dict | None]:
        """A fresh model, or one with the weights in the folder `init`, deepened, and what is known of them."""
        sizes = {"vocab_size": self.streams.vocab_size, "d_model": self.config.d_model,
                 "n_layer": self.config.n_layer, "d_state": self.config.d_state}
        if init is None:
            return MambaLM(MambaConfig(dropout=self.config.dropout, **sizes)).to(self.device), None
        model = mamba.load(init)
        before = checkpoints.history(Path(init)) | {"n_layer": model.config.n_layer}
        for name, size in sizes.items():
            has = getattr(model.config, name)
            if has != size and not (name == "n_layer" and has < size):
                raise UserError(f"the weights in {init} have {name}={has}, the run {name}={size}: start from a "
                                "checkpoint of the same sizes and tokens, or of fewer layers")
        model = mamba.deepen(model, self.config.n_layer)
        for name in TOKENIZER_FILES:
            ours, theirs = (Path(folder) / name for folder in (self.streams.folder or ".", init))
            if ours.exists() and theirs.exists() and ours.read_bytes() != theirs.read_bytes():
                raise UserError(f"the weights in {init} speak other tokens than these streams ({name} differs): "
                                "build the streams with that tokenizer's settings")
        for layer in model.backbone.layers:
            layer.dropout.p = self.config.dropout
        return model.to(self.device), before

    # -- going on after an interruption --------------------------------------------------------
    def _tensors(self) -> dict[str, Tensor]:
        """All numbers that the next step depends on; what each process has of its own, gathered."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in values.items()}
        for i, layer in enumerate(self.state):
            tensors |= {f"state.{i}.{j}": torch.cat(self.world.gather(t)) for j, t in enumerate(layer)}
        random = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        for name, state in random.items():
            tensors |= {f"{name}.{rank}": t for rank, t in enumerate(self.world.gather(state))}
        return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}

    def _facts(self) -> dict:
        """The rest of it, as JSON."""
        return json.loads(json.dumps({
            "config": asdict(self.config), "settings": self.streams.settings, "data": self.data, "init": self.init,
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "best": self.best, "log": self.log,
            "recent": self.losses[-RECENT:], "crops": self.crops.position(), "scaler": self.scaler.state_dict()}))

    def _save(self) -> None:
        tensors = self._tensors()
        if not all(torch.isfinite(t).all() for name, t in tensors.items() if name.startswith("model.")):
            raise UserError(f"a weight is no longer a number at step {self.step}: resume from the last checkpoint "
                            "with a smaller --lr")
        if self.world.first:
            checkpoints.write(self.folder, tensors, self._facts())
            self.seen = checkpoints.stamp(self.folder)

    def _load(self) -> None:
        tensors, facts = checkpoints.read(self.folder, self.say)
        same = facts["settings"].get("id") == self.streams.settings.get("id")
        if not same or facts.get("data", self.data) != self.data:
            raise UserError(f"the token streams are not those that {self.folder} was trained on: "
                            "build them with the same settings, or choose another --out")
        known = asdict(TrainConfig()) | facts["config"]  # older runs lack newer fields
        for name in FIXED:
            if known[name] != getattr(self.config, name):
                raise UserError(f"{self.folder} was trained with {name}={known[name]}, not "
                                f"{getattr(self.config, name)}: resume with the same, or choose another --out")
        self._check(tensors)
        self._restore(tensors, facts)
        self.say(f"resuming at step {self.step} after {self.seconds / 60:.1f} minutes")

    def _check(self, tensors: dict[str, Tensor]) -> None:
        """Raise `UserError` where a checkpoint's tensors are not those of this run."""
        wanted = {f"model.{name}": tensor.shape for name, tensor in self.model.state_dict().items()}
        for i, layer in enumerate(self.state):
            wanted |= {f"state.{i}.{j}": (self.config.batch, *t.shape[1:]) for j, t in enumerate(layer)}
        for kind, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, parameter in enumerate(parameters):
                wanted |= {f"{kind}.{i}.{name}": () if name == "step" else parameter.shape for name in KEPT[kind]}
        ours = tuple(f"{name}." for name in ("model", "state", *self.optimizers))
        if extra := [name for name in tensors if name.startswith(ours) and name not in wanted]:
            raise UserError(f"the checkpoint in {self.folder} is not one of this run (it holds {extra[0][:80]}): "
                            "choose another --out")
        for name, shape in wanted.items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != torch.Size(shape) or not tensor.is_floating_point():
                found = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise UserError(f"the checkpoint in {self.folder} is not one of this run ({name} should be floats of "
                                f"shape {tuple(shape)}, it is {found}): choose another --out")

    def _restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Be where the run was when these were taken."""
        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        for kind, optimizer in self.optimizers.items():
            state: dict[int, dict] = {}
            for name, tensor in part(f"{kind}.").items():
                number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor.clone()
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        layers = part("state.")
        self.state = [tuple(layers[f"{i}.{j}"][self.rows].to(self.device) for j in range(2))
                      for i in range(len(self.state))]
        mine = tensors.get(f"rng.{self.world.rank}", tensors.get("rng"))  # none of our own: more processes than before
        if mine is not None:
            try:
                torch.set_rng_state(mine)
            except (RuntimeError, TypeError) as error:
                raise UserError(f"the checkpoint in {self.folder} is damaged (rng is no state of torch's dice): "
                                "delete that folder and start again") from error
        if self.device.type == "cuda" and f"rng_cuda.{self.world.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng_cuda.{self.world.rank}"], self.device)
        self.crops.load(facts["crops"])
        if facts["scaler"].keys() == self.scaler.state_dict().keys():  # else of a run in another precision
            self.scaler.load_state_dict(facts["scaler"])
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]
        self.best, self.log, self.losses = facts["best"], facts["log"], list(facts.get("recent", []))
        self.init = facts.get("init")

    # -- one step ------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end, by steps or by minutes, whichever is further on."""
        return max(self.step / self.config.steps, self.seconds / 60 / self.config.minutes)

    @property
    def finished(self) -> bool:
        """At the end, or `patience` validations have brought no new best."""
        bits = [row["validation_bits_per_note"] for row in self.log]
        waited = len(bits) - 1 - int(np.argmin(bits)) if bits else 0
        return self.progress >= 1 or 0 < self.config.patience <= waited

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss in bits per token."""
        self.model.train()
        tokens, jumped = self.crops.next()
        count = int((tokens[:, 1:] >= 0).sum())  # of all processes
        tokens, fresh = (torch.from_numpy(a[self.rows]).to(self.device) for a in (tokens, jumped))
        self.state = [tuple(t.detach().float().masked_fill(fresh[:, None, None], 0) for t in layer)
                      for layer in self.state]
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.progress, self.config)
        parts, total = self.config.accumulate, 0.0
        states = [[tuple(t.chunk(parts)[i] for t in layer) for layer in self.state] for i in range(parts)]
        for i, part in enumerate(tokens.chunk(parts)):
            last = i == parts - 1 or self.world.size == 1
            with nullcontext() if last else self.wrapped.no_sync():  # processes talk once a step
                loss, states[i] = self._loss(part, states[i], count)
                self.scaler.scale(loss).backward()
            total += loss.item() / self.world.size
        self.state = [tuple(torch.cat(t) if parts > 1 else t[0] for t in zip(*layer)) for layer in zip(*states)]
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        value = self.world.total(total)[0]
        if not math.isfinite(value) or (self.precision is not torch.float16 and not torch.isfinite(norm)):
            raise UserError(f"the loss is no longer a number at step {self.step}: resume from the last checkpoint "
                            "with a smaller --lr")
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step += 1
        self.tokens += count
        self.losses.append(value / math.log(2))
        return self.losses[-1]

    def _loss(self, tokens: Tensor, state: mamba.State, count: int) -> tuple[Tensor, mamba.State]:
        """This part's share of the mean over the whole batch's `count` tokens, and the state after it."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            if isinstance(self.model, MambaLM):
                loss, state = self.forward(tokens[:, :-1].clamp(min=0), state, return_state=True, targets=tokens[:, 1:])
            else:
                logits, state = self.forward(tokens[:, :-1].clamp(min=0), state, return_state=True)
                loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1,
                                       reduction="sum")
        return loss / (count / self.world.size), state  # times the size, for gradients are averaged

    def validate(self) -> float:
        """Bits per note of the fixed validation pieces; a new best is kept as a checkpoint."""
        mine = self.held_out[self.world.rank :: self.world.size]
        bits = piece_bits(self.model, self.streams, mine, autocast=self.precision).sum() if mine else 0.0
        bits = self.world.total(bits)[0] / sum(p.notes for p in self.held_out)
        if bits < self.best:
            self.best = bits
            if self.world.first:
                self._keep_best()
        return bits

    def _keep_best(self) -> None:
        best = self.folder / "best"
        with checkpoints.whole_folder(best) as part, checkpoints.writing(best):
            self.save_model(self.model, part)
            for name in TOKENIZER_FILES:  # so that `python -m lib.generate --model …/best` plays
                if self.streams.folder and (self.streams.folder / name).exists():
                    (part / name).write_bytes((self.streams.folder / name).read_bytes())
                    on_disk(part / name)

    # -- the run -------------------------------------------------------------------------------
    def run(self, progress: bool = True, watch: Callable[["Trainer"], None] | None = None) -> list[dict]:
        """Train to the end; returns the rows of the log. `watch` is called after every step."""
        from tqdm import tqdm

        before = time.monotonic()
        bar = tqdm(total=1.0, initial=min(1.0, self.progress), disable=not (progress and self.world.first),
                   desc="training", mininterval=0.1 if sys.stderr.isatty() else 60,  # in a file, a line a minute
                   bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}")
        with checkpoints.alone(self.folder) if self.world.first else nullcontext(), bar:
            if self.world.first and checkpoints.stamp(self.folder) != self.seen:
                raise UserError(f"another process has trained on in {self.folder}: start again with --resume")
            while not self.finished:
                self.train_step()
                now = time.monotonic()
                passed = max(0.0, now - before)  # a machine that was moved or asleep may set its clock back
                self.seconds, stop = self.world.agree(self.seconds + passed, self.stop_asked)
                before = now
                if self.step % self.config.eval_every == 0 or self.progress >= 1:
                    self._validate_and_log(tqdm.write if progress else None)
                if self.step % self.config.save_every == 0 or self.finished or stop:
                    self._save()
                if watch:
                    watch(self)
                speed = self.tokens / max(self.seconds, 1e-9)  # a coarse clock may not have moved yet
                bar.set_postfix_str(refresh=False, s=f"step {self.step}, {speed:,.0f} tokens/s, "
                                    f"{np.mean(self.losses[-RECENT:]):.2f} bits/token, best {self.best:.2f} bits/note")
                bar.update(max(0.0, min(1.0, self.progress) - bar.n))
                if stop:
                    break
            self.world.wait()  # until the first has written
        return self.log

    def _validate_and_log(self, write) -> None:
        bits, recent = self.validate(), float(np.mean(self.losses[-RECENT:]))
        rate = self.optimizers["optimizer"].param_groups[0]["lr"]
        self.log.append(dict(zip(LOG_FIELDS, (self.step, self.tokens, round(self.seconds / 60, 3), round(rate, 7),
                                              round(recent, 6), round(bits, 6)), strict=True)))
        if write and self.world.first:
            write(f"step {self.step}: {recent:.3f} bits a token, validation {bits:.2f} bits a note", file=sys.stderr)
