"""What a measurement ran on, written beside its figures."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from engine.model import available_cores


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory in GiB, load averages as the measurement begins, and versions."""
    import onnxruntime

    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(_memory_gib(), 1),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "torch": _version("torch"),
        "onnxruntime": onnxruntime.__version__,
    }


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
