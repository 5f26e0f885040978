"""Audio as the model hears it: mono, at the model's rate and level, window by window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audio import Audio, fit, mono, release, resample
from engine.features import log_mel, mel_level
from engine.manifest import Manifest

FloatArray = NDArray[np.float32]

GATE_DB = 20.0  # windows this far under the loudest do not count towards a file's level
MAX_GAIN_DB = 80.0


def model_signal(audio: Audio, manifest: Manifest) -> FloatArray:
    """(n,) mono at the rate of the model's mel spectrograms."""
    return resample(Audio(mono(audio)[None], audio.sample_rate), manifest.mel.sample_rate).samples[0]


def signal_level(signal: FloatArray, manifest: Manifest) -> float:
    """Level of (n,) in dB, the mean over its windows without those far under the loudest; -inf: silence."""
    size = manifest.window_samples
    shortest = 4 * manifest.mel.margin
    starts = [s for s in range(0, len(signal), size) if s == 0 or len(signal) - s >= shortest]
    levels = np.array([_level_at(signal, s, size, manifest) for s in starts])
    heard = levels[levels > levels.max() - GATE_DB]
    return float(10 * np.log10(np.mean(10 ** (heard / 10)))) if len(heard) else -np.inf


def _level_at(signal: FloatArray, start: int, size: int, manifest: Manifest) -> float:
    level = mel_level(signal[None, start : start + size], manifest.mel)
    release(signal)
    return level


def gain_to(target_db: float, level_db: float) -> float:
    """The factor that brings a signal of this level to the target; 1 for silence."""
    if not np.isfinite(level_db):
        return 1.0
    return float(10 ** (np.clip(target_db - level_db, -MAX_GAIN_DB, MAX_GAIN_DB) / 20))


def window_mel(
    signal: FloatArray, manifest: Manifest, start: int, frames: int, gain: float = 1.0
) -> FloatArray:
    """Log mel (frames * latent.frames, mels) of latent frames start .. start + frames of a signal (n,).

    The window sees its real neighbours; silence follows the end of the signal, and the first samples
    are reflected to the left of it.
    """
    mel, hop = manifest.mel, manifest.mel.hop * manifest.latent.frames
    pad = mel.margin
    left, right = start * hop - pad, (start + frames) * hop + pad
    part = signal[max(0, left) : right]
    if left < 0:
        part = np.concatenate([signal[1 : 1 - left][::-1], part])
    if right > len(signal) >= right - pad:
        # A window that ends where the signal does is reflected, as it is in training.
        part = np.pad(part, (0, right - len(signal)), mode="reflect")
    part = fit(part, right - left)[None] * np.float32(gain)
    release(signal)
    return log_mel(part, mel, padded=True)[0]
