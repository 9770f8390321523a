"""Claims about lib.lab.peers.scans: other people's scans agree with our float64 loop,
or say why they cannot.
"""

import sys
import types

import pytest
import torch
from made_up import sdist

from lib.env.errors import UserError
from lib.lab.peers import scans as peers
from lib.scan.selective import selective_scan


def problem(length, dtype=torch.float64, batch=2, d_inner=5, d_state=3):
    """Random arguments of the scan, all of them asking for a gradient."""
    random = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    found = {
        "x": draw(batch, length, d_inner),
        "delta": draw(batch, length, d_inner),
        "A": -torch.exp(draw(d_inner, d_state)),
        "B": draw(batch, length, d_state),
        "C": draw(batch, length, d_state),
        "D": draw(d_inner),
        "z": draw(batch, length, d_inner),
        "delta_bias": draw(d_inner),
    }
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


def results(scan, given):
    """Output and all gradients of a random loss, in float64."""
    y = scan(**given, delta_softplus=True)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((y.double() * weight).sum(), given.values())
    return {
        "y": y.detach().double(),
        **{f"d{name}": t.double() for name, t in zip(given, found, strict=True)},
    }


def loop(**given):
    return selective_scan(**given, backend="loop")


def assert_is_loop(scan, given, tolerance):
    exact = results(loop, {name: t.detach().double().requires_grad_() for name, t in given.items()})
    for name, value in results(scan, given).items():
        error = (value - exact[name]).abs().max()
        assert error <= tolerance * max(1, exact[name].abs().max()), f"{name}: {error:.1e}"


def brought(name):
    try:
        return peers.load(name)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("name", ["mambapy", "transformers", "mamba_ssm_reference"])
def test_peer_matches_our_loop_in_float32(name, length):
    # float32 has 6e-8 a rounding; sums over 257 steps collect some dozens of them
    assert_is_loop(brought(name), problem(length, torch.float32), 5e-6)


@pytest.mark.parametrize("length", [1, 65, 257])
def test_mambapy_matches_our_loop_in_float64(length):
    # the only one of them that stays in float64 throughout: 1e-16 a rounding
    assert_is_loop(brought("mambapy"), problem(length), 1e-13)


@pytest.mark.parametrize("without", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("name", ["mambapy", "transformers", "mamba_ssm_reference"])
def test_peer_does_without_what_is_left_out(name, without):
    given = problem(17, torch.float32)
    del given[without]
    assert_is_loop(brought(name), given, 5e-6)


def test_loading_the_reference_leaves_no_module_behind():
    before = set(sys.modules)
    brought("mamba_ssm_reference")
    assert not [
        name for name in set(sys.modules) - before if "mamba" in name or "selective" in name
    ]


def stand_in(monkeypatch, name, **content):
    """A module of this name for as long as the test runs."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(content)


def test_accelerated_scan_is_fed_the_discretised_inputs(monkeypatch):
    """Its kernels need a GPU; the discretisation around them does not."""

    def scan(gates, tokens):  # (B, C, T), as theirs
        assert gates.is_contiguous() and tokens.is_contiguous()
        h, out = torch.zeros_like(gates[..., 0]), []
        for gate, token in zip(gates.unbind(-1), tokens.unbind(-1), strict=True):
            h = gate * h + token
            out.append(h)
        return torch.stack(out, -1)

    stand_in(monkeypatch, "accelerated_scan.scalar", scan=scan)
    for length in (1, 64, 65):
        assert_is_loop(peers.load("accelerated_scan_triton"), problem(length), 1e-13)


def test_mamba_ssm_kernel_is_fed_channels_first_without_a_copy(monkeypatch):
    """It wants (B, D, L) contiguous: given tensors laid out so, it gets the very same memory."""
    given = problem(65)
    x = given["x"].detach().transpose(1, 2).contiguous().transpose(1, 2)
    seen = []

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        seen.append((u.is_contiguous(), u.data_ptr()))
        turned = (t.transpose(1, 2) for t in (u, delta))
        return loop(
            **dict(zip(("x", "delta"), turned, strict=True)),
            A=A,
            B=B.transpose(1, 2),
            C=C.transpose(1, 2),
            D=D,
            z=z.transpose(1, 2),
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
        ).transpose(1, 2)

    stand_in(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=kernel)
    scan = peers.load("mamba_ssm_cuda")
    assert_is_loop(scan, given, 1e-13)
    scan(**(given | {"x": x}), delta_softplus=True)
    assert seen[-1] == (True, x.data_ptr())


def test_mamba_ssm_without_its_cuda_scan_is_one_sentence(monkeypatch):
    """Its next release is built without it, and says so only when the scan is called."""
    stand_in(
        monkeypatch,
        "mamba_ssm.ops.selective_scan_interface",
        selective_scan_fn=None,
        selective_scan_cuda=None,
    )
    with pytest.raises(UserError, match="MAMBA_KEEP_CUDA_BUILD=TRUE"):
        peers.load("mamba_ssm_cuda")


@pytest.mark.parametrize(
    "name, module",
    [
        ("mambapy", "mambapy"),
        ("transformers", "transformers"),
        ("mamba_ssm_cuda", "mamba_ssm"),
        ("accelerated_scan_warp", "accelerated_scan"),
    ],
)
def test_missing_peer_is_one_sentence(name, module, monkeypatch):
    for known in [known for known in sys.modules if known.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"^{module} is not installed: run pip install .*[0-9]'?$"):
        peers.load(name)


def test_peer_that_breaks_while_it_is_imported_is_one_sentence(monkeypatch):
    def broken(name):
        raise RuntimeError("no nvcc\nand forty lines of build log")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    with pytest.raises(UserError) as caught:
        peers.load("accelerated_scan_warp")
    assert "does not work here (no nvcc)" in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_peer_is_refused():
    with pytest.raises(UserError, match="mambapy"):
        peers.load("mambo")


# ---- mamba-ssm's archive ------------------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def nonsense(requirement, work, what, **options):
    (work / "mamba_ssm-1.tar.gz").write_bytes(b"\x1f\x8b nonsense")


@pytest.mark.parametrize(
    "bring, words",
    [
        (sdist(b"other code", peers.FILE), "wrong checksum"),
        (sdist(b"", "elsewhere.py"), "damaged"),
        (lambda requirement, work, what, **options: None, "damaged"),
        (nonsense, "damaged"),
    ],
)
def test_wrong_archive_is_said_and_nothing_is_kept(
    bring, words, tmp_path, monkeypatch, nothing_installed
):
    monkeypatch.setattr(peers, "pip_download", bring)
    with pytest.raises(peers.Unreachable, match=words):
        peers.reference_file(tmp_path, say=str)
    assert not list(tmp_path.glob("**/*.py")) and not list(tmp_path.glob("*/"))


def test_damaged_file_is_fetched_again_and_a_sound_one_is_not(
    tmp_path, monkeypatch, nothing_installed
):
    fetched = []

    def bring(requirement, work, what, **options):
        fetched.append(work)
        sdist(b"def selective_scan_ref(): pass", peers.FILE)(requirement, work, what)

    monkeypatch.setattr(peers, "pip_download", bring)
    monkeypatch.setattr(
        peers, "SHA256", peers.hashlib.sha256(b"def selective_scan_ref(): pass").hexdigest()
    )
    path = peers.reference_file(tmp_path, say=str)
    assert peers.reference_file(tmp_path, say=str) == path and len(fetched) == 1
    path.write_text("cut")
    assert (
        peers.reference_file(tmp_path, say=str).read_bytes().endswith(b"pass") and len(fetched) == 2
    )


def test_no_package_index_is_one_sentence(tmp_path, monkeypatch, nothing_installed):
    for name, value in (
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", ""),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(peers.Unreachable, match="^pip cannot fetch mamba-ssm ") as caught:
        peers.reference_file(tmp_path, say=str)
    assert "\n" not in str(caught.value)
