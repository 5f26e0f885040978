"""The samplers and wrappers against what the reference implementation computed with the same UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.denoisers import guided, inpainted
from engine.manifest import NoiseSchedule
from engine.model import clean_from
from engine.samplers import Denoiser, sample_ddim
from engine.schedule import make_schedule, timesteps

ROOT = Path(__file__).parents[1]
PARITY = next((p for p in (ROOT / "shared/parity", ROOT.parent / "shared/parity") if p.is_dir()), None)
SCHEDULE = make_schedule(NoiseSchedule(start=0.0015, end=0.0195, steps=1000))

pytestmark = pytest.mark.skipif(PARITY is None, reason="the reference vectors are not in this checkout")


@pytest.fixture(scope="module", params=["film", "uncond"])
def reference(request: pytest.FixtureRequest) -> tuple[Any, dict[str, np.ndarray]]:
    """The reference's small UNet with its averaged weights, and its arrays."""
    torch = pytest.importorskip("torch")
    unet3d = pytest.importorskip("export.unet3d")
    assert PARITY is not None
    folder = PARITY / request.param
    weights = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "model.diffusion_model."
    names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    averaged = {name: weights["model_ema." + f"diffusion_model.{name}".replace(".", "")] for name in names}
    config = unet3d.UNet3dConfig(
        width=32,
        multipliers=(1, 2),
        blocks=1,
        attention_at=(2,),
        head_width=16,
        film_dim=512 if request.param == "film" else None,
    )
    network = unet3d.UNet3d(config).eval()
    network.load_state_dict(averaged)
    with np.load(folder / "reference.npz") as arrays:
        return network, dict(arrays)


def denoiser(network: Any, film: np.ndarray | None) -> Denoiser:
    import torch

    condition = None if film is None else torch.from_numpy(film)

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        with torch.no_grad():
            eps = network(torch.from_numpy(x), torch.full((len(x),), t), condition).numpy()
        return clean_from(eps, x, SCHEDULE, t, "eps")

    return denoise


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def test_ddim_guidance_and_inpainting(reference: tuple[Any, dict[str, np.ndarray]]) -> None:
    network, arrays = reference
    assert timesteps(SCHEDULE, 10).tolist() == arrays["ddim10_timesteps"].tolist()
    denoise = denoiser(network, arrays.get("film"))
    x = arrays["x_T"]
    assert relative(sample_ddim(denoise, x, SCHEDULE, steps=10), arrays["ddim10_eta0"]) < 1e-4

    if "film" in arrays:
        pulled = guided(denoise, denoiser(network, arrays["film_uncond"]), 2.0)
        assert relative(sample_ddim(pulled, x, SCHEDULE, steps=10), arrays["ddim10_eta0_cfg2"]) < 1e-4

    mask = np.ones((1, 4, x.shape[3]), np.float32)
    mask[:, 3] = 0
    arranged = inpainted(denoise, arrays["x0"], mask, SCHEDULE, arrays["inpaint_noise"])
    piano = sample_ddim(arranged, x, SCHEDULE, steps=10)[:, 3]
    assert relative(piano, arrays["inpaint_piano_ddim10_eta0"][:, 3]) < 1e-4
