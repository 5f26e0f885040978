"""The log mel spectrogram in torch, for training; the engine's numpy version is the definition."""

from __future__ import annotations

import functools
import math

import torch

from engine.features import low_filterbank, mel_filterbank
from engine.manifest import LowBands, Mel

GEOMETRY = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=152, f_min=0.0, f_max=22050.0, floor=1e-4,
    low=LowBands(n_fft=4096, bands=40, f_max=480.0),
)  # fmt: skip
LATENT_FRAMES = 4  # mel frames per latent frame
TONES = 12  # latents that say which pitch classes sound
WINDOW = 216  # latent frames, 10.03 s
QUANTUM = 0.055  # step of log mels stored as bytes: 0 is the floor, 255 a magnitude of 123
FLOOR = math.log(GEOMETRY.floor)


@functools.lru_cache(maxsize=4)
def _filters(geometry: Mel) -> list[tuple[int, torch.Tensor]]:
    """Length of the transform and filters, in the order of the bands."""
    tables = [(geometry.n_fft, torch.tensor(mel_filterbank(geometry)))]
    if geometry.low is not None:
        tables.insert(0, (geometry.low.n_fft, torch.tensor(low_filterbank(geometry))))
    return tables


def squared_magnitude(spectrum: torch.Tensor) -> torch.Tensor:
    """Of complex numbers of any shape; the square of torch's abs takes three times as long on a CPU."""
    return spectrum.real.square() + spectrum.imag.square()


def log_mel(audio: torch.Tensor, geometry: Mel = GEOMETRY) -> torch.Tensor:
    """(N, samples) -> (N, samples // hop, mels), natural log of the clamped magnitude."""
    parts = []
    for n_fft, filters in _filters(geometry):
        window = torch.hann_window(n_fft, device=audio.device)
        spectrum = torch.stft(
            audio, n_fft, geometry.hop, window=window, center=True, pad_mode="reflect", return_complex=True
        )
        magnitude = squared_magnitude(spectrum).clamp_min(1e-16).sqrt()  # of less the gradient would be 0 / 0
        parts.append(magnitude.transpose(1, 2) @ filters.to(audio.device))
    mel = torch.cat(parts, 2)
    return mel.clamp_min(geometry.floor).log()[:, : audio.shape[-1] // geometry.hop]


def to_bytes(mel: torch.Tensor) -> torch.Tensor:
    """Log mels as uint8, with an error of at most half a QUANTUM."""
    return ((mel - FLOOR) / QUANTUM).round().clamp(0, 255).to(torch.uint8)
