"""A small joint text and audio embedding trained on captions: the default bundle's stand-in for CLAP.

Both towers end on the unit sphere of R^E (Elizalde et al. 2022, arXiv:2206.04769).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from export.blocks import ConvBlock


@dataclass(frozen=True)
class CaptionTowersConfig:
    vocabulary: int = 512
    embedding: int = 128  # E
    text_width: int = 128
    text_blocks: int = 2
    mels: int = 128
    audio_width: int = 160
    audio_blocks: int = 3
    floor: float = 1e-4


class TextTower(nn.Module):
    """input_ids (B, L) i64, attention_mask (B, L) i64 -> unit embedding (B, E). No words: a learnt point."""

    def __init__(self, config: CaptionTowersConfig) -> None:
        super().__init__()
        c = config
        self.words = nn.Embedding(c.vocabulary, c.text_width)
        self.blocks = nn.ModuleList(ConvBlock(c.text_width, 2.0, 3) for _ in range(c.text_blocks))
        self.norm = nn.LayerNorm(c.text_width)
        self.empty = nn.Parameter(torch.zeros(c.text_width))
        self.outward = nn.Linear(c.text_width, c.embedding)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask[..., None].to(self.words.weight.dtype)
        h = self.words(input_ids) * mask
        for block in self.blocks:
            h = block(h) * mask
        count = mask.sum(1)
        pooled = (self.norm(h) * mask).sum(1) / count.clamp_min(1.0) + self.empty * (1 - count.clamp_max(1.0))
        return F.normalize(self.outward(pooled), dim=-1)


class AudioTower(nn.Module):
    """mel (B, 1, frames, mels), natural log -> embedding (B, E), unit norm; any length from 8 frames."""

    def __init__(self, config: CaptionTowersConfig) -> None:
        super().__init__()
        c, self.floor = config, config.floor
        self.inward = nn.Conv1d(c.mels, c.audio_width, 4, stride=4)
        self.blocks = nn.ModuleList(ConvBlock(c.audio_width, 2.0, 7) for _ in range(c.audio_blocks))
        self.norm = nn.LayerNorm(c.audio_width)
        self.outward = nn.Sequential(
            nn.Linear(2 * c.audio_width, c.audio_width), nn.GELU(), nn.Linear(c.audio_width, c.embedding)
        )

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = (mel[:, 0].transpose(1, 2) - math.log(self.floor)) / 2.0 - 2.0
        h = self.inward(x).transpose(1, 2)
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        pooled = torch.cat([h.mean(1), h.square().mean(1)], -1)
        return F.normalize(self.outward(pooled), dim=-1)


class CaptionTowers(nn.Module):
    """Both towers and the contrastive temperature (trained only)."""

    def __init__(self, config: CaptionTowersConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextTower(config)
        self.audio = AudioTower(config)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(14.0)))
