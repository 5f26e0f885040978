"""Masks that hear where stems are panned: a multichannel Wiener filter for stereo mixes.

In every bin the two channels of a stem are taken for complex Gaussians of covariance v R (Duong, Vincent and
Gribonval 2010, arXiv:0912.0171): v, its power, is what its mask gives it of the mix, and R is where it is
panned, the same all through the mix. R comes from what the masks alone would give the stem, one step of
expectation maximisation (Nugraha, Liutkus and Vincent 2016): further ones help guitars and pianos to each
other's notes. Where all stems are panned alike, these are the masks themselves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Complex = NDArray[np.complexfloating]

DIFFUSE = 0.02  # of a stem's power, taken to come from everywhere: none is in a single place


def covariances(spectrum: Complex, masks: Array) -> NDArray[np.float64]:
    """(S, 4, bins) of a stereo spectrum (2, n, bins) under masks (S, n, bins), summed over the n frames.

    |left|^2, |right|^2, and the real and imaginary part of left times right's conjugate. Those of further
    frames may be added.
    """
    left, right = spectrum
    cross = left * right.conj()
    parts = (np.abs(left) ** 2, np.abs(right) ** 2, cross.real, cross.imag)
    weights = masks**2
    return np.stack([np.sum(weights * part, axis=1, dtype=np.float64) for part in parts], axis=1)


def panned(summed: NDArray[np.float64]) -> NDArray[np.float32]:
    """The R of each stem and bin, (S, 4, bins) as `covariances` has them, of trace one."""
    trace = summed[:, :2].sum(axis=1, keepdims=True)
    whole = np.divide(summed, trace, out=np.zeros_like(summed), where=trace > 0) * (1 - DIFFUSE)
    whole[:, :2] += (1 - whole[:, :2].sum(axis=1, keepdims=True)) / 2
    return whole.astype(np.float32)


def wiener(spectrum: Complex, masks: Array, places: NDArray[np.float32]) -> Complex:
    """(S, 2, n, bins): every stem's part of a spectrum (2, n, bins); they sum to it.

    masks: (S, n, bins) that sum to one; places: (S, 4, bins) from `panned`.
    """
    left, right = spectrum
    powers = [np.sum(masks * places[:, None, part], axis=0) for part in range(4)]
    cross = powers[2] + 1j * powers[3]
    scale = 1 / (powers[0] * powers[1] - np.abs(cross) ** 2)  # of the inverse covariance of the mix
    first = (powers[1] * left - cross * right) * scale
    second = (powers[0] * right - cross.conj() * left) * scale
    own, own_right = places[:, None, 0], places[:, None, 1]
    between = (places[:, 2] + 1j * places[:, 3])[:, None]
    parts = [own * first + between * second, between.conj() * first + own_right * second]
    return np.stack([masks * part for part in parts], axis=1)
