"""The default family's KL-VAE: log mel spectrograms to one latent vector per few frames.

Each latent frame is a patch of `frames` mel frames. A linear map (set from a principal component analysis
of patches before training) carries most of the picture; convolutions over time add what it misses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from export.blocks import ConvBlock


@dataclass(frozen=True)
class PatchVAEConfig:
    mels: int = 128
    frames: int = 4  # mel frames per latent frame
    channels: int = 64  # Z
    width: int = 256
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    expansion: float = 2.0
    floor: float = 1e-4  # of the mel magnitude
    scale: float = 2.0  # log mels are divided by this


class Encoder(nn.Module):
    """mel (N, 1, frames, mels), natural log -> moments (N, 2Z, T, 1): mean, then log variance."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        patch, self.config = config.frames * config.mels, config
        self.linear = nn.Linear(patch, config.channels)
        self.inward = nn.Linear(patch, config.width)
        self.blocks = nn.ModuleList(
            ConvBlock(config.width, config.expansion, 5) for _ in range(config.encoder_blocks)
        )
        self.norm = nn.LayerNorm(config.width)
        self.outward = nn.Linear(config.width, 2 * config.channels)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        nn.init.constant_(self.outward.bias[config.channels :], -4.0)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        c = self.config
        batch, frames = mel.shape[0], mel.shape[2]
        x = ((mel - math.log(c.floor)) / c.scale).reshape(batch, frames // c.frames, c.frames * c.mels)
        h = self.inward(x)
        for block in self.blocks:
            h = block(h)
        moments = self.outward(self.norm(h))
        mean = self.linear(x) + moments[..., : c.channels]
        moments = torch.cat([mean, moments[..., c.channels :].clamp(-12, 4)], -1)
        return moments.transpose(1, 2)[..., None]


class Decoder(nn.Module):
    """latents (N, Z, T, 1) -> mel (N, 1, frames, mels), natural log, at or above the floor."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        patch, self.config = config.frames * config.mels, config
        self.linear = nn.Linear(config.channels, patch)
        self.inward = nn.Linear(config.channels, config.width)
        self.blocks = nn.ModuleList(
            ConvBlock(config.width, config.expansion, 5) for _ in range(config.decoder_blocks)
        )
        self.norm = nn.LayerNorm(config.width)
        self.outward = nn.Linear(config.width, patch)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        c = self.config
        z = latents[..., 0].transpose(1, 2)
        h = self.inward(z)
        for block in self.blocks:
            h = block(h)
        x = (self.linear(z) + self.outward(self.norm(h))) * c.scale
        mel = x.reshape(x.shape[0], 1, x.shape[1] * c.frames, c.mels)
        # a softened floor keeps a gradient where the picture is silent
        return nn.functional.softplus(mel, beta=4.0) + math.log(c.floor)


class PatchVAE(nn.Module):
    """Encoder and decoder of one configuration (KL-VAE, Kingma & Welling 2014)."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def set_principal_components(self, patches: torch.Tensor) -> None:
        """Start from the PCA of patches (n, frames x mels) of log mels.

        Components are scaled by the inverse square root of their deviation: half whitened, so that loud,
        slow structure still weighs more than detail in the diffusion loss.
        """
        c = self.config
        x = (patches - math.log(c.floor)) / c.scale
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
        deviation = values[-c.channels :].flip(0).clamp_min(1e-8).sqrt()
        basis = vectors[:, -c.channels :].flip(1).T
        scale = deviation.rsqrt()[:, None]
        self.encoder.linear.weight.copy_(basis * scale)
        self.encoder.linear.bias.copy_(-(basis @ mean) * scale[:, 0])
        self.decoder.linear.weight.copy_((basis / scale).T)
        self.decoder.linear.bias.copy_(mean)

    def moments(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mel (N, 1, frames, mels) -> mean and log variance, (N, Z, T, 1) each."""
        mean, log_variance = self.encoder(mel).chunk(2, 1)
        return mean, log_variance
