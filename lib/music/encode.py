"""Performances to token streams: `python -m lib.music encode`.

This needs MidiTok; to read the streams (`lib.music.streams`) does not.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.env.errors import UserError
from lib.env.files import atomic_folder, check_writable, sha256_of
from lib.env.paths import CACHE
from lib.music.maestro import Performance, performances
from lib.music.notes import Music, augment, read_midi, sustain
from lib.music.streams import INDEX, TOKENS, Piece, Streams
from lib.music.tokens import TokenConfig, Tokenizer

FORMAT = 3  # raise it when the files change their meaning: old caches are then rebuilt


@dataclass(frozen=True)
class Augmentation:
    """How the extra copies of a training piece differ from it; copy 0 is the piece itself."""

    copies: int = 2  # extra copies of each training piece
    semitones: int = 5  # transposed by up to this, down or up
    stretch: float = 0.05  # slower or faster by up to this share
    velocity: int = 8  # softer or louder by up to this, of 127
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"the seed of the copies is {self.seed}: give 0 or more")

    def draw(self, piece: int, copy: int) -> dict:
        """The arguments of `lib.music.notes.augment` for one copy: the same at every run."""
        if copy == 0:
            return {"semitones": 0, "stretch": 1.0, "velocity": 0}
        rng = np.random.default_rng([self.seed, piece, copy])
        semitones = rng.integers(-self.semitones, self.semitones + 1)
        stretch = rng.uniform(1 - self.stretch, 1 + self.stretch)
        velocity = rng.integers(-self.velocity, self.velocity + 1)
        return {
            "semitones": int(semitones),
            "stretch": float(np.round(stretch, 4)),
            "velocity": int(velocity),
        }


class Copy(NamedTuple):
    """What `encode_piece` makes of one copy of a performance."""

    number: int
    base: np.ndarray  # its base tokens
    notes: int
    seconds: float


Encoded = list[tuple[Performance, list[Copy]]]


@functools.lru_cache(maxsize=1)
def _tokenizer(config: TokenConfig) -> Tokenizer:
    """Kept from piece to piece: making one takes longer than encoding."""
    return Tokenizer(config)


def encode_piece(
    number: int, performance: Performance, config: TokenConfig, augmentation: Augmentation
) -> list[Copy] | str:
    """Base tokens of all copies of one performance; of a bad file, the sentence that says why.

    `number` is its place among all, by which its copies are drawn. A copy that is transposed off
    the keyboard is none.
    """
    try:
        music = read_midi(performance.path)
    except UserError as error:
        return str(error)
    if config.pedal == "extend":
        music = sustain(music)
    extra = augmentation.copies if performance.split == "train" else 0
    copies = []
    for copy in range(1 + extra):
        change = augmentation.draw(number, copy)
        notes = augment(music.notes, **change)
        changed = Music(notes, music.pedal * change["stretch"])
        base = _tokenizer(config).encode_base(changed)
        if len(notes):
            copies.append(Copy(copy, base, len(notes), changed.seconds))
    if not copies or copies[0].number:
        return f"{performance.path} holds no notes"
    return copies


def fingerprint(
    performances: list[Performance],
    config: TokenConfig,
    augmentation: Augmentation,
    tokenizer: Tokenizer | None = None,
) -> dict:
    """All that the streams depend on, as JSON; `id` is its hash.

    Files count by their names and sizes; `content_of` tells whether they have changed since.
    """
    files = sorted((p.path.name, p.path.stat().st_size, p.split) for p in performances)
    settings = {
        "format": FORMAT,
        "tokens": _named(config),
        "augmentation": asdict(augmentation),
        "files": _digest(json.dumps(files), 16),
    }
    if tokenizer is not None:
        settings["merges"] = _digest(json.dumps(tokenizer.pieces), 16)
    settings["id"] = _digest(json.dumps(settings, sort_keys=True), 12)
    return settings


def content_of(performances: list[Performance]) -> str:
    """A hash of what the files hold, in their order, by which the copies are drawn."""
    return _digest(" ".join(sha256_of(p.path) for p in performances), 16)


def _named(config: TokenConfig) -> dict:
    """The settings as JSON.

    The language is named only where it is not REMI, as caches of before knew no other.
    """
    settings = asdict(config)
    if config.kind == "REMI":
        del settings["kind"]
    return settings


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def build(
    performances: Iterable[Performance],
    config: TokenConfig | None = None,
    augmentation: Augmentation = Augmentation(),
    *,
    folder: Path | None = None,
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[Streams, Tokenizer]:
    """Encode performances into streams, or open the cache of an earlier run.

    The cache is a folder named by a hash of every setting and file, beside `folder`'s others
    (data/cache by default). It appears whole or not at all. Byte-pair merges are learnt on
    copy 0 of the train split only, or are those of `tokenizer`, so that a model which knows its
    tokens can go on learning. Returns (Streams, Tokenizer).
    """
    if tokenizer is None:
        config = config or TokenConfig()
    elif config in (None, tokenizer.config):
        config = tokenizer.config
    else:
        raise UserError(
            f"the tokenizer was made with {tokenizer.config}: use those settings, or give none"
        )
    found = list(performances)
    if not any(p.split == "train" for p in found):
        raise UserError("there is no training piece in this list: give pieces of the train split")
    settings = fingerprint(found, config, augmentation, tokenizer)
    target = Path(folder or CACHE) / f"tokens-{settings['id']}"
    content = content_of(found)
    if target.is_dir():
        streams = Streams.load(target)
        if streams.settings.get("content", content) != content:  # older caches do not say
            raise UserError(
                f"the files, or their order, have changed since {target} was made: "
                "delete that folder and run this again"
            )
        say(f"token streams: {len(streams.tokens):,} tokens from the cache {target.name}")
        return streams, Tokenizer.load(target)

    check_writable(target / INDEX)
    encoded = encode_all(found, config, augmentation, workers, progress, say)
    if not any(p.split == "train" for p, _ in encoded):
        raise UserError("no training piece could be read: check the files")
    if tokenizer is None:
        tokenizer = Tokenizer(config)
        if config.vocab_size:
            say(f"learning byte-pair merges on the train split, up to {config.vocab_size:,} tokens")
            tokenizer.learn([copies[0].base for p, copies in encoded if p.split == "train"])
    tokens, pieces = merge_all(encoded, tokenizer, progress)
    index = {
        "settings": settings | {"content": content},
        "vocab_size": tokenizer.vocab_size,
        "bos": int(tokenizer.bos),
        "pieces": [asdict(p) for p in pieces],
        # so that a machine without MidiTok knows them
        "names": [" ".join(names) for names in tokenizer.pieces],
    }
    _write(target, tokens, index, tokenizer)
    return Streams.load(target), tokenizer


def encode_all(
    performances: list[Performance],
    config: TokenConfig,
    augmentation: Augmentation,
    workers: int | None,
    progress: bool,
    say: Callable[[str], None],
) -> Encoded:
    """`encode_piece` of all that can be read, many on several processes."""
    from tqdm import tqdm

    work = partial(encode_piece, config=config, augmentation=augmentation)
    workers = min(workers or os.cpu_count() or 1, len(performances))
    many = workers > 1 and len(performances) > 20
    spawn = multiprocessing.get_context("spawn")
    encoded = []
    with ProcessPoolExecutor(workers, spawn) if many else nullcontext() as pool:
        run = partial(pool.map, chunksize=4) if many else map
        bar = tqdm(
            run(work, range(len(performances)), performances),
            total=len(performances),
            desc="encoding",
            unit="piece",
            disable=not progress,
        )
        for performance, result in zip(performances, bar):
            if isinstance(result, str):
                say(f"left out: {result}")
            else:
                encoded.append((performance, result))
    return encoded


def merge_all(
    encoded: Encoded, tokenizer: Tokenizer, progress: bool
) -> tuple[np.ndarray, list[Piece]]:
    """All copies as one run of tokens, each from BOS to EOS, and where in it each lies."""
    from tqdm import tqdm

    pieces = []
    arrays = []
    offset = 0
    for performance, copies in tqdm(encoded, desc="merging", unit="piece", disable=not progress):
        for copy in copies:
            ids = np.concatenate([[tokenizer.bos], tokenizer.merge(copy.base), [tokenizer.eos]])
            arrays.append(ids.astype(np.uint16))
            pieces.append(
                Piece(
                    performance.path.name,
                    performance.composer,
                    performance.title,
                    performance.split,
                    copy.number,
                    offset,
                    len(ids),
                    copy.notes,
                    round(copy.seconds, 3),
                )
            )
            offset += len(ids)
    return np.concatenate(arrays), pieces


def _write(target: Path, tokens: np.ndarray, index: dict, tokenizer: Tokenizer) -> None:
    """The folder of streams and their tokenizer, whole or not at all.

    Another process may be first: its work is the same, and stays.
    """
    with atomic_folder(target, f"token streams to {target.parent}", first_stays=True) as part:
        np.save(part / TOKENS, tokens)
        tokenizer.save(part)
        (part / INDEX).write_text(json.dumps(index))


def chosen(args: argparse.Namespace) -> dict:
    """What the command line says about the tokens."""
    words = {"grid_ms": args.grid_ms, "pedal": args.pedal, "vocab_size": args.vocab_size}
    found = {name: value for name, value in words.items() if value is not None}
    if found.get("vocab_size") == 0:
        found["vocab_size"] = None
    return found


def main(argv: list[str] | None = None) -> None:
    """`python -m lib.music encode`: build the streams of MAESTRO and say what they are."""
    default = TokenConfig()
    parser = argparse.ArgumentParser(prog="python -m lib.music encode", description=main.__doc__)
    add = parser.add_argument
    add("folder", nargs="?", help="MAESTRO, as a folder or a zip (default: what is found)")
    add("--quick", action="store_true", help="the ten sample pieces only")
    add("--grid-ms", type=float, help=f"onsets are rounded to this ({default.grid_ms:g})")
    add(
        "--pedal",
        choices=["extend", "tokens", "drop"],
        help=f"extend notes by it, write it as tokens, or drop it ({default.pedal})",
    )
    add(
        "--vocab-size",
        type=int,
        help=f"tokens after byte-pair encoding; 0: none ({default.vocab_size})",
    )
    add(
        "--copies",
        type=int,
        default=Augmentation.copies,
        help="augmented copies of each train piece (%(default)s)",
    )
    add("--seed", type=int, default=Augmentation.seed, help="of the copies")
    add(
        "--tokenizer",
        help="folder of a tokenizer (data/model): its settings and merges, none learnt",
    )
    add("--workers", type=int, help="processes (default: one a core)")
    args = parser.parse_args(argv)
    known = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    config = None if known else replace(default, **chosen(args))
    if known and chosen(args):
        raise UserError(
            "the tokenizer's folder says how to encode: leave out --grid-ms, --pedal and "
            "--vocab-size, or --tokenizer"
        )
    if args.copies < 0:
        raise UserError(f"{args.copies} copies make no sense: give 0 or more")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"{args.workers} processes encode nothing: give 1 or more")
    if config:
        Tokenizer(config)  # refused now, where its vocabulary is too small, and not in an hour
    found = performances(args.folder, quick=args.quick)
    augmentation = Augmentation(copies=args.copies, seed=args.seed)
    streams, tokenizer = build(found, config, augmentation, tokenizer=known, workers=args.workers)
    print(tokenizer)
    for split in ("train", "validation", "test"):
        mine = streams.select(split)
        tokens = sum(p.length for p in mine)
        notes = sum(p.notes for p in mine)
        if notes:
            print(
                f"{split:>10}: {len(mine):5} pieces {notes:10,} notes {tokens:11,} tokens "
                f"{tokens / notes:.2f} tokens a note"
            )
    print(f"in {streams.folder}")
