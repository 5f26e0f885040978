"""The mask refiner: nothing before it is trained, less error after, and a part of `split` where declared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from default_family import MELS
from torch import nn
from training_songs import song

from engine.audio import Audio
from engine.model import Model
from engine.separation import refined_mels, split
from engine.take import Settings
from engine.windows import timeline_frames
from export.mask_refiner import MaskRefiner, MaskRefinerConfig
from export.patch_vae import PatchVAE, PatchVAEConfig
from export.stem_unet import StemUNet, StemUNetConfig
from training.captions import Thresholds
from training.dataset import draw
from training.mel import GEOMETRY, LATENT_FRAMES
from training.stems import STEMS
from training.train_masks import Estimator, refine_loss
from training.train_unet import Frozen

SMALL = MaskRefinerConfig(mels=MELS, width=16, blocks=2, kernel=3)


def test_untrained_it_changes_nothing() -> None:
    stems, mixture = torch.randn(2, 4, 20, MELS), torch.randn(2, 20, MELS)
    assert torch.equal(MaskRefiner(SMALL)(stems, mixture), stems)


def test_it_moves_stems_against_each_other_only() -> None:
    torch.manual_seed(0)
    network = MaskRefiner(SMALL)
    nn.init.normal_(network.outward.weight)
    stems, mixture = torch.randn(2, 4, 20, MELS), torch.randn(2, 20, MELS)
    with torch.no_grad():
        shift = network(stems, mixture) - stems
    assert shift.abs().max() > 0.1
    assert shift.sum(1).abs().max() < 1e-4


def test_split_hears_it_and_still_sums_to_the_mix(tiny_default_bundle: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_default_bundle, plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["capabilities"].remove("masks")
    del manifest["files"]["masks.onnx"]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    mix = Audio(np.random.default_rng(0).standard_normal((2, 40000)).astype(np.float32), 16000)
    with_it, without = (
        split(Model.open(folder, "cpu", 1), mix, settings=Settings(seed=1))
        for folder in (tiny_default_bundle, plain)
    )
    for take in (with_it, without):
        assert np.abs(take.mix().samples - mix.samples).max() < 1e-5
    assert np.abs(with_it.stems["bass"].samples - without.stems["bass"].samples).max() > 1e-3


def test_windows_are_joined(tiny_default_bundle: Path) -> None:
    """A mix of several windows is refined everywhere, each frame as its own window has it."""
    model = Model.open(tiny_default_bundle, "cpu", 1)
    signal = np.random.default_rng(1).standard_normal(3 * 16000).astype(np.float32)
    total = timeline_frames(model.manifest, 3.0)
    mels = np.random.default_rng(2).standard_normal((4, total * 4, MELS)).astype(np.float32)
    refined = refined_mels(model, mels, signal, total)
    assert refined.shape == mels.shape
    assert (np.abs(refined - mels).max((0, 2)) > 0).all()
    assert np.abs((refined - mels).sum(0)).max() < 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_lowers_the_masks_error() -> None:
    torch.manual_seed(0)
    bands = GEOMETRY.n_mels
    vae = PatchVAE(PatchVAEConfig(bands, channels=6, width=16, encoder_blocks=1, decoder_blocks=1))
    unet = StemUNet(
        StemUNetConfig(
            channels=6, film=8, width=32, inner=32, blocks_down=1, blocks_up=1, layers=1, heads=2, cond=16
        )
    )
    metric = torch.eye(6).repeat(len(STEMS), 1, 1)
    thresholds = Thresholds(((20.0, 60.0),) * 5, (2.0, 6.0))
    frozen = Frozen(vae.eval(), nn.Identity(), None, thresholds, 0.5, metric)  # type: ignore[arg-type]

    class Told(Estimator):
        def _film(self) -> torch.Tensor:
            return torch.zeros(1, 8)

    estimate = Told(frozen, unet.eval())
    windows = draw([song(0)], 8, np.random.default_rng(0), frames=8 * LATENT_FRAMES)
    network = MaskRefiner(MaskRefinerConfig(mels=bands, width=32, blocks=1, kernel=3))
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        torch.manual_seed(1)  # the same noise
        loss, logs = refine_loss(network, estimate, windows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert logs["db"] < logs["db_before"] - 1
