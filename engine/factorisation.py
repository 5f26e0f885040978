"""Masks that hear what repeats: nonnegative matrix factorisation of a mix, begun from its stems' masks.

An instrument plays few different sounds in a few seconds, and plays them again. So the magnitudes of each
stem are a small sum of templates, spectra that come and go (Smaragdis and Brown 2003), fitted to what the
masks give the stem at first and then, all stems together, to the mix: what a mask gave to a stem in one place
and not in another, where the same sound comes again, is shared out alike. Templates know nothing of
instruments and masks nothing of repetition, so both are asked.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

TEMPLATES = 12  # a stem, in the ten seconds or so that are given at a time
APART, TOGETHER = 10, 10  # steps on each stem under its mask and on the mix: more fit the masks' errors, too
TRUST = 0.6  # weight of the templates in the geometric mean with the masks
LEAST = np.float32(1e-4)  # a mask that rules a stem out where another hears it leaves it this much
NOTHING = np.float32(1e-6)  # of the mix's mean magnitude, far below what is audible


def refined(masks: FloatArray, magnitudes: FloatArray, starts: int = 1) -> FloatArray:
    """Masks (S, n, bins) that sum to one over stems, of a mix (n, bins): the same with what repeats heard.

    starts: random templates to begin with, so many times; what comes of them is averaged.
    """
    level = magnitudes.mean(dtype=np.float64)
    if not level > 0:
        return masks
    mix = (magnitudes / level).astype(np.float32)
    shares = np.mean([_shares(masks, mix, seed) for seed in range(starts)], axis=0)
    return geometric_mean(np.maximum(shares, LEAST), np.maximum(masks, LEAST), TRUST)


def geometric_mean(first: FloatArray, second: FloatArray, share: float) -> FloatArray:
    """Two masks (S, ...) above zero as one that sums to one over stems, `share` of it the first's.

    A product of experts (Hinton 2002, "Training products of experts by minimizing contrastive divergence").
    """
    mean = first**share * second ** (1 - share)
    return mean / mean.sum(axis=0)


def _shares(masks: FloatArray, mix: FloatArray, seed: int) -> FloatArray:
    """(S, n, bins): each stem's share of the templates' sum."""
    rng = np.random.default_rng(seed)
    fitted = [fit(mask * mix, *_random(mix.shape, rng), APART) for mask in masks]
    activations = np.concatenate([found for found, _ in fitted], axis=1)
    templates = np.concatenate([found for _, found in fitted])
    activations, templates = fit(mix, activations, templates, TOGETHER)
    stems = [slice(first, first + TEMPLATES) for first in range(0, len(templates), TEMPLATES)]
    parts = np.stack([activations[:, stem] @ templates[stem] for stem in stems]) + NOTHING
    return parts / parts.sum(axis=0)


def fit(
    magnitudes: FloatArray, activations: FloatArray, templates: FloatArray, steps: int
) -> tuple[FloatArray, FloatArray]:
    """Activations (n, K) and templates (K, bins) whose product is nearer to magnitudes (n, bins).

    Multiplicative updates, none of which makes the generalised Kullback-Leibler divergence larger (Lee and
    Seung 2001, "Algorithms for non-negative matrix factorization", theorem 2).
    """
    for _ in range(steps):
        ratio = magnitudes / (activations @ templates + NOTHING)
        activations = activations * (ratio @ templates.T) / (templates.sum(axis=1) + NOTHING)
        ratio = magnitudes / (activations @ templates + NOTHING)
        templates = templates * (activations.T @ ratio) / (activations.sum(axis=0)[:, None] + NOTHING)
    return activations, templates


def _random(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Where `fit` may begin, for magnitudes of this shape whose mean is about one."""
    frames, bins = shape
    activations = rng.uniform(0.1, 1.1, (frames, TEMPLATES)) / TEMPLATES**0.5
    templates = rng.uniform(0.1, 1.1, (TEMPLATES, bins)) / TEMPLATES**0.5
    return activations.astype(np.float32), templates.astype(np.float32)
