"""The `grid` and `chords` conditions of a window, from a song's labels; layouts in engine.manifest."""

from __future__ import annotations

import numpy as np
import torch

from training.dataset import Windows
from training.mel import GEOMETRY, LATENT_FRAMES

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
    out = np.zeros((len(batch.songs), length, 25), np.float32)
    for b, (song, start) in enumerate(zip(batch.songs, batch.starts, strict=True)):
        timeline = song.labels["chords"]
        positions = np.array([c["beat"] for c in timeline])
        beats = _centres(start, length) * song.labels["bpm"] / 60
        current = np.clip(np.searchsorted(positions, beats, side="right") - 1, 0, None)
        for t, index in enumerate(current):
            out[b, t, timeline[index]["root"]] = 1
            out[b, t, [12 + p for p in timeline[index]["tones"]]] = 1
    out[..., 24] = 1
    return torch.from_numpy(out)


def _centres(start: int, length: int) -> np.ndarray:
    """Centre times (s) of `length` latent frames from mel frame `start` of a song."""
    return start * GEOMETRY.hop / GEOMETRY.sample_rate + (np.arange(length) + 0.5) * FRAME_SECONDS
