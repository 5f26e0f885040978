"""What MMA's `stdlib` grooves play: probed once, kept as a list, split by library file.

A library file (for example `popballad`) is the unit of the split, because its grooves share patterns.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

STDLIB = Path("/usr/share/mma/lib/stdlib")
# Kept out of training; 3/4 and 4/4, straight and swung are among them.
HELD_OUT = frozenset({
    "60srock", "basicrock", "countryswing", "easyswing", "folkballad", "jazzwaltz", "modernjazz", "popballad",
    "rb", "rhumba", "slowblues", "softrock", "swing", "twist", "waltz",
})  # fmt: skip
ROLE_PROGRAMS = {"piano": range(8), "guitar": range(24, 32), "bass": range(32, 40)}


class Note(Protocol):
    """What is read of symusic's; times are in ticks."""

    time: int
    duration: int
    pitch: int
    velocity: int


class Track(Protocol):
    """What is read of symusic's."""

    name: str
    program: int
    is_drum: bool

    @property
    def notes(self) -> Sequence[Note]: ...


class Score(Protocol):
    """What is read of symusic's."""

    ticks_per_quarter: int

    @property
    def tracks(self) -> Sequence[Track]: ...


@dataclass(frozen=True)
class Groove:
    """One of MMA's grooves and what it plays."""

    name: str
    library: str
    beats_per_bar: float
    swing: bool
    roles: tuple[str, ...]  # stems this groove has a part for
    chordal: bool  # has a chord part of any sound that can stand in for guitar or piano


def role_of(track: Track) -> str | None:
    """The stem an MMA track belongs to; "chordal" when its sound is none of ours; None for melodies."""
    if track.is_drum:
        return "drums"
    name = track.name.lower()
    if name.startswith(("bass", "walk")):
        return "bass"
    for role in ("piano", "guitar"):
        if track.program in ROLE_PROGRAMS[role]:
            return role
    return "chordal" if name.startswith(("chord", "arpeggio", "plectrum")) else None


def play(groove: str, chart: list[list[str]], tempo: float, seed: int, folder: Path) -> Score:
    """MMA's performance of a chart. `groove` may be a comma separated list, spread over the chart.

    Raises:
        subprocess.CalledProcessError: MMA does not accept the groove or the chart.
        subprocess.TimeoutExpired: MMA does not come to an end.
    """
    import symusic

    names = groove.split(",")
    lines = [f"RndSeed {seed}", f"Tempo {tempo:.2f}"]
    span = -(-len(chart) // len(names))
    for bar, symbols in enumerate(chart):
        if bar % span == 0:
            lines.append(f"Groove {names[bar // span]}")
        lines.append(f"{bar + 1} {' '.join(symbols)}")
    source, target = folder / "song.mma", folder / "song.mid"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["mma", str(source), "-f", str(target)], check=True, capture_output=True, timeout=60)
    score: Any = symusic.Score(str(target))
    return score


def spread(chart: list[list[str]], beats: int) -> list[list[str]]:
    """The chart with its half-bar changes placed for a bar of `beats` beats, in MMA's notation."""
    half = (beats + 1) // 2
    return [bar if len(bar) == 1 else [bar[0], *["/"] * (half - 1), bar[1]] for bar in chart]


def _swings(score: Score) -> bool:
    """Whether off-beat notes fall nearer two thirds of the beat than one half."""
    quarter = score.ticks_per_quarter
    phases = [(n.time % quarter) / quarter for t in score.tracks for n in t.notes]
    late = sum(0.6 < p < 0.72 for p in phases)
    straight = sum(0.45 < p < 0.55 for p in phases)
    return late > straight


def _probe(name: str, library: str, beats: float) -> Groove | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            score = play(name, [["C"], ["Am"], ["F"], ["G7"]] * 2, 120, 1, Path(folder))
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
    roles = {role for t in score.tracks if len(t.notes) >= 4 and (role := role_of(t))}
    return Groove(
        name, library, beats, _swings(score), tuple(sorted(roles - {"chordal"})), "chordal" in roles
    )


def list_grooves(cache: Path) -> list[Groove]:
    """Every usable groove of `stdlib`; the probe takes about two minutes and is kept in `cache`."""
    if cache.exists():
        return [Groove(**{**g, "roles": tuple(g["roles"])}) for g in json.loads(cache.read_text())]
    grooves = []
    for path in sorted(STDLIB.glob("*.mma")):
        text = path.read_text(encoding="latin-1")
        beats = re.search(r"^\s*Time\s+(\d+)", text, re.MULTILINE)
        for name in re.findall(r"^\s*DefGroove\s+(\S+)", text, re.MULTILINE):
            groove = _probe(name, path.stem, float(beats.group(1)) if beats else 4.0)
            if groove is not None:
                grooves.append(groove)
    cache.write_text(json.dumps([asdict(g) for g in grooves], indent=0))
    return grooves
