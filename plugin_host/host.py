"""The one interface between Backline and whatever holds the tracks: the built-in session host, or a DAW."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.audio import Audio, read
from engine.errors import BacklineError


@dataclass(frozen=True)
class Track:
    """A track as a host shows it. `role` is the stem it plays ("bass", ...), None where nobody said."""

    id: str
    name: str
    role: str | None = None
    armed: bool = False
    muted: bool = False
    soloed: bool = False


@dataclass(frozen=True)
class Span:
    """A stretch of the timeline in samples at the session's rate: from `start` up to `end`."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span runs forward from 0 or later, not from {self.start} to {self.end}")

    @property
    def length(self) -> int:
        return self.end - self.start


class TrackHost(Protocol):
    """What Backline asks of a host. A host raises BacklineError for what it cannot do."""

    @property
    def sample_rate(self) -> int:
        """Hz."""

    @property
    def tempo(self) -> float:
        """Beats per minute."""

    @property
    def length(self) -> int:
        """Samples from 0 to the end of the last region."""

    def tracks(self) -> list[Track]:
        """Every track, in the host's order."""

    def create_track(self, name: str, role: str | None = None) -> Track:
        """A new, empty track at the end."""

    def arm(self, track_id: str, armed: bool = True) -> None:
        """Arm or disarm a track."""

    def export(self, track_ids: Iterable[str], span: Span | None = None) -> dict[str, Path]:
        """Track id -> a float32 wav of it over `span` (None: everything), at the session's rate."""

    def place(self, track_id: str, wav: Path, position: int) -> None:
        """Put a wav on a track as a region from sample `position` on; what lay there stays in the session."""


def audible(tracks: Iterable[Track]) -> list[Track]:
    """The tracks that sound: the soloed ones where there are any, less the muted ones."""
    tracks = list(tracks)
    solo = any(track.soloed for track in tracks)
    return [track for track in tracks if not track.muted and (track.soloed or not solo)]


def bounce(host: TrackHost, span: Span | None = None) -> Audio:
    """The sum of the audible tracks, at as many channels as the widest has (a mono track sounds in all).

    Raises BacklineError where nothing is audible.
    """
    parts = [
        read(path) for path in host.export([track.id for track in audible(host.tracks())], span).values()
    ]
    if not parts:
        raise BacklineError("The session has no audible track to bounce.")
    channels = max(part.channels for part in parts)
    mix = np.zeros((channels, parts[0].length), np.float32)
    for part in parts:
        mix[: mix.shape[0] if part.channels == 1 else part.channels] += part.samples
    return Audio(mix, parts[0].sample_rate)
