"""Hours of short jobs: does the daemon's memory grow?

python -m bench.daemon_soak --hours 2 --every 10 --log soak.jsonl     # a line per job, as it goes
python -m bench.daemon_soak --report soak.jsonl                      # at any time
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.daemon_common import SONG, children, daemon, free_port, resident, write_report
from bridge.client import ClientJob, DaemonError, connect

FIRST = 20  # jobs after which memory must not grow


async def one_job(port: int, number: int) -> str:
    """A short job, of every kind in turn, over a connection of its own; returns how it ended."""
    kinds = ("generate", "split", "cancel", "fill")
    kind = kinds[number % len(kinds)]
    transport: Any = "udp" if number % 3 == 0 else "tcp"
    async with connect(port=port, name="soak", transport=transport) as client:
        job: ClientJob
        if kind == "split":
            job = await client.split(SONG / "bass.flac", steps=1)
        elif kind == "fill":
            job = await client.fill({"drums": SONG / "drums.flac"}, "bass", steps=1)
        else:
            job = await client.generate(2.0, steps=2, seed=number)
        if kind == "cancel":
            await job.cancel()
        try:
            await job.result()
        except DaemonError as error:
            return error.code
        return "done"


def measure(hours: float, jobs: int, every: float, log: Path) -> None:
    port = free_port()
    options = ("--threads", "1", "--keep-jobs", "5")
    with (
        tempfile.TemporaryDirectory(prefix="backline-soak-") as folder,
        log.open("w") as out,
        daemon(Path(folder) / "root", port, *options) as process,
    ):
        started = time.monotonic()
        number = 0
        while time.monotonic() - started < hours * 3600 and number < jobs:
            ended = asyncio.run(one_job(port, number))
            number += 1
            line = {
                "job": number,
                "seconds": round(time.monotonic() - started, 1),
                "ended": ended,
                "daemon": resident(process.pid),
                "worker": sum(resident(pid) for pid in children(process.pid)),
                "workers": len(children(process.pid)),
            }
            out.write(json.dumps(line) + "\n")
            out.flush()
            time.sleep(every)


def report(log: Path, name: str) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    facts: dict[str, Any] = {
        "jobs": len(lines),
        "hours": round(lines[-1]["seconds"] / 3600, 3),
        "ended": {how: sum(line["ended"] == how for line in lines) for how in {x["ended"] for x in lines}},
    }
    rows = []
    for who in ("daemon", "worker"):
        base = lines[min(FIRST, len(lines)) - 1][who]
        last = max(line[who] for line in lines[-10:])
        most = max(line[who] for line in lines[FIRST:] or lines)
        facts[who] = {
            "after_first_20_mb": round(base / 1e6, 2),
            "last_mb": round(last / 1e6, 2),
            "highest_mb": round(most / 1e6, 2),
            "growth_percent": round(100 * (last / base - 1), 2),
            "highest_growth_percent": round(100 * (most / base - 1), 2),
        }
        figures = facts[who]
        rows.append(
            f"| {who} | {figures['after_first_20_mb']} | {figures['last_mb']} | {figures['highest_mb']} | "
            f"{figures['growth_percent']} % | {figures['highest_growth_percent']} % |"
        )
    facts["every_50th"] = lines[::50]
    write_report(
        name,
        f"Daemon: {facts['jobs']} jobs in {facts['hours']} h",
        facts,
        [
            "Generate, split, cancelled and fill jobs in turn, over TCP and UDP. Resident memory in MB after",
            "each job; growth against the 20th job must be below 5 %.",
            "",
            f"How they ended: {facts['ended']}. Workers at the end: {lines[-1]['workers']}.",
            "",
            "| process | after 20 jobs | largest of the last 10 | largest | growth | largest growth |",
            "|---|---|---|---|---|---|",
            *rows,
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--name", default="daemon_soak")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.report, arguments.name)
    else:
        measure(arguments.hours, arguments.jobs, arguments.every, arguments.log)
        report(arguments.log, arguments.name)
