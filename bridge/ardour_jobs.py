"""Fills and splits in a running Ardour, so that nothing that was played gets lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs

from bridge.filling import Engine, Placed, Warn, fill_armed, split_to_tracks
from bridge.outputs import free_folder
from engine.audio import Audio, write
from engine.errors import BacklineError, Cancelled, UsageError
from engine.take import Callback
from plugin_host.ardour import ArdourHost, Picked, State
from plugin_host.host import Span


@dataclass
class Remembering:
    """An Engine that keeps what it played last, in case it finds no place. then: called when it has."""

    engine: Engine
    then: Callable[[], None] = lambda: None
    played: Mapping[str, Audio] = field(default_factory=dict)

    @property
    def stems(self) -> tuple[str, ...]:
        return self.engine.stems

    def fill(self, *arguments: Any, **options: Any) -> Mapping[str, Audio]:
        self.played = self.engine.fill(*arguments, **options)
        self.then()
        return self.played

    def split(self, *arguments: Any, **options: Any) -> Mapping[str, Audio]:
        self.played = self.engine.split(*arguments, **options)
        return self.played


def fill(
    host: ArdourHost,
    engine: Engine,
    *,
    span: Span | None = None,
    chords: str | None = None,
    text: str | None = None,
    seed: int,
    callback: Callback | None = None,
    warn: Warn | None = None,
    then: Callable[[], None] = lambda: None,
) -> list[Placed]:
    """bridge.filling.fill_armed; where the result finds no place in Ardour its wavs are kept, and named.

    then: called when all is played, and only to be placed.
    """
    remembering = Remembering(engine, then)
    try:
        return fill_armed(
            host, remembering, span=span, chords=chords, text=text, seed=seed, callback=callback, warn=warn
        )
    except Cancelled:
        raise
    except BacklineError as error:
        raise _kept(error, remembering.played) from error
    finally:
        host.tidy()


def split(
    host: ArdourHost,
    engine: Engine,
    source: Path | None = None,
    *,
    position: int = 0,
    seed: int,
    callback: Callback | None = None,
) -> list[Placed]:
    """The selected region as tracks, and muted in the same step; or a file, from sample `position` on."""
    remembering = Remembering(engine)
    try:
        if source is not None:
            options: dict[str, Any] = {"seed": seed, "callback": callback}
            return split_to_tracks(host, remembering, source, position=position, **options)
        picked = one_region(host.look())
        quieting = replace(host, quiet=(picked.region,))
        return split_to_tracks(
            quieting, remembering, picked.track, span=picked.span, seed=seed, callback=callback
        )
    except Cancelled:
        raise
    except BacklineError as error:
        raise _kept(error, remembering.played) from error
    finally:
        host.tidy()


def one_region(state: State) -> Picked:
    """The region that is selected. Raises UsageError where it is none, or several."""
    if len(state.picked) != 1:
        found = "No region is" if not state.picked else f"{len(state.picked)} regions are"
        raise UsageError(f"{found} selected in Ardour: select the one that is to be split.")
    return state.picked[0]


def _kept(error: BacklineError, played: Mapping[str, Audio]) -> BacklineError:
    """The error; where something had been played already, it is written down and the error says where."""
    if not played:
        return error
    place = Path(platformdirs.user_data_dir("backline")) / "unplaced" / time.strftime("%Y-%m-%d %H.%M.%S")
    folder = free_folder(str(place))
    try:
        folder.mkdir(parents=True)
        for name, part in played.items():
            write(folder / f"{name}.wav", part)
    except (OSError, BacklineError) as failure:
        return BacklineError(f"{error} What was played could not be kept either ({failure}).")
    return BacklineError(f"{error} What was played is in {folder}.")
