"""The default family's diffusion UNet: all stems in one stream, convolutions outside, attention inside.

The reference's 3-D UNet spends 3.9 TFLOP on a window; this one spends 4 GFLOP, so that two CPU cores make
a band faster than it plays. At each latent frame the noisy latents of all stems are joined with what is
known (context, mixture, grid, chords); one level down, attention sees the whole window.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from export.blocks import ConvBlock


@dataclass(frozen=True)
class StemUNetConfig:
    stems: int = 4
    channels: int = 64  # Z
    freq: int = 1  # F
    film: int = 128  # E
    width: int = 352
    inner: int = 512
    blocks_down: int = 2
    blocks_up: int = 3
    layers: int = 3
    heads: int = 8
    cond: int = 256
    expansion: float = 3.0
    grid: int = 6
    chords: int = 25
    tones: int = 0  # the last of the channels, which say what pitch classes sound; see Harmony
    harmony: int = 192
    harmony_blocks: int = 5
    harmony_guidance: float = 1.0  # weight of what the harmony is told; 1 is none, and what trains
    distilled: int = 0  # timesteps from here on ask for the distilled prediction; 0: there is none
    adapter: int = 96  # width of what the distilled prediction adds to every block
    weakened: bool = False  # whether timesteps from twice that many on ask for what `weakened` predicts


class Harmony(nn.Module):
    """What pitch classes the stems play: the part of the UNet that reads and writes the tones alone.

    Tones are few and follow from chords, metre and the other stems' tones, whatever these sound like: a small
    network learns them from many more songs and in all keys (training.train_harmony), and the rest of the
    UNet hears what it found and plays by it.
    """

    def __init__(self, config: StemUNetConfig) -> None:
        super().__init__()
        c = config
        known = c.stems * c.tones + c.stems + c.tones + 1 + c.stems + c.grid + c.chords
        self.inward = nn.Linear(c.stems * c.tones + known, c.harmony)
        self.time = nn.Sequential(nn.Linear(c.harmony, c.harmony), nn.SiLU())
        self.blocks = nn.ModuleList(ConvBlock(c.harmony, 2.0, 15, c.harmony) for _ in range(c.harmony_blocks))
        self.norm = nn.LayerNorm(c.harmony)
        self.outward = nn.Linear(c.harmony, c.stems * c.tones)
        self.width = c.harmony
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy tones and what is known (B, T, n) -> hidden (B, T, harmony), prediction (B, T, S x 12)."""
        cond = self.time(timestep_embedding(timestep, self.width))
        h = self.inward(x)
        for block in self.blocks:
            h = block(h, cond)
        h = self.norm(h)
        return h, self.outward(h)


class Attention(nn.Module):
    """Pre-norm self-attention, rotary positions (Su et al. 2021), FiLM on its norm, and a feed-forward."""

    def __init__(self, dim: int, heads: int, cond: int, expansion: float) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.film = nn.Linear(cond, 2 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.expand = nn.Linear(dim, int(expansion * dim))
        self.project = nn.Linear(int(expansion * dim), dim)
        for zero in (self.film, self.out, self.project):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(
        self, x: torch.Tensor, cond: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        batch, length, dim = x.shape
        scale, shift = self.film(cond)[:, None].chunk(2, -1)
        h = self.qkv(self.norm1(x) * (1 + scale) + shift)
        h = h.reshape(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = _rotated(h[0], cos, sin), _rotated(h[1], cos, sin), h[2]
        weights = (q @ k.transpose(-1, -2) * self.size**-0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, dim))
        return x + self.project(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of integer steps, (B,) -> (B, dim) (Vaswani et al. 2017; Ho et al. 2020)."""
    rates = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))
    angles = timestep[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class Adapter(nn.Module):
    """A narrow pair of layers beside a block (Houlsby and others 2019), frame by frame; nothing untrained."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(width, narrow), nn.Linear(narrow, width)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outward(F.gelu(self.inward(x), approximate="tanh"))


class Distilled(nn.Module):
    """What the UNet's distilled prediction adds to the ordinary one, which stays as it is."""

    def __init__(self, config: StemUNetConfig) -> None:
        super().__init__()
        c = config
        self.cond = nn.Parameter(torch.zeros(c.cond))
        self.down, self.layers, self.up = (
            nn.ModuleList(Adapter(width, c.adapter) for _ in range(count))
            for width, count in ((c.width, c.blocks_down), (c.inner, c.layers), (c.width, c.blocks_up))
        )
        self.outward = nn.Linear(c.width, c.stems * (c.channels - c.tones) * c.freq)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)


class StemUNet(nn.Module):
    """The network behind unet.onnx.

    latents (B,S,Z,T,F), timestep (B,), film (B,E), context (B,S,Z,T,F), context_mask (B,S,T),
    mixture (B,Z,T,F), mixture_mask (B,T), mixture_stems (B,S), grid (B,T,6), chords (B,T,25)
    -> prediction (B,S,Z,T,F).

    With `config.distilled`, timestep t + distilled has the noise of t, and asks for the prediction with
    which one long step arrives where ordinary ones take several (training.distill). With `config.weakened`,
    too, t + 2 x distilled asks for what the function `weakened` predicts; that one alone is a ValueError.
    """

    def __init__(self, config: StemUNetConfig) -> None:
        super().__init__()
        c, self.config = config, config
        if c.weakened and not c.distilled:
            raise ValueError("a UNet with weakened predictions has distilled ones before them")
        z = c.channels * c.freq
        self.inward = nn.Linear(2 * c.stems * z + c.stems + z + 1 + c.stems + c.grid + c.chords, c.width)
        self.film = nn.Linear(c.film, c.cond)
        self.time = nn.Sequential(nn.Linear(c.cond, c.cond), nn.SiLU())
        self.cond = nn.Sequential(nn.Linear(2 * c.cond, c.cond), nn.SiLU())
        self.distilled = Distilled(c) if c.distilled else None
        self.down = nn.ModuleList(ConvBlock(c.width, c.expansion, 7, c.cond) for _ in range(c.blocks_down))
        self.shrink = nn.Conv1d(c.width, c.inner, 2, stride=2)
        self.layers = nn.ModuleList(Attention(c.inner, c.heads, c.cond, c.expansion) for _ in range(c.layers))
        self.grow = nn.Linear(c.inner, 2 * c.width)
        self.up = nn.ModuleList(ConvBlock(c.width, c.expansion, 7, c.cond) for _ in range(c.blocks_up))
        self.norm = nn.LayerNorm(c.width)
        self.outward = nn.Linear(c.width, c.stems * (c.channels - c.tones) * c.freq)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)
        self.harmony = Harmony(c) if c.tones else None
        if c.tones:
            self.hear = nn.Linear(c.harmony, c.width)
            nn.init.zeros_(self.hear.weight)
            nn.init.zeros_(self.hear.bias)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        film: torch.Tensor,
        context: torch.Tensor,
        context_mask: torch.Tensor,
        mixture: torch.Tensor,
        mixture_mask: torch.Tensor,
        mixture_stems: torch.Tensor,
        grid: torch.Tensor,
        chords: torch.Tensor,
    ) -> torch.Tensor:
        c = self.config
        batch, length = latents.shape[0], latents.shape[3]
        mask, heard = context_mask.transpose(1, 2), mixture_mask[..., None]
        stems = mixture_stems[:, None] * heard
        pictures = [latents, context, mixture[:, None]]
        rest = [mask, torch.cat([heard, stems, grid, chords], -1)]
        far, weak = torch.zeros(1, 1, 1), None
        if c.distilled:
            beyond = timestep >= c.distilled
            if c.weakened:
                weak = (timestep >= 2 * c.distilled)[:, None, None]
                beyond = beyond & ~weak[:, 0, 0]
            far = beyond.float()[:, None, None]
            timestep = timestep % c.distilled
        cond = self.time(timestep_embedding(timestep, c.cond))
        if self.distilled is not None:
            cond = cond + far[:, 0] * self.distilled.cond
        cond = self.cond(torch.cat([cond, self.film(film) * math.sqrt(c.film)], -1))
        h = self.inward(_joined(pictures, rest))
        tones = None
        if self.harmony is not None:
            hidden, tones = self.heard(pictures, rest, timestep)
            h = h + self.hear(hidden)
        more = self.distilled
        h = _through(self.down, h, [cond], more.down if more else None, far)
        h = h + self.attended(h, cond, far, weak)
        h = self.norm(_through(self.up, h, [cond], more.up if more else None, far, weak))
        out = self.outward(h)
        if more is not None:
            out = out + far * more.outward(h)
        out = out.reshape(batch, length, c.stems, -1, c.freq)
        if tones is not None:
            tones = tones.reshape(batch, length, c.stems, c.tones, 1)
            out = torch.cat([out, tones.expand(-1, -1, -1, -1, c.freq)], 3)
        return out.permute(0, 2, 3, 1, 4)

    def heard(
        self, pictures: list[torch.Tensor], rest: list[torch.Tensor], timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the harmony found (B, T, harmony) and its prediction (B, T, S x tones), with its guidance.

        Classifier-free guidance (Ho and Salimans 2022) of this part alone costs little: against the same
        without context, metre and chords. A mixture stays, so a split is as it was.
        """
        c = self.config
        assert self.harmony is not None
        latents, context, mixture = (x[:, :, -c.tones :] for x in pictures)
        mask, told = rest
        hidden, tones = self.harmony(_joined([latents, context, mixture], rest), timestep)
        if c.harmony_guidance != 1:
            mixed, untold = told[..., : 1 + c.stems], torch.zeros_like(told[..., 1 + c.stems :])
            less = [torch.zeros_like(mask), torch.cat([mixed, untold], -1)]
            _, alone = self.harmony(_joined([latents, torch.zeros_like(context), mixture], less), timestep)
            tones = alone + c.harmony_guidance * (tones - alone)
        return hidden, tones

    def attended(
        self, h: torch.Tensor, cond: torch.Tensor, far: torch.Tensor, weak: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T, width) of what the level below sees in the whole window."""
        batch, length, width = h.shape
        padded = F.pad(h.transpose(1, 2), (0, 1))  # so that the last frame of an odd length has a pair
        inner = self.shrink(padded).transpose(1, 2)
        told = [cond, *self._rotation(inner)]
        adapters = self.distilled.layers if self.distilled else None
        inner = _through(self.layers, inner, told, adapters, far, weak)
        return self.grow(inner).reshape(batch, inner.shape[1] * 2, width)[:, :length]

    def _rotation(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.config.inner // self.config.heads // 2
        position = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        rates = torch.exp(-math.log(1000.0) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = position[:, None] * rates
        return angles.cos(), angles.sin()


def weakened(unet: StemUNet) -> StemUNet:
    """A copy without the middle block of those that see the whole window and of those on the way up.

    It errs where the UNet errs, and further: guided away from it, the UNet says more plainly what it is sure
    of (Karras and others 2024, "Guiding a diffusion model with a bad version of itself").
    """
    less = copy.deepcopy(unet)
    more = less.distilled
    for blocks in (less.layers, less.up, *((more.layers, more.up) if more else ())):
        del blocks[middle(blocks)]
    return less


def middle(blocks: nn.ModuleList) -> int:
    """Which of the blocks the weakened UNet lacks."""
    return len(blocks) // 2


def _through(
    blocks: nn.ModuleList,
    h: torch.Tensor,
    told: list[torch.Tensor],
    adapters: nn.ModuleList | None,
    far: torch.Tensor,
    weak: torch.Tensor | None = None,
) -> torch.Tensor:
    """h after the blocks, each with its adapter's share where `far` is 1; without the middle one where `weak`
    is true."""
    for i, block in enumerate(blocks):
        beside = 0.0 if adapters is None else far * adapters[i](h)
        after = block(h, *told) + beside
        h = after if weak is None or i != middle(blocks) else torch.where(weak, h, after)
    return h


def _joined(pictures: list[torch.Tensor], rest: list[torch.Tensor]) -> torch.Tensor:
    """(B, T, n): latents, context and its mask, mixture and everything else of each latent frame."""
    latents, context, mixture = (_frames(x) for x in pictures)
    return torch.cat([latents, context, rest[0], mixture, rest[1]], -1)


def _frames(x: torch.Tensor) -> torch.Tensor:
    """(B, S, Z, T, F) -> (B, T, S x Z x F)."""
    batch, stems, z, length, f = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(batch, length, stems * z * f)
