"""A bundle's UNet in torch, made again from its manifest and its graph."""

from __future__ import annotations

import importlib.util
from typing import Any

from engine.bundle import Bundle

HALVED = ".float16"  # ending of the names of weights that export/onnx_writer.py stores as float16


def why_not_torch() -> str | None:
    """A sentence where torch cannot take part at all."""
    absent = [name for name in ("torch", "onnx") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (the extra 'export')" if absent else None


def torch_unet(bundle: Bundle) -> tuple[Any, str]:
    """The network and "the bundle's weights", or "random weights" where the graph names them otherwise.

    Raises LookupError where the manifest describes no network of the kinds that export/ has.
    """
    from export.stem_unet import StemUNet, StemUNetConfig
    from export.unet3d import UNet3d, UNet3dConfig

    described = bundle.manifest.networks.get("unet", {})
    kinds: list[tuple[Any, Any]] = [(StemUNet, StemUNetConfig), (UNet3d, UNet3dConfig)]
    for network, config in kinds:
        if described and set(described) <= set(config.__dataclass_fields__):
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
            module = network(config(**values)).eval().requires_grad_(False)
            return module, _load(module, bundle)
    raise LookupError("the manifest does not describe its UNet")


def _load(module: Any, bundle: Bundle) -> str:
    import onnx
    import torch
    from onnx import numpy_helper

    path = bundle.path("unet.onnx")
    state = module.state_dict()
    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {t.name.removesuffix(HALVED): tuple(t.dims) for t in graph.initializer}
    if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in state.items()):
        return "random weights"
    graph = onnx.load(str(path)).graph
    for tensor in graph.initializer:
        name = tensor.name.removesuffix(HALVED)
        if name in state:
            state[name] = torch.tensor(numpy_helper.to_array(tensor)).to(state[name].dtype)
    module.load_state_dict(state)
    return "the bundle's weights"
