"""What the networks are asked for as they train: to split a mixture, to fill stems in, to make up a band."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from training.stems import STEMS

KNOWN_WEIGHT = 0.05  # of the loss on what is given anyway


@dataclass(frozen=True)
class Tasks:
    """Of each window: `given` stems are known, `mixed` ones are in its mixture, `named` ones are said to be.

    context_mask (B, S, T): 1 where a stem is known. A `split` has nothing else, but sometimes a time span.
    """

    split: NDArray[np.bool_]  # (B,)
    fill: NDArray[np.bool_]  # (B,)
    given: NDArray[np.bool_]  # (B, S)
    mixed: NDArray[np.bool_]  # (B, S)
    named: NDArray[np.bool_]  # (B, S)
    context_mask: NDArray[np.float32]  # (B, S, T)

    def loss_mask(self, resting: NDArray[np.bool_]) -> torch.Tensor:
        """(B, S, T): what is known counts little; stems of other material, and armed stems that rest (B, S)
        where they are asked to play, not at all."""
        unasked = (self.mixed & ~self.named) | (resting & self.fill[:, None] & ~self.given)
        asked = torch.from_numpy(~unasked).float()[:, :, None]
        return torch.where(torch.from_numpy(self.context_mask) > 0, KNOWN_WEIGHT, asked)

    def alone(self) -> torch.Tensor:
        """(B,) splits of which no time span is known."""
        return torch.from_numpy(self.split & ~self.context_mask.any((1, 2)))


def draw_tasks(
    batch: int, length: int, shares: dict[str, float], rng: np.random.Generator, favoured: int | None = None
) -> Tasks:
    """Tasks for `batch` windows of `length` latent frames, split, fill and generate in these shares.

    favoured: number of a stem that three of four fills ask for.
    """
    stems = len(STEMS)
    task = rng.choice(list(shares), size=batch, p=list(shares.values()))
    split, fill = task == "split", task == "fill"
    subset = rng.random((batch, stems)) < 0.5
    if favoured is not None:
        subset[:, favoured] &= rng.random(batch) < 0.5
    subset[subset.all(1)] = np.eye(stems, dtype=bool)[0]
    subset[~subset.any(1)] = np.eye(stems, dtype=bool)[int(rng.integers(stems))]
    as_mixture = fill & (rng.random(batch) < 0.25)  # the known stems arrive mixed down
    unnamed = as_mixture & (rng.random(batch) < 0.5)  # and as other material, not said to hold our stems
    given = subset & (fill & ~as_mixture)[:, None]
    mixed = split[:, None] | (subset & as_mixture[:, None])
    times = np.where((split & (rng.random(batch) < 0.8))[:, None], 0, known_times(batch, length, rng))
    spans = times[:, None, :] * ~as_mixture[:, None, None]
    context_mask = np.maximum(given[:, :, None], spans).astype(np.float32)
    return Tasks(split, fill, given, mixed, mixed & ~unnamed[:, None], context_mask)


def known_times(batch: int, length: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(B, T) of 0 or 1: mostly nothing; a known start (windows that join), a known start and end, or gaps."""
    known = np.zeros((batch, length), np.float32)
    for row in known:
        kind = rng.random()
        if kind < 0.25:
            row[: int(rng.integers(length // 8, length // 2))] = 1
        elif kind < 0.32:
            a, b = sorted(rng.integers(0, length, 2))
            row[:a], row[b:] = 1, 1
    return known


def dropped(x: torch.Tensor, share: float, rng: np.random.Generator) -> torch.Tensor:
    """(B, T, C) with that share of its samples set to zero, unknown."""
    return x * torch.from_numpy((rng.random(len(x)) >= share).astype(np.float32))[:, None, None]
