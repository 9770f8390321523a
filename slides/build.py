"""Build the decks and papers: `python -m slides.build [NAME …]`;
see whether they are stale: `--check`.

The source of a deck, or of a paper (a sheet to print, slides/room), is Markdown for Marp. The build
puts in what it quotes (slides/quotes.py), draws its figures and renders its sounds
(slides/pictures.py), and lets Marp make a page and a PDF; of a paper the PDF alone. Everything then
lies inside the page. What went in is noted in slides/built.json, so that `--check` and the tests
see without Marp when a number, an excerpt, a figure or the source is no longer what was built.
"""

import argparse
import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from lib.env.errors import UserError, cli, os_errors
from lib.env.files import write_text
from lib.show import moving_roll
from slides import deck
from slides.pictures import FIGURE, SOUND, file_hash, input_hash, made_of, make
from slides.quotes import CODE, NUMBER, ROOT

HERE = ROOT / "slides"
WORK = HERE / ".build"
BUILT = HERE / "built.json"
MARP = HERE / "node_modules" / "@marp-team" / "marp-cli" / "marp-cli.js"
LARGEST = {"html": 4_000_000, "pdf": 2_000_000}  # bytes
KINDS = {"svg": "image/svg+xml", "png": "image/png", "mp3": "audio/mpeg"}
FONTS = (
    ("Course", 400, "DejaVuSans"),
    ("Course", 700, "DejaVuSans-Bold"),
    ("Course Mono", 400, "DejaVuSansMono"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = (
    "slides/theme.css",
    "slides/paper.css",
    "slides/marp.json",
    "slides/package.json",
    "lib/show/moving_roll.js",
)


# what a page is made of ------------------------------------------------------------------------


def sha(text: str | bytes) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def inputs(name: str) -> dict:
    """All that a deck is made of as of now, but for the files that its figures read while drawn."""
    quoted, named = deck.quotes(name), deck.names(name)
    return {
        "source": sha(deck.read(name)),
        "look": sha("".join(file_hash(path) for path in LOOK)),
        "numbers": quoted["numbers"],
        "excerpts": {what: sha(code) for what, code in quoted["excerpts"].items()},
        "figures": {what: {"made_of": made_of("figure", what)} for what in named["figures"]},
        "sounds": {what: {"made_of": made_of("sound", what)} for what in named["sounds"]},
    }


def made_files(name: str) -> dict[str, Path]:
    """The files that are built of a deck or paper, by ending."""
    endings = ("pdf",) if name in deck.papers() else ("html", "pdf")
    return {ending: deck.file_of(name).with_suffix(f".{ending}") for ending in endings}


def built() -> dict:
    """slides/built.json: what each deck and paper was made of when it was built."""
    return json.loads(BUILT.read_text(encoding="utf-8")) if BUILT.is_file() else {}


def stale(name: str) -> list[str]:
    """Why the built deck is not what would be built now, a sentence each; empty if it is."""
    before, now = built().get(name), inputs(name)
    if before is None:
        return [f"{name} was never built"]
    why = []
    if before["source"] != now["source"]:
        why.append(f"{name}.md has changed")
    if before["look"] != now["look"]:
        why.append(f"{name}: {', '.join(LOOK)} have changed")
    for what, text in now["numbers"].items():
        if before["numbers"].get(what) != text:
            why.append(
                f"{name}: {what} is {text} now, and was {before['numbers'].get(what, 'not there')}"
            )
    for what, code in now["excerpts"].items():
        if before["excerpts"].get(what) != code:
            why.append(f"{name}: the code of {what} has changed")
    for kind in ("figures", "sounds"):
        for what, made in now[kind].items():
            old = before[kind].get(what, {"made_of": "", "reads": {}})
            if old["made_of"] != made["made_of"]:
                why.append(f"{name}: the code behind {kind[:-1]} {what} has changed")
            why += [
                f"{name}: {kind[:-1]} {what} was made from {path}, which has changed"
                for path, was in old["reads"].items()
                if input_hash(path) != was
            ]
    for ending, file in made_files(name).items():
        if _hash(file) != before.get(ending):
            why.append(f"{_place(file)} is not the file that was built")
    return why


def _place(file: Path) -> str:
    return f"slides/{file.relative_to(deck.FOLDER).as_posix()}"


def _hash(file: Path) -> str:
    return file_hash(_place(file))


# building --------------------------------------------------------------------------------------


def expand(name: str, media: dict[str, str]) -> str:
    """The deck's Markdown with all put in: numbers, code, files of figures and sounds, rolls."""
    quoted = deck.quotes(name)
    text = CODE.sub(
        lambda found: f"```python\n{quoted['excerpts'][found[1]]}\n```", deck.read(name)
    )
    text = NUMBER.sub(lambda found: quoted["numbers"][f"{found[1]}:{found[2]}"], text)
    text = FIGURE.sub(lambda found: f"{found[1]}{media['figure:' + found[2]]}{found[3]}", text)
    text = deck.PART.sub("", text)
    return SOUND.sub(
        lambda found: _player(
            media["sound:" + found[1]], media["roll:" + found[1]], found[2] or ""
        ),
        text,
    )


def _player(file: str, roll: str, caption: str) -> str:
    """A sound with its roll, an `<img>`.

    The style sheet needs to know how wide that is for its height.
    """
    caption = html.escape(caption)
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    label = caption or "sound"
    audio = f'<audio controls preload="auto" aria-label="{label}" src="{file}"></audio>'
    width, height = re.search(r"viewBox='0 0 (\d+) (\d+)'", roll).groups()
    return (
        f'<figure class="sound moving-roll" style="--ratio:{int(width) / int(height):.3f}">'
        f'{words}{audio}<div class="roll">{roll}</div></figure>'
    )


def build(name: str, images: bool = False) -> None:
    """Make the page and the PDF of a deck, or the PDF of a paper, and note what went in.

    `images`: also a picture of each slide. Raises `UserError` where a slide or a file is too full.
    """
    made = inputs(name)
    media = {}
    for kind in ("figure", "sound"):
        for what, about in made[f"{kind}s"].items():
            thing = make(kind, what)
            about["reads"] = thing.reads
            file = (
                WORK
                / "media"
                / f"{re.sub(r'[^A-Za-z0-9]+', '-', what)}-{sha(thing.data)}.{thing.ending}"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(thing.data)
            media[f"{kind}:{what}"] = file.relative_to(WORK).as_posix()
            if kind == "sound":
                media[f"roll:{what}"] = thing.roll
    source = WORK / f"{name}.md"
    source.write_text(expand(name, media), encoding="utf-8")
    files = made_files(name)
    for ending, file in files.items():
        options = ("--pdf", "--pdf-outlines") if ending == "pdf" else ()
        marp(source, *options, "--output", WORK / file.name, "--title", deck.title(name))
    if images:
        folder = WORK / "images" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        marp(source, "--images", "png", "--output", folder / "slide.png")
    if over := overflowing(name):
        raise UserError(
            f"{_place(deck.file_of(name))}: too much on slide {', '.join(map(str, over))}"
        )
    for ending, file in files.items():
        if ending == "html":
            write_text(file, inside((WORK / file.name).read_text(encoding="utf-8")))
        else:
            shutil.copyfile(WORK / file.name, file)
        made[ending] = _hash(file)
        if (size := file.stat().st_size) > LARGEST[ending]:
            raise UserError(f"{_place(file)} has {size:,} bytes: {LARGEST[ending]:,} are allowed")
    if name not in deck.papers():
        made |= {"slides": len(deck.slides(name)), "minutes": deck.minutes(name)}
    with FileLock(WORK / "built.lock"):  # another deck may be in the works beside this one
        notes = built() | {name: made}
        notes = {one: notes[one] for one in deck.decks() + deck.papers() if one in notes}
        write_text(BUILT, json.dumps(notes, indent=1, ensure_ascii=False) + "\n")
        write_tables()


# After a click on a roll the keys turn the slides again, and a finger that drags a roll does not.
HANDS = """<script>
addEventListener("click", () => document.activeElement?.blur());
document.querySelectorAll(".moves svg").forEach((roll) => roll.ontouchstart = (event) => event.stopPropagation());
</script>"""


def inside(page: str) -> str:
    """The page with the files that it names (figures, sounds) put into it,
    and the script that moves its rolls.
    """

    def uri(found: re.Match) -> str:
        file = WORK / found[0]
        return (
            f"data:{KINDS[file.suffix[1:]]};base64,{base64.b64encode(file.read_bytes()).decode()}"
        )

    page = page.replace("</body>", f"<script>{moving_roll.script()}</script>{HANDS}</body>")
    return re.sub(r"media/[\w-]+\.(?:svg|png|mp3)", uri, page)


def marp(source: Path, *options) -> None:
    """Run Marp on a file; its complaints become one sentence. Fetched from npm the first time."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        raise UserError(
            "the slides are built by Marp, which needs Node.js 20 or newer with npm: install it, "
            "or use the built pages in slides/"
        )
    if not MARP.is_file():
        print("  fetching Marp from npm, once")
        run(
            ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"],
            HERE,
            "fetch Marp from npm",
        )
    themes = []
    for sheet in ("theme.css", "paper.css"):
        themes.append(WORK / sheet)
        write_text(WORK / sheet, with_fonts((HERE / sheet).read_text(encoding="utf-8")))
    run(
        [
            node,
            MARP,
            source,
            "--config-file",
            HERE / "marp.json",
            "--theme-set",
            *themes,
            "--no-stdin",
            *options,
        ],
        WORK,
        f"build {source.name} with Marp (a PDF needs Chrome or Chromium)",
    )


OVERFLOW = """<script>addEventListener("load", () => document.fonts.ready.then(() => setTimeout(() => {
document.body.dataset.over = [...document.querySelectorAll("section")].map((s, i) => [i + 1, s])
.filter(([, s]) => s.scrollHeight > s.clientHeight + 1 || s.scrollWidth > s.clientWidth + 1).map(([i]) => i)
.join(" ")}, 500)))</script>"""


def overflowing(name: str) -> list[int]:
    """The slides whose content is larger than the slide, as a browser lays them out."""
    page = WORK / f"{name}-bare.html"
    marp(WORK / f"{name}.md", "--template", "bare", "--output", page)
    page.write_text(page.read_text(encoding="utf-8") + OVERFLOW, encoding="utf-8")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("a PDF needs Chrome or Chromium, and neither was found: install one")
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={profile}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                page.as_uri(),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
    found = re.search(r'data-over="([\d ]*)"', done.stdout)
    if not found:
        raise UserError(
            f"{name}: the browser did not lay out the slides: {done.stderr.strip()[-200:]}"
        )
    return [int(place) for place in found[1].split()]


def run(command: list, folder: Path, what: str) -> None:
    """Run a command in a folder.

    Raises `UserError`, "could not {what}: …", where it fails or misses a file.
    """
    with os_errors(what):
        done = subprocess.run(
            list(map(str, command)), check=False, cwd=folder, capture_output=True, text=True
        )
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "WARN" in line or "ERROR" in line
    ]
    if done.returncode or any("ERROR" in line or "missing" in line for line in said):
        raise UserError(f"could not {what}: {' '.join(said) or done.stderr.strip()[-300:]}")


def with_fonts(sheet: str) -> str:
    """A style sheet with DejaVu, which Matplotlib brings, put in as WOFF.

    Only letters that Latin text, Greek formulas in words, arrows and simple signs need.
    """
    from fontTools import subset
    from fontTools.ttLib import TTFont
    from matplotlib import get_data_path

    faces = []
    for family, weight, name in FONTS:
        kept = WORK / f"{name}.woff"
        if not kept.is_file():
            font = TTFont(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
            cut = subset.Subsetter(
                subset.Options(drop_tables=["FFTM"], layout_features=["kern", "liga"])
            )
            cut.populate(
                unicodes=[
                    *range(0x20, 0x180),
                    *range(0x370, 0x400),
                    *range(0x1D00, 0x1DC0),
                    0x304,
                    0x305,
                    *range(0x2000, 0x2070),
                    *range(0x2070, 0x20A0),
                    *range(0x2190, 0x2200),
                    *range(0x2200, 0x2300),
                    *range(0x25A0, 0x2600),
                    *range(0x2660, 0x2670),
                    0x2713,
                    0x2717,
                    0x27F6,
                ]
            )
            cut.subset(font)
            font.flavor = "woff"
            font.save(kept)
        data = base64.b64encode(kept.read_bytes()).decode()
        faces.append(
            f'@font-face{{font-family:"{family}";font-weight:{weight};'
            f'src:url(data:font/woff;base64,{data}) format("woff")}}'
        )
    return "\n".join([sheet, *faces, ""])


# the tables in slides/README.md and slides/teaching.md ------------------------------------------

ABOUT = {
    "1_data": ("data", "00–02"),
    "2_state_spaces": ("state spaces", "03–04"),
    "3_scans": ("scans", "05–06"),
    "4_mamba": ("Mamba", "07"),
    "5_training_and_playing": ("training and playing", "08–09"),
    "6_results": ("results", "10"),
}


def table() -> str:
    """The decks of the course's parts that were built: slides, minutes by the notes, links."""
    lines = ["| deck | notebooks | slides | minutes | page | PDF |", "|---|---|---|---|---|---|"]
    for name in filter(built().get, deck.parts()):
        about = built()[name]
        title, books = ABOUT.get(name, (name, ""))
        lines.append(
            f"| {title} | {books} | {about['slides']} | {about['minutes']:.0f} | {_links(name)} |"
        )
    return "\n".join(lines)


def route_table() -> str:
    """The decks of the routes that were built: slides, minutes by the notes,
    what is left of the time, links.
    """
    lines = [
        "| a workshop of | slides | minutes | slack | page | PDF |",
        "|---|---|---|---|---|---|",
    ]
    for name in filter(built().get, deck.routes()):
        about, total = built()[name], deck.length(name)
        lines.append(
            f"| {total} minutes | {about['slides']} | {about['minutes']:.0f} "
            f"| {total - about['minutes']:.0f} | {_links(name)} |"
        )
    return "\n".join(lines)


def _links(name: str) -> str:
    return f"[page]({name}.html) | [PDF]({name}.pdf)"


def plan(route: str) -> str:
    """What a route does when: each of its sections with its minutes and slides, and the slack."""
    lines = ["| minutes | slides | what |", "|---|---|---|"]
    begin = 1
    for section in deck.sections(route):
        end = begin + len(section) - 1
        minutes = sum(slide.minutes for slide in section)
        lines.append(
            f"| {minutes:g} | {begin if begin == end else f'{begin}–{end}'} | {section[0].part} |"
        )
        begin = end + 1
    lines.append(f"| {deck.length(route) - deck.minutes(route):g} | | slack |")
    return "\n".join(lines)


def write_tables() -> None:
    """Put the tables between their marks in slides/README.md,
    and each route's plan in slides/teaching.md.
    """
    _put(HERE / "README.md", {"decks": table(), "routes": route_table()})
    _put(HERE / "teaching.md", {f"route {deck.length(name)}": plan(name) for name in deck.routes()})


def _put(file: Path, tables: dict[str, str]) -> None:
    old = new = file.read_text(encoding="utf-8")
    for mark, lines in tables.items():
        close = mark.split()[0]
        new = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{close} -->)",
            lambda found, lines=lines: f"{found[1]}\n{lines}\n\n{found[2]}",
            new,
            flags=re.DOTALL,
        )
    if new != old:
        write_text(file, new)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    ask = argparse.ArgumentParser(
        prog="python -m slides.build", description=__doc__.split("\n\n")[0]
    )
    ask.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="decks and papers, such as 1_data, route_90, handout; else those that are stale",
    )
    ask.add_argument(
        "--check",
        action="store_true",
        help="build nothing: say what is stale, and fail if anything is",
    )
    ask.add_argument(
        "--images",
        action="store_true",
        help="also write a picture of each slide to slides/.build/images, to look at",
    )
    wanted = ask.parse_args(arguments)
    WORK.mkdir(exist_ok=True)
    names = [Path(name).stem for name in wanted.names] or deck.decks() + deck.papers()
    if wanted.check:
        why = [reason for name in names for reason in stale(name)]
        if why:
            raise UserError("; ".join(why) + ": run python -m slides.build")
        print(f"{len(names)} decks and papers are as built")
        return
    for name in names:
        if not (wanted.names or wanted.images or stale(name)):
            print(f"{name} is as built")
            continue
        print(name)
        build(name, wanted.images)
        sizes = [
            f"{ending} {file.stat().st_size / 1000:,.0f} kB"
            for ending, file in made_files(name).items()
        ]
        about = built()[name]
        if "slides" in about:
            sizes = [f"{about['slides']} slides", f"{about['minutes']:.0f} minutes", *sizes]
        print(f"  {', '.join(sizes)}")


if __name__ == "__main__":
    cli(main)
