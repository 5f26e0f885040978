"""A project of another program as a new session."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from engine.audio import resample, write
from engine.errors import BacklineError
from plugin_host.exchange import ReadItem, ReadProject, ReadTrack, cut, marker_points, tempo_points
from plugin_host.exchange_formats import read_project
from plugin_host.host import Placement
from plugin_host.plugins import keep_preset
from plugin_host.session import SessionHost
from plugin_host.session_file import PluginState


def import_session(path: Path, folder: Path) -> SessionHost:
    """A new session in `folder` with the tracks, regions, takes, mix and tempo of a .dawproject or .rpp.

    Raises BacklineError as `read_project` and SessionHost.create; then nothing of it stays.
    """
    project = read_project(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BacklineError(f"{folder} exists and is no empty folder.")
    points = tempo_points(project)
    host = SessionHost.create(folder, sample_rate=project.sample_rate, tempo=points[0].bpm)
    try:
        host.set_tempo(points)
        host.set_markers(marker_points(project))
        for track in project.tracks:
            _add(host, project, track)
        host.forget_steps(f"import {path.name}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return host


def _add(host: SessionHost, project: ReadProject, track: ReadTrack) -> None:
    track_id = host.create_track(track.name, track.role).id
    for item in track.items:
        _place(host, project, track_id, item)
    plugins = [_kept(host, plugin, preset) for plugin, preset in track.plugins]
    host.set_track(
        track_id,
        armed=track.armed,
        muted=track.muted,
        soloed=track.soloed,
        gain_db=track.gain_db,
        pan=track.pan,
        plugins=tuple(plugins),
    )


def _place(host: SessionHost, project: ReadProject, track_id: str, item: ReadItem) -> None:
    position = round(item.position * host.sample_rate)
    with tempfile.TemporaryDirectory(prefix="backline-") as name:
        placements = []
        for number, take in enumerate(item.takes):
            sound = resample(take.load(), host.sample_rate)
            sound = cut(sound, item.offset, item.length, host.sample_rate, take.name)
            wav = Path(name) / f"{number}.wav"
            write(wav, sound)
            placements.append(Placement(wav, position, take.name, track_id))
        host.place_all("import", placements)
    regions = host.state.tracks[-1].regions
    if len(regions[-1].takes) == len(item.takes) and item.chosen != len(item.takes) - 1:
        host.choose_take(track_id, len(regions) - 1, item.chosen)


def _kept(host: SessionHost, plugin: PluginState, preset: bytes | None) -> PluginState:
    if preset is None:
        return plugin
    return plugin.model_copy(update={"preset": keep_preset(host.preset_folder(), preset)})
