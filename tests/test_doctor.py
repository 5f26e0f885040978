"""What `backline doctor` finds: missing libraries by name, wheels side by side, a real measurement."""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path

import onnxruntime
import pytest

from bridge import doctor
from bridge.doctor import Finding, examine
from engine.model import Model


def findings(model: Path | None = None) -> dict[str, Finding]:
    return {finding.subject: finding for finding in examine(model, "cpu")}


def install(monkeypatch: pytest.MonkeyPatch, cuda: str = "", **wheels: str) -> None:
    """As if these wheels of onnxruntime were installed, and no others; cuda: what they were built for."""
    monkeypatch.setattr(onnxruntime, "cuda_version", cuda)
    true = importlib.metadata.version
    named = {name.replace("_", "-"): version for name, version in wheels.items()}

    def version(name: str) -> str:
        if not name.startswith("onnxruntime"):
            return true(name)
        if name not in named:
            raise importlib.metadata.PackageNotFoundError(name)
        return named[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_a_real_look_and_a_real_measurement(tiny_bundle: Path) -> None:
    found = findings(tiny_bundle)
    assert "usable cores" in found["processor"].text
    assert "GiB free of" in found["memory"].text
    assert found["provider"].text.startswith("CPUExecutionProvider")
    assert "real-time factor" in found["speed"].text
    assert all(finding.state != "problem" for finding in found.values())


def test_missing_libraries_are_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda="13.0", onnxruntime_gpu="1.31.0")
    monkeypatch.setattr(doctor, "_loads", lambda name: "cudnn" not in name and "cublasLt" not in name)
    cuda = findings(tiny_bundle)["CUDA"]
    assert cuda.state == "problem"
    assert cuda.text.startswith("libcublasLt.so.13, libcudnn.so.9 cannot be loaded: install CUDA 13")


def test_an_older_wheel_wants_an_older_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda="12.4", onnxruntime_gpu="1.20.1")
    monkeypatch.setattr(doctor, "_loads", lambda name: name == "libcuda.so.1")
    (cuda,) = doctor._cuda_libraries()
    assert "libcudart.so.12" in cuda.text and ".13" not in cuda.text


def test_a_driver_that_is_missing_and_libraries_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuda="13.0", onnxruntime_gpu="1.31.0")
    monkeypatch.setattr(doctor, "_loads", lambda name: name != "libcuda.so.1")
    assert "driver is not installed" in next(doctor._cuda_libraries()).text
    monkeypatch.setattr(doctor, "_loads", lambda name: True)
    assert next(doctor._cuda_libraries()).state == "ok"


def test_a_library_that_there_is_not_does_not_load() -> None:
    assert not doctor._loads("libbackline-none.so.99")
    assert doctor._loads("libc.so.6")


def test_both_wheels_or_the_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, onnxruntime="1.31.0", onnxruntime_gpu="1.31.0")
    (both,) = doctor._onnxruntime()
    assert both.state == "problem" and "uninstall both" in both.text
    install(monkeypatch, onnxruntime="1.31.0")
    monkeypatch.setattr(doctor, "_gpu", lambda: "NVIDIA H200")
    (wrong,) = doctor._onnxruntime()
    assert wrong.state == "warning" and "the extra 'gpu' can" in wrong.text
    assert list(doctor._cuda_libraries()) == []


def test_slower_than_it_plays_says_what_to_change(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.open(tiny_bundle, "cpu", 1)
    now = itertools.count(0, 100)
    monkeypatch.setattr(doctor, "generate", lambda *args, **rest: None)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: float(next(now)))
    slow = doctor._speed(model)
    monkeypatch.undo()
    assert slow.state == "warning" and "--quality draft" in slow.text
