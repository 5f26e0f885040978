"""Short-time Fourier transform, mel filters and log mel spectrograms in numpy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Mel

FloatArray = NDArray[np.float32]

# Slaney's scale (Auditory Toolbox, 1998): linear to 1 kHz, logarithmic above.
SLANEY_LINEAR = 200.0 / 3  # Hz per mel
SLANEY_CORNER = 1000.0  # Hz
SLANEY_LOG_STEP = np.log(6.4) / 27  # per mel


@lru_cache(maxsize=16)
def hann(length: int, n_fft: int) -> FloatArray:
    """(n_fft,) periodic Hann window of `length` samples, centred among zeros. Read-only."""
    window = np.zeros(n_fft, np.float32)
    left = (n_fft - length) // 2
    window[left : left + length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    window.flags.writeable = False
    return window


def stft(audio: FloatArray, n_fft: int, hop: int, *, win_length: int | None = None) -> NDArray[np.complex64]:
    """(..., samples) -> (..., frames, n_fft / 2 + 1); frame i starts at sample i * hop, only whole frames.

    Pad by n_fft / 2 on each side to centre the frames.
    """
    frames = np.lib.stride_tricks.sliding_window_view(audio, n_fft, axis=-1)[..., ::hop, :]
    return np.fft.rfft(frames * hann(win_length or n_fft, n_fft), axis=-1).astype(np.complex64, copy=False)


def istft(
    spectrum: NDArray[np.complex64], n_fft: int, hop: int, *, win_length: int | None = None
) -> FloatArray:
    """(..., frames, bins) -> (..., (frames - 1) * hop + n_fft): the least-squares inverse of `stft`.

    Griffin and Lim 1984, equation 6. Exact wherever the squared windows do not sum to zero, so all
    samples that are covered by n_fft / hop frames.
    """
    window = hann(win_length or n_fft, n_fft)
    frames = np.fft.irfft(spectrum, n_fft, axis=-1).astype(np.float32, copy=False) * window
    total = overlap_add(frames, hop)
    total /= np.maximum(overlap_add(_squares(window, frames.shape[-2]), hop), 1e-8)
    return total


def overlap_add(frames: FloatArray, hop: int) -> FloatArray:
    """(..., frames, n) -> (..., (frames - 1) * hop + n). n must be a multiple of hop."""
    *batch, count, size = frames.shape
    rows = size // hop
    total = np.zeros((*batch, count + rows - 1, hop), np.float32)
    parts = frames.reshape(*batch, count, rows, hop)
    for row in range(rows):
        total[..., row : row + count, :] += parts[..., row, :]
    return total.reshape(*batch, (count + rows - 1) * hop)


def hz_to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's mel scale."""
    above = SLANEY_CORNER / SLANEY_LINEAR + np.log(np.maximum(hz, 1e-9) / SLANEY_CORNER) / SLANEY_LOG_STEP
    return np.where(hz < SLANEY_CORNER, hz / SLANEY_LINEAR, above)


def mel_to_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `hz_to_mel`."""
    corner = SLANEY_CORNER / SLANEY_LINEAR
    above = SLANEY_CORNER * np.exp(SLANEY_LOG_STEP * (np.maximum(mels, corner) - corner))
    return np.where(mels < corner, mels * SLANEY_LINEAR, above)


def mel_edges(mel: Mel) -> NDArray[np.float64]:
    """(n_mels + 2,) corner frequencies in Hz; band b rises from b to its peak at b + 1 and falls to b + 2."""
    if mel.low is None:
        return _slaney_edges(mel.f_min, mel.f_max, mel.n_mels + 2)
    evenly = np.linspace(mel.f_min, mel.low.f_max, mel.low.bands + 1)
    return np.concatenate(
        [evenly, _slaney_edges(mel.low.f_max, mel.f_max, mel.n_mels - mel.low.bands + 2)[1:]]
    )


@lru_cache(maxsize=8)
def mel_filterbank(mel: Mel) -> FloatArray:
    """(n_fft / 2 + 1, n_mels - low bands) triangles, each of unit area. Read-only."""
    edges = mel_edges(mel)[mel.low.bands if mel.low else 0 :]
    return _read_only(triangles(edges, mel.n_fft, mel.sample_rate) * (2 / (edges[2:] - edges[:-2])))


@lru_cache(maxsize=8)
def low_filterbank(mel: Mel) -> FloatArray:
    """(low.n_fft / 2 + 1, low.bands) triangles, as high as the lowest of `mel_filterbank`. Read-only.

    A Hann window twice as long doubles the magnitude of a sine: that is taken back. Raises ValueError where
    the geometry has no low bands.
    """
    if mel.low is None:
        raise ValueError("this geometry has no low bands")
    edges = mel_edges(mel)
    first = edges[mel.low.bands :]
    height = 2 / (first[2] - first[0]) * mel.win_length / mel.low.n_fft
    return _read_only(triangles(edges[: mel.low.bands + 2], mel.low.n_fft, mel.sample_rate) * height)


def mel_magnitude(audio: FloatArray, mel: Mel, *, padded: bool = False) -> FloatArray:
    """(N, samples) at mel.sample_rate -> (N, samples // hop, n_mels) magnitudes.

    Frame i is centred on sample i * hop. The ends are reflected, unless `padded` says that `audio`
    already carries mel.margin neighbouring samples on each side.
    """
    pad = mel.margin
    if not padded:
        audio = np.pad(audio, ((0, 0), (pad, pad)), mode="reflect")
    frames = (audio.shape[1] - 2 * pad) // mel.hop
    # The transform makes one frame more, centred on the sample past the end.
    inner = audio[:, pad - mel.n_fft // 2 : audio.shape[1] - pad + mel.n_fft // 2]
    spectrum = stft(inner, mel.n_fft, mel.hop, win_length=mel.win_length)[:, :frames]
    high = np.abs(spectrum) @ mel_filterbank(mel)
    if mel.low is None:
        return high
    inner = audio[:, pad - mel.low.n_fft // 2 : audio.shape[1] - pad + mel.low.n_fft // 2]
    filters = low_filterbank(mel)
    reached = int(np.flatnonzero(filters.any(axis=1))[-1]) + 1  # the rest of the spectrum is not needed
    low = np.abs(stft(inner, mel.low.n_fft, mel.hop)[:, :frames, :reached]) @ filters[:reached]
    return np.concatenate([low, high], axis=2)


def log_mel(audio: FloatArray, mel: Mel, *, padded: bool = False) -> FloatArray:
    """(N, samples) -> (N, samples // hop, n_mels): natural log of `mel_magnitude`, clamped at mel.floor."""
    return np.log(np.maximum(mel_magnitude(audio, mel, padded=padded), mel.floor))


def mel_level(audio: FloatArray, mel: Mel) -> float:
    """Level of (N, samples) in dB, as manifest.Level defines it; -inf for silence."""
    power = np.mean(np.square(mel_magnitude(audio, mel), dtype=np.float64))
    return float(10 * np.log10(power)) if power > 0 else -np.inf


def _slaney_edges(f_min: float, f_max: float, count: int) -> NDArray[np.float64]:
    low, high = hz_to_mel(np.array([f_min, f_max], np.float64))
    return mel_to_hz(np.linspace(low, high, count))


def triangles(edges: NDArray[np.float64], n_fft: int, sample_rate: int) -> NDArray[np.float64]:
    """(n_fft / 2 + 1, len(edges) - 2) triangles of height 1."""
    bins = np.fft.rfftfreq(n_fft, 1 / sample_rate)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling))


def _read_only(table: NDArray[np.float64]) -> FloatArray:
    filters = table.astype(np.float32)
    filters.flags.writeable = False
    return filters


def _squares(window: FloatArray, frames: int) -> FloatArray:
    return np.broadcast_to(window * window, (frames, len(window)))
