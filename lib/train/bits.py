"""How good is it? Bits per note of held-out pieces, and `python -m lib.lab.judge DIR` for playing.

Bits per note can be compared between tokenizers of the same time grid; loss per token cannot. What
was played is set beside real music and beside noise (`lib.lab.judge.anchors`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.model import MambaLM
from lib.music.notes import read_midi
from lib.music.streams import Piece, Streams


@torch.inference_mode()
def piece_bits(
    model,
    streams: Streams,
    pieces: list[Piece],
    *,
    batch: int = 16,
    segment: int = 512,
    progress: bool = False,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """Bits that each whole piece costs the model, float64 of shape (pieces,).

    Every token after BOS is predicted once, EOS included, with all that came before it: the
    state is carried from segment to segment. The sum over a piece is exact for the tokens given;
    with byte-pair encoding it is an upper bound for the music, which has other spellings.
    """
    from tqdm import tqdm

    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].length)
    bits = np.zeros(len(pieces))
    total = sum(p.length for p in pieces)
    bar = tqdm(total=total, desc="evaluating", unit="token", unit_scale=True, disable=not progress)
    with bar, judging(model):
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            side_by_side = [pieces[i] for i in rows]
            for nats in _segments(model, streams, side_by_side, segment, autocast):
                for row, value in zip(rows, nats):
                    bits[row] += value / math.log(2)
                bar.update(len(nats) * segment)
    return bits


@contextmanager
def judging(model) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _segments(
    model, streams: Streams, pieces: list[Piece], segment: int, autocast: torch.dtype | None
) -> Iterator[list[float]]:
    """Read pieces side by side, a segment after another; yields each one's nats in it.

    Pieces come longest first, so that rows which have ended are dropped from the batch's end.
    """
    state = model.new_state(len(pieces))
    alive = len(pieces)
    for begin in range(0, pieces[0].length - 1, segment):
        while pieces[alive - 1].length - 1 <= begin:
            alive -= 1
        state = [tuple(t[:alive] for t in layer) for layer in state]
        tokens, valid = _crop(streams, pieces[:alive], begin, segment)
        tokens = torch.from_numpy(tokens).to(model.device)
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            nats, state = _nats(model, tokens, state)
        nats = nats.view(alive, -1).double().cpu().numpy() * valid
        yield nats.sum(1).tolist()


def _crop(
    streams: Streams, pieces: list[Piece], begin: int, segment: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (rows, segment + 1) from `begin` on, and which of those to predict there are."""
    tokens = np.zeros((len(pieces), segment + 1), np.int64)
    valid = np.zeros((len(pieces), segment), bool)
    for row, piece in enumerate(pieces):
        part = streams.stream(piece)[begin : begin + segment + 1]
        tokens[row, : len(part)] = part
        valid[row, : len(part) - 1] = True
    return tokens, valid


def _nats(model, tokens: Tensor, state) -> tuple[Tensor, list]:
    """What each token after the first costs, in nats, and the state after the last but one."""
    # rivals keep torch's cross entropy: by it the runs that are recorded were judged
    if isinstance(model, MambaLM):
        x, state = model.residual(tokens[:, :-1], state)
        return model.nats(x, tokens[:, 1:]), state
    logits, state = model(tokens[:, :-1], state, return_state=True)
    logits = logits.float().flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none"), state


def bits_per_note(model, streams: Streams, pieces: list[Piece], **options) -> float:
    """All bits over all notes of whole pieces; options as in `piece_bits`."""
    if not pieces:
        raise UserError("there is no piece to evaluate: choose another split")
    bits = piece_bits(model, streams, pieces, **options)
    return float(bits.sum() / sum(p.notes for p in pieces))


def counted_pairs(streams: Streams) -> tuple[np.ndarray, np.ndarray]:
    """P(token), float64 (V,), and P(next token | token), (V, V), counted on the train split.

    Tokens are add-one smoothed; pairs are mixed with them by Witten and Bell's weights.
    """
    vocab = streams.vocab_size
    counts = np.zeros((vocab, vocab))  # of one token behind another
    for piece in streams.select("train"):
        ids = streams.stream(piece).astype(np.int64)
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    unigram = counts.sum(0) + 1
    unigram /= unigram.sum()
    seen = counts.sum(1, keepdims=True)
    kinds = (counts > 0).sum(1, keepdims=True)  # different tokens that were met behind one
    weight = seen / np.maximum(seen + kinds, 1)
    return unigram, weight * counts / np.maximum(seen, 1) + (1 - weight) * unigram


def counting_baselines(streams: Streams, pieces: list[Piece]) -> dict[str, float]:
    """Bits per note of three models that need no training loop, on the same tokens.

    Uniform over the vocabulary, and the unigrams and bigrams of `counted_pairs`.
    """
    unigram, bigram = counted_pairs(streams)
    bits = dict.fromkeys(("uniform", "unigram", "bigram"), 0.0)
    for piece in pieces:
        ids = streams.stream(piece).astype(np.int64)
        bits["uniform"] += (len(ids) - 1) * math.log2(streams.vocab_size)
        bits["unigram"] -= np.log2(unigram[ids[1:]]).sum()
        bits["bigram"] -= np.log2(bigram[ids[:-1], ids[1:]]).sum()
    notes = sum(p.notes for p in pieces)
    return {name: float(value / notes) for name, value in bits.items()}


def interval(
    bits: np.ndarray, notes: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of bits per note over pieces: bits and notes of shape (pieces,)."""
    rows = np.random.default_rng(seed).integers(len(bits), size=(draws, len(bits)))
    means = bits[rows].sum(1) / notes[rows].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def held_out(tokenizer, performances: Sequence, *, progress: bool = False) -> Streams:
    """Token streams, in memory, of performances that need no cache: each whole, BOS to EOS."""
    from tqdm import tqdm

    pieces = []
    arrays = [np.zeros(0, np.uint16)]
    offset = 0
    for p in tqdm(performances, desc="encoding", unit="piece", disable=not progress):
        music = read_midi(p.path)
        ids = tokenizer.encode(music, end=True)
        arrays.append(ids)
        pieces.append(
            Piece(
                p.path.name,
                p.composer,
                p.title,
                p.split,
                0,
                offset,
                len(ids),
                len(music.notes),
                p.seconds,
            )
        )
        offset += len(ids)
    return Streams(np.concatenate(arrays), pieces, tokenizer.vocab_size, tokenizer.bos)
