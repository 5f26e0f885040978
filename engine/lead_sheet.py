"""A tempo and chords for a band that was told neither, drawn from its seed as a player would call them.

Where a prompt speaks of them ("slow", "at 90 bpm", "waltz", "minor"), what is drawn is what it says.
"""

from __future__ import annotations

import re

import numpy as np

from engine.conditions import MAX_BPM, MIN_BPM

SLOWEST, FASTEST = 76.0, 140.0  # bpm
# What the captions of training call slow is below 95 bpm, fast is above 125.
PACES = {"slow": (70.0, 92.0), "fast": (128.0, 152.0)}
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


def draw_bpm(seed: int, prompt: str = "") -> float:
    """A whole number of beats per minute, slow ones as often as fast ones by ratio.

    From SLOWEST to FASTEST, or as slow or fast as the prompt says; what it gives in bpm is not drawn.
    """
    named = re.search(r"\b(\d+(?:\.\d+)?) *bpm\b", prompt.lower())
    if named and MIN_BPM <= float(named[1]) <= MAX_BPM:
        return float(named[1])
    pace = next((bounds for word, bounds in PACES.items() if word in _words(prompt)), (SLOWEST, FASTEST))
    low, high = np.log(pace)
    return float(np.round(np.exp(_generator(seed, 0).uniform(low, high))))


def draw_chords(seed: int, prompt: str = "") -> str:
    """A chart of 16 bars for `engine.conditions.parse_chords`: two loops of four bars, each played twice.

    In major or minor where the prompt says so.
    """
    rng = _generator(seed, 1)
    minor = rng.random() < MINOR_SHARE
    said = {"major", "minor"} & _words(prompt)
    if len(said) == 1:
        minor = said == {"minor"}
    loops = MINOR if minor else MAJOR
    first, second = rng.choice(len(loops), 2, replace=False)
    key = int(rng.integers(len(KEYS)))
    bars = (*loops[first] * 2, *loops[second] * 2)
    return " | ".join(KEYS[(key + degree) % len(KEYS)] + quality for degree, quality in bars)


def metre_in(prompt: str, otherwise: int) -> int:
    """Beats in a bar: three of a waltz, else `otherwise`."""
    return 3 if "waltz" in _words(prompt) else otherwise


def _words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z]+", prompt.lower()))


def _generator(seed: int, what: int) -> np.random.Generator:
    """Its own for each thing drawn, so that a band that is told its tempo has the chords it has without."""
    return np.random.default_rng([what, seed])
