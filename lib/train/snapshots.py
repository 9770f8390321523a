"""The tensors of a snapshot by name: model, optimisers and random states, taken and put back."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from lib.env.errors import UserError


def flat(name: str, tree: dict | Tensor | float) -> dict[str, Tensor]:
    """Tensors in dictionaries of dictionaries, each named by its path: `name.key.key`."""
    if not isinstance(tree, dict):
        return {name: torch.as_tensor(tree)}
    named = {}
    for key, branch in tree.items():
        named |= flat(f"{name}.{key}", branch)
    return named


def under(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a name, by the rest of their paths."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def load_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give back what it knew of each parameter, `number.key`; its settings stay this run's."""
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's random generators that a run draws from, of this process."""
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Put back those of process `rank`, where it had some: there may be more than before."""
    own = tensors.get(f"rng.{rank}", tensors.get("rng"))  # "rng": the course's first version
    if own is not None:
        try:
            torch.set_rng_state(own)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                "the checkpoint is damaged (rng is no state of torch's random generator): "
                "delete its folder and start again"
            ) from error
    own = tensors.get(f"rng_cuda.{rank}")
    if own is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own, device)
