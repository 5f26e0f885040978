"""The default family's separator: masks for every stem from the mix's own spectrogram, without the latents.

The UNet hears a mix through 64 numbers per four frames, which is enough to play along and too coarse to take
it apart. This network sees every bin, split into bands as in Band-Split RNN (Luo & Yu 2022,
arXiv:2209.15174), with convolutions over time and bands where that has recurrences, and a track that sees
the whole spectrum at once, for what harmonics share. Attention over time, as in Lu and others' BS-RoFormer
(2023, arXiv:2309.02612) but without positions, finds what is played again. The convolutions are dense:
depthwise ones read as much memory for a hundredth of the products, and matrix units are what processors have
to spare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from export.attention import attend
from export.blocks import ConvBlock


@dataclass(frozen=True)
class SeparatorConfig:
    stems: int = 4
    bands: tuple[tuple[int, int], ...] = ((16, 4), (16, 8), (16, 16), (12, 48))  # how many, of how many bins
    patch: int = 2  # frames per step in time
    dim: int = 128
    blocks: int = 8
    seen: int = 8  # numbers of each band that the track reads and writes
    track: int = 256
    heads: int = 2  # of the attention over time within each band, in every second block
    track_heads: int = 4  # of the track's, in every block
    head: int = 32  # channels of a head
    floor: float = 1e-3  # of the mix's root mean square

    @property
    def bins(self) -> int:
        """Bins it has masks for; the spectrogram has one more, at half the rate, it takes the last mask."""
        return sum(count * width for count, width in self.bands)

    @property
    def count(self) -> int:
        """How many bands there are."""
        return sum(count for count, _ in self.bands)


class Separator(nn.Module):
    """The network behind separator.onnx.

    mixture (B, frames, bins + 1), magnitudes at any gain, frames a multiple of `patch` -> masks
    (B, S, frames, bins + 1) that sum to one over stems. Untrained they are equal.
    """

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        c, self.config = config, config
        self.inward = nn.ModuleList(BandLinear(n, c.patch * width, c.dim) for n, width in c.bands)
        self.place = nn.Parameter(torch.randn(c.count, c.dim) * 0.1)
        self.blocks = nn.ModuleList(
            Block(c, 2 ** (number % 3), c.heads * (number % 2)) for number in range(c.blocks)
        )
        self.norm = nn.LayerNorm(c.dim)
        self.outward = nn.ModuleList(BandLinear(n, c.dim, c.stems * c.patch * width) for n, width in c.bands)
        for parameter in self.outward.parameters():
            nn.init.zeros_(parameter)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        c = self.config
        rms = mixture.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-7)
        heard = ((mixture[..., :-1] / rms + c.floor).log() + 2) / 2
        patches = heard.unflatten(1, (-1, c.patch)).transpose(1, 2)  # (B, patch, T, bins)
        h = self._split(patches) + self.place
        track: torch.Tensor | None = None
        for block in self.blocks:
            h, track = block(h, track)
        logits = self._joined(self.norm(h))
        return F.pad(logits.softmax(1).flatten(0, 1), (0, 1), mode="replicate").unflatten(0, (-1, c.stems))

    def _split(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, patch, T, bins) -> (B, T, bands, dim)."""
        sizes = [count * width for count, width in self.config.bands]
        parts = []
        for part, (count, _), layer in zip(
            patches.split(sizes, 3), self.config.bands, self.inward, strict=True
        ):
            parts.append(layer(part.unflatten(3, (count, -1)).permute(0, 2, 3, 1, 4).flatten(3)))
        return torch.cat(parts, 2)

    def _joined(self, h: torch.Tensor) -> torch.Tensor:
        """(B, T, bands, dim) -> (B, S, frames, bins)."""
        c = self.config
        parts = []
        for part, layer in zip(h.split([count for count, _ in c.bands], 2), self.outward, strict=True):
            made = layer(part).unflatten(3, (c.stems, c.patch, -1))  # (B, T, bands, S, patch, width)
            parts.append(made.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))
        return torch.cat(parts, 3)


class BandLinear(nn.Module):
    """(B, T, bands, inward) -> (B, T, bands, outward), weights of its own for every band."""

    def __init__(self, bands: int, inward: int, outward: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(bands, inward, outward) / inward**0.5)
        self.bias = nn.Parameter(torch.zeros(bands, outward))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = torch.matmul(x.permute(2, 0, 1, 3), self.weight[:, None])
        return made.permute(1, 2, 0, 3) + self.bias


class Recall(nn.Module):
    """Attention over time (Vaswani et al. 2017) on (N, T, C), without positions: untrained it adds nothing.

    What repeats is played by the same instrument, wherever in the window it could be told which.
    """

    def __init__(self, dim: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.ask = nn.Linear(dim, 3 * heads * head)
        self.answer = nn.Linear(heads * head, dim)
        nn.init.zeros_(self.answer.weight)
        nn.init.zeros_(self.answer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys, values = self.ask(self.norm(x)).chunk(3, -1)
        return self.answer(attend(queries, keys, values, self.heads))


class Block(nn.Module):
    """On (B, T, bands, dim): a convolution over time and bands, attention over time within each band where
    there are `heads` for it, then an exchange with the track."""

    def __init__(self, config: SeparatorConfig, dilation: int, heads: int) -> None:
        super().__init__()
        c = config
        self.within = Recall(c.dim, heads, c.head) if heads else None
        self.norm = nn.LayerNorm(c.dim)
        self.dilation = dilation
        self.convolve = nn.Linear(9 * c.dim, c.dim)  # the weights of a convolution over 3 x 3, as a matrix
        self.project = nn.Linear(c.dim, c.dim)
        self.read = nn.Linear(c.dim, c.seen)
        self.inward = nn.Linear(c.count * c.seen, c.track)
        self.track = ConvBlock(c.track, 1.5, kernel=9)
        self.along = Recall(c.track, c.track_heads, c.head)
        self.whole = nn.Linear(c.track, c.track)  # of what the track says on average over the window
        self.leave = nn.LayerNorm(c.track)
        self.outward = nn.Linear(c.track, c.count * c.seen)
        self.write = nn.Linear(c.seen, c.dim)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.normal_(self.write.weight, std=0.02)
        nn.init.zeros_(self.whole.weight)

    def forward(self, x: torch.Tensor, track: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.project(F.relu(self._convolved(self.norm(x))))
        if self.within is not None:
            by_band = x.transpose(1, 2)
            x = x + self.within(by_band.flatten(0, 1)).view_as(by_band).transpose(1, 2)
        heard = self.inward(self.read(x).flatten(2))
        track = self.track(heard if track is None else track + heard)
        track = track + self.along(track)
        track = track + self.whole(track.mean(1, keepdim=True))
        told = self.outward(self.leave(track)).unflatten(2, (x.shape[2], -1))
        return x + self.write(told), track

    def _convolved(self, h: torch.Tensor) -> torch.Tensor:
        weight = self.convolve.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        reach = (self.dilation, 1)
        made = F.conv2d(h.permute(0, 3, 1, 2), weight, self.convolve.bias, padding=reach, dilation=reach)
        return made.permute(0, 2, 3, 1)
