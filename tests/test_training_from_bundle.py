"""Training goes on from the bundle that ships: its weights come back, other bands are interpolated."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnxruntime as ort
import pytest
import soundfile as sf
import torch

import bridge.demo_song
from engine.bundle import Bundle, load_bundle
from engine.manifest import Mel
from export.stem_unet import StemUNet, StemUNetConfig
from training import from_bundle
from training.from_bundle import fill_in, gathered, read_towers, read_unet, read_vae, spread
from training.mel import GEOMETRY, log_mel
from training.stems import STEMS

SLANEY = Mel(
    sample_rate=44100, n_fft=2048, win_length=2048, hop=512, n_mels=128, f_min=0.0, f_max=22050.0, floor=1e-4
)


@pytest.mark.parametrize("table", [spread, gathered])
def test_equal_geometries_change_nothing(table: object) -> None:
    assert callable(table)
    assert torch.allclose(table(GEOMETRY, GEOMETRY), torch.eye(GEOMETRY.n_mels), atol=1e-6)


def test_a_smooth_spectrum_survives_the_way_to_other_bands_and_back() -> None:
    old = torch.sin(torch.linspace(0, 6, SLANEY.n_mels))
    there = spread(SLANEY, GEOMETRY) @ old
    assert there.shape == (GEOMETRY.n_mels,)
    assert (gathered(SLANEY, GEOMETRY) @ there - old).abs().max() < 0.05
    rows = gathered(SLANEY, GEOMETRY).sum(1)
    assert torch.allclose(rows, torch.ones_like(rows))


def unet_shapes(channels: int, film: int = 128) -> dict[str, tuple[int, ...]]:
    return {
        "latents": (1, 4, channels, 24, 1),
        "film": (1, film),
        "context": (1, 4, channels, 24, 1),
        "context_mask": (1, 4, 24),
        "mixture": (1, channels, 24, 1),
        "mixture_mask": (1, 24),
        "mixture_stems": (1, 4),
        "grid": (1, 24, 6),
        "chords": (1, 24, 25),
    }


def test_a_unet_for_more_tones_reads_nothing_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a bundle whose latents had no tones: the old channels come out as before."""
    sizes = StemUNetConfig(
        channels=5, film=8, width=16, inner=16, blocks_down=1, blocks_up=1, layers=1, heads=2, cond=16
    )
    torch.manual_seed(0)
    before = StemUNet(sizes).eval()
    with torch.no_grad():
        for weight in before.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    manifest = SimpleNamespace(networks={"unet": asdict(sizes)})
    bundle = SimpleNamespace(manifest=manifest, path=Path)
    monkeypatch.setattr(from_bundle, "read_weights", lambda path: before.state_dict())
    after = read_unet(cast(Bundle, bundle), 12).eval()
    wide = {name: torch.randn(shape) for name, shape in unet_shapes(17, film=8).items()}
    narrow = wide | {name: wide[name][:, :, :5] for name in ("latents", "context")}
    narrow["mixture"] = wide["mixture"][:, :5]
    with torch.no_grad():
        expected = before(timestep=torch.tensor([300]), **narrow)
        found = after(timestep=torch.tensor([300]), **wide)
    assert found.shape == (1, 4, 17, 24, 1)
    assert torch.allclose(found[:, :, :5], expected, atol=1e-5)


@pytest.mark.parametrize(("distilled", "timestep"), [(False, 300), (True, 300), (True, 1300)])
def test_the_unet_computes_what_the_bundles_does(distilled: bool, timestep: int) -> None:
    bundle = load_bundle()
    unet = read_unet(bundle, distilled=distilled).eval()
    generator = np.random.default_rng(0)
    session = ort.InferenceSession(str(bundle.path("unet.onnx")))
    shapes = unet_shapes(bundle.manifest.latent.channels)
    inputs = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = session.run(None, inputs | {"timestep": np.array([timestep])})[0]
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        found = unet(timestep=torch.tensor([timestep]), **given).numpy()
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_the_other_networks_take_the_bands_of_training() -> None:
    bundle = load_bundle()
    mel = torch.full((1, 1, 16, GEOMETRY.n_mels), -4.0)
    with torch.no_grad():
        vae, towers = read_vae(bundle).eval(), read_towers(bundle).eval()
        rebuilt = vae.decoder(vae.moments(mel)[0])
        assert rebuilt.shape == mel.shape and torch.isfinite(rebuilt).all()
        assert towers.audio(mel).norm() == pytest.approx(1.0, abs=1e-4)


def test_a_weight_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"no weight weight of shape \(2, 2\)"):
        fill_in(torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})


def test_the_folders_are_those_that_training_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training_songs import save, song

    (tmp_path / "data" / "train").mkdir(parents=True)
    save(tmp_path / "data" / "train", 0, song(0))
    runs = tmp_path / "runs"
    command = ["from_bundle", "--data", str(tmp_path / "data"), "--runs", str(runs)]
    monkeypatch.setattr("sys.argv", command)
    from_bundle.main()
    from training.train_unet import STATISTICS, freeze

    frozen = freeze(runs / "vae", runs / "towers", runs / "unet" / STATISTICS, [song(0)])
    assert frozen.scale == load_bundle().manifest.latent.scale_factor
    assert frozen.tokenizer.encode("").ids == []
    state = torch.load(runs / "unet" / "checkpoint.pt", weights_only=True)
    assert state["spent"] == load_bundle().manifest.provenance["training"]["unet"]["minutes"] * 60


def test_blended_weights_lie_between() -> None:
    from training.loop import blend

    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before, target = one.weight.detach().clone(), other.weight.detach().clone()
    blend(one, other, 0.25)
    assert torch.allclose(one.weight, 0.75 * before + 0.25 * target)
    assert torch.equal(other.weight, target)


def test_other_bands_keep_the_latents_and_are_rebuilt() -> None:
    """Against interpolation alone: nearer to the picture, and the latents still those that the UNet knows."""
    folder = Path(bridge.demo_song.__path__[0])
    played = [sf.read(folder / f"{stem}.flac", dtype="float32")[0] for stem in STEMS]
    pictures = log_mel(torch.tensor(np.stack([x[: 20 * 44100] for x in played])))
    mels = pictures[:, : pictures.shape[1] // 64 * 64].reshape(-1, 1, 64, GEOMETRY.n_mels)
    interpolated, vae = read_vae(load_bundle()).eval(), read_vae(load_bundle()).eval()
    from_bundle.aligned(vae, mels)
    with torch.no_grad():
        before, after = interpolated.moments(mels)[0], vae.moments(mels)[0]
        errors = [
            float((network.decoder(latents) - mels).abs().mean())
            for network, latents in ((interpolated, before), (vae, after))
        ]
    left = ((after - before) ** 2).sum() / ((before - before.mean((0, 2, 3), keepdim=True)) ** 2).sum()
    assert left < 0.25, "of the latents' variance"
    assert errors[1] < 0.8 * errors[0]
