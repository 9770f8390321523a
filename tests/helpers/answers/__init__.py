"""Plausible wrong answers to every exercise of the notebooks,
and what the checks must say to them.
"""

from answers import after, data, playing, scans, state_spaces, training

WRONG = data.WRONG | state_spaces.WRONG | scans.WRONG | training.WRONG | playing.WRONG | after.WRONG
