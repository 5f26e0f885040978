"""The Fourier transform of real frames as matrix products, which every provider runs."""

from __future__ import annotations

import math

import torch
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]  # real and imaginary parts


class RealFFT(nn.Module):
    """Fourier transform of real frames and back, as two matrix products each (Cooley and Tukey 1965).

    With n = b n1 + n2 and k = k1 + a k2, rows k1 = 0 .. a / 2 hold every bin once (those two rows twice);
    the other rows are their conjugates. A spectrum is a pair (..., a / 2 + 1, b) of real and imaginary parts.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    rows_back: torch.Tensor
    columns_back: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        bits = n_fft.bit_length() - 1
        if n_fft < 4 or n_fft != 1 << bits:
            raise ValueError(f"n_fft must be a power of two from 4 on, not {n_fft}")
        self.n_fft, self.a = n_fft, 1 << (bits // 2)
        self.b = n_fft // self.a
        rows = torch.arange(self.a // 2 + 1, dtype=torch.float64)
        n1, n2 = (torch.arange(n, dtype=torch.float64) for n in (self.a, self.b))
        first = 2 * math.pi * torch.outer(rows, n1) / self.a
        second = 2 * math.pi * torch.outer(n2, n2) / self.b
        twiddle = 2 * math.pi * torch.outer(rows, n2) / n_fft
        cos, sin = second.cos(), second.sin()
        weight = torch.full((len(rows), 1), 2.0, dtype=torch.float64)
        weight[0], weight[-1] = 1, 1  # these rows hold their own conjugates
        tables = {
            "rows": torch.cat([first.cos(), -first.sin()]),
            "columns": torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]),
            "cos": twiddle.cos(),
            "sin": twiddle.sin(),
            "rows_back": torch.cat([first.cos() * weight, -first.sin() * weight]).T / n_fft,
            "columns_back": torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float().contiguous())

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a / 2 + 1, b) bin of 0 .. n_fft / 2 at each place, and whether its conjugate is there."""
        k = torch.arange(self.a // 2 + 1)[:, None] + self.a * torch.arange(self.b)
        return torch.minimum(k, self.n_fft - k), k > self.n_fft // 2

    def forward(self, frames: torch.Tensor) -> Pair:
        """(..., n_fft) -> the spectrum."""
        shape = frames.shape[:-1]
        partial = self.rows @ frames.reshape(*shape, self.a, self.b)
        half = self.a // 2 + 1
        re, im = partial[..., :half, :], partial[..., half:, :]
        turned = torch.cat([re * self.cos + im * self.sin, im * self.cos - re * self.sin], -1)
        spectrum = turned @ self.columns
        return spectrum[..., : self.b], spectrum[..., self.b :]

    def inverse(self, re: torch.Tensor, im: torch.Tensor) -> torch.Tensor:
        """The spectrum -> (..., n_fft)."""
        partial = torch.cat([re, im], -1) @ self.columns_back
        re, im = partial[..., : self.b], partial[..., self.b :]
        turned = torch.cat([re * self.cos - im * self.sin, im * self.cos + re * self.sin], -2)
        return (self.rows_back @ turned).reshape(*re.shape[:-2], self.n_fft)
