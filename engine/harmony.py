"""The chords that a recording plays, heard frame by frame, so that what is filled in fits them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.features import stft
from engine.manifest import Manifest

FloatArray = NDArray[np.float32]

UNPITCHED = ("drums",)  # stems that say nothing about harmony
FFT_SECONDS = 0.186  # long enough to tell semitones apart from 130 Hz up
LOW, MIDDLE, HIGH = 40.0, 160.0, 2000.0  # Hz: the bass is heard from LOW to MIDDLE, chords from 55 Hz to HIGH
CHORDS_FROM = 55.0
# Semitones above the root, and how much each tone counts.
QUALITIES = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 10), (0, 4, 7, 11), (0, 3, 7, 10))
TONE_WEIGHTS = (1.0, 0.9, 0.9, 0.5)
SMOOTH = 5  # latent frames
CHANGE = 0.01  # probability that a chord ends at a latent frame
CHORD_FIT, BASS_FIT = 5.0, 1.0  # log likelihood of a perfect match
SILENCE_DB = -50.0  # under the loudest frame
BLOCK = 512  # frames analysed at a time


def heard_chords(signal: FloatArray, manifest: Manifest, frames: int) -> FloatArray:
    """(n,) mono at the mel's rate -> (frames, 25), laid out as manifest.Chords: what is heard, softly.

    Root and tones are posterior probabilities of a hidden Markov model over twelve roots and five qualities
    (Sheh and Ellis 2003, with fixed templates instead of trained ones); frames without sound are zeros,
    unknown.
    """
    rate, hop = manifest.mel.sample_rate, manifest.mel.hop * manifest.latent.frames
    n_fft = 1 << round(np.log2(FFT_SECONDS * rate))
    classes = _pitch_classes(signal, frames, rate, n_fft, hop)
    level = classes[:, 0].sum(1)
    sounding = level > level.max(initial=0.0) * 10 ** (SILENCE_DB / 20)
    smooth = np.apply_along_axis(np.convolve, 0, classes.reshape(frames, 24), _bump(SMOOTH), "same")
    likelihood = _likelihood(smooth.reshape(frames, 2, 12))
    posterior = _posterior(likelihood, CHANGE)
    roots, tones = _templates(weighted=False)
    known = np.ones((frames, 1))
    rows = np.concatenate([posterior @ roots, posterior @ tones, known], axis=1)
    return (rows * sounding[:, None]).astype(np.float32)


def _pitch_classes(signal: FloatArray, frames: int, rate: int, n_fft: int, hop: int) -> NDArray[np.float64]:
    """(frames, 2, 12): strength of each pitch class among all tones, and in the bass."""
    weights = _class_weights(rate, n_fft)
    left = n_fft // 2 - hop // 2  # centred on latent frames
    padded = np.pad(signal, (left, max(0, frames * hop + n_fft - left - len(signal))))
    out = np.zeros((frames, 24))
    for start in range(0, frames, BLOCK):
        count = min(BLOCK, frames - start)
        part = padded[start * hop : (start + count - 1) * hop + n_fft]
        out[start : start + count] = np.sqrt(np.abs(stft(part, n_fft, hop))) @ weights
    return out.reshape(frames, 2, 12)


@lru_cache(maxsize=4)
def _class_weights(rate: int, n_fft: int) -> NDArray[np.float64]:
    """(bins, 24): how much each bin counts towards each pitch class; between semitones it counts little."""
    frequency = np.fft.rfftfreq(n_fft, 1 / rate)
    pitch = 12 * np.log2(np.maximum(frequency, 1.0) / 440) + 69
    near = np.exp(-0.5 * ((pitch - np.round(pitch)) / 0.25) ** 2)
    own = np.round(pitch).astype(int)[:, None] % 12 == np.arange(12)
    parts = [(frequency >= low) & (frequency <= high) for low, high in ((CHORDS_FROM, HIGH), (LOW, MIDDLE))]
    return np.concatenate([own * (near * part)[:, None] for part in parts], axis=1)


def _bump(width: int) -> NDArray[np.float64]:
    window = np.hanning(width + 2)[1:-1]
    return window / window.sum()


def _templates(weighted: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Roots (60, 12) and tones (60, 12) of every chord, tones weighted or 0 and 1."""
    roots, tones = np.zeros((60, 12)), np.zeros((60, 12))
    for number, (root, quality) in enumerate((r, q) for r in range(12) for q in QUALITIES):
        roots[number, root] = 1
        for interval, weight in zip(quality, TONE_WEIGHTS, strict=False):
            tones[number, (root + interval) % 12] = weight if weighted else 1
    return roots, tones


def _likelihood(classes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(frames, 2, 12) -> (frames, 60), each row's largest 1."""
    roots, tones = _templates(weighted=True)
    # overtones and noise reach every class: what rises above the middle one is a tone
    above = np.maximum(0, classes[:, 0] - 0.7 * np.median(classes[:, 0], axis=1, keepdims=True))
    above /= np.linalg.norm(above, axis=1, keepdims=True) + 1e-9
    bass = classes[:, 1] / (classes[:, 1].sum(1, keepdims=True) + 1e-9)
    score = (
        CHORD_FIT * above @ (tones / np.linalg.norm(tones, axis=1, keepdims=True)).T
        + BASS_FIT * bass @ roots.T
    )
    return np.exp(score - score.max(1, keepdims=True))


def _posterior(likelihood: NDArray[np.float64], change: float) -> NDArray[np.float64]:
    """Forward-backward (Rabiner 1989, equations 19 to 27) where a chord stays, or any follows alike."""
    frames, states = likelihood.shape
    forward, backward = np.empty_like(likelihood), np.ones_like(likelihood)
    belief = np.full(states, 1 / states)
    for i in range(frames):
        belief = ((1 - change) * belief + change / states) * likelihood[i]
        belief /= belief.sum()
        forward[i] = belief
    for i in range(frames - 2, -1, -1):
        ahead = backward[i + 1] * likelihood[i + 1]
        ahead /= ahead.sum()
        backward[i] = (1 - change) * ahead + change / states
    joint = forward * backward
    return joint / joint.sum(1, keepdims=True)
