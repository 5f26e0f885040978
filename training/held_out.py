"""The public held-out set: songs of held-out grooves, played dry by TimGM6mb, made again from seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.bands import Song, split_grooves, try_song
from training.grooves import Groove, list_grooves
from training.instruments import RATE
from training.render import render_stem
from training.sources import Source, held_out_sources
from training.stems import STEMS

FIRST_SEED = 2_000_000  # validation during training uses seeds from 1,000,000
SECONDS = 262_144 / 22_050  # one chunk of MSDM's protocol, 11.9 s


@dataclass(frozen=True, eq=False)
class Window:
    """stems: (S, samples) true stems at 44.1 kHz, from a bar line, `start` seconds into the song."""

    stems: NDArray[np.float32]
    song: Song
    start: float
    seed: int

    @property
    def beat(self) -> float:
        """Length of a beat in seconds."""
        return 60 / self.song.bpm

    @property
    def mixture(self) -> NDArray[np.float32]:
        """(samples,)"""
        return self.stems.sum(0)


def make_window(seed: int, grooves: list[Groove], sources: list[Source], seconds: float = SECONDS) -> Window:
    """One window of one song; all four stems sound in its first SECONDS. Deterministic in the seed."""
    rng = np.random.default_rng(seed)
    while True:
        song = try_song(grooves, rng)
        chosen = [_draw(sources, stem, rng) for stem in STEMS]
        stems = np.stack([render_stem(song, source, rng, dry=True) for source in chosen])
        bar = song.beats_per_bar * 60 / song.bpm
        start = bar * round(16 / bar)
        part = stems[:, round(start * RATE) : round(start * RATE) + round(SECONDS * RATE)]
        levels = np.sqrt((part.astype(np.float64) ** 2).mean(1))
        if part.shape[1] == round(SECONDS * RATE) and (levels > 1e-3).all():
            whole = stems[:, round(start * RATE) : round(start * RATE) + round(seconds * RATE)]
            return Window(whole, song, start, seed)


def _draw(sources: list[Source], stem: str, rng: np.random.Generator) -> Source:
    pool = [s for s in sources if s.stem == stem]
    return pool[int(rng.integers(len(pool)))]


def held_out_windows(
    count: int, grooves_cache: Path, first: int = FIRST_SEED, sources: list[Source] | None = None
) -> list[Window]:
    """`count` windows of as many different songs. sources: their sounds, TimGM6mb's if not given."""
    grooves = split_grooves(list_grooves(grooves_cache), held_out=True)
    sounds = held_out_sources() if sources is None else sources
    return [make_window(first + i, grooves, sounds) for i in range(count)]
