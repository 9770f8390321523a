"""Generation on a CPU without Python overhead: a whole step of the model in one call of C++.

`MambaLM.step` is the definition; `Stepper` gives the same logits (to rounding, some 1e-6 of the
largest) from weights that were laid out once in the order in which they are read. See step_cpu.cpp.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.block_cpu import as_made, check_weights, weights_of
from lib.mamba.model import MambaBlock, MambaLM, RMSNorm, State
from lib.scan.arguments import check_tensors
from lib.scan.native import Kernel, address

# what the kernel reads and writes, whatever torch's defaults are just now
FLOATS = {"dtype": torch.float32, "device": "cpu"}
# the channels are cut into so many parts, which the threads share out: also the most threads of use
SLABS = 8
# a float16 weight is kept times this, so that none is subnormal: those are slow to multiply
HALF_SCALE = 2**10
HALF_LIMIT = 2**15 / HALF_SCALE  # a weight that is kept in float16 must be smaller than this
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
# the most sequences side by side: far more than memory is quick for, and no count overflows
MOST_ROWS = 2**16
ONE_THREAD = 200_000  # a model with fewer numbers is read sooner than a second thread wakes up

SOURCE = Path(__file__).with_name("step_cpu.cpp")
KERNEL = Kernel(
    SOURCE, "the whole-model step", "generation runs in plain PyTorch, several times slower"
)


def lanes() -> int:
    """Floats in a vector of this machine.

    Weights and states are laid out in tiles of so many outputs, or of twice as many.
    """
    return KERNEL.library.mamba_lanes()


def _tiles(matrix: Tensor, outputs: int) -> Tensor:
    """(outputs, inputs) to (tiles of that many outputs, inputs, outputs).

    What is missing of the last tile is zero.
    """
    matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % outputs))
    return matrix.unflatten(0, (-1, outputs)).transpose(1, 2)


def _halves(tiles: Tensor) -> Tensor:
    """(tiles, inputs, 2 W) to (tiles, inputs, W).

    In place of a float32 there are two float16, the second from W outputs above.
    """
    halves = (tiles * HALF_SCALE).half().unflatten(2, (2, -1)).transpose(2, 3)
    return halves.contiguous().view(torch.float32).squeeze(3)


def _matrices(model: MambaLM) -> list[Tensor]:
    """The weights that `weights="float16"` is about."""
    mixers = [layer.mixer for layer in model.backbone.layers]
    linear = [linear for m in mixers for linear in (m.in_proj, m.x_proj, m.out_proj)]
    return [linear.weight for linear in linear] + [model.head]


def exact_in_float16(model: MambaLM) -> bool:
    """Whether float16 holds every weight of the projections and of the output layer to the bit."""
    return all(
        torch.equal(m.float(), m.half().float()) and m.abs().max() < HALF_LIMIT
        for m in _matrices(model)
    )


def sizes(model: MambaLM, batch: int, halves: bool) -> list[int]:
    """The ten numbers of `Sizes` in step_cpu.cpp."""
    c = model.config
    model_sizes = [c.vocab_size, c.d_model, c.n_layer, c.d_inner, c.d_state, c.d_conv, c.rank]
    return [batch, *model_sizes, SLABS, halves]


def pack(model: MambaLM, halves: bool, width: int | None = None) -> Tensor:
    """All weights but the embedding's as one float32 vector.

    They are in the order of `Plan` in step_cpu.cpp. With `halves` the weights of matrices are
    float16, two in the place of a float32. `width` is the floats in a vector of the machine that
    will read them; this one's by default.
    """
    c, pieces = model.config, []
    D, M = c.d_inner, c.d_model
    one = width or lanes()  # outputs of a tile
    pair = 2 * one
    groups = math.ceil(D / one)
    cuts = [slab * groups // SLABS * one for slab in range(SLABS + 1)]
    zeros = partial(torch.zeros, **FLOATS)

    def vector(v: Tensor | None, size: int, outputs: int = one) -> Tensor:  # a missing bias is zero
        return _tiles((zeros(size) if v is None else v.detach().float())[:, None], outputs)

    def matrix(tiles: Tensor) -> Tensor:
        return _halves(tiles) if halves else tiles

    # slab after slab, of each all tiles of outputs over its channels
    def by_slab(m: Tensor) -> Tensor:
        tiles = matrix(_tiles(F.pad(m, (0, groups * one - D)), pair))
        return torch.cat([tiles[:, a:b].flatten() for a, b in pairwise(cuts)])

    for layer in model.backbone.layers:
        m = {name: p.detach().float() for name, p in layer.mixer.named_parameters()}
        in_x, in_z = m["in_proj.weight"].chunk(2)
        bias_x, bias_z = (m["in_proj.bias"] if "in_proj.bias" in m else zeros(2 * D)).chunk(2)
        pieces += [
            vector(layer.norm.weight, M, pair),
            matrix(torch.cat([_tiles(in_x, one), _tiles(in_z, one)], 2)),
            torch.cat([vector(bias_x, D), vector(bias_z, D)], 2),
            torch.cat([_tiles(m["conv1d.weight"][:, 0], one), vector(m.get("conv1d.bias"), D)], 1),
            by_slab(m["x_proj.weight"]),
            torch.cat([_tiles(m["dt_proj.weight"], one), vector(m["dt_proj.bias"], D)], 1),
            _tiles(-torch.exp(m["A_log"]) * math.log2(math.e), one),
            vector(m["D"], D),
            by_slab(m["out_proj.weight"]),
            vector(m.get("out_proj.bias"), M, pair),
        ]
    pieces += [
        vector(model.backbone.norm_f.weight, M, pair),
        matrix(_tiles(model.head.detach().float(), pair)),
    ]
    return torch.cat([piece.flatten() for piece in pieces])


def is_as_made(model: MambaLM) -> bool:
    """Whether the weights say all that the model does: no module was replaced or is listened at."""
    backbone = model.backbone
    return (
        as_made(model, MambaLM)
        and as_made(backbone.embeddings, nn.Embedding)
        and all(as_made(one, MambaBlock) and one.inside_as_made() for one in backbone.layers)
        and as_made(backbone.norm_f, RMSNorm)
    )


def _check_model(model: MambaLM) -> None:
    """Raise `UserError` for modules that are not the model's own, and naming the first weight whose
    shape is not the configuration's.
    """
    c, what = model.config, "the whole-model step"
    if not is_as_made(model):
        raise UserError(
            f"{what} knows Mamba's own modules, and one of this model's was replaced or has a "
            "hook: use the model's own `step`"
        )
    if len(model.backbone.layers) != c.n_layer:
        raise UserError(
            f"{what} needs a model of {c.n_layer} layers, as its configuration says, "
            f"not of {len(model.backbone.layers)}"
        )
    for layer in model.backbone.layers:
        check_weights(
            what, weights_of(layer), c.d_model, c.d_inner, c.d_state, c.d_conv - 1, c.rank
        )
    outer = (c.vocab_size, c.d_model)
    check_tensors(
        what,
        torch.device("cpu"),
        {
            "embeddings": (model.backbone.embeddings.weight, outer),
            "the output layer": (model.head, outer),
            "norm_f": (model.backbone.norm_f.weight, (c.d_model,)),
        },
    )


class Stepper:
    """A model that reads one token a row at a time, from a state that it holds and writes over.

    The weights are those of the moment when it is made. `weights` says how those of the projections
    and of the output layer are kept: "float32", "float16" (half as many bytes to read for a token),
    or "auto", which is float16 where that is exact. It needs a model on a CPU and a C++ compiler;
    `stepper` says what this machine can do.
    """

    def __init__(self, model: MambaLM, batch: int = 1, weights: str = "auto"):
        if any(p.device.type != "cpu" for p in model.parameters()):
            raise UserError(
                "the whole-model step takes a model on a CPU: move it there, or use its own `step`"
            )
        _check_model(model)
        if (
            not isinstance(batch, Integral)
            or isinstance(batch, bool)
            or not 1 <= batch <= MOST_ROWS
        ):
            raise UserError(f"batch {batch} is no number of sequences: give 1 to {MOST_ROWS:,}")
        if not KERNEL.available():
            raise UserError(
                "the whole-model step needs a C++ compiler (g++ or clang++): install one, "
                "or use the model's own `step`"
            )
        if weights not in ("auto", "float32", "float16"):
            raise UserError(f"weights {weights!r} are unknown: choose auto, float32 or float16")
        if weights == "float16" and max(m.abs().max() for m in _matrices(model)) >= HALF_LIMIT:
            raise UserError(
                f"a weight of this model is {HALF_LIMIT:g} or more, "
                "too large to be kept in float16: choose auto or float32"
            )
        c = self.config = model.config
        self.batch = int(batch)
        halves = exact_in_float16(model) if weights == "auto" else weights == "float16"
        self._sizes = (ctypes.c_long * 10)(*sizes(model, self.batch, halves))
        counts = (ctypes.c_long * 4)()
        KERNEL.library.mamba_sizes(self._sizes, ctypes.c_long(SLABS), counts)
        with torch.inference_mode(False), torch.no_grad():
            self._weights = pack(model, halves)
            self._embeddings = model.backbone.embeddings.weight.detach().float().clone()
            assert self._weights.dtype == torch.float32
            assert len(self._weights) == counts[0], (
                "lib/mamba/step_cpu.py and step_cpu.cpp disagree on the layout"
            )
            self._windows, self._states, self._scratch = (
                torch.zeros(n, **FLOATS) for n in counts[1:]
            )
        self._fixed = (
            self._sizes,
            ctypes.c_float(c.norm_eps),
            *map(
                address,
                (self._weights, self._embeddings, self._windows, self._states, self._scratch),
            ),
        )
        self._small = counts[0] < ONE_THREAD

    def step(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Read one token a row (B,): the logits of the next (B, V), float32.

        They are in a tensor of their own. Raises `UserError`, and reads nothing, where a token is
        not in the vocabulary or no whole number.
        """
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            # no numbers, rows of unequal length, too large a number
            raise UserError(f"the step reads a token a row, not {tokens!r}") from error
        check_tensors("the step", torch.device("cpu"), {"tokens": (tokens, (self.batch,))}, WHOLE)
        tokens = tokens.long().contiguous()
        logits = torch.empty(self.batch, self.config.vocab_size, **FLOATS)
        threads = 1 if self._small else min(SLABS, torch.get_num_threads())
        if KERNEL.library.mamba_step(
            *self._fixed, address(tokens), address(logits), ctypes.c_int(threads)
        ):
            raise UserError(
                f"a token of {tokens.tolist()} is outside "
                f"the vocabulary of {self.config.vocab_size}: was it made by another tokenizer?"
            )
        return logits

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers, a layer: window (G, B, K-1, W) and h (G, B, N, W), G tiles of W channels."""
        c, width = self.config, lanes()
        groups = math.ceil(c.d_inner / width)
        windows = self._windows.view(c.n_layer, groups, self.batch, c.d_conv - 1, width)
        states = self._states.view(c.n_layer, groups, self.batch, c.d_state, width)
        return list(zip(windows, states))

    def load(self, state: State | None = None) -> None:
        """Go on from a state of `MambaLM.step` or `prefill`; from the beginning without one."""
        c = self.config
        if state is None:
            self._windows.zero_()
            self._states.zero_()
            return
        try:
            shapes = [(tuple(window.shape), tuple(h.shape)) for window, h in state]
        except (AttributeError, TypeError, ValueError):  # no pairs of tensors
            shapes = None
        wanted = [
            ((self.batch, c.d_conv - 1, c.d_inner), (self.batch, c.d_inner, c.d_state))
        ] * c.n_layer
        if shapes != wanted:
            raise UserError(
                f"the state is not one of this model with {self.batch} rows: "
                "make it by prefill or new_state"
            )
        for window, h in state:
            check_tensors(
                "the step",
                torch.device("cpu"),
                {"its window": (window, window.shape), "h": (h, h.shape)},
            )
        width = lanes()
        missing = -c.d_inner % width
        with torch.no_grad():
            for (window, h), (own_window, own_h) in zip(state, self._views()):
                for own, t in ((own_window, window), (own_h, h.transpose(1, 2))):
                    tiles = F.pad(t, (0, missing)).unflatten(2, (-1, width))
                    own.copy_(tiles.permute(2, 0, 1, 3))

    def state(self) -> State:
        """A copy of the state, as `MambaLM.step` and `forward` take it."""
        D = self.config.d_inner
        return [
            (
                window.permute(1, 2, 0, 3).flatten(2)[..., :D].clone(),
                h.permute(1, 2, 0, 3).flatten(2)[..., :D].transpose(1, 2).contiguous(),
            )
            for window, h in self._views()
        ]

    def state_bytes(self) -> int:
        """What it remembers of a piece, however long that is."""
        return 4 * (self._windows.numel() + self._states.numel())


def stepper(model: MambaLM, batch: int = 1) -> Stepper | None:
    """A `Stepper`; None where the model is no Mamba as it was made, is not on a CPU, or there is
    no compiler.

    A missing compiler is said once a process.
    """
    mine = isinstance(model, MambaLM) and model.device.type == "cpu" and is_as_made(model)
    return Stepper(model, batch) if mine and KERNEL.available() else None
