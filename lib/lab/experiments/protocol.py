"""The protocol of the experiments, as data: written before the first run and kept in every result.

Same tokens, data order, augmentation and optimiser for every architecture; each searches its own
learning rate and warm-up, on validation pieces. A run ends at a number of steps, on a busy machine
as on an idle one. The test split is read when a run has ended, and nothing is chosen by it.
"""

from dataclasses import dataclass, replace

from lib.lab.rivals.matched import Size
from lib.train.config import TrainConfig

RIVALS = ("lstm", "transformer", "transformer_xl", "s4d", "mamba", "hybrid")


@dataclass(frozen=True)
class Race:
    """Part (a): bits per note of the test split, over seeds and pieces."""

    archs: tuple[str, ...] = (*RIVALS, "mamba2")
    # get all seeds; the first minus the second, at equal tokens, is the primary comparison
    headline: tuple[str, ...] = ("mamba", "transformer", "transformer_xl", "lstm")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    few: int = 3  # seeds of the others
    # tried by each; then twice or half the best, while it lies at the edge
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    widest: int = 3  # times that the rates are widened at one end
    # shares of a run: the rates with the first, then the best rate with the others
    warmups: tuple[float, ...] = (0.1, 0.02)
    trial_tokens: int = 2_500_000  # of each trial
    # The two rules of the whole runs were added while the race was on, when test bits of its first
    # runs were known; what they choose, they choose by validation alone.
    # Bits a note: of trials as near to the best as this, the one with the smallest rate trains a
    # whole run beside the best: Mamba-2, whose trials are alike from 0.008 to 0.064, learned little
    # for most of a whole run at the largest.
    tie: float = 0.1
    # whole runs also try the longest warm-up times this, as that was the best one of all seven
    longer: float = 2.0
    tokens: int = 10_000_000  # of each run
    # shorter runs, first seed: do lines cross?
    budgets: tuple[int, ...] = (1_250_000, 2_500_000, 5_000_000)
    orders: tuple[int, ...] = (2, 3, 4, 5, 6)  # of the n-gram, chosen on validation
    # observations that its next shorter context counts for, per kind; likewise, for each order
    doubts: tuple[float, ...] = (1 / 16, 1 / 4, 1, 4, 16, 64, 256)
    precision: str = "fp32"  # which every processor has: runs of several machines are one race


@dataclass(frozen=True)
class Efficiency:
    """Part (b): time and memory, on models of one size with attention over all that was read."""

    archs: tuple[str, ...] = ("lstm", "transformer", "s4d", "mamba", "hybrid", "mamba2")
    vocabulary: int = 580  # base tokens of the 10 ms grid
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)  # of a training step, batch 1
    positions: tuple[int, ...] = (512, 2048, 8192, 32768)  # at which tokens are generated
    prefill: tuple[int, ...] = (512, 2048, 8192)  # lengths of prompts
    batches: tuple[int, ...] = (1, 4, 16, 64)  # pieces generated side by side
    prompt: int = 2048  # tokens that each of them begins with, as in figure 8 of the Mamba paper
    repeats: int = 5
    tokens: int = 48  # generated in each round
    seconds: float = 2.5  # a slow one gets fewer rounds, though three, where they would take longer
    limit: float = 30.0  # seconds after which an architecture stops growing


@dataclass(frozen=True)
class Context:
    """Part (c): how far back a model looks, on validation pieces."""

    # tokens in reach; only tokens behind the last count
    lengths: tuple[int, ...] = (16, 64, 256, 512, 1024, 2048)
    # positions in the piece at which a bin begins
    bins: tuple[int, ...] = (0, 64, 256, 1024, 4096, 16384)
    tokens: int = 300_000  # of the validation pieces, about


@dataclass(frozen=True)
class Playing:
    """What each model plays after the same opening."""

    prompt_seconds: float = 8.0
    seconds: float = 16.0  # of new music
    seed: int = 0


@dataclass(frozen=True)
class Tokens:
    """Part (d): time grids and byte-pair vocabularies, the same music read by each."""

    grids: tuple[float, ...] = (62.5, 10.0)  # milliseconds
    vocabularies: tuple[int | None, ...] = (None, 1024, 2048, 5000, 20_000)
    notes: int = 1_500_000  # read in training
    measured: int | None = None  # validation pieces, drawn once; None: all


@dataclass(frozen=True)
class Tokenizers:
    """Part (d), second protocol: the same music through each tokenizer, over seeds and pieces."""

    kinds: tuple[str, ...] = ("TSD", "MIDILike")  # beside REMI, on the fine grid, without merges
    vocabularies: tuple[int, ...] = (1024, 5000, 20_000)  # of REMI on the fine grid
    grids: tuple[float, ...] = (62.5,)  # milliseconds; REMI without merges
    notes: tuple[int, ...] = (750_000, 1_500_000)  # read in training, the last is what counts
    seeds: tuple[int, ...] = (0, 1)
    measured: int | None = 40  # validation pieces, drawn once; None: all


@dataclass(frozen=True)
class Original:
    """Part (e): the original's recipe in small, with each repair alone,
    and with all repairs but each.
    """

    size: Size = Size(128, 3, 16)
    pieces: int = 8  # performances that are trained on
    seconds: tuple[float, float] = (150, 900)  # the shortest and the longest of them
    measured: int = 12  # held-out ones, and as many to select on
    passes: int = 12  # over the notes; augmented copies are counted
    every: int = 2  # passes between two looks at the held-out performances
    batch: int = 4
    length: int = (
        256  # tokens of a crop or a chunk; the original's were 1,024, a bar shared by neighbours
    )
    vocabulary: int = 20_000
    repaired_vocabulary: int | None = 1024
    merged: int = 150  # performances that merges are learnt on, beside those trained on
    copies: int = 5  # augmented ones of each performance
    carry: int = 8  # crops that a row reads on, where performances are whole
    dropout: float = 0.1  # and as much weight decay: the regularisation
    # the rate: cut tenfold after each third, or with warm-up and cosine;
    # theirs was 1e-4, for many more steps
    lr: float = 3e-3
    penalty: float = 0.9  # the repetition penalty; 1 is none
    seeds: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Protocol:
    """Everything that is chosen about the experiments at one scale."""

    scale: str
    size: Size
    # what all runs share; the learning rate, the seed and the end are the run's own
    config: TrainConfig
    race: Race = Race()
    efficiency: Efficiency = Efficiency()
    context: Context = Context()
    playing: Playing = Playing()
    tokens: Tokens = Tokens()
    tokenizers: Tokenizers = Tokenizers()
    original: Original = Original()
    grid_ms: float = 10.0  # parts (a) and (c): base tokens, no byte-pair encoding
    piece_seconds: float | None = None  # only the opening of each performance


FOREVER = 1e9  # minutes
SHARED = TrainConfig(
    batch=8,
    length=512,
    carry=8,
    transpose=5,
    louder=2,
    minutes=FOREVER,
    precision="bf16",
    eval_every=120,
    eval_tokens=60_000,
    save_every=120,
)

SCALES = {
    # seconds: ten pieces, to see that everything works; its numbers mean nothing
    "quick": Protocol(
        "quick",
        Size(32, 2, 4, window=64, fixed_state=8),
        TrainConfig(
            batch=4,
            length=64,
            carry=4,
            transpose=5,
            louder=2,
            minutes=FOREVER,
            eval_every=8,
            eval_tokens=500,
            save_every=8,
        ),
        Race(
            archs=("lstm", "transformer", "mamba"),
            headline=("mamba", "transformer"),
            seeds=(0, 1, 2),
            few=1,
            rates=(2e-3, 4e-3, 8e-3),
            trial_tokens=2_000,
            tokens=4_000,
            budgets=(1_000, 2_000),
            orders=(2, 3),
        ),
        Efficiency(
            archs=("transformer", "s4d", "mamba"),
            lengths=(64, 128, 256),
            positions=(32, 64, 128),
            prefill=(32, 64, 128),
            batches=(1, 2),
            prompt=32,
            repeats=3,
            tokens=4,
            seconds=0.2,
        ),
        Context(lengths=(16, 64), bins=(0, 64, 256), tokens=1_000),
        Playing(prompt_seconds=4.0, seconds=2.0),
        Tokens(vocabularies=(None, 1024), notes=1_000),
        Tokenizers(vocabularies=(1024,), notes=(500, 1_000), measured=None),
        Original(
            Size(32, 1, 4),
            pieces=3,
            seconds=(0, 900),
            measured=1,
            passes=4,
            length=64,
            vocabulary=1024,
            repaired_vocabulary=None,
            copies=1,
            seeds=(0, 1),
        ),
        piece_seconds=20.0,
    ),
    # two CPU cores, one for each of two runs side by side (--jobs 2): a million parameters beside
    # the embedding. Small, and of the early part of learning
    "cpu": Protocol(
        "cpu",
        Size(192, 4, 16),
        SHARED,
        tokens=Tokens(vocabularies=(None, 1024, 5000, 20_000), notes=250_000, measured=40),
    ),
    # one large GPU: about 20 million parameters
    "gpu": Protocol(
        "gpu",
        Size(512, 12, 16, window=1024, dropout=0.1),
        TrainConfig(
            batch=32,
            length=1024,
            carry=8,
            transpose=5,
            louder=2,
            minutes=FOREVER,
            eval_every=250,
            eval_tokens=300_000,
            save_every=250,
        ),
        Race(
            trial_tokens=20_000_000,
            tokens=150_000_000,
            budgets=(18_750_000, 37_500_000, 75_000_000),
            precision="bf16",
        ),
        Efficiency(repeats=9, tokens=128),
        Context(lengths=(16, 64, 256, 1024, 2048, 4096)),
        Tokens(notes=10_000_000),
        Tokenizers(notes=(5_000_000, 10_000_000), seeds=(0, 1, 2)),
        Original(pieces=100, passes=40),
    ),
    # the race alone, at the size and the number of steps of the CPU's and four times its tokens:
    # a part of `python -m lib.lab.gpu`
    "hour": Protocol(
        "hour",
        Size(192, 4, 16),
        replace(SHARED, batch=32, eval_every=240, save_every=1000),
        race=Race(
            archs=(*RIVALS, "mamba2", "mamba3"),
            trial_tokens=10_000_000,
            tokens=40_000_000,
            budgets=(5_000_000, 10_000_000, 20_000_000),
            precision="bf16",
        ),
    ),
}
