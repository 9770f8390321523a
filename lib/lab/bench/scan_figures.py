"""The scan's measurements as figures: time against length, ours beside other people's."""

import matplotlib

from lib.lab.peers import scans as peers
from lib.show import plots

LOOKS = {  # ours in ink, others in colours that have no other meaning in this course
    "cpu": (plots.INK, "-"),
    "triton": (plots.INK, "-"),
    "parallel": (plots.INK, "--"),
    "loop": (plots.INK, ":"),
    "mambapy": (plots.OTHER[0], "-"),
    "transformers": (plots.OTHER[1], "-"),
    "mamba_ssm_cuda": (plots.OTHER[2], "-"),
    "mamba_ssm_reference": (plots.OTHER[2], "--"),
    "accelerated_scan_triton": (plots.GREY, "-"),
    "accelerated_scan_warp": (plots.GREY, "--"),
    "convolution": (plots.OTHER[2], "-"),
    "attention": (plots.OTHER[0], "-"),
}


def _lines(ax, rows: list[dict], contenders: dict, kind: str) -> None:
    """A line a contender, median and quartiles against length, named at its end."""
    lines = []
    for name, about in contenders.items():
        points = [
            (row["length"], *(row[kind][q] for q in ("q1_ms", "median_ms", "q3_ms")))
            for row in rows
            if row["contender"] == name
        ]
        if points:
            lines.append((about["label"], *LOOKS[name], points))
    plots.quartile_lines(ax, lines, room=0.28, gap=0.055, near=4)
    ax.set_xlabel("length L")


def _title(ax, text: str) -> None:
    with matplotlib.rc_context(plots.STYLE):
        ax.set_title(text)


def draw(result: dict, kind: str = "forward_backward", ax=None):
    """Time against length, a line a contender; returns the figure. `kind` may also be "forward"."""
    if ax is None:
        _, ax = plots.figure(height=4.8)
    dtype, allocator = result["dtypes"][0], result["allocators"][0]
    _lines(
        ax,
        [row for row in result["rows"] if (row["dtype"], row["allocator"]) == (dtype, allocator)],
        result["contenders"],
        kind,
    )
    ax.set_ylabel(f"{kind.replace('_', ' + ')}, ms")
    found = result["key"].get(f"{dtype}, {allocator} allocator", {})
    others = {name: row[kind] for name, row in found.items() if name in peers.PEERS}
    title = "The scan's time against length"
    if others:
        name = min(others, key=others.get)
        many = f"{others[name]:.{int(others[name] < 10)}f}"
        title = (
            f"The fastest peer, {result['contenders'][name]['label']}, "
            f"takes {many} times as long as ours at length {result['key_length']:,}"
        )
    _title(ax, title)
    return ax.figure


def draw_figure3(result: dict, kind: str = "forward_backward", ax=None):
    """Scan, plain PyTorch scan, long convolution and attention against length,
    as in figure 8 (left) of Gu and Dao (2023), which is the original's figure 3, on this machine;
    returns the figure.
    """
    if ax is None:
        _, ax = plots.figure(height=4.8)
    found, ours = result["figure3"], result["ours"]
    _lines(ax, found["rows"], found["contenders"], kind)
    ax.set_ylabel(f"{kind.replace('_', ' + ')}, ms")
    times = {(row["contender"], row["length"]): row[kind]["median_ms"] for row in found["rows"]}
    lengths = sorted(length for name, length in times if name == ours)
    faster = [n for n in lengths if times.get(("attention", n), 0) > times[ours, n]]
    always = [
        n
        for n in faster
        if all(m in faster for m in lengths if m >= n and ("attention", m) in times)
    ]
    _title(
        ax,
        f"The scan is faster than attention from length {always[0]:,} on"
        if always
        else f"Attention is faster than the scan up to length {lengths[-1]:,}",
    )
    return ax.figure


def picture(result: dict) -> bytes:
    """The figures of a result as one PNG."""
    fig, axes = plots.figure(
        1 + ("figure3" in result), height=4.8 * (1 + ("figure3" in result)), squeeze=False
    )
    draw(result, ax=axes[0, 0])
    if "figure3" in result:
        draw_figure3(result, ax=axes[1, 0])
    return plots.png_bytes(fig)
