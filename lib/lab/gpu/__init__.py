"""What only a GPU can show, in thirty minutes of one: `python -m lib.lab.gpu`.

The machine is taken to be bare: torch, Triton and the usual scientific packages, no music library,
no network, ten minutes a call. So everything is prepared at home, carried over in parts, and what
comes of it is carried back in parts. `pack` prepares, `run` measures and goes on where the last
call stopped, `plan` says what is done in which minutes.
"""
