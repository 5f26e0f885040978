"""One loop for every network: it stops when the time is up and goes on where it stopped."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training import loop
from training.loop import (
    Logs,
    LoopConfig,
    add_arguments,
    learning_rate,
    load_ema,
    loop_config,
    make_optimisers,
    means,
    train,
)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves a second each time it is read: once a step, and once after each checkpoint."""
    seconds = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "draw_curves", lambda out: None)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def error(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
    value = ((model(torch.ones(4, 3)) - 1) ** 2).mean()
    return value, {"mse": value.item()}


def quiet(model: nn.Linear) -> Logs:
    return {"weight": float(model.weight.detach().norm())}


def checkpoint(folder: Path) -> dict[str, object]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_trains_reports_and_stops(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(network(), error, LoopConfig(out, 1.0, warmup=1, validate_every=30), quiet)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [30, 60]
    assert rows[-1]["minutes"] == 1.0 and checkpoint(out)["spent"] == 60
    assert rows[0].keys() == {"loss", "mse", "val_weight", "step", "minutes"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "checkpoint.tmp").exists()


@pytest.mark.usefixtures("_no_pictures")
def test_resumes_step_time_weights_and_average(tmp_path: Path) -> None:
    steps: list[int] = []
    seen: list[torch.Tensor] = []

    def watched(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        steps.append(step)
        seen.append(model.weight.detach().clone())
        return error(model, step)

    config = LoopConfig(tmp_path, 1.0, warmup=1, validate_every=25)
    first = train(network(), watched, config, quiet)
    saved = checkpoint(tmp_path)
    assert steps == list(range(60))
    # nothing is left to do: the average comes back as it was
    again = train(network(), watched, config, quiet)
    assert len(steps) == 60
    assert torch.equal(again.weight, first.weight) and not again.training
    train(network(), watched, LoopConfig(tmp_path, 2.0, warmup=1, validate_every=25), quiet)
    assert steps == list(range(120))
    assert torch.equal(seen[60], saved["model"]["weight"])
    assert checkpoint(tmp_path)["spent"] == 120


WORKERS = """
import sys
import torch
from test_training_loop import error, itertools, loop, network, quiet, LoopConfig, Path, SimpleNamespace

seconds = itertools.count()
loop.time = SimpleNamespace(monotonic=lambda: float(next(seconds)))
worker = loop.join_workers()
given = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]][worker])  # their mean is what one alone is given
loss = lambda model, step: ((model(given) - given.sum()).sum() * (1 + step % 3), {"worker": float(worker)})
average = loop.train(network(), loss, LoopConfig(Path(sys.argv[1]), 1.0, validate_every=30), quiet)
torch.save(average.weight, f"{sys.argv[1]}/{worker}.pt")
"""


@pytest.mark.usefixtures("_no_pictures")
def test_workers_move_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    path = {"PYTHONPATH": f"{Path(loop.__file__).parents[1]}:{Path(__file__).parent}"}
    done = subprocess.run(
        [*command, str(tmp_path / "shared")],
        env=os.environ | path | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    def loss(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        return (model(torch.ones(3)) - 3).sum() * (1 + step % 3), {}

    alone = train(network(), loss, LoopConfig(tmp_path / "alone", 1.0, validate_every=30), quiet)
    for worker in range(2):
        average = torch.load(tmp_path / "shared" / f"{worker}.pt", weights_only=True)
        assert torch.allclose(average, alone.weight, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "shared" / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["worker"]) for row in rows] == [(30, 0.0), (60, 0.0)]


def test_workers_that_were_not_joined_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="without torchrun"):
        train(network(), error, LoopConfig(tmp_path / "run", 1.0), quiet)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_no_pictures")
def test_weights_without_an_optimisers_state_are_warmed_up_again(tmp_path: Path) -> None:
    model = network()
    state = model.state_dict()
    torch.save({"model": state, "ema": state, "step": 1000, "spent": 30.0}, tmp_path / "checkpoint.pt")
    config = LoopConfig(tmp_path, 1.0, lr=0.1, warmup=10**6, validate_every=25)
    trained = train(model, error, config, quiet)
    assert checkpoint(tmp_path)["step"] == 1030
    assert torch.allclose(trained.weight, state["weight"], atol=1e-4), "a long warm-up hardly moves them"


@pytest.mark.usefixtures("_no_pictures")
def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupted(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        if step == 30:
            raise KeyboardInterrupt
        return error(model, step)

    def counted(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        steps.append(step)
        return error(model, step)

    config = LoopConfig(tmp_path, 1.0, validate_every=20)
    with pytest.raises(KeyboardInterrupt):
        train(network(), interrupted, config, quiet)
    train(network(), counted, config, quiet)
    assert steps == list(range(20, 60))
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        20,
        40,
        60,
    ]


@pytest.mark.usefixtures("_no_pictures")
def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    weights: list[torch.Tensor] = []

    def watched(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        weights.append(model.weight.detach().clone())
        return error(model, step)

    config = LoopConfig(tmp_path, 0.5, lr=0.1, warmup=1, ema=0.6, validate_every=1000)
    model = network()
    average = train(model, watched, config, quiet)
    expected = weights[0]
    for step, weight in enumerate([*weights[1:], model.weight.detach()]):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(average.weight, expected, atol=1e-6)
    assert not torch.allclose(average.weight, model.weight, atol=1e-4)
    loaded = load_ema(tmp_path, copy.deepcopy(model))
    assert torch.equal(loaded.weight, average.weight)
    assert not loaded.training and not loaded.weight.requires_grad


@pytest.mark.usefixtures("_no_pictures")
def test_muon_moves_the_matrices_and_goes_on_with_its_momentum(tmp_path: Path) -> None:
    """Interrupted and called again it ends where it would have, to the last bit."""

    def config(folder: str) -> LoopConfig:
        return LoopConfig(tmp_path / folder, 1.0, lr=0.01, warmup=1, validate_every=20, muon=True)

    def interrupted(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        if step == 40:
            raise KeyboardInterrupt
        return error(model, step)

    model = network()
    taken = [optimiser.param_groups[0]["params"] for optimiser in make_optimisers(model, config("whole"))]
    assert [[p is model.weight for p in params] for params in taken] == [[True], [False]]
    whole = train(model, error, config("whole"), quiet)
    plain = train(network(), error, replace(config("plain"), muon=False), quiet)
    with pytest.raises(KeyboardInterrupt):
        train(network(), interrupted, config("parts"), quiet)
    again = train(network(), error, config("parts"), quiet)
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    assert not torch.allclose(whole.weight, plain.weight, atol=1e-3)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    def broken(model: nn.Linear, step: int) -> tuple[torch.Tensor, Logs]:
        value, logs = error(model, step)
        return (value * torch.nan if step == 7 else value), logs

    with pytest.raises(RuntimeError, match="nan at step 7"):
        train(network(), broken, LoopConfig(tmp_path, 1.0), quiet)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_rate_warms_up_stays_and_falls_to_two_percent(tmp_path: Path) -> None:
    config = LoopConfig(tmp_path, 1.0, lr=2.0, warmup=100)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.02)
    assert learning_rate(config, 49, 0.01) == pytest.approx(1.0)
    assert learning_rate(config, 500, 0.5) == learning_rate(config, 900, 0.67) == pytest.approx(2.0)
    assert learning_rate(config, 900, 0.835) == pytest.approx(2.0 * (0.02 + 0.98 * 0.5))
    assert learning_rate(config, 900, 1.0) == learning_rate(config, 900, 1.2) == pytest.approx(0.04)


def test_means_skip_what_a_row_does_not_have() -> None:
    assert means([{"a": 1.0, "b": 4.0}, {"a": 3.0}]) == {"a": 2.0, "b": 4.0}
    assert means([]) == {}


def test_arguments_become_a_config(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, lr=3e-4)
    args = parser.parse_args(["--data", "d", "--out", str(tmp_path), "--minutes", "5", "--device", "cpu"])
    assert loop_config(args) == LoopConfig(tmp_path, 5.0, 3e-4, device="cpu")
    assert loop_config(args, validate_every=7.0).validate_every == 7.0
    args = parser.parse_args(["--data", ".", "--out", ".", "--minutes", "5", "--ema", "0.9"])
    assert loop_config(args).ema == 0.9


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_ema(tmp_path, network())
