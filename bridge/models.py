"""Which bundles there are: the default one, and those in the user's models folder."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from engine.bundle import MANIFEST, Bundle, load_bundle
from engine.errors import BacklineError


def models_folder() -> Path:
    """Where bundles are looked up by name: $BACKLINE_MODELS, or `models` in the user's data folder."""
    return Path(os.environ.get("BACKLINE_MODELS") or Path(platformdirs.user_data_dir("backline")) / "models")


def find_bundle(model: str | None) -> Path | None:
    """The bundle a user means: a path, or a name in the models folder. None is the default bundle."""
    if model is None or Path(model).exists():
        return Path(model) if model is not None else None
    named = models_folder() / model
    return named if named.exists() else Path(model)


def list_bundles() -> list[Path | None]:
    """The default bundle (None), then every bundle in the models folder by name."""
    folder = models_folder()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [None, *(path for path in found if path.suffix == ".zip" or (path / MANIFEST).is_file())]


def describe(path: Path | None) -> dict[str, object]:
    """What `backline models` says of one bundle; a bundle that cannot be used says why under `error`."""
    where = "the default, ships with Backline" if path is None else str(path)
    try:
        bundle = load_bundle(path)
    except BacklineError as error:
        return {"path": where, "error": str(error)}
    manifest = bundle.manifest
    return {
        "path": where,
        "name": manifest.name,
        "version": manifest.version,
        "licence": manifest.licence,
        "stems": list(manifest.stems),
        "sample_rate": manifest.vocoder.sample_rate,
        "window_seconds": round(manifest.window_samples / manifest.mel.sample_rate, 2),
        "capabilities": list(manifest.capabilities),
        "megabytes": round(_bytes(bundle) / 1e6, 1),
    }


def _bytes(bundle: Bundle) -> int:
    return sum((bundle.folder / name).stat().st_size for name in bundle.manifest.files)
