"""Whom the engine's UNet step is timed beside: the same network in torch, a UNet of diffusers."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.speed.ceilings import Ceilings
from bench.speed.cost import Cost
from bench.speed.networks import torch_unet, why_not_torch
from bench.timing import interleaved
from engine.loop import graph_numbers
from engine.model import Model

Feed = Mapping[str, NDArray[Any]]
Call = Callable[[], object]
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128)  # of diffusers' UNet
# Times torch's seconds, past which a reason is wanted.
EAGER_LIMIT, COMPILED_LIMIT = 0.8, 1.2


def why_not_compile() -> str | None:
    """A sentence where torch.compile cannot run."""
    return None if shutil.which("g++") else "torch.compile wants a C++ compiler (g++), and there is none"


def session_call(model: Model, graph: str, feed: Feed, device: str) -> Call:
    """One run of a graph in the engine's own session, its inputs and outputs left on the device."""
    import onnxruntime as ort

    session = model.session(graph)
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, 0)
    options = model.run_options(graph=next(graph_numbers) if model.cuda_graph else None)

    def call() -> None:
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()

    return call


def contest(
    model: Model,
    feed: Feed,
    cost: Cost,
    ceilings: Ceilings,
    device: str,
    *,
    rounds: int,
    limit: float,
    compiled: bool,
    network: Any = None,
) -> dict[str, Any]:
    """One UNet step in turns: the engine's session, torch eager and, if asked for, torch.compile.

    network: the bundle's UNet in torch, where it need not be made again. On a GPU torch computes in float16.
    """
    calls = {"engine": session_call(model, "unet", feed, device)}
    missing: dict[str, str] = {}
    weights = "the bundle's weights"
    try:
        if reason := why_not_torch():
            raise LookupError(reason)
        if network is None:
            network, weights = torch_unet(model.bundle)
        calls |= _torch_calls(network, feed, device, model.threads, compiled, missing)
    except LookupError as error:
        missing["torch"] = str(error.args[0])
    seconds = {name: median(row) for name, row in interleaved(calls, rounds, limit).items()}
    floor = cost.floor(ceilings.flops, ceilings.bytes)
    over = {name: seconds["engine"] / value for name, value in seconds.items() if name != "engine"}
    return {
        "network": model.manifest.name,
        "weights_in_torch": weights,
        "precision_of_torch": "float16" if device == "cuda" else "float32",
        "gflop": cost.flops / 1e9,
        "seconds": seconds,
        "times_floor": {name: value / floor for name, value in seconds.items()},
        "engine_over": over,
        "missing": missing,
        "why_slower": why_slower(over, cost, seconds.get("torch", 0.0) / floor),
    }


def why_slower(over: Mapping[str, float], cost: Cost, torch_times_floor: float) -> str | None:
    """A sentence where the engine takes more than the limits above allow."""
    if over.get("torch.compile", 0.0) > COMPILED_LIMIT:
        written, needed = cost.activations / 1e6, cost.bytes / 1e6
        return (
            f"torch.compile fuses what lies between the products: node by node the graph writes "
            f"{written:.0f} MB of activations, where {needed:.0f} MB have to be moved."
        )
    if over.get("torch", 0.0) > EAGER_LIMIT:
        best = EAGER_LIMIT * torch_times_floor
        return (
            f"torch itself takes {torch_times_floor:.2f} times the floor: {EAGER_LIMIT:g} of its seconds "
            f"would be {best:.2f} times what this processor can do at best."
        )
    return None


def diffusers_contest(threads: int, device: str, flops: float) -> dict[str, Any]:
    """One step of a diffusers UNet of MusicLDM's kind, its width chosen for about as many FLOPs."""
    if importlib.util.find_spec("diffusers") is None:
        return {"missing": "diffusers is not installed (pip install diffusers)"}
    import torch
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(threads)
    kind = torch.float16 if device == "cuda" else torch.float32

    def build(width: int) -> tuple[Any, dict[str, Any], float]:
        torch.manual_seed(0)
        widths = (width, 2 * width, 3 * width, 5 * width)
        network = UNet2DConditionModel(
            in_channels=8, out_channels=8, sample_size=(256, 16), norm_num_groups=8,
            block_out_channels=widths, layers_per_block=2,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
            attention_head_dim=8, cross_attention_dim=widths, class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=512, class_embeddings_concat=True,
        ).eval().requires_grad_(False).to(device, kind)  # fmt: skip
        inputs = {
            "sample": torch.randn(1, 8, 256, 16, device=device, dtype=kind), "timestep": 500,
            "encoder_hidden_states": None, "class_labels": torch.randn(1, 512, device=device, dtype=kind),
        }  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
        return network, inputs, float(counter.get_total_flops())

    found = (build(width) for width in WIDTHS)
    network, inputs, counted = min(found, key=lambda built: abs(np.log(built[2] / flops)))
    call = _without_gradient(network, inputs, device)
    seconds = median(interleaved({"diffusers": call}, 5, 20.0)["diffusers"])
    return {"seconds": seconds, "gflop": counted / 1e9, "gflop_per_second": counted / seconds / 1e9}


def _torch_calls(
    network: Any, feed: Feed, device: str, threads: int, compiled: bool, missing: dict[str, str]
) -> dict[str, Call]:
    import torch

    torch.set_num_threads(threads)
    given = {name: torch.from_numpy(value).to(device) for name, value in feed.items()}
    network = network.eval().requires_grad_(False).to(device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        given = {name: x.half() if x.is_floating_point() else x for name, x in given.items()}
        network = _halved(network)
    calls = {"torch": _without_gradient(network, given, device)}
    if not compiled:
        return calls
    if reason := why_not_compile():
        missing["torch.compile"] = reason
        return calls
    call = _without_gradient(torch.compile(network), given, device)
    try:
        call()
    except Exception as error:  # the compiler's own classes share no public base
        missing["torch.compile"] = f"torch.compile failed: {str(error).strip().splitlines()[0]}"
        return calls
    return calls | {"torch.compile": call}


def _halved(network: Any) -> Any:
    """In float16; what comes in float32, such as the time embedding, is made float16 before a product."""
    from torch import nn

    def narrow(module: Any, inputs: Any) -> Any:
        return tuple(x.to(module.weight.dtype) for x in inputs)

    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(narrow)
    return network.half()


def _without_gradient(step: Any, given: dict[str, Any], device: str) -> Call:
    import torch

    def call() -> None:
        with torch.no_grad():
            step(**given)
        if device == "cuda":
            torch.cuda.synchronize()

    return call
