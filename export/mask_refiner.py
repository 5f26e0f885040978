"""The default family's mask refiner: what the latents of a split cannot hold, from the mix's own mel.

The UNet estimates stems from a mix of 64 numbers per four frames, and the VAE draws them soft. This network
sees the estimates beside the mix at every frame and band, and shifts the estimates against each other before
their ratios become masks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from export.blocks import ConvBlock


@dataclass(frozen=True)
class MaskRefinerConfig:
    stems: int = 4
    mels: int = 128
    width: int = 288
    blocks: int = 4
    expansion: float = 2.0
    kernel: int = 9
    floor: float = 1e-4  # of the mel magnitude
    scale: float = 2.0  # log mels are divided by this


class MaskRefiner(nn.Module):
    """The network behind masks.onnx.

    stems (B, S, frames, mels) and mixture (B, frames, mels), natural log -> mel (B, S, frames, mels): the
    stems, louder and softer by amounts whose sum over stems is zero. Untrained it changes nothing.
    """

    def __init__(self, config: MaskRefinerConfig) -> None:
        super().__init__()
        c, self.config = config, config
        self.inward = nn.Linear((c.stems + 1) * c.mels, c.width)
        self.blocks = nn.ModuleList(ConvBlock(c.width, c.expansion, c.kernel) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width)
        self.outward = nn.Linear(c.width, c.stems * c.mels)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, stems: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        c = self.config
        given = torch.cat([stems, mixture[:, None]], 1).transpose(1, 2).flatten(2)
        h = self.inward((given - math.log(c.floor)) / c.scale)
        for block in self.blocks:
            h = block(h)
        shift = self.outward(self.norm(h)).unflatten(2, (c.stems, c.mels)).transpose(1, 2)
        return stems + shift - shift.mean(1, keepdim=True)
