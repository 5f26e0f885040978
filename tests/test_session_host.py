"""The session host as an editor: takes, gain and pan, tempo map, undo and redo, old versions, two writers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command import noise, samples

from engine.audio import Audio, write
from engine.errors import BacklineError, UsageError
from plugin_host.host import Grid, Placement, Span, bounce
from plugin_host.session import SessionHost, find_track
from plugin_host.session_file import TempoPoint

RATE = 44100
ROOT = Path(__file__).parents[1]


@pytest.fixture
def host(tmp_path: Path) -> SessionHost:
    return SessionHost.create(tmp_path / "song", sample_rate=RATE, tempo=120)


def wav(folder: Path, name: str, *, seconds: float = 1.0, channels: int = 1, seed: int = 0) -> Path:
    path = folder / f"{name}.wav"
    write(path, Audio(noise(seconds, rate=RATE, channels=channels, seed=seed).T, RATE))
    return path


def heard(host: SessionHost, track: str) -> np.ndarray:
    return samples(host.export([track])[track])


def test_a_second_fill_of_a_range_is_a_take_and_either_can_be_chosen(
    host: SessionHost, tmp_path: Path
) -> None:
    track = host.create_track("piano").id
    for seed in (1, 2):
        host.place_all(
            "fill piano", [Placement(wav(tmp_path, f"take{seed}", seed=seed), 500, "piano", track)]
        )
    (region,) = host.state.tracks[0].regions
    assert (len(region.takes), region.chosen) == (2, 1)
    assert np.array_equal(heard(host, track)[500:], noise(1, rate=RATE, seed=2))
    host.choose_take(track, 0, 0)
    assert np.array_equal(heard(host, track)[500:], noise(1, rate=RATE, seed=1))
    with pytest.raises(UsageError, match="no region 1 with a take 3"):
        host.choose_take(track, 0, 2)
    host.place(track, wav(tmp_path, "longer", seconds=2), 500)  # another range is another region
    assert [len(region.takes) for region in host.state.tracks[0].regions] == [2, 1]


def test_undo_and_redo_reach_every_step_and_survive_reopening(host: SessionHost, tmp_path: Path) -> None:
    states = [host.state]
    track = host.create_track("bass").id
    states.append(host.state)
    host.place(track, wav(tmp_path, "bass"), 0)
    states.append(host.state)
    host.set_track(track, gain_db=-6.0, pan=0.25)
    states.append(host.state)
    for expected in reversed(states[:-1]):
        again = SessionHost.open(host.folder)
        again.undo()
        assert again.state == expected
    with pytest.raises(BacklineError, match="nothing to undo"):
        SessionHost.open(host.folder).undo()
    for expected in states[1:]:
        again = SessionHost.open(host.folder)
        again.redo()
        assert again.state == expected == SessionHost.open(host.folder).state
    with pytest.raises(BacklineError, match="nothing to redo"):
        again.redo()
    assert heard(again, track).any()


def test_what_was_undone_is_not_redone_after_another_step(host: SessionHost, tmp_path: Path) -> None:
    track = host.create_track("bass").id
    host.place(track, wav(tmp_path, "one", seed=1), 0)
    assert host.undo() == "bass: place one.wav"
    host.place(track, wav(tmp_path, "two", seed=2), 0)
    with pytest.raises(BacklineError, match="nothing to redo"):
        host.redo()
    assert np.array_equal(heard(host, track), noise(1, rate=RATE, seed=2))
    assert len(list((host.folder / "audio").iterdir())) == 2, "no wav is ever removed or written over"


def test_a_step_that_changes_nothing_is_none(host: SessionHost) -> None:
    track = host.create_track("bass").id
    before = host.file
    host.arm(track, False)
    assert host.file == before


def test_several_placements_are_one_step(host: SessionHost, tmp_path: Path) -> None:
    piano = host.create_track("piano").id
    host.arm(piano)
    before = host.state
    one = wav(tmp_path, "one")
    ids = host.place_all("two", [Placement(one, 0, "piano", piano), Placement(one, 9, "new")], disarm=[piano])
    assert ids == [piano, "2"] and host.state.tracks[1].name == "new"
    assert not host.state.tracks[0].armed
    host.undo()
    assert host.state == before


def test_regions_move_and_go_and_short_ones_are_welcome(host: SessionHost, tmp_path: Path) -> None:
    track = host.create_track("kick").id
    host.place(track, wav(tmp_path, "hit", seconds=0.1), 100)
    host.move_region(track, 0, 4000)
    assert host.state.tracks[0].regions[0].position == 4000 and not heard(host, track)[:4000].any()
    with pytest.raises(UsageError, match="before the session"):
        host.move_region(track, 0, -1)
    host.remove_region(track, 0)
    assert host.length == 0
    with pytest.raises(UsageError, match="no region 1"):
        host.remove_region(track, 0)
    host.undo()
    assert host.length == 4000 + 4410


@pytest.mark.parametrize("channels", [1, 2])
def test_gain_and_pan_are_what_is_heard_and_not_what_lies_there(
    host: SessionHost, tmp_path: Path, channels: int
) -> None:
    track = host.create_track("guitar").id
    host.place(track, wav(tmp_path, "guitar", channels=channels), 0)
    dry = samples(tmp_path / "guitar.wav")
    host.set_track(track, gain_db=-6.0)
    np.testing.assert_allclose(heard(host, track), dry * 10 ** (-6 / 20), rtol=1e-6)
    host.set_track(track, gain_db=0.0, pan=0.5)
    np.testing.assert_allclose(heard(host, track), np.broadcast_to(dry, (RATE, 2)) * [0.5, 1.0], rtol=1e-6)
    host.set_track(track, pan=-1.0)
    assert not heard(host, track)[:, 1].any()
    assert np.array_equal(samples(host.export([track], sounding=False)[track]), dry)
    with pytest.raises(UsageError, match=r"pan 2\.0 is out of range"):
        host.set_track(track, pan=2.0)


def test_mono_and_stereo_regions_on_one_track(host: SessionHost, tmp_path: Path) -> None:
    track = host.create_track("guitar").id
    host.place(track, wav(tmp_path, "wide", seconds=2, channels=2), 0)
    host.place(track, wav(tmp_path, "narrow", seconds=1, seed=5), 100)
    sound = heard(host, track)
    narrow = samples(tmp_path / "narrow.wav")
    assert np.array_equal(sound[100 : 100 + RATE], np.repeat(narrow, 2, axis=1))
    assert np.array_equal(sound[100 + RATE :], samples(tmp_path / "wide.wav")[100 + RATE :])
    assert bounce(host).channels == 2


def test_the_tempo_map(host: SessionHost) -> None:
    host.set_tempo(
        [TempoPoint(position=RATE, bpm=100, numerator=6, denominator=8), TempoPoint(position=0, bpm=60)]
    )
    assert [point.bpm for point in host.state.tempo_map] == [60, 100]
    assert host.grid(Span(0, RATE)) == Grid(60, 4, 0.0)
    assert host.grid(Span(RATE // 2, RATE)) == Grid(60, 4, 3.5)
    assert host.grid(Span(RATE // 2, 2 * RATE)) is None, "the tempo changes within"
    grid = host.grid(Span(2 * RATE, 3 * RATE))
    assert grid is not None and (grid.bpm, grid.beats_per_bar) == (200, 6)  # eighths
    assert grid.first_beat == pytest.approx(-1.0 % (6 * 0.3))
    with pytest.raises(UsageError, match="at least one point"):
        host.set_tempo([])
    late = SessionHost.create(host.folder / "late", sample_rate=RATE, tempo=120, first_bar=RATE // 4)
    assert late.grid(Span(0, RATE)) == Grid(120, 4, 0.25)


def test_a_session_of_version_1_opens_and_is_saved_as_version_3(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    (folder / "audio").mkdir(parents=True)
    write(folder / "audio" / "track-1-take-1.wav", Audio(noise(1, rate=RATE).T, RATE))
    region = {"file": "track-1-take-1.wav", "position": 7, "length": RATE}
    track = {"id": "1", "name": "Low", "role": "bass", "armed": True, "regions": [region]}
    old = {"version": 1, "sample_rate": RATE, "tempo": 96.5, "tracks": [track]}
    (folder / "session.json").write_text(json.dumps(old))
    host = SessionHost.open(folder)
    assert (host.tempo, host.length, host.tracks()[0].armed) == (96.5, RATE + 7, True)
    assert np.array_equal(heard(host, "1")[7:], noise(1, rate=RATE))
    host.arm("1", False)
    assert json.loads((folder / "session.json").read_text())["version"] == 3
    host.undo()
    assert SessionHost.open(folder).tracks()[0].armed


def test_two_writers_lose_nothing(host: SessionHost, tmp_path: Path) -> None:
    """Each has opened the session before the other changed it, as a fill that runs for minutes has."""
    track = host.create_track("piano").id
    one = wav(tmp_path, "one")

    def work(number: int) -> None:
        SessionHost.open(host.folder).create_track(f"track {number}")
        other.place(track, one, number * 10)

    other = SessionHost.open(host.folder)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    final = SessionHost.open(host.folder)
    assert len(final.tracks()) == 13
    assert sorted(region.position for region in final.state.tracks[0].regions) == [10 * n for n in range(12)]
    files = {take.file for region in final.state.tracks[0].regions for take in region.takes}
    assert len(files) == 12


def test_tracks_are_found_by_name_or_number(host: SessionHost) -> None:
    for name in ("Bass", "Keys", "keys"):
        host.create_track(name)
    assert find_track(host, "bass").id == find_track(host, "1").id == "1"
    with pytest.raises(UsageError, match=r"2 tracks are called 'KEYS': give the number \(2, 3\)"):
        find_track(host, "KEYS")
    with pytest.raises(UsageError, match="there are: Bass, Keys, keys"):
        find_track(host, "drums")


def test_a_wav_that_went_missing_is_named(host: SessionHost, tmp_path: Path) -> None:
    track = host.create_track("bass").id
    host.place(track, wav(tmp_path, "bass"), 0)
    next((host.folder / "audio").iterdir()).unlink()
    with pytest.raises(BacklineError, match=r"bass-00001.wav, a take of this session, is missing"):
        host.export([track])


def test_a_step_killed_while_it_is_written_is_swept_up(host: SessionHost) -> None:
    (host.folder / ".session.json.123.part").write_text("{")
    (host.folder / "audio" / ".bass-00001.wav.123.part").write_text("RIFF")
    assert SessionHost.open(host.folder).tracks() == []
    host.create_track("bass")
    assert not list(host.folder.rglob(".*.part"))


@pytest.mark.skipif(os.name == "nt", reason="fork is needed")
def test_a_process_that_ends_within_a_step_leaves_the_state_before_or_after(tmp_path: Path) -> None:
    """Before each change to the file system in turn, as the operating system sees them."""
    code = (
        "import json, sys; from pathlib import Path; from bench.session_rounds import crash_points\n"
        "print(json.dumps(crash_points(Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert min(report["points"].values()) > 3, report


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is needed")
def test_kill_minus_9_loses_no_take(tmp_path: Path) -> None:
    """Ten of the rounds of bench/session_rounds.py, which does 200; by a process of its own, for it forks."""
    code = (
        "import json, sys; from pathlib import Path; from bench.session_rounds import run_rounds\n"
        "print(json.dumps(run_rounds(Path(sys.argv[1]), rounds=10, seed=3)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["killed"] == 10 and report["confirmed_takes"] > 0
    assert report["lost"] == report["unreadable"] == report["astray"] == []


def test_a_session_file_that_was_broken_names_what_to_put_in_its_place(host: SessionHost) -> None:
    host.create_track("bass")
    host.create_track("drums")
    (host.folder / "session.json").write_text("{ half")
    with pytest.raises(
        BacklineError, match=r"put .*000002\.json, the state after its last step, in its place"
    ):
        SessionHost.open(host.folder)
    (host.folder / "history" / "000002.json").replace(host.folder / "session.json")
    assert SessionHost.open(host.folder).state == host.state


def test_a_killed_holder_of_the_lock_does_not_keep_it(host: SessionHost) -> None:
    code = (
        "import sys, time; from pathlib import Path; from plugin_host.session_file import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(host.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGKILL)
    host.create_track("bass")
    assert len(host.tracks()) == 1
