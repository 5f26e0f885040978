"""Which form of the 3-D UNet's convolutions is fastest on this machine: native, folded to 2-D, or Winograd's.

All compute the same (`export.conv3d`). Which one runs fastest depends on the processor and on onnxruntime's
provider, so one convolution of the width is timed in each as a model is imported.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from export.conv3d import fold_depth, winograd_depth
from export.onnx_writer import Input, Precision, write_graph
from export.unet3d import UNet3d, UNet3dConfig

FORMS = ("winograd", "folded", "native")
DEPTH, TIME, FREQUENCY = 8, 64, 16  # of the timed convolution, as in the second level of a released window
WIDEST = 128  # a wider one takes longer to time and says the same
ROUNDS = 5


@functools.cache
def form_seconds(width: int) -> dict[str, float]:
    """Seconds of one 3x3x3 convolution of `width` channels in each form, the median of interleaved rounds.

    By the provider that onnxruntime prefers on this machine: CUDA where it is there.
    """
    torch.manual_seed(0)
    channels = min(width, WIDEST)
    native = nn.Sequential(nn.Conv3d(channels, channels, 3, padding=1))
    modules = {form: in_form(copy.deepcopy(native), form, DEPTH, channels) for form in FORMS}
    shape = ("batch", channels, DEPTH, "time", FREQUENCY)
    x = np.zeros((1, channels, DEPTH, TIME, FREQUENCY), np.float32)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            form: _session(module, shape, Path(folder) / f"{form}.onnx") for form, module in modules.items()
        }
        for number in range(ROUNDS + 1):
            for form, session in sessions.items():
                started = time.perf_counter()
                session.run(None, {"x": x})
                if number:  # the first round warms up
                    seconds[form].append(time.perf_counter() - started)
    return {form: median(row) for form, row in seconds.items()}


def in_form(module: nn.Module, form: str, depth: int, widest: int) -> nn.Module:
    """`module` with its 3-D convolutions, of `depth` slices, in one of FORMS; in place.

    widest: channels of the widest convolution that is worth Winograd's weights, see `winograd_depth`.
    """
    if form == "native":
        return module
    return winograd_depth(module, depth, widest) if form == "winograd" else fold_depth(module)


def widest_worth(config: UNet3dConfig) -> int:
    """`widest` for a UNet: its levels down to a quarter of the resolution, which have most of the work."""
    return config.width * max(config.multipliers[:3])


def in_fastest_form(unet: UNet3d, depth: int, precision: Precision = "fp32") -> tuple[UNet3d, dict[str, Any]]:
    """The UNet, its convolutions rewritten in place where that is faster, and what the manifest says of it.

    depth: the latents' z. Winograd's form is none for a graph that computes in float16.
    """
    seconds = form_seconds(unet.config.width)
    allowed = [form for form in FORMS if form != "winograd" or precision != "fp16-compute"]
    form = min(allowed, key=lambda name: seconds[name])
    in_form(unet, form, depth, widest_worth(unet.config))
    milliseconds = {name: round(1000 * value, 2) for name, value in seconds.items()}
    return unet, {"form": form, "one_convolution_ms": milliseconds}


def _session(module: nn.Module, shape: tuple[int | str, ...], path: Path) -> Any:
    import onnxruntime

    sizes = [{"batch": 1, "time": 4}, {"batch": 2, "time": 6}]
    write_graph(module, [Input("x", shape)], {"y": shape}, path, sizes=sizes)
    return onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
