"""Figures and sound: the piano roll, the player in the page."""

from lib.show.listen import player
from lib.show.plots import figure, piano_roll, show, style
