"""Play: continue a MIDI file or start from nothing (`python -m lib.generate`).

The prompt is read once; then every token costs the same, however long the piece has become,
because all that the model remembers is a state of constant size.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import mamba, mamba_cpu
from lib.data import DATA
from lib.errors import UserError
from lib.notes import Music, read_midi, write_midi
from lib.tokens import BAR, BEAT, Tokenizer, first_seconds

MODEL = DATA / "model"
LONGEST = 3600  # seconds that one call may play
FINGERS = 10  # keys that may be struck at one instant

# What may follow what in REMI. "start" is BOS; "mark" is the token that stands for no music and
# that byte-pair encoding writes once, before the first bar.
FOLLOWS = {"start": {"mark", "Bar"}, "mark": {"Bar"}, "Bar": {"Bar", "Position"}, "Position": {"Pitch"}, "Pitch": {"Velocity"},
           "Velocity": {"Duration"}, "Duration": {"Pitch", "Position", "Bar"}}


@dataclass(frozen=True)
class Sampling:
    """How one token is drawn from the model's distribution. The filters apply in this order."""

    temperature: float = 1.0  # below 1: safer, above 1: wilder; 0 takes the likeliest
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 0.95  # keep the likeliest tokens that make up this much probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest

    def __post_init__(self):
        if not (0 <= self.temperature <= 10 and math.isfinite(self.temperature)):
            raise UserError(f"temperature {self.temperature} is outside 0 to 10: 1 is the model's own")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative: give 0 for all tokens, or a count")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is outside 0 to 1: give 1 for all tokens")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min-p {self.min_p} is outside 0 to 1: give 0 for all tokens")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits of shape (V,), -inf where forbidden, to the probabilities that are drawn from."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        p, order = torch.softmax(logits / self.temperature, -1).sort(descending=True, stable=True)
        if self.top_k:
            p[self.top_k :] = 0
        p[(p.cumsum(0) - p) >= self.top_p * p.sum()] = 0  # the likeliest token always stays
        p[p < self.min_p * p[0]] = 0
        return torch.zeros_like(p).scatter_(0, order, p / p.sum())


class Grammar:
    """Keeps a token sequence decodable and knows its clock.

    Tokens of merged kinds are looked into: what a token begins with must be allowed after what
    the last one ended with, positions inside a bar must increase, and at one instant no key is
    struck twice and no more than ten are struck.
    """

    def __init__(self, tokenizer: Tokenizer):
        if tokenizer.config.pedal == "tokens":
            raise UserError("playing needs a tokenizer without pedal tokens: build one with pedal='extend'")
        size = tokenizer.vocab_size
        self.grid = BEAT / tokenizer.config.steps
        self.ends, self.moves, begins = [], [], []
        first_position = torch.full((size,), 1_000_000)
        self.strikes = torch.zeros(size, 128, dtype=torch.bool)  # keys struck where the clock stands
        for i, names in enumerate(tokenizer.pieces):
            kinds = [n.split("_")[0] for n in names]
            begins.append(kinds[0] if kinds else "mark")  # BOS, EOS and PAD follow nothing: never drawn
            self.ends.append("mark" if not kinds else kinds[-1] if kinds[-1] in FOLLOWS else "start")
            bars, position, struck = 0, None, set()  # how the token moves the clock; keys struck then
            for kind, name in zip(kinds, names):
                if kind == "Bar":
                    bars, position, struck = bars + 1, -1, set()
                elif kind == "Position":
                    if position is None:  # the first one must lie behind where the clock stands
                        first_position[i] = int(name.split("_")[1])
                    position, struck = int(name.split("_")[1]), set()
                elif kind == "Pitch":
                    struck.add(int(name.split("_")[1]))
                    self.strikes[i, int(name.split("_")[1])] |= position is None
            self.moves.append((bars, position, struck))
        self.first_position = first_position
        self.allowed = {end: torch.tensor([b in kinds for b in begins]) for end, kinds in FOLLOWS.items()}
        self.end, self.bar, self.position, self.struck = "start", -1, -1, set()

    def read(self, token: int) -> None:
        """Move on by one token."""
        bars, position, struck = self.moves[token]
        self.bar += bars
        self.struck = self.struck | struck if position is None else struck
        self.position = self.position if position is None else position
        self.end = self.ends[token]

    def wait(self, until: float, bar_token: int) -> list[int]:
        """Let the clock run on in silence: no onset before `until` seconds.

        Returns the bar lines that this takes, as tokens for the model to read too.
        """
        bars = [bar_token] * max(0, int(until / BAR + 1e-9) - max(self.bar, -1))
        for token in bars:
            self.read(token)
        self.position = max(self.position, math.ceil((until - self.bar * BAR) / self.grid - 1e-6) - 1)
        self.end = "Bar"  # a new position or a new bar; no further note at the last onset
        return bars

    @property
    def seconds(self) -> float:
        """Where the last onset is."""
        return max(self.bar, 0) * BAR + max(self.position, 0) * self.grid

    def mask(self, logits: Tensor) -> Tensor:
        """-inf for every token that may not come next; logits of shape (V,)."""
        good = self.allowed[self.end] & (self.first_position > self.position)
        if self.struck:
            good &= ~self.strikes[:, list(self.struck)].any(1)
        if len(self.struck) >= FINGERS:
            good &= ~self.allowed["Position"]  # nothing that begins with another key
        return logits.masked_fill(~good, -torch.inf)


def load_model(folder: str | Path = MODEL, device: str = "cpu") -> tuple[mamba.MambaLM, Tokenizer]:
    """The shipped model and its tokenizer, or those of another folder."""
    model, tokenizer = mamba.load(folder, device), Tokenizer.load(folder)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(f"the model in {folder} has {model.config.vocab_size} tokens, its tokenizer "
                        f"{tokenizer.vocab_size}: they do not belong together")
    return model, tokenizer


@torch.inference_mode()
def sample(model: mamba.MambaLM, tokenizer: Tokenizer, prompt: np.ndarray, *, until: float,
           begin: float = 0.0, seed: int = 0, sampling: Sampling = Sampling()) -> Iterator[tuple[int, float]]:
    """Tokens that continue `prompt` (uint16 of shape (L,), BOS first) from `begin` to `until` seconds.

    Yields each token and the second that it has reached; the first ones are bar lines where the
    prompt ends with silence. The end-of-piece token is never drawn.
    """
    grammar = Grammar(tokenizer)
    for token in prompt:
        grammar.read(int(token))
    bars = grammar.wait(begin, tokenizer.base["Bar_None"]) if begin else []
    yield from ((bar, begin) for bar in bars)
    random = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[int(t) for t in prompt] + bars], device=model.device)
    logits, state = model.prefill(ids)
    read = mamba_cpu.reader(model, state)
    for _ in range(int(300 * until) + 1000):  # far more tokens than any music has
        p = sampling.probabilities(grammar.mask(logits[0].float().cpu()))
        token = int(torch.multinomial(p, 1, generator=random))
        grammar.read(token)
        if grammar.seconds >= until:
            return
        yield token, grammar.seconds
        logits = read(torch.tensor([token], device=model.device))


def check_seconds(value: float, name: str) -> None:
    """Raise `UserError` for a length that nobody can play."""
    if not 0 < value <= LONGEST:
        raise UserError(f"{name} {value} is outside 0 to {LONGEST}: choose another length")


def prompt_end(prompt: Music, prompt_seconds: float) -> float:
    """The second at which the continuation begins: a short prompt ends with its last note's onset."""
    last = float(prompt.notes["start"].max()) if len(prompt.notes) else 0.0
    return min(prompt_seconds, last + 0.01)


def generate(model: mamba.MambaLM, tokenizer: Tokenizer, prompt: Music | None = None, *, seconds: float = 30,
             prompt_seconds: float = 10, seed: int = 0, temperature: float = 1.0, top_k: int = 0,
             top_p: float = Sampling.top_p, min_p: float = 0.0,
             progress: Callable[[float], None] | None = None) -> Music:
    """`seconds` of new music, after the first `prompt_seconds` of `prompt` where one is given.

    The music returned begins with that prompt as the tokens keep it. The same arguments give the
    same notes. `progress` is called with the seconds played so far. Raises `UserError` when the
    prompt has no note in its first `prompt_seconds` or an argument is out of range.
    """
    check_seconds(seconds, "seconds")
    check_seconds(prompt_seconds, "prompt-seconds")
    sampling = Sampling(temperature, top_k, top_p, min_p)
    begin, ids = 0.0, np.array([tokenizer.bos], np.uint16)
    if prompt is not None:
        begin = prompt_end(prompt, prompt_seconds)
        ids = first_seconds(tokenizer, prompt, begin)
        if not tokenizer.notes_of[ids].any():
            raise UserError(f"the prompt has no note in its first {prompt_seconds:g} seconds: ask for more "
                            "with --prompt-seconds")
    new = []
    for token, now in sample(model, tokenizer, ids, until=begin + seconds, begin=begin, seed=seed,
                             sampling=sampling):
        new.append(token)
        if progress:
            progress(max(0.0, now - begin))
    notes = tokenizer.decode(np.concatenate([ids, np.array(new, np.uint16)])).notes
    notes = notes[notes["start"] < begin + seconds].copy()
    notes["end"] = np.minimum(notes["end"], begin + seconds)  # the last chord stops with the piece
    return Music(notes)


def main(argv: list[str] | None = None) -> None:
    """Let the Mamba play: a .mid, an .mp3 and a piano roll .png for each variation."""
    from tqdm import tqdm

    from lib.listen import save_mp3
    from lib.plots import save_roll

    parser = argparse.ArgumentParser(prog="python -m lib.generate", description=main.__doc__)
    parser.add_argument("--prompt", help="MIDI file to continue (default: start from nothing)")
    parser.add_argument("--prompt-seconds", type=float, default=10, help="how much of it to read (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="new music to play (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another piece (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder (%(default)s)")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p, help="keep this much probability (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="keep so many tokens, 0 for all (%(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop what is less likely than this share of the "
                        "likeliest (%(default)s)")
    parser.add_argument("--variations", type=int, default=1, help="pieces, with seeds one apart (%(default)s)")
    parser.add_argument("--model", default=MODEL, type=Path, help="folder of a checkpoint (default: the shipped one)")
    parser.add_argument("--out", default="out", type=Path, help="folder for what is played (%(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.variations <= 1000:
        raise UserError(f"variations {args.variations} is outside 1 to 1000: choose how many pieces to play")
    if not 0 <= args.seed < 2**63 - 1000:
        raise UserError(f"seed {args.seed} is outside 0 to 2^63: give a small whole number")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: give a folder with --out")
    check_seconds(args.seconds, "seconds")
    check_seconds(args.prompt_seconds, "prompt-seconds")
    prompt = read_midi(args.prompt) if args.prompt else None
    model, tokenizer = load_model(args.model)
    stem = Path(args.prompt).stem if args.prompt else "new"
    for seed in range(args.seed, args.seed + args.variations):
        with tqdm(total=round(args.seconds, 2), desc=f"playing, seed {seed}", unit="s",
                  bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]") as bar:
            music = generate(model, tokenizer, prompt, seconds=args.seconds, prompt_seconds=args.prompt_seconds,
                             seed=seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                             min_p=args.min_p, progress=lambda now: bar.update(min(now, bar.total) - bar.n))
            bar.update(bar.total - bar.n)
        target = args.out / f"{stem}-seed{seed}"
        begin = prompt_end(prompt, args.prompt_seconds) if prompt else None
        write_midi(music, target.with_name(target.name + ".mid"))
        save_mp3(music, target.with_name(target.name + ".mp3"))
        save_roll(music, target.with_name(target.name + ".png"), prompt_seconds=begin,
                  title=f"{stem}, seed {seed}")
        print(f"{target}.mid, .mp3 and .png: {len(music.notes)} notes in {music.seconds:.0f} s")


if __name__ == "__main__":
    from lib.errors import cli

    cli(main)
