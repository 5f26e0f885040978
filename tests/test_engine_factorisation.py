"""What repeats in a mix, against mixes made of sounds that do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.factorisation import fit, refined

FRAMES, BINS, STEMS, SOUNDS = 80, 60, 4, 3
Array = NDArray[np.float32]


def stems(rng: np.random.Generator) -> Array:
    """Magnitudes (S, n, bins) of stems that play SOUNDS different sounds each, again and again."""
    templates = rng.exponential(1, (STEMS, SOUNDS, BINS)) ** 2
    activations = rng.exponential(1, (STEMS, FRAMES, SOUNDS)) * (rng.random((STEMS, FRAMES, SOUNDS)) < 0.3)
    return (activations @ templates + 1e-3).astype(np.float32)


def shares(parts: Array) -> Array:
    return parts / parts.sum(axis=0)


def error(masks: Array, true: Array) -> float:
    """Of masked magnitudes, in dB of the stems'."""
    mix = true.sum(axis=0)
    return float(10 * np.log10(np.sum((masks * mix - true) ** 2) / np.sum(true**2)))


@pytest.mark.parametrize("seed", range(3))
def test_masks_with_errors_come_nearer_to_the_true_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = stems(rng)
    masks = shares(shares(true) * rng.lognormal(0, 1, true.shape).astype(np.float32))
    mix = true.sum(axis=0)
    found = refined(masks, mix)
    assert found.shape == masks.shape and found.dtype == np.float32
    assert np.allclose(found.sum(axis=0), 1, atol=1e-5)
    assert error(found, true) < error(masks, true) - 2
    assert error(refined(masks, mix, starts=3), true) < error(masks, true) - 2
    assert np.array_equal(found, refined(masks, mix))


def test_any_gain_is_heard_alike() -> None:
    rng = np.random.default_rng(0)
    true = stems(rng)
    masks = shares(rng.random(true.shape, np.float32))
    mix = true.sum(axis=0)
    assert np.allclose(refined(masks, mix), refined(masks, mix * 1e-4), atol=1e-4)


def test_silence_keeps_its_masks() -> None:
    masks = shares(np.random.default_rng(0).random((STEMS, 8, BINS), np.float32))
    assert np.array_equal(refined(masks, np.zeros((8, BINS), np.float32)), masks)


def test_what_no_mask_hears_stays_silent() -> None:
    rng = np.random.default_rng(0)
    true = stems(rng)
    true[2] = 0
    found = refined(shares(true), true.sum(axis=0))
    assert np.isfinite(found).all()
    assert float(found[2].max()) < 1e-2
    assert error(found[[0, 1, 3]], true[[0, 1, 3]]) < -15


def test_no_step_goes_away_from_the_magnitudes() -> None:
    """Lee and Seung's theorem: the divergence falls with every step, here to nearly nothing."""
    rng = np.random.default_rng(0)
    magnitudes = (rng.random((FRAMES, SOUNDS)) @ rng.random((SOUNDS, BINS))).astype(np.float32)
    activations = rng.random((FRAMES, SOUNDS), np.float32)
    templates = rng.random((SOUNDS, BINS), np.float32)
    divergences = []
    for _ in range(60):
        made = activations @ templates
        divergences.append(float((magnitudes * np.log(magnitudes / made) - magnitudes + made).sum()))
        activations, templates = fit(magnitudes, activations, templates, 1)
    assert all(after < before * 1.0001 for before, after in itertools.pairwise(divergences))
    assert divergences[-1] < 0.02 * divergences[0]
