"""Plausible wrong answers to the exercises of notebook 08:
each is refused, in words that say what is wrong.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "08.1": [
        (
            "no warm-up",
            """
            return min(1, (1 - progress) / cooldown)
            """,
            "in the warm-up, it gives 1, not 0",
        ),
        (
            "no cool-down",
            """
            return min(1, progress / warmup)
            """,
            "in the cool-down, it gives 1, not 0.25",
        ),
        (
            "the cool-down begins where it should end",
            """
            return min(1, progress / warmup, max(0, 1 - progress / cooldown))
            """,
            "it gives",
        ),
        (
            "a cosine down",
            """
            import math
            down = 0.5 * (1 + math.cos(math.pi * max(0, progress - 1 + cooldown) / cooldown))
            return min(1, progress / warmup) * down
            """,
            "in the cool-down, it gives 0.146, not 0.25",
        ),
        (
            "down to a tenth",
            """
            return min(1, progress / warmup, 0.1 + 0.9 * (1 - progress) / cooldown)
            """,
            "in the cool-down, it gives 0.325, not 0.25",
        ),
    ],
    "08.2": [
        (
            "pieces do not matter",
            """
            return sum(any(abs(a - b) < length for _, b in train) for _, a in validation) / len(validation)
            """,
            "a piece that is in validation alone does not leak",
        ),
        (
            "touching counts",
            """
            leaky = [any(p == q and abs(a - b) <= length for q, b in train) for p, a in validation]
            return sum(leaky) / len(leaky)
            """,
            "chunks that only touch share no token",
        ),
        (
            "only chunks that begin later",
            """
            leaky = [any(p == q and 0 <= a - b < length for q, b in train) for p, a in validation]
            return sum(leaky) / len(leaky)
            """,
            "one token in common is a leak, on either side",
        ),
        (
            "the same first token",
            """
            return sum(chunk in train for chunk in validation) / len(validation)
            """,
            "you find 0.0, it is 0.5",
        ),
        (
            "a count, not a share",
            """
            return sum(any(p == q and abs(a - b) < length for q, b in train) for p, a in validation)
            """,
            "you find 1, it is 0.5",
        ),
    ],
    "08.3": [
        (
            "the mean of the part",
            """
            return F.cross_entropy(logits, targets, ignore_index=-1)
            """,
            "every real token must weigh the same",
        ),
        (
            "padding is counted",
            """
            return F.cross_entropy(logits, targets.clamp(min=0), reduction="sum") / batch_tokens
            """,
            "and padding nothing",
        ),
        (
            "the sum",
            """
            return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
            """,
            "away from the whole batch's",
        ),
        (
            "the mean over three",
            """
            return F.cross_entropy(logits, targets, ignore_index=-1) / 3
            """,
            "every real token must weigh the same",
        ),
    ],
}
