"""Figures of deck 2: the spring of notebook 03, drawn large, by the functions of lib.scan.ssm."""

import math

import torch

from lib.scan import ssm
from lib.show import plots
from lib.show.figures_memory import METHOD

WIDTH = 8.2  # inches, shown 1,150 pixels wide
OMEGA, FRICTION = 2 * math.pi, 1.0  # once a second; how fast the swing dies
FINE = 1e-3  # seconds: the steps of what we call the truth


def _spring():
    """A (2, 2), B (2,), C (2,) of a mass on a spring: the state is position and velocity."""
    A = torch.tensor([[0, 1], [-(OMEGA**2), -FRICTION]], dtype=torch.float64)
    B, C = torch.tensor([[0, 1], [1, 0]], dtype=torch.float64)
    return A, B, C


def _push():
    """Seconds and the force of a hand that pushes twice, (6000,) each."""
    t = torch.arange(0, 6, FINE, dtype=torch.float64)
    return t, 20 * ((t > 0.5) & (t < 0.9)).to(t) - 20 * ((t > 3.2) & (t < 3.4)).to(t)


def spring():
    """A push, the swing that follows, and the state's way."""
    (A, B, _), (t, x) = _spring(), _push()
    system = ssm.discretize(A, B, FINE)
    position, velocity = (
        ssm.recurrence(*system, row, x)[0] for row in torch.eye(2, dtype=torch.float64)
    )
    fig, (time, plane) = plots.figure(1, 2, width=WIDTH, height=3.5, width_ratios=[2, 1])
    time.plot(t, x / 20, color=plots.INPUT, label="force x")
    time.plot(t, position, color=plots.OUTPUT, label="position y")
    time.set(xlabel="seconds", yticks=[], xticks=range(7), ylim=(-1.2, 1.6))
    time.legend(loc="upper right", ncols=2)
    plane.plot(position, velocity, color=plots.STATE, linewidth=1.2)
    plane.set(xlabel="position", ylabel="velocity", title="state h", xticks=[0], yticks=[0])
    return fig


def steps():
    """The spring stepped by three methods, with a small and a larger step."""
    (A, B, C), (t, x) = _spring(), _push()
    truth, _ = ssm.recurrence(*ssm.discretize(A, B, FINE), C, x)
    fig, axes = plots.figure(1, 2, width=WIDTH, height=3.6, sharey=True)
    for ax, every in zip(axes, (10, 50)):
        ax.plot(t, truth, color=plots.PALE, linewidth=7, label="the spring")
        for method, colour in METHOD.items():
            y, _ = ssm.recurrence(
                *ssm.discretize(A, B, every * FINE, method), C, x[every // 2 :: every]
            )
            ax.plot(
                t[::every] + every * FINE,
                y,
                ".-",
                markersize=3,
                linewidth=1.2,
                color=colour,
                label=method,
            )
        ax.set(
            xlim=(0, 6),
            ylim=(-1.5, 2.1),
            yticks=[],
            xlabel="seconds",
            title=f"Δ = {every * FINE * 1000:.0f} ms",
        )
    axes[0].legend(loc="upper right", ncols=2, fontsize=10)
    return fig


def one_number():
    """Three complex numbers in the plane, and the springs that they are."""
    numbers = {
        "our spring": complex(-FRICTION / 2, math.sqrt(OMEGA**2 - FRICTION**2 / 4)),
        "slower, rings longer": complex(-0.15, 3.2),
        "no swing: it only fades": complex(-1.2, 0),
    }
    t = torch.arange(0, 6, 0.01)
    fig, (plane, time) = plots.figure(1, 2, width=WIDTH, height=3.6, width_ratios=[1, 2])
    for (name, a), colour in zip(numbers.items(), (plots.STATE, plots.OTHER[1], plots.GREY)):
        plane.plot(a.real, a.imag, "o", color=colour, markersize=11, clip_on=False)
        time.plot(t, torch.exp(a * t).real, color=colour, label=name)
    plane.axvspan(-2, 0, color=plots.PALE, linewidth=0, zorder=0)
    plane.set(
        xlim=(-2, 0.4),
        ylim=(-0.5, 7),
        xticks=[0],
        yticks=[0],
        xlabel="decay: real part",
        ylabel="swing: imaginary part",
        title="a",
    )
    time.set(xlabel="seconds", yticks=[0], ylim=(-1.1, 1.5), title="real part of exp(at)")
    time.legend(loc="upper right", fontsize=10)
    return fig
