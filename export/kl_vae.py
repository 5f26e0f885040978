"""The KL-VAE on log mel spectrograms of latent diffusion (arXiv:2112.10752), as AudioLDM and MusicLDM use it.

Parameters have the names of the published checkpoints, so a state dict loads as it is. The exported graphs
are `Encoder` (mel -> moments) and `Decoder` (latents -> mel), each with the 1x1 convolution at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.attention import attend


@dataclass(frozen=True)
class KlVaeConfig:
    """`attention_levels`: levels (0 is the finest) whose blocks attend; the middle always does."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    z_channels: int = 8
    latent_channels: int = 8
    attention_levels: tuple[int, ...] = ()
    input_channels: int = 1
    output_channels: int = 1

    @property
    def stride(self) -> int:
        """One latent step spans this many mel frames, and as many mel bands."""
        return int(2 ** (len(self.multipliers) - 1))


class KlVae(nn.Module):
    """`encoder`, `quant_conv`, `post_quant_conv` and `decoder` as a checkpoint holds them."""

    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.z_channels, 1)

    def encode(self, mel: Tensor) -> Tensor:
        """mel (N, 1, frames, mels) -> moments (N, 2 Z, T, F): mean, then log variance."""
        return self.quant_conv(self.encoder(mel))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (N, Z, T, F) -> mel (N, 1, frames, mels)."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    """`KlVae.encode` as a module."""

    def __init__(self, vae: KlVae) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, mel: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(mel))


class Decoder(nn.Module):
    """`KlVae.decode` as a module."""

    def __init__(self, vae: KlVae) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


class _Encoder(nn.Module):
    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        last = len(config.multipliers) - 1
        channels = config.width
        self.conv_in = _conv(config.input_channels, channels)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            stage = _Stage(
                channels, multiplier * config.width, config.blocks, level in config.attention_levels
            )
            channels = multiplier * config.width
            if level < last:
                stage.downsample = _Downsample(channels)
            self.down.append(stage)
        self.mid = _Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = _conv(channels, 2 * config.z_channels)

    def forward(self, mel: Tensor) -> Tensor:
        hidden = self.conv_in(mel)
        for stage in self.down:
            hidden = stage(hidden)
        return self.conv_out(functional.silu(self.norm_out(self.mid(hidden))))


class _Decoder(nn.Module):
    def __init__(self, config: KlVaeConfig) -> None:
        super().__init__()
        channels = config.multipliers[-1] * config.width
        self.conv_in = _conv(config.z_channels, channels)
        self.mid = _Middle(channels)
        stages = []
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            stage = _Stage(
                channels, multiplier * config.width, config.blocks + 1, level in config.attention_levels
            )
            channels = multiplier * config.width
            if level > 0:
                stage.upsample = _Upsample(channels)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # numbered from the finest, run from the coarsest
        self.norm_out = _norm(channels)
        self.conv_out = _conv(channels, config.output_channels)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.mid(self.conv_in(z))
        for stage in reversed(list(self.up)):
            hidden = stage(hidden)
        return self.conv_out(functional.silu(self.norm_out(hidden)))


class _Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not, then the change of resolution."""

    def __init__(self, before: int, after: int, blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_ResBlock(before if i == 0 else after, after) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(after) for _ in range(blocks if attends else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = _norm(before)
        self.conv1 = _conv(before, after)
        self.norm2 = _norm(after)
        self.conv2 = _conv(after, after)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + hidden


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v, heads=1).transpose(1, 2).reshape(x.shape))


class _Downsample(nn.Module):
    """Halves both axes; the padding is at the far end only, as the published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def posterior_mean(moments: Tensor) -> Tensor:
    """The mean of the posterior, (N, Z, T, F) of moments (N, 2 Z, T, F)."""
    return torch.chunk(moments, 2, dim=1)[0]
