"""A training run: its choices, its batches, the loop, its files, and its worth in bits per note."""

from lib.train.batches import Batches, validation_pieces
from lib.train.bits import bits_per_note, counting_baselines
from lib.train.config import PRESETS, TrainConfig
from lib.train.optim import choose_precision, learning_rate, parameter_groups
from lib.train.trainer import Trainer
