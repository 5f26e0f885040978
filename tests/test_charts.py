"""Chord charts from a host's markers."""

from __future__ import annotations

import pytest

from bridge.charts import chart_of_markers
from engine.conditions import parse_chords
from engine.errors import UsageError
from plugin_host.host import Grid, Marker, Span

RATE = 48000


def test_a_chord_lasts_until_the_next_and_other_names_are_passed_over() -> None:
    """120 bpm: a beat is half a second. The F comes a fifth of a beat late."""
    markers = [
        Marker(0, "C"),
        Marker(RATE, "Chorus"),
        Marker(round(2.1 * RATE), "F"),
        Marker(3 * RATE, "G7/B"),
    ]
    chart = chart_of_markers(markers, Span(0, 4 * RATE), Grid(120, 4, 0.0), RATE)
    assert chart == "C C C C | F F G7/B G7/B | N.C. N.C. N.C. N.C."
    parse_chords(chart)


def test_a_span_begins_within_a_bar_and_a_chord() -> None:
    """Bars begin 0.5 s into the span; the last bar of the chart is the one before that."""
    markers = [Marker(0, "Am"), Marker(round(4.5 * RATE), "E")]
    chart = chart_of_markers(markers, Span(3 * RATE, 5 * RATE), Grid(120, 3, 0.5), RATE)
    assert chart == "Am Am E | Am Am Am"


def test_no_chord_up_to_the_end_of_the_span_is_a_sentence() -> None:
    markers = [Marker(0, "Verse"), Marker(9 * RATE, "C")]
    with pytest.raises(UsageError, match="No marker"):
        chart_of_markers(markers, Span(0, RATE), Grid(120, 4, 0.0), RATE)
