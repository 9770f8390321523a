"""A run that is watched while it trains: one figure in the notebook, redrawn in place."""

import time

import numpy as np

from lib.show import plots

SMOOTH = 20  # steps that the training line is the mean of


class LivePlot:
    """Give it to `Trainer.run(watch=…)`: training and validation in bits per note against counting baselines.

    `baselines`: bits per note by name; `tokens_a_note` turns the training loss into bits per note. It
    redraws every `every` seconds; outside a notebook it draws nothing until `figure` is asked for.
    """

    def __init__(self, baselines: dict[str, float], tokens_a_note: float, *, every: float = 3.0):
        self.baselines, self.tokens_a_note, self.every = baselines, tokens_a_note, every
        self.drawn, self.handle = 0.0, None

    def __call__(self, trainer) -> None:
        if time.monotonic() - self.drawn > self.every or trainer.finished:
            self.show(trainer)
            self.drawn = time.monotonic()  # after the drawing, which takes its time too

    def show(self, trainer) -> None:
        """Draw it where it was drawn before, or here for the first time; nothing outside a notebook."""
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
        steps = np.arange(trainer.step - len(losses) + 1, trainer.step + 1)
        ax.plot(steps, losses, color=plots.INPUT, alpha=0.2, linewidth=0.8)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        ax.plot(steps[width - 1 :], smooth, color=plots.INPUT, label="training")
        if trainer.log:
            ax.plot([row["step"] for row in trainer.log], [row["validation_bits_per_note"] for row in trainer.log],
                    "o-", color=plots.OUTPUT, label="validation")
        for name, bits in self.baselines.items():
            ax.axhline(bits, color=plots.GREY, linestyle="--", linewidth=1)
            ax.annotate(f"{name} {bits:.1f} ", (1, bits), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                        color=plots.GREY)
        ax.set(xlabel="step", ylabel="bits per note", xlim=(0, max(trainer.step, 2)))
        ax.legend(loc="lower left")
        now = f"{losses[-width:].mean():.1f}" if len(losses) else "?"
        if trainer.log:
            now = f"{trainer.log[-1]['validation_bits_per_note']:.1f} in validation"
        title = f"step {trainer.step:,}, {trainer.tokens / max(trainer.seconds, 1e-9):,.0f} tokens a second: {now}"
        ax.set_title(title)
        return fig, f"Training and validation loss in bits per note over {trainer.step:,} steps, with the baselines " \
                    f"{', '.join(self.baselines)}. {title}."
