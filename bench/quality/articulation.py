"""What VAE and vocoder leave of held notes and of the attacks of drums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.signal import find_peaks
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
STRONG_DB = 20.0  # under the strongest, at most, is a partial whose sidebands count
SIDEBAND_HZ = 3.0  # to each side a line is wide
# Of sidebands: a modulation by 4.5 %. A few per cent are what can just be heard (Zwicker & Fastl,
# Psychoacoustics, chapter 10).
HUM_DB = -30.0
GRAIN = 128  # samples, 2.9 ms: of the levels in which an attack is looked for
RISE, AROUND = 3, 8  # grains before and after it, and those on either side of the onset that may hold it
LEAST_DB = 10.0  # by which an attack rises
QUIETEST_DB = 40.0  # under the loudest grain

Through = Callable[[Array], dict[str, Array]]  # (samples,) at RATE -> what came back, by what it went through


def held_notes(through: Through, patch_hz: float) -> list[Figure]:
    """How much of a held note's power lies between its partials, and how much of its partials' hums.

    Four notes of each pitched sound of the held-out font. patch_hz: how often the VAE writes a latent frame;
    whatever it draws alike into each is heard at this rate.
    """
    rows: dict[str, list[tuple[float, float]]] = {"both": [], "vocoder": [], "true": [], "semitone": []}
    for source in held_out_sources():
        if source.stem in UNPITCHED:
            continue
        true, higher = (_play(source, [p + by for p in PITCHES[source.stem]]) for by in (0, 1))
        for kind, audio in (*through(true).items(), ("true", true), ("semitone", higher)):
            for part in _steady_parts():
                pair = audio[part], true[part]
                rows[kind].append((between_partials(*pair), hum(*pair, patch_hz)))
    between, hums = ({kind: np.array(found)[:, i] for kind, found in rows.items()} for i in (0, 1))
    off = {"a semitone off": float(between["semitone"].mean())}
    return [
        _of_notes("power between the partials of held notes", between, MUCH_DB, floor=off),
        _of_notes(f"sidebands of held notes' partials at {patch_hz:.1f} Hz", hums, HUM_DB),
    ]


def _of_notes(name: str, values: dict[str, Array], much_db: float, **about: Any) -> Figure:
    many, few = (np.mean(values[kind] > much_db) for kind in ("both", "vocoder"))
    alone, true = (float(values[kind].mean()) for kind in ("vocoder", "true"))
    about["ceiling"] = {"vocoder alone": alone, "true notes": true}
    note = f"{many:.2f} of the notes are above {much_db:.0f} dB, by the vocoder alone {few:.2f}"
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
    power, expected = _spectra(audio, true)
    hz = np.fft.rfftfreq(len(true), 1 / RATE)
    width = round(BESIDE_HZ * len(true) / RATE)
    partials = expected > expected.max() * 10 ** (-PARTIALS_DB / 10)
    partials = np.convolve(partials, np.ones(2 * width + 1), "same") > 0
    heard = (hz > LOWEST) & (hz < HIGHEST)
    return float(10 * np.log10(power[heard & ~partials].sum() / max(power[heard].sum(), 1e-12) + 1e-12))


def hum(audio: Array, true: Array, rate_hz: float) -> float:
    """dB of the power of both sidebands `rate_hz` beside the strong partials of the true note, to theirs.

    A tone whose amplitude goes by a share m with that rate has 20 lg m - 3 dB.
    """
    power, expected = _spectra(audio, true)
    resolution = RATE / len(true)
    width = round(SIDEBAND_HZ / resolution)

    def around(hz: float) -> float:
        middle = round(abs(hz) / resolution)
        return float(power[max(0, middle - width) : middle + width + 1].sum())

    strong = expected.max() * 10 ** (-STRONG_DB / 10)
    partials = find_peaks(expected, height=strong, distance=round(BESIDE_HZ / resolution))[0] * resolution
    sidebands = sum(around(hz + side) for hz in partials for side in (-rate_hz, rate_hz))
    return float(10 * np.log10(sidebands / sum(around(hz) for hz in partials) + 1e-12))


def _spectra(audio: Array, true: Array) -> tuple[Array, Array]:
    window = blackmanharris(len(true))
    power, expected = (np.abs(np.fft.rfft(x * window)) ** 2 for x in (audio, true))
    return power, expected


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
