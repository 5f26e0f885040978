"""python -m training.train_separator: masks for every stem from the mix alone, without the other networks.

Most mixtures are bands as rendered, in some each stem comes from another song: what sounds together
by chance keeps the network from guessing one stem by another. Every stem has its own level and equaliser,
some are overdriven, and most are played faster or slower, which moves pitches and formants alike. Some take
their low tones from one render and the high ones from another of the same notes, as no sound of the pools
has them, some end where samples of a low rate do, and some are dark: basses that are hardly more than their
lowest tone, as many upright ones are, would else be taken for bass drums. So would the knock that plucking
gives the body of an upright one: some basses get one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import butter, lfilter, sosfilt

from export.separator import Separator, SeparatorConfig
from training.loop import Logs, add_arguments, join_workers, loop_config, mixed_precision, train
from training.mel import squared_magnitude
from training.render import SEPARATION_RATE
from training.stems import STEMS

N_FFT, HOP = 2048, 512
FRAMES = 160  # of a training window, 3.7 s, unless the command says otherwise
FASTEST = 4.0  # semitones
FRESH = 0.1  # share of mixtures whose stems come from different songs
DRIVEN = 0.25  # share of stems that are overdriven, lightly to clearly
MOVED = 0.7  # share of stems (of whole bands, where they play one song) that are played faster or slower
CROSSED = 0.35  # share of stems of two renders
DULL = 0.15  # share of stems that end at some frequency between those of DULLEST
DULLEST = (2000.0, 9000.0)  # Hz
DARK = 0.3  # share of stems that fall off from some frequency between those of DARKEST on
DARKEST = {"bass": (60.0, 600.0), "guitar": (300.0, 3000.0), "piano": (300.0, 3000.0)}  # Hz
SLOPES = (6.0, 18.0)  # dB an octave
HOLLOW = 0.15  # share of basses that have a knock
AIR = (30.0, 100.0)  # Hz, of the air in the body
KNOCK = (-12.0, 3.0)  # dB, to the energy of the stem
FOLLOWERS = np.array([0.005, 0.06])  # s, of the envelope whose rises excite it
RINGS = (0.02, 0.12)  # s, until it is at 1 / e
SILENT = 0.08
QUIETEST = 1e-3  # of the mix's energy: an error below it, or a stem, counts no more
RELOAD = 200  # steps after which songs that were rendered meanwhile are taken in
NOTHING = 1e-3  # squared magnitude, far below what is audible: a mixture may be silent
DECIBEL = 10 / float(np.log(10))


@dataclass(frozen=True)
class Mixtures:
    """A batch of spectrograms (B, S, frames, bins): what an error is made of, see `mask_error`."""

    mixture: torch.Tensor  # (B, frames, bins) magnitudes
    shared: torch.Tensor  # real part of the mixture's conjugate times each stem
    energy: torch.Tensor  # (B, S) of each stem

    @cached_property
    def power(self) -> torch.Tensor:
        """(B, frames, bins), of the mixture."""
        return self.mixture.square()


def load_stems(folder: Path, frames: int = FRAMES) -> list[NDArray[np.int16]]:
    """Audio (stems, renders, samples) of the rendered songs that last so many spectrogram frames at any
    speed, memory mapped. Raises FileNotFoundError."""
    least = _samples(frames) * 2 ** (FASTEST / 12) + 1
    songs = [np.load(p, mmap_mode="r") for p in sorted(folder.glob("*.stems.npy"))]
    songs = [song for song in songs if song.shape[2] >= least]
    if not songs:
        seconds = f"{least / SEPARATION_RATE:.1f} s"
        raise FileNotFoundError(
            f"{folder} holds no stems of {seconds} or more; run python -m training.render --stems first"
        )
    return songs


def _samples(frames: int) -> int:
    """From the centre of the first frame to that of the last."""
    return (frames - 1) * HOP


def draw(
    songs: list[NDArray[np.int16]],
    batch: int,
    rng: np.random.Generator,
    augment: bool = True,
    frames: int = FRAMES,
) -> Mixtures:
    """A random batch of mixtures, augmented as said above or as rendered."""
    bands = [_band(songs, _samples(frames), rng, augment) for _ in range(batch)]
    audio = torch.from_numpy(np.stack(bands))
    spectra = torch.stft(
        audio.flatten(0, 1), N_FFT, HOP, window=torch.hann_window(N_FFT), center=True, return_complex=True
    )
    spectra = spectra.transpose(1, 2).unflatten(0, audio.shape[:2])
    if augment:
        coloured = spectra * _equalisers(batch, spectra.shape[-1], rng)
        before, after = (
            squared_magnitude(x).sum((2, 3), keepdim=True) + NOTHING for x in (spectra, coloured)
        )
        spectra = coloured * (before / after).sqrt()
    mixture = spectra.sum(1)
    shared = mixture.real[:, None] * spectra.real + mixture.imag[:, None] * spectra.imag
    energy = squared_magnitude(spectra).sum((2, 3))
    return Mixtures(squared_magnitude(mixture).sqrt(), shared, energy)


def _band(
    songs: list[NDArray[np.int16]], length: int, rng: np.random.Generator, augment: bool
) -> NDArray[np.float32]:
    """(S, length) of one song or, in FRESH of the augmented ones, of as many songs as there are stems."""
    fresh = augment and rng.random() < FRESH
    rows: list[NDArray[np.float32]] = []
    song, place, speed = _place(songs, rng, augment)
    for stem in range(len(STEMS)):
        if fresh:
            song, place, speed = _place(songs, rng, augment)
        renders = rng.permutation(song.shape[1])
        played = _played(song[stem, renders[0]], length, place, speed)
        if augment and len(renders) > 1 and rng.random() < CROSSED:
            played = _crossed(played, _played(song[stem, renders[1]], length, place, speed), rng)
        if augment and rng.random() < DRIVEN:
            played = _driven(played, rng)
        if augment and STEMS[stem] == "bass" and rng.random() < HOLLOW:
            played = _knocked(played, rng)
        rows.append(played)
    gains = np.ones(len(rows), np.float32)
    if augment:
        gains *= (10 ** (rng.normal(0, 4, len(rows)) / 20)).astype(np.float32)
    silent = rng.random(len(rows)) < (SILENT if augment else 0)
    gains[silent & ~silent.all()] = 0
    return np.stack(rows) * gains[:, None]


def _place(
    songs: list[NDArray[np.int16]], rng: np.random.Generator, augment: bool
) -> tuple[NDArray[np.int16], float, float]:
    """A song, where to begin (0 to 1) and how fast to play."""
    moved = augment and rng.random() < MOVED
    speed = 2 ** (rng.uniform(-FASTEST, FASTEST) / 12) if moved else 1.0
    return songs[int(rng.integers(len(songs)))], float(rng.random()), float(speed)


def _played(audio: NDArray[np.int16], length: int, place: float, speed: float) -> NDArray[np.float32]:
    """(length,) float32, linear between samples: what that dulls, an equaliser dulls more."""
    taken = int(np.ceil(length * speed)) + 1
    start = int(place * (len(audio) - taken))
    part: NDArray[np.float32] = audio[start : start + taken].astype(np.float32) / np.float32(32768)
    if speed == 1.0:
        return part[:length]
    return np.interp(np.arange(length) * speed, np.arange(taken), part).astype(np.float32)


def _crossed(
    low: NDArray[np.float32], high: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Below a frequency of 150 Hz to 4 kHz the first, above it the second."""
    hz = 10 ** rng.uniform(np.log10(150), np.log10(4000))
    below, above = (butter(2, hz, kind, fs=SEPARATION_RATE, output="sos") for kind in ("low", "high"))
    return (sosfilt(below, low) + sosfilt(above, high)).astype(np.float32)


def _driven(audio: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Bent by tanh, its knee at -12 to 10 dB of the root mean square: other harmonics of the same notes."""
    level = np.float32(np.sqrt(np.mean(audio**2)) * 10 ** (rng.uniform(-12, 10) / 20) + 1e-5)
    bent: NDArray[np.float32] = np.tanh(audio / level) * level
    return bent * np.float32(_times_louder(audio, bent))


def _knocked(audio: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """With the knock that plucking a hollow instrument gives its body: of one pitch, whatever is played."""
    decays = np.exp(-1 / (FOLLOWERS * SEPARATION_RATE))
    quick, slow = (lfilter([1 - decay], [1, -decay], np.abs(audio)) for decay in decays)
    rises = np.maximum(quick - 1.5 * slow, 0)
    pole = np.exp(-1 / (rng.uniform(*RINGS) * SEPARATION_RATE))
    angle = 2 * np.pi * np.exp(rng.uniform(*np.log(AIR))) / SEPARATION_RATE
    knock = lfilter([1, 0, -1], [1, -2 * pole * np.cos(angle), pole**2], rises)
    gain = 10 ** (rng.uniform(*KNOCK) / 20)
    return (audio + gain * min(_times_louder(audio, knock), 1e3) * knock).astype(np.float32)


def _times_louder(audio: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Than the other by root mean square; about as loud where both are silent."""
    return float(np.sqrt((np.mean(audio**2) + 1e-12) / (np.mean(other**2) + 1e-12)))


def _equalisers(batch: int, bins: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, S, 1, bins) factors: a tilt, three bells over log frequency, for some a slope or an end."""
    axis = np.linspace(-1, 1, bins)
    axis = 2 * np.log2(1 + 40 * (axis + 1) / 2) / np.log2(41) - 1  # about nine octaves, dense below
    shape = (batch, len(STEMS), 1, 1)
    db = rng.normal(0, 4, shape) * axis
    for _ in range(3):
        bell = np.exp(-(((axis - rng.uniform(-1, 1, shape)) / rng.uniform(0.08, 0.5, shape)) ** 2))
        db = db + rng.normal(0, 5, shape) * bell
    ends = np.where(rng.random(shape) < DULL, rng.uniform(*DULLEST, shape), SEPARATION_RATE)
    hz = np.arange(bins) * SEPARATION_RATE / N_FFT
    db -= 10 * np.log10(1 + (hz / ends) ** 24)
    for stem, (low, high) in DARKEST.items():
        dark = rng.random((batch, 1, 1)) < DARK
        corner = np.exp(rng.uniform(np.log(low), np.log(high), (batch, 1, 1)))
        slope = rng.uniform(*SLOPES, (batch, 1, 1)) * dark
        db[:, STEMS.index(stem)] -= slope / 2 * np.log2(1 + (hz / corner) ** 2)
    return torch.from_numpy((10 ** (db / 20)).astype(np.float32))


def mask_error(masks: torch.Tensor, given: Mixtures) -> torch.Tensor:
    """(B, S) log ratios of error to stem under masks (B, S, frames, bins); NaN where a stem is silent.

    |M X - S|^2 = M^2 |X|^2 - 2 M Re(X* S) + |S|^2 over the whole spectrogram, which by Parseval's theorem is
    the audio's error but for the overlap of its windows.
    """
    power = given.power[:, None]
    return _log_ratio((masks * (masks * power - 2 * given.shared)).sum((2, 3)) + given.energy, given)


def _log_ratio(error: torch.Tensor, given: Mixtures) -> torch.Tensor:
    """Of an error's energy (B, S) to the stem's; NaN where that is silent."""
    least = QUIETEST * given.power.sum((1, 2))[:, None] + NOTHING
    ratio = torch.log((error.clamp_min(0) + least) / (given.energy + least))
    return torch.where(given.energy > least, ratio, torch.nan)


def separation_loss(network: Separator, given: Mixtures, device: str) -> tuple[torch.Tensor, Logs]:
    """Mean of `mask_error` over sounding stems, silent ones by the energy they are given; logs in dB."""
    with mixed_precision(device):
        masks = network(given.mixture).float()
    ratios = mask_error(masks, given)
    sounding = ~ratios.isnan()
    share = given.power / given.power.sum((1, 2), keepdim=True).clamp_min(1e-9)
    leaked = (masks[~sounding].square() * share[:, None].expand_as(masks)[~sounding]).sum()
    loss = (torch.where(sounding, ratios, 0.0).sum() + leaked) / sounding.numel()
    unmasked = given.power.sum((1, 2))[:, None] - 2 * given.shared.sum((2, 3)) + given.energy
    before = _log_ratio(unmasked, given)
    logs = {"db": ratios.nanmean().item() * DECIBEL} if sounding.any() else {}
    for number, stem in enumerate(STEMS):
        row = sounding[:, number]
        if row.any():
            logs[f"gain_{stem}"] = (before - ratios)[row, number].mean().item() * DECIBEL
    return loss, logs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, lr=2e-3)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of a mixture's spectrogram (%(default)s)")
    args = parser.parse_args()
    sizes = SeparatorConfig()
    if args.frames % sizes.patch:
        parser.error(f"--frames {args.frames} is no multiple of {sizes.patch}")
    config = replace(loop_config(args), muon=True)
    rng = np.random.default_rng([args.seed, int(args.minutes * 100), join_workers()])
    torch.manual_seed(args.seed)
    songs, held_out = (load_stems(args.data / kind, args.frames) for kind in ("train", "val"))
    fixed = draw(held_out, 32, np.random.default_rng(7), augment=False, frames=args.frames)

    def loss(network: Separator, step: int) -> tuple[torch.Tensor, Logs]:
        if (step + 1) % RELOAD == 0:
            songs[:] = load_stems(args.data / "train", args.frames)
        return separation_loss(network, draw(songs, args.batch, rng, frames=args.frames), args.device)

    @torch.no_grad()
    def validate(network: Separator) -> Logs:
        return separation_loss(network, fixed, args.device)[1]

    train(Separator(sizes), loss, config, validate)


if __name__ == "__main__":
    main()
