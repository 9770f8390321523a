"""Plausible wrong answers to the exercises of notebooks 01 and 02:
each is refused, in words that say what is wrong.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "01.1": [
        (
            "a gap of exactly gap divides",
            """
            return min(len(notes), 1) + int((np.diff(notes["start"]) >= gap).sum())
            """,
            "onsets [0, 0.25, 0.5, 1] with gap = 0.25 are 2 events, not 4: "
            "a note that comes exactly",
        ),
        (
            "counts gaps, not events",
            """
            return int((np.diff(notes["start"]) > gap).sum())
            """,
            "onsets [2.0] with gap = 0.03 are 1 events, not 0: a note alone is an event",
        ),
        (
            "one event where there is no note",
            """
            return 1 + int((np.diff(notes["start"]) > gap).sum())
            """,
            "onsets [] with gap = 0.03 are 0 events, not 1: without a note nothing is heard",
        ),
        (
            "from the first note of the event",
            """
            found, first = 0, -np.inf
            for start in notes["start"]:
                if start - first > gap:
                    found, first = found + 1, start
            return found
            """,
            "are 1 events, not 2: each comes 20 ms after the one before it",
        ),
        (
            "gap ignored",
            """
            return min(len(notes), 1) + int((np.diff(notes["start"]) > 0.030).sum())
            """,
            "onsets [0, 0.02] with gap = 0.01 are 2 events, not 1: 20 ms are longer",
        ),
        (
            "distinct onsets",
            """
            return len(set(notes["start"].tolist()))
            """,
            "are 2 events, not 3: only the second comes soon enough",
        ),
    ],
    "01.2": [
        (
            "the keys themselves",
            """
            number = np.zeros(len(pitch) - size + 1, "i8")
            for k in range(size):
                number = number * 88 + pitch[k:k + len(number)] - 21
            return number
            """,
            "an octave higher, the same runs get other numbers",
        ),
        (
            "base 88 kept",
            """
            steps = np.diff(pitch.astype("i8")) + 87
            number = np.zeros(len(pitch) - size + 1, "i8")
            for k in range(size - 1):
                number = number * 88 + steps[k:k + len(number)]
            return number
            """,
            "get the same number: are there 175 digits?",
        ),
        (
            "base 10",
            """
            steps = np.diff(pitch.astype("i8")) + 87
            number = np.zeros(len(pitch) - size + 1, "i8")
            for k in range(size - 1):
                number = number * 10 + steps[k:k + len(number)]
            return number
            """,
            "get the same number: are there 175 digits?",
        ),
        (
            "base 174, one too small",
            """
            steps = np.diff(pitch.astype("i8")) + 87
            number = np.zeros(len(pitch) - size + 1, "i8")
            for k in range(size - 1):
                number = number * 174 + steps[k:k + len(number)]
            return number
            """,
            "the steps (-1, 87) and (0, -87) get the same number",
        ),
        (
            "up or down is lost",
            """
            steps = abs(np.diff(pitch.astype("i8")))
            number = np.zeros(len(pitch) - size + 1, "i8")
            for k in range(size - 1):
                number = number * 175 + steps[k:k + len(number)]
            return number
            """,
            "get the same number",
        ),
        (
            "from the first note only",
            """
            return np.array([pitch[i + size - 1] - pitch[i] for i in range(len(pitch) - size + 1)])
            """,
            "get the same number",
        ),
        (
            "floating point",
            """
            steps = np.diff(pitch.astype(float)) + 87
            number = np.zeros(len(pitch) - size + 1)
            for k in range(size - 1):
                number = number * 175 + steps[k:k + len(number)]
            return number
            """,
            "the steps (87, -87, 87, -87, 87, -87, 39, 0) "
            "and (87, -87, 87, -87, 87, -87, 39, 1) get the same",
        ),
        (
            "a run too few",
            """
            steps = np.diff(pitch.astype("i8")) + 87
            number = np.zeros(len(pitch) - size, "i8")
            for k in range(size - 1):
                number = number * 175 + steps[k:k + len(number)]
            return number
            """,
            "400 pitches have 399 runs of 2, not 398",
        ),
        (
            "its place is in the number",
            """
            steps = np.diff(pitch.astype("i8")) + 87
            number = np.arange(len(pitch) - size + 1)
            for k in range(size - 1):
                number = number * 175 + steps[k:k + len(number)]
            return number
            """,
            "when a melody comes again, its number should come again too",
        ),
    ],
    "02.1": [
        (
            "the first bar begins at two seconds",
            """
            found, bars, now = [], 0, 0.0
            for name in names:
                kind, _, value = name.partition("_")
                bars += kind == "Bar"
                now = 2.0 * bars + int(value) / 100 if kind == "Position" else now
                found += [now] if kind == "Pitch" else []
            return found
            """,
            "Pitch_60 begins at 0.00 s, not at 2.00 s: before it stand Position_0 and 1 times Bar",
        ),
        (
            "bars ignored",
            """
            found, now = [], 0.0
            for name in names:
                kind, _, value = name.partition("_")
                now = int(value) / 100 if kind == "Position" else now
                found += [now] if kind == "Pitch" else []
            return found
            """,
            "Pitch_41 begins at 2.00 s, not at 0.00 s: before it stand Position_0 and 2 times Bar",
        ),
        (
            "an onset a position, not a note",
            """
            found, bars = [], 0
            for name in names:
                kind, _, value = name.partition("_")
                bars += kind == "Bar"
                found += [2.0 * (bars - 1) + int(value) / 100] if kind == "Position" else []
            return found
            """,
            "six notes went in, 5 onsets came out: each `Pitch` is a note",
        ),
        (
            "positions added up",
            """
            found, now = [], 0.0
            for name in names:
                kind, _, value = name.partition("_")
                now += int(value) / 100 if kind == "Position" else 0
                found += [now] if kind == "Pitch" else []
            return found
            """,
            "Pitch_40 begins at 1.99 s, not at 2.30 s",
        ),
        (
            "a step of a millisecond",
            """
            found, bars, now = [], 0, 0.0
            for name in names:
                kind, _, value = name.partition("_")
                bars += kind == "Bar"
                now = 2.0 * (bars - 1) + int(value) / 1000 if kind == "Position" else now
                found += [now] if kind == "Pitch" else []
            return found
            """,
            "Pitch_61 begins at 0.31 s, not at 0.03 s: before it stand Position_31 and 1 times Bar",
        ),
    ],
    "02.2": [
        (
            "plain recursion",
            """
            if not row:
                return 1
            return sum(spellings(row[len(word):], vocabulary) for word in vocabulary if row[:len(word)] == word)
            """,
            "stopped after 1 seconds. Does a loop never end, "
            "or does one more item double the work?",
        ),
        (
            "a greedy reader",
            """
            while row:
                word = max((w for w in vocabulary if row[:len(w)] == w), key=len, default=None)
                if word is None:
                    return 0
                row = row[len(word):]
            return 1
            """,
            "PVD with the merges (PV) can be cut in 2 ways (P·V·D, PV·D), and you count 1",
        ),
        (
            "merges of two only",
            """
            ways = [1]
            for n in range(1, len(row) + 1):
                ways.append(sum(ways[n - k] for k in (1, 2) if k <= n and row[n - k:n] in vocabulary))
            return ways[-1]
            """,
            "PVD with the merges (PV PVD) can be cut in 3 ways (P·V·D, PV·D, PVD), and you count 2",
        ),
        (
            "base tokens are taken for granted",
            """
            ways = [1]
            for n in range(1, len(row) + 1):
                longer = [word for word in vocabulary if len(word) > 1 and row[:n][-len(word):] == word]
                ways.append(ways[-1] + sum(ways[n - len(word)] for word in longer))
            return ways[-1]
            """,
            "PVX with the merges (PV) can be cut in 0 ways (), and you count 2",
        ),
        (
            "one merge at a time",
            """
            if any((token,) not in vocabulary for token in row):
                return 0
            return 1 + sum(row[i:i + len(w)] == w for w in vocabulary if len(w) > 1 for i in range(len(row)))
            """,
            "PVPV with the merges (PV) can be cut in 4 ways "
            "(P·V·P·V, PV·P·V, P·V·PV, PV·PV), and you count 3",
        ),
        (
            "nothing has no spelling",
            """
            ways = [1]
            for n in range(1, len(row) + 1):
                ways.append(sum(ways[n - len(word)] for word in vocabulary if row[:n][-len(word):] == word))
            return ways[-1] if row else 0
            """,
            "a row without tokens has one spelling: the one without words",
        ),
    ],
}
