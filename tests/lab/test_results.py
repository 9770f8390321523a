"""Claims about the README's table of results: any machine's measurements fill it."""

import json

from lib.env import machine as env
from lib.lab.pages.results import ROWS, table


def test_every_machine_s_results_fill_the_table_and_say_whose_they_are(tmp_path, monkeypatch):
    """Today's scan as a GPU may have measured it: another file, other sizes, its own allocator."""
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    ours = {
        "contender": "triton",
        "length": 2048,
        "dtype": "bfloat16",
        "allocator": "GPU",
        "forward_backward": {"median_ms": 1.6},
    }
    gpu = {
        "device": "NVIDIA X1",
        "command": "python -m lib.lab.bench scan --device cuda",
        "ours": "triton",
        "key_length": 2048,
        "dtypes": ["bfloat16"],
        "allocators": ["GPU"],
        "rows": [ours],
        "shape": {"batch": 8, "d_inner": 1536, "d_state": 16},
        "key": {"bfloat16, GPU allocator": {"mamba_ssm_cuda": {"forward_backward": 2.0}}},
    }
    (tmp_path / "scan_nvidia_x1.json").write_text(json.dumps(gpu))
    alone = table()
    assert (
        "| selective scan, forward and backward (B 8, L 2,048, D 1,536, N 16, bfloat16) | 1.6 ms; "
        "the CUDA kernel of mamba-ssm 2 × | `python -m lib.lab.bench scan --device cuda` |"
    ) in alone
    assert "the same on a GPU" not in alone and alone.endswith("Measured on: NVIDIA X1.")
    (tmp_path / "interruptions.json").write_text(
        json.dumps(
            {"device": "CPU, 2 cores", "kills": 3, "damaged": 0, "most_lost": 1, "same_end": True}
        )
    )
    both = table()
    assert "bfloat16), on NVIDIA X1 |" in both and "again and again, on CPU, 2 cores |" in both
    assert both.endswith("Measured on: CPU, 2 cores; NVIDIA X1.")


def test_what_no_machine_has_measured_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "RESULTS", tmp_path)
    assert table().count(env.UNKNOWN) == len(ROWS) + 1  # and the same on a GPU
