"""Train a Mamba on token streams: `python -m lib.train --preset NAME`, or with `torchrun`.

The loop is the plain one: AdamW (or Muon), warm-up and cosine, clipped gradients, validation in
bits per note, the best checkpoint kept. A run lives in one folder and goes on where it stopped.

`Trainer` holds what a run is made of and how far it has come. Its `run` and `train_step` are the
loop; the functions behind the class do one thing each.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import mamba
from lib.env.errors import UserError
from lib.env.files import atomic_folder, check_writable, on_disk
from lib.mamba.model import MambaLM, State
from lib.music.streams import Streams
from lib.train import checkpoints, distributed
from lib.train.batches import Batches, content, validation_pieces
from lib.train.bits import piece_bits
from lib.train.checkpoints import LOG_FIELDS
from lib.train.config import FIXED, TrainConfig
from lib.train.distributed import World
from lib.train.optim import choose_precision, learning_rate, optimizers
from lib.train.snapshots import flat, load_optimizer, random_states, restore_random_states, under
from lib.train.warm_start import TOKENIZER_FILES, sizes_of, warm_start

# the tensors that an optimiser keeps for each parameter
KEPT = {"optimizer": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
RECENT = 100  # steps that the training loss in the log is the mean of


class Trainer:
    """One run in one folder: `Trainer(streams, config, folder).run()`.

    The folder holds the last two checkpoints (everything needed to go on), `log.csv` and `best/`,
    the model with the lowest validation bits per note. `init` is a checkpoint folder whose weights
    the run starts from, with a fresh optimiser. `build` makes another model than a Mamba of the
    configured sizes, with the same interface; `save` writes it into a folder.
    """

    def __init__(
        self,
        streams: Streams,
        config: TrainConfig,
        folder: str | Path,
        *,
        device: str | None = None,
        resume: bool = False,
        init: str | Path | None = None,
        build: Callable[[], nn.Module] | None = None,
        save: Callable[[nn.Module, Path], None] = mamba.save,
        say=print,
    ):
        self.streams = streams
        self.config = config
        self.folder = Path(folder)
        self.save_model = save

        # where it runs
        self.world, self.device = distributed.start(device)
        self.say = say if self.world.first else lambda text: None
        self.precision = choose_precision(config.precision, self.device)
        self.rows = own_rows(self.world, config)
        if self.device.type == "cpu":
            prepare_processor(self.say)

        # what is trained
        torch.manual_seed(config.seed)
        self.init = None  # what is known of the weights that it starts from
        if build:
            model = build()
        elif init is None:
            model = MambaLM(sizes_of(streams, config))
        else:
            model, self.init = warm_start(init, streams, config)
        self.model = model.to(self.device)
        self.optimizers = optimizers(self.model, config, self.device)
        if config.recompute:
            self.model.recomputes = True
        self.wrapped = distributed.wrap(self.model, self.world)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        fp16 = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        torch.manual_seed(config.seed + 1 + self.world.rank)  # each process drops out others

        # what it reads
        self.crops = Batches(streams, streams.select("train", copies=config.copies), config)
        self.held_out = validation_pieces(streams, config.eval_tokens)
        self.data = content(streams)

        # how far it has come
        self.state = self.model.new_state(self.rows.stop - self.rows.start)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.best = math.inf
        self.log: list[dict] = []
        self.losses: list[float] = []  # bits per token, one a step
        self.stop_asked = False
        open_folder(self, resume)
        self.seen = checkpoints.stamp(self.folder)

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

    # -- the loop ------------------------------------------------------------------------------

    def run(
        self, progress: bool = True, watch: Callable[["Trainer"], None] | None = None
    ) -> list[dict]:
        """Train to the end; returns the rows of the log. `watch` is called after every step."""
        if self.save_model is mamba.save and not isinstance(self.model, MambaLM):
            kind = type(self.model).__name__
            raise UserError(f"the trainer keeps a MambaLM by itself: give `save` for a {kind}")
        before = time.monotonic()
        lock = checkpoints.alone(self.folder) if self.world.first else nullcontext()
        with lock, progress_bar(self, progress) as bar:
            if self.world.first and checkpoints.stamp(self.folder) != self.seen:
                raise UserError(
                    f"another process has trained on in {self.folder}: start again with --resume"
                )
            while not self.finished:
                self.train_step()
                now = time.monotonic()
                passed = max(0.0, now - before)  # a machine that was asleep may set its clock back
                before = now
                self.seconds, stop = self.world.agree(self.seconds + passed, self.stop_asked)
                if self.step % self.config.eval_every == 0 or self.progress >= 1:
                    self.log.append(log_row(self, self.validate()))
                    if progress and self.world.first:
                        bar.write(last_row_said(self), file=sys.stderr)
                if self.step % self.config.save_every == 0 or self.finished or stop:
                    self.save()
                if watch:
                    watch(self)
                bar.set_postfix_str(standing(self), refresh=False)
                bar.update(max(0.0, min(1.0, self.progress) - bar.n))
                if stop:
                    break
            self.world.wait()  # until the first has written
        return self.log

    def train_step(self) -> float:
        """One optimiser step; returns the mean loss in bits per token."""
        self.model.train()
        tokens, jumped = self.crops.next()
        count = int((tokens[:, 1:] >= 0).sum())  # of all processes
        tokens = torch.from_numpy(tokens[self.rows]).to(self.device)
        jumped = torch.from_numpy(jumped[self.rows]).to(self.device)

        self.state = emptied(self.state, jumped)
        rate = learning_rate(self.progress, self.config)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        nats = self._backward(tokens, count)
        self._update(nats)

        self.step += 1
        self.tokens += count
        self.losses.append(nats / math.log(2))
        return self.losses[-1]

    def _backward(self, tokens: Tensor, count: int) -> float:
        """The gradients of the mean loss over `count` tokens, and that mean in nats."""
        parts = tokens.chunk(self.config.accumulate)
        states = in_parts(self.state, len(parts))
        total = 0.0
        for i, part in enumerate(parts):
            last = i == len(parts) - 1 or self.world.size == 1
            with nullcontext() if last else self.wrapped.no_sync():  # processes talk once a step
                loss, states[i] = self._loss(part, states[i], count)
                self.scaler.scale(loss).backward()
            total += loss.item() / self.world.size
        self.state = joined(states)
        return self.world.total(total)[0]

    def _loss(self, tokens: Tensor, state: State, count: int) -> tuple[Tensor, State]:
        """A part's share of the mean over all `count` tokens of the batch, and the state after."""
        inputs = tokens[:, :-1].clamp(min=0)
        targets = tokens[:, 1:]  # -1 behind a piece's end
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            # rivals keep torch's cross entropy: by it the runs that are recorded were trained
            if isinstance(self.model, MambaLM):
                loss, state = self.forward(inputs, state, return_state=True, targets=targets)
            else:
                logits, state = self.forward(inputs, state, return_state=True)
                loss = F.cross_entropy(
                    logits.float().flatten(0, 1),
                    targets.flatten(),
                    ignore_index=-1,
                    reduction="sum",
                )
        return loss / (count / self.world.size), state  # times the size, for gradients are averaged

    def _update(self, nats: float) -> None:
        """Clip the gradients, take a step. Raises `UserError` where one is no longer a number."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        fits = bool(torch.isfinite(norm))
        if not math.isfinite(nats) or not (fits or self.precision is torch.float16):
            raise self._no_number("the loss")
        for optimizer in self.optimizers.values():
            if fits:  # a step that overflows in float16 is skipped by all, and the scale comes down
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def _no_number(self, what: str) -> UserError:
        return UserError(
            f"{what} is no longer a number at step {self.step}: resume from the "
            "last checkpoint with a smaller --lr"
        )

    # -- validation ----------------------------------------------------------------------------

    def validate(self) -> float:
        """Bits per note of the fixed validation pieces; a new best is kept as a checkpoint."""
        bits = self.evaluate()
        if not math.isfinite(bits):
            raise self._no_number("the validation")
        if bits < self.best:
            self.best = bits
            if self.world.first:
                keep_best(self)
        return bits

    def evaluate(self) -> float:
        """Bits per note of the fixed validation pieces, which the processes share."""
        mine = self.held_out[self.world.rank :: self.world.size]
        bits = 0.0
        if mine:
            bits = piece_bits(self.model, self.streams, mine, autocast=self.precision).sum()
        return self.world.total(bits)[0] / sum(p.notes for p in self.held_out)

    # -- going on after an interruption --------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, Tensor], dict]:
        """All that the next step depends on: tensors on the CPU, and facts as JSON has them.

        What each process has of its own is gathered. Nothing is shared with the run, so that
        `restore` can come back here later.
        """
        gather = self.world.gather
        tensors = flat("model", self.model.state_dict())
        for name, optimizer in self.optimizers.items():
            tensors |= flat(name, optimizer.state_dict()["state"])
        for i, layer in enumerate(self.state):
            whole_layer = [torch.cat(gather(part)) for part in layer]
            tensors |= flat(f"state.{i}", dict(enumerate(whole_layer)))
        for name, random in random_states(self.device).items():
            tensors |= flat(name, dict(enumerate(gather(random))))
        facts = {
            "config": asdict(self.config),
            "settings": self.streams.settings,
            "data": self.data,
            "init": self.init,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "log": self.log,
            "recent": self.losses[-RECENT:],
            "crops": self.crops.position(),
            "scaler": self.scaler.state_dict(),
        }
        copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        return copies, json.loads(json.dumps(facts))

    def restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Be where the run was when `snapshot` gave these."""
        self.model.load_state_dict(under("model", tensors))
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, under(name, tensors))
        kept = under("state", tensors)
        ours = lambda name: kept[name][self.rows].to(self.device)
        self.state = [(ours(f"{i}.0"), ours(f"{i}.1")) for i in range(len(self.state))]
        restore_random_states(tensors, self.world.rank, self.device)
        self.crops.load(facts["crops"])
        scaler = self.scaler.state_dict()
        if facts["scaler"].keys() == scaler.keys():  # else of a run in another precision
            self.scaler.load_state_dict(facts["scaler"])
        self.step = facts["step"]
        self.tokens = facts["tokens"]
        self.seconds = facts["seconds"]
        self.best = facts["best"]
        self.log = list(facts["log"])
        self.losses = list(facts.get("recent", []))
        self.init = facts.get("init")

    def save(self) -> None:
        """Write a checkpoint. Raises `UserError` where a weight is no longer a number."""
        tensors, facts = self.snapshot()
        weights = under("model", tensors).values()
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise self._no_number("a weight")
        if self.world.first:
            checkpoints.write(self.folder, tensors, facts)
            self.seen = checkpoints.stamp(self.folder)


# ---- where it runs ---------------------------------------------------------------------------


def own_rows(world: World, config: TrainConfig) -> slice:
    """Our rows of the global batch. Raises `UserError` where they cannot be read in equal parts."""
    rows = world.mine(config.batch)
    count = rows.stop - rows.start
    if count % config.accumulate:
        raise UserError(
            f"{count} rows a process cannot be read in {config.accumulate} equal "
            "parts: change --accumulate or --batch"
        )
    return rows


def prepare_processor(say: Callable[[str], None]) -> None:
    """Build the fused scan before the first step, and keep the memory that a step lets go.

    Numbers below 1e-38 count as zero from here on:
    a processor is slower with them, and sharp attention is full of them.
    """
    from lib.scan import cpu as scan_cpu

    scan_cpu.build(say)
    scan_cpu.keep_memory()
    torch.set_flush_denormal(True)


# ---- the state of the rows -------------------------------------------------------------------


def emptied(state: State, rows: Tensor) -> State:
    """The state, float32, without its history; zeros in the rows (B,) that are marked."""
    return [
        tuple(t.detach().float().masked_fill(rows[:, None, None], 0) for t in layer)
        for layer in state
    ]


def in_parts(state: State, count: int) -> list[State]:
    """The state of B rows as `count` states of B / count rows."""
    return [[tuple(t.chunk(count)[i] for t in layer) for layer in state] for i in range(count)]


def joined(states: list[State]) -> State:
    """What `in_parts` took apart."""
    if len(states) == 1:
        return states[0]
    return [tuple(torch.cat(parts) for parts in zip(*layers)) for layers in zip(*states)]


# ---- what is said ----------------------------------------------------------------------------


def progress_bar(run: Trainer, shown: bool):
    """A bar from 0 to 1; where nobody looks at a terminal, a line a minute."""
    from tqdm import tqdm

    return tqdm(
        total=1.0,
        initial=min(1.0, run.progress),
        disable=not (shown and run.world.first),
        desc="training",
        mininterval=0.1 if sys.stderr.isatty() else 60,
        bar_format="{desc} {percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}",
    )


def recent_loss(run: Trainer) -> float:
    """The mean training loss of the last steps, in bits per token."""
    return float(np.mean(run.losses[-RECENT:]))


def standing(run: Trainer) -> str:
    """What the bar says beside the time."""
    speed = run.tokens / max(run.seconds, 1e-9)  # a coarse clock may not have moved yet
    return (
        f"step {run.step}, {speed:,.0f} tokens/s, {recent_loss(run):.2f} bits/token, "
        f"best {run.best:.2f} bits/note"
    )


def log_row(run: Trainer, bits: float) -> dict:
    """A row of the log for a validation that found so many bits per note."""
    rate = run.optimizers["optimizer"].param_groups[0]["lr"]
    values = (
        run.step,
        run.tokens,
        round(run.seconds / 60, 3),
        round(rate, 7),
        round(recent_loss(run), 6),
        round(bits, 6),
    )
    return dict(zip(LOG_FIELDS, values, strict=True))


def last_row_said(run: Trainer) -> str:
    """The log's last row as a sentence."""
    row = run.log[-1]
    return (
        f"step {row['step']}: {row['train_bits_per_token']:.3f} bits a token, "
        f"validation {row['validation_bits_per_note']:.2f} bits a note"
    )


# ---- its folder ------------------------------------------------------------------------------


def open_folder(run: Trainer, resume: bool) -> None:
    """Go on where the folder's run stopped. Raises `UserError` where nobody asked for that."""
    check_folder(run.folder, resume)
    if not checkpoints.exists(run.folder):
        if resume:
            run.say(f"nothing to resume in {run.folder.name} yet: starting at the beginning")
        return
    tensors, facts = checkpoints.read(run.folder, run.say, partial(look_at, run))
    check_same_run(run, facts)
    check_tensors_fit(run, tensors)
    run.restore(tensors, facts)
    run.say(f"resuming at step {run.step} after {run.seconds / 60:.1f} minutes")


def check_folder(folder: Path, resume: bool) -> None:
    """Raise `UserError` where the folder cannot take this run; asked before long work too."""
    if checkpoints.exists(folder) and not resume:
        raise UserError(
            f"{folder} holds a run already: add --resume to go on, or choose another --out"
        )
    check_writable(folder / checkpoints.LAST)


def look_at(run: Trainer, facts: dict, size: int) -> None:
    """Raise `UserError` for a checkpoint too large to be this run's.

    That is before its tensors are read.
    """
    weights = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    try:
        checkpoints.check_size(run.folder, size, weights, run.config.batch)
    except UserError:
        check_same_run(run, facts)  # which may know why
        raise


def check_same_run(run: Trainer, facts: dict) -> None:
    """Raise `UserError` where a checkpoint is of other data or of other choices than this run's."""
    same_settings = facts["settings"].get("id") == run.streams.settings.get("id")
    if not same_settings or facts.get("data", run.data) != run.data:
        raise UserError(
            f"the token streams are not those that {run.folder} was trained on: "
            "build them with the same settings, or choose another --out"
        )
    began = (facts.get("init") or {}).get("weights")  # older runs do not say
    given = (run.init or {}).get("weights")
    if began and given and began != given:
        raise UserError(
            f"{run.folder} began with other weights, those of {facts['init'].get('folder')}: "
            "name them with --init, or choose another --out"
        )
    known = asdict(TrainConfig()) | facts["config"]  # older runs lack newer fields
    for name in FIXED:
        wanted = getattr(run.config, name)
        if known[name] != wanted:
            raise UserError(
                f"{run.folder} was trained with {name}={known[name]}, not {wanted}: "
                "resume with the same, or choose another --out"
            )


def check_tensors_fit(run: Trainer, tensors: dict[str, Tensor]) -> None:
    """Raise `UserError` where a checkpoint's tensors do not fit this run's model and optimisers."""
    wanted = {f"model.{name}": tensor.shape for name, tensor in run.model.state_dict().items()}
    for i, layer in enumerate(run.state):
        for j, part in enumerate(layer):
            wanted[f"state.{i}.{j}"] = (run.config.batch, *part.shape[1:])
    for kind, optimizer in run.optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            for name in KEPT[kind]:
                wanted[f"{kind}.{i}.{name}"] = () if name == "step" else parameter.shape
    for name, shape in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != torch.Size(shape) or not tensor.is_floating_point():
            found = (
                "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
            raise UserError(
                f"the checkpoint in {run.folder} is not one of this run ({name} should be "
                f"floats of shape {tuple(shape)}, it is {found}): choose another --out"
            )
    ours = tuple(f"{name}." for name in ("model", "state", *run.optimizers))
    extra = [name for name in tensors if name.startswith(ours) and name not in wanted]
    if extra:
        raise UserError(
            f"the checkpoint in {run.folder} is not one of this run (it holds "
            f"{extra[0][:80]}): choose another --out"
        )


def keep_best(run: Trainer) -> None:
    """Keep the model with its tokenizer, so that `python -m lib.generate --model` can play it."""
    best = run.folder / "best"
    with atomic_folder(best) as part:
        run.save_model(run.model, part)
        for name in TOKENIZER_FILES:
            if run.streams.folder and (run.streams.folder / name).exists():
                (part / name).write_bytes((run.streams.folder / name).read_bytes())
                on_disk(part / name)
