"""Model bundles on disk: a folder or a zip of one, every file checked before it is used."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import shutil
import stat
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from pydantic import ValidationError

from engine.errors import BacklineError
from engine.manifest import SCHEMA_VERSION, Manifest

MANIFEST = "manifest.json"
DEFAULT_BUNDLE = "default_bundle"
REQUIRED = ("unet.onnx", "vae_encoder.onnx", "vae_decoder.onnx", "vocoder.onnx")


@dataclass(frozen=True)
class Bundle:
    """A checked bundle: `folder` holds every file that `manifest.files` names."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where the named file lies. Raises BacklineError where the bundle has none."""
        if name not in self.manifest.files:
            raise BacklineError(f"The model {self.manifest.name} has no {name}.")
        return self.folder / name


def load_bundle(path: str | Path | None = None) -> Bundle:
    """Opens and checks a bundle; None is the one that ships with Backline.

    Raises BacklineError, one sentence each: no such path, no bundle, a manifest that cannot be read or
    is of a newer schema, a file that is missing, truncated or changed.
    """
    if path is None:
        return _load_folder(_default_folder())
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise BacklineError(f"The model {path} does not exist.")
    if not zipfile.is_zipfile(path):
        raise BacklineError(f"{path} is no model bundle: it is neither a folder nor a complete zip file.")
    return _load_zip(path)


def read_manifest(folder: Path, shown: Path | None = None) -> Manifest:
    """The manifest alone, without looking at the files it names; `shown` is what messages call the bundle.

    Raises BacklineError as `load_bundle`.
    """
    shown = shown or folder
    file = folder / MANIFEST
    if not file.is_file():
        raise BacklineError(f"{shown} is no model bundle: it has no {MANIFEST}.")
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BacklineError(f"{shown} is damaged: its {MANIFEST} cannot be read as JSON.") from error
    version = values.get("schema_version", SCHEMA_VERSION) if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BacklineError(
            f"{shown} is a bundle of schema {version}, newer than {SCHEMA_VERSION}, "
            "the newest that this Backline reads: update Backline."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        raise BacklineError(f"{shown} has no valid {MANIFEST}: {where}: {first['msg']}.") from error


def file_sha256(path: Path) -> str:
    """Lower-case hexadecimal SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_folder() -> Path:
    folder = Path(str(importlib.resources.files("engine") / DEFAULT_BUNDLE))
    if not folder.is_dir():
        raise BacklineError("This installation has no default model: name a bundle with --model.")
    return folder


def _load_folder(folder: Path, shown: Path | None = None) -> Bundle:
    shown = shown or folder
    manifest = read_manifest(folder, shown)
    for name in REQUIRED:
        if name not in manifest.files:
            raise BacklineError(f"{shown} is incomplete: its {MANIFEST} names no {name}.")
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected, shown)
    return Bundle(folder, manifest)


def _check_file(folder: Path, name: str, expected: str, shown: Path) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise BacklineError(f"{shown} is refused: its {MANIFEST} names a file outside the bundle, {name}.")
    if not (folder / name).is_file():
        raise BacklineError(f"{shown} is incomplete: {name} is missing.")
    if file_sha256(folder / name) != expected.lower():
        raise BacklineError(f"{shown} is damaged: {name} is cut off or changed (its SHA-256 does not match).")


def _load_zip(path: Path) -> Bundle:
    cached = _cache_folder() / file_sha256(path)
    if cached.is_dir():
        try:
            return _load_folder(cached, path)
        except BacklineError:
            shutil.rmtree(cached, ignore_errors=True)  # a damaged cache is made anew, not trusted
    unpacked = Path(tempfile.mkdtemp(dir=cached.parent, prefix=".unpack-"))
    try:
        _unpack(path, unpacked)
        root = _bundle_root(path, unpacked)
        manifest = _load_folder(root, path).manifest
        if not cached.is_dir():
            root.replace(cached)
    except OSError as error:
        raise BacklineError(f"{path} could not be unpacked: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return Bundle(cached, manifest)


def _cache_folder() -> Path:
    folder = Path(platformdirs.user_cache_dir("backline")) / "bundles"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BacklineError(f"{folder} could not be created: {error.strerror}.") from error
    return folder


def _unpack(path: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                inside = (target / entry.filename).resolve().is_relative_to(target.resolve())
                if not inside or stat.S_ISLNK(entry.external_attr >> 16):
                    raise BacklineError(f"{path} is refused: it holds a link or a path outside the bundle.")
            if sum(entry.file_size for entry in entries) > shutil.disk_usage(target).free:
                raise BacklineError(f"The disk has no room to unpack {path}.")
            archive.extractall(target)
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise BacklineError(f"{path} is damaged: the zip file cannot be unpacked.") from error


def _bundle_root(path: Path, unpacked: Path) -> Path:
    """The folder with the manifest: the zip's root, or the one folder in it."""
    for folder in [unpacked, *sorted(p for p in unpacked.iterdir() if p.is_dir())]:
        if (folder / MANIFEST).is_file():
            return folder
    raise BacklineError(f"{path} is no model bundle: it has no {MANIFEST}.")
