"""What a window's labels say, frame by frame: `grid` and `chords`, laid out as engine.manifest says, and the
pitch classes that sound.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from training.dataset import RenderedSong, Windows
from training.mel import FLOOR, GEOMETRY, LATENT_FRAMES
from training.stems import STEMS

FRAME_SECONDS = LATENT_FRAMES * GEOMETRY.hop / GEOMETRY.sample_rate


def grid(batch: Windows, length: int) -> torch.Tensor:
    """(B, T, 6): beat and bar phase as sine and cosine, log2(bpm / 120), known."""
    rows = []
    for song, start in zip(batch.songs, batch.starts, strict=True):
        bpm, per_bar = song.labels["bpm"], song.labels["beats_per_bar"]
        beats = _centres(start, length) * bpm / 60
        beat, bar = 2 * np.pi * beats, 2 * np.pi * beats / per_bar
        phases = [np.sin(beat), np.cos(beat), np.sin(bar), np.cos(bar)]
        rows.append(np.stack([*phases, np.full(length, np.log2(bpm / 120)), np.ones(length)], 1))
    return torch.from_numpy(np.stack(rows)).float()


def chords(batch: Windows, length: int) -> torch.Tensor:
    """(B, T, 25): root one-hot, chord tones, known."""
    rows = [_chord_rows(song)[_chord_numbers(song, start, length)] for song, start in _places(batch)]
    return torch.from_numpy(np.stack(rows))


def heard_chords(batch: Windows, length: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, T, 25): the chords as engine.harmony hears them from audio, late or early and sometimes wrong.

    A third of the chords is mistaken, more or less surely, for another chord of the song.
    """
    out = []
    for song, start in _places(batch):
        rows = _chord_rows(song)
        doubt = (rng.random(len(rows)) < 0.35) * rng.uniform(0.2, 1.0, len(rows)) + rng.uniform(0, 0.2)
        doubt = np.minimum(doubt, 1)[:, None].astype(np.float32)
        mistaken = (1 - doubt) * rows + doubt * rows[rng.permutation(len(rows))]
        late = int(rng.integers(-3, 4))
        numbers = _chord_numbers(song, start, length)
        out.append(mistaken[np.roll(numbers, late)])
    return torch.from_numpy(np.stack(out))


def tones(batch: Windows, length: int) -> torch.Tensor:
    """(B, S, T, 12): 1 where a stem plays a pitch class at the centre of a latent frame."""
    rows = np.zeros((len(batch.songs), len(STEMS), length, 12), np.float32)
    for row, (song, start) in zip(rows, _places(batch), strict=True):
        centres = _centres(start, length)
        for stem, notes in song.labels["notes"].items():
            onset, seconds, pitch = np.asarray(notes, np.float64).reshape(-1, 3).T
            firsts, lasts = np.searchsorted(centres, onset), np.searchsorted(centres, onset + seconds)
            for first, last, number in zip(firsts, lasts, pitch.astype(int) % 12, strict=True):
                row[STEMS.index(stem), first:last, number] = 1
    heard = (batch.mels > FLOOR + 0.1).flatten(2).any(2)
    return torch.from_numpy(rows) * heard[:, :, None, None]


def _places(batch: Windows) -> list[tuple[RenderedSong, int]]:
    return list(zip(batch.songs, batch.starts, strict=True))


def _chord_rows(song: RenderedSong) -> NDArray[np.float32]:
    """(chords, 25), one row for each chord of the song."""
    rows = np.zeros((len(song.labels["chords"]), 25), np.float32)
    for row, chord in zip(rows, song.labels["chords"], strict=True):
        row[chord["root"]] = 1
        row[[12 + p for p in chord["tones"]]] = 1
    rows[:, 24] = 1
    return rows


def _chord_numbers(song: RenderedSong, start: int, length: int) -> NDArray[np.int64]:
    """(T,) which of the song's chords sounds at each latent frame."""
    positions = np.array([chord["beat"] for chord in song.labels["chords"]])
    beats = _centres(start, length) * song.labels["bpm"] / 60
    return np.clip(np.searchsorted(positions, beats, side="right") - 1, 0, None)


def _centres(start: int, length: int) -> np.ndarray:
    """Centre times (s) of `length` latent frames from mel frame `start` of a song."""
    return start * GEOMETRY.hop / GEOMETRY.sample_rate + (np.arange(length) + 0.5) * FRAME_SECONDS
