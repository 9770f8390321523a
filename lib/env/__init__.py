"""The machine, the folders, the first cell; a user's mistake as one sentence."""

from lib.env.errors import UserError
from lib.env.exercises import attempt
from lib.env.machine import UNKNOWN, read_results, start
from lib.env.paths import DATA, RESULTS, ROOT
