"""What hears pitch classes is trained alone and put into a bundle that is there."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from engine.bundle import load_bundle
from export.bundle_writer import replace_graph
from export.patch_vae import PatchVAE, PatchVAEConfig
from training.add_tones import add_tones
from training.from_bundle import read_weights
from training.loop import write_checkpoint

GRAPH = "vae_encoder"


def test_a_bundle_takes_the_tones_and_keeps_all_else(tiny_default_bundle: Path, tmp_path: Path) -> None:
    source = _with_tones(tiny_default_bundle, tmp_path / "source")
    before = load_bundle(source)
    old = read_weights(before.path(f"{GRAPH}.onnx"))
    _train(tmp_path, PatchVAEConfig(**before.manifest.networks[GRAPH]))
    made = add_tones(source, tmp_path, tmp_path / "made", "9")
    changed = {name for name in made.files if made.files[name] != before.manifest.files[name]}
    assert changed == {f"{GRAPH}.onnx"} and made.version == "9"
    assert made.provenance["training"]["tones"] == {"steps": 3, "minutes": 0.8}, "less those of the VAE"
    new = read_weights(tmp_path / "made" / f"{GRAPH}.onnx")
    for name, weight in old.items():
        assert torch.equal(weight, new[name]) != name.startswith("tones."), name
    again = add_tones(tmp_path / "made", tmp_path, tmp_path / "again", "10")
    assert again.provenance["training"]["tones"] == {"steps": 6, "minutes": 1.6}


def test_latents_without_tones_take_none(tiny_default_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tones"):
        add_tones(tiny_default_bundle, tmp_path, tmp_path / "made", "9")
    assert not (tmp_path / "made").exists()


def _train(run: Path, config: PatchVAEConfig) -> None:
    """A folder as training leaves it, with other weights everywhere."""
    write_checkpoint({"ema": _random(config).state_dict()}, run)
    (run / "log.jsonl").write_text('{"step": 5, "minutes": 1.26}\n')


def _with_tones(bundle: Path, out: Path) -> Path:
    """The bundle with an encoder that hears pitch classes in its channels' place."""
    source = load_bundle(bundle)
    config = PatchVAEConfig(**source.manifest.networks[GRAPH])
    channels = source.manifest.latent_shape[1]
    config = replace(config, channels=channels - 2, tones=2, tones_width=8)
    manifest = source.manifest.model_copy(
        update={
            "networks": source.manifest.networks | {GRAPH: asdict(config)},
            "provenance": {"training": {"vae": {"steps": 2, "minutes": 0.5}}},
        }
    )
    replace_graph(source, manifest, GRAPH, _random(config).encoder, out)
    return out


def _random(config: PatchVAEConfig) -> PatchVAE:
    vae = PatchVAE(config)
    for weight in vae.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return vae
