"""Kernels as operators of PyTorch: what all of them have in common.

An operator is a kernel, a `fake` that says the shapes of its results without running it, and a
gradient. So torch.compile and torch.export see one node where the kernel runs, and torch.func can
differentiate it. Under autocast an operator reads what it is given, as it is given: the functions
around it choose the dtypes, and sums are float32 in any case.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lib.env.errors import UserError

NAMESPACE = "state_space_music"  # torch.ops.state_space_music has them all


def operator(name: str, schema: str, kernel: Callable, fake: Callable, device: str = "cpu"):
    """Register a kernel for tensors on a device ("default": on any) and return the operator.

    `schema` has torch's form, "(Tensor x, Tensor? D) -> (Tensor, Tensor)". Results never share
    memory with arguments. vmap calls the operator once a row.
    """
    # not `custom_op`: it imports torch's compiler, which takes seconds, at the first call
    full_name = f"{NAMESPACE}::{name}"
    torch.library.define(full_name, schema)
    torch.library.impl(full_name, device, kernel)
    torch.library.register_fake(full_name, fake)
    found = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(full_name, _one_after_another(found))
    return found


def _one_after_another(found):
    """A rule of vmap: the operator once a row, and the results side by side."""

    def rule(info, in_dims, *arguments):
        rows = []
        for i in range(info.batch_size):
            row = [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims)]
            results = found(*row)
            rows.append((results,) if isinstance(results, Tensor) else results)
        stacked = tuple(torch.stack(parts) for parts in zip(*rows))
        return (stacked[0], 0) if len(stacked) == 1 else (stacked, (0,) * len(stacked))

    return rule


def differentiable(forward, backward, keep: Callable, gradients: Callable, what: str, instead: str) -> None:
    """Give an operator its gradient, which runs the operator `backward`, and refuse a second one in a sentence.

    `keep(ctx, inputs, output)` saves what `gradients(ctx, *gradients of the results)` needs.
    """

    def refuse(ctx, *gradients):
        raise UserError(f"{what} has a first derivative and no second: {instead}")

    torch.library.register_autograd(forward, gradients, setup_context=keep)
    torch.library.register_autograd(backward, refuse)


def wants_gradient(*arguments) -> bool:
    """Whether a backward pass may come, so that what it needs must be kept."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def constant(function: Callable) -> None:
    """Let torch.compile ask this function of no arguments once, and not look into it."""
    # torch.compiler.assume_constant_result does the same, and imports the compiler for it: seconds
    function._dynamo_marked_constant = True
