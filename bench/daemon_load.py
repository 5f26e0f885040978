"""200 valid requests a second from 8 clients, for a minute, while jobs run; then the same over TCP.

    python -m bench.daemon_load

The same job is made again and again, in turn without and with the load; the load is 60 s of UDP in all.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.daemon_common import cpu_seconds, daemon, free_port, percentile, resident, write_report
from bridge.client import connect
from bridge.osc import read_packet, write_message

CLIENTS = 8
RATE = 200.0  # requests a second, all clients together
WAIT = 0.5  # seconds before a request is sent again
RESENDS = 2


@dataclass
class Counts:
    """What a client saw. waits: seconds from a request's first sending to its answer."""

    sent: int = 0
    resent: list[int] = field(default_factory=lambda: [0, 0])
    lost: int = 0
    refused: int = 0
    waits: list[float] = field(default_factory=list)


class Asker:
    """A client with a socket of its own, one request at a time."""

    def __init__(self, number: int, port: int, tcp: bool):
        self.name, self.tcp = f"load{number}", tcp
        self.counts = Counts()
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        self.socket = socket.socket(type=kind)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.buffer = b""

    def request(self, number: int, job: str) -> tuple[bytes, str]:
        """The next of a round of requests, and the answer that belongs to it."""
        turn = number % 6
        if turn == 0:
            return write_message("/backline/hello", "s", [self.name]), "/backline/welcome"
        if turn in (1, 2):
            return write_message("/backline/job/status", "s", [job]), "/backline/job/state"
        if turn == 3:
            return write_message(
                "/backline/track/arm", "si", [self.name, number % 2]
            ), "/backline/track/armed"
        if turn == 4:
            return write_message("/backline/job/list", "ii", [0, 2]), "/backline/job/listed"
        # the running job's own request once more: it must never start a second one
        return write_message("/backline/job/generate", JOB_TAGS, [job, *JOB]), "/backline/job/accepted"

    async def ask(self, number: int, job: str) -> None:
        packet, answer = self.request(number, job)
        self.counts.sent += 1
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        for attempt in range(1 if self.tcp else RESENDS + 1):
            framed = struct.pack(">I", len(packet)) + packet if self.tcp else packet
            await loop.sock_sendall(self.socket, framed)
            try:
                await asyncio.wait_for(self.answered(answer), 10.0 if self.tcp else WAIT)
            except TimeoutError:
                continue
            self.counts.waits.append(time.perf_counter() - started)
            if attempt:
                self.counts.resent[attempt - 1] += 1
            return
        self.counts.lost += 1

    async def answered(self, answer: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self.tcp:
                while len(self.buffer) < 4 or len(self.buffer) < 4 + struct.unpack_from(">I", self.buffer)[0]:
                    self.buffer += await loop.sock_recv(self.socket, 1 << 16)
                size = struct.unpack_from(">I", self.buffer)[0]
                packet, self.buffer = self.buffer[4 : 4 + size], self.buffer[4 + size :]
            else:
                packet = await loop.sock_recv(self.socket, 1 << 16)
            address = read_packet(packet)[0].address
            if address == "/backline/error":
                self.counts.refused += 1
                return
            if address == answer:
                return


JOB_TAGS = "sfsisi"
JOB: list[Any] = [20.0, "steps", 20, "seed", 1]


async def load(askers: list[Asker], job: str, going: asyncio.Event, start: float) -> None:
    """Every client asks at its share of the rate until `going` is cleared."""

    async def one(asker: Asker, offset: float) -> None:
        count = 0
        while going.is_set():
            due = start + offset + count * len(askers) / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await asker.ask(count, job)
            count += 1

    await asyncio.gather(*(one(asker, number / RATE) for number, asker in enumerate(askers)))


async def one_job(port: int, name: str) -> float:
    """Seconds that the engine worked on the job."""
    async with connect(port=port, name="host") as client:
        job = await client.generate(JOB[0], id=name, steps=JOB[2], seed=JOB[4])
        return (await job.result()).seconds


async def rounds(pid: int, port: int, seconds: float, tcp: bool) -> dict[str, Any]:
    """Jobs in turn without and with the load until the load lasted `seconds`."""
    quiet: list[float] = []
    loaded: list[float] = []
    counts: list[Counts] = []
    lasted = spent = asked = 0.0
    kind = "tcp" if tcp else "udp"
    while lasted < seconds or len(quiet) < 2:
        quiet.append(await one_job(port, f"{kind}-quiet-{len(quiet)}"))
        name = f"{kind}-loaded-{len(loaded)}"
        askers = [Asker(number, port, tcp) for number in range(CLIENTS)]
        going = asyncio.Event()
        going.set()
        job = asyncio.ensure_future(one_job(port, name))
        await asyncio.sleep(0.3)
        started, used, own = time.perf_counter(), cpu_seconds(pid), time.process_time()
        asking = asyncio.ensure_future(load(askers, name, going, started))
        loaded.append(await job)
        going.clear()
        await asking
        lasted += time.perf_counter() - started
        spent += cpu_seconds(pid) - used
        asked += time.process_time() - own
        counts += [asker.counts for asker in askers]
        for asker in askers:
            asker.socket.close()
    waits = [wait for count in counts for wait in count.waits]
    async with connect(port=port) as client:
        listed = await client.request("/backline/job/list", 0, 1, answer="/backline/job/listed")
    return {
        "load_seconds": round(lasted, 1),
        "requests": sum(count.sent for count in counts),
        "requests_a_second": round(sum(count.sent for count in counts) / lasted, 1),
        "answered_after_resends": [sum(count.resent[n] for count in counts) for n in range(RESENDS)],
        "not_answered": sum(count.lost for count in counts),
        "refused": sum(count.refused for count in counts),
        "wait_ms": {
            "median": round(1e3 * percentile(waits, 0.5), 2),
            "p99": round(1e3 * percentile(waits, 0.99), 2),
            "worst": round(1e3 * max(waits), 2),
        },
        "over_50_ms": sum(wait > 0.05 for wait in waits),
        "job_seconds_quiet": [round(value, 2) for value in quiet],
        "job_seconds_loaded": [round(value, 2) for value in loaded],
        "slower_percent": round(100 * (median(loaded) / median(quiet) - 1), 1),
        "daemon_percent_of_a_core": round(100 * spent / lasted, 1),
        "generator_percent_of_a_core": round(100 * asked / lasted, 1),
        "jobs_sent": len(quiet) + len(loaded),
        "jobs_listed_so_far": listed["total"],
    }


def main(seconds: float) -> None:
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="backline-load-") as folder,
        daemon(Path(folder) / "root", port) as process,
    ):
        asyncio.run(one_job(port, "warm"))
        udp = asyncio.run(rounds(process.pid, port, seconds, tcp=False))
        tcp = asyncio.run(rounds(process.pid, port, seconds, tcp=True))
        memory = resident(process.pid)
    jobs = 1 + udp["jobs_sent"] + tcp["jobs_sent"]
    facts = {
        "clients": CLIENTS,
        "udp": udp,
        "tcp": tcp,
        "jobs_sent": jobs,
        "jobs_listed": tcp["jobs_listed_so_far"],
        "daemon_mb": round(memory / 1e6, 1),
    }

    def row(name: str, key: str) -> str:
        return f"| {name} | {udp[key]} | {tcp[key]} |"

    def waits(figures: dict[str, Any]) -> str:
        return "{median}, {p99}, {worst} ms".format(**figures["wait_ms"])

    write_report(
        "daemon_load",
        f"Daemon: {CLIENTS} clients, {RATE:g} requests a second, while a job runs",
        facts,
        [
            "Hello, status, list, a host event and the running job's own request again, each client one",
            "request at a time. The job is 20 s of music in 20 steps on all cores, in turn without and with",
            "the load, whose generator shares the cores.",
            "",
            "| | UDP | TCP |",
            "|---|---|---|",
            row("seconds of load", "load_seconds"),
            row("requests", "requests"),
            row("requests a second", "requests_a_second"),
            row("answered after one and two resends", "answered_after_resends"),
            row("not answered", "not_answered"),
            row("refused", "refused"),
            f"| wait: median, 99 %, worst | {waits(udp)} | {waits(tcp)} |",
            row("waits over 50 ms", "over_50_ms"),
            row("the job, seconds, without load", "job_seconds_quiet"),
            row("the job, seconds, with load", "job_seconds_loaded"),
            row("slower by (medians), %", "slower_percent"),
            row("the daemon's share of a core meanwhile, %", "daemon_percent_of_a_core"),
            row("the generator's share of a core meanwhile, %", "generator_percent_of_a_core"),
            "",
            f"Jobs sent: {jobs}; jobs that the daemon lists: {facts['jobs_listed']}.",
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    main(parser.parse_args().seconds)
