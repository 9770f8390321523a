"""A piano roll that moves with its sound: a small picture, and a script that runs a cursor over it.

The picture is an SVG inside an `<img>`, so that it remains, with its alternative text, where a page
keeps no scripts (GitHub, paper, a notebook that is not trusted); so does the browser's own audio
control below it. The script (`moving_roll.js`) puts the SVG into the page itself: a click or the
arrow keys move to another moment, and the keys at the left light up while they sound.
"""

import html
from functools import cache
from pathlib import Path

import numpy as np

from lib.music.notes import HIGHEST, LOWEST, Music
from lib.show.plots import GREY, INK, INPUT, LOUD, OUTPUT, PALE, QUIET, velocity_colours

SCRIPT = Path(__file__).with_suffix(".js")
MOST = 4000  # notes that are drawn, the loudest; each takes some twelve bytes
CLASSES = 6  # of loudness
STEPS = (1, 2, 5, 10, 30, 60, 300, 600)  # seconds between two numbers on the axis

# Places in the picture, in fifths of a point, so that whole numbers are fine enough.
WIDTH, TOP, FOOT = 2400, 10, 60
NAMES, KEYS = 75, 55  # the width of the names of the octaves, and of the keys
LEFT = NAMES + KEYS
WORDS = 50  # the height of "prompt" and "continuation"
BLACK = {1, 3, 6, 8, 10}  # semitones above C


def player_html(
    sound: str, music: Music, seconds: float, title: str = "", prompt_seconds: float | None = None
) -> str:
    """One `<figure>`: the roll, the audio control, the script. It works without the script.

    `sound` is the address of the audio, `seconds` its length. `prompt_seconds` is where the prompt
    ends, which is shaded.
    """
    title = html.escape(title)
    label = f"{title or 'Piano'}, {seconds:.0f} seconds of sound"
    caption = ""
    if title:
        caption = f'<figcaption style="font-size:90%;margin:0 0 3px 4px">{title}</figcaption>'
    return (
        f'<figure class="moving-roll" style="margin:6px 0;max-width:640px">{caption}'
        f"{image(music, seconds, title, prompt_seconds)}"
        f'<audio controls preload="metadata" aria-label="{label}" '
        f'style="display:block;width:100%;height:36px" src="{sound}">'
        f"Open this page in a browser that plays MP3.</audio>"
        f"<script>{script()}</script></figure>"
    )


def image(
    music: Music, seconds: float, title: str = "", prompt_seconds: float | None = None
) -> str:
    """The still picture as an `<img>`; `title` is HTML already."""
    picture = svg(music, seconds, prompt_seconds)
    for letter in "%#<>":
        picture = picture.replace(letter, f"%{ord(letter):02X}")
    alt = f"Piano roll: {title or 'piano'}, {len(music.notes)} notes in {music.seconds:.0f} seconds"
    return f'<img alt="{alt}" style="display:block;width:100%" src="data:image/svg+xml,{picture}">'


@cache
def script() -> str:
    """The script without its comments and margins."""
    lines = [line.strip() for line in SCRIPT.read_text(encoding="utf-8").splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def svg(music: Music, seconds: float, prompt_seconds: float | None = None) -> str:
    """The roll from 0 to `seconds`.

    Keys are at the left, a note is a bar, darker when louder, and the pedal lies below.
    """
    notes = music.notes
    if len(notes) > MOST:
        loudest = np.argsort(notes["velocity"], kind="stable")[-MOST:]
        notes = notes[np.sort(loudest)]
    low, high = _range(notes["pitch"])
    row = min(12, max(7, 560 // (high - low + 1)))
    top = TOP + (WORDS if prompt_seconds else 0)
    bottom = top + row * (high - low + 1)

    def x(second):
        return LEFT + (WIDTH - LEFT) * np.clip(second, 0, seconds) / seconds

    def y(pitch):
        return bottom - row * (pitch - low) - row / 2

    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {bottom + FOOT}' "
        f"data-left='{LEFT}' data-keys='{NAMES}' data-row='{row}' data-end='{seconds:.3f}' "
        f"font-family='sans-serif' font-size='45' fill='{INK}'>",
        f"<path fill='#fff' d='M0 0H{WIDTH}V{bottom + FOOT}H0'/>",
    ]
    if prompt_seconds:
        parts += _prompt(x(prompt_seconds), top, bottom)
    parts += _clock(x, seconds, top, bottom)
    parts += _keyboard(y, low, high, row)
    parts += _bars(notes, x, y, row)
    if len(music.pedal):
        spans = "".join(f"M{x(down):.0f} {bottom + 8}H{x(up):.0f}" for down, up in music.pedal)
        parts.append(f"<path stroke='{GREY}' stroke-width='9' d='{spans}'/>")
    return "".join(parts) + "</svg>"


def _range(pitch: np.ndarray) -> tuple[int, int]:
    """The lowest and the highest key in view: two octaves at least."""
    low, high = (int(pitch.min()), int(pitch.max())) if len(pitch) else (54, 66)
    missing = max(0, 23 - (high - low))
    low = max(LOWEST, low - 1 - missing // 2)
    return low, min(HIGHEST, max(high + 1, low + 24))


def _prompt(split: float, top: int, bottom: int) -> list[str]:
    """The prompt's shade and its end, and both sides named where there is room."""
    parts = [
        f"<path fill='{INPUT}' opacity='.12' d='M{LEFT} 0H{split:.0f}V{bottom}H{LEFT}'/>",
        f"<path stroke='{INPUT}' stroke-width='6' d='M{split:.0f} 0V{bottom}'/>",
    ]
    if split - LEFT > 180:
        parts.append(f"<text x='{LEFT + 15}' y='{top - 14}' fill='{INPUT}'>prompt</text>")
    if WIDTH - split > 300:
        parts.append(
            f"<text x='{split + 15:.0f}' y='{top - 14}' fill='{OUTPUT}'>continuation</text>"
        )
    return parts


def _clock(x, seconds: float, top: int, bottom: int) -> list[str]:
    """A line and a number every few seconds."""
    step = next((step for step in STEPS if seconds / step <= 16), STEPS[-1])
    ticks = np.arange(0, seconds + 1e-9, step)
    lines = "".join(f"M{x(tick):.0f} {top}V{bottom}" for tick in ticks)
    numbers = "".join(
        f"<text x='{x(tick):.0f}' y='{bottom + 50}'>{_time(tick)}</text>"
        for tick in ticks
        if x(tick) < WIDTH - 60
    )
    return [
        f"<path stroke='{PALE}' stroke-width='3' d='{lines}'/>",
        f"<g fill='#5a5a5a' text-anchor='middle'>{numbers}</g>",
    ]


def _time(second: float) -> str:
    return f"{second // 60:.0f}:{second % 60:02.0f}"


def _keyboard(y, low: int, high: int, row: int) -> list[str]:
    """White keys with their borders, black keys, and the name of each C."""
    keys = range(low, high + 1)
    black = "".join(f"M{NAMES} {y(key):g}h{KEYS * 5 // 8}" for key in keys if key % 12 in BLACK)
    # two white keys meet below each C and F, and under the middle of each black key
    edges = [y(key) + row / 2 for key in keys if key % 12 in (0, 5)]
    edges += [y(key) for key in keys if key % 12 in BLACK]
    borders = "".join(f"M{NAMES} {edge:g}H{LEFT}" for edge in edges)
    octaves = [key for key in keys if key % 12 == 0]
    lines = "".join(f"M{LEFT} {y(key) + row / 2:g}H{WIDTH}" for key in octaves)
    names = "".join(
        f"<text x='{NAMES - 8}' y='{y(key) + 16:.0f}'>C{key // 12 - 1}</text>" for key in octaves
    )
    top, bottom = y(high) - row / 2, y(low) + row / 2
    frame = f"M{NAMES} {top:g}H{LEFT}V{bottom:g}H{NAMES}Z"
    return [
        f"<path stroke='{PALE}' stroke-width='3' d='{lines}'/>",
        f"<path fill='#fff' stroke='{GREY}' stroke-width='2' d='{frame}{borders}'/>",
        f"<path stroke='{INK}' stroke-width='{row}' d='{black}'/>",
        f"<g fill='#5a5a5a' text-anchor='end'>{names}</g>",
    ]


def _bars(notes: np.ndarray, x, y, row: int) -> list[str]:
    """The notes, a path for each class of loudness: "M left middle h length" a note."""
    begin = np.round(x(notes["start"])).astype(int)
    length = np.maximum(np.round(x(notes["end"])).astype(int) - begin - 2, 5)
    middle = y(notes["pitch"].astype(int))
    share = np.clip((notes["velocity"].astype(float) - QUIET) / (LOUD - QUIET), 0, 1)
    loudness = np.minimum((share * CLASSES).astype(int), CLASSES - 1)
    paths = []
    for which in np.unique(loudness):
        here = loudness == which
        bars = "".join(
            f"M{a} {b:g}h{c}" for a, b, c in zip(begin[here], middle[here], length[here])
        )
        red, green, blue, _ = velocity_colours()((which + 0.5) / CLASSES, bytes=True)
        paths.append(f"<path stroke='#{red:02x}{green:02x}{blue:02x}' d='{bars}'/>")
    return [f"<g class='notes' stroke-width='{row - 1}'>{''.join(paths)}</g>"]
