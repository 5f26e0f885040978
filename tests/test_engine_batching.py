"""Jobs that share the hardware: live ones first, runs made as one, cancel while waiting, the same bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from engine import batching
from engine.batching import Line, as_job, give_way, is_shared, run_shared, turn
from engine.errors import Cancelled
from engine.model import Model
from engine.take import Settings
from engine.tasks import generate

STEP = 0.02


def nothing() -> None:
    pass


def refuse() -> None:
    raise Cancelled("The job was cancelled.")


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(20) for future in [pool.submit(job) for job in jobs]]


def test_without_a_job_nothing_waits() -> None:
    assert not is_shared()
    give_way()
    with turn():
        pass


def test_one_run_at_a_time() -> None:
    line, inside, most = Line(), 0, 0

    def job() -> None:
        nonlocal inside, most
        with as_job(line, live=False, shared=False, check=nothing):
            for _ in range(10):
                with turn():
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.001)
                    inside -= 1

    in_threads(job, job, job)
    assert (most, line.waiting, line.busy) == (1, [], False)


def test_a_live_job_overtakes_at_the_next_step_and_is_never_interrupted() -> None:
    line, order = Line(), []
    begun = threading.Event()

    def steps(name: str, live: bool, count: int) -> None:
        with as_job(line, live=live, shared=False, check=nothing):
            for _ in range(count):
                with turn():
                    order.append(name)
                    begun.set()
                    time.sleep(STEP)
                time.sleep(STEP / 10)  # the sampler's own work, in which others could step in

    def live() -> None:
        begun.wait(5)
        steps("live", True, 5)

    in_threads(lambda: steps("batch", False, 20), live)
    first = order.index("live")
    assert first <= 2
    assert order[first : first + 5] == ["live"] * 5
    assert order.count("batch") == 20 and line.live == 0


def test_a_job_that_waits_for_a_live_one_can_be_cancelled() -> None:
    line = Line()
    with as_job(line, live=True, shared=False, check=nothing):

        def batch(wait: Callable[[], None]) -> str:
            with as_job(line, live=False, shared=False, check=refuse), pytest.raises(Cancelled):
                wait()
            return "cancelled"

        def next_turn() -> None:
            with turn():
                raise AssertionError("a batch job ran beside a live one")

        assert in_threads(lambda: batch(next_turn), lambda: batch(give_way)) == ["cancelled"] * 2
    assert line.waiting == []


def doubled(rows: list[int]) -> Callable[[Any], np.ndarray]:
    """A network that notes how many windows it is given."""

    def run(feeds: Any) -> np.ndarray:
        rows.append(len(feeds["latents"]))
        time.sleep(STEP)
        return 2 * feeds["latents"] + feeds["timestep"][:, None]

    return run


def shared_job(line: Line, run: Any, value: int, steps: int, width: int = 3) -> np.ndarray:
    with as_job(line, live=False, shared=True, check=nothing):
        assert is_shared()
        x = np.full((1, width), value, np.float32)
        for step in range(steps):
            x = run_shared(run, {"latents": x, "timestep": np.full(1, step, np.int64)})
        return x


def alone(value: int, steps: int) -> np.ndarray:
    x = np.full((1, 3), value, np.float32)
    for step in range(steps):
        x = 2 * x + step
    return x


def test_runs_of_equal_shape_become_one_whatever_their_steps() -> None:
    line, rows = Line(), list[int]()
    run = doubled(rows)
    made = in_threads(*(lambda value=value: shared_job(line, run, value, 6 + value) for value in range(4)))
    for value, result in enumerate(made):
        assert np.array_equal(result, alone(value, 6 + value))
    assert sum(rows) == 6 + 7 + 8 + 9
    assert len(rows) <= 16 and max(rows) >= 3  # one after another they would be 30


def test_other_shapes_and_full_batches_stay_apart() -> None:
    line, rows = Line(most=2), list[int]()
    run = doubled(rows)
    in_threads(
        *(lambda: shared_job(line, run, 1, 4) for _ in range(3)), lambda: shared_job(line, run, 1, 4, width=5)
    )
    assert sum(rows) == 16 and max(rows) <= 2


def test_a_batch_that_does_not_fit_is_made_in_parts_and_smaller_from_then_on() -> None:
    line, rows = Line(most=8), list[int]()
    whole = doubled(rows)

    def cramped(feeds: Any) -> np.ndarray:
        if len(feeds["latents"]) > 1:
            raise RuntimeError("Failed to allocate memory")
        return whole(feeds)

    made = in_threads(*(lambda: shared_job(line, cramped, 1, 5) for _ in range(3)))
    assert all(np.array_equal(result, alone(1, 5)) for result in made)
    assert line.most < 8


def test_a_run_that_fails_fails_in_its_own_job_only() -> None:
    line = Line()

    def run(feeds: Any) -> np.ndarray:
        if (feeds["latents"] == 13).any():
            raise ValueError("thirteen")
        return feeds["latents"] + 1

    def unlucky() -> str:
        with pytest.raises(ValueError, match="thirteen"):
            shared_job(line, run, 13, 3)
        return "failed"

    made = in_threads(unlucky, lambda: shared_job(line, run, 20, 5))
    assert made[0] == "failed" and (made[1] == 25).all()


def test_takes_of_shared_jobs_have_the_bytes_they_have_alone(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "LINGER", 0.2)
    line = Line()

    def job(seed: int) -> dict[str, bytes]:
        with as_job(line, live=False, shared=True, check=nothing):
            take = generate(tiny_model, seconds=2.0, settings=Settings(seed, steps=4 + seed))
        return {name: part.samples.tobytes() for name, part in take.stems.items()}

    together = in_threads(*(lambda seed=seed: job(seed) for seed in range(3)))
    assert together == [job(seed) for seed in range(3)]
