"""What each token of a piece costs a model: its state carried through, or windows read afresh.

A Transformer is judged on windows that overlap by half: but for the first window, only the second
half of each is counted, so that every token is predicted with at least half a window before it. The
same with windows of several lengths asks any architecture how far back it looks.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from lib.env.errors import UserError
from lib.music.streams import Piece, Streams
from lib.train.bits import judging, piece_bits

SEGMENT = 512  # tokens that are read at once where the state is carried


def model_bits(model, streams: Streams, pieces: list[Piece], **options) -> np.ndarray:
    """Bits of each whole piece, float64 (pieces,), in the way that belongs to the architecture.

    Options as in `lib.train.bits.piece_bits`.
    """
    if model.carries:
        return piece_bits(model, streams, pieces, **options)
    return window_bits(model, streams, pieces, window=model.config.window, **options)


def window_bits(
    model, streams: Streams, pieces: list[Piece], *, window: int, **options
) -> np.ndarray:
    """Bits of each whole piece, float64 (pieces,), from windows that are read afresh.

    Options as in `window_nats`.
    """
    nats = window_nats(model, streams, pieces, window=window, **options)
    return np.array([one.sum() / math.log(2) for one in nats])


@torch.inference_mode()
def window_nats(
    model,
    streams: Streams,
    pieces: list[Piece],
    *,
    window: int,
    stride: int | None = None,
    batch: int = 16,
    progress: bool = False,
    autocast: torch.dtype | None = None,
) -> list[np.ndarray]:
    """Nats of every token after the first, float64 (length - 1,) a piece.

    A window reads `window` tokens and predicts those that follow each; windows are `stride` tokens
    apart (default half a window), and from the second one on the last `stride` predictions count.
    So a token has from window - stride to window tokens before it.
    """
    from tqdm import tqdm

    jobs = _jobs(pieces, window, stride or max(1, window // 2))
    batches = range(0, len(jobs), batch)
    nats = [np.zeros(piece.length - 1) for piece in pieces]
    for first in tqdm(batches, desc="evaluating", unit="batch", disable=not progress):
        rows = jobs[first : first + batch]
        parts = [streams.stream(pieces[i])[begin : begin + window + 1] for i, begin, _ in rows]
        tokens = np.zeros((len(rows), max(map(len, parts))), np.int64)
        for row, part in zip(tokens, parts):
            row[: len(part)] = part
        found = _nats(model, torch.from_numpy(tokens), None, autocast)[0]
        for (i, begin, counted), part, values in zip(rows, parts, found):
            nats[i][counted : begin + len(part) - 1] = values[counted - begin : len(part) - 1]
    return nats


def _jobs(pieces: list[Piece], window: int, stride: int) -> list[tuple[int, int, int]]:
    """(piece, first token, where its predictions begin to count) of every window,
    short ones first.
    """
    if not 1 <= stride <= window:
        raise UserError(
            f"windows of {window} tokens cannot be {stride} apart: the stride must be 1 to {window}"
        )
    jobs = []
    for i, piece in enumerate(pieces):
        begin, counted = 0, 0
        while counted < piece.length - 1:
            jobs.append((i, begin, counted))
            counted = min(begin + window, piece.length - 1)
            begin += stride
    # windows of one length side by side need little padding
    return sorted(jobs, key=lambda job: min(window, pieces[job[0]].length - 1 - job[1]))


@torch.inference_mode()
def carried_nats(model, streams: Streams, pieces: list[Piece]) -> list[np.ndarray]:
    """Nats of every token after the first, float64 (length - 1,) a piece,
    the state carried through it.
    """
    nats = []
    for piece in pieces:
        stream = torch.from_numpy(streams.stream(piece).astype(np.int64))[None]
        state, parts = None, []
        for begin in range(0, piece.length - 1, SEGMENT):
            values, state = _nats(model, stream[:, begin : begin + SEGMENT + 1], state)
            parts.append(values[0])
        nats.append(np.concatenate(parts) if parts else np.zeros(0))
    return nats


def token_nats(model, streams: Streams, pieces: list[Piece]) -> list[np.ndarray]:
    """Nats of every token, in the way that belongs to the architecture."""
    if model.carries:
        return carried_nats(model, streams, pieces)
    return window_nats(model, streams, pieces, window=model.config.window)


def _nats(model, tokens, state, autocast=None):
    """tokens (B, L+1) on a CPU: nats of the last L, float64 (B, L), and the state after them."""
    tokens = tokens.to(model.device)
    cast = torch.autocast(model.device.type, autocast, enabled=autocast is not None)
    with cast, judging(model):
        logits, state = model(tokens[:, :-1], state, return_state=True)
    targets = tokens[:, 1:]
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view(targets.shape).double().cpu().numpy(), state
