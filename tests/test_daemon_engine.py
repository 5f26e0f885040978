"""The daemon as an engine of a track host: the same sound as the model here, and a cancel that arrives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command import noise
from daemon_process import Running, Talk, daemon

from bridge.daemon_engine import DaemonEngine, daemon_engine
from bridge.filling import Engine, local_engine
from engine.audio import Audio
from engine.errors import BacklineError, Cancelled
from engine.model import Model

RATE = 22050


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with daemon(tmp_path_factory.mktemp("engine") / "root", tiny_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def engine(running: Running) -> Engine:
    return daemon_engine(running.port)


def sound(seconds: float, seed: int, channels: int = 1) -> Audio:
    return Audio(noise(seconds, rate=RATE, channels=channels, seed=seed).T, RATE)


def test_the_daemon_fills_as_the_model_does_here(engine: Engine, tiny_model: Model, running: Running) -> None:
    context = {"bass": sound(3, 1), "drums": sound(3, 2)}
    music = {
        "bpm": 100.0,
        "beats_per_bar": 3,
        "first_beat": 0.5,
        "other": sound(3, 4),
        "text": "slow",
        "seed": 5,
    }
    heard: list[tuple[str, float]] = []
    there = engine.fill(context, ["piano", "guitar"], callback=lambda *told: heard.append(told), **music)
    here = local_engine(tiny_model).fill(context, ["piano", "guitar"], **music)
    assert engine.stems == tiny_model.manifest.stems and there.keys() == here.keys() == {"piano", "guitar"}
    assert all(np.array_equal(there[name].samples, here[name].samples) for name in here)
    assert heard and all(0 <= fraction <= 1 for _, fraction in heard)
    assert not list((running.root / "inputs").iterdir())


def test_the_daemon_splits_with_the_residual(engine: Engine, running: Running) -> None:
    mix = sound(2, 3, channels=2)
    stems = engine.split(mix, seed=2)
    assert [*stems] == [*engine.stems, "residual"]
    total = sum(part.samples for part in stems.values())
    np.testing.assert_allclose(total, mix.samples, atol=1e-5)
    assert not list((running.root / "inputs").iterdir())


def test_a_job_that_is_called_off_is_cancelled_in_the_daemon(engine: Engine, running: Running) -> None:
    def calls_off(phase: str, fraction: float) -> None:
        raise Cancelled("called off")

    started = time.monotonic()
    with pytest.raises(Cancelled):
        engine.fill({"bass": sound(600, 1)}, ["piano"], callback=calls_off)
    assert time.monotonic() - started < 10
    talk = Talk(running.port)
    state = talk.ask("/backline/job/list", 0, 1, answer="/backline/job/state")
    until = time.monotonic() + 20
    while state["state"] != "cancelled" and time.monotonic() < until:
        state = talk.ask("/backline/job/status", state["id"], answer="/backline/job/state")
    talk.close()
    assert (state["task"], state["state"]) == ("fill", "cancelled")
    assert not list((running.root / "inputs").iterdir())


def test_a_daemon_that_is_not_there(running: Running, engine: Engine) -> None:
    with pytest.raises(BacklineError, match="backline serve"):
        daemon_engine(9)
    assert isinstance(engine, DaemonEngine)
    gone = DaemonEngine(9, None, engine.root, engine.capabilities, engine.stems, engine.warn)
    with pytest.raises(BacklineError, match="backline serve"):
        gone.split(sound(2, 3))
