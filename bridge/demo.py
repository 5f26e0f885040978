"""The main job, end to end: a missing piano is filled in, a band is made up, a mix is split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.console import print_table
from bridge.jobs import Place, Result, fill_to, find_stems, generate_to, split_to
from bridge.jobs import summary as job_summary
from bridge.outputs import free_folder
from engine.audio import read, write
from engine.errors import BacklineError, UsageError
from engine.model import Model
from engine.take import Callback, Settings
from plugin_host.host import Span, Track, audible, bounce
from plugin_host.session import SESSION, SessionHost

SONG = Path(__file__).with_name("demo_song")
FOLDER = "backline-demo"
ARMED = "piano"
PROMPT = "fast bright funk band with electric piano"
BAND_SECONDS = 10.0
SECONDS = 20.0
SEED = 7
UNKNOWN_TEMPO = 120.0  # bpm, as a new session in a DAW

Progress = Callable[[str], AbstractContextManager[Callback]]


@dataclass(frozen=True)
class Finished:
    """What the demo left in `folder`: the three jobs, and the bounce that the last of them split."""

    folder: Path
    fill: Result
    band: Result
    mix: Path
    split: Result


def run(
    model: Model,
    out: Path | None,
    *,
    seconds: float,
    song: Path | None,
    seed: int,
    force: bool,
    progress: Progress,
) -> Finished:
    """Do the three jobs on the first `seconds` of a song (a folder of stems; None: the one that ships).

    Raises BacklineError where the song lacks a stem to play along with, or `out` is in use without `force`.
    """
    out = _folder(out, force)
    if seconds < 1:
        raise UsageError(f"The demo needs at least 1 s of the song, not {seconds:g}.")
    song = song or SONG
    session, piano = _session(model, out / "session", song)
    span = Span(0, min(session.length, round(seconds * session.sample_rate)))
    settings = Settings(seed=seed)

    playing = [track for track in audible(session.tracks()) if not track.armed]
    exported = session.export([track.id for track in playing], span)
    context = {track.role: exported[track.id] for track in playing if track.role}
    with progress(f"1 of 3, {ARMED}") as callback:
        filled = fill_to(
            Place(out / "fill", force),
            model,
            context,
            [ARMED],
            settings=settings,
            callback=callback,
            **(_grid(song) if model.supports("grid") else {}),
        )
    session.place(piano.id, filled.files[ARMED], span.start)
    session.arm(piano.id, False)

    with progress("2 of 3, band") as callback:
        band = generate_to(
            Place(out / "band", force),
            model,
            seconds=min(BAND_SECONDS, seconds),
            text=PROMPT if model.supports("text") else None,
            settings=settings,
            callback=callback,
        )

    mix = out / "mix.wav"
    write(mix, bounce(session, span))
    with progress("3 of 3, split") as callback:
        stems = split_to(Place(out / "split", force), model, mix, settings=settings, callback=callback)
    return Finished(out, filled, band, mix, stems)


def show(finished: Finished) -> None:
    """What to listen to, on standard output."""
    jobs = (finished.fill, finished.band, finished.split)
    words = finished.band.record["request"]["text"]
    heard = ", ".join(finished.fill.record["request"]["context"])
    band = f'a band made up for "{words}"' if words else "a band made up"
    cells = [
        [str(finished.fill.files[ARMED]), f"the {ARMED}, made to go with {heard}", _pace(finished.fill)],
        [str(finished.mix), f"the whole song with that {ARMED}", ""],
        [str(finished.band.files["mix"]), band, _pace(finished.band)],
        [str(finished.folder / "split" / "*.wav"), "the mix taken apart again", _pace(finished.split)],
    ]
    print_table("Listen to", ["file", "what it is", "made in"], cells)
    pictures = [str(job.files["picture"]) for job in jobs if "picture" in job.files]
    print(f"Pictures: {', '.join(pictures)}" if pictures else "No pictures could be drawn.")
    record = finished.fill.record
    print(f"{record['model']['name']} on {record['provider']}, all in {finished.folder}.")


def _pace(job: Result) -> str:
    return f"{job.seconds:.1f} s, {job.real_time_factor:.2f} of its length"


def summary(finished: Finished) -> dict[str, Any]:
    """The same for scripts."""
    jobs = {"fill": finished.fill, "generate": finished.band, "split": finished.split}
    return {
        "status": "done",
        "task": "demo",
        "folder": str(finished.folder),
        "mix": str(finished.mix),
        "jobs": {name: job_summary(job) | {"provider": job.record["provider"]} for name, job in jobs.items()},
    }


def _folder(out: Path | None, force: bool) -> Path:
    if out is None:
        return free_folder(FOLDER)
    if out.is_dir() and any(out.iterdir()) and not force:
        raise BacklineError(f"{out} is not empty; pass --force to replace an earlier demo in it.")
    if (out / "session" / SESSION).is_file():
        shutil.rmtree(out / "session")
    return out


def _session(model: Model, folder: Path, song: Path) -> tuple[SessionHost, Track]:
    """A session that plays every stem of `song` but the armed one, whose track is empty and armed."""
    files = find_stems(song, model.manifest.stems)
    playing = {name: path for name, path in files.items() if name != ARMED}
    if ARMED not in model.manifest.stems or not playing:
        raise BacklineError(
            f"The demo needs a model that plays {ARMED}, and other stems of a song in {song}."
        )
    rate = read(next(iter(playing.values()))).sample_rate
    session = SessionHost.create(folder, sample_rate=rate, tempo=_grid(song).get("bpm", UNKNOWN_TEMPO))
    for name, path in playing.items():
        session.place(session.create_track(name, role=name).id, path, 0)
    armed = session.create_track(ARMED, role=ARMED)
    session.arm(armed.id)
    return session, armed


def _grid(song: Path) -> dict[str, Any]:
    """Tempo and metre as song.json tells them, as the engine's arguments; empty where a song has none."""
    try:
        told = json.loads((song / "song.json").read_text("utf-8"))
        kinds = {"bpm": float, "beats_per_bar": int, "first_beat": float}
        return {key: kind(told[key]) for key, kind in kinds.items() if key in told}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise BacklineError(f"{song / 'song.json'} cannot be read as JSON.") from error
