"""Stereo masks: what is panned apart is told apart, and what is not is masked as before."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.audio import Audio
from engine.separation import apply_masks
from engine.wiener import covariances, panned, wiener
from training.metrics import si_sdr

RATE = 16000
SECONDS = 3


def bands(places: tuple[float, ...]) -> NDArray[np.float32]:
    """(S, 2, samples): independent noises of constant power, at places from -1 to 1."""
    rng = np.random.default_rng(0)
    noises = rng.standard_normal((len(places), SECONDS * RATE)) * 0.1
    angles = (np.array(places) + 1) * np.pi / 4
    gains = np.stack([np.cos(angles), np.sin(angles)], 1)
    return (noises[:, None] * gains[..., None]).astype(np.float32)


def split_by(weights: NDArray[np.float64], mix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Masks that know when each stem is the louder one, a little: one of weights (S, slots) at a time."""
    slots = weights.shape[1]

    def masks(seconds: NDArray[np.floating], hz: NDArray[np.floating]) -> NDArray[np.float32]:
        slot = np.clip((seconds / SECONDS * slots).astype(int), 0, slots - 1)
        return np.repeat(weights[:, slot, None], len(hz), 2).astype(np.float32)

    return apply_masks(Audio(mix, RATE), masks, len(weights), 0.0464)


def test_stems_at_different_places_come_apart() -> None:
    """By masks that are hardly better than none, and in stereo only."""
    stems = bands((-0.7, 0.6))
    loud = np.array([[1, 0.2, 1, 0.2], [0.2, 1, 0.2, 1]]) ** 0.5
    stems *= np.repeat(loud, SECONDS * RATE // 4, 1)[:, None].astype(np.float32)
    mix = stems.sum(0)
    weights = loud / loud.sum(0)
    found = {
        "stereo": split_by(weights, mix),
        "masks": split_by(weights, np.concatenate([mix, mix]))[:, :2],
    }
    assert np.abs(found["stereo"].sum(0) - mix).max() < 1e-6
    for number, stem in enumerate(stems):
        gains = {kind: si_sdr(parts[number].ravel(), stem.ravel()) for kind, parts in found.items()}
        assert gains["stereo"] > gains["masks"] + 3


@pytest.mark.parametrize("place", [-1.0, 0.0, 0.3])
def test_stems_at_one_place_are_masked(place: float) -> None:
    mix = bands((place, place, place)).sum(0)
    weights = np.array([[0.7, 0.1], [0.2, 0.1], [0.1, 0.8]])
    stereo = split_by(weights, mix)
    alone = split_by(weights, np.concatenate([mix, mix]))[:, :2]
    assert np.abs(stereo - alone).max() < 1e-5


def test_frames_at_once_or_one_by_one() -> None:
    rng = np.random.default_rng(1)
    spectrum = rng.standard_normal((2, 20, 9)) + 1j * rng.standard_normal((2, 20, 9))
    masks = rng.dirichlet(np.ones(3), (20, 9)).transpose(2, 0, 1)
    summed = sum(covariances(spectrum[:, i : i + 1], masks[:, i : i + 1]) for i in range(20))
    assert summed == pytest.approx(covariances(spectrum, masks))
    places = panned(np.asarray(summed))
    assert np.allclose(places[:, :2].sum(1), 1)
    parts = wiener(spectrum, masks, places)
    assert np.abs(parts.sum(0) - spectrum).max() < 1e-4
    matrix = np.array(
        [[places[:, 0], places[:, 2] + 1j * places[:, 3]], [places[:, 2] - 1j * places[:, 3], places[:, 1]]]
    )
    mixed = np.einsum("snf,abs...f->nfab", masks, matrix)
    inverse = np.einsum("nfab,bnf->nfa", np.linalg.inv(mixed), spectrum)
    assert np.allclose(parts, np.einsum("snf,absf,nfb->sanf", masks, matrix, inverse), atol=1e-5)
