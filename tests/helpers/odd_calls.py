"""Give every operator and kernel door odd arguments, one at a time,
and say what became of each call.

`python tests/helpers/odd_calls.py [NAME]` prints a line of JSON a call: the door, the dtype, the
argument, what was done to it, what is wanted ("refused", "right", or "either") and what came:
"refused", "right", or a complaint. All calls run in one fork; where one of them ends it, its signal
is the complaint, and another fork goes on behind it. tests/mamba/test_kernel_doors.py holds what
comes to what is wanted.
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - from here on the course can be imported

from lib.env.errors import UserError  # noqa: E402
from lib.mamba import block_cpu  # noqa: E402
from lib.scan import cpu as scan_cpu  # noqa: E402
from lib.scan.operators import NAMESPACE  # noqa: E402

BATCH, LENGTH, WIDTH, CHANNELS, STATES, RANK, TAPS, WORDS = 2, 6, 4, 8, 3, 2, 4, 9
SECONDS = 30  # that a call may take
CLOSE = 0.03  # bfloat16 has three digits; numbers from elsewhere in memory are off by about one
random = torch.randn

SPOILT = {  # refused, whatever the argument is
    "no row": lambda t: t[:0],
    "one row": lambda t: t[:1],
    "half the rows": lambda t: t[: len(t) // 2],
    "one column": lambda t: t[..., :1],
    "one number": lambda t: t.flatten()[:1],
    "one more axis": lambda t: t[None],
    "no axis": lambda t: t.flatten()[0],
    "elsewhere": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "whole": lambda t: t.int(),
    "yes or no": lambda t: t > 0,
    "sparse": lambda t: t.to_sparse(),
}
OTHER_DTYPES = {  # read as what they are, or refused
    "half": lambda t: t.half(),
    "double": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
}
LAID_OUT = {  # right: the same numbers, elsewhere in memory
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second number": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "inside longer rows": lambda t: torch.cat([t + 1, t, t + 1], -1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ],
    "one row for all": lambda t: t[:1].expand(t.shape),
    "marked as negative": lambda t: torch.complex(t * 0, -t).conj().imag,
}
OTHER_PRECISIONS = (
    torch.float16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.complex64,
    torch.bool,
)
ROWS = ("no row", "one row", "half the rows")


def scan(dtype: torch.dtype) -> list:
    """What the scans read, in their order, without h0."""
    moving = lambda columns: random(BATCH, LENGTH, columns).to(dtype)
    return [
        moving(CHANNELS),
        moving(CHANNELS),
        -random(CHANNELS, STATES).exp(),
        moving(STATES),
        moving(STATES),
        random(CHANNELS),
        moving(CHANNELS),
        random(CHANNELS),
        True,
    ]


def state() -> torch.Tensor:
    """A state of the scan."""
    return random(BATCH, CHANNELS, STATES)


def like(*results: torch.Tensor) -> list:
    """Gradients of the results of a call."""
    return [random(t.shape).to(t.dtype) for t in results]


def block(dtype: torch.dtype) -> list:
    """What both operators of the block read after its input and memory, with every bias."""
    in_w, in_b = random(2 * CHANNELS, WIDTH), random(2 * CHANNELS)
    conv_w, conv_b = random(CHANNELS, 1, TAPS), random(CHANNELS)
    x_w, dt_w, dt_b = random(RANK + 2 * STATES, CHANNELS), random(CHANNELS, RANK), random(CHANNELS)
    mask = torch.ones(BATCH, LENGTH, WIDTH, dtype=dtype)
    return [
        mask,
        dtype,
        1e-5,
        random(WIDTH),
        in_w,
        in_b,
        conv_w,
        conv_b,
        x_w,
        dt_w,
        dt_b,
        random(CHANNELS, STATES),
        random(CHANNELS),
        random(WIDTH, CHANNELS),
        random(WIDTH),
    ]


def kernels_of_the_cpu(dtype: torch.dtype):
    """(operator, arguments that fit) of each."""
    given = scan(dtype)
    y, last, kept = scan_cpu.SCAN(*given, state(), True)
    yield scan_cpu.SCAN, [*given, state(), True]
    yield scan_cpu.SCAN_BACKWARD, [*given, kept, *like(y, last)]
    one = [t.mean(1) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(given)]  # (B, columns)
    yield scan_cpu.STEP, [state(), *one]

    x, before = random(BATCH, LENGTH, CHANNELS).to(dtype), random(BATCH, TAPS - 1, CHANNELS)
    given = [x, random(TAPS, CHANNELS), random(CHANNELS), before]
    yield block_cpu.CONVOLUTION, given
    yield block_cpu.CONVOLUTION_BACKWARD, [*given, random(x.shape).to(dtype)]

    x, weights = random(BATCH, LENGTH, WIDTH), block(dtype)
    result, after, last, *kept = block_cpu.BLOCK(x, before, state(), *weights, True)
    yield block_cpu.BLOCK, [x, before, state(), *weights, True]
    yield block_cpu.BLOCK_BACKWARD, [x, before, *weights, *kept, *like(result, after, last)]

    norm, head, targets = (
        random(WIDTH),
        random(WORDS, WIDTH),
        torch.randint(2, WORDS, (BATCH, LENGTH)),
    )
    _, _, du, dhead = block_cpu.LOSS(x, norm, head, targets, 1e-5, dtype, True)
    yield block_cpu.LOSS, [x, norm, head, targets, 1e-5, dtype, True]
    yield block_cpu.LOSS_BACKWARD, [x, norm, 1e-5, du, dhead, torch.tensor(2.0)]


def kernels_of_triton(dtype: torch.dtype):
    """The same in Triton's interpreter, where it is on."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from lib.scan import triton_kernel
        from lib.scan.triton_interpreter import fast_interpreter
    except ImportError:
        return
    fast_interpreter()
    given = scan(dtype)
    y, last, kept = triton_kernel.SCAN(*given, state())
    yield triton_kernel.SCAN, [*given, state()]
    yield triton_kernel.SCAN_BACKWARD, [*given, kept, *like(y, last)]


def functions(dtype: torch.dtype):
    """The public functions whose way to a kernel is their own.

    Yields (name, function, its arguments by name).
    """
    names = ("x", "norm", "head", "targets", "eps", "dtype", "total")
    x, targets = random(BATCH, LENGTH, WIDTH), torch.randint(2, WORDS, (BATCH, LENGTH))
    given = dict(zip(names, (x, random(WIDTH), random(WORDS, WIDTH), targets, 1e-5, dtype, True)))
    yield "cross_entropy", block_cpu.cross_entropy, given
    yield "cross_entropy of each", block_cpu.cross_entropy, given | {"total": False}

    given = dict(zip(scan_cpu.Inputs._fields, scan(dtype)))
    y, last, kept = scan_cpu.forward(scan_cpu.Inputs(*given.values()), None, True)
    forward = lambda h0, keep, **given: scan_cpu.forward(scan_cpu.Inputs(**given), h0, keep)
    backward = lambda kept, dy, dlast, **given: scan_cpu.backward(
        scan_cpu.Inputs(**given), kept, dy, dlast
    )
    yield "scan_cpu.forward", forward, given | {"h0": state(), "keep": True}
    yield (
        "scan_cpu.backward",
        backward,
        given | {"kept": kept, **dict(zip(("dy", "dlast"), like(y, last)))},
    )


def doors(dtype: torch.dtype):
    """(name, call, its arguments by name) of all of them."""
    for operator, arguments in (*kernels_of_the_cpu(dtype), *kernels_of_triton(dtype)):
        names = [argument.name for argument in operator._schema.arguments]
        assert len(names) == len(arguments), operator
        by_name = lambda operator=operator, **given: operator(*given.values())
        yield operator._schema.name.split("::")[1], by_name, dict(zip(names, arguments))
    yield from functions(dtype)


def odd(name: str, value):
    """An argument made odd in all the ways that make a difference to it.

    Yields (what is done, the argument then, what is wanted).
    """
    if isinstance(value, torch.dtype):
        for other in OTHER_PRECISIONS:
            yield str(other)[6:], other, "refused"
    if not isinstance(value, torch.Tensor):
        return
    same = lambda t: (
        (t.shape, t.dtype, t.device, t.layout)
        == (value.shape, value.dtype, value.device, value.layout)
    )
    for how, spoil in SPOILT.items():
        if not value.dim() and how in (*ROWS, "one column"):
            continue
        if name == "dhead" and how in ROWS:  # it alone says how many words there are
            continue
        if not same(spoil(value)):
            yield how, spoil(value), "refused"
    if not value.is_floating_point():
        return
    for how, convert in OTHER_DTYPES.items():
        if not same(convert(value)):
            yield how, convert(value), "either"
    for how, lay_out in LAID_OUT.items():
        if value.dim() and (value.dtype == torch.float32 or how != "marked as negative"):
            yield how, lay_out(value), "right"


def tensors(results) -> list[torch.Tensor]:
    """The tensors among what a call returned."""
    results = [results] if isinstance(results, torch.Tensor) else results
    return [t for t in results if isinstance(t, torch.Tensor)]


def tried(call, given: dict, name: str | None, value) -> str:
    """What becomes of a call with `value` as the argument of that name."""
    try:
        found = tensors(call(**given | ({} if name is None else {name: value})))
        # the same numbers, laid out as they should be, and in the dtype that they should have
        if isinstance(value, torch.Tensor) and value.shape == given[name].shape:
            given = given | {name: torch.empty_like(given[name]).copy_(value)}
        expected = tensors(call(**given))
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE, check_dtype=False)
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"refused in lines: {error}"
    except BaseException as error:  # noqa: BLE001 - whatever comes is what is asked for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "right"


def all_outcomes(calls: list) -> list[str]:
    """What became of each call (a function of no arguments), in their order."""
    found = []
    while len(found) < len(calls):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            for call in calls[len(found) :]:
                signal.alarm(SECONDS)
                os.write(write, json.dumps(call()).encode() + b"\n")
            os._exit(0)
        os.close(write)
        with open(read) as lines:
            found += map(json.loads, lines)
        _, status = os.waitpid(child, 0)
        if len(found) < len(calls):
            found.append(
                f"ended by {signal.Signals(os.WTERMSIG(status)).name}" if status else "ended"
            )
    return found


def main(only: str = "") -> None:
    """Try all, or those of one door, and print a line each;
    before them the names of all operators.
    """
    torch.set_num_threads(1)  # a fork has no share in the threads of what it was forked from
    torch.manual_seed(0)
    labels, calls = [], []
    for dtype in block_cpu.PRECISIONS:
        for door, call, given in doors(dtype):
            if only not in door:
                continue
            trials = [("nothing", "as it should be", None, "right")]
            trials += [
                (name, *odd_one) for name, value in given.items() for odd_one in odd(name, value)
            ]
            if "triton" in door:  # its interpreter takes too long for what is right
                trials = [trial for trial in trials if trial[-1] == "refused"]
            for name, how, value, wanted in trials:
                labels.append((door, str(dtype)[6:], name, how, wanted))
                name = None if name == "nothing" else name
                calls.append(
                    lambda call=call, given=given, name=name, value=value: tried(
                        call, given, name, value
                    )
                )
    names = [
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
    ]
    print(json.dumps(sorted(names)))
    for label, outcome in zip(labels, all_outcomes(calls), strict=True):
        print(json.dumps([*label, outcome]))


if __name__ == "__main__":
    main(*sys.argv[1:])
