"""The default family's KL-VAE: log mel spectrograms to one latent vector per few frames.

Each latent frame is a patch of `frames` mel frames. A linear map (set from a principal component analysis
of patches before training) carries most of the picture; convolutions over time add what it misses.

The pitch of a bass is a hundredth of the variance of such latents: a diffusion model learns everything else
first. So twelve latents more say which pitch classes sound. They are large, so that sampling decides them
early, and the decoder leans on them where the others are vague.
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
    channels: int = 64  # that hold the picture
    width: int = 256
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    expansion: float = 2.0
    floor: float = 1e-4  # of the mel magnitude
    scale: float = 2.0  # log mels are divided by this
    tones: int = 0  # further channels, one a pitch class, 0 or 12
    tones_width: int = 128
    steady: float = 0.0  # log mel: what moves less is steadied after decoding, see `steadied`; 0: nothing

    @property
    def latents(self) -> int:
        """Z, the channels of a latent frame."""
        return self.channels + self.tones


TONE_SCALE = 6.0  # latent of a pitch class that surely sounds, less that of one that does not
TONE_LEVEL = 1 / 6  # share of the pitch classes that sound, about: their latents have a mean near 0


class Tones(nn.Module):
    """Patches (N, T, frames x mels), see `Encoder.patches` -> logits (N, T, 12) of pitch classes."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        self.inward = nn.Linear(config.frames * config.mels, config.tones_width)
        self.block = ConvBlock(config.tones_width, config.expansion, 5)
        self.norm = nn.LayerNorm(config.tones_width)
        self.outward = nn.Linear(config.tones_width, config.tones)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.outward(self.norm(self.block(self.inward(patches))))


def tone_latents(sounding: torch.Tensor) -> torch.Tensor:
    """Probabilities that pitch classes sound -> their latents."""
    return (sounding - TONE_LEVEL) * TONE_SCALE


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
        self.tones = Tones(config) if config.tones else None

    def patches(self, mel: torch.Tensor) -> torch.Tensor:
        """(N, 1, frames, mels) -> (N, T, frames x mels) above the floor, scaled."""
        c = self.config
        batch, frames = mel.shape[0], mel.shape[2]
        return ((mel - math.log(c.floor)) / c.scale).reshape(batch, frames // c.frames, c.frames * c.mels)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        c = self.config
        x = self.patches(mel)
        h = self.inward(x)
        for block in self.blocks:
            h = block(h)
        moments = self.outward(self.norm(h))
        mean = self.linear(x) + moments[..., : c.channels]
        log_variance = moments[..., c.channels :].clamp(-12, 4)
        if self.tones is not None:
            tones = tone_latents(self.tones(x).sigmoid())
            mean = torch.cat([mean, tones], -1)
            log_variance = torch.cat([log_variance, torch.full_like(tones, -12.0)], -1)
        return torch.cat([mean, log_variance], -1).transpose(1, 2)[..., None]


def _mean(x: torch.Tensor, frames: int, bands: int) -> torch.Tensor:
    """Means of (N, 1, frames, mels) over that many frames and bands around each, of those there are."""
    around = frames // 2, bands // 2
    return nn.functional.avg_pool2d(x, (frames, bands), 1, around, count_include_pad=False)


def steadied(mel: torch.Tensor, threshold: float) -> torch.Tensor:
    """Log mels (N, 1, frames, mels) with less of what moves less than the threshold, near or above 0.

    Decoders write a patch at a time, and their small errors come back with it: on a held note that is a
    modulation at the rate of latent frames, a hum. Nine frames (two patches and one more) average it out.
    What moves more, an attack or a release, keeps its edges: the average's weight is the conductance of
    edge-preserving smoothing (Perona & Malik 1990, eq. 5, with the fourth power for a sharper knee) of how
    far the mel is from it, over as many frames and five bands.
    """
    average = _mean(_mean(mel, 5, 1), 5, 1)
    moved = _mean((mel - average).abs(), 9, 5) / threshold
    return mel + (average - mel) / (1 + moved.square().square())


class Decoder(nn.Module):
    """latents (N, Z, T, 1) -> mel (N, 1, frames, mels), natural log, at or above the floor."""

    def __init__(self, config: PatchVAEConfig) -> None:
        super().__init__()
        patch, self.config = config.frames * config.mels, config
        self.linear = nn.Linear(config.latents, patch)
        self.inward = nn.Linear(config.latents, config.width)
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
        mel = nn.functional.softplus(mel, beta=4.0) + math.log(c.floor)
        return steadied(mel, c.steady) if c.steady else mel


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
        self.decoder.linear.weight.zero_()
        self.decoder.linear.weight[:, : c.channels] = (basis / scale).T
        self.decoder.linear.bias.copy_(mean)

    def moments(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mel (N, 1, frames, mels) -> mean and log variance, (N, Z, T, 1) each."""
        mean, log_variance = self.encoder(mel).chunk(2, 1)
        return mean, log_variance
