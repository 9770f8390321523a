"""The package behind the course *Music with state spaces*:
eight rooms, in the order in which data flows.

    env        the machine, the folders, the first cell; a user's mistake as one sentence
    music      MAESTRO to notes to tokens to streams
    show       figures and sound
    scan       fixed and selective scans, four backends that agree
    mamba      the block, the model, its checkpoint, one token of it in C++
    train      choices, batches, the loop, its files, bits per note
    generate   what may follow, one token drawn after another, prompts, endless playing
    lab        what only measures and compares

Each room imports only rooms named before it, and no room imports `lab` (tests/test_imports.py).
"""

import os
import signal
import sys


def _stop(*_) -> None:
    """End at once: nothing has begun yet that could be left half done."""
    os.write(2, b"stopped\n")
    os._exit(130)


# A command (`python -m lib.train`) spends its first seconds on imports, before `lib.env.errors.cli`
# watches over it. Python calls it "-m" as long as it looks for its module.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
