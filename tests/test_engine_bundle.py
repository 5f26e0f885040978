"""Bundles: folder, zip, cache, and every way in which one can be broken."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bundle import WEAK, write_tiny_bundle

from engine import bundle
from engine.errors import BacklineError
from engine.model import Model


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    return tmp_path / "cache" / "bundles"


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.parent / "bundle.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + file.name)
    return path


def refused(path: Path | None) -> str:
    with pytest.raises(BacklineError) as caught:
        bundle.load_bundle(path)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def test_folder(folder: Path) -> None:
    loaded = bundle.load_bundle(folder)
    assert loaded.manifest.name == "tiny"
    assert loaded.path("unet.onnx") == folder / "unet.onnx"
    with pytest.raises(BacklineError, match="has no lyrics"):
        loaded.path("lyrics.onnx")


def test_no_such_path(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")


def test_no_bundle(tmp_path: Path) -> None:
    assert "no model bundle" in refused(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"no zip")
    assert "no model bundle" in refused(tmp_path / "x.zip")


def test_missing_file(folder: Path) -> None:
    (folder / "vocoder.onnx").unlink()
    assert "vocoder.onnx is missing" in refused(folder)


def test_changed_file(folder: Path) -> None:
    with (folder / "vocoder.onnx").open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    assert "vocoder.onnx is cut off or changed" in refused(folder)


def test_truncated_file(folder: Path) -> None:
    os.truncate(folder / "unet.onnx", 1000)
    assert "unet.onnx is cut off or changed" in refused(folder)


def test_graph_that_is_not_listed(folder: Path) -> None:
    edit(folder, lambda values: values["files"].pop("vae_decoder.onnx"))
    assert "names no vae_decoder.onnx" in refused(folder)


def test_newer_schema(folder: Path) -> None:
    # A newer schema may hold fields this one does not know; the version is what has to be said.
    edit(folder, lambda values: values.update(schema_version=99, tuning="just"))
    assert "schema 99" in refused(folder)
    assert "update Backline" in refused(folder)


def test_manifest_that_is_no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "ti')
    assert "cannot be read as JSON" in refused(folder)


@pytest.mark.parametrize("text", ["[]", "3", '{"name": "x"}'])
def test_manifest_that_is_something_else(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    assert "no valid manifest.json" in refused(folder)


def test_manifest_field_out_of_range(folder: Path) -> None:
    edit(folder, lambda values: values["mel"].update(hop=0))
    assert "mel.hop" in refused(folder)


def test_manifest_with_makeup_for_a_stem_that_is_none(folder: Path) -> None:
    edit(folder, lambda values: values["level"].update(makeup_db={"kazoo": 3.0}))
    assert "makeup_db" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"capabilities": ["text", "audio", "context", "mixture", "grid", "chords", "distilled"]},
            "go together",
        ),
        ({"distilled": {"steps": 4, "listening": 1.0}}, "go together"),
        ({"sampling": {"sampler": "distilled", "steps": 4}}, "distilled preset"),
        ({"weakened": {"listening": {"piano": 3.0}}}, "go together"),
    ],
)
def test_manifest_that_is_half_distilled(folder: Path, change: dict, message: str) -> None:
    edit(folder, lambda values: values.update(change))
    assert message in refused(folder)


@pytest.mark.parametrize("change", [{"listening": {"kazoo": 3.0}}, {"freed": ["kazoo"]}])
def test_manifest_with_a_weight_for_a_stem_that_is_none(tmp_path: Path, change: dict) -> None:
    folder = write_tiny_bundle(tmp_path / "weak", **WEAK)
    declared = bundle.load_bundle(folder).manifest.weakened
    assert declared is not None and declared.listening == {"piano": 3.0} and declared.freed == ("piano",)
    edit(folder, lambda values: values["weakened"].update(change))
    assert "weakened names a stem that is none" in refused(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\\b", "c:x"])
def test_manifest_that_points_outside(folder: Path, name: str) -> None:
    edit(folder, lambda values: values["files"].update({name: "0" * 64}))
    assert "outside the bundle" in refused(folder)


@pytest.mark.parametrize("prefix", ["", "tiny/"])
def test_zip_is_unpacked_once(folder: Path, cache: Path, prefix: str) -> None:
    path = zipped(folder, prefix)
    first = bundle.load_bundle(path)
    assert first.folder.parent == cache
    assert [entry.name for entry in cache.iterdir()] == [first.folder.name]
    stamp = (first.folder / "unet.onnx").stat().st_mtime_ns
    second = bundle.load_bundle(path)
    assert second.folder == first.folder
    assert (second.folder / "unet.onnx").stat().st_mtime_ns == stamp
    assert Model.open(path, "cpu", 1).manifest.name == "tiny"


def test_damaged_cache_is_made_anew(folder: Path, cache: Path) -> None:
    path = zipped(folder)
    first = bundle.load_bundle(path)
    os.truncate(first.folder / "unet.onnx", 10)
    assert (bundle.load_bundle(path).folder / "unet.onnx").stat().st_size > 10


def test_truncated_zip(folder: Path, cache: Path) -> None:
    path = zipped(folder)
    os.truncate(path, path.stat().st_size // 2)
    assert "no model bundle" in refused(path)


def test_zip_with_a_damaged_entry(folder: Path, cache: Path) -> None:
    path = zipped(folder)
    raw = bytearray(path.read_bytes())
    raw[2000:2100] = bytes(100)
    path.write_bytes(raw)
    assert str(path) in refused(path)
    assert list(cache.iterdir()) == []


def test_zip_of_a_broken_bundle_names_the_zip(folder: Path, cache: Path) -> None:
    (folder / "unet.onnx").write_bytes(b"x")
    path = zipped(folder)
    message = refused(path)
    assert message.startswith(str(path))
    assert list(cache.iterdir()) == []


def test_zip_that_escapes(folder: Path, cache: Path, tmp_path: Path) -> None:
    path = zipped(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped.txt", "x")
    assert "outside the bundle" in refused(path)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_zip_with_a_link(folder: Path, cache: Path) -> None:
    path = zipped(folder)
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("link.onnx")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    assert "link" in refused(path)


def test_zip_larger_than_the_disk(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10))
    assert "no room" in refused(path)


def test_no_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "DEFAULT_BUNDLE", "nothing_here")
    assert "no default model" in refused(None)
