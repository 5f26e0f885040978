"""`backline import`: other sizes of the same layout, and every file that is not what it should be."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections import OrderedDict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from command import backline, refused
from reference_model import random_checkpoint, release_yaml, small_config, write_config

from engine.audio import Audio
from engine.errors import BacklineError, Cancelled, UsageError
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill, generate, split
from export.checkpoint import open_checkpoint
from export.hifigan import HifiGan
from export.import_checkpoint import import_checkpoint, read_unet, read_vae, read_vocoder
from export.kl_vae import KlVae
from export.onnx_writer import relative_error
from export.reference_config import ReferenceConfig, read_config
from export.tensor_source import Source
from export.unet3d import UNet3d


class Files:
    """A small model of the reference's layout on disk."""

    def __init__(self, folder: Path, tree: dict[str, Any]) -> None:
        self.folder = folder
        self.config_path = folder / "config.json"
        self.config: ReferenceConfig = write_config(self.config_path, tree)
        self.tree = tree
        self.checkpoint = random_checkpoint(self.config)
        self.path = folder / "last.ckpt"
        torch.save(self.checkpoint, self.path)

    def saved(self, name: str, **changes: Any) -> Path:
        """The checkpoint again under another name; None drops a tensor."""
        state = self.checkpoint["state_dict"] | changes
        state = {key: value for key, value in state.items() if value is not None}
        path = self.folder / name
        torch.save(self.checkpoint | {"state_dict": state}, path)
        return path

    def refused(self, path: Path, **options: Any) -> str:
        """The sentence with which an import is refused; nothing may be left behind."""
        out = self.folder / "refused"
        before = sorted(self.folder.iterdir())
        with pytest.raises(BacklineError) as caught:
            import_checkpoint(path, options.pop("config", self.config_path), out, **options)
        assert sorted(self.folder.iterdir()) == before
        sentence = str(caught.value)
        assert sentence.endswith(".") and "\n" not in sentence
        return sentence


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("reference"), small_config())


SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "three stems, three levels": ({"channel_mult": [1, 2, 3]}, {}),
    "five stems, five levels, condition added": (
        {
            "in_channels": 5,
            "out_channels": 5,
            "channel_mult": [1, 1, 2, 2, 2],
            "attention_resolutions": [8, 16],
            "extra_film_use_concat": False,
        },
        {"num_stems": 5, "stems": ["bass", "drums", "guitar", "piano", "strings"]},
    ),
    "unconditional, two blocks a level, heads counted": (
        {
            "num_res_blocks": 2,
            "num_head_channels": -1,
            "num_heads": 4,
            "extra_film_condition_dim": None,
            "no_condition": True,
        },
        {},
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_another_size_of_the_same_layout(size: str, tmp_path: Path) -> None:
    unet, rest = SIZES[size]
    files = Files(tmp_path, small_config(**unet) | rest)
    config = files.config
    summary = import_checkpoint(files.path, files.config_path, tmp_path / "bundle")
    model = Model.open(tmp_path / "bundle", "cpu", 1)
    manifest = model.manifest
    assert manifest.stems == config.stems and manifest.film_dim == config.unet.film_dim
    assert manifest.latent_shape == (config.unet.stems, 5, 32, 16)
    assert manifest.latent.scale_factor == pytest.approx(0.7)
    assert summary.read["unet"] == len(
        [name for name in files.checkpoint["state_dict"] if "model_ema.diffusion" in name]
    )

    unet_, vae, vocoder = _networks(files.path, config)
    rng = np.random.default_rng(0)
    stems, z, _, f = manifest.latent_shape
    for batch, length in ((1, 16), (2, 21)):  # 21 halves unevenly
        x = rng.standard_normal((batch, stems, z, length, f), np.float32)
        film = rng.standard_normal((batch, config.unet.film_dim or 0), np.float32)
        conditions = {"film": film} if config.unet.film_dim else {}
        with torch.no_grad():
            expected = unet_(torch.from_numpy(x), torch.full((batch,), 77), torch.from_numpy(film)).numpy()
        assert expected.shape == x.shape
        assert relative_error(model.predict(x, 77, conditions), expected) <= 1e-4
    mel = rng.standard_normal((2, 42, 32), np.float32)
    with torch.no_grad():
        moments = vae.encode(torch.from_numpy(mel)[:, None])
        means = moments[:, :z].numpy()
        decoded = vae.decode(torch.from_numpy(means))[:, 0].numpy()
        audio = vocoder(torch.from_numpy(mel).transpose(1, 2))[:, 0].numpy()
    scale = np.float32(0.7)
    assert relative_error(model.encode(mel), means * scale) <= 1e-4
    assert relative_error(model.decode(means * scale), decoded) <= 1e-4
    assert audio.shape[1] == 42 * manifest.vocoder.hop + manifest.vocoder.trim
    assert relative_error(model.vocode(mel), audio[:, : 42 * 64]) <= 1e-4


def _networks(path: Path, config: ReferenceConfig) -> tuple[UNet3d, KlVae, HifiGan]:
    with open_checkpoint(path) as checkpoint:
        source = Source(checkpoint, checkpoint.tensors("state_dict"))
        return read_unet(source, config, "ema"), read_vae(source, config), read_vocoder(source, config)


def test_weights_raw_and_ema_are_not_the_same(files: Files, tmp_path: Path) -> None:
    import_checkpoint(files.path, files.config_path, tmp_path / "raw", weights="raw")
    x = np.ones((1, 3, 5, 8, 16), np.float32)
    raw = Model.open(tmp_path / "raw", "cpu", 1).predict(x, 10, {})
    with open_checkpoint(files.path) as checkpoint:
        source = Source(checkpoint, checkpoint.tensors("state_dict"))
        unets = [read_unet(source, files.config, weights) for weights in ("raw", "ema")]  # type: ignore[arg-type]
    inputs = torch.from_numpy(x), torch.tensor([10]), torch.zeros(1, 24)
    with torch.no_grad():
        outputs = [unet(*inputs).numpy() for unet in unets]
    assert relative_error(raw, outputs[0]) <= 1e-4 < 0.1 < relative_error(raw, outputs[1])


def test_summary_lists_what_was_left(files: Files, tmp_path: Path) -> None:
    odd = files.saved("odd.ckpt", **{"model.extra.weight": torch.zeros(3), "loss.weight": torch.zeros(2)})
    summary = import_checkpoint(odd, files.config_path, tmp_path / "bundle")
    assert {"model.extra.weight", "loss.weight", "model_ema.decay"} <= set(summary.unused)
    assert any("CLAP" in sentence for sentence in summary.missing)
    text = "\n".join(summary.lines())
    assert "loss.weight" in text and "model.diffusion_model.*" in text and "read vocoder" in text


def test_release_yaml_says_the_same_as_json(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "release.yaml"
    tree = files.tree | {"hifigan": files.tree["hifigan"] | {"hop_size": 160}}
    path.write_text(release_yaml(tree | {"stems": ["Bass", "Drums", "Piano"]}))
    config = read_config(path)
    assert (config.unet, config.vae) == (files.config.unet, files.config.vae)
    assert config.stems == ("bass", "drums", "piano") and config.steps == 200 and config.guidance == 2.0
    assert config.mel.hop == config.vocoder.hop == 160 and not config.vocoder_known
    assert (config.schedule, config.window_frames) == (files.config.schedule, 32)


def test_separate_vae_and_vocoder(files: Files, tmp_path: Path) -> None:
    state = files.checkpoint["state_dict"]
    first = {key[18:]: value for key, value in state.items() if key.startswith("first_stage_model.")}
    vocoder = {key[8:]: value for key, value in first.items() if key.startswith("vocoder.")}
    normalised = {}
    for key, value in vocoder.items():  # as HiFi-GAN's own checkpoint has it
        if key.endswith(".weight"):
            size = value.flatten(1).norm(dim=1).reshape(-1, 1, 1)
            normalised[key + "_g"], normalised[key + "_v"] = size, value * 3.0
        else:
            normalised[key] = value
    torch.save({"state_dict": {k: v for k, v in first.items() if "vocoder" not in k}}, tmp_path / "vae.ckpt")
    torch.save({"generator": normalised}, tmp_path / "hifigan.ckpt")
    bare = files.saved("bare.ckpt", **{key: None for key in state if key.startswith("first_stage_model.")})
    assert "--vae" in files.refused(bare)
    assert "--vocoder" in files.refused(bare, vae=tmp_path / "vae.ckpt")
    import_checkpoint(
        bare,
        files.config_path,
        tmp_path / "apart",
        vae=tmp_path / "vae.ckpt",
        vocoder=tmp_path / "hifigan.ckpt",
    )
    _, vae, generator = _networks(files.path, files.config)
    mel = np.random.default_rng(0).standard_normal((1, 8, 32), np.float32)
    apart = Model.open(tmp_path / "apart", "cpu", 1)
    with torch.no_grad():
        audio = generator(torch.from_numpy(mel).transpose(1, 2))[:, 0, : 8 * 64].numpy()
        means = vae.encode(torch.from_numpy(mel)[:, None])[:, :5].numpy()
    assert relative_error(apart.vocode(mel), audio) <= 1e-4
    assert relative_error(apart.encode(mel), means * np.float32(0.7)) <= 1e-4


def test_tar_and_older_format_hold_the_same(files: Files, tmp_path: Path) -> None:
    old = tmp_path / "old.ckpt"
    torch.save(files.checkpoint, old, _use_new_zipfile_serialization=False)
    archive = tmp_path / "release.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files.config_path, "run/config.json")
        tar.add(old, "run/checkpoints/checkpoint-fad-0.00.ckpt")
        tar.add(files.path, "run/checkpoints/last.ckpt")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for path in (files.path, old, archive):
        with open_checkpoint(path, scratch=scratch) as checkpoint:
            tensors = checkpoint.tensors("state_dict")
            assert list(tensors) == list(files.checkpoint["state_dict"])
            for name, tensor in tensors.items():
                assert torch.equal(checkpoint.read(tensor), files.checkpoint["state_dict"][name])  # type: ignore[arg-type]
            assert not any(scratch.iterdir())
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(old, "a.ckpt")
        tar.add(old, "b.ckpt")
    assert "a.ckpt, b.ckpt" in files.refused(tmp_path / "two.tar")
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(files.config_path, "config.json")
    assert "holds no checkpoint" in files.refused(tmp_path / "none.tar")


class Bomb:
    """Runs code when a pickle is executed."""

    touched: Path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.touched),)


def test_a_pickle_is_never_executed(files: Files, tmp_path: Path) -> None:
    Bomb.touched = tmp_path / "pwned"
    hyper = argparse.Namespace(rate=3, unet=OrderedDict(a=1))
    wired = files.checkpoint | {"callbacks": {"x": Bomb()}, "hyper_parameters": hyper}
    for zipped in (True, False):
        path = tmp_path / f"wired{zipped}.ckpt"
        torch.save(wired, path, _use_new_zipfile_serialization=zipped)
        with open_checkpoint(path) as checkpoint:
            assert {"argparse.Namespace", f"{os.mkdir.__module__}.mkdir"} == set(checkpoint.foreign)
            assert len(checkpoint.tensors("state_dict")) == len(files.checkpoint["state_dict"])
        assert not Bomb.touched.exists()
    summary = import_checkpoint(path, files.config_path, tmp_path / "bundle")
    assert "not rebuilt: argparse.Namespace" in summary.lines()
    assert not Bomb.touched.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.touched.exists(), "the bomb is real"


def test_a_needed_tensor_must_not_depend_on_a_foreign_object(files: Files) -> None:
    key = "first_stage_model.quant_conv.bias"
    path = files.saved("foreign.ckpt", **{key: argparse.Namespace(value=torch.zeros(10))})
    sentence = files.refused(path)
    assert key in sentence and "argparse.Namespace" in sentence
    torch.save({"state_dict": argparse.Namespace(x=1)}, files.folder / "all.ckpt")
    assert "argparse.Namespace" in files.refused(files.folder / "all.ckpt")


def test_missing_misshapen_and_broken_tensors_are_named(files: Files) -> None:
    key = "model_ema.diffusion_modelmiddle_block1qkvweight"
    assert key in files.refused(files.saved("missing.ckpt", **{key: None}))
    sentence = files.refused(files.saved("shape.ckpt", **{key: torch.zeros(3, 4, 1)}))
    assert key in sentence and "[3, 4, 1]" in sentence and "[192, 64, 1]" in sentence
    broken = torch.full((192, 64, 1), float("nan"))
    sentence = files.refused(files.saved("nan.ckpt", **{key: broken}))
    assert key in sentence and "not finite" in sentence
    assert "scale_factor" in files.refused(files.saved("scale.ckpt", scale_factor=None))
    zero = files.saved("zero.ckpt", scale_factor=torch.tensor(0.0))
    assert "positive" in files.refused(zero)
    no_ema = {name: None for name in files.checkpoint["state_dict"] if name.startswith("model_ema.")}
    assert "--weights raw" in files.refused(files.saved("raw.ckpt", **no_ema))
    other = torch.linspace(1, 0, 500)
    assert "noise schedule" in files.refused(files.saved("noise.ckpt", alphas_cumprod=other))


def test_files_that_are_no_checkpoint(files: Files, tmp_path: Path) -> None:
    whole = files.path.read_bytes()
    archive = tmp_path / "cut.tar.gz"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(files.path, "last.ckpt")
    old = tmp_path / "old.ckpt"
    torch.save(files.checkpoint, old, _use_new_zipfile_serialization=False)
    cases: dict[str, tuple[bytes, str]] = {
        "empty.ckpt": (b"", "is empty"),
        "cut.ckpt": (whole[: len(whole) // 2], "truncated"),
        "cut_early.ckpt": (whole[:40], "truncated"),
        archive.name: (buffer.getvalue()[:50000], "truncated"),
        "cut_old.ckpt": (old.read_bytes()[:-5000], "truncated or damaged|incomplete"),
        "page.ckpt": (b"<!DOCTYPE html><html>", "web page"),
        "x.safetensors": (b"\x10\0\0\0\0\0\0\0{}            ", "safetensors"),
        "config.ckpt": (json.dumps(files.tree).encode(), "JSON"),
        "sound.ckpt": (b"RIFF\0\0\0\0WAVEfmt ", "no PyTorch checkpoint"),
        "list.ckpt": (pickle.dumps([1, 2]), "another kind of pickle"),
        "text.tar.gz": (gzip.compress(b"hello"), "truncated or damaged"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        sentence = files.refused(path)
        assert any(part in sentence for part in expected.split("|")), (name, sentence)
    assert "does not exist" in files.refused(tmp_path / "nothing.ckpt")
    assert "folder" in files.refused(tmp_path)
    renamed = tmp_path / "model.wav"
    renamed.write_bytes(whole)
    with open_checkpoint(renamed) as checkpoint:  # content decides, not the name
        assert checkpoint.tensors("state_dict")


def test_damaged_data_is_found(files: Files, tmp_path: Path) -> None:
    data = bytearray(files.path.read_bytes())
    weight = (
        files.checkpoint["state_dict"]["model_ema.diffusion_modelmiddle_block1qkvweight"].numpy().tobytes()
    )
    data[data.index(weight) + 100] ^= 0xFF
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(data)
    assert "damaged" in files.refused(path)


def test_other_models_are_recognised(files: Files, tmp_path: Path) -> None:
    def saved(name: str, tree: dict[str, Any]) -> Path:
        torch.save(tree, tmp_path / name)
        return tmp_path / name

    flat = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 8, 3, 3)}
    assert "plain MusicLDM" in files.refused(saved("plain.ckpt", {"state_dict": flat}))
    stable = flat | {"cond_stage_model.transformer.text_model.x": torch.zeros(1)}
    assert "Stable Diffusion" in files.refused(saved("sd.ckpt", {"state_dict": stable}))
    larger = flat | {"conditioner.embedders.0.transformer.x": torch.zeros(1)}
    assert "Stable Diffusion" in files.refused(saved("sdxl.ckpt", {"state_dict": larger}))
    vae = {"encoder.conv_in.weight": torch.zeros(8, 1, 3, 3)}
    assert "--vae" in files.refused(saved("vae.ckpt", {"state_dict": vae}))
    generator = {"generator": {"conv_pre.weight_g": torch.zeros(8, 1, 1)}}
    assert "--vocoder" in files.refused(saved("hifigan.ckpt", generator))
    assert "--clap" in files.refused(
        saved("clap.pt", {"state_dict": {"module.text_branch.x": torch.zeros(1)}})
    )
    assert "no Multi-Track MusicLDM" in files.refused(saved("else.ckpt", {"weights": torch.zeros(3)}))
    assert "Backline bundle" in files.refused(_zip(tmp_path / "bundle.zip", "manifest.json"))
    assert "zip archive" in files.refused(_zip(tmp_path / "song.zip", "song.txt"))


def _zip(path: Path, member: str) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "{}")
    return path


def test_configurations_that_do_not_fit(files: Files, tmp_path: Path) -> None:
    def refused(tree: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return files.refused(files.path, config=path)

    assert "2-D UNet" in refused(small_config(dims=2))
    assert "use_scale_shift_norm" in refused(small_config(use_scale_shift_norm=True))
    assert "'model_channels'" in refused(
        small_config() | {"unet": {k: v for k, v in small_config()["unet"].items() if k != "model_channels"}}
    )
    assert "stems" in refused(small_config() | {"stems": ["bass", "drums"]})
    assert "parameterization" in refused(small_config() | {"parameterization": "flow"})
    assert "steps" in refused(small_config() | {"timesteps": 0})
    assert "no model configuration" in refused(small_config() | {"unet": [1]})
    assert "no model configuration" in refused(small_config(channel_mult=3))
    assert "multiples of 32" in refused(small_config(model_channels=40))
    assert "'num_head_channels'" in refused(small_config(num_head_channels=-1))
    assert "num_heads_upsample" in refused(
        small_config(num_head_channels=-1, num_heads=4, num_heads_upsample=2)
    )
    vae, vocoder = small_config()["first_stage_ddconfig"], small_config()["hifigan"]
    assert "VAE's width" in refused(small_config() | {"first_stage_ddconfig": vae | {"ch": 40}})
    assert "2-D UNet" in refused(small_config() | {"first_stage_ddconfig": vae, "unet": {"dims": None}})
    assert "no model configuration" in refused(
        small_config() | {"first_stage_ddconfig": vae | {"ch_mult": []}}
    )
    short = vocoder | {"upsample_kernel_sizes": [8, 8]}
    assert "do not go together" in refused(small_config() | {"hifigan": short})
    assert "shape" in refused(small_config(model_channels=64))
    assert "neither YAML nor JSON" in refused("{")
    assert "no model configuration" in refused("[1]")
    assert "does not exist" in files.refused(files.path, config=tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "text" in files.refused(files.path, config=tmp_path / "binary.yaml")


def test_options_and_target(files: Files, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'best'"):
        import_checkpoint(files.path, files.config_path, tmp_path / "x", weights="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'int4'"):
        import_checkpoint(files.path, files.config_path, tmp_path / "x", precision="int4")  # type: ignore[arg-type]
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(BacklineError, match="exists"):
        import_checkpoint(files.path, files.config_path, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_where_there_can_be_no_bundle(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BacklineError, match="no folder"):
        import_checkpoint(files.path, files.config_path, tmp_path / "file" / "bundle")
    archive = tmp_path / "release.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(files.path, "last.ckpt")
    unpacking = open_checkpoint(archive, scratch=tmp_path / "nowhere")
    with pytest.raises(BacklineError, match=r"release\.tar cannot be unpacked in .*nowhere"), unpacking:
        pass
    with pytest.raises(Cancelled):
        import_checkpoint(
            files.path, files.config_path, tmp_path / "new" / "deep", callback=_cancel_in_vocoder
        )
    assert not (tmp_path / "new").exists(), "a folder made for a bundle goes with it"


def _cancel_in_vocoder(phase: str, fraction: float) -> None:
    if phase == "writing vocoder":
        raise Cancelled("stopped")


def test_separate_files_that_hold_something_else(files: Files) -> None:
    """Named by the option, each by what it lacks."""
    assert "holds no CLAP" in files.refused(files.path, clap=files.path)
    config = files.folder / "config.json"
    for option in ("vae", "vocoder", "clap"):
        assert "config.json is no PyTorch checkpoint" in files.refused(files.path, **{option: config})
    clap = files.folder / "clap.pt"
    torch.save({"state_dict": {"module.text_branch.x": torch.zeros(1)}}, clap)
    assert "holds no VAE" in files.refused(files.path, vae=clap)
    assert "holds no vocoder" in files.refused(files.path, vocoder=clap)
    clap.unlink()


def test_no_damage_gets_through(tmp_path: Path) -> None:
    """Whatever happens to a file's bytes, reading it ends in its tensors or in one sentence."""
    rng = np.random.default_rng(0)
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.int64)}
    endings = {True: 0, False: 0}
    for zipped in (True, False):
        whole = tmp_path / "whole.ckpt"
        torch.save({"state_dict": state, "x": [1, "y", None]}, whole, _use_new_zipfile_serialization=zipped)
        content = whole.read_bytes()
        for number in range(150):
            data = bytearray(content[: rng.integers(len(content))] if number % 3 == 0 else content)
            for place in rng.integers(len(data), size=rng.integers(1, 4)) if data else ():
                data[place] = rng.integers(256)
            (tmp_path / "hurt.ckpt").write_bytes(data)
            try:
                with open_checkpoint(tmp_path / "hurt.ckpt") as checkpoint:
                    source = Source(checkpoint, checkpoint.tensors("state_dict"))
                    for name in source.tensors:
                        source.read(name)
                endings[True] += 1
            except BacklineError as error:
                assert str(error).endswith(".") and "\n" not in str(error)
                endings[False] += 1
    assert min(endings.values()) > 20, "some damage is found, and some hits nothing that is read"


def test_the_command(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--config", files.config_path, "--out", tmp_path / "bundle")
    ran = backline(capsys, "import", files.path, *common, "--precision", "fp16", "--json")
    assert ran.status == 0 and ran.json["status"] == "done"
    assert ran.json["read"]["vocoder"] > 0 and ran.json["missing"]
    assert Model.open(tmp_path / "bundle", "cpu", 1).manifest.provenance["export"]["precision"] == "fp16"
    refused(backline(capsys, "import", files.path, *common), 1, "bundle exists", "--force")
    refused(backline(capsys, "import", tmp_path / "no.ckpt", *common, "--force"), 1, "no.ckpt does not exist")
    refused(backline(capsys, "import", files.path, *common, "--weights", "best"), 2, "best")


def test_cancelling_leaves_nothing(files: Files, tmp_path: Path) -> None:
    phases: list[str] = []

    def callback(phase: str, fraction: float) -> None:
        assert 0 <= fraction <= 1
        phases.append(phase)
        if "vae_decoder" in phase:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        import_checkpoint(files.path, files.config_path, tmp_path / "bundle", callback=callback)
    assert "writing unet" in phases and not any(tmp_path.iterdir())


def test_interrupting_the_command_leaves_nothing(files: Files, tmp_path: Path) -> None:
    """Ctrl-C while the bundle is being written, as a terminal sends it; a tar has been unpacked by then."""
    archive = tmp_path / "release.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(files.path, "run/checkpoints/last.ckpt")
    command = [sys.executable, "-P", "-m", "bridge.cli", "import", str(archive)]
    command += ["--config", str(files.config_path), "--out", str(tmp_path / "new" / "bundle")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.bundle.*/*.onnx")) and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1 and said.strip() == "Stopped; nothing half-written is left."
    assert list(tmp_path.iterdir()) == [archive]


def test_every_task_runs_on_an_imported_model(tiny_reference_bundle: Path) -> None:
    model = Model.open(tiny_reference_bundle, "cpu", 1)
    stems = model.manifest.stems
    settings = Settings(seed=1, steps=2)
    rng = np.random.default_rng(0)
    sources = {name: Audio(0.1 * rng.standard_normal((1, 9000), np.float32), 8000) for name in stems}
    take = generate(model, seconds=1.2, settings=settings)
    assert set(take.stems) == set(stems) and take.stems["bass"].samples.shape == (1, 9600)
    subsets = [set(armed) for n in (1, 2, 3) for armed in combinations(stems, n)]
    assert len(subsets) == 14
    for armed in subsets:
        context = {name: audio for name, audio in sources.items() if name not in armed}
        filled = fill(model, context, sorted(armed), settings=settings)
        assert set(filled.stems) == armed
        assert all(np.isfinite(audio.samples).all() for audio in filled.stems.values())
    mix = Audio(sum(audio.samples for audio in sources.values()), 8000)
    for method in ("mask", "dirac", "gaussian"):
        parts = split(model, mix, method=method, settings=settings)
        total = sum(audio.samples for audio in parts.stems.values())
        assert relative_error(np.asarray(total), mix.samples) < 1e-5


def test_graphs_have_the_design_names(tiny_reference_bundle: Path) -> None:
    names = {
        "unet": (["latents", "timestep", "film"], ["prediction"]),
        "vae_encoder": (["mel"], ["moments"]),
        "vae_decoder": (["latents"], ["mel"]),
        "vocoder": (["mel"], ["audio"]),
    }
    for graph, (inputs, outputs) in names.items():
        session = ort.InferenceSession(
            str(tiny_reference_bundle / f"{graph}.onnx"), providers=["CPUExecutionProvider"]
        )
        assert [item.name for item in session.get_inputs()] == inputs
        assert [item.name for item in session.get_outputs()] == outputs
