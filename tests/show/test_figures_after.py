"""Claims about the figures of notebook 11: each is drawn from what it is given."""

import json

import numpy as np
import pytest

from lib.env.paths import RESULTS
from lib.show import figures_after as figures
from lib.show import plots

MASK = np.tril(np.exp(-0.5 * np.subtract.outer(np.arange(4.0), np.arange(4.0))))
SHARES = {"turning": [1.0, 0.9], "real decay": [0.3, 0.4]}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.duality(np.ones((4, 4)), MASK, list("abcd")),
        lambda: figures.chunks(12, 4),
        lambda: figures.speed(json.loads((RESULTS / "ssd_cpu.json").read_text(encoding="utf-8"))),
        lambda: figures.orders([4, 8], {lam: [0.1, 0.05] for lam in (1.0, 0.5, 0.0)}),
        lambda: figures.dial(np.exp(-2j * np.pi / 3) ** np.arange(5), 0.8 ** np.arange(5), 3),
        lambda: figures.counting([16, 32], SHARES, 16, 3),
    ],
    ids=["duality", "chunks", "speed", "orders", "dial", "counting"],
)
def test_figure_is_drawn(draw):
    fig = draw()
    assert plots.png_bytes(fig, 40)[:4] == b"\x89PNG"
    assert any(ax.get_title() or ax.get_title(loc="left") for ax in fig.axes)


def test_the_hand_points_to_the_states_that_were_given():
    fig = figures.dial(np.array([1, 1j, -1, -1j, 1]), np.ones(5), 4)
    ends = [tuple(text.xy) for text in fig.axes[0].texts if hasattr(text, "xy")]
    assert ends == [(1, 0), (0, 1), (-1, 0), (0, -1)]


def rows(length, scan, products):
    """Quartiles of the three forms at a length."""
    times = {"scan": scan, "ssd": products, "ssd_bf16": products}
    names = ("q1_ms", "median_ms", "q3_ms")
    return [
        {"form": form, "length": length, "d_state": 16, "both": dict(zip(names, t))}
        for form, t in times.items()
    ]


def test_ahead_means_that_the_quartiles_do_not_meet():
    near, far = ((1, 2, 6), (5, 6, 7)), ((1, 2, 3), (5, 6, 7))

    def ahead_from(*pairs):
        timed = [row for length, pair in zip((64, 256, 512), pairs) for row in rows(length, *pair)]
        return figures.ahead_from({"sizes": {"state": 16}, "rows": timed})

    assert ahead_from(near, far, far) == 256
    assert ahead_from(far, near, far) == 512, "from there on, and not now and then"
    assert ahead_from(far, far, far) == 64
