"""Claims about block, convolution and loss as operators of PyTorch,
and about modules of any precision.
"""

import os
import subprocess
import sys

import pytest
import torch

from lib.env.errors import UserError
from lib.env.paths import ROOT
from lib.mamba import block_cpu
from lib.mamba.model import MambaConfig, MambaLM

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(not block_cpu.available(), reason="no C++ compiler here")
CONFIG = MambaConfig(11, 8, 2, 3, bias=True)
PLAIN = MambaConfig(11, 6, 1, 2, d_conv=2, conv_bias=False)
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [3, 1, 4, 1, 5, 9, 2]])


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_a_sound_operator(bias):
    x, taps, before = (
        torch.randn(shape, requires_grad=True) for shape in ((2, 5, 7), (4, 7), (2, 3, 7))
    )
    given = x, taps, torch.randn(7, requires_grad=True) if bias else None, before
    torch.library.opcheck(block_cpu.CONVOLUTION, given)
    given = tuple(t if t is None else t.detach() for t in given)
    torch.library.opcheck(block_cpu.CONVOLUTION_BACKWARD, (*given, torch.randn(2, 5, 7)))


@needs_compiler
@pytest.mark.parametrize("config, dtype", [(CONFIG, torch.float32), (PLAIN, torch.bfloat16)])
def test_the_block_is_a_sound_operator(config, dtype):
    block = MambaLM(config).backbone.layers[0]
    x = torch.randn(2, 5, config.d_model, requires_grad=True)
    memory = block.mixer.new_memory(2)
    mask = torch.ones(2, 5, config.d_model, dtype=dtype)
    given = x, *memory, mask, dtype, 1e-5, *block_cpu.weights_of(block)
    # what is computed in bfloat16 differs by its rounding where sums run in another order
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.library.opcheck(block_cpu.BLOCK, (*given, True), **close)
    given = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
    torch.library.opcheck(block_cpu.BLOCK, (*given, False))
    result, after, last, *kept = block_cpu.BLOCK(*given, True)
    x, before, _, *others = given
    for wishes in ((result, after, last), (result, None, None)):
        torch.library.opcheck(block_cpu.BLOCK_BACKWARD, (x, before, *others, *kept, *wishes))


@needs_compiler
def test_the_loss_is_a_sound_operator():
    x, norm, head = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 6), (6,), (11, 6)))
    targets = torch.tensor([[1, 2, -1, 10, 0], [0, 1, 2, 3, 4]])
    torch.library.opcheck(block_cpu.LOSS, (x, norm, head, targets, 1e-5, torch.float32, True))
    x, norm, head = (t.detach() for t in (x, norm, head))
    _, _, du, dhead = block_cpu.LOSS(x, norm, head, targets, 1e-5, torch.float32, True)
    torch.library.opcheck(block_cpu.LOSS, (x, norm, head, targets, 1e-5, torch.float32, False))
    torch.library.opcheck(block_cpu.LOSS_BACKWARD, (x, norm, 1e-5, du, dhead, torch.tensor(2.0)))


# what a reader's program does, without the tests' own check of types, which no compiler follows
COMPILED = """
import torch
from lib.mamba.model import MambaConfig, MambaLM

torch.set_num_threads(1)
torch.manual_seed(0)
model = MambaLM(MambaConfig(11, 8, 2, 3))
tokens = torch.randint(11, (2, 33))

def loss_and_gradients(call, half):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = call(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

for half in (False, True):
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(whole, half), loss_and_gradients(model, half))

torch._dynamo.reset()
with torch.no_grad():
    logits, state = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, return_state=True)
    torch.testing.assert_close((logits, state), model(tokens, return_state=True))
    program = torch.export.export(model, (tokens,))
    torch.testing.assert_close(program.module()(tokens), model(tokens))
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": {0: rows}})
    more = tokens.repeat(3, 1)
    torch.testing.assert_close(program.module()(more), model(more))
assert any("mamba_block_cpu" in str(node.target) for node in program.graph.nodes)
print("equal")
"""


@needs_compiler
def test_a_compiled_model_has_no_graph_break_and_the_same_numbers():
    """Loss, gradients, logits and state; in bfloat16 too; and the exported model its own, with an
    open number of rows as well.

    The graphs are torch.compile's own; they run without its code generator, which takes a minute.
    """
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.endswith("equal\n"), done.stderr


@needs_compiler
def test_torch_func_differentiates_the_model_one_row_at_a_time():
    """Per-sample gradients are those of each sample alone."""
    model = MambaLM(CONFIG)
    weights = dict(model.named_parameters())

    def loss(weights, row):
        return torch.func.functional_call(
            model, weights, (row[None, :-1],), {"targets": row[None, 1:]}
        )

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        {k: w.detach() for k, w in weights.items()}, TOKENS
    )
    for i, row in enumerate(TOKENS):
        alone = torch.autograd.grad(loss(weights, row), list(weights.values()))
        torch.testing.assert_close([gradient[i] for gradient in each.values()], list(alone))


@needs_compiler
def test_second_derivatives_are_refused_in_a_sentence():
    model = MambaLM(CONFIG)
    loss = model(TOKENS[:, :-1], targets=TOKENS[:, 1:])
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(UserError, match="first derivative and no second"):
        sum(g.square().sum() for g in gradients).backward()


def test_the_plain_block_has_second_derivatives():
    """By the loop, and without the fused loss: the logits' gradient is differentiated again."""
    model = MambaLM(PLAIN).double()
    logits = model(TOKENS, backend="loop")
    (first,) = torch.autograd.grad(logits.square().mean(), model.head, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), model.head)
    assert second.isfinite().all() and second.any()


@pytest.mark.parametrize(
    "dtype, close", [(torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_a_module_of_any_precision_runs_and_learns(dtype, close):
    """`model.to(dtype)`: the same logits, up to its rounding, a finite gradient,
    and steps that agree with it.
    """
    model = MambaLM(CONFIG)
    expected = model(TOKENS).detach()
    model.to(dtype)
    logits, state = model(TOKENS, return_state=True)
    assert logits.dtype == dtype
    assert (logits - expected).abs().max() <= close * expected.abs().max()
    model(TOKENS[:, :-1], targets=TOKENS[:, 1:]).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    after = model.new_state(2)
    for tokens in TOKENS.unbind(1):
        last, after = model.step(tokens, after)
    assert (last - logits[:, -1]).abs().max() <= close * expected.abs().max()
    for (_, h), (_, stepped) in zip(state, after):
        assert h.dtype == stepped.dtype == torch.promote_types(dtype, torch.float32)


def test_a_model_in_float64_is_computed_in_float64():
    """All of it: two ways to scan differ by roundings of float64 alone."""
    model = MambaLM(CONFIG)
    exact = MambaLM(CONFIG).double()
    exact.load_state_dict(model.state_dict())
    by_loop = exact(TOKENS, backend="loop")
    torch.testing.assert_close(exact(TOKENS), by_loop, rtol=1e-12, atol=1e-12)
