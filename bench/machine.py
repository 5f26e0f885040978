"""What a measurement ran on, written beside its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from engine.model import available_cores


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory in GiB, versions, and as the measurement begins load averages and `busy_cores`."""
    import onnxruntime

    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(_memory_gib(), 1),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "busy_cores": round(busy_cores(), 2),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "onnxruntime": onnxruntime.__version__,
    }


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that others keep busy while this process sleeps; 0 where the system does not count them.

    A load average tells of the minute before: of what a measurement waited for, too.
    """
    before = _idle_seconds()
    time.sleep(seconds)
    idle = _idle_seconds() - before
    cores = os.cpu_count() or 1
    return max(0.0, cores - idle / seconds) if before else 0.0


def _idle_seconds() -> float:
    """Of all cores together, since the machine started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    idle, waiting = path.read_text().split("\n", 1)[0].split()[4:6]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def _version(package: str) -> str:
    """The installed version, or "not installed"; a producer's install has no torch."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
