"""Imported models against the reference implementation's own numbers, in torch and in onnxruntime."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest
import torch
from command import backline
from numpy.typing import NDArray
from reference_model import parity_folder, release_yaml

from engine.bundle import load_bundle
from engine.denoisers import guided, inpainted
from engine.features import hann, log_mel, mel_filterbank
from engine.manifest import Manifest, Mel
from engine.model import Model, clean_from
from engine.samplers import Denoiser, sample_ddim
from engine.schedule import make_schedule, timesteps
from export.checkpoint import open_checkpoint
from export.import_checkpoint import import_checkpoint, read_unet, read_vae, read_vocoder
from export.onnx_writer import relative_error
from export.reference_config import read_config
from export.tensor_source import Source

Array = NDArray[np.float32]
MODELS = ("film", "uncond")
FLOAT32, FLOAT16 = 1e-4, 2e-2


@dataclass(frozen=True)
class Reimplementation:
    """One imported model: functions over numpy, whatever runs behind them."""

    reference: dict[str, Array]
    manifest: Manifest
    limit: float
    moments: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    vocode: Callable[[Array], Array]
    predict: Callable[[Array, int, Array | None], Array]

    def denoiser(self, film: str | None) -> Denoiser:
        schedule = make_schedule(self.manifest.schedule)
        condition = None if film is None else self.reference[film]

        def denoise(x: Array, t: int) -> Array:
            return clean_from(self.predict(x, t, condition), x, schedule, t, self.manifest.prediction)

        return denoise

    def check(self, ours: Array, name: str) -> None:
        theirs = self.reference[name]
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= self.limit, name


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundles(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> the imported bundle, made once."""
    folder = parity_folder() / kind
    out = tmp_path_factory.mktemp(kind)

    def bundle(precision: Literal["fp32", "fp16", "fp16-compute"]) -> Path:
        if not (out / precision).exists():
            summary = import_checkpoint(
                folder / "last.ckpt", folder / "config.json", out / precision, precision=precision
            )
            left = [name for name in summary.unused if not name.startswith(("model.", "model_ema."))]
            assert not left and not summary.foreign
        return out / precision

    return bundle


@pytest.fixture(
    scope="module", params=["torch", "onnxruntime", "onnxruntime-fp16", "onnxruntime-fp16-compute"]
)
def model(request: pytest.FixtureRequest, kind: str, bundles: Callable[[str], Path]) -> Reimplementation:
    folder = parity_folder() / kind
    reference = dict(np.load(folder / "reference.npz"))
    if request.param == "torch":
        return _in_torch(folder, reference, Model.open(bundles("fp32"), "cpu").manifest)
    if request.param == "onnxruntime":
        return _in_onnxruntime(bundles("fp32"), reference, FLOAT32)
    return _in_onnxruntime(bundles(request.param.removeprefix("onnxruntime-")), reference, FLOAT16)


def _in_torch(folder: Path, reference: dict[str, Array], manifest: Manifest) -> Reimplementation:
    config = read_config(folder / "config.json")
    with open_checkpoint(folder / "last.ckpt") as checkpoint:
        source = Source(checkpoint, checkpoint.tensors("state_dict"))
        unet, vae, vocoder = (
            read_unet(source, config, "ema"),
            read_vae(source, config),
            read_vocoder(source, config),
        )

    def run(function: Callable[..., torch.Tensor], *arrays: Array) -> Array:
        with torch.no_grad():
            return function(*map(torch.from_numpy, arrays)).numpy()

    def predict(x: Array, t: int, film: Array | None) -> Array:
        inputs = [x, np.full(len(x), t, np.int64), *([] if film is None else [film])]
        return run(unet, *inputs)

    return Reimplementation(
        reference,
        manifest,
        FLOAT32,
        lambda mel: run(vae.encode, mel),
        lambda latents: run(vae.decode, latents),
        lambda mel: run(vocoder, mel),
        predict,
    )


def _in_onnxruntime(out: Path, reference: dict[str, Array], limit: float) -> Reimplementation:
    engine = Model.open(out, device="cpu")

    def graph(name: str, key: str, output: str) -> Callable[[Array], Array]:
        session = ort.InferenceSession(str(out / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        return lambda array: session.run([output], {key: np.ascontiguousarray(array)})[0]

    return Reimplementation(
        reference,
        engine.manifest,
        limit,
        graph("vae_encoder", "mel", "moments"),
        graph("vae_decoder", "latents", "mel"),
        graph("vocoder", "mel", "audio"),
        lambda x, t, film: engine.predict(x, t, {} if film is None else {"film": film}),
    )


def test_mel_in_torch(kind: str) -> None:
    """The reference's own way, a convolution with the Fourier basis in float32, with the engine's filters."""
    folder = parity_folder() / kind
    reference = np.load(folder / "reference.npz")
    mel = read_config(folder / "config.json").mel
    fourier = np.fft.fft(np.eye(mel.n_fft))[: mel.n_fft // 2 + 1]
    basis = np.concatenate([fourier.real, fourier.imag]).astype(np.float32) * hann(mel.win_length, mel.n_fft)
    padded = np.pad(reference["stems_wav"], ((0, 0), (mel.n_fft // 2,) * 2), mode="reflect")
    parts = torch.nn.functional.conv1d(
        torch.from_numpy(padded)[:, None], torch.from_numpy(basis)[:, None], stride=mel.hop
    )
    magnitude = parts.unflatten(1, (2, -1)).square().sum(1).sqrt()
    bands = torch.from_numpy(mel_filterbank(mel).T.copy()) @ magnitude
    ours = bands.clamp(min=mel.floor).log().transpose(1, 2).numpy()
    assert relative_error(ours, reference["mel"]) <= FLOAT32


def test_mel_in_the_engine(kind: str) -> None:
    """Magnitudes match everywhere, their logarithms above -90 dB: below, the reference is its own rounding.

    The engine's are the nearer to the true values there, so all of its frames are held to those.
    """
    folder = parity_folder() / kind
    reference = np.load(folder / "reference.npz")
    mel = read_config(folder / "config.json").mel
    ours = log_mel(reference["stems_wav"], mel)
    theirs = reference["mel"][:, : ours.shape[1]]
    assert relative_error(np.exp(ours), np.exp(theirs)) <= FLOAT32
    heard = theirs > np.log(10 ** (-90 / 20))
    assert heard.mean() > 0.5
    assert relative_error(ours[heard], theirs[heard]) <= FLOAT32
    true = _mel_in_float64(reference["stems_wav"], mel)[:, : ours.shape[1]]
    assert relative_error(ours, true) <= FLOAT32
    assert relative_error(ours, true) < relative_error(theirs, true)


def _mel_in_float64(audio: Array, mel: Mel) -> NDArray[np.float64]:
    padded = np.pad(audio.astype(np.float64), ((0, 0), (mel.n_fft // 2,) * 2), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, mel.n_fft, axis=-1)[:, :: mel.hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(mel.n_fft) / mel.n_fft)
    bands = np.abs(np.fft.rfft(frames * window)) @ mel_filterbank(mel).astype(np.float64)
    return np.log(np.maximum(bands, mel.floor))


def test_release_yaml_makes_the_same_bundle(
    kind: str, bundles: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with the release's kind of archive and configuration, which knows no vocoder."""
    folder = parity_folder() / kind
    (tmp_path / "release.yaml").write_text(release_yaml(json.loads((folder / "config.json").read_text())))
    with tarfile.open(tmp_path / "release.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(folder / "last.ckpt", "2024-03-25T00-55-31_3_D_4_stems/checkpoints/last.ckpt")
    arguments = ("--config", tmp_path / "release.yaml", "--out", tmp_path / "bundle")
    ran = backline(capsys, "import", tmp_path / "release.tar.gz", *arguments)
    assert ran.status == 0 and "read unet" in ran.out and f"{tmp_path / 'bundle'} is ready" in ran.out
    ours, theirs = (load_bundle(path).manifest for path in (tmp_path / "bundle", bundles("fp32")))
    assert ours.files == theirs.files, "the same graphs, byte for byte"
    assert ours.networks == theirs.networks and ours.mel == theirs.mel and ours.stems == theirs.stems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "release.tar.gz", "release.yaml"]


def test_half_precision_halves_the_bundle(bundles: Callable[[str], Path]) -> None:
    sizes = [sum(file.stat().st_size for file in bundles(p).iterdir()) for p in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]


def test_vae_and_vocoder(model: Reimplementation) -> None:
    reference = model.reference
    moments = model.moments(reference["mel"][:, None, :256])
    model.check(moments, "vae_moments")
    mean = moments[:, : model.manifest.latent.channels]
    model.check(mean, "z_mean_unscaled")
    model.check((mean * np.float32(model.manifest.latent.scale_factor))[None], "x0")
    model.check(model.decode(reference["z_mean_unscaled"]), "vae_decoded_mel")
    model.check(model.vocode(reference["vae_decoded_mel"][:, 0].transpose(0, 2, 1)), "vocoder_wav")
    frames = reference["vae_decoded_mel"].shape[2]
    assert (
        reference["vocoder_wav"].shape[2] == frames * model.manifest.vocoder.hop + model.manifest.vocoder.trim
    )


@pytest.fixture
def film(kind: str) -> str | None:
    return "film" if kind == "film" else None


@pytest.mark.parametrize("t", [999, 501, 1])
def test_unet(model: Reimplementation, film: str | None, t: int) -> None:
    condition = None if film is None else model.reference[film]
    model.check(model.predict(model.reference["x_T"], t, condition), f"eps_t{t}")


def test_ddim(model: Reimplementation, film: str | None) -> None:
    schedule = make_schedule(model.manifest.schedule)
    assert list(timesteps(schedule, 10)) == sorted(model.reference["ddim10_timesteps"])
    ours = sample_ddim(model.denoiser(film), model.reference["x_T"], schedule, steps=10, eta=0.0)
    model.check(ours, "ddim10_eta0")


def test_guidance(model: Reimplementation, film: str | None) -> None:
    if film is None:  # the unconditional model has nothing to be guided by
        assert model.manifest.film_dim is None and model.manifest.sampling.guidance == 1.0
        return
    denoise = guided(model.denoiser("film"), model.denoiser("film_uncond"), 2.0)
    schedule = make_schedule(model.manifest.schedule)
    model.check(sample_ddim(denoise, model.reference["x_T"], schedule, steps=10, eta=0.0), "ddim10_eta0_cfg2")


def test_inpainting(model: Reimplementation, film: str | None) -> None:
    reference = model.reference
    schedule = make_schedule(model.manifest.schedule)
    mask = np.ones((1, 4, reference["x0"].shape[3]), np.float32)
    mask[:, 3] = 0
    denoise = inpainted(model.denoiser(film), reference["x0"], mask, schedule, reference["inpaint_noise"])
    ours = sample_ddim(denoise, reference["x_T"], schedule, steps=10, eta=0.0)[:, 3]
    assert relative_error(ours, reference["inpaint_piano_ddim10_eta0"][:, 3]) <= model.limit


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
