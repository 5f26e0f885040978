"""The held-out windows of one measurement, rendered from seeds by as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

import platformdirs

from bench.quality.rhythm import fitted_tempo
from engine.errors import BacklineError
from engine.model import available_cores
from training.bands import split_grooves
from training.grooves import STDLIB, list_grooves
from training.held_out import FIRST_SEED, RATE, SECONDS, Window, held_out_windows, make_window
from training.sources import HELD_OUT_FONT, Source, held_out_sources, training_sources

TEMPO_SECONDS = 20.0
Rendered = TypeVar("Rendered")


@dataclass(frozen=True)
class Held:
    """A window of a held-out song, and the tempo that is heard in 20 s of it."""

    window: Window
    tempo: float


def default_grooves() -> Path:
    """Where the probe of MMA's grooves is kept."""
    return Path(platformdirs.user_cache_dir("backline")) / "grooves.json"


def check_programs() -> None:
    """Raises BacklineError where the held-out set cannot be rendered."""
    absent = [name for name, there in _needed().items() if not there]
    if absent:
        raise BacklineError(
            f"The held-out set is rendered with MMA and TimGM6mb, and {' and '.join(absent)} is missing: "
            "install Debian's mma, libfluidsynth3 and timgm6mb-soundfont, and Backline's extra 'train'."
        )


def render(count: int, grooves: Path, report: Callable[[float], None]) -> list[Held]:
    """`count` windows of as many songs, the same whenever they are made. report: fraction done."""
    check_programs()
    grooves.parent.mkdir(parents=True, exist_ok=True)
    list_grooves(grooves)  # once, before the workers
    seeds = [FIRST_SEED + i for i in range(count)]
    return list(_in_parallel(partial(_render_one, grooves=grooves), seeds, report))


def render_familiar(
    count: int, grooves: Path, samples: Path, report: Callable[[float], None]
) -> list[Window]:
    """The songs of `render` in the sounds of training. samples: their folder. report: fraction done.

    A song is drawn before its sounds, so the notes are the same, unless a stem is silent in these.
    """
    seeds = [FIRST_SEED + i for i in range(count)]
    return list(_in_parallel(partial(_render_familiar, grooves=grooves, samples=samples), seeds, report))


def _render_familiar(seed: int, grooves: Path, samples: Path) -> Window:
    return held_out_windows(1, grooves, seed, _familiar_sources(samples))[0]


@cache
def _familiar_sources(samples: Path) -> list[Source]:
    return training_sources(samples)


def _render_one(seed: int, grooves: Path) -> Held:
    usable = split_grooves(list_grooves(grooves), held_out=True)
    whole = make_window(seed, usable, held_out_sources(), TEMPO_SECONDS)
    cut = replace(whole, stems=whole.stems[:, : round(SECONDS * RATE)].copy())
    return Held(cut, fitted_tempo(whole.mixture))


def _in_parallel(
    work: Callable[[int], Rendered], seeds: list[int], report: Callable[[float], None]
) -> Iterator[Rendered]:
    workers = min(len(seeds), available_cores())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(2, signal.SIG_IGN))
    try:
        for done, made in enumerate(pool.map(work, seeds), 1):
            yield made
            report(done / len(seeds))
    finally:
        pool.shutdown(cancel_futures=True)


def _needed() -> dict[str, bool]:
    return {
        "MMA": shutil.which("mma") is not None and STDLIB.is_dir(),
        "TimGM6mb": Path(HELD_OUT_FONT).exists(),
    }
