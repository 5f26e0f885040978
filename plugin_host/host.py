"""The one interface between Backline and whatever holds the tracks: the built-in session host, or a DAW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.audio import Audio, empty, read
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


@dataclass(frozen=True)
class Grid:
    """Tempo and metre of a span: beats per minute, beats in a bar, the second of the span a bar begins at."""

    bpm: float
    beats_per_bar: int
    first_beat: float


@dataclass(frozen=True)
class Marker:
    """A named point of the timeline, at a sample of the session's rate."""

    position: int
    name: str


@dataclass(frozen=True)
class Placement:
    """A wav that is to lie on a track as a region from sample `position` on.

    track_id: None puts it on a new track called `name`, with this role. name: also the region's.
    """

    wav: Path
    position: int
    name: str
    track_id: str | None = None
    role: str | None = None


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

    @property
    def selection(self) -> Span | None:
        """The time the user has selected; None where there is no selection."""

    def grid(self, span: Span) -> Grid | None:
        """The tempo grid over `span`; None where it is unknown, or changes within the span."""

    def markers(self) -> list[Marker]:
        """Every marker, in the order of time."""

    def tracks(self) -> list[Track]:
        """Every track, in the host's order."""

    def create_track(self, name: str, role: str | None = None) -> Track:
        """A new, empty track at the end."""

    def arm(self, track_id: str, armed: bool = True) -> None:
        """Arm or disarm a track."""

    def export(
        self, track_ids: Iterable[str], span: Span | None = None, *, sounding: bool = True
    ) -> dict[str, Path]:
        """Track id -> a float32 wav of it over `span` (None: everything), at the session's rate.

        sounding: as it is heard in the mix, after plugins, gain and pan; else what lies on the track.
        """

    def place(self, track_id: str, wav: Path, position: int) -> None:
        """Put a wav on a track as a region from sample `position` on; what lay there stays in the session."""

    def place_all(
        self,
        label: str,
        placements: Sequence[Placement],
        *,
        disarm: Iterable[str] = (),
        mute: Iterable[str] = (),
    ) -> list[str]:
        """All placements as one step that the host's undo takes back at once; returns their track ids.

        label: what the step is called. disarm, mute: tracks that are disarmed and muted in the same step.
        """


def audible(tracks: Iterable[Track]) -> list[Track]:
    """The tracks that sound: the soloed ones where there are any, less the muted ones."""
    tracks = list(tracks)
    solo = any(track.soloed for track in tracks)
    return [track for track in tracks if not track.muted and (track.soloed or not solo)]


def bounce(host: TrackHost, span: Span | None = None) -> Audio:
    """The sum of the audible tracks, as `mix_down`. Raises BacklineError where nothing is audible."""
    paths = host.export([track.id for track in audible(host.tracks())], span)
    return mix_down([read(path, shortest=0) for path in paths.values()])


def mix_down(parts: Sequence[Audio]) -> Audio:
    """The sum of parts of one length, at as many channels as the widest has (a mono part sounds in all).

    Raises BacklineError where there is none.
    """
    if not parts:
        raise BacklineError("The session has no audible track to bounce.")
    channels = max(part.channels for part in parts)
    mix = empty(channels, parts[0].length)
    for part in parts:
        mix[: channels if part.channels == 1 else part.channels] += part.samples
    return Audio(mix, parts[0].sample_rate)
