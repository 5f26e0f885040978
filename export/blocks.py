"""Parts shared by the networks of the default family."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def overlap_add(frames: torch.Tensor) -> torch.Tensor:
    """(N, F, 4 hop) -> (N, F + 3, hop): frame i is added to quarters i .. i + 3."""
    n, count, size = frames.shape
    quarters = frames.reshape(n, count, 4, size // 4)
    first, second, third, fourth = (F.pad(quarters[:, :, q], (0, 0, q, 3 - q)) for q in range(4))
    return first + second + third + fourth


class ConvBlock(nn.Module):
    """ConvNeXt block over time (Liu et al. 2022), optionally with FiLM (Perez et al. 2018), on (B, T, C)."""

    def __init__(self, dim: int, expansion: float, kernel: int = 7, cond: int | None = None) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.film = nn.Linear(cond, 2 * dim) if cond else None
        self.expand = nn.Linear(dim, hidden)
        self.project = nn.Linear(hidden, dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        h = self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2))
        if self.film is not None and cond is not None:
            scale, shift = self.film(cond)[:, None].chunk(2, -1)
            h = h * (1 + scale) + shift
        return x + self.project(F.gelu(self.expand(h), approximate="tanh"))
