"""Chord charts and song forms, written as bars of chord symbols that MMA and the `chords` condition read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.forms import Section

PITCH_NAMES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
QUALITIES = {
    "": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 7, 10), "M7": (0, 4, 7, 11), "m7": (0, 3, 7, 10),
    "6": (0, 4, 7, 9), "m6": (0, 3, 7, 9), "9": (0, 4, 7, 10, 2), "m9": (0, 3, 7, 10, 2),
    "sus4": (0, 5, 7), "dim": (0, 3, 6), "m7b5": (0, 3, 6, 10),
}  # fmt: skip

# Degrees in semitones above the tonic, one bar each; "|" in a bar splits it in halves.
MAJOR = (
    "0 9m 5 7",
    "0 7 9m 5",
    "9m 5 0 7",
    "0 5 7 5",
    "0 5 0 7",
    "0 4m 5 7",
    "0 2m 5 7",
    "5 7 0 9m",
    "0M7 9m7 2m7 7",
    "2m7 7 0M7 0M7",
    "0M7 5M7 2m7 7",
    "4m7 9m7 2m7 7",
    "0 10 5 0",
    "0 0 5 5",
    "0 7|5 9m 5|7",
    "0 2 5 0",
    "0 9m 2m 7",
    "0sus4 0 7sus4 7",
    "0 5|7 0 5|7",
    "0M7 4m7 5M7 5m6",
)
MINOR = (
    "0m 8 3 10",
    "0m 10 8 10",
    "0m 5m 7 0m",
    "0m 3 10 5",
    "0m 8 10 0m",
    "0m7 5m7 10 3M7",
    "2m7b5 7 0m 0m",
    "0m 10 8 7",
    "0m9 5m7 0m9 7",
    "0m 5m|7 0m 8|7",
)
BLUES = ("0 0 0 0 5 5 0 0 7 5 0 7", "0 5 0 0 5 5 0 9 2m 7 0 7", "0m 0m 0m 0m 5m 5m 0m 0m 8 7 0m 7")


@dataclass(frozen=True)
class Chord:
    """A chord from `beat` (in beats from the start of the song) until the next one."""

    beat: float
    root: int
    tones: tuple[int, ...]  # absolute pitch classes
    symbol: str


def _symbol(token: str, tonic: int, sevenths: bool) -> str:
    # no degree is followed by a quality that begins with a digit: its digits would join the degree's
    digits = len(token) - len(token.lstrip("0123456789"))
    degree, quality = int(token[:digits]), token[digits:]
    if sevenths and quality == "" and degree == 7:
        quality = "7"
    if sevenths and quality == "m":
        quality = "m7"
    return PITCH_NAMES[(tonic + degree) % 12] + quality


def _progression(text: str, tonic: int, sevenths: bool) -> list[list[str]]:
    return [[_symbol(token, tonic, sevenths) for token in bar.split("|")] for bar in text.split()]


def random_chart(rng: np.random.Generator, bars: int) -> tuple[list[list[str]], str]:
    """`bars` bars of chord symbols in a random key, built of repeated sections, and the key's name."""
    tonic = int(rng.integers(12))
    minor = rng.random() < 0.35
    sevenths = rng.random() < 0.5
    if rng.random() < 0.12:
        sections = [_progression(str(rng.choice(BLUES)), tonic, sevenths)]
    else:
        pool = MINOR if minor else MAJOR
        sections = [_progression(str(rng.choice(pool)), tonic, sevenths) * 2 for _ in range(2)]
    chart: list[list[str]] = []
    while len(chart) < bars:
        chart += sections[int(rng.integers(len(sections)))]
    return chart[:bars], f"{PITCH_NAMES[tonic]} {'minor' if minor else 'major'}"


def chart_of(form: list[Section], rng: np.random.Generator) -> tuple[list[list[str]], str]:
    """Bars of chord symbols for a form, a progression for each kind of section, and the key's name."""
    tonic = int(rng.integers(12))
    minor = rng.random() < 0.35
    sevenths = rng.random() < 0.5
    pool = BLUES if rng.random() < 0.12 else MINOR if minor else MAJOR
    progressions = {
        kind: _progression(str(rng.choice(pool)), tonic, sevenths) for kind in ("verse", "chorus", "bridge")
    }
    chart: list[list[str]] = []
    for section in form:
        bars = progressions.get(section.kind, progressions["verse"])  # intro, break and outro are the verse's
        chart += [bars[i % len(bars)] for i in range(section.bars)]
    return chart, f"{PITCH_NAMES[tonic]} {'minor' if minor else 'major'}"


def parse_symbol(symbol: str) -> tuple[int, tuple[int, ...]]:
    """Root and chord tones as pitch classes (C = 0) of a symbol such as "Dm7"."""
    name = symbol[:2] if symbol[1:2] == "b" else symbol[:1]
    root = PITCH_NAMES.index(name)
    return root, tuple((root + step) % 12 for step in QUALITIES[symbol[len(name) :]])


def timeline(chart: list[list[str]], beats_per_bar: float) -> list[Chord]:
    """The chart as chords with their beat positions."""
    chords = []
    for bar, symbols in enumerate(chart):
        for i, symbol in enumerate(symbols):
            root, tones = parse_symbol(symbol)
            beat = bar * beats_per_bar + i * beats_per_bar / len(symbols)
            chords.append(Chord(beat, root, tones, symbol))
    return chords
