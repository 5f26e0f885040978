"""kill -9 of the daemon or its worker, a full disk: nothing finished is lost, nothing unfinished is shown."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from daemon_process import Talk, alive, daemon, start, stop, wait_loaded, workers
from test_daemon_jobs import ACCEPTED, STATE, long, take_of

from bridge.store import (
    Row,
    find,
    latest,
    make_root,
    open_database,
    recover,
    retain,
    save,
    unfetched_bytes,
)
from bridge.worker import _code as code_of

ENDED = {"done", "cancelled", "error"}


def states(talk: Talk) -> dict[str, str]:
    talk.heard.clear()
    talk.send("/backline/job/list", 0, 64)
    talk.until("/backline/job/listed")
    return {values["id"]: values["state"] for address, values in talk.heard if address == STATE}


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_a_killed_daemon_takes_its_worker_along_and_the_next_one_tells_the_truth(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    running = start(tmp_path / "root", tiny_bundle)
    wait_loaded(running)
    talk = Talk(running.port)
    talk.ask("/backline/job/generate", "before", 1.0, answer=ACCEPTED)
    assert talk.end_of("before") == "done"
    wav = take_of(talk, "before")["bass"]
    content = wav.read_bytes()
    long(talk, "running")
    talk.ask("/backline/job/generate", "waiting", 1.0, answer=ACCEPTED)
    (worker,) = workers(running)
    stop(running, signal.SIGKILL)
    assert gone(worker)
    running = start(running.root, tiny_bundle, port=running.port)
    try:
        wait_loaded(running)
        assert states(talk) == {"before": "done", "running": "error", "waiting": "error"}
        talk.send("/backline/job/status", "waiting")
        assert talk.until("/backline/job/error", id="waiting")["code"] == "restarted"
        assert wav.read_bytes() == content
        assert not list((running.root / "work").iterdir())
        assert sorted(path.name for path in (running.root / "jobs").iterdir()) == ["before"]
        talk.ask("/backline/job/generate", "after", 1.0, answer=ACCEPTED)
        assert talk.end_of("after") == "done"
    finally:
        stop(running)
        talk.close()


def test_a_killed_worker_is_started_again_and_its_job_ends_in_an_error(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    with daemon(tmp_path / "root", tiny_bundle) as running:
        talk = Talk(running.port)
        long(talk, "unlucky")
        talk.ask("/backline/job/generate", "next", 1.0, answer=ACCEPTED)
        (worker,) = workers(running)
        os.kill(worker, signal.SIGKILL)
        assert talk.end_of("unlucky") == "error"
        assert talk.heard[-1][1]["code"] == "worker"
        assert talk.end_of("next") == "done"
        assert workers(running) != [worker] and len(workers(running)) == 1
        assert not list((running.root / "work").iterdir())
        talk.close()


def test_random_kills_lose_no_take_and_show_no_half_one(tmp_path: Path, tiny_bundle: Path) -> None:
    """A short form of bench/daemon_kill.py."""
    rng = random.Random(3)
    running = start(tmp_path / "root", tiny_bundle)
    talk = Talk(running.port)
    done: set[str] = set()
    accepted: set[str] = set()
    try:
        for turn in range(4):
            wait_loaded(running)
            for number in range(3):
                name = f"k{turn}-{number}"
                talk.ask("/backline/job/generate", name, 3.0 * number + 1, "takes", 2, answer=ACCEPTED)
                accepted.add(name)
            deadline = time.monotonic() + rng.uniform(0.0, 0.6)
            while time.monotonic() < deadline:
                heard = talk.hear(0.02)
                if heard and heard[0] == "/backline/job/done":
                    done.add(heard[1]["id"])
            if turn % 2:
                os.kill(workers(running)[0], signal.SIGKILL)
                for name in (f"k{turn}-{number}" for number in range(3)):
                    until_ended(talk, name)
            else:
                stop(running, signal.SIGKILL)
                running = start(running.root, tiny_bundle, port=running.port)
        wait_loaded(running)
        now = states(talk)
        assert set(now) == accepted and set(now.values()) <= ENDED
        assert all(now[name] == "done" for name in done)
        for name, state in now.items():
            assert (running.root / "jobs" / name).exists() == (state == "done")
        for path in (running.root / "jobs").rglob("*.*"):
            assert path.suffix in (".wav", ".json")
            if path.suffix == ".wav":
                assert len(soundfile.read(path)[0]) == soundfile.info(path).frames > 0
    finally:
        stop(running)
        talk.close()


def until_ended(talk: Talk, name: str) -> None:
    deadline = time.monotonic() + 20
    while talk.ask("/backline/job/status", name, answer=STATE)["state"] not in ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can take memory from a running process")
def test_a_worker_that_runs_out_of_memory_says_so_and_goes_on(tmp_path: Path, tiny_bundle: Path) -> None:
    import resource

    with daemon(tmp_path / "root", tiny_bundle) as running:
        talk = Talk(running.port)
        (worker,) = workers(running)
        talk.ask("/backline/job/generate", "warm", 1.0, answer=ACCEPTED)
        assert talk.end_of("warm") == "done"
        used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        before = resource.prlimit(worker, resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
        talk.ask("/backline/job/generate", "huge", 1500.0, "steps", 1, answer=ACCEPTED)
        assert talk.end_of("huge") == "error"
        assert talk.heard[-1][1]["code"] == "memory", talk.heard[-1]
        resource.prlimit(worker, resource.RLIMIT_AS, before)
        talk.ask("/backline/job/generate", "next", 1.0, answer=ACCEPTED)
        assert talk.end_of("next") == "done"
        assert workers(running) == [worker]
        talk.close()


def test_one_daemon_per_folder(tmp_path: Path, tiny_bundle: Path) -> None:
    with daemon(tmp_path / "root", tiny_bundle) as running:
        second = start(running.root, tiny_bundle)
        assert second.process.wait(20) == 1
        errors = (tmp_path / "root.err").read_text()
        assert "A daemon is running already" in errors and "Traceback" not in errors


def test_sigterm_ends_daemon_and_worker_cleanly(tmp_path: Path, tiny_bundle: Path) -> None:
    running = start(tmp_path / "root", tiny_bundle)
    wait_loaded(running)
    (worker,) = workers(running)
    assert stop(running) == 0
    assert gone(worker)
    assert "Traceback" not in (tmp_path / "root.err").read_text()
    assert [json.loads(line)["event"] for line in running.log.splitlines()][-1] == "stopped"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 3 MB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_loses_nothing(small_disk: Path, tiny_bundle: Path) -> None:
    root = small_disk / "root"
    with daemon(root, tiny_bundle) as running:
        talk = Talk(running.port)
        talk.ask("/backline/job/generate", "fits", 1.0, answer=ACCEPTED)
        assert talk.end_of("fits") == "done"
        kept = {path: path.read_bytes() for path in take_of(talk, "fits").values()}
        talk.ask("/backline/job/generate", "large", 60.0, answer=ACCEPTED)
        assert talk.end_of("large") == "error"
        assert talk.heard[-1][1]["code"] == "disk"
        assert not list((root / "work").iterdir())
        filler = small_disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        # No room even for the row of a job: refused, or accepted and failed, but never in between.
        refused = 0
        for number in range(12):
            talk.send("/backline/job/generate", f"full{number}", 1.0)
            heard = talk.until(ACCEPTED, "/backline/error")
            if heard.get("code") == "disk":
                refused += 1
            else:
                assert talk.end_of(f"full{number}") == "error"
        assert talk.ask("/backline/hello", "me", answer="/backline/welcome")["state"] == "loaded"
        filler.unlink()
        talk.ask("/backline/job/generate", "room", 1.0, answer=ACCEPTED)
        assert talk.end_of("room") == "done"
        assert all(path.read_bytes() == content for path, content in kept.items())
        time.sleep(1.6)  # what could not be saved is saved by now
        before = states(talk)
        assert set(before.values()) <= ENDED and before["fits"] == before["room"] == "done"
        port = running.port
    running = start(root, tiny_bundle, port=port)
    try:
        wait_loaded(running)
        assert states(talk) == before
    finally:
        stop(running)
        talk.close()


def done_row(root_folder: Path, name: str, size: int, ended: float, fetched: int) -> Row:
    (root_folder / "jobs" / name / "1").mkdir(parents=True)
    (root_folder / "jobs" / name / "1" / "bass.wav").write_bytes(bytes(size))
    row = Row(name, "fill", "{}", "me", "done", takes=1, bytes=size, fetched=fetched, ended=ended)
    row.accepted = ended
    return row


def test_only_fetched_results_are_ever_removed(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    database = open_database(root)
    for number in range(6):
        save(database, done_row(root.folder, f"j{number}", 100, float(number), int(number != 1)))
    assert retain(database, root, count=4, size=10_000) == ["j0"]
    assert retain(database, root, count=100, size=250) == ["j3", "j2"]
    assert sorted(path.name for path in root.jobs.iterdir()) == ["j1", "j4", "j5"]
    assert unfetched_bytes(database) == 100
    assert retain(database, root, count=0, size=0) == ["j5", "j4"]
    assert [path.name for path in root.jobs.iterdir()] == ["j1"]
    removed = find(database, "j0")
    assert removed is not None and (removed.state, removed.bytes) == ("done", 0)
    assert not list(root.work.iterdir())


def test_rows_and_folders_come_together_after_a_crash(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    database = open_database(root)
    for name, state in (("a", "queued"), ("b", "queued"), ("c", "cancelled")):
        save(database, Row(name, "generate", "{}", "me", state, accepted=1.0))
    told = {"task": "generate", "asked": "{}", "client": "me", "accepted": 2.0, "takes": 1, "seconds": 0.5}
    told |= {"provider": "CPUExecutionProvider", "note": "", "bytes": 7, "ended": 3.0}
    for name in ("b", "d"):  # renamed into place, and then the daemon was killed; d even before its row
        (root.jobs / name).mkdir()
        (root.jobs / name / "job.json").write_text(json.dumps(told))
    (root.work / "a.1234" / "1").mkdir(parents=True)
    (root.work / "a.1234" / "1" / "bass.wav").write_bytes(b"half")
    (root.inputs / "a").mkdir()
    (root.inputs / "later").mkdir()
    recover(database, root)
    rows, total = latest(database, 0, 10)
    assert total == 4
    assert {row.id: (row.state, row.code) for row in rows} == {
        "a": ("error", "restarted"),
        "b": ("done", ""),
        "c": ("cancelled", ""),
        "d": ("done", ""),
    }
    assert not list(root.work.iterdir())
    assert [path.name for path in root.inputs.iterdir()] == ["later"]
    assert recover(database, root) == []
    (root.jobs / "b" / "job.json").unlink()
    (root.jobs / "b").rmdir()  # by somebody's hand
    recover(database, root)
    row = find(database, "b")
    assert row is not None and (row.state, row.bytes) == ("done", 0)


def test_a_database_that_is_none_is_said_in_a_sentence(tmp_path: Path, tiny_bundle: Path) -> None:
    root = make_root(tmp_path / "root")
    root.database.write_bytes(b"nonsense" * 1000)
    with pytest.raises(sqlite3.DatabaseError):
        open_database(root)
    running = start(root.folder, tiny_bundle)
    assert running.process.wait(20) == 1
    errors = (tmp_path / "root.err").read_text()
    assert "cannot be used" in errors and "Traceback" not in errors


def test_failures_have_their_codes() -> None:
    assert code_of(OSError(errno.ENOSPC, "No space left on device")) == "disk"
    assert code_of(MemoryError()) == "memory"
    assert (
        code_of(RuntimeError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer"))
        == "memory"
    )
    assert code_of(RuntimeError("CUDA error: out of memory")) == "memory"
    assert code_of(KeyError("a bug")) == "internal"
