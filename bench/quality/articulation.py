"""What VAE and vocoder leave of held notes and of the attacks of drums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.signal.windows import blackmanharris

from bench.quality.figures import Figure, of_means
from engine.harmony import UNPITCHED
from training import metrics
from training.held_out import RATE
from training.metrics import Array
from training.sources import Source, held_out_sources

PART = "sound"
PITCHES = {"bass": (29, 34, 39, 44), "guitar": (45, 52, 59, 66), "piano": (43, 55, 67, 79)}  # MIDI
EVERY, HELD, FIRST = 2.45, 2.4, 0.1  # s from note to note, that they are held, and before the first
STEADY = (0.3, 2.1)  # s of a note that are looked at, past the attack
SECONDS = 10.03
NOTE_RMS_DB = -26.0
PARTIALS_DB = 50.0  # under the strongest, at most, a partial is
BESIDE_HZ = 15.0  # to each side it is wide
LOWEST, HIGHEST = 40.0, 10_000.0  # Hz
MUCH_DB = -20.0
GRAIN = 128  # samples, 2.9 ms: of the levels in which an attack is looked for
RISE, AROUND = 3, 8  # grains before and after it, and those on either side of the onset that may hold it
LEAST_DB = 10.0  # by which an attack rises
QUIETEST_DB = 40.0  # under the loudest grain

Through = Callable[[Array], dict[str, Array]]  # (samples,) at RATE -> what came back, by what it went through


def held_notes(through: Through) -> Figure:
    """How much of a held note's power lies between its partials: hum, hiss, and partials that moved.

    Four notes of each pitched sound of the held-out font.
    """
    rows: dict[str, list[float]] = {"both": [], "vocoder": [], "true": [], "semitone": []}
    for source in held_out_sources():
        if source.stem in UNPITCHED:
            continue
        true, higher = (_play(source, [p + by for p in PITCHES[source.stem]]) for by in (0, 1))
        for kind, audio in (*through(true).items(), ("true", true), ("semitone", higher)):
            rows[kind] += [between_partials(audio[part], true[part]) for part in _steady_parts()]
    values = {kind: np.array(found) for kind, found in rows.items()}
    about: dict[str, Any] = {
        "ceiling": {
            "vocoder alone": float(values["vocoder"].mean()),
            "true notes": float(values["true"].mean()),
        },
        "floor": {"a semitone off": float(values["semitone"].mean())},
    }
    many, few = (np.mean(values[kind] > MUCH_DB) for kind in ("both", "vocoder"))
    note = f"{many:.2f} of the notes are above {MUCH_DB:.0f} dB, by the vocoder alone {few:.2f}"
    name = "power between the partials of held notes"
    return of_means(PART, name, values["both"], unit="dB", lower=True, note=note, **about)


def _play(source: Source, pitches: list[int]) -> Array:
    notes = np.array([(FIRST + EVERY * i, HELD, pitch, 90) for i, pitch in enumerate(pitches)])
    audio = source.render(notes, round(SECONDS * RATE), np.random.default_rng(0))
    return audio * np.float32(10 ** ((NOTE_RMS_DB - metrics.rms_db(audio)) / 20))


def _steady_parts() -> list[slice]:
    starts = [FIRST + EVERY * i for i in range(4)]
    return [slice(*(round((start + at) * RATE) for at in STEADY)) for start in starts]


def between_partials(audio: Array, true: Array) -> float:
    """dB of the power of a steady note (samples,) that is not at the partials of the true one."""
    window = blackmanharris(len(true))
    power, expected = (np.abs(np.fft.rfft(x * window)) ** 2 for x in (audio, true))
    hz = np.fft.rfftfreq(len(true), 1 / RATE)
    width = round(BESIDE_HZ * len(true) / RATE)
    partials = expected > expected.max() * 10 ** (-PARTIALS_DB / 10)
    partials = np.convolve(partials, np.ones(2 * width + 1), "same") > 0
    heard = (hz > LOWEST) & (hz < HIGHEST)
    return float(10 * np.log10(power[heard & ~partials].sum() / max(power[heard].sum(), 1e-12) + 1e-12))


def attacks(made: dict[str, list[Array]], true: list[Array]) -> Figure:
    """By how many dB the drums of windows rise where true ones are struck, as a share of what those do."""
    signals = made | {"true": true, "blurred": [_blurred(drums) for drums in true]}
    places = [struck(drums) for drums in true]
    rises = {
        kind: np.array([rise(audio, where) for audio, where in zip(found, places, strict=True)])
        for kind, found in signals.items()
    }
    shares = {kind: float(np.nanmean(found) / np.nanmean(rises["true"])) for kind, found in rises.items()}
    about: dict[str, Any] = {
        "ceiling": {"vocoder alone": shares["vocoder"]},
        "floor": {"blurred over 50 ms": shares["blurred"]},
        "note": f"true drums rise by {np.nanmean(rises['true']):.1f} dB from 9 ms before to 9 ms after",
    }
    return of_means(PART, "rise of drums' attacks, of the true ones'", rises["both"] / rises["true"], **about)


def struck(audio: Array) -> Array:
    """Grains of a signal (samples,) at which an attack begins, each the steepest near an onset."""
    level = _rises(audio)
    places = []
    for onset in metrics.onset_times(audio):
        near = round(onset * RATE / GRAIN)
        first = max(0, near - AROUND)
        places.append(first + int(level[first : near + AROUND + 1].argmax()))
    return np.array([place for place in places if level[place] > LEAST_DB], int)


def rise(audio: Array, places: Array) -> float:
    """Mean rise (dB) at these grains; NaN where there are none."""
    return float(_rises(audio)[places].mean()) if len(places) else float("nan")


def _rises(audio: Array) -> Array:
    """(grains,) level in dB of the RISE grains from each on, less that of those before the one before it."""
    grains = audio[: len(audio) // GRAIN * GRAIN].reshape(-1, GRAIN)
    power = (grains.astype(np.float64) ** 2).mean(1)
    floor = power.max() * 10 ** (-QUIETEST_DB / 10) + 1e-20
    mean = np.convolve(np.pad(power, (RISE + 1, RISE)), np.ones(RISE) / RISE, "valid")
    level = 10 * np.log10(np.maximum(mean, floor))
    return level[RISE + 1 :][: len(power)] - level[: len(power)]


def _blurred(audio: Array) -> Array:
    """Its own noise under an envelope that is blurred over 50 ms."""
    size = round(0.05 * RATE)
    envelope = np.sqrt(np.convolve(audio.astype(np.float64) ** 2, np.ones(size) / size, "same"))
    return envelope * np.random.default_rng(0).normal(0, 1, len(audio))
