"""100 times kill -9, of the daemon and of its worker in turn, at random moments with jobs in flight.

python -m bench.daemon_kill
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import soundfile

from bench.daemon_common import (
    SONG,
    children,
    free_port,
    percentile,
    resident,
    start_daemon,
    until_loaded,
    write_report,
)
from bridge.client import ClientJob, connect
from engine.errors import BacklineError

ENDED = ("done", "cancelled", "error")


async def fly(port: int, rng: random.Random, number: int, kill: Any) -> tuple[list[str], list[str]]:
    """Sends a few jobs, kills at a random moment; returns the ids accepted and those known to be done."""
    accepted: list[str] = []
    done: list[str] = []
    with contextlib.suppress(BacklineError, OSError):
        async with connect(port=port) as client:

            async def one(kind: int) -> None:
                name = f"k{number}-{kind}"
                job: ClientJob
                if kind == 1:
                    job = await client.split(SONG / "bass.flac", id=name, steps=1)
                elif kind == 2:
                    job = await client.generate(20.0, id=name, priority="live")
                else:
                    job = await client.generate(1.0, id=name, steps=1, takes=2)
                accepted.append(name)
                if kind == 3:
                    await job.cancel()
                await job.result(keep=True)
                done.append(name)

            tasks = [asyncio.ensure_future(one(kind)) for kind in rng.sample(range(5), 4)]
            await asyncio.sleep(rng.uniform(0.0, 1.5))
            kill()
            await asyncio.wait(tasks, timeout=0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return accepted, done


async def settled(port: int, seconds: float = 60.0) -> dict[str, str]:
    """The state of every job when none is open any more."""
    deadline = time.monotonic() + seconds
    while True:
        states: dict[str, str] = {}
        async with connect(port=port) as client:
            while entries := await client.list_jobs(len(states), 60):
                states |= {entry["id"]: entry["state"] for entry in entries}
        if set(states.values()) <= set(ENDED) or time.monotonic() > deadline:
            return states
        await asyncio.sleep(0.2)


def fingerprints(root: Path) -> dict[str, str]:
    """sha256 of every wav that is visible; a wav that is not whole raises."""
    found = {}
    for path in sorted((root / "jobs").rglob("*")):
        if path.suffix == ".wav":
            samples, _ = soundfile.read(path)
            info = soundfile.info(path)
            assert len(samples) == info.frames > 0, path
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            assert path.is_dir() or path.suffix == ".json", f"{path} is half a file"
    return found


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while resident(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main(rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    problems: list[str] = []
    accepted: set[str] = set()
    done: set[str] = set()
    wavs: dict[str, str] = {}
    killed: Counter[str] = Counter()
    restarts: list[float] = []
    states: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="backline-kill-") as folder:
        root, port = Path(folder) / "root", free_port()
        options = ("--threads", "1", "--keep-jobs", "100000")
        process: subprocess.Popen[bytes] = start_daemon(root, port, *options)
        asyncio.run(until_loaded(port))
        for number in range(rounds):
            workers = children(process.pid)
            victim = "daemon" if number % 2 == 0 else "worker"

            def kill(victim: str = victim, workers: list[int] = workers, pid: int = process.pid) -> None:
                os.kill(pid if victim == "daemon" else workers[0], signal.SIGKILL)

            new, finished = asyncio.run(fly(port, rng, number, kill))
            killed[victim] += 1
            accepted |= set(new)
            done |= set(finished)
            started = time.monotonic()
            if victim == "daemon":
                process.wait()
                problems += [f"{number}: worker {pid} outlived" for pid in workers if not gone(pid, 2.0)]
                process = start_daemon(root, port, *options)
            asyncio.run(until_loaded(port))
            restarts.append(time.monotonic() - started)
            if len(children(process.pid)) != 1:
                problems.append(f"{number}: {len(children(process.pid))} workers")
            states = asyncio.run(settled(port))
            try:
                now = fingerprints(root)
            except (AssertionError, RuntimeError) as error:
                problems.append(f"{number}: {error}")
                continue
            problems += [f"{number}: {name} changed" for name, sha in wavs.items() if now.get(name) != sha]
            wavs = now
            problems += [f"{number}: {job} was forgotten" for job in accepted if job not in states]
            problems += [
                f"{number}: {job} was done, is {states.get(job)}" for job in done if states.get(job) != "done"
            ]
            problems += [f"{number}: {job} is {state}" for job, state in states.items() if state not in ENDED]
            for job, state in states.items():
                if (state == "done") != (root / "jobs" / job).is_dir():
                    problems.append(f"{number}: {job} is {state}, its folder says otherwise")
            if any((root / "work").iterdir()):
                problems.append(f"{number}: something is left in work/")
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    facts: dict[str, Any] = {
        "rounds": rounds,
        "seed": seed,
        "killed": dict(killed),
        "accepted": len(accepted),
        "states": dict(Counter(states.values())),
        "done_before_a_kill": len(done),
        "wavs": len(wavs),
        "restart_seconds": {
            "median": round(percentile(restarts, 0.5), 2),
            "worst": round(max(restarts), 2),
        },
        "problems": problems,
    }
    write_report(
        "daemon_kill",
        f"Daemon: {rounds} times kill -9",
        facts,
        [
            f"Killed at random moments with up to four jobs in flight: {dict(killed)}. After each, all of",
            "it is looked at: every wav readable and unchanged, no other file in `jobs/`, none in `work/`,",
            "every accepted job listed and ended in exactly one way, `done` exactly where there is a folder,",
            "one worker, none of a dead daemon.",
            "",
            "| | |",
            "|---|---|",
            f"| jobs accepted | {len(accepted)} |",
            f"| how they ended | {facts['states']} |",
            f"| told to be done before a kill, all still done | {len(done)} |",
            f"| wavs at the end | {len(wavs)} |",
            f"| from the kill to a loaded model: median, worst | {facts['restart_seconds']['median']}, "
            f"{facts['restart_seconds']['worst']} s |",
            f"| problems | {len(problems)} |",
            *[f"\n- {problem}" for problem in problems[:20]],
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.seed)
