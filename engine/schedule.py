"""Noise schedules and the timesteps a sampler visits.

With abar_t the product of (1 - beta) up to step t, a latent at step t is
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, equation 4). Over the same path,
x_t / sqrt(abar_t) has noise of standard deviation sigma_t = sqrt((1 - abar_t) / abar_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engine.errors import UsageError
from engine.manifest import NoiseSchedule

KARRAS_RHO = 7.0


@dataclass(frozen=True)
class Schedule:
    """alphas_cumprod: (steps,) float64, abar_t for t = 0 .. steps - 1, falling."""

    alphas_cumprod: NDArray[np.float64]

    @property
    def steps(self) -> int:
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """(steps,) standard deviation of the noise over that of the signal, rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def alpha(self, t: int) -> float:
        """sqrt(abar_t), the share of the signal."""
        return float(np.sqrt(self.alphas_cumprod[t]))

    def noise(self, t: int) -> float:
        """sqrt(1 - abar_t), the share of the noise."""
        return float(np.sqrt(1 - self.alphas_cumprod[t]))


def make_schedule(noise: NoiseSchedule) -> Schedule:
    """`linear_sqrt`: beta_t = (line from sqrt(start) to sqrt(end))^2 (Rombach et al. 2022)."""
    betas = np.linspace(np.sqrt(noise.start), np.sqrt(noise.end), noise.steps) ** 2
    return Schedule(np.cumprod(1 - betas, dtype=np.float64))


def timesteps(schedule: Schedule, n: int) -> NDArray[np.int64]:
    """(n,) rising int64 steps, evenly spaced from 1 as in the reference's DDIM: 1, 1 + T/n, 1 + 2T/n, ...

    A single step starts from the highest, since from 1 there would be nothing to remove.
    Raises UsageError unless 1 <= n <= T.
    """
    _check(schedule, n)
    if n == 1:
        return np.array([schedule.steps - 1])
    return np.minimum(np.arange(n) * (schedule.steps // n) + 1, schedule.steps - 1)


def karras_timesteps(schedule: Schedule, n: int) -> NDArray[np.int64]:
    """(<= n,) rising int64 steps whose sigmas are nearest to Karras et al. 2022, equation 5 (rho = 7).

    The model knows integer steps only; two that fall on one step count once.
    Raises UsageError unless 1 <= n <= T.
    """
    _check(schedule, n)
    low, high = schedule.sigmas[[0, -1]] ** (1 / KARRAS_RHO)
    wanted = np.linspace(high, low, n) ** KARRAS_RHO
    steps = np.interp(np.log(wanted), np.log(schedule.sigmas), np.arange(schedule.steps))
    return np.unique(np.round(steps).astype(np.int64))


def distilled_timesteps(schedule: Schedule, n: int) -> NDArray[np.int64]:
    """(n,) rising int64 steps of a distilled model: those of Karras et al., whose last step is to clean.

    Raises UsageError unless 1 <= n < T.
    """
    return karras_timesteps(schedule, n + 1)[1:]


def _check(schedule: Schedule, n: int) -> None:
    if not 1 <= n <= schedule.steps:
        raise UsageError(f"The number of steps must be 1 to {schedule.steps}, not {n}.")
