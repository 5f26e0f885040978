"""200,000 datagrams that are wrong in every way we could think of, with valid requests in between.

python -m bench.daemon_fuzz
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.daemon_common import children, daemon, free_port, percentile, resident, write_report
from bridge.osc import Malformed, read_packet, write_message
from bridge.protocol import REPLIES, REQUESTS

BURST = 50  # datagrams between two valid requests
VALID = [
    write_message("/backline/hello", "si", ["fuzz", 9]),
    write_message("/backline/job/status", "s", ["nobody"]),
    write_message("/backline/job/cancel", "s", ["nobody"]),
    write_message("/backline/job/list", "ii", [0, 1]),
    write_message("/backline/job/generate", "sfsf", ["a", 0.5, "bpm", 120.0]),
    write_message("/backline/job/fill", "sssss", ["b", "/etc", "piano", "text", "x" * 100]),
    write_message("/backline/job/split", "sss", ["c", "/etc/../etc/passwd", "residual"]),
    write_message("/backline/track/arm", "si", ["3", 1]),
    write_message("/backline/tempo/set", "f", [120.0]),
    write_message("/backline/subscription/add", "s", ["jobs"]),
    write_message("/backline/transport/set", "sf", ["rolling", 1.0]),
]


def bundle(elements: list[bytes], timetag: bytes = b"\0\0\0\0\0\0\0\1") -> bytes:
    return b"#bundle\0" + timetag + b"".join(struct.pack(">i", len(e)) + e for e in elements)


def flipped(rng: random.Random) -> bytes:
    packet = bytearray(rng.choice(VALID))
    for _ in range(rng.randrange(1, 6)):
        packet[rng.randrange(len(packet))] = rng.choice((0, 255, 44, 128, rng.randrange(256)))
    return bytes(packet)


def truncated(rng: random.Random) -> bytes:
    packet = rng.choice(VALID)
    return packet[: rng.randrange(1, len(packet))]


def nested(rng: random.Random) -> bytes:
    packet = rng.choice(VALID)
    for _ in range(rng.randrange(1, 12)):
        packet = bundle([packet] * rng.randrange(1, 3))
        if len(packet) > 30000:
            break
    return packet


def sized(rng: random.Random) -> bytes:
    size = rng.choice((-4, -1, 0, 3, 1 << 30, -(1 << 31), rng.randrange(-100, 100)))
    return b"#bundle\0" + bytes(8) + struct.pack(">i", size) + rng.choice((b"", rng.choice(VALID)))


def huge(rng: random.Random) -> bytes:
    return rng.choice((b"/", b"#bundle\0", VALID[0], b"/a\0\0,s\0\0")) + bytes(
        rng.choice((0x41, 0, 255)) for _ in range(4)
    ) * rng.randrange(4000, 16000)


def wildcard(rng: random.Random) -> bytes:
    pattern = rng.choice(
        ("/backline/*", "/*/*", "/backline/job/*", "/backline/hell?", "//hello", "/{a,b}", "/[a-z]*")
    )
    return write_message(pattern, "s", [rng.choice(("me", "nobody"))])


def future(rng: random.Random) -> bytes:
    timetag = rng.choice((b"\xff" * 8, b"\xee\xff\xff\xff\0\0\0\0", rng.randbytes(8)))
    return bundle([rng.choice(VALID)], timetag)


def wrongly_typed(rng: random.Random) -> bytes:
    address = rng.choice([*REQUESTS, *REPLIES])
    makers: dict[str, Callable[[], Any]] = {
        "s": lambda: "x" * rng.choice((0, 1, 300, 5000)),
        "i": lambda: rng.randrange(-(1 << 31), 1 << 31),
        "h": lambda: rng.randrange(-(1 << 63), 1 << 63),
        "f": lambda: rng.choice((float("nan"), float("inf"), -1.0, 1e30)),
        "d": lambda: rng.choice((float("nan"), -float("inf"), 1e300)),
    }
    tags = "".join(rng.choice("sihfd") for _ in range(rng.randrange(0, 12)))
    return write_message(address, tags, [makers[tag]() for tag in tags])


def strange_tags(rng: random.Random) -> bytes:
    tags = bytes(rng.choice(b"sifbhtdSrcmTFNI[]xyz\xff") for _ in range(rng.randrange(1, 20)))
    text = b"," + tags + bytes(4 - (len(tags) + 1) % 4)
    return b"/backline/hello\0" + text + rng.randbytes(4 * rng.randrange(0, 20))


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 200))


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    flipped, truncated, nested, sized, huge, wildcard, future, wrongly_typed, strange_tags, noise,
)  # fmt: skip


def hello(probe: socket.socket, port: int) -> float:
    """Seconds until a valid request is answered; a lost datagram is sent again after a second and counts."""
    started = time.perf_counter()
    while True:
        probe.sendto(write_message("/backline/hello", "s", ["probe"]), ("127.0.0.1", port))
        try:
            if probe.recv(1 << 16).startswith(b"/backline/welcome"):
                return time.perf_counter() - started
        except TimeoutError:
            if time.perf_counter() - started > 20:
                raise


def dropped(port: int) -> int:
    """Datagrams to this port that the kernel had no room for."""
    lines = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return sum(int(line[-1]) for line in lines if int(line[1].split(":")[1], 16) == port)


def strangers(port: int, rng: random.Random, count: int) -> None:
    """TCP connections that send nonsense, or nothing, and go."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                rng.choice((b"", rng.randbytes(300), b"\0\0\0\x10/back", b"\xc0/a\xdb\xdb\xc0"))
            )


def main(datagrams: int, seed: int) -> None:
    rng = random.Random(seed)
    port = free_port()
    counts: Counter[str] = Counter()
    refused = 0
    latencies: list[float] = []
    memory: list[int] = []
    with (
        tempfile.TemporaryDirectory(prefix="backline-fuzz-") as folder,
        daemon(Path(folder) / "root", port, "--threads", "1") as process,
    ):
        probe = socket.socket(type=socket.SOCK_DGRAM)
        probe.settimeout(1.0)
        hello(probe, port)
        workers = children(process.pid)
        sender = socket.socket(type=socket.SOCK_DGRAM)
        started = time.perf_counter()
        for number in range(datagrams):
            kind = KINDS[rng.randrange(len(KINDS))]
            if kind is huge and rng.random() < 0.9:  # a tenth of its share: they are 60 kB each
                kind = flipped
            packet = kind(rng)[:65000]
            counts[kind.__name__] += 1
            try:
                read_packet(packet)
            except Malformed:
                refused += 1
            sender.sendto(packet, ("127.0.0.1", port))
            if number % BURST == BURST - 1:
                latencies.append(hello(probe, port))
                if number % 2000 == 1999:
                    sender.close()
                    sender = socket.socket(type=socket.SOCK_DGRAM)
                    strangers(port, rng, 5)
                if number % 10000 == 9999:
                    memory.append(resident(process.pid))
        seconds = time.perf_counter() - started
        after = [hello(probe, port) for _ in range(50)]
        facts: dict[str, Any] = {
            "datagrams": datagrams,
            "seed": seed,
            "kinds": dict(counts),
            "refused_as_osc": refused,
            "seconds": round(seconds, 1),
            "dropped_by_the_kernel": dropped(port),
            "answers": len(latencies),
            "latency_ms": {
                "median": round(1e3 * percentile(latencies, 0.5), 2),
                "p99": round(1e3 * percentile(latencies, 0.99), 2),
                "worst": round(1e3 * max(latencies), 2),
                "worst_afterwards": round(1e3 * max(after), 2),
            },
            "over_100_ms": sum(latency > 0.1 for latency in latencies),
            "memory_mb": [round(value / 1e6, 2) for value in memory],
            "memory_range_mb": round((max(memory) - min(memory)) / 1e6, 2),
            "alive": process.poll() is None,
            "worker_untouched": children(process.pid) == workers,
        }
    latency = facts["latency_ms"]
    write_report(
        "daemon_fuzz",
        f"Daemon: {datagrams} wrong datagrams",
        facts,
        [
            "Mutated, truncated, nested, wrongly sized (-4 among them), huge, wildcard, future and wrongly",
            f"typed datagrams in {facts['seconds']} s, 5 strange TCP connections after every 2,000; a valid",
            f"request after every {BURST}, whose wait includes what is queued before it.",
            "",
            "| | |",
            "|---|---|",
            f"| datagrams that the kernel dropped on the way | {facts['dropped_by_the_kernel']} |",
            f"| valid requests in between, all answered | {len(latencies)} |",
            f"| wait: median, 99 %, worst | {latency['median']}, {latency['p99']}, {latency['worst']} ms |",
            f"| of them over 100 ms | {facts['over_100_ms']} |",
            f"| worst of 50 afterwards | {latency['worst_afterwards']} ms |",
            f"| resident memory: lowest, highest | {min(memory) / 1e6:.1f}, {max(memory) / 1e6:.1f} MB |",
            f"| daemon alive, its worker the same | {facts['alive']}, {facts['worker_untouched']} |",
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datagrams", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.datagrams, arguments.seed)
