"""Song forms: sections, who plays in them, stops and drum fills between them.

MMA plays every part from the first bar to the last. Here stems enter and leave by section, the band stops
before a chorus, and the drummer leads from one section into the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from training.stems import STEMS

FORMS = (
    "intro verse chorus verse chorus outro",
    "intro verse verse chorus bridge chorus outro",
    "verse chorus verse chorus bridge chorus",
    "intro chorus verse break chorus outro",
    "verse verse bridge verse outro",
    "intro verse break verse chorus chorus",
)
BARS = {"intro": (2, 4), "verse": (8,), "chorus": (8,), "bridge": (4, 8), "break": (2, 4), "outro": (4,)}
# How many of the stems rest, at least and at most.
RESTING = {
    "intro": (1, 3),
    "verse": (0, 1),
    "chorus": (0, 0),
    "bridge": (0, 2),
    "break": (2, 3),
    "outro": (0, 1),
}
STOP_SHARE, FILL_SHARE = 0.15, 0.6  # of the borders between sections
FILL_DRUMS = (38, 48, 45, 43)  # snare, then toms downwards (General MIDI)
KICK, CRASH = 36, 49
RING = 0.25  # beats for which a note may ring into a section where its stem rests


@dataclass(frozen=True)
class Section:
    """A part of a song: its name, its first bar and length, and the stems that play in it."""

    kind: str
    start: int
    bars: int
    stems: tuple[str, ...]


def random_form(rng: np.random.Generator, bars: int) -> list[Section]:
    """A form of `bars` bars, from its beginning or from one of its first sections on."""
    kinds = str(rng.choice(FORMS)).split()
    kinds = kinds[int(rng.integers(0, 3)) :]
    form: list[Section] = []
    start = 0
    while start < bars:
        kind = kinds[len(form) % len(kinds)]
        length = min(int(rng.choice(BARS[kind])), bars - start)
        resting = rng.permutation(len(STEMS))[: int(rng.integers(RESTING[kind][0], RESTING[kind][1] + 1))]
        playing = tuple(stem for i, stem in enumerate(STEMS) if i not in resting)
        form.append(Section(kind, start, length, playing))
        start += length
    return form


def arranged(
    notes: dict[str, NDArray[np.float64]],
    form: list[Section],
    bar: float,
    beats_per_bar: float,
    swing: bool,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.float64]]:
    """The notes (n, 4) of each stem as this form has them. bar: seconds."""
    beat = bar / beats_per_bar
    played = dict(notes)
    for section in form:
        begin, end = section.start * bar, (section.start + section.bars) * bar
        for stem in STEMS:
            if stem not in section.stems:
                played[stem] = without(played[stem], begin, end, RING * beat)
    for before, after in pairwise(form):
        border = after.start * bar
        if rng.random() < STOP_SHARE:
            silence = int(rng.integers(1, 3)) * beat
            played = {stem: without(rows, border - silence, border, 0.0) for stem, rows in played.items()}
        elif "drums" in before.stems and "drums" in after.stems and rng.random() < FILL_SHARE:
            length = float(rng.choice([1, 2])) * beat
            kept = without(played["drums"], border - length, border, beat)
            run = drum_fill(border - length, length, beat, swing, rng)
            played["drums"] = np.concatenate([kept, run])
    return {stem: rows[np.argsort(rows[:, 0], kind="stable")] for stem, rows in played.items()}


def without(rows: NDArray[np.float64], begin: float, end: float, ring: float) -> NDArray[np.float64]:
    """Notes that do not begin in begin .. end; what began earlier ends `ring` seconds into it."""
    rows = rows[(rows[:, 0] < begin) | (rows[:, 0] >= end)].copy()
    into = (rows[:, 0] < begin) & (rows[:, 0] + rows[:, 1] > begin + ring)
    rows[into, 1] = np.maximum(begin + ring - rows[into, 0], 0.02)
    return rows


def drum_fill(
    start: float, seconds: float, beat: float, swing: bool, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A run of the snare and the toms that grows louder, and kick and crash on the beat that follows it."""
    step = beat / (3 if swing else int(rng.choice([2, 4])))
    count = max(1, round(seconds / step))
    turns = np.sort(rng.integers(len(FILL_DRUMS), size=count))
    loudness = np.linspace(70, 112, count) + rng.normal(0, 5, count)
    hits = [
        (start + i * step, 0.1, FILL_DRUMS[turn], float(np.clip(loud, 20, 127)))
        for i, (turn, loud) in enumerate(zip(turns, loudness, strict=True))
    ]
    return np.array([*hits, (start + seconds, 0.1, KICK, 110.0), (start + seconds, 0.5, CRASH, 105.0)])
