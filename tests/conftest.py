"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from default_family import write_default_bundle
from reference_model import random_checkpoint, small_config, write_config
from tiny_bundle import write_tiny_bundle

from engine.model import Model
from export.import_checkpoint import import_checkpoint


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny graphs that declares every capability; do not write into it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Model:
    """The tiny bundle, opened."""
    return Model.open(tiny_bundle, "cpu", 1)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """What a published model can do: text, eps prediction, fixed windows, no context or mixture input."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    write_tiny_bundle(
        folder, capabilities=("text",), prediction="eps", level=None, dynamic_window=False, name="plain"
    )
    return Model.open(folder, "cpu", 1)


@pytest.fixture(scope="session")
def tiny_reference_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's networks, imported: four stems at 8 kHz, random weights; do not write into it."""
    folder = tmp_path_factory.mktemp("reference")
    tree = small_config(in_channels=4, out_channels=4)
    tree |= {"num_stems": 4, "stems": ["bass", "drums", "guitar", "piano"]}
    torch.save(random_checkpoint(write_config(folder / "config.json", tree)), folder / "last.ckpt")
    import_checkpoint(folder / "last.ckpt", folder / "config.json", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="session")
def tiny_default_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default family's networks, very small, random weights, every capability; do not write into it."""
    return write_default_bundle(tmp_path_factory.mktemp("default") / "bundle")
