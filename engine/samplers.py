"""Samplers as free functions of one signature over numpy arrays.

`denoise(x, t)` takes variance-preserving latents (B, S, Z, T, F) at int step t and returns the predicted
clean latents. `x` starts as noise of unit variance and the clean latents come back.
`callback(done, total)` is called before the first step and after each one, and raises to cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.schedule import Schedule, distilled_timesteps, karras_timesteps, timesteps

FloatArray = NDArray[np.float32]
Denoiser = Callable[[FloatArray, int], FloatArray]
StepCallback = Callable[[int, int], None]


def sample_ddim(
    denoise: Denoiser,
    x: FloatArray,
    schedule: Schedule,
    *,
    steps: int,
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    """DDIM (Song et al. 2021, equation 12, with sigma of equation 16), down to step 0.

    eta 0 is deterministic, eta 1 is DDPM and needs `rng`. Like the reference it stops at step 0, whose
    noise share is sqrt(beta_0) and not zero.
    """
    path = [int(t) for t in timesteps(schedule, steps)[::-1]]
    report(callback, 0, len(path))
    for i, t in enumerate(path):
        before = path[i + 1] if i + 1 < len(path) else 0
        clean = denoise(x, t)
        noise = (x - schedule.alpha(t) * clean) / schedule.noise(t)
        sigma = eta * schedule.noise(before) / schedule.noise(t)
        sigma *= float(np.sqrt(1 - schedule.alphas_cumprod[t] / schedule.alphas_cumprod[before]))
        direction = float(np.sqrt(max(0.0, schedule.noise(before) ** 2 - sigma**2)))
        x = (schedule.alpha(before) * clean + direction * noise).astype(np.float32, copy=False)
        if sigma > 0 and rng is not None:
            x += sigma * rng.standard_normal(x.shape, np.float32)
        report(callback, i + 1, len(path))
    return x


def sample_dpmpp_2m(
    denoise: Denoiser,
    x: FloatArray,
    schedule: Schedule,
    *,
    steps: int,
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), on Karras' steps; deterministic, so eta is not used.

    In x / alpha the exponential integrator of the paper reads, with lambda = -log sigma and
    h = lambda_next - lambda: x_next = (sigma_next / sigma) x + (1 - exp(-h)) D. The last step goes to
    sigma = 0 and is therefore of first order.
    """
    path = [int(t) for t in karras_timesteps(schedule, steps)[::-1]]
    scaled = x / schedule.alpha(path[0])
    previous: FloatArray | None = None
    previous_h = 0.0
    report(callback, 0, len(path))
    for i, (t, after) in enumerate(pairwise(path)):
        clean = denoise(schedule.alpha(t) * scaled, t)
        sigma, sigma_after = float(schedule.sigmas[t]), float(schedule.sigmas[after])
        h = float(np.log(sigma / sigma_after))
        estimate = clean if previous is None else clean + h / (2 * previous_h) * (clean - previous)
        scaled = (sigma_after / sigma) * scaled - float(np.expm1(-h)) * estimate
        previous, previous_h = clean, h
        report(callback, i + 1, len(path))
    clean = denoise(schedule.alpha(path[-1]) * scaled, path[-1])
    report(callback, len(path), len(path))
    return clean


def sample_euler(
    denoise: Denoiser,
    x: FloatArray,
    schedule: Schedule,
    *,
    steps: int,
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    """Euler's method on dx / dsigma = (x - D) / sigma (Karras et al. 2022, algorithm 1, uncorrected).

    eta > 0 makes it ancestral: a share of each step's noise is drawn anew from `rng`. The last step goes
    to sigma = 0, where Euler's step is the prediction itself.
    """
    return _euler(denoise, x, schedule, karras_timesteps(schedule, steps), eta, rng, callback)


def _euler(
    denoise: Denoiser,
    x: FloatArray,
    schedule: Schedule,
    rising: NDArray[np.int64],
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    path = [int(t) for t in rising[::-1]]
    scaled = x / schedule.alpha(path[0])
    report(callback, 0, len(path))
    for i, (t, after) in enumerate(pairwise(path)):
        clean = denoise(schedule.alpha(t) * scaled, t)
        sigma, sigma_after = float(schedule.sigmas[t]), float(schedule.sigmas[after])
        fresh = eta * sigma_after * float(np.sqrt(max(0.0, 1 - (sigma_after / sigma) ** 2)))
        down = float(np.sqrt(sigma_after**2 - fresh**2))
        scaled = clean + (down / sigma) * (scaled - clean)
        if fresh > 0 and rng is not None:
            scaled += fresh * rng.standard_normal(x.shape, np.float32)
        report(callback, i + 1, len(path))
    clean = denoise(schedule.alpha(path[-1]) * scaled, path[-1])
    report(callback, len(path), len(path))
    return clean


def sample_distilled(
    denoise: Denoiser,
    x: FloatArray,
    schedule: Schedule,
    *,
    steps: int,
    eta: float = 0.0,
    rng: np.random.Generator | None = None,
    callback: StepCallback | None = None,
) -> FloatArray:
    """The long steps of a distilled model: Euler's, which are DDIM's, with a last one straight to clean.

    Deterministic, so eta is not used.
    """
    return _euler(denoise, x, schedule, distilled_timesteps(schedule, steps), callback=callback)


def linear_steps(
    sampler: str, schedule: Schedule, steps: int, eta: float = 0.0
) -> tuple[list[int], NDArray[np.float64]]:
    """The same samplers as numbers: the steps visited, and (steps, 4) coefficients of each one's update.

    The next x is the sum of x, the clean prediction, the one of the step before and fresh unit noise, weighed
    by these four. The last update gives what the sampler returns.
    """
    if sampler == "ddim":
        path = [int(t) for t in timesteps(schedule, steps)[::-1]]
        return path, np.array([_ddim_update(schedule, t, b, eta) for t, b in pairwise([*path, 0])])
    rising = karras_timesteps(schedule, steps)
    if sampler == "distilled":
        sampler, eta, rising = "euler", 0.0, distilled_timesteps(schedule, steps)
    path = [int(t) for t in rising[::-1]]
    rows = []
    before = 0.0
    for t, after in pairwise(path):
        sigma, sigma_after = float(schedule.sigmas[t]), float(schedule.sigmas[after])
        h = float(np.log(sigma / sigma_after))
        if sampler == "euler":
            fresh = eta * sigma_after * float(np.sqrt(max(0.0, 1 - (sigma_after / sigma) ** 2)))
            down = float(np.sqrt(sigma_after**2 - fresh**2))
            row = np.array([down / sigma / schedule.alpha(t), 1 - down / sigma, 0.0, fresh])
        else:
            weight, ahead = -float(np.expm1(-h)), h / (2 * before) if before else 0.0
            row = np.array(
                [sigma_after / sigma / schedule.alpha(t), weight * (1 + ahead), -weight * ahead, 0.0]
            )
            before = h
        rows.append(schedule.alpha(after) * row)
    return path, np.array([*rows, [0.0, 1.0, 0.0, 0.0]])


def _ddim_update(schedule: Schedule, t: int, before: int, eta: float) -> list[float]:
    sigma = eta * schedule.noise(before) / schedule.noise(t)
    sigma *= float(np.sqrt(1 - schedule.alphas_cumprod[t] / schedule.alphas_cumprod[before]))
    direction = float(np.sqrt(max(0.0, schedule.noise(before) ** 2 - sigma**2)))
    kept = direction / schedule.noise(t)
    return [kept, schedule.alpha(before) - kept * schedule.alpha(t), 0.0, sigma]


SAMPLERS: dict[str, Callable[..., FloatArray]] = {
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler": sample_euler,
    "distilled": sample_distilled,
}


def report(callback: StepCallback | None, done: int, total: int) -> None:
    if callback is not None:
        callback(done, total)
