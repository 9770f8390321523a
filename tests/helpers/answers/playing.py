"""Plausible wrong answers to the exercises of notebooks 09 and 10:
each is refused, in words that say what is wrong.
"""

WRONG = {  # exercise: (what is wrong, the answer, what the check must say)
    "09.1": [
        (
            "upside down",
            """
            return math.log(times) / math.log(p / q)
            """,
            "at a temperature of 2.00 the first is 1.732 times as likely, not 9.0: "
            "it should be colder",
        ),
        (
            "no logarithms",
            """
            return p / q / times
            """,
            "at a temperature of 0.33 the first is 27.000 times as likely, not 9.0: "
            "it should be warmer",
        ),
        (
            "always the same",
            """
            return 1.0
            """,
            "at a temperature of 1.00 the first is 3.000 times as likely, not 9.0: "
            "it should be colder",
        ),
        (
            "the probabilities changed places",
            """
            return math.log(q / p) / math.log(times)
            """,
            "you give -0.50, and a temperature is above 0",
        ),
        (
            "odds instead of probabilities",
            """
            return math.log(p / (1 - p) / (q / (1 - q))) / math.log(times)
            """,
            "it should be colder",
        ),
    ],
    "09.2": [
        (
            "the likeliest",
            """
            order = p.argsort(descending=True)
            sums = p[order].cumsum(0)
            kept = torch.zeros_like(p)
            stay = order[sums - p[order] < share]
            kept[stay] = p[stay]
            return kept / kept.sum()
            """,
            "with a share of 0.1 you keep [0], "
            "and [1] have the surprise nearest to the entropy of 1.43 nats",
        ),
        (
            "the least typical",
            """
            surprise = -p.log()
            order = (surprise - (p * surprise).sum()).abs().argsort(descending=True)
            sums = p[order].cumsum(0)
            kept = torch.zeros_like(p)
            stay = order[sums - p[order] < share]
            kept[stay] = p[stay]
            return kept / kept.sum()
            """,
            "you keep [4, 5], and [1] have the surprise nearest",
        ),
        (
            "the entropy in bits",
            """
            surprise = -p.log()
            order = (surprise + (p * p.log2()).sum()).abs().argsort()
            sums = p[order].cumsum(0)
            kept = torch.zeros_like(p)
            stay = order[sums - p[order] < share]
            kept[stay] = p[stay]
            return kept / kept.sum()
            """,
            "have the surprise nearest to the entropy of 1.43 nats",
        ),
        (
            "the token that reaches the share is dropped",
            """
            surprise = -p.log()
            order = (surprise - (p * surprise).sum()).abs().argsort()
            kept = torch.zeros_like(p)
            stay = order[p[order].cumsum(0) <= share]
            kept[stay] = p[stay]
            return kept / kept.sum()
            """,
            "with a share of 0.1 you keep too few, [] and not [1]: the one that reaches it stays",
        ),
        (
            "one token too many",
            """
            surprise = -p.log()
            order = (surprise - (p * surprise).sum()).abs().argsort()
            count = int((p[order].cumsum(0) < share).sum()) + 2
            kept = torch.zeros_like(p)
            kept[order[:count]] = p[order[:count]]
            return kept / kept.sum()
            """,
            "with a share of 0.1 you keep too many, [0, 1] and not [1]: "
            "the share is reached before",
        ),
        (
            "not divided by the sum",
            """
            surprise = -p.log()
            order = (surprise - (p * surprise).sum()).abs().argsort()
            sums = p[order].cumsum(0)
            kept = torch.zeros_like(p)
            stay = order[sums - p[order] < share]
            kept[stay] = p[stay]
            return kept
            """,
            "what you keep of a share of 0.1 sums to 0.20, not to 1",
        ),
        (
            "all that stay are equally likely",
            """
            surprise = -p.log()
            order = (surprise - (p * surprise).sum()).abs().argsort()
            kept = torch.zeros_like(p)
            kept[order[p[order].cumsum(0) - p[order] < share]] = 1
            return kept / kept.sum()
            """,
            "what stays keeps its odds, [",
        ),
    ],
    "09.3": [
        (
            "the lowest bits first",
            """
            out = [ticks & 0x7F]
            while ticks := ticks >> 7:
                out.append(0x80 | ticks & 0x7F)
            return bytes(out)
            """,
            "0x80 is 8100, not 0081: the eighth bit needs a byte of its own, which comes first",
        ),
        (
            "no top bits",
            """
            out = [ticks & 0x7F]
            while ticks := ticks >> 7:
                out.append(ticks & 0x7F)
            return bytes(reversed(out))
            """,
            "0x80 is 8100, not 0100: the eighth bit needs a byte of its own",
        ),
        (
            "the top bit in the last byte too",
            """
            out = [0x80 | ticks & 0x7F]
            while ticks := ticks >> 7:
                out.append(0x80 | ticks & 0x7F)
            return bytes(reversed(out))
            """,
            "0x0 is 00, not 80: no time at all is a byte too",
        ),
        (
            "nothing for zero",
            """
            out = []
            while ticks:
                out.append((0x80 if out else 0) | ticks & 0x7F)
                ticks >>= 7
            return bytes(reversed(out))
            """,
            "0x0 is 00, not nothing: no time at all is a byte too",
        ),
        (
            "two bytes at most",
            """
            return bytes([0x80 | ticks >> 7 & 0x7F, ticks & 0x7F]) if ticks > 0x7F else bytes([ticks])
            """,
            "0xfffffff is ffffff7f, not ff7f: 28 bits fill four bytes",
        ),
        (
            "eight bits a byte",
            """
            return ticks.to_bytes(max(1, (ticks.bit_length() + 7) // 8), "big")
            """,
            "0x80 is 8100, not 80",
        ),
        (
            "a list",
            """
            out = [ticks & 0x7F]
            while ticks := ticks >> 7:
                out.append(0x80 | ticks & 0x7F)
            return out[::-1]
            """,
            "list is not bytes",
        ),
    ],
    "10.1": [
        (
            "rounded up",
            """
            return -(-d_inner * (d_state + d_conv - 1) // (2 * width))
            """,
            "16 tokens need 2,048 numbers and 17 need 2,176, so it is 17, not 16",
        ),
        (
            "rounded down",
            """
            return d_inner * (d_state + d_conv - 1) // (2 * width)
            """,
            "not yet more",
        ),
        (
            "keys without values",
            """
            return d_inner * (d_state + d_conv - 1) // width + 1
            """,
            "tokens already the cache has",
        ),
        (
            "the convolution is forgotten",
            """
            return d_inner * d_state // (2 * width) + 1
            """,
            "not yet more",
        ),
        (
            "a convolution of four, always",
            """
            return d_inner * (d_state + 3) // (2 * width) + 1
            """,
            "9 tokens need 180 numbers and 10 need 200, so it is 10, not 16",
        ),
        (
            "never outgrown",
            """
            return 1
            """,
            "after 1 tokens the cache has",
        ),
    ],
    "10.2": [
        (
            "one side only",
            """
            signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, len(differences)))
            means = (signs * differences).mean(1)
            return float(((means >= differences.mean()).sum() + 1) / (draws + 1))
            """,
            "p is 1.000 where the other model is better: look at both sides",
        ),
        (
            "the observed mean is not counted",
            """
            signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, len(differences)))
            means = np.abs((signs * differences).mean(1))
            return float((means >= abs(differences.mean())).mean())
            """,
            "p is 0, as if chance could never do it: count the observed mean among the draws",
        ),
        (
            "farther, but not as far",
            """
            signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, len(differences)))
            means = np.abs((signs * differences).mean(1))
            return float(((means > abs(differences.mean())).sum() + 1) / (draws + 1))
            """,
            "with one piece either sign is as far from 0 as the observed mean: p is 1, not 0.000",
        ),
        (
            "pieces change places, not signs",
            """
            random = np.random.default_rng(seed)
            means = np.abs([random.permutation(differences).mean() for _ in range(draws)])
            return float(((means >= abs(differences.mean()) - 1e-12).sum() + 1) / (draws + 1))
            """,
            "half a standard deviation over 100 pieces is no chance, and p is 1.000",
        ),
        (
            "pieces drawn again",
            """
            random = np.random.default_rng(seed)
            means = np.abs(random.choice(differences, size=(draws, len(differences))).mean(1))
            return float(((means >= abs(differences.mean())).sum() + 1) / (draws + 1))
            """,
            "half a standard deviation over 100 pieces is no chance, and p is 0.",
        ),
        (
            "all signs flip together",
            """
            signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, 1))
            means = np.abs((signs * differences).mean(1))
            return float(((means >= abs(differences.mean())).sum() + 1) / (draws + 1))
            """,
            "half a standard deviation over 100 pieces is no chance, and p is 1.000",
        ),
    ],
    "10.3": [
        (
            "absolute least squares",
            """
            n = n.astype(float)
            a, b = np.linalg.lstsq(np.stack([n, n**2], 1), t, rcond=None)[0]
            return a, b, a / b
            """,
            "is it the relative error that you make small?",
        ),
        (
            "through the last two points",
            """
            n = n.astype(float)
            a, b = np.linalg.solve(np.stack([n[-2:], n[-2:] ** 2], 1), t[-2:])
            return a, b, a / b
            """,
            "is it the relative error that you make small?",
        ),
        (
            "through the first and the last point",
            """
            n = n.astype(float)[[0, -1]]
            a, b = np.linalg.solve(np.stack([n, n**2], 1), t[[0, -1]])
            return a, b, a / b
            """,
            "is it the relative error that you make small?",
        ),
        (
            "the quotient upside down",
            """
            n = n.astype(float)
            a, b = np.linalg.lstsq(np.stack([n / t, n**2 / t], 1), np.ones(len(n)), rcond=None)[0]
            return a, b, b / a
            """,
            "both parts are equal at N = a / b =",
        ),
        (
            "a constant part too",
            """
            n = n.astype(float)
            a, b, _ = np.linalg.lstsq(np.stack([n / t, n**2 / t, 1 / t], 1), np.ones(len(n)), rcond=None)[0]
            return a, b, a / b
            """,
            "is it the relative error that you make small?",
        ),
    ],
}
