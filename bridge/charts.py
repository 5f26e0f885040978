"""Chord charts as users give them: in words, or in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from engine.conditions import chord_vector, parse_chords
from engine.errors import UsageError
from plugin_host.host import Grid, Marker, Span

LONGEST = 20_000  # characters
MARKERS = "markers"  # asks for the chords that the host's markers name
EARLY = 0.25  # beats that a marker may come after the beat that it is meant for
SILENT = "N.C."


def chart(value: str | None) -> str | None:
    """A chart such as "C | Am | F G", or that of a text file for "@FILE".

    In a file a line ends a bar as | does, and what follows a # at the start of a line or after a space is a
    comment. Raises UsageError for a file that cannot be read and for what is no chord.
    """
    if value is None or not value.startswith("@"):
        return value
    try:
        text = Path(value[1:]).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"The chords in {value[1:]} cannot be read.") from error
    if len(text) > LONGEST:
        raise UsageError(f"{value[1:]} is too long for a chart of chords.")
    lines = [f" {line}".split(" #")[0].strip().strip("|").strip() for line in text.splitlines()]
    bars = " | ".join(line for line in lines if line)
    parse_chords(bars)
    return bars


def chart_of_markers(markers: Sequence[Marker], span: Span, grid: Grid, sample_rate: int) -> str:
    """The chart that markers named as chords make, a chord a beat, from the first bar line of a span on.

    A chord lasts until the next one; other markers are passed over. A last bar more is the one that the span
    begins within: charts repeat, so it is what is read before the first bar line. Raises UsageError where no
    marker up to the span's end names a chord.
    """
    chords = [marker for marker in markers if marker.position < span.end and _is_chord(marker.name)]
    if not chords:
        raise UsageError("No marker before the end of this stretch is named as a chord.")
    beat = 60 / grid.bpm * sample_rate
    bar = beat * grid.beats_per_bar
    first = span.start + grid.first_beat * sample_rate
    count = max(1, math.ceil((span.end - first) / bar))
    starts = [first + number * bar for number in [*range(count), -1]]
    bars = [
        " ".join(_sounding(chords, start + (number + EARLY) * beat) for number in range(grid.beats_per_bar))
        for start in starts
    ]
    return " | ".join(bars)


def _sounding(chords: Sequence[Marker], position: float) -> str:
    before = [marker.name for marker in chords if marker.position <= position]
    return before[-1] if before else SILENT


def _is_chord(name: str) -> bool:
    try:
        chord_vector(name)
    except UsageError:
        return False
    return True
