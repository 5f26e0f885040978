"""Timing several ways of doing the same in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

LEAST_ROUNDS = 2
# A runtime's idle threads spin after a call, OpenBLAS's for 2^26 cycles, and would take the next one's cores.
PAUSE = 0.05


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, limit: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each step in each of `rounds` rounds; one round before them warms up.

    limit: no further round begins when so many seconds have gone and two rounds are done.
    A step on a GPU has to wait for its own end.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for number in range(rounds + 1):
        if limit is not None and number > LEAST_ROUNDS and time.perf_counter() - begun > limit:
            break
        for name, step in steps.items():
            time.sleep(PAUSE)
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds
