"""run.py: what it installs and when, without installing anything."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py in a project of its own, whose pip only writes down what it was asked for."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6")
    venv = tmp_path / ".venv"
    module.ROOT, module.VENV, module.STAMP = tmp_path, venv, venv / "stamp.json"
    module.LOG, module.CONSTRAINTS = venv / "install.log", tmp_path / "constraints.txt"
    module.PYTHON = venv / "bin" / "python"
    module.asked, module.made = [], []

    def make_venv() -> None:
        module.made.append(True)
        module.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        module.PYTHON.touch()

    monkeypatch.setattr(module, "make_venv", make_venv)
    monkeypatch.setattr(module, "has_pip", lambda: module.PYTHON.exists())
    monkeypatch.setattr(
        module, "pip_install", lambda runtime, extras: module.asked.append((runtime, *extras))
    )
    return module


def test_it_installs_once(run: ModuleType) -> None:
    assert run.install(["cpu"]) == 0
    assert run.install(["cpu"]) == 0
    assert run.asked == [("cpu",)] and len(run.made) == 1


def test_test_adds_to_demo_and_demo_takes_nothing_away(run: ModuleType) -> None:
    for extras in (["cpu"], ["cpu", "export", "dev"], ["cpu"], ["cpu", "dev"]):
        assert run.install(extras) == 0
    assert run.asked == [("cpu",), ("cpu", "dev", "export")]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_installs_again_when_the_project_changed(run: ModuleType, name: str) -> None:
    run.install(["cpu", "dev"])
    (run.ROOT / name).write_text("changed")
    run.install(["cpu"])
    assert run.asked == [("cpu", "dev"), ("cpu", "dev")] and len(run.made) == 1


def test_it_installs_again_when_the_machine_changed(run: ModuleType) -> None:
    run.install(["cpu"])
    run.install(["gpu"])
    assert run.asked == [("cpu",), ("gpu",)]


def test_a_half_made_environment_is_made_anew(run: ModuleType) -> None:
    run.install(["cpu"])
    run.PYTHON.unlink()
    assert run.install(["cpu"]) == 0
    assert run.asked == [("cpu",), ("cpu",)] and len(run.made) == 2


def test_an_environment_that_was_moved_is_made_anew(run: ModuleType) -> None:
    run.install(["cpu"])
    stamp = json.loads(run.STAMP.read_text())
    run.STAMP.write_text(json.dumps(stamp | {"root": "/somewhere/else"}))
    run.install(["cpu"])
    assert len(run.made) == 2


def test_an_install_that_fails_is_tried_again(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(runtime: str, extras: list[str]) -> None:
        raise run.SetupError("No network.")

    with monkeypatch.context() as patch:
        patch.setattr(run, "pip_install", fails)
        assert run.install(["cpu"]) == 1
    assert capsys.readouterr().err == "No network.\n"
    assert run.install(["cpu"]) == 0
    assert run.asked == [("cpu",)]


def test_without_venv_it_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, run: ModuleType
) -> None:
    spec = importlib.util.spec_from_file_location("fresh", ROOT / "run.py")
    assert spec and spec.loader
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # what importing it on a bare Debian comes to
    monkeypatch.setattr(run, "make_venv", fresh.make_venv)
    monkeypatch.setattr(run, "SetupError", fresh.SetupError)
    assert run.install(["cpu"]) == 1
    sentence = capsys.readouterr().err
    major, minor = sys.version_info[:2]
    assert f"python{major}.{minor}-venv" in sentence and len(sentence.splitlines()) == 1


def test_an_old_python_gets_a_sentence(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "OLDEST", (99, 0))
    assert run.main() == 1
    assert "newer" in capsys.readouterr().err
    assert run.asked == []


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("echo 'GPU 0: NVIDIA H200'", "gpu"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        ("echo 'driver mismatch' >&2; exit 9", "cpu"),
    ],
)
def test_the_gpu_decides_the_extra(
    run: ModuleType, script: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(run.platform, "machine", lambda: "x86_64")
    assert run.runtime() == extra
    monkeypatch.setattr(run.platform, "machine", lambda: "arm64")
    assert run.runtime() == "cpu"


def test_more_extras_can_be_asked_for(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "start", lambda command: 0)
    monkeypatch.setattr(run, "runtime", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", ["run.py", "test"])
    monkeypatch.setenv("BACKLINE_EXTRAS", "train")
    monkeypatch.chdir(run.ROOT)
    assert run.main() == 0
    assert run.asked == [("cpu", "dev", "export", "train")]


def test_commands(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BACKLINE_EXTRAS", raising=False)
    started: list[list[str]] = []
    monkeypatch.setattr(run, "start", lambda command: started.append(command[1:]) or 0)
    monkeypatch.setattr(run, "runtime", lambda: "cpu")
    monkeypatch.chdir(run.ROOT)
    for arguments in (["demo", "--seconds", "5"], ["backline", "doctor"], ["test"], ["test", "-m", "slow"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        assert run.main() == 0
    assert started[0][-3:] == ["demo", "--seconds", "5"] and started[1][-1] == "doctor"
    pytest_of = [command[command.index("pytest") + 1 :] for command in started[2:]]
    assert pytest_of == [["-m", run.DEFAULT_MARKERS, *run.on_all_cores()], ["-m", "slow"]]
    assert [set(asked) for asked in run.asked] == [{"cpu"}, {"cpu", "export", "dev"}]
    monkeypatch.setattr(sys, "argv", ["run.py", "explode"])
    assert run.main() == 2


def test_every_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert "torch==2.13.0" in pins
