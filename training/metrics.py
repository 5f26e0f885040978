"""What the evaluation measures, as plain functions of arrays. Audio is mono float at 44.1 kHz unless said."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from engine.features import log_mel, stft
from engine.manifest import Mel
from training.mel import FLOOR, GEOMETRY

Array = NDArray[np.floating]
# Figures stay comparable when the model's own geometry changes.
ONSET_MEL = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0.0, f_max=22050.0, floor=1e-4
)
FRAME_RATE = GEOMETRY.sample_rate / GEOMETRY.hop
CHROMA_FFT, CHROMA_HOP = 8192, 4096
MSDM_RATE, MSDM_WINDOW, MSDM_STEP = 22050, 4 * 22050, 2 * 22050
SILENT = 1.5e-5  # ||x||_2 / samples below which a window of a stem counts as silent, at MSDM_RATE


def si_sdr(estimate: Array, reference: Array, eps: float = 1e-8) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, no mean removal (Le Roux, arXiv:1811.02508)."""
    estimate, reference = estimate.astype(np.float64), reference.astype(np.float64)
    target = (estimate @ reference + eps) / (reference @ reference + eps) * reference
    return float(10 * np.log10((target @ target + eps) / (((estimate - target) ** 2).sum() + eps)))


def msdm_improvements(estimates: Array, references: Array) -> list[tuple[int, float]]:
    """(stem, SI-SDRi) for every scored window: MSDM's protocol (arXiv:2302.02257, section 5.3).

    estimates, references: (S, samples) at MSDM_RATE. Windows of 4 s every 2 s; those with at most one active
    stem are skipped, and only active stems in whole windows are scored.
    """
    mixture = references.sum(0)
    rows = []
    for start in range(0, references.shape[1] - MSDM_WINDOW + 1, MSDM_STEP):
        part = slice(start, start + MSDM_WINDOW)
        active = np.linalg.norm(references[:, part], axis=1) / MSDM_WINDOW >= SILENT
        if active.sum() <= 1:
            continue
        for stem in np.flatnonzero(active):
            reference = references[stem, part]
            gain = si_sdr(estimates[stem, part], reference) - si_sdr(mixture[part], reference)
            rows.append((int(stem), gain))
    return rows


def onset_envelope(audio: Array) -> Array:
    """(frames,) spectral flux: the mean rise of the log mels, at 86 frames a second (Boeck & Widmer 2013)."""
    mels = np.maximum(log_mel(audio[None].astype(np.float32), ONSET_MEL)[0], FLOOR + 3)
    return np.maximum(0, np.diff(mels, axis=0, prepend=mels[:1])).mean(1)


def chroma(audio: Array) -> Array:
    """(frames, 12) energy per pitch class from 55 Hz to 4 kHz, every 93 ms, its mean over classes removed."""
    spectrum = np.abs(stft(audio[None].astype(np.float32), CHROMA_FFT, CHROMA_HOP))[0]
    frequency = np.fft.rfftfreq(CHROMA_FFT, 1 / GEOMETRY.sample_rate)
    used = (frequency >= 55) & (frequency <= 4000)
    classes = np.round(12 * np.log2(frequency[used] / 440) + 69).astype(int) % 12
    folded = np.stack([np.sqrt(spectrum[:, used][:, classes == p]).sum(1) for p in range(12)], 1)
    return folded - folded.mean(1, keepdims=True)


def correlation(a: Array, b: Array) -> float:
    """Pearson's r of two arrays of one shape, over their common length; 0 where one is constant."""
    n = min(len(a), len(b))
    x, y = a[:n].ravel() - a[:n].mean(), b[:n].ravel() - b[:n].mean()
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 1e-9 else 0.0


def listening_feature(audio: Array, stem: str) -> Array:
    """What a stem shares with its context: onsets for drums, harmony for the rest."""
    return onset_envelope(audio) if stem == "drums" else chroma(audio)


def shifted(feature: Array, seconds: float, stem: str) -> Array:
    """A feature of the context as if the context began `seconds` later, wrapped around."""
    rate = FRAME_RATE if stem == "drums" else GEOMETRY.sample_rate / CHROMA_HOP
    return np.roll(feature, round(seconds * rate), axis=0)


def wins_of_own(stems: list[Array], contexts: list[Array]) -> Array:
    """(n, n): 1 where a stem's feature fits its own context better (row) than another (column), ties half."""
    fit = np.array([[correlation(stem, context) for context in contexts] for stem in stems])
    own = np.diagonal(fit)[:, None]
    return np.where(own == fit, 0.5, (own > fit).astype(np.float64))


def share_of_own(stems: list[Array], contexts: list[Array]) -> float:
    """Over all pairs (window, other): how often a stem's feature fits its own context better, ties half."""
    others = ~np.eye(len(stems), dtype=bool)
    return float(wins_of_own(stems, contexts)[others].mean())


def wins_of_aligned(stems: list[Array], contexts: list[Array], beats: list[float], role: str) -> Array:
    """(n, 3): 1 where a stem fits its context better than the same context 1, 2 and 3 beats (s) later."""
    return np.array(
        [
            [float(correlation(s, c) > correlation(s, shifted(c, k * beat, role))) for k in (1, 2, 3)]
            for s, c, beat in zip(stems, contexts, beats, strict=True)
        ]
    )


def share_of_aligned(stems: list[Array], contexts: list[Array], beats: list[float], role: str) -> float:
    """How often a stem fits its context better than the same context 1, 2 and 3 beats (s) later."""
    return float(wins_of_aligned(stems, contexts, beats, role).mean())


def rms_db(audio: Array) -> float:
    """Level in dBFS, -120 at least."""
    return float(10 * np.log10(np.mean(audio.astype(np.float64) ** 2) + 1e-12))


def brightness(audio: Array) -> float:
    """Spectral centroid in Hz of the whole signal's power spectrum."""
    spectrum = np.abs(stft(audio[None].astype(np.float32), 2048, 1024))[0].mean(0)
    return float((spectrum * np.fft.rfftfreq(2048, 1 / GEOMETRY.sample_rate)).sum() / (spectrum.sum() + 1e-9))


def onset_times(audio: Array) -> Array:
    """Seconds of the onset envelope's peaks: local maxima above the mean of the second around plus 0.08."""
    envelope = onset_envelope(audio)
    width = round(FRAME_RATE)
    padded = np.pad(envelope, width // 2, mode="edge")
    local = np.convolve(padded, np.ones(width) / width, "valid")[: len(envelope)]
    highest = (envelope >= np.roll(envelope, 1)) & (envelope > np.roll(envelope, -1))
    return np.flatnonzero(highest & (envelope > local + 0.08)) / FRAME_RATE


def onsets_per_second(audio: Array) -> float:
    """How many onsets a second of the signal has."""
    return len(onset_times(audio)) * GEOMETRY.sample_rate / len(audio)


def drone(pitch_classes: tuple[int, ...], samples: int) -> Array:
    """A static chord: sustained organ-like tones of these pitch classes around middle C."""
    t = np.arange(samples) / GEOMETRY.sample_rate
    tones = [440 * 2 ** ((60 + p - 69) / 12) for p in pitch_classes]
    wave = np.zeros(samples)
    for f, k in itertools.product(tones, (1, 2, 3)):
        wave += np.sin(2 * np.pi * f * k * t) / k
    return 0.05 * wave.astype(np.float32)


def interval(values: list[float], seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the mean (Efron 1979)."""
    data = np.asarray(values)
    means = np.random.default_rng(seed).choice(data, (rounds, len(data))).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
