"""The tensors of a checkpoint by name, each accounted for, and networks filled from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from engine.errors import BacklineError
from export.checkpoint import Checkpoint, LazyTensor, Placeholder

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Source:
    """The tensors of one file, and which of them were taken."""

    checkpoint: Checkpoint
    tensors: dict[str, LazyTensor | Placeholder]
    taken: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor in float32. Raises BacklineError, naming it, where it is missing, misshapen or damaged."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BacklineError(f"{self.path} lacks the tensor {name}.")
        if isinstance(tensor, Placeholder):
            raise BacklineError(
                f"{self.path}: the tensor {name} depends on a foreign object, {tensor.origin}, "
                "which is not rebuilt."
            )
        if shape is not None and tensor.shape != shape:
            raise BacklineError(
                f"{self.path}: the tensor {name} has shape {list(tensor.shape)}, and the configuration "
                f"asks for {list(shape)}."
            )
        value = self.checkpoint.read(tensor).float()
        if not bool(torch.isfinite(value).all()):
            raise BacklineError(f"{self.path}: the tensor {name} holds values that are not finite.")
        self.taken.add(name)
        return value

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)


def load_network(build: Callable[[], Network], source: Source, rename: Callable[[str], str]) -> Network:
    """A network with its tensors read one by one; it is built without memory of its own."""
    with torch.device("meta"):
        module = build()
    state = {
        name: _read_normalised(source, rename(name), tuple(parameter.shape))
        for name, parameter in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def _read_normalised(source: Source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight, multiplied out where the file has weight normalisation's two parts (arXiv:1602.07868)."""
    if name in source.tensors or not name.endswith(".weight"):
        return source.read(name, shape)
    stem = name.removesuffix("weight")
    for size, direction in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        if stem + direction in source.tensors:
            g = source.read(stem + size, (shape[0], *[1] * (len(shape) - 1)))
            v = source.read(stem + direction, shape)
            return v * (g / v.flatten(1).norm(dim=1).reshape(g.shape))
    return source.read(name, shape)
