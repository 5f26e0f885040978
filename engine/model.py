"""The networks of a bundle as ONNX sessions, spoken to in numpy."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engine import sessions
from engine.batching import is_shared, run_shared, turn
from engine.bundle import Bundle, load_bundle
from engine.errors import BacklineError, UsageError
from engine.manifest import Manifest
from engine.samplers import Denoiser
from engine.schedule import Schedule, make_schedule

FloatArray = NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda"]
Conditions = Mapping[str, FloatArray]
Asked = Literal["ordinary", "distilled", "weakened"]  # which of its predictions the UNet is asked for

log = logging.getLogger("backline.engine")

PROVIDERS = {"cpu": sessions.CPU, "cuda": sessions.CUDA}
# The UNet's inputs beside latents and timestep, by what declares them.
CONTEXT_INPUTS = ("context", "context_mask")
MIXTURE_INPUTS = ("mixture", "mixture_mask", "mixture_stems")
OUTPUTS = {
    "unet": "prediction",
    "vae_encoder": "moments",
    "vae_decoder": "mel",
    "vocoder": "audio",
    "clap_text": "embedding",
    "clap_audio": "embedding",
    "separator": "masks",
}
GRAPHS = Path(__file__).parent / "graphs"  # what a bundle does not hold: the step graphs of engine.loop
BATCH = 8  # windows or stems a graph is given at a time, so that memory stays bounded


class Model:
    """One bundle, opened. Sessions start when they are first needed; open with `Model.open`.

    manifest: what the bundle declares. schedule: its noise schedule. provider: the execution provider
    that onnxruntime really gave. warnings: sentences for the user, such as a fall back to the CPU.
    """

    def __init__(self, bundle: Bundle, device: Device, threads: int, cuda_graph: bool = False):
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.schedule: Schedule = make_schedule(bundle.manifest.schedule)
        self.device = device
        self.threads = threads
        self.cuda_graph = cuda_graph
        self.warnings: list[str] = []
        self.seconds_loading = 0.0
        self.loops: dict[Any, Any] = {}  # buffers of engine.loop that wait for the next window
        self._sessions: dict[str, Any] = {}
        self._starting = threading.RLock()  # jobs in several threads may need one at the same time
        self._tokenizer: Any = None

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        device: Device = "auto",
        threads: int | None = None,
        *,
        cuda_graph: bool = False,
    ) -> Model:
        """Checks the bundle (None: the embedded default) and starts its UNet.

        threads: onnxruntime's, by default the cores this process may use. cuda_graph: on a GPU, record the
        UNet's kernels once per window shape and replay them, where onnxruntime allows it.

        Raises BacklineError as `load_bundle`, and where onnxruntime is missing or a graph does not fit the
        manifest.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"There is no device {device!r}: choose auto, cpu or cuda.")
        if threads is not None and threads < 1:
            raise UsageError(f"The number of threads must be at least 1, not {threads}.")
        started = time.perf_counter()
        model = cls(load_bundle(path), device, threads or available_cores(), cuda_graph)
        check_unet_inputs(model.manifest, model.inputs("unet"))
        model.seconds_loading = time.perf_counter() - started
        return model

    @property
    def provider(self) -> str:
        return str(self.session("unet").get_providers()[0])

    def supports(self, capability: str) -> bool:
        return capability in self.manifest.capabilities

    def inputs(self, graph: str) -> dict[str, list[int | str | None]]:
        """Input names and shapes of a graph, as onnxruntime reports them."""
        return {i.name: i.shape for i in self.session(graph).get_inputs()}

    def encode(self, log_mels: FloatArray) -> FloatArray:
        """(N, frames, mels) -> (N, Z, T, F), the means, scaled as the UNet sees them."""
        parts = [self._run("vae_encoder", mel=part[:, None]) for part in _tiles(log_mels)]
        means = np.concatenate(parts)[:, : self.manifest.latent.channels]
        return means * self.manifest.latent.scale_factor

    def decode(self, latents: FloatArray) -> FloatArray:
        """(N, Z, T, F), scaled -> log mel (N, frames, mels)."""
        unscaled = latents / self.manifest.latent.scale_factor
        return np.concatenate([self._run("vae_decoder", latents=part) for part in _tiles(unscaled)])[:, 0]

    def vocode(self, log_mels: FloatArray) -> FloatArray:
        """(N, frames, mels) -> (N, frames * vocoder.hop) at the vocoder's rate."""
        parts = [self._run("vocoder", mel=part.transpose(0, 2, 1)) for part in _tiles(log_mels)]
        return np.concatenate(parts)[:, 0, : log_mels.shape[1] * self.manifest.vocoder.hop]

    def separate(self, magnitudes: FloatArray) -> FloatArray:
        """Masks (S, frames, bins) for a mix's magnitudes (frames, bins), as manifest.separator says."""
        return self._run("separator", mixture=magnitudes[None])[0]

    def embed_text(self, text: str) -> FloatArray:
        """(1, E). Raises UsageError where the bundle takes no text."""
        if not self.supports("text") or self.manifest.clap is None or self.manifest.clap.tokenizer is None:
            raise UsageError(f"The model {self.manifest.name} takes no text prompt.")
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(
                self.bundle, self.manifest.clap.tokenizer, self.manifest.clap.max_tokens
            )
        encoded = self._tokenizer.encode(text)
        ids = np.array([encoded.ids], np.int64)
        attention = np.array([encoded.attention_mask], np.int64)
        return self._run("clap_text", input_ids=ids, attention_mask=attention)

    def embed_audio(self, **inputs: FloatArray) -> FloatArray:
        """`mel` (B, 1, frames, mels) or `audio` (B, samples), as manifest.clap says -> (B, E)."""
        return self._run("clap_audio", **inputs)

    def denoiser(self, conditions: Conditions, *, asked: Asked = "ordinary") -> Denoiser:
        """The UNet under these conditions, as a function of (x, t) that returns clean latents.

        conditions: the UNet's inputs by name (shapes in the design); one that is left out is unknown:
        zeros, and `film_uncond` for film. The constant inputs are bound to the device once. asked: for the
        predictions of manifest.distilled or manifest.weakened, see `told_timestep`.
        """
        predict = self._bound_unet(conditions)
        prediction = self.manifest.prediction
        schedule = self.schedule

        def denoise(x: FloatArray, t: int) -> FloatArray:
            return clean_from(predict(x, self.told_timestep(t, asked)), x, schedule, t, prediction)

        return denoise

    def told_timestep(self, t: int, asked: Asked) -> int:
        """The UNet's `timestep` at step t: others than the ordinary are asked for past the schedule's end."""
        return t + self.schedule.steps * get_args(Asked).index(asked)

    def predict(self, x: FloatArray, t: int, conditions: Conditions) -> FloatArray:
        """The UNet's own output (eps, v or x0), (B, S, Z, T, F)."""
        return self._bound_unet(conditions)(x, t)

    def condition_inputs(self, conditions: Conditions, shape: tuple[int, ...]) -> dict[str, FloatArray]:
        """The UNet's inputs beside latents (of this shape) and timestep; what is not told is unknown.

        Raises BacklineError for a condition that the UNet has no input for.
        """
        return {name: self._condition(name, conditions, shape) for name in self._condition_names(conditions)}

    def _condition_names(self, conditions: Conditions) -> list[str]:
        names = set(self.inputs("unet")) - {"latents", "timestep"}
        unknown = set(conditions) - names
        if unknown:
            raise BacklineError(f"The model {self.manifest.name} has no input {', '.join(sorted(unknown))}.")
        return sorted(names)

    def device_value(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """An OrtValue on the device that the UNet runs on, not yet filled."""
        import onnxruntime

        device = "cuda" if self.provider == PROVIDERS["cuda"] else "cpu"
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype.type, device, 0)

    def run_options(self, *, graph: int | None = None, shrink: bool = False) -> Any:
        """onnxruntime's options of one run, see `sessions.run_config`."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        for key, value in sessions.run_config(self.provider, graph=graph, shrink=shrink).items():
            options.add_run_config_entry(key, value)
        return options

    def session(self, graph: str) -> Any:
        """The InferenceSession of a graph of the bundle, or of a step graph (engine.loop); started once."""
        with self._starting:
            if graph not in self._sessions:
                self._sessions[graph] = self._start(graph)
            return self._sessions[graph]

    def _bound_unet(self, conditions: Conditions) -> Callable[[FloatArray, int], FloatArray]:
        session = self.session("unet")
        self._condition_names(conditions)  # refuses what it does not know before anything runs
        binding = session.io_binding()
        bound: dict[str, Any] = {}
        shape: tuple[int, ...] = ()

        def bind(name: str, array: NDArray[Any]) -> None:
            bound[name] = self.device_value(array.shape, array.dtype)
            bound[name].update_inplace(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, bound[name])

        def predict(x: FloatArray, t: int) -> FloatArray:
            nonlocal shape
            latents = np.ascontiguousarray(x, np.float32)
            step = np.full(x.shape[0], t, np.int64)
            if is_shared():
                told = self.condition_inputs(conditions, x.shape)
                return run_shared(self._run_unet, {"latents": latents, "timestep": step, **told})
            if shape != x.shape:  # the first call
                shape = x.shape
                for name, value in self.condition_inputs(conditions, shape).items():
                    bind(name, value)
                bind("latents", latents)
                bind("timestep", step)
                bound["prediction"] = self.device_value(shape, latents.dtype)
                binding.bind_ortvalue_output("prediction", bound["prediction"])
            bound["latents"].update_inplace(latents)
            bound["timestep"].update_inplace(step)
            with turn():
                session.run_with_iobinding(binding, self.run_options())
            return np.array(bound["prediction"].numpy())

        return predict

    def _condition(self, name: str, conditions: Conditions, shape: tuple[int, ...]) -> FloatArray:
        batch, stems, channels, frames, freq = shape
        if name == "film" and name not in conditions:
            value = np.array([self.manifest.film_uncond], np.float32)
        elif name in conditions:
            value = conditions[name].astype(np.float32, copy=False)
        else:
            value = np.zeros(
                {
                    "context": (1, stems, channels, frames, freq),
                    "context_mask": (1, stems, frames),
                    "mixture": (1, channels, frames, freq),
                    "mixture_mask": (1, frames),
                    "mixture_stems": (1, stems),
                    "grid": (1, frames, 6),
                    "chords": (1, frames, 25),
                }[name],
                np.float32,
            )
        return np.broadcast_to(value, (batch, *value.shape[1:]))

    def _run(self, graph: str, **inputs: NDArray[Any]) -> FloatArray:
        session = self.session(graph)
        feeds = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        with turn():
            # A job ends with the vocoder, whose run gives the arenas' free memory back.
            options = self.run_options(shrink=graph == "vocoder")
            return np.asarray(session.run([OUTPUTS[graph]], feeds, options)[0], np.float32)

    def _run_unet(self, feeds: Mapping[str, NDArray[Any]]) -> FloatArray:
        """For engine.batching, which waits for the turn itself."""
        session, options = self.session("unet"), self.run_options()
        return np.asarray(session.run([OUTPUTS["unet"]], dict(feeds), options)[0], np.float32)

    def _start(self, graph: str) -> Any:
        if graph.startswith("step"):
            path = GRAPHS / f"{graph}.onnx"
        else:
            path = self.bundle.path(f"{graph}.onnx")
        wanted = self._wanted_provider(sessions.import_onnxruntime())
        session = self._start_session(graph, path, wanted)
        if session.get_providers()[0] != wanted:
            self._warn("The GPU could not be used by onnxruntime: this runs on the CPU.")
        elif wanted == PROVIDERS["cuda"]:
            left = sessions.left_on_cpu(sessions.nodes_by_provider(session))
            if left:
                self._warn(f"Parts of {graph}.onnx run on the CPU beside the GPU: {', '.join(left[:5])}.")
        if graph in OUTPUTS and OUTPUTS[graph] not in {output.name for output in session.get_outputs()}:
            raise BacklineError(f"{path} does not fit: it has no output {OUTPUTS[graph]}.")
        return session

    def _start_session(self, graph: str, path: Path, wanted: str) -> Any:
        plain = sessions.options_for(graph, wanted, self.threads)
        recorded = sessions.options_for(graph, wanted, self.threads, cuda_graph=self.cuda_graph)
        if recorded == plain:
            return sessions.start(path, plain)
        try:
            return sessions.start(path, recorded)
        except BacklineError as error:
            self._warn(f"No CUDA graph: {error}")
            return sessions.start(path, plain)

    def _wanted_provider(self, onnxruntime: Any) -> str:
        if self.device == "cpu":
            return PROVIDERS["cpu"]
        if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
            return PROVIDERS["cuda"]
        if self.device == "cuda":
            self._warn("This onnxruntime has no CUDA (install the extra 'gpu'): this runs on the CPU.")
        return PROVIDERS["cpu"]

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            log.warning(sentence)


def clean_from(output: FloatArray, x: FloatArray, schedule: Schedule, t: int, prediction: str) -> FloatArray:
    """The clean latents behind a network's output.

    eps: Ho et al. 2020, equation 4 solved for x_0. v: Salimans and Ho 2022, v = alpha eps - sigma x_0.
    """
    alpha, noise = schedule.alpha(t), schedule.noise(t)
    if prediction == "eps":
        return ((x - noise * output) / alpha).astype(np.float32, copy=False)
    if prediction == "v":
        return (alpha * x - noise * output).astype(np.float32, copy=False)
    return np.array(output)


def check_unet_inputs(manifest: Manifest, inputs: Mapping[str, Any]) -> None:
    """Raises BacklineError where the UNet's inputs are not those that the manifest's capabilities promise."""
    required = {"latents", "timestep"}
    required |= {"film"} if manifest.film_dim is not None else set()
    required |= set(CONTEXT_INPUTS) if "context" in manifest.capabilities else set()
    required |= {"mixture", "mixture_mask"} if "mixture" in manifest.capabilities else set()
    required |= {name for name in ("grid", "chords") if name in manifest.capabilities}
    optional = {"mixture_stems"} if "mixture" in manifest.capabilities else set()
    missing, unknown = required - set(inputs), set(inputs) - required - optional
    if missing:
        raise BacklineError(
            f"The model {manifest.name} does not fit: its UNet has no input {', '.join(sorted(missing))}."
        )
    if unknown:
        names = ", ".join(sorted(unknown))
        raise BacklineError(
            f"The model {manifest.name} does not fit: its UNet has an undeclared input {names}."
        )


def available_cores() -> int:
    """Cores this process may really use: its affinity, and its control group's quota where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        return max(1, cores)


def _tiles(batch: FloatArray) -> list[FloatArray]:
    return [batch[start : start + BATCH] for start in range(0, len(batch), BATCH)]


def _load_tokenizer(bundle: Bundle, name: str, max_tokens: int) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(bundle.path(name)))
    except BacklineError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise BacklineError(f"The tokenizer of the model {bundle.manifest.name} cannot be read.") from error
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
