"""How good is it? Bits per note of held-out pieces, and `python -m lib.lab.judge DIR` for pieces that were played.

Bits per note can be compared between tokenizers of the same time grid; loss per token cannot. What
was played is set beside real music and beside noise (`lib.lab.judge.anchors`).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.mamba.model import MambaLM
from lib.music.streams import Piece, Streams
from lib.music.token_names import count_in, duration_of, kind_of


@torch.inference_mode()
def piece_bits(model, streams: Streams, pieces: list[Piece], *, batch: int = 16, segment: int = 512,
               progress: bool = False, autocast: torch.dtype | None = None) -> np.ndarray:
    """Bits that each whole piece costs the model, float64 of shape (pieces,).

    Every token after BOS is predicted once, EOS included, with all that came before it: the
    state is carried from segment to segment. The sum over a piece is exact for the tokens given;
    with byte-pair encoding it is an upper bound for the music, which has other spellings.
    """
    from tqdm import tqdm

    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].length)
    bits = np.zeros(len(pieces))
    total = sum(p.length for p in pieces)
    with tqdm(total=total, desc="evaluating", unit="token", unit_scale=True, disable=not progress) as bar:
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            for segment_rows, nll in _segments(model, streams, [pieces[i] for i in rows], segment, autocast):
                for row, value in zip(segment_rows, nll):
                    bits[rows[row]] += value / math.log(2)
                bar.update(len(segment_rows) * segment)
    return bits


def _segments(model, streams, pieces, segment, autocast) -> Iterator[tuple[list[int], list[float]]]:
    """Read pieces side by side; yields the rows still going and each one's nats in this segment.

    Pieces come longest first, so that rows which have ended are dropped from the batch's end.
    """
    model.eval()
    state, alive = model.new_state(len(pieces)), len(pieces)
    for begin in range(0, pieces[0].length - 1, segment):
        while pieces[alive - 1].length - 1 <= begin:
            alive -= 1
        state = [tuple(t[:alive] for t in layer) for layer in state]
        tokens = np.zeros((alive, segment + 1), np.int64)
        valid = np.zeros((alive, segment), bool)
        for row, piece in enumerate(pieces[:alive]):
            part = streams.stream(piece)[begin : begin + segment + 1]
            tokens[row, : len(part)] = part
            valid[row, : len(part) - 1] = True
        tokens = torch.from_numpy(tokens).to(model.device)
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            nll, state = _nats(model, tokens, state)
        nll = nll.view(alive, -1).double().cpu().numpy() * valid
        yield list(range(alive)), nll.sum(1).tolist()


def _nats(model, tokens: Tensor, state) -> tuple[Tensor, list]:
    """What each token after the first costs, in nats, and the state after the last but one."""
    if isinstance(model, MambaLM):
        x, state = model.residual(tokens[:, :-1], state)
        return model.nats(x, tokens[:, 1:]), state
    logits, state = model(tokens[:, :-1], state, return_state=True)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"), state


def bits_per_note(model, streams: Streams, pieces: list[Piece], **options) -> float:
    """All bits over all notes of whole pieces; options as in `piece_bits`."""
    if not pieces:
        raise UserError("there is no piece to evaluate: choose another split")
    return float(piece_bits(model, streams, pieces, **options).sum() / sum(p.notes for p in pieces))


def counting_baselines(streams: Streams, pieces: list[Piece]) -> dict[str, float]:
    """Bits per note of three models that need no training loop, on the same tokens.

    Uniform over the vocabulary; unigram and bigram counts of the train split, add-one smoothed
    and, for the bigram, mixed with the unigram by Witten and Bell's weights.
    """
    vocab = streams.vocab_size
    counts = np.zeros((vocab, vocab))
    for piece in streams.select("train"):
        ids = streams.stream(piece).astype(np.int64)
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    unigram = counts.sum(0) + 1
    unigram /= unigram.sum()
    seen, kinds = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
    weight = seen / np.maximum(seen + kinds, 1)
    bigram = weight * counts / np.maximum(seen, 1) + (1 - weight) * unigram
    bits = dict.fromkeys(("uniform", "unigram", "bigram"), 0.0)
    for piece in pieces:
        ids = streams.stream(piece).astype(np.int64)
        bits["uniform"] += (len(ids) - 1) * math.log2(vocab)
        bits["unigram"] -= np.log2(unigram[ids[1:]]).sum()
        bits["bigram"] -= np.log2(bigram[ids[:-1], ids[1:]]).sum()
    notes = sum(p.notes for p in pieces)
    return {name: float(value / notes) for name, value in bits.items()}


def interval(bits: np.ndarray, notes: np.ndarray, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of bits per note over pieces: bits and notes of shape (pieces,)."""
    rows = np.random.default_rng(seed).integers(len(bits), size=(draws, len(bits)))
    means = bits[rows].sum(1) / notes[rows].sum(1)
    return tuple(float(v) for v in np.percentile(means, (2.5, 97.5)))


def held_out(tokenizer, performances: Sequence, *, progress: bool = False) -> Streams:
    """Token streams, in memory, of performances that need no cache: each whole, BOS to EOS."""
    from tqdm import tqdm

    from lib.music.notes import read_midi

    pieces, arrays, offset = [], [], 0
    for p in tqdm(performances, desc="encoding", unit="piece", disable=not progress):
        music = read_midi(p.path)
        ids = tokenizer.encode(music, end=True)
        pieces.append(Piece(p.path.name, p.composer, p.title, p.split, 0, offset, len(ids), len(music.notes),
                            p.seconds))
        arrays.append(ids)
        offset += len(ids)
    return Streams(np.concatenate(arrays) if arrays else np.zeros(0, np.uint16), pieces, tokenizer.vocab_size,
                   tokenizer.bos)


def dequantisation_bits(tokenizer, ids: np.ndarray, *, grid_ms: float = 10.0) -> float:
    """Bits that would say, for every note of these tokens, where within its cell of time it lies, to `grid_ms`.

    A density that is flat within a cell of w ms costs log2(w / grid_ms) bits, for the onset and for the
    duration; long durations have wider cells. Added to the model's own bits this makes the likelihoods
    of tokenizers with different grids comparable. Negative for a grid finer than `grid_ms`.
    """
    grid = tokenizer.config.grid_ms
    onset = count_in(tokenizer.pieces, "Pitch")
    duration = np.zeros(len(tokenizer.pieces))
    for token, names in enumerate(tokenizer.pieces):
        for name in names:
            if kind_of(name) == "Duration":
                _, parts = duration_of(name)  # of a beat of half a second
                duration[token] += math.log2(500 / parts / grid_ms)
    return float(onset[ids].sum() * math.log2(grid / grid_ms) + duration[ids].sum())


def likelihood(model, tokenizer, performances: Sequence, *, progress: bool = False, **options) -> dict:
    """Bits per note of whole performances, on the tokens' own grid and at 10 ms, with 95 % intervals over pieces."""
    streams = held_out(tokenizer, performances, progress=progress)
    if not streams.pieces:
        raise UserError("there is no piece to evaluate: choose another split")
    bits = piece_bits(model, streams, streams.pieces, progress=progress, **options)
    notes = np.array([p.notes for p in streams.pieces])
    fine = bits + [dequantisation_bits(tokenizer, streams.stream(p)) for p in streams.pieces]
    return {"pieces": len(notes), "notes": int(notes.sum()), "grid_ms": tokenizer.config.grid_ms,
            **{name: {"bits_per_note": float(b.sum() / notes.sum()), "interval_95": interval(b, notes)}
               for name, b in (("native", bits), ("dequantised_10_ms", fine))}}
