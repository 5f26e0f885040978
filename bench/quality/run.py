"""The whole measurement of `backline bench quality`, part by part; what is done is kept until all is."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe_machine
from bench.quality import band, cost, playing, sound, splitting
from bench.quality.figures import Figure, Tick
from bench.quality.windows import Held, check_programs, default_grooves, render, render_familiar
from engine.errors import UsageError
from engine.model import Model
from training.held_out import Window

PARTS = {
    "split": 0.2,
    "fill": 0.4,
    "generate": 0.2,
    "sound": 0.05,
    "cost": 0.05,
}  # and their shares of the time
RENDERING = 1 - sum(PARTS.values())
FAMILIAR = 0.1  # of generate's share, to render what its bands are told apart from
FEWEST, MOST = 2, 512
KEPT = ".quality_parts.json"

Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """What a measurement is told. None: not there, and the lines that need it say so."""

    windows: int = 64
    only: Sequence[str] = tuple(PARTS)
    grooves: Path | None = None  # cache of the groove probe
    classifier: Path | None = None  # folder of training.train_classifier
    data: Path | None = None  # folder with train/ of training.render
    samples: Path | None = None  # folder of the sounds of training
    htdemucs: Path | None = None  # htdemucs.onnx


def measure(bundle: Path | None, options: Options, folder: Path, report: Say) -> dict[str, Any]:
    """Every figure of the parts asked for. folder: where parts are kept, so that a stopped run goes on.

    report(what, fraction) raises to cancel. Raises UsageError for parts or numbers that make no sense,
    BacklineError where the bundle or the held-out set cannot be had.
    """
    _check(options)
    report("load", 0.0)
    model = Model.open(bundle, "cpu")
    check_programs()
    torch.set_num_threads(1)
    kept = _Kept(folder / KEPT, _fingerprint(model, options))
    wanted = [part for part in PARTS if part in options.only]
    missing = [part for part in wanted if part not in kept.parts]
    held: list[Held] = []
    if set(missing) - {"cost"}:
        grooves = options.grooves or default_grooves()
        held = render(options.windows, grooves, lambda done: report("render", done * RENDERING))
    done = RENDERING
    for part in wanted:
        if part in missing:
            with _timed(kept, part):
                tick = _tick(report, part, done)
                kept.parts[part] = [figure.plain() for figure in _measured(part, model, held, options, tick)]
            kept.write()
        done += PARTS[part]
    report("done", 1.0)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": f"{model.manifest.name} {model.manifest.version}",
        "windows": options.windows,
        "machine": describe_machine(),
        "training": model.manifest.provenance.get("training", {}),
        "seconds": kept.seconds,
        "figures": [figure for part in wanted for figure in kept.parts[part]],
    }
    kept.path.unlink(missing_ok=True)
    return result


def _measured(part: str, model: Model, held: list[Held], options: Options, tick: Tick) -> list[Figure]:
    windows = [one.window for one in held]
    if part == "split":
        return splitting.measure(model, windows, options.htdemucs, tick)
    if part == "fill":
        return playing.measure(model, windows, options.classifier, tick)
    if part == "generate":
        familiar: list[Window] = []
        if options.data is not None and options.samples is not None:
            grooves = options.grooves or default_grooves()
            rendering = _stretch(tick, 0.0, FAMILIAR)
            familiar = render_familiar(options.windows, grooves, options.samples, rendering)
        return band.measure(model, held, options.data, _stretch(tick, FAMILIAR, 1.0), familiar)
    if part == "sound":
        return sound.measure(model, windows, tick)
    tick(0.0)
    return cost.measure(model)


def _check(options: Options) -> None:
    for part in options.only:
        if part not in PARTS:
            raise UsageError(f"There is no part {part!r}: choose of {', '.join(PARTS)}.")
    if not FEWEST <= options.windows <= MOST:
        raise UsageError(f"The number of windows must be {FEWEST} to {MOST}, not {options.windows}.")
    for name in ("classifier", "data", "samples", "htdemucs"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise UsageError(f"There is no {path} for --{name}.")


def _tick(report: Say, part: str, start: float) -> Tick:
    return lambda fraction: report(part, start + PARTS[part] * min(1.0, fraction))


def _stretch(tick: Tick, start: float, end: float) -> Tick:
    return lambda fraction: tick(start + (end - start) * fraction)


def _fingerprint(model: Model, options: Options) -> str:
    """Of all that decides the figures: a part that was measured otherwise is not gone on from."""
    paths = [str(path) for path in (options.classifier, options.data, options.samples, options.htdemucs)]
    told = [model.manifest.model_dump_json(), str(options.windows), *paths]
    return hashlib.sha256(repr(told).encode()).hexdigest()


class _Kept:
    """Parts that are done, in a file."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint
        self.parts: dict[str, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            if found["fingerprint"] == fingerprint:
                self.parts, self.seconds = found["parts"], found["seconds"]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {"fingerprint": self.fingerprint, "parts": self.parts, "seconds": self.seconds}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(values), "utf-8")
        temporary.replace(self.path)


@contextmanager
def _timed(kept: _Kept, part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    kept.seconds[part] = round(time.perf_counter() - started, 1)
