"""Tempo and beats as heard in audio, and how they agree with a known grid. Times are seconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.metrics import FRAME_RATE, Array, onset_envelope

SLOWEST, FASTEST = 60.0, 210.0  # beats per minute that are looked for
RESOLUTION = 0.001  # of a tempo
BINS = 1 << 18  # of the padded transform: 0.02 beats per minute
HARMONICS = (1, 2, 3, 4, 6, 8)
OCTAVES = (0.25, 0.5, 1.0, 2.0, 4.0)
TOLERANCE = 0.07  # s, of a beat
TIGHTNESS = 100.0  # of the dynamic programme, as in Ellis 2007
SETTLING = 2.0  # s at both ends whose beats are not scored


def fitted_tempo(audio: Array) -> float:
    """Beats per minute of the grid that the onsets fit best; the octave is arbitrary.

    A Fourier tempogram (Grosche and Mueller 2011) summed over the harmonics of each candidate, so that its
    peaks are far narrower than the bins of one: over 20 s about 0.3 %.
    """
    envelope = onset_envelope(audio)
    envelope = (envelope - envelope.mean()) * np.hanning(len(envelope))
    spectrum = np.abs(np.fft.rfft(envelope, BINS))
    candidates = np.exp(np.arange(np.log(SLOWEST), np.log(FASTEST), RESOLUTION))
    score = np.zeros(len(candidates))
    for harmonic in HARMONICS:
        bins = np.round(candidates / 60 * harmonic / FRAME_RATE * BINS).astype(int)
        score += spectrum[bins] / np.sqrt(harmonic)
    return float(candidates[score.argmax()])


def folded_error(found: float, true: float) -> float:
    """Relative error of a tempo after moving it by the octaves that bring it nearest."""
    return min(abs(found * octave / true - 1) for octave in OCTAVES)


def nearest_octave(found: float, true: float) -> float:
    """The tempo, moved by octaves to the true one's."""
    return min((found * octave for octave in OCTAVES), key=lambda tempo: abs(np.log(tempo / true)))


def tracked_beats(audio: Array, bpm: float) -> NDArray[np.float64]:
    """Beat times at about this tempo: dynamic programming over the onset envelope (Ellis 2007)."""
    envelope = onset_envelope(audio)
    width = np.exp(-0.5 * (np.arange(-8, 9) / 2.0) ** 2)
    local = np.convolve(envelope / (envelope.std() + 1e-9), width / width.sum(), "same")
    period = 60 / bpm * FRAME_RATE
    steps = np.arange(-round(2 * period), -round(period / 2) + 1)
    cost = -TIGHTNESS * np.log(-steps / period) ** 2
    total, before = local.copy(), np.full(len(local), -1)
    for i in range(-steps[-1], len(local)):
        ends = i + steps
        scores = np.where(ends >= 0, cost + total[np.maximum(ends, 0)], -np.inf)
        best = int(scores.argmax())
        if scores[best] > 0:
            total[i] += scores[best]
            before[i] = ends[best]
    last = len(local) - round(period)
    beats = [last + int(total[last:].argmax())]
    while before[beats[-1]] >= 0:
        beats.append(int(before[beats[-1]]))
    return np.array(beats[::-1]) / FRAME_RATE


def beat_f1(beats: Array, grid: Array, seconds: float) -> float:
    """F1 of beats against a grid, each within 70 ms of at most one other; the ends are left out."""
    inside = [x[(x >= SETTLING) & (x <= seconds - SETTLING)] for x in (beats, grid)]
    hits, used = 0, set()
    for beat in inside[0]:
        near = int(np.abs(grid - beat).argmin())
        if abs(grid[near] - beat) <= TOLERANCE and near not in used:
            used.add(near)
            hits += 1
    return 2 * hits / max(1, len(inside[0]) + len(inside[1]))
