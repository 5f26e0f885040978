"""What `backline doctor` looks at: the machine, the installation, the model, and how fast it really is."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import BacklineError
from engine.model import PROVIDERS, Device, Model, available_cores
from engine.take import Settings
from engine.tasks import generate

MEASURE_SECONDS = 5.0
GIB = 1 << 30
# What onnxruntime's CUDA provider is linked with, by the CUDA that onnxruntime-gpu was built for.
CUDA_LIBRARIES = {
    "13": ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcufft.so.12", "libcudnn.so.9"),
    "12": ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libcufft.so.11", "libcudnn.so.9"),
}

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and a sentence."""

    subject: str
    state: State
    text: str


def examine(model: str | Path | None, device: Device) -> Iterator[Finding]:
    """The findings in order; the slow one, a window generated and timed, comes last."""
    yield Finding("Backline", "ok", importlib.metadata.version("backline"))
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")
    listed = f"{_processor()}, usable cores: {available_cores()} of {os.cpu_count() or 1}"
    yield Finding("processor", "ok", listed)
    yield _memory()
    yield Finding("GPU", "ok", _gpu() or "no NVIDIA GPU")
    yield from _onnxruntime()
    yield from _cuda_libraries()
    try:
        opened = Model.open(model, device)
    except BacklineError as error:
        yield Finding("model", "problem", str(error))
        return
    manifest = opened.manifest
    abilities = ", ".join(manifest.capabilities) or "none beyond the basic ones"
    text = f"{manifest.name} {manifest.version} ({manifest.licence}), every file as its manifest says"
    yield Finding(
        "model", "ok", f"{text}; opened in {opened.seconds_loading:.1f} s; capabilities: {abilities}"
    )
    yield Finding(
        "provider", "warning" if opened.warnings else "ok", " ".join([opened.provider, *opened.warnings])
    )
    try:
        yield _speed(opened)
    except BacklineError as error:
        yield Finding("speed", "problem", str(error))


def _speed(model: Model) -> Finding:
    """Windows of all stems for about five seconds, the fastest; the first one starts the sessions, too."""
    seconds = max(1.0, model.manifest.window_samples / model.manifest.mel.sample_rate)
    times: list[float] = []
    begun = time.perf_counter()
    while not times or time.perf_counter() - begun + min(times) < MEASURE_SECONDS:
        started = time.perf_counter()
        generate(model, seconds=seconds, settings=Settings(seed=0))
        times.append(time.perf_counter() - started)
    factor = min(times) / seconds
    text = f"{seconds:.1f} s of all stems in {min(times):.1f} s, real-time factor {factor:.2f}"
    if factor <= 1:
        return Finding("speed", "ok", text)
    advice = "--quality draft takes fewer steps"
    if model.provider == PROVIDERS["cpu"]:
        advice += "; a GPU with the extra 'gpu', or more cores, is faster"
    return Finding("speed", "warning", f"{text}: slower than it plays. {advice}.")


def _memory() -> Finding:
    """What is free is what a job may use: a window of the default model needs less than 1 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = {name: int(rest.split()[0]) << 10 for name, rest in (line.split(":", 1) for line in lines)}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return Finding("memory", "ok", "this system does not tell")
    text = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    return Finding("memory", "ok" if free >= GIB else "warning", text)


def _cuda_libraries() -> Iterator[Finding]:
    """Where the wheel for the GPU is installed: which of its libraries cannot be loaded, by name."""
    if "onnxruntime-gpu" not in _wheels() or platform.system() != "Linux":
        return
    import onnxruntime

    major = str(getattr(onnxruntime, "cuda_version", "")).split(".")[0]
    if major not in CUDA_LIBRARIES:  # a build whose needs are not known here
        return
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()  # those that pip installed, which the system's loader does not search
    missing = [name for name in CUDA_LIBRARIES[major] if not _loads(name)]
    if not _loads("libcuda.so.1"):
        yield Finding("CUDA", "warning", "libcuda.so.1 cannot be loaded: NVIDIA's driver is not installed.")
    elif missing:
        advice = f"install CUDA {major} and cuDNN 9, or `pip install 'onnxruntime-gpu[cuda,cudnn]'`"
        yield Finding("CUDA", "problem", f"{', '.join(missing)} cannot be loaded: {advice}.")
    else:
        yield Finding("CUDA", "ok", f"CUDA {major} and cuDNN 9 can be loaded")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _wheels() -> dict[str, str]:
    """Version by name of the wheels that hold the module onnxruntime."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _onnxruntime() -> Iterator[Finding]:
    wheels = _wheels()
    listed = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if not wheels:
        yield Finding(
            "onnxruntime", "problem", "not installed: install Backline with the extra 'cpu' or 'gpu'."
        )
    elif len(wheels) > 1:
        advice = "both hold the same module; uninstall both, then install one."
        yield Finding("onnxruntime", "problem", f"{listed}: {advice}")
    elif "onnxruntime" in wheels and _gpu():
        yield Finding("onnxruntime", "warning", f"{listed}: it cannot use the GPU; the extra 'gpu' can.")
    else:
        import onnxruntime

        usable = [kind for kind, name in PROVIDERS.items() if name in onnxruntime.get_available_providers()]
        yield Finding("onnxruntime", "ok", f"{listed}, built for {', '.join(usable)}")


def _gpu() -> str:
    """Name and driver of the GPUs that the NVIDIA driver lists; empty without any."""
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(listed.stdout.strip().splitlines()) if listed.returncode == 0 else ""


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
