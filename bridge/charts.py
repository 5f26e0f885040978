"""Chord charts as users give them: in words, or in a file."""

from __future__ import annotations

from pathlib import Path

from engine.conditions import parse_chords
from engine.errors import UsageError

LONGEST = 20_000  # characters


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
