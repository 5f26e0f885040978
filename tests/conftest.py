"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle

from engine.model import Model


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
