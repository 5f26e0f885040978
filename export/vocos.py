"""The default family's vocoder: ConvNeXt blocks at the mel's rate and an inverse STFT (Vocos, Siuzdak 2023).

The head writes `split` spectra per mel frame, so that the synthesis window is shorter than the analysis
window and transients stay sharp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from export.blocks import ConvBlock, overlap_add


@dataclass(frozen=True)
class VocosConfig:
    mels: int = 128
    width: int = 256
    blocks: int = 7
    expansion: float = 2.0
    n_fft: int = 1024  # of the synthesis; its hop is n_fft / 4
    split: int = 2  # spectra per mel frame; samples per mel frame = split x n_fft / 4
    floor: float = 1e-4

    @property
    def bins(self) -> int:
        return self.n_fft // 2 + 1


class InverseFFT(nn.Module):
    """Hermitian half spectra (N, L, bins) x (real, imaginary) -> real frames (N, L, n_fft).

    A radix split n_fft = a x b in two small matrix products (Cooley & Tukey 1965), because ONNX has no
    inverse real FFT that every provider runs, and a full matrix would be larger than the network.
    """

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.side = math.isqrt(n_fft)
        if self.side**2 != n_fft:
            raise ValueError(f"n_fft must be a square number, not {n_fft}")
        n = torch.arange(self.side, dtype=torch.float64)
        small = 2 * math.pi * torch.outer(n, n) / self.side
        twiddle = 2 * math.pi * torch.outer(n, n) / n_fft
        # tables, not weights: they stay out of the state dict
        self.tables: dict[str, torch.Tensor] = {
            "cos": small.cos().float(),
            "sin": small.sin().float(),
            "twiddle_cos": twiddle.cos().float(),
            "twiddle_sin": twiddle.sin().float(),
        }

    def forward(self, real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
        n, length, _ = real.shape
        t = {k: v.to(real.device) for k, v in self.tables.items()}
        full_real = torch.cat([real, real[..., 1:-1].flip(-1)], -1)
        full_imag = torch.cat([imaginary, -imaginary[..., 1:-1].flip(-1)], -1)
        # X[a k1 + k2]: sum over k1 first, for every n1
        re = full_real.reshape(n, length, self.side, self.side).transpose(2, 3)  # (k2, k1)
        im = full_imag.reshape(n, length, self.side, self.side).transpose(2, 3)
        inner_re = re @ t["cos"] - im @ t["sin"]  # (k2, n1)
        inner_im = re @ t["sin"] + im @ t["cos"]
        turned_re = inner_re * t["twiddle_cos"] - inner_im * t["twiddle_sin"]
        turned_im = inner_re * t["twiddle_sin"] + inner_im * t["twiddle_cos"]
        outer = t["cos"] @ turned_re - t["sin"] @ turned_im  # (n2, n1), the real part is enough
        return outer.reshape(n, length, self.n_fft) / self.n_fft


class Vocos(nn.Module):
    """mel (N, mels, frames), natural log -> audio (N, 1, frames x split x n_fft / 4)."""

    def __init__(self, config: VocosConfig) -> None:
        super().__init__()
        c, self.config = config, config
        self.inward = nn.Conv1d(c.mels, c.width, 7, padding=3)
        self.norm_in = nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(ConvBlock(c.width, c.expansion, 7) for _ in range(c.blocks))
        self.norm_out = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.split * 2 * c.bins)
        self.inverse = InverseFFT(c.n_fft)
        self.window = torch.hann_window(c.n_fft) / 2  # four overlapping Hann windows sum to 2

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        c = self.config
        h = self.inward((mel - math.log(c.floor)) / 2.0).transpose(1, 2)
        h = self.norm_in(h)
        for block in self.blocks:
            h = block(h)
        h = self.head(self.norm_out(h))
        h = h.reshape(h.shape[0], h.shape[1] * c.split, 2 * c.bins)
        magnitude = h[..., : c.bins].clamp(max=7.0).exp()
        phase = h[..., c.bins :]
        frames = self.inverse(magnitude * phase.cos(), magnitude * phase.sin())
        return self._overlap(frames * self.window.to(frames.device))

    def _overlap(self, frames: torch.Tensor) -> torch.Tensor:
        """Overlap-add at a hop of n_fft / 4."""
        # without the first quarter frame i is centred on sample (i + 1) hop
        length = frames.shape[1]
        kept = overlap_add(frames)[:, 1 : 1 + length]
        return kept.reshape(frames.shape[0], 1, length * (self.config.n_fft // 4))
