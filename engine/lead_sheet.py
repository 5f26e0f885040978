"""A tempo and chords for a band that was told neither, drawn from its seed as a player would call them."""

from __future__ import annotations

import numpy as np

SLOWEST, FASTEST = 76.0, 140.0  # bpm
KEYS = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
# Four bars each, by the degree in semitones above the key note and the chord's quality.
MAJOR = (
    ((0, ""), (7, ""), (9, "m"), (5, "")),
    ((0, ""), (9, "m"), (5, ""), (7, "")),
    ((9, "m"), (5, ""), (0, ""), (7, "")),
    ((5, ""), (7, ""), (0, ""), (9, "m")),
    ((0, ""), (5, ""), (0, ""), (7, "7")),
    ((2, "m7"), (7, "7"), (0, "maj7"), (9, "m7")),
    ((0, "maj7"), (5, "maj7"), (2, "m7"), (7, "7")),
    ((0, ""), (10, ""), (5, ""), (0, "")),
)
MINOR = (
    ((0, "m"), (8, ""), (3, ""), (10, "")),
    ((0, "m"), (10, ""), (8, ""), (10, "")),
    ((0, "m7"), (5, "m7"), (0, "m7"), (7, "7")),
    ((0, "m"), (3, ""), (10, ""), (5, "")),
)
MINOR_SHARE = 0.35


def draw_bpm(seed: int) -> float:
    """A whole number of beats per minute, SLOWEST to FASTEST, slow ones as often as fast ones by ratio."""
    low, high = np.log(SLOWEST), np.log(FASTEST)
    return float(np.round(np.exp(_generator(seed, 0).uniform(low, high))))


def draw_chords(seed: int) -> str:
    """A chart of 16 bars for `engine.conditions.parse_chords`: two loops of four bars, each played twice."""
    rng = _generator(seed, 1)
    loops = MINOR if rng.random() < MINOR_SHARE else MAJOR
    first, second = rng.choice(len(loops), 2, replace=False)
    key = int(rng.integers(len(KEYS)))
    bars = (*loops[first] * 2, *loops[second] * 2)
    return " | ".join(KEYS[(key + degree) % len(KEYS)] + quality for degree, quality in bars)


def _generator(seed: int, what: int) -> np.random.Generator:
    """Its own for each thing drawn, so that a band that is told its tempo has the chords it has without."""
    return np.random.default_rng([what, seed])
