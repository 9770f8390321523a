"""Plausible wrong answers to the exercises of notebooks 05 and 06:
each is refused, in words that say what is wrong.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "05.1": [
        (
            "the last step of a piece forgets, not the first",
            """
            return torch.where(starts.roll(-1, 1)[..., None], 0, a)
            """,
            "row 0, the piece that begins at step 0: its first state is right, "
            "and step 16 forgets too",
        ),
        (
            "a = 1 where a piece begins",
            """
            return torch.where(starts[..., None], 1, a)
            """,
            "row 0, the piece that begins at step 17: "
            "its first state still holds something of the piece before",
        ),
        (
            "the whole piece forgets",
            """
            return torch.where(starts.cumsum(1)[..., None] > 0, 0, a)
            """,
            "row 0, the piece that begins at step 0: its first state is right, "
            "and step 1 forgets too",
        ),
        (
            "the second step forgets too",
            """
            return torch.where((starts | starts.roll(1, 1))[..., None], 0, a)
            """,
            "its first state is right, and step 1 forgets too",
        ),
        (
            "the first row's pieces for all rows",
            """
            return torch.where(starts[:1, :, None], 0, a)
            """,
            "row 1, the piece that begins at step 5: its first state still holds something",
        ),
        (
            "a itself is changed",
            """
            a[starts] = 0
            return a
            """,
            "the `a` that was handed in has changed: make a new one",
        ),
    ],
    "05.2": [
        (
            "the second peak does not fall",
            """
            (a1, b1), (a2, b2) = first, second
            return a1 + a2, max(b1, b2)
            """,
            "take h = 0 to 40; your one step (13, 50) takes it to 50: from silence only b",
        ),
        (
            "falls by its own a",
            """
            (a1, b1), (a2, b2) = first, second
            return a1 + a2, max(b1 - a1, b2)
            """,
            "your one step (13, 47) takes it to 47: from silence only b can be heard",
        ),
        (
            "the wrong way round",
            """
            (a1, b1), (a2, b2) = first, second
            return a1 + a2, max(b1, b2 - a1)
            """,
            "your one step (13, 50) takes it to 50: from silence only b",
        ),
        (
            "the factors are multiplied",
            """
            (a1, b1), (a2, b2) = first, second
            return a1 * a2, max(b1 - a2, b2)
            """,
            "take h = 1000 to 987; your one step (30, 40) takes it to 970: "
            "from a very loud note only a",
        ),
        (
            "the larger fall",
            """
            (a1, b1), (a2, b2) = first, second
            return max(a1, a2), max(b1 - a2, b2)
            """,
            "your one step (10, 40) takes it to 990: from a very loud note only a can be heard",
        ),
        (
            "the join of sums",
            """
            (a1, b1), (a2, b2) = first, second
            return a2 * a1, a2 * b1 + b2
            """,
            "your one step (30, 520) takes it to 520: from silence only b can be heard",
        ),
    ],
    "06.1": [
        (
            "no mask at all",
            """
            offs = tl.arange(0, BLOCK)
            tl.store(y_ptr + offs, tl.associative_scan(tl.load(x_ptr + offs), 0, louder))
            """,
            "the kernel reads x[100], and x has 100 numbers",
        ),
        (
            "the store has no mask",
            """
            offs = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, offs < length, float("-inf"))
            tl.store(y_ptr + offs, tl.associative_scan(x, 0, louder))
            """,
            "the kernel writes y[100], and y has 100 numbers",
        ),
        (
            "far out of bounds",
            """
            offs = 1_000_000 * tl.arange(0, BLOCK)
            tl.store(y_ptr + offs, tl.load(x_ptr + offs, offs < length, 0))
            """,
            "has 100 numbers",
        ),
        (
            "a mask that takes one too many",
            """
            offs = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, offs <= length, float("-inf"))
            tl.store(y_ptr + offs, tl.associative_scan(x, 0, louder), offs <= length)
            """,
            "the kernel reads x[100], and x has 100 numbers",
        ),
        (
            "a mask that takes one too few",
            """
            offs = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, offs < length - 1, float("-inf"))
            tl.store(y_ptr + offs, tl.associative_scan(x, 0, louder), offs < length - 1)
            """,
            "nothing was written to y[99]",
        ),
        (
            "one maximum for all",
            """
            offs = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, offs < length, float("-inf"))
            tl.store(y_ptr + offs, tl.max(x, 0) + tl.zeros_like(x), offs < length)
            """,
            "and the largest of x[0] to x[0] is",
        ),
        (
            "from the end",
            """
            offs = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offs, offs < length, float("-inf"))
            tl.store(y_ptr + offs, tl.associative_scan(x, 0, louder, reverse=True), offs < length)
            """,
            "and the largest of x[0] to x[0] is",
        ),
        (
            "no scan",
            """
            offs = tl.arange(0, BLOCK)
            tl.store(y_ptr + offs, tl.load(x_ptr + offs, offs < length, 0), offs < length)
            """,
            "and the largest of x[0] to x[",
        ),
    ],
    "06.2": [
        (
            "strictly less than a tenth",
            """
            steps = 1
            while 4 * states / steps >= 4 * width / 10:
                steps *= 2
            return steps
            """,
            "16 states, numbers of 10 bytes: with 32 steps in a block the kept states are 5.0%, "
            "and with half as many steps 10.0%, which would do",
        ),
        (
            "no power of two",
            """
            return -(-10 * states // width)
            """,
            "40 is no power of two",
        ),
        (
            "the power of two below",
            """
            steps = 1
            while 2 * steps * width <= 10 * states:
                steps *= 2
            return steps
            """,
            "16 states, numbers of 4 bytes: "
            "with 32 steps in a block the kept states are 12.5% of the bytes",
        ),
        (
            "one array instead of four",
            """
            steps = 1
            while 4 * states / steps > width / 10:
                steps *= 2
            return steps
            """,
            "with 256 steps in a block the kept states are 1.6%, and with half as many steps 3.1%",
        ),
        (
            "states as narrow as the rest",
            """
            steps = 1
            while width * states / steps > 4 * width / 10:
                steps *= 2
            return steps
            """,
            "16 states, numbers of 2 bytes: "
            "with 64 steps in a block the kept states are 12.5% of the bytes",
        ),
        (
            "begins at two",
            """
            steps = 2
            while 4 * states / steps > 4 * width / 10:
                steps *= 2
            return steps
            """,
            "1 states, numbers of 16 bytes: with 2 steps",
        ),
    ],
}
