"""Several processes, one model: what `torchrun` needs, and nothing where there is one process.

Every process draws the same global batch and takes its own rows of it. Gradients are averaged by
PyTorch's DistributedDataParallel. So the number of processes changes the speed, not the run.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lib.env.errors import UserError


@dataclass(frozen=True)
class World:
    """Who we are among the processes of this run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def mine(self, rows: int) -> slice:
        """Our rows of the global batch. Raises `UserError` where they cannot be shared out."""
        if rows % self.size:
            raise UserError(
                f"a batch of {rows} rows cannot be shared by {self.size} processes: "
                "give --batch a multiple of that"
            )
        share = rows // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes (in float64)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, *values: float) -> list[float]:
        """The first process's values: clocks differ, decisions must not."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.broadcast(tensor, 0)
        return tensor.tolist()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's tensor of one shape, in the order of the ranks, on the CPU."""
        if self.size == 1:
            return [tensor.detach().cpu()]
        tensor = tensor.detach().to(_device()).contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor)
        return [part.cpu() for part in parts]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def _device() -> torch.device:
    """Where collectives take their tensors: NCCL wants them on the GPU."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


def start(device: str | None = None) -> tuple[World, torch.device]:
    """(world, device) of this process: torchrun's environment, or a world of one."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    choices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    try:
        kind = torch.device(wanted)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in choices:
        raise UserError(f"training does not run on {wanted!r} here: choose {' or '.join(choices)}")
    if not os.environ.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}:
        return World(), kind  # torchrun sets them all
    if not dist.is_available():
        raise UserError(
            "this PyTorch was built without distributed training: run it without torchrun"
        )
    if kind.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} finds no GPU of its own: there are {torch.cuda.device_count()}, "
                "give torchrun that many processes, or --device cpu"
            )
        kind = torch.device("cuda", local)
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size()), kind


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The model with its gradients averaged over all processes after each backward pass."""
    if world.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def explain_lost_process(world: World):
    """Say in a sentence that another process has died; gloo and NCCL raise errors of their own."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not any(
            word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")
        ):
            raise
        raise UserError(
            "another process of this run has ended, see what it said above: start all of them "
            "again with --resume, and the run goes on from its last checkpoint"
        ) from error


def stop() -> None:
    """Take leave of the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
