"""Windows of bands from rendered songs, as log mels, with augmentation that costs almost nothing.

Sounds are recombined per window: each stem takes a random render, gain and equaliser (a smooth curve added to
its log mel), some stems fall silent. The mixture's mel is the power sum of the stems' with a random
interference term, so that no audio has to be mixed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.features import low_filterbank, mel_filterbank
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES, QUANTUM, WINDOW
from training.stems import STEMS

MIXTURE_DB = -8.0  # mean squared mel magnitude of a full band, see engine.manifest.Level
FRAMES = WINDOW * LATENT_FRAMES


@dataclass(frozen=True)
class RenderedSong:
    """One song of a folder that training.render wrote."""

    mels: np.ndarray  # uint8 (stems, renders, frames, mels), memory mapped
    labels: dict[str, Any]
    onsets: np.ndarray  # seconds at which any stem begins a note, in steps of 50 ms


@dataclass(frozen=True)
class Windows:
    """A batch: stem log mels (B, S, frames, mels), mixtures (B, frames, mels), and where each came from."""

    mels: torch.Tensor
    mixture: torch.Tensor
    songs: list[RenderedSong]
    starts: list[int]  # first mel frame
    renders: np.ndarray  # (B, S)


def load_songs(folder: Path) -> list[RenderedSong]:
    """Every finished song of a folder that is long enough. Raises FileNotFoundError where there is none."""
    paths = sorted(p for p in folder.glob("[0-9]*.npy") if p.suffixes == [".npy"])
    songs = [song for song in map(_load_song, paths) if song.mels.shape[2] >= FRAMES]
    if not songs:
        raise FileNotFoundError(f"{folder} holds no rendered songs; run python -m training.render first")
    return songs


def _load_song(path: Path) -> RenderedSong:
    labels = json.loads(path.with_suffix(".json").read_text())
    times = np.concatenate([np.asarray(labels["onsets"][stem]) for stem in STEMS])
    return RenderedSong(np.load(path, mmap_mode="r"), labels, np.unique((times * 20).astype(int)) / 20)


def draw(
    songs: list[RenderedSong],
    batch: int,
    rng: np.random.Generator,
    augment: bool = True,
    frames: int = FRAMES,
) -> Windows:
    """A random batch of windows at the training level (with a few dB of scatter when augmenting)."""
    chosen = [songs[int(i)] for i in rng.integers(len(songs), size=batch)]
    starts = [int(rng.integers(s.mels.shape[2] - frames + 1)) for s in chosen]
    renders = np.stack([rng.integers(s.mels.shape[1], size=len(STEMS)) for s in chosen])
    stored = np.stack(
        [
            np.stack([song.mels[i, render, start : start + frames] for i, render in enumerate(row)])
            for song, start, row in zip(chosen, starts, renders, strict=True)
        ]
    )
    magnitude = torch.from_numpy(MAGNITUDES[stored])
    if augment:
        magnitude *= _random_gains(len(chosen), rng)
    power = mix_power(magnitude, rng)
    target = MIXTURE_DB + (rng.normal(0, 3, batch) if augment else np.zeros(batch))
    level = 10 * torch.log10(power.mean((1, 2)).clamp_min(1e-8))
    gain = 10 ** ((torch.from_numpy(target).float() - level) / 20)
    mels = floored((magnitude * gain[:, None, None, None]).log())
    mixture = floored((power.sqrt() * gain[:, None, None]).log())
    return Windows(mels, mixture, chosen, starts, renders)


def floored(mel: torch.Tensor) -> torch.Tensor:
    """Log mels clamped at the geometry's floor."""
    return mel.clamp_min(FLOOR)


def _random_gains(batch: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, S, 1, mels) factors: a level, a tilt and two bells per stem; 0 where a stem falls silent."""
    stems, bands = len(STEMS), GEOMETRY.n_mels
    axis, shape = np.linspace(-1, 1, bands), (batch, stems, 1, 1)
    db = rng.normal(0, 4, shape) + rng.normal(0, 3, shape) * axis
    for _ in range(2):
        bell = np.exp(-(((axis - rng.uniform(-1, 1, shape)) / rng.uniform(0.08, 0.5, shape)) ** 2))
        db = db + rng.normal(0, 4, shape) * bell
    silent = rng.random((batch, stems)) < 0.08
    silent[silent.all(1)] = False
    return torch.from_numpy((10 ** (db / 20) * ~silent[:, :, None, None]).astype(np.float32))


# Tables, because a window holds half a million bands: magnitudes of stored bytes (a band at the floor is
# nothing), and cosines and sines of random phases, read from a random place.
MAGNITUDES = np.concatenate([[0], np.exp(np.arange(1, 256) * QUANTUM + FLOOR)]).astype(np.float32)
_PHASES = np.random.default_rng(0).uniform(0, 2 * np.pi, 1 << 21)
_COS, _SIN = torch.from_numpy(np.cos(_PHASES)).float(), torch.from_numpy(np.sin(_PHASES)).float()
_TABLES = ([low_filterbank(GEOMETRY)] if GEOMETRY.low else []) + [mel_filterbank(GEOMETRY)]
_BINS = torch.from_numpy(np.concatenate([(table > 0).sum(0) for table in _TABLES])).float()
_SPREAD = 1 / (_BINS / 1.5).clamp_min(1).sqrt()


def mix_power(magnitude: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Stem mel magnitudes (B, S, frames, mels) -> the mixture's squared magnitude (B, frames, mels).

    Powers add up to interference: a band of one bin sees the full cosine of the phase difference, a band of n
    independent bins averages it down by sqrt(n).
    """
    batch, stems, frames, bands = magnitude.shape
    shape, size = (batch, frames, bands), frames * bands
    real, imaginary, incoherent = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for i in range(stems):
        part = magnitude[:, i]
        offsets = rng.integers(0, len(_COS) - size, batch)
        real.addcmul_(part, torch.stack([_COS[o : o + size] for o in offsets]).reshape(shape))
        imaginary.addcmul_(part, torch.stack([_SIN[o : o + size] for o in offsets]).reshape(shape))
        incoherent.addcmul_(part, part)
    coherent = real.square_().add_(imaginary.square_())
    return (incoherent + (coherent - incoherent) * _SPREAD).clamp_min_(1e-12)


def mix(mels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Stem log mels (B, S, frames, mels) -> the mixture's (B, frames, mels); the floor adds nothing."""
    magnitude = torch.where(mels > FLOOR + 1e-3, mels.exp(), 0.0)
    return floored(0.5 * mix_power(magnitude, rng).log())
