"""The default family's vocoder: Griffin and Lim's phase search as a graph, with no trained weights.

A mel spectrogram says how strong each band is, not how its waves join from frame to frame; a small network
that guesses both writes notes whose pitch is blurred. Here the magnitudes are solved for (few sines that
sound like the bands) and the phases searched for (fast Griffin-Lim from a good start), at the
end both together, in real arithmetic and matrix products only, so that every provider runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.features import low_filterbank, mel_edges, mel_filterbank, triangles
from engine.manifest import LowBands, Mel
from export.blocks import overlap_add
from export.first_phases import first_phases, peaks_around
from export.real_fft import Pair, RealFFT

BEYOND = 3  # bands of the other transform that a search hears past the end of its own
STEEPNESS = 3.0  # of what is on either side of that end, per bin; rounding errors grow with it
# Of what leaks over it, so much is taken off: a peak that is three decibels too low should leave nothing.
LEAKING = 1.5
REACH, KAISER = 10, 7.0  # slow samples on each side that decide what lies between two, and their window
EDGE = 2  # frames repeated at both ends, so that every sample lies under four windows
OVERLAP = 4  # windows over each sample
# A bin where the frames cancel has no phase of its own: taken at its full magnitude, rounding errors would be
# heard. Gains end at 1 / sqrt(SOFT); the last steps, which set the levels, go further.
SOFT, LAST_SOFT = 0.1, 0.01
# What a mel at its floor stands for lies below it, by 8 dB on average on held-out stems. This share of the
# floor, taken off in power, is 6 dB at the floor and 0.2 dB at four times it.
BELOW = 0.87
# Steps at the end whose magnitudes are those found, fitted to the mel. With more of them the mel would come
# nearer still, but steady tones, as longer windows than its own see them, would be rougher than with none.
FITTED = 4
QUIET = 1e-6  # added to magnitudes before their logarithm
HASTE = 1.8  # power of each update of the sines: below 2, larger ones are nearer after as many steps
STEEPEST = 10.0  # times what was found, the most by which a step raises a band
LOUDEST = 12.0  # log magnitude: louder mels are cut, so that nothing overflows


@dataclass(frozen=True)
class GriffinLimConfig:
    """The mel geometry to invert, and how long to search.

    n_fft must be 4 hops and a power of two; low_n_fft, of the low bands' transform, a larger one or 0: none.
    """

    sample_rate: int = 44100
    n_fft: int = 2048
    hop: int = 512
    mels: int = 128
    f_min: float = 0.0
    f_max: float = 22050.0
    floor: float = 1e-4
    low_n_fft: int = 0
    low_bands: int = 0
    low_f_max: float = 0.0
    magnitude_steps: int = 10
    phase_steps: int = 7
    momentum: float = 0.8

    @classmethod
    def of(cls, mel: Mel) -> GriffinLimConfig:
        """The configuration that inverts this geometry."""
        low = mel.low or LowBands.model_construct(n_fft=0, bands=0, f_max=0.0)
        return cls(
            sample_rate=mel.sample_rate, n_fft=mel.n_fft, hop=mel.hop, mels=mel.n_mels,
            f_min=mel.f_min, f_max=mel.f_max, floor=mel.floor,
            low_n_fft=low.n_fft, low_bands=low.bands, low_f_max=low.f_max,
        )  # fmt: skip

    @property
    def geometry(self) -> Mel:
        """The mel geometry. Raises pydantic.ValidationError where it is none."""
        low = None
        if self.low_n_fft:
            low = LowBands(n_fft=self.low_n_fft, bands=self.low_bands, f_max=self.low_f_max)
        return Mel(
            sample_rate=self.sample_rate, n_fft=self.n_fft, win_length=self.n_fft, hop=self.hop,
            n_mels=self.mels, f_min=self.f_min, f_max=self.f_max, floor=self.floor,
            low=low,
        )  # fmt: skip


class GriffinLim(nn.Module):
    """mel (N, mels, frames), natural log -> audio (N, 1, frames x hop).

    Low bands are searched for on their own, in every few frames and at a fraction of the rate, and the two
    signals added. Where the bands of one transform end nothing says on which side of their end a partial is,
    and it would be written on the wrong one, a semitone off. So either search has bands of the other's: the
    low one the next above, and what it finds there is not written but heard in the frames of the other, as
    bands below. What the low one does write is taken off the other's bands, into which it leaks.
    """

    kernel: torch.Tensor

    def __init__(self, config: GriffinLimConfig) -> None:
        super().__init__()
        c, self.config = config, config
        if c.n_fft != OVERLAP * c.hop:
            raise ValueError(f"n_fft must be {OVERLAP} hops, not {c.n_fft} and {c.hop}")
        if c.low_n_fft and (c.low_n_fft <= c.n_fft or c.low_n_fft % c.n_fft):
            raise ValueError(f"low_n_fft must be a larger multiple of n_fft, not {c.low_n_fft} of {c.n_fft}")
        mel = c.geometry
        self.search = Search(c, np.concatenate([_bands_below(mel), mel_filterbank(mel)], 1))
        if c.low_n_fft:
            self.rate = _times_slower(mel)
            filters = np.concatenate([low_filterbank(mel), _bands_above(mel)], 1)
            filters = filters[: c.low_n_fft // self.rate // 2 + 1]
            # a window of so many fewer samples has magnitudes so much smaller
            self.low = Search(c, filters * np.float32(self.rate))
            self.crossing = c.low_f_max * c.low_n_fft / c.sample_rate  # bins
            self.register_buffer("kernel", _between_samples(self.rate))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        c = self.config
        wanted = self.search.wanted(mel[:, c.low_bands :])
        if not c.low_n_fft:
            return self.search.cut(self.search.audio(wanted), mel.shape[-1])
        below, above = self._low(mel)
        written = self.search.bands_of(below)[..., BEYOND:]
        wanted = (wanted - (LEAKING * written).square() / (wanted + 1e-8)).clamp_min(0)
        wanted = torch.cat([self.search.bands_of(above)[..., :BEYOND], wanted], -1)
        return self.search.cut(below + self.search.audio(wanted), mel.shape[-1])

    def _low(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the low bands and those above tell of below low_f_max and of above, as `search.audio`s."""
        c, every = self.config, self.config.low_n_fft // self.config.n_fft
        heard = mel[:, : c.low_bands + BEYOND]
        heard = torch.cat([heard, *[heard[..., -1:]] * (every - 1)], -1)[..., ::every]
        wanted = self.low.wanted(heard)
        magnitude = self.low.magnitude(wanted)
        natural = magnitude[..., self.low.natural]
        peaks = torch.arange(natural.shape[-1], device=mel.device) + peaks_around(natural)
        past = (STEEPNESS * (peaks - self.crossing))[..., self.low.order]
        parts = torch.cat([magnitude * torch.sigmoid(-past), magnitude * torch.sigmoid(past)])
        fitting = wanted / (magnitude @ self.low.table + 1e-8)
        slow = self.low.audio((parts @ self.low.table) * torch.cat([fitting] * 2), parts)
        audio = self._at_full_rate(slow, mel.shape[-1])
        sides = audio.reshape(2, -1, audio.shape[-1])
        return sides[0], sides[1]

    def _at_full_rate(self, slow: torch.Tensor, frames: int) -> torch.Tensor:
        """`Search.audio` of the low search (N, samples) as that of the other, which begins later."""
        start = self.low.lead - self.search.lead // self.rate
        slow = nn.functional.pad(slow, (REACH - 1, REACH))[:, start:]
        count = slow.shape[-1] - 2 * REACH + 1
        around = torch.stack([slow[..., i : i + count] for i in range(2 * REACH)], -1)
        size = (frames + 2 * EDGE + OVERLAP - 1) * self.config.hop
        return (around @ self.kernel).flatten(1)[:, :size]


def _bands_below(mel: Mel) -> NDArray[np.float32]:
    """(n_fft / 2 + 1, BEYOND) triangles before those of `mel_filterbank`, as wide as its first; none without
    low bands."""
    if mel.low is None:
        return np.zeros((mel.n_fft // 2 + 1, 0), np.float32)
    first, second = _edges_above(mel)[:2]
    edges = first + (second - first) * np.arange(-BEYOND, 2)
    return (triangles(edges, mel.n_fft, mel.sample_rate) / (second - first)).astype(np.float32)


def _bands_above(mel: Mel) -> NDArray[np.float32]:
    """(low.n_fft / 2 + 1, BEYOND) triangles: the first of `mel_filterbank` in the low transform's bins, in
    which a sine is as much larger as that is longer."""
    assert mel.low is not None
    edges = _edges_above(mel)
    height = 2 / (edges[2:] - edges[:-2]) * mel.win_length / mel.low.n_fft
    return (triangles(edges, mel.low.n_fft, mel.sample_rate) * height).astype(np.float32)


def _edges_above(mel: Mel) -> NDArray[np.float64]:
    """(BEYOND + 2,) corner frequencies in Hz of the first BEYOND bands above the low ones."""
    assert mel.low is not None
    return mel_edges(mel)[mel.low.bands :][: BEYOND + 2]


def _times_slower(mel: Mel) -> int:
    """By how much the low bands' rate is lower: a power of two that leaves room for those above."""
    highest = _edges_above(mel)[-1]
    rate = 1
    while mel.sample_rate / (4 * rate) >= highest:
        rate *= 2
    return rate


def _between_samples(rate: int) -> torch.Tensor:
    """(2 REACH, rate) weights of the slow samples around one that make it and the `rate` - 1 after it.

    A sinc in Kaiser's window (1974).
    """
    sample = torch.arange(rate, dtype=torch.float64) / rate
    at = sample - torch.arange(1 - REACH, REACH + 1, dtype=torch.float64)[:, None]
    window = torch.special.i0(KAISER * (1 - (at / REACH).square()).clamp_min(0).sqrt())
    return (torch.sinc(at) * window / window.max()).float()


class Search(nn.Module):
    """The bands of one transform as magnitudes (N, F, bands) -> audio of F frames, (N, (F + 3) n_fft / 4).

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard 2013, algorithm 1) from `first_phases`. Its last steps
    aim at the magnitudes found, made to fit the mel (as Masuyama, Ueno and Ono, arXiv:2307.12232, do): those
    solved for at first are only one of many that do, and no signal has them. Magnitudes are kept
    (N, F, places) in the order of RealFFT's spectra. filters: (n_fft / 2 + 1, bands).
    """

    natural: torch.Tensor
    table: torch.Tensor
    share: torch.Tensor
    sines: torch.Tensor
    sines_share: torch.Tensor
    order: torch.Tensor
    side: torch.Tensor
    window: torch.Tensor

    def __init__(self, config: GriffinLimConfig, filters: NDArray[np.float32]) -> None:
        super().__init__()
        n_fft = 2 * (len(filters) - 1)
        self.config, self.hop = config, n_fft // OVERLAP
        self.fft = RealFFT(n_fft)
        bins, mirrored = (places.flatten() for places in self.fft.places())
        natural = torch.from_numpy(np.unique(bins.numpy(), return_index=True)[1])
        table = torch.tensor(filters)[bins] / torch.bincount(bins)[bins, None]  # some are there twice
        sines = _lobes(torch.tensor(filters).T).T  # what each bin's sine is in the bands
        tables = {
            "order": bins,
            "natural": natural,
            "side": torch.where(mirrored, -1.0, 1.0),
            "table": table,
            "share": _share(table),
            "sines": sines,
            "sines_share": _share(sines),
            "window": torch.hann_window(n_fft),
        }
        for name, values in tables.items():
            self.register_buffer(name, values)

    @property
    def lead(self) -> int:
        """Samples of `audio` before those of the mel's first frame.

        Padded frame i is centred on quarter i + 2, so mel frame 0 is on quarter 2 + EDGE.
        """
        return (EDGE + OVERLAP // 2) * self.hop

    def cut(self, audio: torch.Tensor, frames: int) -> torch.Tensor:
        """`audio` without its ends: (N, 1, frames x hop)."""
        return audio[:, None, self.lead : self.lead + frames * self.hop]

    def wanted(self, mel: torch.Tensor) -> torch.Tensor:
        """(N, bands, frames), natural log -> magnitudes (N, F, bands), EDGE more frames on either side."""
        padded = torch.cat([*[mel[..., :1]] * EDGE, mel, *[mel[..., -1:]] * EDGE], -1)
        heard = padded.clamp(max=LOUDEST).exp().transpose(1, 2)
        return (heard.square() - (BELOW * self.config.floor) ** 2).clamp_min(0).sqrt()

    def bands_of(self, audio: torch.Tensor) -> torch.Tensor:
        """The bands of what `audio` returned, (N, F, bands)."""
        re, im = self._spectrum(audio)
        return (re * re + im * im).sqrt() @ self.table

    def audio(self, wanted: torch.Tensor, solved: torch.Tensor | None = None) -> torch.Tensor:
        """The signal of these bands. solved: magnitudes of the places that have them, if they are known."""
        c = self.config
        solved = magnitude = self.magnitude(wanted) if solved is None else solved
        cos, sin = (part[..., self.order] for part in first_phases(magnitude[..., self.natural]))
        audio = self._audio(magnitude * cos, magnitude * sin * self.side)
        before: Pair | None = None
        for step in range(c.phase_steps):
            found = self._spectrum(audio)
            last = step >= c.phase_steps - FITTED
            magnitude = self._fitted(found, wanted) if last else solved
            soft = LAST_SOFT if last else SOFT
            re, im = found if before is None else _ahead(found, before, c.momentum / (1 + c.momentum))
            before = found
            scale = magnitude * torch.rsqrt(re * re + im * im + soft * magnitude * magnitude + 1e-16)
            audio = self._audio(re * scale, im * scale)
        return audio

    def magnitude(self, wanted: torch.Tensor) -> torch.Tensor:
        """(N, F, bands) -> (N, F, places): the spectrum of sines, one a bin, that sound like the bands.

        Bins that were solved for alone would lie flat wherever a partial's two bands allow it, and the search
        made of it two lines that beat. A sine is a whole lobe. Which sound is decided by multiplicative
        updates for the generalised Kullback-Leibler divergence (Lee and Seung 2001, theorem 2), from the
        geometric mean of the bands that each is in: it is small where one of them is.
        """
        # a sine that is in no band begins at 1, and is gone after the first step
        loud = ((wanted + QUIET).log() @ self.sines.T * self.sines_share).exp()
        for _ in range(self.config.magnitude_steps):
            lacking = wanted / (loud @ self.sines + 1e-8)
            loud = loud * (lacking @ self.sines.T * self.sines_share) ** HASTE
        return _lobes(loud)[..., self.order]

    def _fitted(self, found: Pair, wanted: torch.Tensor) -> torch.Tensor:
        """The magnitudes of a spectrum, each bin's times what the bands it is in lack on the mean.

        So what the frames agree on stays as it is inside a band, of which the mel says no more than its sum.
        """
        magnitude = (found[0] * found[0] + found[1] * found[1]).sqrt()
        lacking = (wanted / (magnitude @ self.table + 1e-8)).clamp(max=STEEPEST)
        return magnitude * self._spread(lacking)

    def _spread(self, bands: torch.Tensor) -> torch.Tensor:
        """(N, F, bands) -> (N, F, places), at each bin the mean of the bands it is in, by their filters."""
        return (bands @ self.table.T) * self.share

    def _spectrum(self, audio: torch.Tensor) -> Pair:
        """(N, (F + 3) hop) -> the spectrum of F frames, (N, F, places)."""
        quarters = audio.reshape(audio.shape[0], -1, self.hop)
        count = quarters.shape[1] - OVERLAP + 1
        frames = torch.cat([quarters[:, q : q + count] for q in range(OVERLAP)], -1)
        re, im = self.fft.forward(frames * self.window)
        return re.flatten(2), im.flatten(2)

    def _audio(self, re: torch.Tensor, im: torch.Tensor) -> torch.Tensor:
        """Spectra of F frames -> (N, (F + 3) hop), the least-squares signal of the frames (Griffin and Lim
        1984, equation 6); four squared Hann windows sum to 3 / 2."""
        shape = (*re.shape[:2], self.fft.a // 2 + 1, self.fft.b)
        frames = self.fft.inverse(re.reshape(shape), im.reshape(shape))
        return overlap_add(frames * (self.window / 1.5)).flatten(1)


def _share(table: torch.Tensor) -> torch.Tensor:
    """(places, bands) -> (places,): what makes a mean of a sum over a place's bands; 0 where it has none."""
    total = table.sum(1)
    return torch.where(total > 0, 1 / total, 0)


def _lobes(sines: torch.Tensor) -> torch.Tensor:
    """(..., bins) levels of sines in the middle of bins -> magnitudes: Hann's window halves them beside."""
    pad = nn.functional.pad
    return sines + 0.5 * (pad(sines, (1, -1)) + pad(sines, (-1, 1)))


def _ahead(found: Pair, before: Pair, momentum: float) -> Pair:
    """The phases' direction: found - momentum x before, whose length does not matter."""
    return found[0] - momentum * before[0], found[1] - momentum * before[1]
