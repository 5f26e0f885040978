"""The denoiser of Multi-Track MusicLDM (arXiv:2409.02845): a 3-D UNet over (stems, z, time, frequency).

Stems are the convolutions' channels and the VAE's z is their depth; up- and downsampling touch time and
frequency only. The condition, a CLAP embedding, joins the time embedding through a linear layer. Parameters
have the names of the published checkpoints (a guided-diffusion UNet, arXiv:2105.05233), so a state dict loads
as it is.

Its convolutions are rewritten for onnxruntime after loading, see `export.conv3d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.attention import attend

NORM_GROUPS = 32


@dataclass(frozen=True)
class UNet3dConfig:
    """`film_dim` None: unconditional. `film_concat`: it is appended to the time embedding, or added.

    Attention has heads of `head_width` channels or, where `heads` is set, so many of them.
    """

    stems: int = 4
    width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 5)
    blocks: int = 2
    attention_at: tuple[int, ...] = (2, 4, 8)
    head_width: int = 32
    heads: int | None = None
    film_dim: int | None = 512
    film_concat: bool = True

    def head_width_at(self, channels: int) -> int:
        """Channels of one head where there are `channels` in all."""
        return channels // self.heads if self.heads else self.head_width

    @property
    def stride(self) -> int:
        """What time and frequency are reduced by at the deepest level; frequency must be a multiple."""
        return int(2 ** (len(self.multipliers) - 1))


class UNet3d(nn.Module):
    """latents (B, S, Z, T, F), timestep (B,) int64, film (B, E) -> prediction, shaped as the latents."""

    def __init__(self, config: UNet3dConfig) -> None:
        super().__init__()
        self.config = config
        width, film = config.width, config.film_dim
        joined = 2 if film is not None and config.film_concat else 1
        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )
        self.film_emb = nn.Linear(film, 4 * width) if film is not None else None

        def stage(before: int, after: int, factor: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(before, after, joined * 4 * width)]
            if factor in config.attention_at:
                layers.append(Attention(after, config.head_width_at(after)))
            return layers

        channels, factor = width, 1
        kept = [width]
        down: list[Sequence[nn.Module]] = [[_conv(config.stems, width)]]
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.blocks):
                down.append(stage(channels, multiplier * width, factor))
                channels = multiplier * width
                kept.append(channels)
            if level < len(config.multipliers) - 1:
                down.append([Downsample(channels)])
                kept.append(channels)
                factor *= 2
        self.input_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in down)

        middle = joined * 4 * width
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, channels, middle),
                Attention(channels, config.head_width_at(channels)),
                ResBlock(channels, channels, middle),
            ]
        )

        up: list[list[nn.Module]] = []
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for i in range(config.blocks + 1):
                layers = stage(channels + kept.pop(), multiplier * width, factor)
                channels = multiplier * width
                if level and i == config.blocks:
                    layers.append(Upsample(channels))
                    factor //= 2
                up.append(layers)
        self.output_blocks = nn.ModuleList(nn.ModuleList(layers) for layers in up)
        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), _conv(channels, config.stems)
        )

    def forward(self, latents: Tensor, timestep: Tensor, film: Tensor | None = None) -> Tensor:
        half = self.config.width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        phases = timestep[:, None].float() * frequencies.to(latents.device)
        embedding = self.time_embed(torch.cat([phases.cos(), phases.sin()], dim=-1))
        if self.film_emb is not None:
            condition = self.film_emb(film)
            joined = self.config.film_concat
            embedding = torch.cat([embedding, condition], dim=-1) if joined else embedding + condition

        # A time that does not halve evenly is lengthened with zeros, and the prediction cut to it again.
        time, stride = latents.shape[3], self.config.stride
        room = latents.new_zeros(*latents.shape[:3], stride - 1, latents.shape[4])
        hidden = torch.cat([latents, room], dim=3)[:, :, :, : (time + stride - 1) // stride * stride]
        kept = []
        for layers in self.input_blocks:
            hidden = _run(layers, hidden, embedding)
            kept.append(hidden)
        hidden = _run(self.middle_block, hidden, embedding)
        for layers in self.output_blocks:
            hidden = _run(layers, torch.cat([hidden, kept.pop()], dim=1), embedding)
        return self.out(hidden)[:, :, :, :time]


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with the embedding added between and a skip around."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(NORM_GROUPS, before), nn.SiLU(), _conv(before, after))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, after))
        # The Identity stands where training has dropout, so that the convolution keeps its number.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, after), nn.SiLU(), nn.Identity(), _conv(after, after)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv3d(before, after, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Attention(nn.Module):
    """Self-attention over all positions in depth, time and frequency; q, k, v interleaved by head."""

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, size[0] * size[1] * size[2])
        heads = channels // self.head_width
        split = self.qkv(self.norm(flat)).reshape(batch, heads, 3, self.head_width, -1)
        q, k, v = (split[:, :, i].flatten(1, 2).transpose(1, 2) for i in range(3))
        mixed = attend(q, k, v, heads).transpose(1, 2)
        return (flat + self.proj_out(mixed)).reshape(batch, channels, *size)


class Downsample(nn.Module):
    """Halves time and frequency."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = _conv(channels, channels, stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Doubles time and frequency by repetition, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        # Depth joins the channels: onnxruntime is slow at resizing five axes.
        batch, channels, depth, time, frequency = x.shape
        wide = functional.interpolate(x.flatten(1, 2), scale_factor=2.0, mode="nearest")
        return self.conv(wide.reshape(batch, channels, depth, 2 * time, 2 * frequency))


def _conv(before: int, after: int, stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Conv3d:
    return nn.Conv3d(before, after, 3, stride=stride, padding=1)


def _run(layers: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
    return x
