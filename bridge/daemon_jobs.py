"""Jobs: accepted once, queued, given to the worker, watched, and ended in exactly one way."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import signal
import sqlite3
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridge.daemon_net import Bucket, Peer
from bridge.daemon_state import (
    CLIENT_SECONDS,
    NEW_JOBS,
    Daemon,
    Job,
    background,
    event,
    model_state,
    on_disk,
    plain,
    publish,
    resolved,
    send,
    send_error,
)
from bridge.models import list_bundles, models_folder
from bridge.protocol import ENDED, Refused, reply
from bridge.store import (
    Root,
    Row,
    apply_result,
    files_of,
    find,
    latest,
    mark_fetched,
    read_result,
    remove_inputs,
    retain,
    save,
    unfetched_bytes,
)

TICK = 0.25  # seconds
HEARTBEAT = 2.0
# Seconds from a cancel to the end of a worker that does not obey; its steps may be long on a slow machine.
CANCEL_GRACE = float(os.environ.get("BACKLINE_CANCEL_GRACE", 30.0))
SILENCE = 30.0  # seconds without a sign of life from the worker before it is ended
STARTING = 120.0
RETRIES = 3  # starts of the worker that may fail before waiting jobs are given up
SLOWEST_RETRY = 30.0
SIDE_BY_SIDE = 8  # jobs at work at the same time, where they are shared
LINE = 1 << 20  # bytes the worker may say at once
MIN_SECONDS, MAX_SECONDS = 1.0, 1800.0  # of what is made


# --- requests -------------------------------------------------------------------------------------


def generate(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _check_seconds(values)
    _submit(daemon, peer, target, "generate", values)


def fill(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    if not values["folder"] and not any(name.startswith("stem:") or name == "other" for name in values):
        raise Refused("value", "There is nothing to play along with: give a folder, stem: options or other.")
    _submit(daemon, peer, target, "fill", values)


def split(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _submit(daemon, peer, target, "split", values)


def continue_(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    _check_seconds(values)
    _submit(daemon, peer, target, "continue", values)


def status(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    row, job = _known(daemon, values["id"])
    send(daemon, target, state_packet(row, job))
    for packet in ending_packets(daemon.root, row):
        send(daemon, target, packet)


def cancel(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    row, job = _known(daemon, values["id"])
    if job is not None and job.final is None:
        job.cancelled = job.cancelled or time.monotonic()
        if job.state == "running":
            job.state = "cancelling"
            tell_worker(daemon, do="cancel", id=row.id)
            _changed(daemon, job)
        elif job.state == "queued":
            background(daemon, finish(daemon, job, "cancelled"))
    send(daemon, target, state_packet(row, job))
    for packet in ending_packets(daemon.root, row):
        send(daemon, target, packet)


def fetched(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    row, _ = _known(daemon, values["id"])
    if row.state not in ENDED:
        raise Refused("value", f"The job {row.id} has not ended: there is nothing to fetch yet.")

    async def answer() -> None:
        try:
            await on_disk(daemon, mark_fetched, daemon.database, row.id)
        except sqlite3.Error as error:
            send_error(daemon, peer, target, _disk(error), "/backline/job/fetched", row.id)
            return
        row.fetched = 1
        daemon.unfetched = unfetched_bytes(daemon.reader)
        send(daemon, target, state_packet(row, None))
        await _retain(daemon)

    background(daemon, answer())


def list_jobs(daemon: Daemon, peer: Peer, target: Peer, values: dict[str, Any]) -> None:
    rows, total = latest(daemon.reader, values.get("offset", 0), values.get("count", 20))
    for row in rows:
        job = daemon.jobs.get(row.id)
        send(daemon, target, state_packet(row if job is None or job.final is None else job.final, job))
    send(daemon, target, reply("/backline/job/listed", len(rows), total))


def _check_seconds(values: dict[str, Any]) -> None:
    if not MIN_SECONDS <= values["seconds"] <= MAX_SECONDS:
        raise Refused(
            "value", f"seconds must be {MIN_SECONDS:g} to {MAX_SECONDS:g}, not {values['seconds']:g}."
        )


def _known(daemon: Daemon, job_id: str) -> tuple[Row, Job | None]:
    job = daemon.jobs.get(job_id)
    if job is not None:
        return job.final or job.row, job
    row = find(daemon.reader, job_id)
    if row is None:
        raise Refused("gone", f"There is no job {job_id}.")
    return row, None


def _submit(daemon: Daemon, peer: Peer, target: Peer, task: str, values: dict[str, Any]) -> None:
    """Accepts a job, or answers for the one that has this id already."""
    job_id, asked = values["id"], plain(values)
    try:
        row, job = _known(daemon, job_id)
    except Refused:
        _accept(daemon, peer, target, task, values, asked)
        return
    if (row.task, row.request) != (task, asked):
        raise Refused("conflict", f"The id {job_id} belongs to another job: choose a new one.")
    if job is not None:
        job.target = target
        if job.state == "accepting":
            return  # the answer is on its way
    state = row.state if job is None or job.final else job.state
    send(daemon, target, reply("/backline/job/accepted", job_id, state, _position(daemon, job)))
    for packet in ending_packets(daemon.root, row):
        send(daemon, target, packet)


def _accept(daemon: Daemon, peer: Peer, target: Peer, task: str, values: dict[str, Any], asked: str) -> None:
    bucket = daemon.job_rates.get(peer)
    if bucket is None:
        bucket = Bucket(*NEW_JOBS)
        daemon.job_rates.put(peer, bucket)
    if not bucket.take():
        raise Refused("rate", f"At most {NEW_JOBS[0]:g} new jobs a second are taken from one sender.")
    waiting = [job for job in daemon.jobs.values() if not job.started and job.final is None]
    if len(waiting) >= daemon.config.queue:
        raise Refused("busy", f"The queue is full: {daemon.config.queue} jobs wait already.")
    if daemon.unfetched > daemon.config.keep_bytes:
        raise Refused("full", "Results that nobody has fetched fill the room for them: fetch some.")
    request = resolved(daemon, values)
    request.setdefault("seed", secrets.randbelow(1 << 31))
    name = request.get("model")
    path = daemon.engine.model_path if name is None else model_path(name, daemon.config.model)
    client = daemon.clients.get(target)
    row = Row(values["id"], task, asked, client.name if client else "", "queued", accepted=time.time())
    job = Job(
        row,
        request,
        path,
        request.get("priority") == "live",
        request.get("timeout", daemon.config.timeout),
        target,
    )
    daemon.jobs[row.id] = job
    background(daemon, _store_new(daemon, job, peer))


async def _store_new(daemon: Daemon, job: Job, peer: Peer) -> None:
    """A job is accepted when it is on the disk, and said to be no earlier."""
    row = job.row
    try:
        await on_disk(daemon, save, daemon.database, row)
    except sqlite3.Error as error:
        del daemon.jobs[row.id]
        send_error(daemon, peer, job.target, _disk(error), f"/backline/job/{row.task}", row.id)
        return
    job.state = "queued"
    event("accepted", job=row.id, task=row.task, client=row.client, live=job.live)
    send(daemon, job.target, reply("/backline/job/accepted", row.id, "queued", _position(daemon, job)))
    publish(daemon, "jobs", state_packet(row, job))
    if job.cancelled:
        await finish(daemon, job, "cancelled")
    pump(daemon)


def _disk(error: sqlite3.Error) -> Refused:
    event("disk", logging.ERROR, error=str(error))
    return Refused("disk", f"The state could not be written: {error}.")


def model_path(name: str, default: Path | None) -> str | None:
    """The bundle of this name; "" is the daemon's own and None the one that ships. Raises Refused."""
    if name == "":
        return None if default is None else str(default)
    if name == "default":
        return None
    for path in list_bundles():
        if path is not None and path.name == name:
            return str(path)
    raise Refused("value", f"There is no model {name!r} in {models_folder()}.")


# --- messages of a job ----------------------------------------------------------------------------


def state_packet(row: Row, job: Job | None) -> bytes:
    """A job as it is now; `row` is final where the job has ended."""
    alive = job is not None and job.final is None
    state = job.state.replace("accepting", "queued") if job is not None and alive else row.state
    phase = job.phase if job is not None and alive else row.code
    fraction = job.fraction if job is not None and alive else float(row.state == "done")
    return reply("/backline/job/state", row.id, row.task, state, phase, fraction, row.fetched)


def ending_packets(root: Root, row: Row) -> list[bytes]:
    """What a client is told at the end of a job, and again whenever it asks; nothing of one that goes on."""
    if row.state == "cancelled":
        return [reply("/backline/job/cancelled", row.id)]
    if row.state == "error":
        return [reply("/backline/job/error", row.id, row.code, row.sentence)]
    if row.state != "done":
        return []
    packets = []
    takes = files_of(root, row.id) if row.bytes else []
    for take, folder, wavs in takes:
        words = [word for stem, path in wavs for word in (stem, str(path))]
        packets.append(reply("/backline/job/take", row.id, take, str(folder), *words))
    where = str(root.jobs / row.id) if takes else ""
    packets.append(reply("/backline/job/done", row.id, where, row.takes, row.seconds, row.provider, row.note))
    return packets


def _position(daemon: Daemon, job: Job | None) -> int:
    """How many jobs come before this one; 0 for one that no longer waits."""
    if job is None or job.state != "queued":
        return 0
    waiting = _waiting(daemon)
    return 1 + waiting.index(job) if job in waiting else 0


def _waiting(daemon: Daemon) -> list[Job]:
    """The queue: live jobs first, each kind in the order of acceptance."""
    queued = [job for job in daemon.jobs.values() if job.state == "queued" and not job.cancelled]
    return sorted(queued, key=lambda job: not job.live)


def _changed(daemon: Daemon, job: Job) -> None:
    publish(daemon, "jobs", state_packet(job.row, job))


# --- the worker -----------------------------------------------------------------------------------


def tell_worker(daemon: Daemon, **command: Any) -> None:
    """A command to the worker; where there is none, it is said again or buried when there is one."""
    process = daemon.engine.process
    if process is None or process.stdin is None:
        return
    process.stdin.write((json.dumps(command) + "\n").encode())


def pump(daemon: Daemon) -> None:
    """Gives the worker what it can begin, in the order of the queue; see `_may_begin`."""
    while daemon.engine.ready and not daemon.stopping:
        running = [job for job in daemon.jobs.values() if job.started and job.final is None]
        waiting = _waiting(daemon)
        if not waiting:
            return
        job = waiting[0]
        if not _may_begin(job, running):
            return
        job.state, job.started = "running", time.monotonic()
        tell_worker(
            daemon,
            do="job",
            id=job.row.id,
            task=job.row.task,
            live=job.live,
            model=job.model,
            request=job.request,
            asked=job.row.request,
            client=job.row.client,
            accepted=job.row.accepted,
            backline=importlib.metadata.version("backline"),
        )
        event("running", job=job.row.id)
        _changed(daemon, job)


def _may_begin(job: Job, running: list[Job]) -> bool:
    """One job at a time, but beside others of its model: one live job, and shared jobs beside shared ones."""
    if any(other.model != job.model for other in running):
        return False
    if job.live:
        return not any(other.live for other in running)
    batch = [other for other in running if not other.live]
    together = bool(job.request.get("shared")) and all(other.request.get("shared") for other in batch)
    return not running or (together and len(running) < SIDE_BY_SIDE)


async def keep_worker(daemon: Daemon) -> None:
    """Starts the worker, listens to it, and starts it again when it dies."""
    while True:
        await _worker_life(daemon)
        await _bury(daemon)
        failures = daemon.engine.failures
        await asyncio.sleep(min(SLOWEST_RETRY, 0.1 * 3**failures))


async def _worker_life(daemon: Daemon) -> None:
    config, engine = daemon.config, daemon.engine
    settings = {
        "root": str(daemon.root.folder),
        "folders": [str(folder) for folder in config.folders],
        "device": config.device,
        "threads": config.threads,
    }
    try:
        process = await _start_worker(daemon, settings)
    except OSError as error:
        engine.failures += 1
        event("worker cannot start", logging.ERROR, error=str(error))
        return
    engine.process, engine.seen = process, time.monotonic()
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # a line beyond LINE: it is no worker of ours any more
        while line := await process.stdout.readline():
            engine.seen = time.monotonic()
            _heard(daemon, json.loads(line))
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    code = await process.wait()
    engine.process, engine.ready = None, False
    if not daemon.stopping:
        engine.failures += 1
        event("worker died", logging.ERROR, code=code, failures=engine.failures)


async def _start_worker(daemon: Daemon, settings: dict[str, Any]) -> asyncio.subprocess.Process:
    path = os.pathsep.join(folder for folder in sys.path if folder)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "bridge.worker",
        json.dumps(settings),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE,
        env=os.environ | {"BACKLINE_DAEMON": str(os.getpid()), "PYTHONPATH": path},
        pass_fds=(daemon.lock,),  # so that a new daemon waits for the worker of a dead one
    )


async def _bury(daemon: Daemon) -> None:
    """Ends what a dead worker was at, truly: a job whose folder is there was done."""
    engine = daemon.engine
    if engine.state == "loaded":
        engine.state, engine.provider, engine.note = "loading", "", ""
        publish(daemon, "model", model_state(daemon))
    await on_disk(daemon, _clear, daemon.root)
    given_up = engine.failures > RETRIES
    for job in [job for job in daemon.jobs.values() if job.final is None and (job.started or given_up)]:
        found = read_result(daemon.root, job.row.id)
        if found is not None:
            await finish(daemon, job, "done", found=found)
        elif job.timed_out:
            await finish(daemon, job, "error", "timeout", f"The job took longer than {job.timeout:g} s.")
        elif job.cancelled:
            await finish(daemon, job, "cancelled")
        elif job.started:
            sentence = "The engine's process died during this job; it is started again."
            await finish(daemon, job, "error", "worker", sentence)
        else:
            await finish(daemon, job, "error", "worker", "The engine's process cannot be kept running.")


def _clear(root: Root) -> None:
    for path in root.work.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def _heard(daemon: Daemon, said: dict[str, Any]) -> None:
    engine = daemon.engine
    job = daemon.jobs.get(said.get("id", ""))
    kind = said["say"]
    if kind == "ready":
        engine.ready = True
        tell_worker(daemon, do="load", path=engine.model_path)
        event("worker ready", pid=said["pid"])
        pump(daemon)
    elif kind == "beat":
        engine.memory = said["memory"]
    elif kind == "model":
        engine.failures = 0
        engine.state, engine.provider, engine.note = said["state"], said["provider"], said["note"]
        engine.bundle = said.get("bundle", "")
        engine.capabilities = tuple(said.get("capabilities", ()))
        level = logging.WARNING if engine.note else logging.INFO
        event("model", level, state=engine.state, provider=engine.provider, note=engine.note)
        publish(daemon, "model", model_state(daemon))
    elif job is None or job.final is not None:
        return
    elif kind == "progress":
        job.phase, job.fraction = said["phase"], said["fraction"]
        packet = reply("/backline/job/progress", job.row.id, job.phase, job.fraction)
        publish(daemon, "jobs", packet, also=job.target)
    elif kind == "done":
        engine.failures = 0
        background(daemon, finish(daemon, job, "done", found=said))
    elif kind == "cancelled" and job.timed_out:
        background(
            daemon, finish(daemon, job, "error", "timeout", f"The job took longer than {job.timeout:g} s.")
        )
    elif kind == "cancelled":
        background(daemon, finish(daemon, job, "cancelled"))
    elif kind == "failed":
        background(daemon, finish(daemon, job, "error", said["code"], said["sentence"]))


async def finish(
    daemon: Daemon,
    job: Job,
    state: str,
    code: str = "",
    sentence: str = "",
    found: dict[str, Any] | None = None,
) -> None:
    """Ends a job: on the disk first, then aloud. A second end is not listened to."""
    if job.final is not None:
        return
    row = replace(job.row, state=state, code=code, sentence=sentence, ended=time.time())
    if found is not None:
        apply_result(row, found)
        daemon.unfetched += row.bytes
    job.final = row
    pump(daemon)  # the next one need not wait for this one's row
    event("ended", job=row.id, state=state, code=code, sentence=sentence, seconds=row.seconds)
    with contextlib.suppress(sqlite3.Error):  # a full disk: `tick` tries again
        await on_disk(daemon, save, daemon.database, row)
        daemon.jobs.pop(row.id, None)
    await on_disk(daemon, remove_inputs, daemon.root, row.id)
    for packet in ending_packets(daemon.root, row):
        publish(daemon, "jobs", packet, also=job.target)
    if state == "done":
        await _retain(daemon)


async def _retain(daemon: Daemon) -> None:
    config = daemon.config
    with contextlib.suppress(sqlite3.Error, OSError):
        gone = await on_disk(
            daemon, retain, daemon.database, daemon.root, config.keep_jobs, config.keep_bytes
        )
        daemon.unfetched = unfetched_bytes(daemon.reader)
        if gone:
            event("removed", jobs=gone)


async def tick(daemon: Daemon) -> None:
    """What time brings: heartbeats, time-outs, silent clients, a worker that hangs, rows not saved yet."""
    beat = 0.0
    while True:
        await asyncio.sleep(TICK)
        now = time.monotonic()
        _watch_worker(daemon, now)
        for job in list(daemon.jobs.values()):
            if job.final is not None:
                await _save_again(daemon, job)
            elif job.started and not job.timed_out and now - job.started > job.timeout:
                job.timed_out, job.cancelled = True, now
                tell_worker(daemon, do="cancel", id=job.row.id)
        if now - beat >= HEARTBEAT:
            beat = now
            _heartbeat(daemon, now)
            for peer, client in daemon.clients.items():
                if now - client.seen > CLIENT_SECONDS:
                    daemon.clients.drop(peer)


def _heartbeat(daemon: Daemon, now: float) -> None:
    for job in daemon.jobs.values():
        if job.state != "accepting" and job.final is None:
            seconds = now - job.started if job.started else 0.0
            send(daemon, job.target, reply("/backline/job/heartbeat", job.row.id, job.state, seconds))


def _watch_worker(daemon: Daemon, now: float) -> None:
    engine = daemon.engine
    if engine.process is None or engine.process.returncode is not None:
        return
    silent = now - engine.seen > (SILENCE if engine.ready else STARTING)
    stubborn = any(
        job.started and job.cancelled and job.final is None and now - job.cancelled > CANCEL_GRACE
        for job in daemon.jobs.values()
    )
    if silent or stubborn:
        event("worker killed", logging.ERROR, silent=silent, stubborn=stubborn)
        with contextlib.suppress(ProcessLookupError):
            engine.process.send_signal(signal.SIGKILL)


async def _save_again(daemon: Daemon, job: Job) -> None:
    assert job.final is not None
    if time.time() - job.final.ended < 1.0:
        return  # `finish` is at it
    with contextlib.suppress(sqlite3.Error):
        await on_disk(daemon, save, daemon.database, job.final)
        daemon.jobs.pop(job.row.id, None)


async def stop(daemon: Daemon, work: list[asyncio.Task[Any]]) -> None:
    """Ends the worker and what waits for it; unfinished jobs are `restarted` at the next start."""
    process = daemon.engine.process
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for task in [*work, *daemon.tasks]:
        task.cancel()
    await asyncio.gather(*work, *daemon.tasks, return_exceptions=True)
    if process is not None:
        await process.wait()
