"""Whole bands from a tempo and a chord chart: do they keep them, and do they sound like songs?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality.figures import Chosen, Figure, Tick, bootstrap, missing, of_means
from bench.quality.pitch import beat_one, chord_at
from bench.quality.playing import BASS_BAR, BEAT_BAR, heard_f1
from bench.quality.rhythm import fitted_tempo, folded_error
from bench.quality.windows import TEMPO_SECONDS, Held
from engine.audio import Audio, resample
from engine.conditions import prompt_film
from engine.harmony import UNPITCHED, heard_chords
from engine.listening import model_signal
from engine.model import Model
from engine.take import Settings, Take
from engine.tasks import generate
from training.bands import Song
from training.dataset import load_songs
from training.evaluate import FILL_SECONDS, nearest, training_bank
from training.held_out import RATE, Window
from training.metrics import Array
from training.stems import STEMS

PART = "generate"
TEMPO_ERROR, TEMPO_BAR = 0.01, 0.9
BANK = 2000  # training windows
SPLITS = 50  # random halves of the Frechet distance
SAMPLES = round(FILL_SECONDS * RATE)


@dataclass(frozen=True)
class Band:
    """A generated band of TEMPO_SECONDS at 44.1 kHz, told the tempo and the chords of a held-out song."""

    held: Held
    bass: Array
    drums: Array
    pitched: Array  # all but the drums
    mix: Array

    @property
    def song(self) -> Song:
        return self.held.window.song


def measure(
    model: Model, held: list[Held], data: Path | None, tick: Tick, familiar: Sequence[Window] = ()
) -> list[Figure]:
    """Tempo, beats, bass and chords as told; Frechet distance and novelty of the sound.

    familiar: the held-out songs in the sounds of training, what novelty is read against.
    """
    bands = []
    for number, one in enumerate(held):
        tick(number / len(held) * 0.9)
        bands.append(_band(model, one))
    figures = [_tempo(bands), _beats(bands), *_bass(bands), _chords(model, bands)]
    tick(0.95)
    return [*figures, *_frechet(model, bands), _novelty(bands, data, familiar)]


def told(model: Model, song: Song) -> dict[str, Any]:
    """What of the song this model can be told."""
    known: dict[str, Any] = {}
    if model.supports("grid") or model.supports("chords"):
        known |= {"bpm": song.bpm, "beats_per_bar": round(song.beats_per_bar)}
    if model.supports("chords"):
        known["chords"] = song.chart
    return known


def _band(model: Model, held: Held) -> Band:
    song = held.window.song
    settings = Settings(seed=held.window.seed)
    take = generate(model, seconds=TEMPO_SECONDS, settings=settings, **told(model, song))
    return Band(
        held,
        _at_rate(take, ["bass"]),
        _at_rate(take, ["drums"]),
        _at_rate(take, [stem for stem in take.stems if stem not in UNPITCHED]),
        _at_rate(take, list(take.stems)),
    )


def _at_rate(take: Take, stems: list[str]) -> Array:
    rate = take.stems[stems[0]].sample_rate
    total = np.sum([take.stems[stem].samples[0] for stem in stems], axis=0).astype(np.float32)
    return resample(Audio(total[None], rate), RATE).samples[0]


def _tempo(bands: list[Band]) -> Figure:
    hits = np.array([_keeps(fitted_tempo(band.mix), band.song.bpm) for band in bands])
    true = np.array([_keeps(band.held.tempo, band.song.bpm) for band in bands])
    turned = [band.song.bpm for band in bands[1:] + bands[:1]]
    chance = np.array([_keeps(band.held.tempo, bpm) for band, bpm in zip(bands, turned, strict=True)])
    return of_means(
        PART,
        "tempo of 20 s of generate --bpm within 1 %",
        hits,
        ceiling={"true songs": float(true.mean())},
        floor={"another's tempo": float(chance.mean())},
        bar=TEMPO_BAR,
    )


def _keeps(found: float, bpm: float) -> float:
    return float(folded_error(found, bpm) <= TEMPO_ERROR)


def _beats(bands: list[Band]) -> Figure:
    def score(drums: Array, song: Song) -> float:
        return heard_f1(drums, song.bpm, np.arange(0, TEMPO_SECONDS, 60 / song.bpm))

    turned = bands[1:] + bands[:1]
    found = np.array([score(band.drums, band.song) for band in bands])
    chance = [score(band.drums, other.song) for band, other in zip(bands, turned, strict=True)]
    return of_means(
        PART,
        "beat F1 of generated drums, 70 ms",
        found,
        floor={"another's grid": float(np.mean(chance))},
        bar=BEAT_BAR,
        note="against the grid it was told; tempo heard in the drums, octave folded",
    )


def _bass(bands: list[Band]) -> list[Figure]:
    turned = bands[1:] + bands[:1]
    own = np.array([beat_one(band.bass, band.song, 0.0) for band in bands])
    chance = np.array(
        [beat_one(b.bass, b.song, 0.0, other.song) for b, other in zip(bands, turned, strict=True)]
    )
    names = ("bass on beat 1 plays the chord's root, told", "bass on beat 1 plays a chord tone, told")
    return [
        of_means(
            PART,
            name,
            own[:, i],
            floor={"another's chords": float(chance[:, i].mean())},
            bar=BASS_BAR if i else None,
        )
        for i, name in enumerate(names)
    ]


def _chords(model: Model, bands: list[Band]) -> Figure:
    """How often the chord that is heard in a band has the root of the one that was told."""

    def agreement(signal: Array, song: Song, start: float) -> float:
        manifest = model.manifest
        mono = model_signal(Audio(signal[None].astype(np.float32), RATE), manifest)
        frame = manifest.mel.hop * manifest.latent.frames / manifest.mel.sample_rate
        frames = int(len(signal) / RATE / frame)
        rows = heard_chords(mono, manifest, frames)
        sounding = rows[:, 24] > 0
        roots = [chord_at(song, start + (i + 0.5) * frame).root for i in range(frames)]
        return float((rows[:, :12].argmax(1) == roots)[sounding].mean()) if sounding.any() else 0.0

    def true(held: Held) -> float:
        pitched = [i for i, stem in enumerate(STEMS) if stem not in UNPITCHED]
        window = held.window
        return agreement(window.stems[pitched].sum(0), window.song, window.start)

    turned = bands[1:] + bands[:1]
    chance = [agreement(b.pitched, other.song, 0.0) for b, other in zip(bands, turned, strict=True)]
    return of_means(
        PART,
        "heard chord's root is the told one's",
        np.array([agreement(band.pitched, band.song, 0.0) for band in bands]),
        ceiling={"true songs": float(np.mean([true(band.held) for band in bands]))},
        floor={"another's chords": float(np.mean(chance))},
        note="share of frames",
    )


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Frechet distance of two clouds of embeddings (n, E), taken as Gaussian (Heusel et al. 2017)."""
    root = _root(np.cov(a, rowvar=False))
    inner = root @ np.cov(b, rowvar=False) @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    traces = np.cov(a, rowvar=False).trace() + np.cov(b, rowvar=False).trace()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * overlap)


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _frechet(model: Model, bands: list[Band]) -> list[Figure]:
    name = "Frechet distance of the bundle's own audio embeddings"
    if not model.supports("audio"):
        return [missing(PART, name, "the bundle has no audio tower", lower=True)]
    if len(bands) < 4:
        return [missing(PART, name, "it takes at least four windows", lower=True)]
    true = [band.held.window.mixture for band in bands]
    parts = [band.held.window.stems for band in bands]
    strange = [
        np.sum([parts[(i + k) % len(parts)][k] for k in range(len(STEMS))], axis=0) for i in range(len(parts))
    ]
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, signal.std(), SAMPLES) for signal in true]
    clouds = [_embedded(model, signals) for signals in (true, [b.mix for b in bands], strange, noise)]
    found = np.array([_halves(clouds, np.random.default_rng(k)) for k in range(SPLITS)])
    middle = found.mean(0)
    spread = (float(np.quantile(found[:, 1], 0.025)), float(np.quantile(found[:, 1], 0.975)))
    ceiling = {"true halves": float(middle[0])}
    floor = {"stems of other songs": float(middle[2]), "noise": float(middle[3])}
    note = "against held-out songs, halves of the windows drawn 50 times, which is what the interval is over"
    about: dict[str, Any] = {"ceiling": ceiling, "floor": floor, "lower": True, "note": note}
    return [Figure(PART, name, float(middle[1]), spread, len(bands), **about)]


def _halves(clouds: list[NDArray[np.float64]], rng: np.random.Generator) -> list[float]:
    """Distances of one half of the true songs to the other half, and to that half of each other cloud."""
    order = rng.permutation(len(clouds[0]))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    return [frechet(clouds[0][one], cloud[other]) for cloud in clouds]


def _embedded(model: Model, signals: Sequence[Array]) -> NDArray[np.float64]:
    rows = [
        prompt_film(model, None, Audio(signal[None, :SAMPLES].astype(np.float32), RATE)) for signal in signals
    ]
    return np.concatenate([row for row in rows if row is not None]).astype(np.float64)


def _novelty(bands: list[Band], data: Path | None, familiar: Sequence[Window]) -> Figure:
    name = "nearest training window is no nearer than held-out songs', ratio"
    if data is None:
        return missing(PART, name, "no --data DIR was given (training.render)", bar=1.0)
    known = training_bank(load_songs(data / "train"), BANK)
    made = np.array(nearest(known, [band.mix for band in bands]))
    held = np.array(nearest(known, [band.held.window.mixture for band in bands]))

    def ratio(chosen: Chosen) -> float:
        return float(np.median(made[chosen]) / np.median(held[chosen]))

    everyone = np.arange(len(bands))
    note = f"medians {np.median(made):.3f} and {np.median(held):.3f}, of {BANK} training windows"
    about: dict[str, Any] = {"bar": 1.0, "note": note}
    if familiar:
        near = np.median(nearest(known, [window.mixture for window in familiar]))
        about["ceiling"] = {"the same songs in the sounds of training": float(near / np.median(held))}
    return Figure(PART, name, ratio(everyone), bootstrap(ratio, len(bands)), len(bands), **about)
