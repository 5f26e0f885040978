"""Bands on paper: the notes of four stems over one chart, with everything known about them."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.charts import Chord, chart_of, random_chart, timeline
from training.forms import Section, arranged, random_form
from training.grooves import HELD_OUT, Groove, Score, play, role_of, spread
from training.stems import STEMS

RANGES = {"bass": (28, 55), "guitar": (40, 84), "piano": (33, 96)}  # MIDI pitches a player would use
FIFTH_STRING = 23  # B0, of basses that have one


@dataclass(frozen=True)
class Song:
    """Notes per stem as rows (onset s, duration s, pitch, velocity), and the labels known for free."""

    notes: dict[str, NDArray[np.float64]]
    bpm: float
    beats_per_bar: float
    seconds: float
    chords: list[Chord]
    key: str
    style: str  # MMA library of the rhythm section
    grooves: dict[str, str]  # stem -> groove it was taken from
    swing: bool
    form: list[Section] = field(default_factory=list)  # empty: everybody plays from the first bar to the last

    @property
    def chart(self) -> str:
        """The chords as `--chords` takes them, a cell for each bar."""
        bars: dict[int, list[str]] = {}
        for chord in self.chords:
            bars.setdefault(int(chord.beat // self.beats_per_bar), []).append(chord.symbol)
        return " | ".join(" ".join(bars[bar]) for bar in sorted(bars))


def split_grooves(grooves: list[Groove], held_out: bool) -> list[Groove]:
    """The grooves of one side of the split."""
    return [g for g in grooves if (g.library in HELD_OUT) == held_out]


def part_of(score: Score, stem: str, bpm: float) -> NDArray[np.float64]:
    """A stem's notes (n, 4) in seconds. A chord part of another sound stands in where the stem has none."""
    tracks = [t for t in score.tracks if role_of(t) == stem]
    if not tracks and stem in ("guitar", "piano"):
        tracks = [t for t in score.tracks if role_of(t) == "chordal"][:1]
    tick = 60 / bpm / score.ticks_per_quarter
    rows = [(n.time * tick, n.duration * tick, n.pitch, n.velocity) for t in tracks for n in t.notes]
    return np.array(sorted(rows), dtype=np.float64).reshape(-1, 4)


def folded(notes: NDArray[np.float64], stem: str) -> NDArray[np.float64]:
    """The notes, changed in place: octaves moved into the range of the instrument."""
    if stem in RANGES and len(notes):
        notes[:, 2] = _within(notes[:, 2], *RANGES[stem])
    return notes


def lowered(song: Song, rng: np.random.Generator) -> Song:
    """The song with its bass played low: octaves moved into one and a half from the lowest string on.

    MMA's basses hardly go below a Gb1, so a model that hears them alone never meets the lowest notes of a
    bass. A fifth of the songs have five strings.
    """
    lowest = FIFTH_STRING if rng.random() < 0.2 else RANGES["bass"][0]
    bass = song.notes["bass"].copy()
    bass[:, 2] = _within(bass[:, 2], lowest, lowest + 11 + int(rng.integers(0, 9)))
    return replace(song, notes=song.notes | {"bass": bass})


def _within(pitch: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Pitches moved by octaves between these, which are at least eleven semitones apart."""
    pitch = np.where(pitch < low, pitch + 12 * np.ceil((low - pitch) / 12), pitch)
    return np.where(pitch > high, pitch - 12 * np.ceil((pitch - high) / 12), pitch)


def _humanised(notes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    notes = notes.copy()
    notes[:, 0] = np.maximum(0, notes[:, 0] + rng.normal(0, rng.uniform(0, 0.007), len(notes)))
    notes[:, 3] = np.clip(notes[:, 3] * rng.uniform(0.85, 1.15) + rng.normal(0, 5, len(notes)), 20, 127)
    return notes


def _plays(groove: Groove, stem: str) -> bool:
    return stem in groove.roles or (stem in ("guitar", "piano") and groove.chordal)


def _sequence(groove: Groove, grooves: list[Groove], stem: str, rng: np.random.Generator) -> str:
    """The groove and one or two of its siblings, so that a song has sections."""
    siblings = [
        g.name
        for g in grooves
        if g.library == groove.library and _plays(g, stem) and g.beats_per_bar == groove.beats_per_bar
    ]
    extra = [str(rng.choice(siblings)) for _ in range(int(rng.integers(0, 3)))]
    return ",".join([groove.name, *extra])


def write_song(
    grooves: list[Groove], rng: np.random.Generator, seconds: float = 60.0, forms: bool = False
) -> Song:
    """A random band over a random chart. forms: with sections, stems that rest in some, stops and drum fills.

    Raises subprocess.CalledProcessError when MMA refuses a combination, TimeoutExpired when it hangs.
    """
    base = grooves[int(rng.integers(len(grooves)))]
    while not {"bass", "drums"} <= set(base.roles):
        base = grooves[int(rng.integers(len(grooves)))]
    bpm = float(np.exp(rng.uniform(np.log(70), np.log(160))))
    if base.beats_per_bar in (6, 12):
        bpm = float(rng.uniform(120, 240))  # MMA counts the eighths of 6/8 and 12/8 as beats
    bars = max(8, round(seconds * bpm / 60 / base.beats_per_bar / 4) * 4)
    form = random_form(rng, bars) if forms else []
    chart, key = chart_of(form, rng) if form else random_chart(rng, bars)
    placed = spread(chart, int(base.beats_per_bar))
    matching = [g for g in grooves if g.beats_per_bar == base.beats_per_bar and g.swing == base.swing]
    notes, taken = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        scores: dict[str, Score] = {}
        for stem in STEMS:
            groove = base
            if not _plays(base, stem) or rng.random() < 0.35:
                options = [g for g in matching if _plays(g, stem)]
                groove = options[int(rng.integers(len(options)))] if options else base
            taken[stem] = _sequence(groove, grooves, stem, rng)
            if taken[stem] not in scores:
                seed = int(rng.integers(1 << 30))
                scores[taken[stem]] = play(taken[stem], placed, bpm, seed, Path(folder))
            notes[stem] = _humanised(folded(part_of(scores[taken[stem]], stem, bpm), stem), rng)
    bar = base.beats_per_bar * 60 / bpm
    if form:
        notes = arranged(notes, form, bar, base.beats_per_bar, base.swing, rng)
    return Song(
        notes=notes,
        bpm=bpm,
        beats_per_bar=base.beats_per_bar,
        seconds=bars * bar,
        chords=timeline(chart, base.beats_per_bar),
        key=key,
        style=base.library,
        grooves=taken,
        swing=base.swing,
        form=form,
    )


def try_song(
    grooves: list[Groove], rng: np.random.Generator, seconds: float = 60.0, forms: bool = False
) -> Song:
    """`write_song` until all four stems have notes; MMA refuses some combinations."""
    while True:
        try:
            song = write_song(grooves, rng, seconds, forms)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            continue
        if all(len(song.notes[s]) >= 8 for s in STEMS):
            return song
