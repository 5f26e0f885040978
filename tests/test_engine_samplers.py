"""Samplers and wrappers against data whose best denoiser is known in closed form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.denoisers import dirac, gaussian, guided, inpainted
from engine.errors import UsageError
from engine.manifest import NoiseSchedule
from engine.model import clean_from
from engine.samplers import SAMPLERS, Denoiser, sample_ddim, sample_dpmpp_2m, sample_euler
from engine.schedule import karras_timesteps, make_schedule, timesteps

SCHEDULE = make_schedule(NoiseSchedule(start=0.0015, end=0.0195, steps=1000))
SHAPE = (2, 4, 3, 50, 2)
MEAN, SPREAD = 0.7, 0.4


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def gaussian_denoiser(mean: float | np.ndarray = MEAN, spread: float = SPREAD) -> Denoiser:
    """E[x0 | x_t] for x0 ~ N(mean, spread^2)."""

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.noise(t)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
        return (mean + gain * (x - alpha * mean)).astype(np.float32)

    return denoise


def flow(x: np.ndarray, start: int, end: float = 1.0) -> np.ndarray:
    """Where the probability flow of that Gaussian carries x from step `start` to abar = `end`, exactly."""

    def deviation(abar: float) -> float:
        return float(np.sqrt(abar * SPREAD**2 + 1 - abar))

    abar = SCHEDULE.alphas_cumprod[start]
    return np.sqrt(end) * MEAN + (x - np.sqrt(abar) * MEAN) * deviation(end) / deviation(abar)


def test_schedule_is_linear_in_the_square_root() -> None:
    betas = 1 - SCHEDULE.alphas_cumprod / np.concatenate([[1], SCHEDULE.alphas_cumprod[:-1]])
    assert betas[0] == pytest.approx(0.0015)
    assert betas[-1] == pytest.approx(0.0195)
    assert np.diff(np.sqrt(betas)) == pytest.approx(np.full(999, np.diff(np.sqrt(betas))[0]))


def test_timesteps_are_the_references() -> None:
    assert timesteps(SCHEDULE, 10).tolist() == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert timesteps(SCHEDULE, 200)[:3].tolist() == [1, 6, 11]
    assert timesteps(SCHEDULE, 1).tolist() == [999]
    assert timesteps(SCHEDULE, 1000)[-1] == 999
    assert len(timesteps(SCHEDULE, 30)) == 30


def test_karras_timesteps_span_the_schedule() -> None:
    path = karras_timesteps(SCHEDULE, 20)
    assert path[0] == 0
    assert path[-1] == 999
    assert (np.diff(path) > 0).all()
    steps = np.diff(SCHEDULE.sigmas[path] ** (1 / 7))
    assert steps.max() / steps.min() < 1.3
    assert karras_timesteps(SCHEDULE, 1).tolist() == [999]


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_a_number_of_steps_out_of_range(n: int) -> None:
    for choose in (timesteps, karras_timesteps):
        with pytest.raises(UsageError, match="1 to 1000"):
            choose(SCHEDULE, n)


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"), [(sample_dpmpp_2m, 40, 5e-3), (sample_euler, 200, 3e-2)]
)
def test_samplers_follow_the_exact_flow(
    sampler: Callable[..., np.ndarray], steps: int, tolerance: float
) -> None:
    x = noise()
    result = sampler(gaussian_denoiser(), x, SCHEDULE, steps=steps)
    assert result.dtype == np.float32
    assert np.abs(result - flow(x, 999)).max() < tolerance


def test_ddim_follows_the_exact_flow_to_step_zero() -> None:
    x = noise()
    result = sample_ddim(gaussian_denoiser(), x, SCHEDULE, steps=500)
    start = int(timesteps(SCHEDULE, 500)[-1])
    assert np.abs(result - flow(x, start, SCHEDULE.alphas_cumprod[0])).max() < 2e-2


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1.0), (sample_dpmpp_2m, 2.0)])
def test_order_of_convergence(sampler: Callable[..., np.ndarray], order: float) -> None:
    """Four times the steps divide the error by 4^order; more steps would meet the error of the last one."""
    x = noise()
    few, many = (
        np.abs(sampler(gaussian_denoiser(), x, SCHEDULE, steps=n) - flow(x, 999)).mean() for n in (10, 40)
    )
    assert np.log(few / many) / np.log(4) > order - 0.3


@pytest.mark.parametrize("name", SAMPLERS)
def test_certain_data_comes_out_exactly(name: str) -> None:
    clean = noise(3)
    result = SAMPLERS[name](lambda x, t: clean, noise(), SCHEDULE, steps=10)
    # DDIM stops at step 0, where the share of the noise is sqrt(beta_0).
    assert np.abs(result - clean).max() < (0.25 if name == "ddim" else 1e-6)


@pytest.mark.parametrize(("sampler", "eta"), [(sample_ddim, 1.0), (sample_ddim, 0.5), (sample_euler, 1.0)])
def test_fresh_noise_keeps_the_distribution(sampler: Callable[..., np.ndarray], eta: float) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 4, 10, 50, 2), np.float32)
    result = sampler(gaussian_denoiser(), x, SCHEDULE, steps=300, eta=eta, rng=rng)
    assert result.mean() == pytest.approx(MEAN, abs=0.03)
    assert result.std() == pytest.approx(SPREAD, rel=0.06)
    again = sampler(gaussian_denoiser(), x, SCHEDULE, steps=300, eta=eta, rng=rng)
    assert np.abs(result - again).mean() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_callback_counts_and_cancels(name: str, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    evaluations = 0

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        return gaussian_denoiser()(x, t)

    SAMPLERS[name](denoise, noise(), SCHEDULE, steps=steps, callback=lambda *now: seen.append(now))
    assert seen == [(done, steps) for done in range(steps + 1)]
    assert evaluations == steps

    def cancel(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    evaluations = 0
    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[name](denoise, noise(), SCHEDULE, steps=steps, callback=cancel)
    assert evaluations == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_leave_their_input_alone(name: str) -> None:
    x = noise()
    SAMPLERS[name](gaussian_denoiser(), x, SCHEDULE, steps=3, eta=0.5, rng=np.random.default_rng(0))
    assert np.array_equal(x, noise())


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("t", [0, 500, 999])
def test_clean_latents_from_every_prediction(prediction: str, t: int) -> None:
    clean, eps = noise(1), noise(2)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.noise(t)
    x = alpha * clean + sigma * eps
    output = {"eps": eps, "v": alpha * eps - sigma * clean, "x0": clean}[prediction]
    assert np.abs(clean_from(output, x, SCHEDULE, t, prediction) - clean).max() < 1e-4


def test_guidance() -> None:
    conditional, unconditional = gaussian_denoiser(1.0), gaussian_denoiser(0.2)
    x = noise()
    assert guided(conditional, unconditional, 1.0) is conditional
    assert np.array_equal(guided(conditional, unconditional, 0.0)(x, 400), unconditional(x, 400))
    expected = 3 * conditional(x, 400) - 2 * unconditional(x, 400)
    assert np.allclose(guided(conditional, unconditional, 3.0)(x, 400), expected, atol=1e-5)


def test_rescaled_guidance_is_no_louder() -> None:
    rng = np.random.default_rng(0)
    cond, uncond = (rng.standard_normal((2, 4, 3, 50, 1), np.float32) + shift for shift in (0.5, 0.0))
    pushed = guided(lambda x, t: cond, lambda x, t: uncond, 4.0)(cond, 0)
    held = guided(lambda x, t: cond, lambda x, t: uncond, 4.0, rescale=1.0)(cond, 0)
    half = guided(lambda x, t: cond, lambda x, t: uncond, 4.0, rescale=0.5)(cond, 0)
    assert pushed.std(3).mean() > 3 * cond.std(3).mean()
    assert np.allclose(held.mean(3), cond.mean(3), atol=1e-5)
    assert np.allclose(held.std(3), cond.std(3), rtol=1e-4)
    assert np.allclose(half, (held + pushed) / 2, atol=1e-5)
    turned = np.corrcoef(held.reshape(24, 50)[0], pushed.reshape(24, 50)[0])[0, 1]
    assert turned > 0.999, "the direction stays"


@pytest.mark.parametrize("name", SAMPLERS)
def test_inpainting_uses_what_is_known(name: str) -> None:
    """Where all stems are equal by the data's nature, the known one decides the others."""

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        # Perfectly correlated stems, unit variance: the mean over stems is the evidence.
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.noise(t)
        evidence = x.mean(axis=1, keepdims=True)
        return np.broadcast_to(evidence * alpha / (alpha**2 + sigma**2 / x.shape[1]), x.shape).astype(
            np.float32
        )

    known = np.repeat(noise(5)[:, :1], 4, axis=1)
    mask = np.ones((2, 4, 50), np.float32)
    mask[:, 3] = 0
    levels: list[float] = []

    def watched(x: np.ndarray, t: int) -> np.ndarray:
        levels.append(float(np.abs(x[:, :3] - SCHEDULE.alpha(t) * known[:, :3]).std() / SCHEDULE.noise(t)))
        return denoise(x, t)

    wrapped = inpainted(watched, known * mask[:, :, None, :, None], mask, SCHEDULE, noise(6))
    result = SAMPLERS[name](wrapped, noise(7), SCHEDULE, steps=30)
    assert np.corrcoef(result[:, 3].ravel(), known[:, 3].ravel())[0, 1] > 0.95
    assert np.ptp(levels) < 1e-3 * np.mean(levels)  # the same noise at every level
    assert np.array_equal(wrapped(noise(8), 500)[:, :3], known[:, :3])


def test_inpainting_per_frame() -> None:
    known, mask = noise(5), np.zeros((2, 4, 50), np.float32)
    mask[:, :, :20] = 1
    wrapped = inpainted(gaussian_denoiser(), known, mask, SCHEDULE, noise(6))
    result = wrapped(noise(7), 300)
    assert np.array_equal(result[:, :, :, :20], known[:, :, :, :20])
    assert np.array_equal(result[:, :, :, 20:], gaussian_denoiser()(noise(7), 300)[:, :, :, 20:])


def test_gaussian_posterior_is_msdms_formula() -> None:
    x, y, t = noise(), noise(9)[:, 0], 600
    sigma = float(SCHEDULE.sigmas[t])
    scaled = x / SCHEDULE.alpha(t)
    for gamma in (0.5, 1.0, 3.0):
        width = gamma * sigma
        pull = sigma**2 / (2 * width**2) * (y - scaled.sum(axis=1))
        expected = gaussian_denoiser()(x, t) + pull[:, None]
        result = gaussian(gaussian_denoiser(), y, SCHEDULE, gamma)(x, t)
        assert np.abs(result - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("constrained", [0, 3])
def test_dirac_posterior_is_msdms_formula(constrained: int) -> None:
    x, y, t = noise(), noise(9)[:, 0], 600
    alpha = SCHEDULE.alpha(t)
    scaled = x / alpha
    scaled[:, constrained] = 0
    scaled[:, constrained] = y - scaled.sum(axis=1)
    clean = gaussian_denoiser()(alpha * scaled, t)
    result = dirac(gaussian_denoiser(), y, SCHEDULE, constrained)(x, t)
    assert np.abs(result.sum(axis=1) - y).max() < 1e-4 * np.abs(result).max()
    for stem in set(range(4)) - {constrained}:
        expected = clean[:, stem] + scaled[:, constrained] - clean[:, constrained]
        assert np.abs(result[:, stem] - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("method", ["dirac", "gaussian"])
@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp_2m, sample_euler])
def test_posteriors_separate_sources_of_known_means(method: str, sampler: Callable[..., np.ndarray]) -> None:
    """Stems with different means: given their sum, each estimate follows its own stem."""
    means = np.array([2.0, -1.0, 0.5, 0.0], np.float32).reshape(1, 4, 1, 1, 1)
    stems = means + 0.3 * noise(11)
    mixture = stems.sum(axis=1)
    prior = gaussian_denoiser(means, 0.3)
    wrapped = dirac(prior, mixture, SCHEDULE) if method == "dirac" else gaussian(prior, mixture, SCHEDULE)
    result = sampler(wrapped, noise(12), SCHEDULE, steps=100)
    tolerance = 0.1 if method == "dirac" else 0.35
    assert np.abs(result.sum(axis=1) - mixture).std() < tolerance
    for stem in range(4):
        assert np.corrcoef(result[:, stem].ravel(), stems[:, stem].ravel())[0, 1] > 0.2
        assert result[:, stem].mean() == pytest.approx(float(means[0, stem, 0, 0, 0]), abs=0.2)
