"""python -m bench.quality.examples: the pages of docs/listen, made again from seeds.

index.html: twelve arrangement subsets, what was given and what was made of it, with pictures. blind.html:
generated or rendered, ours or the peer's? Its files' names say nothing; the key is in the page, encoded.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from bench.quality.playing import PEER_STEPS, inpainting
from bench.quality.windows import default_grooves, render
from bridge.pictures import Row, draw
from engine.audio import Audio
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill
from training.held_out import RATE, Window
from training.metrics import Array
from training.stems import STEMS

SECONDS = 5.0
SAMPLES = round(SECONDS * RATE)
PEAK, FADE = 0.9, round(0.05 * RATE)
WIDTH = 640  # pixels of a picture
SECRET = b"listen first"
SEED = 7
SUBSETS = (
    "piano", "guitar", "bass", "drums", "bass drums", "guitar piano", "bass guitar", "drums piano",
    "bass piano", "drums guitar", "bass guitar piano", "drums guitar piano",
)  # fmt: skip
ASKED = {"source": ("generated", "rendered"), "maker": ("ours", "the peer's")}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem } audio { width: 100%; height: 2.2rem } img { width: 100% }
label { margin-right: 1.5rem } .item { border-top: 1px solid #ddd; padding: .8rem 0 }
.pair { display: flex; gap: 1rem }
button { font: inherit; padding: .3rem 1rem } #count { font-weight: bold }
"""


@dataclass(frozen=True)
class Example:
    """One subset: mono signals of SECONDS at 44.1 kHz. mixes: with the stems made, by who made them."""

    armed: tuple[str, ...]
    given: Array
    mixes: dict[str, Array]
    rows: list[Row]


def make_example(model: Model, window: Window, armed: tuple[str, ...]) -> Example:
    """The armed stems of a window made by the model and by inpainting alone, beside the rendered ones."""
    truth = window.stems[:, :SAMPLES]
    given = {stem: Audio(truth[i][None], RATE) for i, stem in enumerate(STEMS) if stem not in armed}
    context = np.sum([audio.samples[0] for audio in given.values()], axis=0)
    ours = fill(model, given, list(armed), settings=Settings(seed=window.seed)).stems
    settings = Settings(seed=window.seed, sampler="ddim", steps=PEER_STEPS)
    peers = fill(inpainting(model), given, list(armed), settings=settings).stems
    rendered = truth[[STEMS.index(stem) for stem in armed]].sum(0)
    mixes = {
        "generated": context + np.sum([ours[stem].samples[0] for stem in armed], axis=0),
        "peer": context + np.sum([peers[stem].samples[0] for stem in armed], axis=0),
        "rendered": context + rendered,
    }
    rows = [Row(stem, given.get(stem) or ours[stem], stem in given) for stem in STEMS]
    return Example(armed, context, mixes, rows)


def write_pages(examples: list[Example], about: str, folder: Path) -> None:
    """index.html, blind.html and their files; what an earlier call left in files/ is removed."""
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    for old in files.iterdir():
        old.unlink()
    sections = []
    for number, example in enumerate(examples, 1):
        name = f"{number:02d}-{'-'.join(example.armed)}"
        write_audio(files / f"{name}-given.mp3", example.given)
        write_audio(files / f"{name}-made.mp3", example.mixes["generated"])
        write_picture(files / f"{name}.jpg", ", ".join(example.armed), example.rows)
        sections.append(_section(number, example.armed, name))
    note = f"<p>{html.escape(about)}</p>"
    (folder / "index.html").write_text(page("Listen", INDEX_TEXT + note + "".join(sections)), "utf-8")
    (folder / "blind.html").write_text(page("Listen blind", _blind(examples, files) + note), "utf-8")


def write_audio(path: Path, signal: Array) -> None:
    """Mono MP3 of SECONDS at one loudness, faded at both ends."""
    audio = signal[:SAMPLES].astype(np.float64).copy()
    audio *= min(0.1 / (np.sqrt((audio**2).mean()) + 1e-9), PEAK / (np.abs(audio).max() + 1e-9))
    audio[:FADE] *= np.linspace(0, 1, FADE)
    audio[-FADE:] *= np.linspace(1, 0, FADE)
    soundfile.write(
        path, audio, RATE, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.95,
        bitrate_mode="VARIABLE",
    )  # fmt: skip


def write_picture(path: Path, title: str, rows: list[Row]) -> None:
    """The job's spectrograms as a small JPEG."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / "picture.png"
        draw(png, f"armed: {title}", rows)
        with Image.open(png) as image:
            height = round(image.height * WIDTH / image.width)
            small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    small.save(target, "JPEG", quality=60, optimize=True)
    path.write_bytes(target.getvalue())


def page(title: str, body: str) -> str:
    """A whole HTML document that needs no network."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head += f"<style>{STYLE}</style>"
    content = f"<h1>{title}</h1>\n{body}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{content}\n</body></html>\n'


def encoded(key: dict[str, int]) -> str:
    """The answers, so that nobody reads them by looking at the page's source."""
    plain = json.dumps(key).encode()
    mixed = bytes(byte ^ SECRET[i % len(SECRET)] for i, byte in enumerate(plain))
    return base64.b64encode(mixed).decode()


INDEX_TEXT = (
    "<p>Bands from held-out grooves, played by a soundfont the model never heard. The first player is what "
    "the model was given, the second the same with what it made. In the pictures grey rows were given and "
    'coloured ones made. <a href="blind.html">Listen blind</a>: can you tell?</p>'
)
BLIND_TEXT = (
    "<p>One part of each band is either generated by Backline or rendered from notes; in the pairs, one side "
    "is Backline's and one that of inpainting alone with the same weights. The count stays in this browser. "
    '<a href="index.html">Back</a></p><p id="count"></p>'
    '<p><button id="reset">Start again</button></p>'
)
SCRIPT = """
const secret = "SECRET", raw = atob("KEY");
const key = JSON.parse([...raw].map((c, i) =>
  String.fromCharCode(c.charCodeAt(0) ^ secret.charCodeAt(i % secret.length))).join(""));
let said = {};
try { said = JSON.parse(localStorage.getItem("backline-blind-ID") || "{}"); } catch (error) {}
function show() {
  const told = Object.keys(said).filter(name => name in key);
  const right = told.filter(name => said[name] === key[name]).length;
  document.getElementById("count").textContent =
    `${right} of ${told.length} right; ${Object.keys(key).length} in all. Guessing gives half.`;
  for (const item of document.querySelectorAll(".item")) {
    const name = item.id, done = name in said;
    for (const input of item.querySelectorAll("input")) {
      input.disabled = done;
      input.checked = done && Number(input.value) === said[name];
    }
    item.querySelector(".verdict").textContent =
      !done ? "" : said[name] === key[name] ? "Right." : "It was the other.";
  }
}
document.addEventListener("change", event => {
  said[event.target.name] = Number(event.target.value);
  try { localStorage.setItem("backline-blind-ID", JSON.stringify(said)); } catch (error) {}
  show();
});
document.getElementById("reset").addEventListener("click", () => {
  said = {};
  try { localStorage.removeItem("backline-blind-ID"); } catch (error) {}
  show();
});
show();
"""


def _section(number: int, armed: tuple[str, ...], name: str) -> str:
    given = ", ".join(stem for stem in STEMS if stem not in armed)
    players = "".join(
        f'<p>{label}<br><audio controls preload="none" src="files/{name}-{kind}.mp3"></audio></p>'
        for label, kind in ((f"Given: {given}", "given"), (f"With generated {', '.join(armed)}", "made"))
    )
    picture = f'<img src="files/{name}.jpg" alt="Spectrograms of what was given and made" loading="lazy">'
    return f"\n<h2>{number}. {', '.join(armed)}</h2>{players}{picture}"


def _blind(examples: list[Example], files: Path) -> str:
    """Items of both questions in a shuffled order, eight single and six in pairs, and the script."""
    rng = np.random.default_rng(SEED)
    key: dict[str, int] = {}
    items = []
    rendered = rng.permutation(np.arange(8) % 2)
    for number, (example, choice) in enumerate(zip(examples[:8], rendered, strict=False), 1):
        item, name = f"a{number}", _hidden(number, "a")
        write_audio(files / name, example.mixes[ASKED["source"][int(choice)]])
        key[item] = int(choice)
        question = f"{number}. {' and '.join(example.armed).capitalize()}: generated or rendered?"
        items.append(_item(item, question, [name], ("generated", "rendered")))
    for number, example in enumerate(examples[-6:], 1):
        item, swapped = f"b{number}", int(rng.integers(2))
        names = [_hidden(number, side) for side in ("left", "right")]
        for name, kind in zip(names, ("generated", "peer")[:: -1 if swapped else 1], strict=True):
            write_audio(files / name, example.mixes[kind])
        key[item] = swapped
        question = f"{number + 8}. {' and '.join(example.armed).capitalize()}: which is ours?"
        items.append(_item(item, question, names, ("the first", "the second")))
    coded = encoded(key)
    mark = hashlib.sha256(coded.encode()).hexdigest()[:8]
    script = SCRIPT.replace("SECRET", SECRET.decode()).replace("KEY", coded).replace("ID", mark)
    return f"{BLIND_TEXT}{''.join(items)}<script>{script}</script>"


def _hidden(number: int, side: str) -> str:
    return hashlib.sha256(f"{SEED} {number} {side}".encode()).hexdigest()[:12] + ".mp3"


def _item(item: str, question: str, names: list[str], choices: tuple[str, str]) -> str:
    players = "".join(f'<audio controls preload="none" src="files/{name}"></audio>' for name in names)
    labels = "".join(
        f'<label><input type="radio" name="{item}" value="{value}"> {choice}</label>'
        for value, choice in enumerate(choices)
    )
    return (
        f'\n<div class="item" id="{item}"><p>{question}</p><div class="pair">{players}</div>'
        f'<p>{labels}<span class="verdict"></span></p></div>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="the bundle; the default one if not given")
    parser.add_argument("--grooves", type=Path, default=default_grooves(), help="cache of the groove probe")
    parser.add_argument("--out", type=Path, default=Path("docs/listen"), help="folder (%(default)s)")
    args = parser.parse_args()
    model = Model.open(args.model, "cpu")
    held = render(len(SUBSETS), args.grooves, lambda done: None)
    examples = [
        make_example(model, one.window, tuple(subset.split()))
        for one, subset in zip(held, tqdm(SUBSETS, desc="examples"), strict=True)
    ]
    manifest = model.manifest
    write_pages(examples, f"Made by {manifest.name} {manifest.version}.", args.out)


if __name__ == "__main__":
    main()
