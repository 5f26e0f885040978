"""One line of the table: a figure, how sure it is, and what it must be read against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.metrics import Array

Chosen = NDArray[np.integer]  # numbers of windows
ROUNDS = 1000  # of the bootstrap
Tick = Callable[[float], None]  # fraction of a part; raises to cancel


@dataclass(frozen=True)
class Figure:
    """value: None where it was not measured, `note` says why. n: windows (songs) it was measured on.

    ceiling, floor: the same measure of what is best and worst possible, by name. bar: what it must reach,
    from above or, where `lower`, from below. peer: the row is another system's.
    """

    part: str
    name: str
    value: float | None
    interval: tuple[float, float] | None = None
    n: int = 0
    unit: str = ""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    bar: float | None = None
    lower: bool = False
    peer: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without a bar or a value."""
        if self.bar is None or self.value is None:
            return None
        return self.value <= self.bar if self.lower else self.value >= self.bar

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"met": self.met}


def bootstrap(
    statistic: Callable[[Chosen], float], n: int, rounds: int = ROUNDS, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic of window numbers (n,), drawn with replacement (Efron 1979)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(n, size=n)) for _ in range(rounds)]
    return float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975))


def of_means(part: str, name: str, values: Array, **about: Any) -> Figure:
    """The figure that is the mean of one value per window (NaN: not scored), with its interval."""
    values = np.asarray(values, np.float64)
    scored = values[~np.isnan(values)]
    if not len(scored):
        return missing(part, name, "no window could be scored", **about)
    interval = bootstrap(lambda chosen: float(scored[chosen].mean()), len(scored))
    return Figure(part, name, float(scored.mean()), interval, len(scored), **about)


def missing(part: str, name: str, why: str, **about: Any) -> Figure:
    """A line for what was not measured."""
    return Figure(part, name, None, note=why, **{k: v for k, v in about.items() if k != "note"})
