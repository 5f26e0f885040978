"""Functions that wrap a denoiser and return a denoiser, so that they combine.

A denoiser is `denoise(x, t) -> clean` over latents (B, S, Z, T, F) at int step t; see engine.samplers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.samplers import Denoiser
from engine.schedule import Schedule

FloatArray = NDArray[np.float32]


def guided(
    denoise: Denoiser,
    unconditional: Denoiser,
    scale: float | FloatArray,
    *,
    rescale: float | FloatArray = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6): uncond + scale (cond - uncond).

    The clean prediction is affine in eps and in v, so guidance is the same in any of them. A scale of
    1 is `denoise` itself and spares the second pass. rescale: how far each channel of a stem goes back to the
    mean and deviation that it has in cond, 0 not at all .. 1 wholly (Lin and others 2024, section 3.4, who
    have one deviation for all): guidance then changes what is played and not how loud. Either may be of shape
    (S, 1, 1, 1), one for each stem.
    """
    if np.all(scale == 1.0):
        return denoise

    def denoise_guided(x: FloatArray, t: int) -> FloatArray:
        base = unconditional(x, t)
        clean = denoise(x, t)
        pushed = base + scale * (clean - base)
        return pushed + rescale * (_like(pushed, clean) - pushed) if np.any(rescale) else pushed

    return denoise_guided


def _like(x: FloatArray, model: FloatArray) -> FloatArray:
    """x (B, S, Z, T, F) with the mean and deviation over time that `model` has, channel by channel."""
    axes = (3, 4)
    x = x - x.mean(axes, keepdims=True)
    scale = model.std(axes, keepdims=True) / np.maximum(x.std(axes, keepdims=True), 1e-6)
    return model.mean(axes, keepdims=True) + np.minimum(scale, 1.0) * x


def inpainted(
    denoise: Denoiser, known: FloatArray, mask: FloatArray, schedule: Schedule, noise: FloatArray
) -> Denoiser:
    """Arrangement by inpainting, as the reference does it: before each step the known latents, noised to
    that step's level with one fixed `noise`, replace what the sampler holds there.

    known, noise: (B, S, Z, T, F). mask: (B, S, T), 1 where known. The prediction is `known` there.
    """
    wide = mask[:, :, None, :, None].astype(np.float32)
    free = 1 - wide
    held, held_noise = wide * known, wide * noise

    def denoise_inpainted(x: FloatArray, t: int) -> FloatArray:
        arranged = free * x + schedule.alpha(t) * held + schedule.noise(t) * held_noise
        return free * denoise(arranged, t) + held

    return denoise_inpainted


def gaussian(denoise: Denoiser, mixture: FloatArray, schedule: Schedule, gamma: float = 1.0) -> Denoiser:
    """MSDM's Gaussian posterior (arXiv:2302.02257): p(y | x) = N(y; sum x_n, gamma(t)^2 I).

    D'_n = D_n + sigma^2 / (2 gamma(t)^2) (y - sum x_n), for x in units of the clean signal, with
    gamma(t) = gamma * sigma(t) as in the authors' `differential_with_gaussian`.
    mixture: (B, Z, T, F), the mix's scaled latents. Encoding is not linear: y = sum x_n is an approximation.
    """

    def denoise_gaussian(x: FloatArray, t: int) -> FloatArray:
        missing = mixture - x.sum(axis=1) / schedule.alpha(t)
        return denoise(x, t) + missing[:, None] / (2 * gamma**2)

    return denoise_gaussian


def dirac(denoise: Denoiser, mixture: FloatArray, schedule: Schedule, constrained: int = 0) -> Denoiser:
    """MSDM's Dirac posterior (arXiv:2302.02257, algorithm 1): the stems sum to the mixture at every level.

    The constrained stem k is x_k = y - sum of the others. The posterior score of the others is
    S_j - S_k, so D'_j = D_j + x_k - D_k, and D'_k = y - sum D'_j; x in units of the clean signal.
    mixture: (B, Z, T, F), the mix's scaled latents. Encoding is not linear: y = sum x_n is an approximation.
    """

    def denoise_dirac(x: FloatArray, t: int) -> FloatArray:
        alpha = schedule.alpha(t)
        others = x.sum(axis=1) - x[:, constrained]
        remainder = mixture - others / alpha
        bound = x.copy()
        bound[:, constrained] = alpha * remainder
        clean = denoise(bound, t)
        clean = clean + (remainder - clean[:, constrained])[:, None]
        clean[:, constrained] = 0
        clean[:, constrained] = mixture - clean.sum(axis=1)
        return clean

    return denoise_dirac
