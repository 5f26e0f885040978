"""The HiFi-GAN vocoder (arXiv:2010.05646), generator V1 with its weight normalisation folded in.

Parameters have the names of the published checkpoints, so a state dict loads as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.1


@dataclass(frozen=True)
class HifiGanConfig:
    """One upsampling stage per rate; every stage has one residual block per kernel."""

    mels: int = 64
    width: int = 1024
    rates: tuple[int, ...] = (5, 4, 2, 2, 2)
    rate_kernels: tuple[int, ...] = (16, 16, 8, 4, 4)
    kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    @property
    def hop(self) -> int:
        """Samples per mel frame."""
        return prod(self.rates)

    @property
    def trim(self) -> int:
        """Samples returned beyond frames x hop, from stages whose kernel and rate differ by an odd number."""
        length = 0
        for rate, kernel in zip(self.rates, self.rate_kernels, strict=True):
            length = length * rate + (kernel - rate) % 2
        return length


class HifiGan(nn.Module):
    """mel (N, mels, frames) -> audio (N, 1, frames x hop + trim), within -1..1."""

    def __init__(self, config: HifiGanConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_pre = nn.Conv1d(config.mels, config.width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        channels = config.width
        for rate, kernel in zip(config.rates, config.rate_kernels, strict=True):
            self.ups.append(
                nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2)
            )
            channels //= 2
            for size, dilations in zip(config.kernels, config.dilations, strict=True):
                self.resblocks.append(_ResBlock(channels, size, dilations))
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        hidden = self.conv_pre(mel)
        per_stage = len(self.config.kernels)
        for i, up in enumerate(self.ups):
            hidden = up(functional.leaky_relu(hidden, SLOPE))
            blocks = list(self.resblocks)[i * per_stage : (i + 1) * per_stage]
            hidden = torch.stack([block(hidden) for block in blocks]).mean(dim=0)
        # The published generator has leaky_relu's default slope here, not the 0.1 it has elsewhere.
        return torch.tanh(self.conv_post(functional.leaky_relu(hidden)))


class _ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(channels, kernel, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            hidden = first(functional.leaky_relu(x, SLOPE))
            x = x + second(functional.leaky_relu(hidden, SLOPE))
        return x


def _conv(channels: int, kernel: int, dilation: int) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)
