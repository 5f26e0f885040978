"""What `backline doctor` looks at: the machine, the installation, the model, and how fast it really is."""

from __future__ import annotations

import importlib.metadata
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
    yield Finding("processor", "ok", f"{_processor()}, usable cores: {available_cores()}")
    yield Finding("GPU", "ok", _gpu() or "no NVIDIA GPU")
    yield from _onnxruntime()
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
    seconds = max(1.0, model.manifest.window_samples / model.manifest.mel.sample_rate)
    started = time.perf_counter()
    generate(model, seconds=seconds, settings=Settings(seed=0))
    elapsed = time.perf_counter() - started
    factor = elapsed / seconds
    text = f"{seconds:.1f} s of all stems in {elapsed:.1f} s, real-time factor {factor:.2f}"
    return Finding(
        "speed", "ok" if factor <= 1 else "warning", text + ("" if factor <= 1 else ": slower than it plays")
    )


def _onnxruntime() -> Iterator[Finding]:
    wheels = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            wheels[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
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
