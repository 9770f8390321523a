"""The kernels at the widths of other processors' registers:
the same numbers on AVX2 as on this machine.
"""

import os
import subprocess
import sys

import pytest

from lib.env.paths import ROOT
from lib.mamba import step_cpu
from lib.scan import native

FLAGS = "-mavx2 -mfma -mf16c"
SCRIPT = """
import torch
from lib.mamba import MambaConfig, MambaLM, step_cpu
from lib.mamba.step_cpu import Stepper
from lib.scan import selective_scan

torch.manual_seed(0)
assert step_cpu.KERNEL.available() and step_cpu.lanes() == 8
for length, channels, states in ((1, 3, 1), (13, 9, 5), (26, 40, 16)):
    x, delta, z = (torch.randn(2, length, channels, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(2, length, states, requires_grad=True) for _ in range(2))
    A = -torch.rand(channels, states) * 4
    results = []
    for backend in ("cpu", "parallel"):
        y = selective_scan(x, delta, A, B, C, z=z, delta_softplus=True, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, delta, B, C, z))])
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
model = MambaLM(MambaConfig(37, 24, 2, 5))
tokens = torch.randint(37, (3, 7))
fused, plain = (model(tokens, backend=backend) for backend in ("auto", "parallel"))
assert torch.allclose(fused, plain, atol=1e-5)
stepper = Stepper(model, 3)
with torch.inference_mode():
    stepped = torch.stack([stepper.step(column) for column in tokens.T], 1)
assert torch.allclose(stepped, plain, atol=1e-5)
"""


@pytest.mark.skipif("avx2" not in native.processor(), reason="needs a processor with AVX2")
@pytest.mark.skipif(not step_cpu.KERNEL.available(), reason="no C++ compiler")
def test_registers_of_eight_floats_give_the_same_numbers():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "CPU_FLAGS": FLAGS, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-1500:]
