"""What the daemon's measurements share: a daemon of their own, its memory, and how a report is written."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import describe_machine
from bridge.client import connect

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SONG = ROOT / "bridge" / "demo_song"


def free_port() -> int:
    """A port that neither UDP nor TCP uses."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def start_daemon(root: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    """A daemon in a process of its own, which may not be ready yet."""
    command = [sys.executable, "-P", "-m", "bridge.cli", "serve", "--root", str(root), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".stderr").open("ab") as log:
        return subprocess.Popen(
            [*command, "--allow", str(SONG), *options], stdout=log, stderr=log, env=environment
        )


@contextmanager
def daemon(root: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon whose model is loaded; ended by SIGTERM."""
    process = start_daemon(root, port, *options)
    try:
        asyncio.run(until_loaded(port))
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def until_loaded(port: int, seconds: float = 90.0) -> dict[str, Any]:
    """The welcome of a daemon whose model is loaded; asks until then."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with connect(port=port) as client:
                if client.welcome["state"] == "loaded":
                    return client.welcome
        except Exception:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    tasks = Path(f"/proc/{pid}/task")
    found = []
    for task in tasks.iterdir() if tasks.is_dir() else []:
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def resident(pid: int) -> int:
    """Resident memory in bytes; 0 where the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, its own and the system's for it."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def write_report(name: str, title: str, facts: dict[str, Any], lines: Sequence[str]) -> None:
    """bench/results/NAME.json with everything, and NAME.md for people."""
    facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine()} | facts
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    machine = facts["machine"]
    about = (
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average'][0]} at the end"
    )
    text = [f"# {title}", "", f"{facts['date']}; {about}. Figures: `{name}.json`.", "", *lines]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
