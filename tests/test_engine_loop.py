"""Sampling on the device: the step graphs compute what the numpy samplers do, on every path through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny_bundle import CHANNELS, FEW, SCHEDULE, STEMS, WEAK, WINDOW, write_tiny_bundle

from engine import loop, sessions
from engine.errors import BacklineError
from engine.loop import PASSES, Held, sample_on_device, step_graph_path
from engine.model import Model
from engine.samplers import SAMPLERS, linear_steps
from engine.schedule import Schedule, make_schedule
from engine.take import Settings, resolve
from engine.tasks import HEARD
from engine.windows import Known, sample_timeline

FILM = np.ones((1, 6), np.float32)


def schedule() -> Schedule:
    return make_schedule(SCHEDULE)


@examples(max_examples=40, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 30),
    eta=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_each_sampler_is_a_table(sampler: str, steps: int, eta: float, seed: int) -> None:
    weights = np.random.default_rng(seed).normal(0, 1, 1000)

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        return np.tanh(x * weights[t]).astype(np.float32)

    start = np.random.default_rng(seed).standard_normal((1, 2, 3), np.float32)
    expected = SAMPLERS[sampler](
        denoise, start, schedule(), steps=steps, eta=eta, rng=np.random.default_rng(1)
    )
    rng = np.random.default_rng(1)
    path, rows = linear_steps(sampler, schedule(), steps, eta)
    x, before = start.astype(np.float64), np.zeros_like(start)
    for t, (of_x, of_clean, of_previous, of_noise) in zip(path, rows, strict=True):
        clean = denoise(x.astype(np.float32), t)
        x = of_x * x + of_clean * clean + of_previous * before
        if of_noise > 0:
            x = x + of_noise * rng.standard_normal(x.shape, np.float32)
        before = clean
    assert np.abs(x - expected).max() < 1e-3 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("passes", PASSES)
def test_the_committed_step_graphs_are_what_the_exporter_writes(passes: int) -> None:
    from export.step_graph import step_graph

    assert onnx.load(step_graph_path(passes)) == step_graph(passes)


def context(rng: np.random.Generator, stem: int | None) -> Known:
    past = rng.normal(0, 1, (len(STEMS), CHANNELS, 10 * WINDOW, 1)).astype(np.float32)

    def known(start: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros((len(STEMS), frames), np.float32)
        if stem is not None:
            mask[stem] = 1
        return past[:, :, start : start + frames] * mask[:, None, :, None], mask

    return known


def both_ways(model: Model, settings: Settings, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The latents of two windows from the device and from the numpy sampler."""
    wraps: list[Any] = [None, lambda denoise, start, window: denoise]
    device, reference = (
        sample_timeline(
            model,
            WINDOW + 20,
            resolve(settings, model.manifest),
            known=context(np.random.default_rng(5), 1),
            report=lambda _: None,
            wrap=wrap,
            **kwargs,
        )
        for wrap in wraps
    )
    return device, reference


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_device_samples_as_numpy_does(tmp_path: Path, sampler: str, eta: float, prediction: str) -> None:
    model = Model.open(write_tiny_bundle(tmp_path / "b", prediction=prediction, **FEW), "cpu", 1)
    settings = Settings(seed=3, sampler=sampler, eta=eta, steps=6, listening=1.0)
    device, reference = both_ways(model, settings, conditions=lambda start, n: {})
    assert np.abs(device - reference).max() < 1e-3 * np.abs(reference).max()
    assert np.array_equal(device, both_ways(model, settings, conditions=lambda start, n: {})[0])


@pytest.mark.parametrize(("guidance", "listening"), [(2.5, 1.0), (1.0, 1.5), (2.5, 1.5), (0.0, 1.0)])
def test_guidance_on_the_device(tiny_model: Model, guidance: float, listening: float) -> None:
    heard = np.random.default_rng(1).normal(0, 1, (1, WINDOW + 20, 25)).astype(np.float32)
    settings = Settings(seed=4, guidance=guidance, listening=listening, steps=5)
    device, reference = both_ways(
        tiny_model,
        settings,
        conditions=lambda start, n: {"film": FILM, "chords": heard[:, start : start + n]},
        heard=("chords",),
    )
    assert np.abs(device - reference).max() < 1e-4 * np.abs(reference).max()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("in_numpy", [False, True])
def test_listening_by_a_weakened_prediction(tmp_path: Path, guidance: float, in_numpy: bool) -> None:
    """One step to clean latents, as Karras and others write it: on the device, and in numpy."""
    model = Model.open(write_tiny_bundle(tmp_path / "b", **WEAK), "cpu", 1)
    chords = np.random.default_rng(1).normal(0, 1, (1, WINDOW, 25)).astype(np.float32)
    settings = resolve(
        Settings(seed=4, guidance=guidance, listening=1.5, steps=1, sampler="euler"), model.manifest
    )
    wrap = (lambda denoise, start, window: denoise) if in_numpy else None
    made = sample_timeline(
        model, WINDOW, settings, known=context(np.random.default_rng(5), 1), heard=HEARD, wrap=wrap,
        conditions=lambda start, n: {"film": FILM, "chords": chords}, report=lambda _: None,
    )  # fmt: skip
    known, mask = context(np.random.default_rng(5), 1)(0, WINDOW)
    told = {"chords": chords, "context": (known * mask[:, None, :, None])[None], "context_mask": mask[None]}
    x = np.random.default_rng([4, 0]).standard_normal(made.shape, np.float32)[None]
    (last,), _ = linear_steps("euler", model.schedule, 1, 0.0)
    wide = mask[None, :, None, :, None]
    x = (1 - wide) * x + wide * (model.schedule.alpha(last) * known + model.schedule.noise(last) * x)
    free = []
    scale, kept = (np.float32(v)[:, None, None, None] for v in ([1.5, 1.5, 1.5, 3.0], [1, 1, 1, 0]))
    for prompt in ({"film": FILM}, {}):
        heard = model.denoiser(told | prompt)(x, last)
        weak = model.denoiser(prompt, asked="weakened")(x, last)
        pushed = weak + scale * (heard - weak)
        small = np.minimum(heard.std((3, 4), keepdims=True) / pushed.std((3, 4), keepdims=True), 1)
        like = heard.mean((3, 4), keepdims=True) + small * (pushed - pushed.mean((3, 4), keepdims=True))
        free.append(kept * like + (1 - kept) * pushed)
    expected = free[1] + guidance * (free[0] - free[1])
    expected = ((1 - wide) * expected + wide * known)[0]
    assert np.abs(made - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_unet_reads_what_the_step_graph_wrote(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first step and the last nothing is put on the device or taken from it."""
    moved: list[tuple[int, ...]] = []
    real = loop._fill
    monkeypatch.setattr(loop, "_fill", lambda value, array: (moved.append(array.shape), real(value, array)))
    x = np.zeros((1, len(STEMS), CHANNELS, 24, 1), np.float32)
    counts = []
    sample_on_device(
        tiny_model, x, [{}], sampler="ddim", steps=7, callback=lambda done, total: counts.append(len(moved))
    )
    assert len(counts) == 8
    assert len(set(counts)) == 1
    assert len(moved) == counts[0]


def test_cancelling_leaves_a_loop_that_can_be_used(tiny_model: Model) -> None:
    x = np.random.default_rng(0).standard_normal((2, len(STEMS), CHANNELS, 24, 1), np.float32)

    def run(callback: Any = None) -> np.ndarray:
        return sample_on_device(tiny_model, x, [{}], sampler="dpmpp_2m", steps=6, callback=callback)

    def cancel(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(cancel)
    assert np.array_equal(run(), whole)


def test_a_window_may_be_sampled_within_the_callback_of_another(tiny_model: Model) -> None:
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 1, len(STEMS), CHANNELS, 24, 1), np.float32)

    def run(start: np.ndarray, callback: Any = None) -> np.ndarray:
        return sample_on_device(tiny_model, start, [{}], sampler="euler", steps=5, callback=callback)

    first, second = run(x), run(other)
    inner: list[np.ndarray] = []

    def live(done: int, total: int) -> None:
        if done == 2:
            inner.append(run(other))

    assert np.array_equal(run(x, live), first)
    assert np.array_equal(inner[0], second)


def test_batched_windows_are_those_sampled_alone(tiny_model: Model) -> None:
    rng = np.random.default_rng(0)
    x, known, noise = rng.standard_normal((3, 3, len(STEMS), CHANNELS, 24, 1), np.float32)
    mask = (rng.random((3, len(STEMS), 24)) > 0.5).astype(np.float32)
    together = sample_on_device(
        tiny_model, x, [{}], held=Held(known, mask, noise), sampler="dpmpp_2m", steps=4
    )
    for i in range(3):
        part = slice(i, i + 1)
        held = Held(known[part], mask[part], noise[part])
        alone = sample_on_device(tiny_model, x[part], [{}], held=held, sampler="dpmpp_2m", steps=4)
        assert np.abs(alone[0] - together[i]).max() < 1e-4
        wide = mask[i][:, None, :, None]
        assert np.abs(wide * (alone[0] - known[i])).max() < 1e-6


def test_one_loop_is_kept(tiny_model: Model) -> None:
    for frames in (24, 32, 40):
        x = np.zeros((1, len(STEMS), CHANNELS, frames, 1), np.float32)
        sample_on_device(tiny_model, x, [{}], sampler="ddim", steps=2)
        assert len(tiny_model.loops) == 1


def test_options_for_a_gpu_are_chosen_without_one() -> None:
    unet = sessions.options_for("unet", sessions.CUDA, 8, cuda_graph=True)
    (first, values), (last, _) = unet.providers
    assert (first, last) == (sessions.CUDA, sessions.CPU)
    assert values["enable_cuda_graph"] == "1"
    assert values["arena_extend_strategy"] == "kSameAsRequested"
    assert values["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    assert all(isinstance(value, str) for value in values.values())
    vocoder = dict(sessions.options_for("vocoder", sessions.CUDA, 8, cuda_graph=True).providers)
    assert vocoder[sessions.CUDA]["enable_cuda_graph"] == "0"
    assert vocoder[sessions.CUDA]["use_tf32"] == "0"
    assert sessions.options_for("unet", sessions.CPU, 8).providers == ((sessions.CPU, {}),)
    assert sessions.options_for("step2", sessions.CPU, 8).threads == 1


def test_run_options_name_the_cuda_graph_and_shrink_the_arenas() -> None:
    assert sessions.run_config(sessions.CUDA) == {"gpu_graph_id": "-1"}
    assert sessions.run_config(sessions.CUDA, graph=3)["gpu_graph_id"] == "3"
    assert sessions.run_config(sessions.CPU, graph=3) == {}
    shrink = "memory.enable_memory_arena_shrinkage"
    assert sessions.run_config(sessions.CPU, shrink=True)[shrink] == "cpu:0"
    assert sessions.run_config(sessions.CUDA, shrink=True)[shrink] == "cpu:0;gpu:0"


def test_where_nodes_run_is_known(tiny_model: Model) -> None:
    nodes = sessions.nodes_by_provider(tiny_model.session("unet"))
    assert set(nodes) == {sessions.CPU}
    assert nodes[sessions.CPU]["Einsum"] > 0
    assert "Einsum" in sessions.left_on_cpu(nodes)
    assert "Shape" not in sessions.left_on_cpu(nodes)


def test_a_cuda_graph_that_onnxruntime_refuses_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but that the sessions run on the CPU: what is asked for first and what then."""
    asked, start = [], sessions.start
    plain = sessions.options_for("unet", sessions.CPU, 1)

    def refusing(path: Path, options: sessions.Options) -> Any:
        cuda = dict(options.providers).get(sessions.CUDA, {})
        asked.append(cuda.get("enable_cuda_graph"))
        if asked[-1] == "1":
            raise BacklineError("a node is on the CPU")
        return start(path, plain)

    monkeypatch.setattr(sessions, "start", refusing)
    monkeypatch.setattr(Model, "_wanted_provider", lambda self, onnxruntime: sessions.CUDA)
    model = Model.open(write_tiny_bundle(tmp_path / "tiny"), "cuda", 1, cuda_graph=True)
    assert asked == ["1", "0"]
    assert model.warnings[0] == "No CUDA graph: a node is on the CPU"
