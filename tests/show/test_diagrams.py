"""Claims about lib.show.diagrams: what is drawn lies on the board, and colours are the course's."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from lib.show import plots
from lib.show.diagrams import arrow, board, cells, say


@pytest.mark.parametrize("texts", [[], ["a"], list(range(65))])
def test_cells_stand_side_by_side_in_their_colour(texts):
    _, ax = board(70, 2)
    cells(ax, 1, 0.5, texts, plots.STATE, empty={64}, width=0.5)
    boxes = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert [b.get_xy() for b in boxes] == [(1 + 0.5 * i, 0.5) for i in range(len(texts))]
    assert [t.get_text() for t in ax.texts] == [str(t) for t in texts]
    full = [
        to_hex(b.get_edgecolor()) == plots.STATE.lower() and b.get_facecolor()[3] > 0 for b in boxes
    ]
    assert full == [i != 64 for i in range(len(texts))]


def test_a_board_holds_what_its_size_says():
    fig, ax = board(12, 3, "a title")
    cells(ax, 0, 0, "abc", plots.INPUT)
    arrow(ax, (0.5, 1), (2.5, 1), bend=-0.5)
    say(ax, 4, 1.5, "words", ha="right")
    fig.canvas.draw()
    assert ax.get_aspect() == 1 and not ax.axison
    assert ax.get_xlim()[0] <= 0 and ax.get_xlim()[1] >= 12 and ax.get_ylim()[1] >= 3
    assert ax.texts[-1].get_ha() == "right" and ax.texts[-1].get_color() == plots.INK
    assert ax.get_title(loc="left") == "a title"
