"""Put the page together: data/play.html, one file that plays without a network.

The step in C++ (lib/mamba/step_cpu.cpp, as it is) becomes WebAssembly, the shipped weights
are packed for its vectors of four floats, and the vocabulary becomes a table. Sources that
lie beside this file mirror lib/generate and lib/music in JavaScript; golden vectors hold them
to it (tests/lab/test_browser.py).
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lib.env.errors import UserError, os_errors
from lib.env.files import atomic_write
from lib.env.paths import ROOT
from lib.generate import control
from lib.generate.grammar import FINGERS, FOLLOWS
from lib.generate.player import MODEL, load_model
from lib.generate.sampling import Sampling
from lib.mamba.model import MambaLM
from lib.mamba.step_cpu import SLABS, SOURCE, exact_in_float16, pack
from lib.music.token_names import duration_of, is_music, kind_of, number_of
from lib.music.tokens import BAR, BEAT, BPE_MODEL, Tokenizer
from lib.scan import native
from lib.show import plots

HERE = Path(__file__).parent
PAGE = ROOT / "data" / "play.html"
LARGEST = 12_000_000  # bytes of the page
WIDTH = 4  # floats in a vector of WebAssembly
ENGINE = ("model.js", "playing.js", "tokens.js", "worker.js")  # what runs beside the page
SHOWN = ("midi.js", "piano.js", "roll.js", "page.js")  # what runs in it
EXPORTS = ("mamba_sizes", "mamba_step", "__heap_base")
# -ffast-math would break the polynomial of exp2v: it takes the magic number out
FLAGS = (
    "-target",
    "wasm32-wasi",
    "-mexec-model=reactor",
    "-O3",
    "-msimd128",
    "-std=c++17",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-w",
    "-Wl,--strip-all",
)


def made_from(model: Path = MODEL) -> str:
    """A hash of all that the page is made from: its sources, the step in C++, the shipped model."""
    sources = [path for path in HERE.iterdir() if path.suffix in (".js", ".html", ".css", ".py")]
    sources += [SOURCE, *native.HERE.glob("*.h")]
    digest = hashlib.sha256()
    for path in [
        *sorted(sources),
        *(model / name for name in ("config.json", "tokens.json", BPE_MODEL)),
    ]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    digest.update((model / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command that compiles C++ to WebAssembly; None where the package ziglang is missing."""
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else None


def wasm() -> bytes:
    """The step in C++ as a WebAssembly module that imports nothing."""
    command = compiler()
    if command is None:
        raise UserError(
            "the page needs a compiler for WebAssembly: pip install -r requirements-optional.txt"
        )
    with TemporaryDirectory() as folder:
        out = Path(folder) / "step.wasm"
        exports = [f"-Wl,--export={name}" for name in EXPORTS]
        done = subprocess.run(
            [*command, *FLAGS, *exports, f"-I{native.HERE}", "-o", str(out), str(SOURCE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(
                f"{SOURCE.name} could not be compiled to WebAssembly: {done.stderr.strip()[:300]}"
            )
        return out.read_bytes()


def table(tokenizer: Tokenizer) -> dict:
    """What the page must know of the vocabulary: the events inside each token, and the merges."""
    merges = []
    mark = None
    if tokenizer.base._model is not None:
        bpe = json.loads(tokenizer.base._model.to_str())
        ids = bpe["model"]["vocab"]
        merges = [[ids[a], ids[b], ids[a + b]] for a, b in bpe["model"]["merges"]]
        mark = next((i for i, names in enumerate(tokenizer.pieces) if not names), None)
    return {
        "pieces": [_events(names) for names in tokenizer.pieces],
        "merges": merges,
        "mark": mark,
        "bos": tokenizer.bos,
        "barToken": tokenizer.base["Bar_None"],
        "bar": BAR,
        "grid": BEAT / tokenizer.config.steps,
        "fingers": FINGERS,
        "follows": {end: sorted(kinds) for end, kinds in FOLLOWS.items()},
        "units": {
            "keys": control.KEYS,
            "touch": control.TOUCH,
            "crowd": control.CROWD,
            "moment": control.MOMENT,
        },
        "topP": Sampling.top_p,
    }


def _events(names: tuple[str, ...]) -> list | None:
    """Base tokens as [kind, value], durations in seconds;
    None for what begins, ends and pads a piece.
    """
    if not all(map(is_music, names)):
        return None
    events = []
    for name in names:
        kind = kind_of(name)
        if kind == "Bar":
            events.append([kind, 0])
        elif kind == "Duration":
            events.append([kind, duration_of(name)[0] * BEAT])
        else:
            events.append([kind, number_of(name)])
    return events


def sizes(model: MambaLM) -> list[int]:
    """The ten numbers of `Sizes` in step_cpu.cpp, for one row."""
    c = model.config
    halves = int(exact_in_float16(model))
    return [
        1,
        c.vocab_size,
        c.d_model,
        c.n_layer,
        c.d_inner,
        c.d_state,
        c.d_conv,
        c.rank,
        SLABS,
        halves,
    ]


def facts(model: MambaLM, tokenizer: Tokenizer) -> dict:
    """What the page knows beside the weights."""
    return {
        "sizes": sizes(model),
        "epsilon": model.config.norm_eps,
        "table": table(tokenizer),
        "numbers": model.parameter_count(),
        "colours": colours(),
        "softest": plots.QUIET,
        "loudest": plots.LOUD,
    }


def packed(data: bytes) -> str:
    """Bytes as text, deflated."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def weights(model: MambaLM) -> tuple[bytes, bytes]:
    """The packed weights as float32, and the embeddings in float16 where that is exact."""
    halves = bool(sizes(model)[-1])
    embeddings = model.backbone.embeddings.weight.detach().float().numpy()
    return pack(model, halves, WIDTH).numpy().tobytes(), embeddings.astype(
        "<f2" if halves else "<f4"
    ).tobytes()


def colours() -> list[str]:
    """Sixteen colours of loudness, soft to loud, as in every piano roll of the course."""
    levels = plots.velocity_colours()(np.linspace(0, 1, 16), bytes=True)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in levels]


def page(folder: Path = MODEL) -> str:
    """The whole page for the model in a folder."""
    model, tokenizer = load_model(folder)
    large, embeddings = weights(model)
    parts = {
        "MADE": made_from(folder),
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "ENGINE": "\n".join((HERE / name).read_text(encoding="utf-8") for name in ENGINE),
        "SHOWN": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SHOWN),
        "FACTS": json.dumps(facts(model, tokenizer), separators=(",", ":")),
        "WASM": packed(wasm()),
        "WEIGHTS": packed(large),
        "EMBEDDINGS": packed(embeddings),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], text)


def stale(path: Path = PAGE) -> bool:
    """Whether the page was made from something else than lies here now."""
    if not path.is_file():
        return True
    with os_errors(f"read {path}"), path.open(encoding="utf-8") as file:
        head = file.read(2000)
    found = re.search(r'name="made-from" content="(\w+)"', head)
    return not found or found[1] != made_from()


def build(path: Path = PAGE) -> int:
    """Write the page; its bytes. Raises `UserError` where it would be too large."""
    text = page()
    size = len(text.encode())
    if size > LARGEST:
        raise UserError(
            f"the page would have {size:,} bytes, and {LARGEST:,} are allowed: ship a smaller model"
        )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
    return size
