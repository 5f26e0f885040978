"""How loud a sound is to the ear, after ITU-R BS.1770-4, for bringing one to the level of others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio

ABSOLUTE_GATE, RELATIVE_GATE = -70.0, -10.0  # LUFS, LU
BLOCK_SECONDS, STEP_SECONDS = 0.4, 0.1
CHUNK = 1 << 18  # samples filtered at a time
RING_SECONDS = 0.5  # the filter's answer is below -140 dB of its peak after this


def loudness(audio: Audio) -> float:
    """Integrated loudness in LUFS; -inf for silence, or what never passes the gates.

    Every channel counts once, as left and right do in the standard; a sound under 0.4 s is one block.
    """
    step = round(STEP_SECONDS * audio.sample_rate)
    energy = _step_energies(audio, step)
    per_block = round(BLOCK_SECONDS / STEP_SECONDS)
    if len(energy) >= per_block:
        sums = np.convolve(energy, np.ones(per_block), "valid") / (per_block * step)
    else:
        sums = np.array([energy.sum() / audio.length])
    with np.errstate(divide="ignore"):
        levels = -0.691 + 10 * np.log10(sums)
    loud = sums[levels > ABSOLUTE_GATE]
    if not len(loud):
        return -np.inf
    gate = -0.691 + 10 * np.log10(loud.mean()) + RELATIVE_GATE
    return float(-0.691 + 10 * np.log10(sums[(levels > ABSOLUTE_GATE) & (levels > gate)].mean()))


def _step_energies(audio: Audio, step: int) -> NDArray[np.float64]:
    """(n // step,) energies of the K-weighted sound, summed over the channels; one for less than a step."""
    count = max(1, audio.length // step)
    energies = np.zeros(count)
    chunk = max(1, CHUNK // step) * step
    ring = round(RING_SECONDS * audio.sample_rate)
    size = 1 << (chunk + ring - 1).bit_length()
    weight = _k_weighting(size, audio.sample_rate)
    for channel in audio.samples:
        for start in range(0, audio.length, chunk):
            part = channel[max(0, start - ring) : start + chunk]
            lead = min(start, ring)
            heard = np.fft.irfft(np.fft.rfft(part, size) * weight, size)[lead : len(part)]
            whole = len(heard) // step if len(heard) >= step else 0
            first = start // step
            if whole:
                squares = np.square(heard[: whole * step]).reshape(whole, step).sum(axis=1)
                energies[first : first + whole] += squares
            elif audio.length < step:
                energies[0] += float(np.square(heard).sum())
    return energies


def _k_weighting(size: int, rate: int) -> NDArray[np.complex128]:
    """The frequency response of both stages at the bins of an FFT of `size`.

    The standard gives coefficients for 48 kHz; these are their analogue designs (a high shelf of 4 dB at
    1682 Hz, a high-pass at 38 Hz) at any rate.
    """
    z = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    shelf = _shelf(rate, 1681.974450955533, 3.999843853973347, 0.7071752369554196)
    high_pass = _high_pass(rate, 38.13547087602444, 0.5003270373238773)
    response = np.ones(len(z), np.complex128)
    for top, bottom in (shelf, high_pass):
        response *= np.polyval(top[::-1], z) / np.polyval(bottom[::-1], z)
    return response


def _shelf(rate: int, frequency: float, gain_db: float, q: float) -> tuple[list[float], list[float]]:
    k = np.tan(np.pi * frequency / rate)
    high = 10 ** (gain_db / 20)
    band = high**0.4996667741545416
    scale = 1 + k / q + k * k
    top = [(high + band * k / q + k * k) / scale, 2 * (k * k - high) / scale]
    top.append((high - band * k / q + k * k) / scale)
    return top, [1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale]


def _high_pass(rate: int, frequency: float, q: float) -> tuple[list[float], list[float]]:
    k = np.tan(np.pi * frequency / rate)
    scale = 1 + k / q + k * k
    return [1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale]
