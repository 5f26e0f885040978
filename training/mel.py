"""The log mel spectrogram in torch, for training; the engine's numpy version is the definition."""

from __future__ import annotations

import functools
import math

import torch

from engine.features import mel_filterbank
from engine.manifest import Mel

GEOMETRY = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0.0, f_max=22050.0, floor=1e-4
)
LATENT_FRAMES = 4  # mel frames per latent frame
WINDOW = 216  # latent frames, 10.03 s
QUANTUM = 0.055  # step of log mels stored as bytes: 0 is the floor, 255 a magnitude of 123
FLOOR = math.log(GEOMETRY.floor)


@functools.lru_cache(maxsize=4)
def _filters(geometry: Mel) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(mel_filterbank(geometry)), torch.hann_window(geometry.win_length)


def log_mel(audio: torch.Tensor, geometry: Mel = GEOMETRY) -> torch.Tensor:
    """(N, samples) -> (N, samples // hop, mels), natural log of the clamped magnitude."""
    filters, window = (table.to(audio.device) for table in _filters(geometry))
    spectrum = torch.stft(
        audio,
        geometry.n_fft,
        geometry.hop,
        geometry.win_length,
        window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    mel = spectrum.abs().transpose(1, 2) @ filters
    return mel.clamp_min(geometry.floor).log()[:, : audio.shape[-1] // geometry.hop]


def to_bytes(mel: torch.Tensor) -> torch.Tensor:
    """Log mels as uint8, with an error of at most half a QUANTUM."""
    return ((mel - FLOOR) / QUANTUM).round().clamp(0, 255).to(torch.uint8)
