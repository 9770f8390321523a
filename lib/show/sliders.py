"""Sliders that redraw a picture: one motion may say more than a paragraph.

The picture is an ordinary output, so that it remains where nobody listens: on GitHub, on paper, in
a notebook that a program runs. The controls are widgets, which `notebooks/execute.py` leaves out of
what it stores.
"""

from collections.abc import Callable
from pathlib import Path

import anywidget
import ipywidgets
import traitlets
from IPython.display import HTML, DisplayHandle, display

Range = tuple[float, float, float, float]  # lowest, highest, step, where it begins
Control = Range | list | ipywidgets.Widget


def sliders(draw: Callable, *, live: bool = True, **controls: Control) -> None:
    """Show `draw(**values)` and the controls below it; moving one draws the picture anew.

    A control is a range of numbers, a list of choices that begins with the first, or a widget
    that has a `value`. `draw` returns what `plots.image` or `listen.player` return, or a tuple
    of them; a new sound plays at once. With `live=False` a slider acts only when it is let go:
    for a slow `draw`.
    """
    widgets = {name: _widget(name, control, live) for name, control in controls.items()}

    def picture() -> HTML:
        parts = draw(**{name: widget.value for name, widget in widgets.items()})
        return HTML(
            "".join(part.data for part in (parts if isinstance(parts, tuple) else (parts,)))
        )

    handle = DisplayHandle()
    handle.display(picture())

    def redraw(change) -> None:
        new = picture()
        new.data = new.data.replace("<audio controls", "<audio controls autoplay")
        handle.update(new)

    for widget in widgets.values():
        widget.observe(redraw, "value")
    display(ipywidgets.VBox(list(widgets.values())))


def _widget(name: str, control: Control, live: bool) -> ipywidgets.Widget:
    if isinstance(control, ipywidgets.Widget):
        return control
    look = dict(
        description=name.replace("_", " "),
        continuous_update=live,
        style={"description_width": "7em"},
        layout={"width": "32em"},
    )
    if isinstance(control, list):
        return ipywidgets.SelectionSlider(options=control, value=control[0], **look)
    low, high, step, start = control
    kind = (
        ipywidgets.IntSlider if all(isinstance(n, int) for n in control) else ipywidgets.FloatSlider
    )
    return kind(min=low, max=high, step=step, value=start, **look)


class Strip(ipywidgets.HBox):
    """A row of boxes; a click puts the next of `names` into one.

    `value` has the place of each in `names`.
    """

    value = traitlets.Tuple()

    def __init__(self, names: list[str], start: list[int]):
        self.names = names
        boxes = [ipywidgets.Button(layout={"width": "2.4em", "padding": "0"}) for _ in start]
        for place, box in enumerate(boxes):
            box.on_click(lambda _, place=place: self.turn(place))
        super().__init__(boxes, value=tuple(start))
        self._say()

    def turn(self, place: int) -> None:
        """Put the next name into a box."""
        value = list(self.value)
        value[place] = (value[place] + 1) % len(self.names)
        self.value = tuple(value)
        self._say()

    def _say(self) -> None:
        for box, which in zip(self.children, self.value, strict=True):
            box.description = self.names[which]


class Rounds(ipywidgets.HBox):
    """Two buttons, "from the start" and "next": `value` counts how often the second was pressed."""

    value = traitlets.Int()

    def __init__(self, name: str, start: int):
        again = ipywidgets.Button(description="from the start")
        following = ipywidgets.Button(description=f"next {name}", button_style="primary")
        again.on_click(lambda _: self.set_trait("value", 0))
        following.on_click(lambda _: self.set_trait("value", self.value + 1))
        super().__init__([again, following], value=start)


class Curve(anywidget.AnyWidget):
    """A curve that is drawn with the mouse: `value` has its heights, each from -1 to 1."""

    _esm = Path(__file__).with_name("curve.js")
    value = traitlets.List(traitlets.Float()).tag(sync=True)
