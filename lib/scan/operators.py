"""Kernels as operators of PyTorch: what all of them have in common.

An operator is a kernel, a `fake` that says the shapes of its results without running it, and a
gradient. So torch.compile and torch.export see one node where the kernel runs, and torch.func can
differentiate it. Under autocast an operator reads what it is given, as it is given: the functions
around it choose the dtypes, and sums are float32 in any case.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lib.env.errors import UserError

NAMESPACE = "state_space_music"  # torch.ops.state_space_music has them all


def operator(name: str, schema: str, kernel: Callable, fake: Callable):
    """Register a kernel and return the operator.

    The kernel checks what it is given, the device too. `schema` has torch's form,
    "(Tensor x, Tensor? D) -> (Tensor, Tensor)". Results never share memory with arguments.
    vmap calls the operator once a row.
    """
    # not `custom_op`: it imports torch's compiler, which takes seconds, at the first call
    full_name = f"{NAMESPACE}::{name}"
    torch.library.define(full_name, schema)
    # on every device, as the kernel refuses others in a line: torch would do so in a page
    torch.library.impl(full_name, "default", kernel)
    torch.library.register_fake(full_name, _on_one_device(name, fake))
    found = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(full_name, one_after_another(found))
    return found


def _on_one_device(name: str, fake: Callable) -> Callable:
    """The fake, for tensors that are all on one device.

    Where one of them is on `meta`, torch calls the fake in place of the kernel, and its empty
    results would pass for numbers beside tensors that have some. A compiler's own fakes name
    their true devices.
    """

    def checked(*arguments):
        devices = {a.device for a in arguments if isinstance(a, Tensor)}
        if len(devices) > 1:
            found = " and ".join(sorted(map(str, devices)))
            raise UserError(f"{name} needs all tensors on one device: they are on {found}")
        return fake(*arguments)

    return checked


def one_after_another(call: Callable) -> Callable:
    """A rule of vmap: the call once a row, and the results side by side."""

    def rule(info, in_dims, *arguments):
        rows = []
        for i in range(info.batch_size):
            row = [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims)]
            results = call(*row)
            rows.append((results,) if isinstance(results, Tensor) else results)
        stacked = tuple(torch.stack(parts) for parts in zip(*rows))
        return (stacked[0], 0) if len(stacked) == 1 else (stacked, (0,) * len(stacked))

    return rule


def differentiable(
    forward, backward, keep: Callable, gradients: Callable, what: str, instead: str
) -> tuple[Callable, Callable]:
    """Give an operator its gradient, which runs the operator `backward`.

    A second gradient is refused in a sentence, and so is a derivative in forward mode.

    `keep(ctx, inputs, output)` saves what `gradients(ctx, *gradients of the results)` needs.
    Returns the two as functions to call: `gradients` has to call the second of them.
    """

    def refuse(ctx, *_):
        raise UserError(f"{what} has a first derivative and no second: {instead}")

    def keep_nothing(ctx, inputs, output):
        pass

    def refuse_forward_mode(ctx, *_):
        raise UserError(f"{what} has no derivative in forward mode: {instead}")

    torch.library.register_autograd(forward, gradients, setup_context=keep)
    torch.library.register_autograd(backward, refuse)
    return (
        _function(forward, keep, gradients, refuse_forward_mode),
        _function(backward, keep_nothing, refuse, refuse_forward_mode),
    )


def _function(call, keep: Callable, gradients: Callable, tangents: Callable) -> Callable:
    """An operator with its gradient as an autograd.Function, which torch.func knows.

    A compiler gets the operator itself.
    """
    members = {
        "forward": lambda *arguments: call(*arguments),
        "setup_context": keep,
        "backward": gradients,
        "jvp": tangents,
        "vmap": lambda *arguments: one_after_another(function.apply)(*arguments),
    }
    # not a class statement: a profile shows its name, which is the operator's
    name = call._schema.name.split("::")[1]
    members = {member: staticmethod(method) for member, method in members.items()}
    function = type(name, (torch.autograd.Function,), members)

    def run(*arguments):
        # untracked, the Function is only its own cost, which generation pays at every token
        tracked = torch.is_grad_enabled() or is_transformed()
        plain = torch.compiler.is_compiling() or not tracked
        return call(*arguments) if plain else function.apply(*arguments)

    return run


def is_transformed() -> bool:
    """Whether this runs under torch.func or in forward mode.

    There a tensor does not say whether somebody outside wants its derivative,
    and a bare operator would drop it without a word.
    """
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or forward_ad._current_level >= 0


def wants_derivative(*arguments) -> bool:
    """Whether somebody may ask for a derivative, so that what it needs must be kept."""
    if is_transformed():
        return True
    tensors = (a for a in arguments if isinstance(a, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def saved(ctx, what: str) -> tuple[Tensor | None, ...]:
    """What a forward pass kept for its backward pass.

    Raises `UserError` where it was told to keep nothing.
    """
    tensors = ctx.saved_tensors  # once: where activations are recomputed, a second look fails
    if not tensors:
        raise UserError(f"the operator of {what} was called with keep=False, so it has no gradient")
    return tensors


def constant(function: Callable) -> None:
    """Let torch.compile ask this function of no arguments once, and not look into it."""
    # torch.compiler.assume_constant_result does the same, and imports the compiler for it: seconds
    function._dynamo_marked_constant = True
