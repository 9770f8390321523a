"""Plausible wrong answers to the exercises of notebooks 03, 04 and 07:
each is refused in words that help.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "03.1": [
        (
            "twice as fast",
            "return complex(-math.log(2) / half_life, 4 * math.pi * frequency)",
            "it swings 2.00 times a second, and should 1.00 times",
        ),
        (
            "three times as fast",
            "return complex(-math.log(2) / half_life, 6 * math.pi * frequency)",
            "it swings 3.00 times a second",
        ),
        (
            "turns for radians",
            "return complex(-math.log(2) / half_life, frequency)",
            "it swings 0.16 times a second",
        ),
        (
            "backwards",
            "return complex(-math.log(2) / half_life, -2 * math.pi * frequency)",
            "it swings -1.00 times a second",
        ),
        (
            "to 1/e and not to a half",
            "return complex(-1 / half_life, 2 * math.pi * frequency)",
            "after 1.5 s 0.368 of the swing is left, and should be a half",
        ),
        (
            "grows",
            "return complex(math.log(2) / half_life, 2 * math.pi * frequency)",
            "after 1.5 s 2.000 of the swing",
        ),
        (
            "two numbers and not one",
            "return -math.log(2) / half_life, 2 * math.pi * frequency",
            "it returns two numbers: complex(real, imaginary) makes one of them",
        ),
        (
            "times the half-life",
            "return complex(-math.log(2) * half_life, 2 * math.pi * frequency)",
            "after 1.5 s 0.210 of the swing is left",
        ),
        (
            "what a second does, not a",
            """
            return np.exp(complex(-math.log(2) / half_life, 2 * math.pi * frequency))""",
            "after 1.5 s 2.573 of the swing is left",
        ),
        (
            "decay and swing in each other's place",
            "return complex(2 * math.pi * frequency, -math.log(2) / half_life)",
            "of the swing is left, and should be a half",
        ),
    ],
    "03.2": [
        (
            "only the first echo",
            """
            K = torch.zeros(length)
            K[0] = 1
            if delay < length:
                K[delay] = gain
            return K""",
            "14 steps after a push of 1 one hears 0.360, and K[14] is 0.000",
        ),
        (
            "without the sound itself",
            """
            K = torch.zeros(length)
            K[::delay] = gain ** torch.arange(1, len(K[::delay]) + 1).float()
            return K""",
            "0 steps after a push of 1 one hears 1.000, and K[0] is 0.600",
        ),
        (
            "multiples of the gain, not powers",
            """
            K = torch.zeros(length)
            K[::delay] = gain * torch.arange(len(K[::delay])).float()
            K[0] = 1
            return K""",
            "14 steps after a push of 1 one hears 0.360, and K[14] is 1.200",
        ),
        (
            "a step too early",
            """
            K = torch.zeros(length)
            K[0] = 1
            for n in range(1, length):
                if n * delay - 1 < length and n * delay > 1:
                    K[n * delay - 1] = gain ** n
            return K""",
            "6 steps after a push of 1 one hears 0.000, and K[6] is 0.600",
        ),
        (
            "too long",
            "return torch.zeros(2 * length)",
            "K has the shape (200,), and should have (100,)",
        ),
        (
            "a list",
            "return [gain ** (t // delay) if t % delay == 0 else 0.0 for t in range(length)]",
            "K is a list, and should be a tensor",
        ),
        (
            "all echoes equally strong",
            """
            K = torch.zeros(length)
            K[::delay] = gain
            K[0] = 1
            return K""",
            "14 steps after a push of 1 one hears 0.360, and K[14] is 0.600",
        ),
        (
            "it never stops sounding between",
            "return gain ** (torch.arange(length) // delay).float()",
            "1 steps after a push of 1 one hears 0.000, and K[1] is 1.000",
        ),
        (
            "the past first",
            """
            K = torch.zeros(length)
            K[::delay] = gain ** torch.arange(len(K[::delay])).float()
            return K.flip(0)""",
            "0 steps after a push of 1 one hears 1.000",
        ),
    ],
    "04.1": [
        (
            "time stands still, and nothing enters",
            "return torch.where(pedal, 0.0, 1.0), torch.ones(len(pedal))",
            "with the pedal down",
        ),
        (
            "the pedal upside down",
            """
            delta = torch.where(pedal, 1.0, 1e-6)
            return delta, 1 / delta""",
            "the state is",
        ),
        (
            "B left at one",
            "return torch.where(pedal, 1e-6, 1.0), torch.ones(len(pedal))",
            "with the pedal down",
        ),
        (
            "an infinite B",
            """
            delta = torch.where(pedal, 0.0, 1.0)
            return delta, 1 / delta""",
            "a Δ or a B is infinite, or not a number",
        ),
        (
            "a pedal that leaks",
            """
            delta = torch.where(pedal, 0.05, 1.0)
            return delta, 1 / delta""",
            "with the pedal down",
        ),
        (
            "Δ and no B",
            "return torch.where(pedal, 1e-6, 1.0)",
            "it returns one tensor, and should return two, Δ and B",
        ),
        (
            "one B for all",
            "return torch.where(pedal, 1e-6, 1.0), 1.0",
            "B should be a tensor of 40 numbers, one for each position",
        ),
        (
            "a little back in time",
            """
            delta = torch.where(pedal, -1e-6, 1.0)
            return delta, 1 / delta""",
            "a Δ is negative, and time would run backwards",
        ),
        (
            "a half-life for a step, as if A were -1",
            """
            delta = torch.where(pedal, 1e-6, torch.tensor(2.0).log())
            return delta, 1 / delta""",
            "with the pedal up",
        ),
        (
            "the pedal of the position before",
            """
            delta = torch.where(pedal.roll(1), 1e-6, 1.0)
            return delta, 1 / delta""",
            "the state is",
        ),
        (
            "as the zero-order hold would have it",
            """
            delta, a = torch.where(pedal, 1e-6, 1.0), -torch.tensor(2.0).log()
            return delta, a / torch.expm1(delta * a)""",
            "with the pedal up",
        ),
    ],
    "04.2": [
        (
            "a list of Python and no gate",
            """
            found = torch.full_like(tokens, -1)
            for row, line in enumerate(tokens.tolist()):
                notes = []
                for t, token in enumerate(line):
                    notes += [token] if token < 8 else []
                    found[row, t] = notes[-2] if len(notes) > 1 else -1
            return found, found""",
            "delta has the shape (20, 64), and should have (20, 64, 2)",
        ),
        (
            "both channels take every note",
            """
            return 50.0 * (tokens < 8)[..., None].expand(*tokens.shape, 2), (heard + 1) % 2""",
            "a note opens both channels: the last note but one is then lost",
        ),
        (
            "asks for the last note",
            """
            turn = torch.stack([(tokens < 8) & (heard % 2 == k) for k in (0, 1)], -1)
            return 50.0 * turn, heard % 2""",
            "and the channel that you ask holds",
        ),
        (
            "a gate that opens half",
            """
            turn = torch.stack([(tokens < 8) & (heard % 2 == k) for k in (0, 1)], -1)
            return 1.0 * turn, (heard + 1) % 2""",
            "and the channel that you ask holds",
        ),
        (
            "takes turns at rests too",
            """
            turn = torch.stack([heard % 2 == k for k in (0, 1)], -1)
            return 50.0 * turn, (heard + 1) % 2""",
            "where there is no note a Δ is 50: what is held fades",
        ),
        (
            "one channel for all",
            """
            turn = torch.stack([tokens < 8, torch.zeros_like(tokens, dtype=torch.bool)], -1)
            return 50.0 * turn, torch.zeros_like(heard)""",
            "and the channel that you ask holds",
        ),
        (
            "no word on which to ask",
            """
            return 50.0 * torch.stack([(tokens < 8) & (heard % 2 == k) for k in (0, 1)], -1)""",
            "it returns one tensor, and should return two, delta and ask",
        ),
        (
            "a list of channels",
            """
            return [50.0 * ((tokens < 8) & (heard % 2 == k)) for k in (0, 1)], (heard + 1) % 2""",
            "delta is a list, and should be a tensor",
        ),
        (
            "the number of a note for a channel",
            """
            turn = torch.stack([(tokens < 8) & (heard % 2 == k) for k in (0, 1)], -1)
            return 50.0 * turn, heard - 1""",
            "ask holds 2, and there are only the channels 0 and 1",
        ),
        (
            "the last note, asked for by yes and no",
            """
            turn = torch.stack([(tokens < 8) & (heard % 2 == k) for k in (0, 1)], -1)
            return 50.0 * turn, heard % 2 == 1""",
            "and the channel that you ask holds",
        ),
        (
            "by pitch and not by turn",
            """
            turn = torch.stack([(tokens < 8) & (tokens % 2 == k) for k in (0, 1)], -1)
            return 50.0 * turn, (heard + 1) % 2""",
            "and the channel that you ask holds",
        ),
    ],
    "04.3": [
        (
            "the main diagonal only",
            "return float((m.diagonal().max() - m.diagonal().min()) / m.abs().max())",
            "one entry just below it: it gives 0, and should give 0.25",
        ),
        (
            "the upper triangle",
            """
            spread = [m.diagonal(lag).max() - m.diagonal(lag).min() for lag in range(len(m))]
            return float(max(spread) / m.abs().max())""",
            "one entry just below it: it gives 0, and should give 0.25",
        ),
        (
            "rows for diagonals",
            "return float((m.max(1).values - m.min(1).values).max() / m.abs().max())",
            "a convolution, whose entries change only from diagonal to diagonal: it gives",
        ),
        (
            "not a part of the largest",
            """
            return float(max(m.diagonal(-lag).max() - m.diagonal(-lag).min() for lag in range(len(m))))""",
            "should give 0.25",
        ),
        (
            "the largest, not its size",
            """
            spread = [m.diagonal(-lag).max() - m.diagonal(-lag).min() for lag in range(len(m))]
            return float(max(spread) / m.max())""",
            "it gives 0.5, and should give 0.25",
        ),
        (
            "neighbours on the first diagonals",
            """
            spread = [m.diagonal(-lag).max() - m.diagonal(-lag).min() for lag in range(2)]
            return float(max(spread) / m.abs().max())""",
            "one entry two below it: it gives 0, and should give 0.25",
        ),
        (
            "from neighbour to neighbour",
            "return float((m[1:, 1:] - m[:-1, :-1]).abs().max() / m.abs().max())",
            "a main diagonal of [1.0, 2.0, 3.0, 4.0]: it gives 0.25, and should give 0.75",
        ),
        (
            "from the first entry",
            """
            spread = [(m.diagonal(-lag) - m.diagonal(-lag)[0]).abs().max() for lag in range(len(m))]
            return float(max(spread) / m.abs().max())""",
            "a main diagonal of [1.0, 2.0, 0.0, 1.0]: it gives 0.25, and should give 0.5",
        ),
        (
            "sizes without signs",
            """
            m = m.abs()
            spread = [m.diagonal(-lag).max() - m.diagonal(-lag).min() for lag in range(len(m))]
            return float(max(spread) / m.max())""",
            "the sign of one entry: it gives 0, and should give 2",
        ),
        (
            "all diagonals together",
            """
            spread = [m.diagonal(-lag).max() - m.diagonal(-lag).min() for lag in range(len(m))]
            return float(sum(spread) / m.abs().max())""",
            "one entry each on two diagonals: it gives 0.5, and should give 0.25",
        ),
        (
            "yes or no",
            """
            return any(m.diagonal(-lag).max() != m.diagonal(-lag).min() for lag in range(len(m)))""",
            "it gives 1, and should give 0.25",
        ),
    ],
    "07.1": [
        (
            "only the state",
            "return 4 * config.n_layer * config.d_inner * config.d_state",
            "2 layers of 16 channels keep 384 bytes for the convolution and 2048 of state, "
            "2432 in all, and not 2048",
        ),
        (
            "all taps of the convolution",
            "return 4 * config.n_layer * config.d_inner * (config.d_conv + config.d_state)",
            "2432 in all, and not 2560",
        ),
        (
            "the width of the residual",
            """
            return 4 * config.n_layer * config.d_model * (config.d_conv - 1 + config.d_state)""",
            "2432 in all, and not 1216",
        ),
        (
            "numbers for bytes",
            "return config.n_layer * config.d_inner * (config.d_conv - 1 + config.d_state)",
            "2432 in all, and not 608",
        ),
        (
            "the usual expansion",
            """
            return 4 * config.n_layer * 2 * config.d_model * (config.d_conv - 1 + config.d_state)""",
            "3 layers of 18 channels keep",
        ),
    ],
    "07.2": [
        (
            "the mean of means",
            """
            state, means = None, []
            for x, target in zip(tokens[:-1].split(length), tokens[1:].split(length)):
                logits, state = model(x[None], state, return_state=True)
                means.append(F.cross_entropy(logits[0], target).item())
            return sum(means) / len(means)""",
            "the last segment is shorter, so that a mean of means gives it too much weight",
        ),
        (
            "all at once",
            "return F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:]).item()",
            "segments of 1: 49 tokens were read at once",
        ),
        (
            "a fresh state for each segment",
            """
            total = 0.0
            for x, target in zip(tokens[:-1].split(length), tokens[1:].split(length)):
                total += F.cross_entropy(model(x[None])[0], target, reduction="sum").item()
            return total / (len(tokens) - 1)""",
            "does each segment go on from the last one's state",
        ),
        (
            "one token too many in the mean",
            """
            state, total = None, 0.0
            for x, target in zip(tokens[:-1].split(length), tokens[1:].split(length)):
                logits, state = model(x[None], state, return_state=True)
                total += F.cross_entropy(logits[0], target, reduction="sum").item()
            return total / len(tokens)""",
            "has each token but the first its loss?",
        ),
        (
            "targets inside the segment only",
            """
            state, total, count = None, 0.0, 0
            for x in tokens.split(length):
                logits, state = model(x[None], state, return_state=True)
                total += F.cross_entropy(logits[0, :-1], x[1:], reduction="sum").item()
                count += len(x) - 1
            return total / max(count, 1)""",
            "has each token but the first its loss?",
        ),
    ],
    "07.3": [
        (
            "the first row only",
            """
            _, state = model.prefill(prompt[None])
            return model.step(choices[:1], state)[0]""",
            "the logits have the shape (1, 11), and should have (3, 11)",
        ),
        (
            "nothing",
            "return torch.empty(0, 11)",
            "the logits have the shape (0, 11), and should have (3, 11)",
        ),
        (
            "a step for each",
            """
            _, state = model.prefill(prompt[None])
            return torch.cat([model.step(choice[None], state)[0] for choice in choices])""",
            "3 steps were taken, with [1, 1, 1] tokens: one step can take all 3",
        ),
        (
            "the prompt for each",
            """
            rows = [model(torch.cat([prompt, choice[None]])[None])[0, -1] for choice in choices]
            return torch.stack(rows)""",
            "93 tokens were read: the prompt again and again",
        ),
        (
            "a fresh state",
            "return model.step(choices, model.new_state(len(choices)))[0]",
            "row 0 is not what follows the choice 3",
        ),
        (
            "before the choice",
            """
            logits, state = model.prefill(prompt[None])
            state = [tuple(t.expand(len(choices), -1, -1) for t in memory) for memory in state]
            model.step(choices, state)
            return logits.expand(len(choices), -1)""",
            "row 0 is not what follows the choice 3",
        ),
        (
            "one after the other",
            """
            _, state = model.prefill(prompt[None])
            rows = []
            for choice in choices:
                logits, state = model.step(choice[None], state)
                rows.append(logits[0])
            return torch.stack(rows)""",
            "3 steps were taken",
        ),
    ],
}
