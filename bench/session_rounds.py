"""Random edits of a session by a process that is killed with SIGKILL at a random moment, again and again.

    python -m bench.session_rounds [--rounds 200] [--seed 0] [--out bench/results/session_rounds]

After each kill the session is opened again and must be: readable; at the last step that was confirmed, or
the one step that was under way; and holding, whole, every take that was ever confirmed. And one step of each
kind is ended before each of its changes to the file system in turn. Needs os.fork.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from engine.audio import Audio, write
from engine.errors import BacklineError
from plugin_host.host import Placement
from plugin_host.session import SessionHost
from plugin_host.session_file import HISTORY, TempoPoint

RATE = 44100
MOST_STEPS = 6  # that an editing process may confirm before it is killed within one of the next
FIRST_GUESS = 0.05  # seconds that a step takes
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.truncate")  # what Python tells audit hooks of


def run_rounds(folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Edit, kill, reopen, check, `rounds` times in `folder`; returns the report."""
    rng = random.Random(seed)
    song = folder / "song"
    SessionHost.create(song, sample_rate=RATE, tempo=120).create_track("first")
    known: dict[str, str] = {}  # take -> sha256, of every confirmed take
    report: dict[str, Any] = {
        "rounds": 0, "killed": 0, "confirmed_steps": 0, "under_way": 0, "half_written_files": 0,
        "lost": [], "unreadable": [], "astray": [],
    }  # fmt: skip
    step_seconds = FIRST_GUESS
    for number in range(rounds):
        lines, step_seconds = _edited_and_killed(song, rng, step_seconds)
        report["rounds"] += 1
        report["killed"] += 1
        report["confirmed_steps"] += len(lines)
        report["half_written_files"] += len(list(song.rglob(".*.part")))
        for line in lines:
            known |= line["takes"]
        try:
            host = SessionHost.open(song)
        except BacklineError as error:
            report["unreadable"].append(f"round {number}: {error}")
            break
        if lines:
            last, now = lines[-1]["revision"], host.file
            report["under_way"] += now.revision != last
            if now.revision != last and last not in (*now.past[-1:], *now.future[-1:]):
                report["astray"].append(f"round {number}: at {now.revision}, confirmed was {last}")
        report["lost"] += [f"round {number}: {name}" for name in _lost(song, host, known)]
    report["confirmed_takes"] = len(known)
    report["steps_in_the_end"] = SessionHost.open(song).file.revision
    report["history_files"] = len(list((song / HISTORY).glob("*.json")))
    return report


def crash_points(folder: Path) -> dict[str, Any]:
    """End each kind of step before its first, second, ... change to the file system; returns the report."""
    wav = folder / "take.wav"
    write(wav, Audio(np.random.default_rng(0).standard_normal((1, RATE)).astype(np.float32), RATE))
    first = SessionHost.create(folder / "start", sample_rate=RATE, tempo=120)
    track = first.create_track("piano").id
    first.place(track, wav, 0)
    first.set_track(track, gain_db=-3.0)
    first.undo()
    steps: dict[str, Callable[[SessionHost], object]] = {
        "place": lambda host: host.place_all("fill", [Placement(wav, 0, "fill", track)], disarm=[track]),
        "mixer": lambda host: host.set_track(track, pan=0.5),
        "undo": lambda host: host.undo(),
        "redo": lambda host: host.redo(),
    }
    report: dict[str, Any] = {"points": {}, "wrong": []}
    for kind, step in steps.items():
        shutil.copytree(first.folder, folder / kind)
        whole = SessionHost.open(folder / kind)
        step(whole)
        point, ended = 0, False
        while not ended:
            song = folder / f"{kind}-{point}"
            shutil.copytree(first.folder, song)
            ended = _step_ends(song, step, point)
            state = SessionHost.open(song).state
            if state not in (first.state, whole.state) or (ended and state != whole.state):
                report["wrong"].append(f"{kind}, before change {point + 1}")
            SessionHost.open(song).create_track("and on it goes")
            report["wrong"] += [f"{kind} {point}: {name}" for name in _lost(song, SessionHost.open(song), {})]
            point += 1
        report["points"][kind] = point - 1
    return report


def _step_ends(song: Path, step: Callable[[SessionHost], object], point: int) -> bool:
    """Do a step in a process that ends at once before its change number `point`; whether it had that many."""
    child = os.fork()
    if child == 0:
        changes = iter(range(point))

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if (writes or event in CHANGES) and next(changes, None) is None:
                os._exit(1)

        host = SessionHost.open(song)
        sys.addaudithook(hook)
        step(host)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _edited_and_killed(song: Path, rng: random.Random, step: float) -> tuple[list[dict[str, Any]], float]:
    """Fork a process that edits without pause, kill it after some steps, anywhere within the next two.

    step: seconds that one took lately. Returns the steps that it had confirmed, and `step` anew.
    """
    seed, wanted = rng.randrange(1 << 30), rng.randrange(MOST_STEPS)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _edit_for_ever(song, random.Random(seed), writing)
    os.close(writing)
    data, started = b"", time.monotonic()
    while data.count(b"\n") < wanted and (part := os.read(reading, 1 << 16)):
        data += part
    if wanted:
        step = 0.5 * step + 0.5 * (time.monotonic() - started) / wanted
    time.sleep(rng.uniform(0, 2 * step))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        data += pipe.read()
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"the editing process ended by itself: {data.decode()[-400:]}")
    # What follows the last newline was not confirmed.
    return [json.loads(line) for line in data.split(b"\n")[:-1]], step


def _edit_for_ever(song: Path, rng: random.Random, pipe: int) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=song.parent) as scratch:
            host = SessionHost.open(song)
            while True:
                takes = random_step(host, rng, Path(scratch))
                line = {"revision": host.file.revision, "takes": takes}
                os.write(pipe, (json.dumps(line) + "\n").encode())
    except BaseException as error:
        os.write(pipe, repr(error).encode())
        os._exit(1)


def random_step(host: SessionHost, rng: random.Random, scratch: Path) -> dict[str, str]:
    """One edit such as a user makes; returns the takes it made with their sha256."""
    tracks = host.state.tracks
    track = rng.choice(tracks) if tracks else None
    kind = rng.choices(
        ["place", "track", "mixer", "undo", "redo", "take", "tempo", "remove"], [8, 1, 4, 3, 2, 2, 1, 1]
    )[0]
    if track is None or kind == "track":
        host.create_track(f"track {rng.randrange(1000)}")
    elif kind == "place":
        return _placed(host, rng, scratch, track.id)
    elif kind == "mixer":
        host.set_track(
            track.id, gain_db=rng.uniform(-20, 6), pan=rng.uniform(-1, 1), armed=rng.random() < 0.5
        )
    elif kind == "undo" and host.file.past:
        host.undo()
    elif kind == "redo" and host.file.future:
        host.redo()
    elif kind == "take" and track.regions:
        region = rng.randrange(len(track.regions))
        host.choose_take(track.id, region, rng.randrange(len(track.regions[region].takes)))
    elif kind == "tempo":
        host.set_tempo([TempoPoint(position=0, bpm=rng.uniform(60, 180))])
    elif kind == "remove" and len(tracks) > 3:
        host.remove_track(track.id)
    return {}


def _placed(host: SessionHost, rng: random.Random, scratch: Path, track_id: str) -> dict[str, str]:
    before = {path.name for path in (host.folder / "audio").iterdir()}
    placements = []
    for number in range(rng.randint(1, 3)):
        samples = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(
            (rng.randint(1, 2), rng.choice([2000, 4000]))
        )
        write(scratch / f"{number}.wav", Audio(samples.astype(np.float32), RATE))
        placements.append(Placement(scratch / f"{number}.wav", rng.choice([0, 100, 5000]), "fill", track_id))
    host.place_all("fill", placements, disarm=[track_id])
    made = {path.name for path in (host.folder / "audio").glob("*.wav")} - before
    return {name: _sha256(host.folder / "audio" / name) for name in made}


def _lost(song: Path, host: SessionHost, known: dict[str, str]) -> list[str]:
    """Confirmed takes that are gone or changed, and takes of the session that cannot be read."""
    lost = [
        name
        for name, digest in known.items()
        if not (song / "audio" / name).exists() or _sha256(song / "audio" / name) != digest
    ]
    for track in host.state.tracks:
        for region in track.regions:
            lost += [take.file for take in region.takes if not (song / "audio" / take.file).exists()]
    return lost


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _markdown(report: dict[str, Any]) -> str:
    rows = [
        ("rounds, each ended by SIGKILL", report["rounds"]),
        ("steps confirmed before a kill", report["confirmed_steps"]),
        ("takes confirmed", report["confirmed_takes"]),
        ("kills that met a step under way which then counted", report["under_way"]),
        ("half-written files left by kills, swept up by the next step", report["half_written_files"]),
        ("takes lost or changed", len(report["lost"])),
        ("sessions that could not be opened", len(report["unreadable"])),
        ("sessions that were neither at the confirmed step nor the next", len(report["astray"])),
    ]
    points = report["crash_points"]
    for kind, count in points["points"].items():
        rows.append((f"points within one step ({kind}) at which the process was ended", count))
    rows.append(("of these, sessions that were neither as before nor as after", len(points["wrong"])))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# Random edits, kill -9, reopen\n\n| | |\n|---|---|\n{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a session's editor again and again.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/session_rounds"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = run_rounds(Path(folder), arguments.rounds, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        report["crash_points"] = crash_points(Path(folder))
    report |= {"seconds": round(time.perf_counter() - started, 1), "machine": describe_machine()}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    arguments.out.with_suffix(".md").write_text(_markdown(report), "utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
