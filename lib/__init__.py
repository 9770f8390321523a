"""The package behind the course *Music with state spaces*: eight rooms, in the order in which data flows.

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
