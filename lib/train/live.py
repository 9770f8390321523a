"""A run that is watched while it trains: one figure in the notebook, redrawn in place."""

import time

import numpy as np

from lib.show import plots

SMOOTH = 20  # steps that the training line is the mean of


class LivePlot:
    """For `Trainer.run(watch=…)`: training and validation in bits per note, against baselines.

    `baselines`: bits per note by name; `tokens_a_note` turns the training loss into bits per note.
    It redraws every `every` seconds; outside a notebook it draws nothing until asked for `figure`.
    """

    def __init__(self, baselines: dict[str, float], tokens_a_note: float, *, every: float = 3.0):
        self.baselines = baselines
        self.tokens_a_note = tokens_a_note
        self.every = every
        self.drawn = 0.0  # when it was drawn last
        self.handle = None

    def __call__(self, trainer) -> None:
        if time.monotonic() - self.drawn > self.every or trainer.finished:
            self.show(trainer)
            self.drawn = time.monotonic()  # after the drawing, which takes its time too

    def show(self, trainer) -> None:
        """Draw it where it was drawn before, or here for the first time; only in a notebook."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            return
        if get_ipython() is None:
            return
        fig, alt = self.figure(trainer)
        image = plots.image(fig, alt)
        if self.handle is None:
            self.handle = display(image, display_id=True)
        else:
            self.handle.update(image)

    def figure(self, trainer):
        """The figure and its alternative text."""
        fig, ax = plots.figure(height=3.8)
        losses = np.array(trainer.losses) * self.tokens_a_note
        width = min(SMOOTH, max(1, len(losses) // 4))
        self._draw_training(ax, trainer.step, losses, width)
        if trainer.log:
            steps = [row["step"] for row in trainer.log]
            bits = [row["validation_bits_per_note"] for row in trainer.log]
            ax.plot(steps, bits, "o-", color=plots.OUTPUT, label="validation")
        self._draw_baselines(ax)
        ax.set(xlabel="step", ylabel="bits per note", xlim=(0, max(trainer.step, 2)))
        ax.legend(loc="lower left")

        now = f"{losses[-width:].mean():.1f}" if len(losses) else "?"
        if trainer.log:
            now = f"{bits[-1]:.1f} in validation"
        speed = trainer.tokens / max(trainer.seconds, 1e-9)
        title = f"step {trainer.step:,}, {speed:,.0f} tokens a second: {now}"
        ax.set_title(title)
        alt = (
            f"Training and validation loss in bits per note over {trainer.step:,} steps, with "
            f"the baselines {', '.join(self.baselines)}. {title}."
        )
        return fig, alt

    def _draw_training(self, ax, step: int, losses: np.ndarray, width: int) -> None:
        """Each step's loss up to `step`, faintly, and means of `width` of them."""
        steps = np.arange(step - len(losses) + 1, step + 1)
        ax.plot(steps, losses, color=plots.INPUT, alpha=0.2, linewidth=0.8)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        ax.plot(steps[width - 1 :], smooth, color=plots.INPUT, label="training")

    def _draw_baselines(self, ax) -> None:
        """A dashed line each, named at its right end."""
        for name, bits in self.baselines.items():
            ax.axhline(bits, color=plots.GREY, linestyle="--", linewidth=1)
            ax.annotate(
                f"{name} {bits:.1f} ",
                (1, bits),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color=plots.GREY,
            )
