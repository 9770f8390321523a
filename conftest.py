"""Read by pytest before anything else: notebooks run quickly, GPU tests only where there is one."""

import gc
import os
import random
from pathlib import Path

import numpy as np
import pytest

# Set here, because the kernels that nbmake starts inherit it. `MUSIC_QUICK=0 pytest --nbmake
# notebooks` makes the full run instead.
os.environ.setdefault("MUSIC_QUICK", "1")
# Each worker has a core to itself, and so have the kernels and programs that it starts:
# where all of them take every core, they wait for each other most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config):
    """A worker a core for whole folders; a file, or a single test, runs here,
    and begins at once.
    """
    if not all(Path(argument).is_dir() for argument in config.args):
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_configure():
    """Without a GPU, Triton's kernels run in its interpreter;
    it must be told before it is imported.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Skip, and say so, what needs a GPU where there is none."""
    wanted = [item for item in items if "gpu" in item.keywords]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """What was imported stays to the end:
    the garbage collector need not look through all of it each time.
    """
    gc.freeze()


def seed_all() -> None:
    """What a test draws without naming a seed is the same alone, in a row, and in any order."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seeded_for_what_a_file_shares():
    """Before the fixtures that a file makes once."""
    seed_all()


@pytest.fixture(autouse=True)
def seeded():
    """Before each test."""
    seed_all()


@pytest.fixture(scope="module")
def one_thread():
    """For thousands of tiny products: on a busy machine,
    to wait for a second thread costs twenty times as much.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
