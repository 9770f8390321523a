"""Play from the shell: `python -m lib.generate`.

python -m lib.generate --prompt FILE.mid                  go on from a file, or from nothing
python -m lib.generate --from A.mid --to B.mid            lead from one file to another
python -m lib.generate jam --in PORT --out PORT           in turns with you, at a keyboard
"""

import argparse
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib.env.errors import UserError, explain_os_error
from lib.env.files import check_writable
from lib.generate import jam
from lib.generate import moment as moments
from lib.generate.breath import short_of_breath
from lib.generate.bridge import ROWS, bridge
from lib.generate.control import Controls
from lib.generate.endless import stream
from lib.generate.grammar import NoteReader
from lib.generate.moment import Moment, hear
from lib.generate.options import add_playing_options, check_named
from lib.generate.player import (
    Player,
    check_seconds,
    check_seed,
    continuations,
    hear_prompt,
    join,
    load_model,
    prompt_end,
    shifted,
)
from lib.generate.sampling import Sampling
from lib.mamba import MambaLM
from lib.music.notes import Music, read_midi, write_midi
from lib.music.tokens import Tokenizer

PROMPT_SECONDS = 10.0  # that are read of a prompt
LONGEST_STEM = 80  # bytes of a file's name in those that are made of it; systems take 255 in all
ENDINGS = (".mid", ".mp3", ".png", ".safetensors")
LONGEST_ENDING = "-1000.safetensors"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked before anything slow begins."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.generate",
        description=main.__doc__,
        epilog="python -m lib.generate jam --help: in turns with you, at a MIDI keyboard",
    )
    add = parser.add_argument
    add("--prompt", help="MIDI file to continue (default: start from nothing)")
    add(
        "--prompt-seconds",
        type=float,
        help=f"how much of it to read, from its first note on ({PROMPT_SECONDS:g}); a shorter one "
        "is heard out, and keys held at the end sound on",
    )
    add("--from", dest="before", help="MIDI file to lead on from, heard to its end, with --to")
    add("--to", dest="after", help="MIDI file to lead to, after --seconds of new music (8)")
    add("--rows", type=int, help=f"ways across that are played side by side with --to ({ROWS})")
    add(
        "--state",
        type=Path,
        help="a state that --keep-state wrote: continue from there; "
        "the new file begins at the last onset of the old one",
    )
    add("--seconds", type=float, help="new music to play (60; with --stream: until you stop it)")
    add_playing_options(parser)
    add(
        "--clock-temperature",
        type=float,
        default=0.0,
        help="a floor under the temperature of when something comes, not of what: 1 keeps the "
        "music moving however low --temperature is (%(default)s)",
    )
    add("--top-k", type=int, default=0, help="keep so many tokens, 0 for all (%(default)s)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="drop what is less likely than this share of the likeliest (%(default)s)",
    )
    add(
        "--repetition",
        type=float,
        default=1.0,
        help="divide the odds of keys just struck by this, from 1 (%(default)s)",
    )
    add("--register", type=float, default=0.0, help="-3 to 3: lower or higher (%(default)s)")
    add("--loudness", type=float, default=0.0, help="-3 to 3: softer or louder (%(default)s)")
    add("--tempo", type=float, default=1.0, help="2: the new music twice as fast (%(default)s)")
    add("--variations", type=int, default=1, help="pieces, with seeds one apart (%(default)s)")
    add(
        "--keep-state",
        action="store_true",
        help="also write NAME.safetensors, to go on with --state: "
        "the new file begins at the last onset of this one",
    )
    add("--stream", action="store_true", help="play on and on into one growing .mid; Ctrl-C stops")
    add(
        "--out",
        default="out",
        type=Path,
        help="folder for what is played; what lies there stays (%(default)s)",
    )
    args = parser.parse_args(argv)
    if args.seconds is None and not args.stream:
        args.seconds = 8.0 if args.after else 60.0
    check(args)
    args.sampling = Sampling(
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition,
        clock_temperature=args.clock_temperature,
    )
    args.controls = Controls(args.density, args.register, args.loudness, args.tempo)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for what cannot be played, or cannot be asked for together."""
    if not 1 <= args.variations <= 1000:
        raise UserError(
            f"variations {args.variations} is outside 1 to 1000: choose how many pieces to play"
        )
    check_seed(args.seed)
    check_named("--prompt", args.prompt)
    check_named("--from", args.before)
    check_named("--to", args.after)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file: give a folder with --out")
    if args.prompt and args.state:
        raise UserError("a prompt and a state were given: continue from one of them")
    if bool(args.before) != bool(args.after):
        raise UserError("--from and --to belong together: name both files")
    if args.after and (args.prompt or args.state or args.stream or args.keep_state):
        raise UserError(
            "--from and --to say all about beginning and end: leave out --prompt, "
            "--state, --keep-state and --stream"
        )
    if args.after and args.tempo != 1:
        raise UserError("a bridge has to arrive in time: leave out --tempo")
    if args.stream and (args.variations > 1 or args.tempo != 1):
        raise UserError(
            "--stream plays one piece at the model's own tempo: leave out --variations and --tempo"
        )
    if args.stream and args.keep_state:
        raise UserError("--stream keeps no state: leave out one of the two")
    if args.prompt_seconds is not None and not args.prompt:
        raise UserError("--prompt-seconds says how much of a --prompt is read: name one")
    if args.rows is not None and not args.after:
        raise UserError(
            "--rows are ways across from one file to another: name them, --from and --to"
        )
    if not args.stream:
        check_seconds(args.seconds, "seconds")
    elif args.seconds is not None and not args.seconds > 0:
        raise UserError(f"seconds {args.seconds} is no length: give more than 0")
    if args.prompt_seconds is not None:
        check_seconds(args.prompt_seconds, "prompt-seconds")


def main(argv: list[str] | None = None) -> None:
    """Let the Mamba play: a .mid, an .mp3 and a piano roll .png for each variation."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["jam"]:
        jam.main(words[1:])
        return
    args = parse(words)
    if args.after:
        play_bridges(args)
    elif args.stream:
        play_stream(args)
    else:
        play_pieces(args)


# ---- on from a prompt, from a state, or from nothing ----------------------------------------


@dataclass(frozen=True)
class Beginning:
    """Who plays on, and from where."""

    model: MambaLM
    tokenizer: Tokenizer
    stem: str  # what files are called by
    start: Moment
    before: np.ndarray  # notes of the prompt
    origin: float  # second of the piece at which the file begins
    second: float  # and at which the new music does


def beginning(args) -> Beginning:
    """The end of the prompt or of the state; what the files forbid is said before a model loads."""
    prompt = read_midi(args.prompt) if args.prompt else None
    stem = short(args.prompt or args.state or "new")
    check_folder(args.out, f"{stem}-seed{args.seed}")
    model, tokenizer = load_model(args.model)
    if args.state:
        start = moments.load(args.state, model, tokenizer)
        nothing = NoteReader(tokenizer).notes([])
        second = start.grammar.seconds
        return Beginning(model, tokenizer, stem, start, nothing, origin=second, second=second)
    seconds = args.prompt_seconds or PROMPT_SECONDS
    start, before, second = hear_prompt(model, tokenizer, prompt, seconds)
    return Beginning(model, tokenizer, stem, start, before, origin=0.0, second=second)


def play_stream(args) -> None:
    """One .mid that grows until it is long enough, or until Ctrl-C."""
    here = beginning(args)
    player = Player(
        here.model, here.tokenizer, [here.start], [args.seed], args.sampling, args.controls
    )
    path = args.out / f"{here.stem}-seed{args.seed}-stream.mid"
    until = None if args.seconds is None else here.second + args.seconds
    stream(player, here.before, here.origin, path, until)


def play_pieces(args) -> None:
    """A .mid, an .mp3 and a .png for each variation, and its state where it is to be kept."""
    here = beginning(args)
    seeds = list(range(args.seed, args.seed + args.variations))
    new, tokens = play_on(args, here, seeds)
    begin = here.second - here.origin
    end = begin + args.seconds
    for seed, notes, ids in zip(seeds, new, tokens):
        whole = join(here.before, notes, here.second, args.seconds, args.tempo)
        music = Music(shifted(whole.notes, -here.origin))
        name = free(args.out, f"{here.stem}-seed{seed}")
        write(music, args.out / name, f"{here.stem}, seed {seed}", begin if args.prompt else None)
        warn(music, begin, end)
        if args.keep_state:
            moment = end_of(here, seed, ids)
            path = args.out / f"{name}.safetensors"
            moments.save(moment, here.model, path)
            at = begin + (moment.grammar.seconds - here.second) / args.tempo
            last = "bar line" if moment.grammar.end == "Bar" else "onset"
            print(
                f"{path}: the state after its last {last}, at second {at:.2f} of {end:g}, "
                "for --state"
            )


def end_of(here: Beginning, seed: int, ids: list[int]) -> Moment:
    """The moment after the tokens that a seed has drawn from here on."""
    start = here.start
    drawn = len(ids) + (start.drawn if start.seed == seed else 0)
    return replace(hear(here.model, here.tokenizer, ids, start), seed=seed, drawn=drawn)


def play_on(args, here: Beginning, seeds: list[int]):
    """The new notes and tokens of each seed, as `continuations`, behind a bar of seconds."""
    from tqdm import tqdm

    bar = tqdm(
        total=round(args.seconds, 2),
        desc=f"playing {len(seeds)}",
        unit="s",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
    )

    def progress(now: float) -> None:
        played = max(0.0, now - here.second) / args.tempo
        bar.update(min(played, bar.total) - bar.n)

    with bar:
        until = here.second + args.seconds * args.tempo
        found = continuations(
            here.model,
            here.tokenizer,
            [here.start] * len(seeds),
            seeds,
            until=until,
            sampling=args.sampling,
            controls=args.controls,
            progress=progress,
        )
        bar.update(bar.total - bar.n)
    return found


# ---- from one file to another ---------------------------------------------------------------


def play_bridges(args) -> None:
    """A .mid, an .mp3 and a .png for each variation of the way from one file to the other."""
    before = read_midi(args.before)
    after = read_midi(args.after)
    check_length(prompt_end(before, math.inf) + args.seconds + prompt_end(after, math.inf))
    name = f"{short(args.before)}-to-{short(args.after)}"
    check_folder(args.out, f"{name}-seed{args.seed}")
    model, tokenizer = load_model(args.model)
    for seed in range(args.seed, args.seed + args.variations):
        music, begin, end = bridge(
            model,
            tokenizer,
            before,
            after,
            seconds=args.seconds,
            rows=ROWS if args.rows is None else args.rows,
            seed=seed,
            sampling=args.sampling,
            controls=args.controls,
        )
        way = f"from second {begin:.1f} to second {end:.1f}"
        target = args.out / free(args.out, f"{name}-seed{seed}")
        write(music, target, f"{name}, seed {seed}: new {way}", begin)
        print(f"the bridge goes {way}")
        warn(music, begin, end)


def check_length(seconds: float) -> None:
    """Raise `UserError` for a piece that would be too long to be made sound."""
    from lib.show.listen import LONGEST

    if seconds > LONGEST:
        raise UserError(
            f"both pieces and the bridge last {seconds:,.0f} seconds, and no more than "
            f"{LONGEST:,} can be made sound: give shorter files, or fewer --seconds"
        )


# ---- files ----------------------------------------------------------------------------------


def check_folder(folder: Path, name: str) -> None:
    """Raise `UserError` where no file of this name could be written into the folder."""
    try:
        check_writable(folder / f"{name}{LONGEST_ENDING}")
    except UserError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        # without its file: nobody has asked for the one that was tried
        reason = explain_os_error(OSError(cause.errno, cause.strerror))
        raise UserError(f"could not write into {folder}: {reason}") from cause


def short(path: str | Path) -> str:
    """A file's name without its ending, cut where a name made of it could grow too long."""
    stem = Path(path).stem
    letters = os.fsencode(stem)
    if len(letters) <= LONGEST_STEM:
        return stem
    return letters[:LONGEST_STEM].decode("utf-8", "ignore")


def free(folder: Path, name: str) -> str:
    """This name, or with a number behind it where files are called so: what was played stays."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(
        one for one in names if not any((folder / f"{one}{end}").exists() for end in ENDINGS)
    )


def warn(music: Music, begin: float, end: float) -> None:
    """Say where the new music fell silent or got stuck, and what helps."""
    if fault := short_of_breath(music.notes, begin, end):
        print(
            f"this piece is short of breath, {fault}: "
            "try --clock-temperature 1, a --temperature nearer to 1, or another --seed"
        )


def write(music: Music, target: Path, title: str, prompt_seconds: float | None) -> None:
    """A piece as .mid, .mp3 and .png; `target` is their path without the ending."""
    from lib.show.listen import save_mp3
    from lib.show.plots import save_roll

    write_midi(music, f"{target}.mid")
    # the sound takes longer, and lets the picture be drawn meanwhile
    with ThreadPoolExecutor(1) as beside:
        sound = beside.submit(save_mp3, music, f"{target}.mp3")
        save_roll(music, f"{target}.png", prompt_seconds=prompt_seconds, title=title)
        sound.result()
    print(f"{target}.mid, .mp3 and .png: {len(music.notes)} notes in {music.seconds:.0f} s")


if __name__ == "__main__":
    from lib.env.errors import cli

    cli(main)
