"""Plausible wrong answers to the exercises of notebook 11:
each is refused, in words that say what is wrong.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "11.1": [
        (
            "a write fades at its own step",
            """
            length = len(log_decay)
            mask = torch.zeros(length, length, dtype=log_decay.dtype)
            for t in range(length):
                for s in range(t + 1):
                    mask[t, s] = torch.exp(log_decay[s : t + 1].sum())
            return mask
            """,
            "a write fades at its own step: the diagonal is",
        ),
        (
            "the step of the read does not count",
            """
            length = len(log_decay)
            mask = torch.zeros(length, length, dtype=log_decay.dtype)
            for t in range(length):
                for s in range(t + 1):
                    mask[t, s] = torch.exp(log_decay[s + 1 : t].sum())
            return mask
            """,
            "what step 1 reads of step 0 is 1.000, and should be exp(log_decay[1]) = 0.368",
        ),
        (
            "the future is read, too",
            """
            totals = log_decay.cumsum(0)
            return torch.exp(totals[:, None] - totals)
            """,
            "above the diagonal the mask must be zero",
        ),
        (
            "rows and columns change places",
            """
            totals = log_decay.cumsum(0)
            return torch.exp(totals[:, None] - totals).tril().T
            """,
            "above the diagonal the mask must be zero",
        ),
        (
            "differences of totals in float32",
            """
            totals = log_decay.cumsum(0)
            return torch.exp(totals[:, None] - totals).tril()
            """,
            "is it a difference of two totals in float32?",
        ),
        (
            "only the last step fades",
            """
            mask = torch.exp(log_decay)[:, None].expand(-1, len(log_decay)).tril(-1)
            return mask + torch.eye(len(log_decay), dtype=mask.dtype)
            """,
            "every step after the write fades it once",
        ),
        (
            "a mask of one row",
            """
            return torch.exp(log_decay.cumsum(0))
            """,
            "the mask has the shape (5,), and should have (5, 5)",
        ),
    ],
    "11.2": [
        (
            "the second part is of the same step",
            """
            return lam * delta + (1 - lam) * delta
            """,
            "at step 0 the trapezium is",
        ),
        (
            "the second part is of the step before",
            """
            weights = lam * delta
            weights[1:] += ((1 - lam) * delta)[:-1]
            return weights
            """,
            "at step 0 the trapezium is",
        ),
        (
            "lam of this step, delta of the next",
            """
            weights = lam * delta
            weights[:-1] += (1 - lam[:-1]) * delta[1:]
            return weights
            """,
            "at step 0 the trapezium is",
        ),
        (
            "the first part alone",
            """
            return lam * delta
            """,
            "at step 0 the trapezium is",
        ),
        (
            "the last step is followed by the first",
            """
            return lam * delta + ((1 - lam) * delta).roll(-1)
            """,
            "at the last step, after which nothing comes,",
        ),
        (
            "lam itself is changed",
            """
            lam *= delta
            lam[:-1] += (delta - lam)[1:]
            return lam
            """,
            "delta or lam has changed: make a new tensor",
        ),
        (
            "one weight too few",
            """
            return (lam * delta)[:-1] + ((1 - lam) * delta)[1:]
            """,
            "the weights have the shape (11,), and should have (12,)",
        ),
    ],
    "11.3": [
        (
            "half the angle",
            """
            turn = torch.pi / beats
            state = torch.exp(1j * turn * notes.double()).cumprod(0)
            return (torch.angle(state) / (2 * turn)).round().long() % beats
            """,
            "in bars of 2",
        ),
        (
            "a silence turns, too",
            """
            turn = 2 * torch.pi / beats
            state = torch.exp(1j * turn * torch.ones(len(notes)).double()).cumprod(0)
            return (torch.angle(state) / turn).round().long() % beats
            """,
            "silences, it is beat",
        ),
        (
            "turned the other way, read as it stands",
            """
            turn = 2 * torch.pi / beats
            state = torch.exp(-1j * turn * notes.double()).cumprod(0)
            return (torch.angle(state) / turn).round().long() % beats
            """,
            "in bars of 3, after 1 notes",
        ),
        (
            "cut off, not rounded",
            """
            turn = 2 * torch.pi / beats
            state = torch.exp(1j * turn * notes.double()).cumprod(0)
            return (torch.angle(state) / turn).long() % beats
            """,
            "it is beat",
        ),
        (
            "before the step, not after it",
            """
            turn = 2 * torch.pi / beats
            state = torch.exp(1j * turn * notes.double()).cumprod(0)
            found = (torch.angle(state) / turn).round().long() % beats
            return torch.cat([torch.zeros(1).long(), found[:-1]])
            """,
            "in bars of 2, after 1 notes",
        ),
        (
            "always a waltz",
            """
            state = torch.exp(2j * torch.pi / 3 * notes.double()).cumprod(0)
            return (torch.angle(state) * 3 / (2 * torch.pi)).round().long() % 3
            """,
            "in bars of 2",
        ),
        (
            "counted from one",
            """
            return notes.cumsum(0) % beats + 1
            """,
            "it is beat",
        ),
        (
            "where it ends",
            """
            return notes.sum() % beats
            """,
            "the beats have the shape (), and should have (1,)",
        ),
    ],
}
