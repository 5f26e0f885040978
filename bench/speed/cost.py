"""What a graph has to compute and to move, counted from the shapes of a real run.

onnxruntime's profile tells the shapes that every node really had, so nothing has to be inferred.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = list[int]


@dataclass(frozen=True)
class Cost:
    """flops: of products and convolutions, 2 per multiplication. bytes: weights, inputs, outputs, once each.

    activations: bytes that the nodes write one by one, which a kernel that fuses them need not.
    """

    flops: float
    bytes: float
    activations: float

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that this hardware needs at least: the roofline (Williams and others 2009)."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def graph_cost(path: Path, feed: Mapping[str, NDArray[Any]]) -> Cost:
    """The cost of one run of a graph with these inputs, on the CPU and without onnxruntime's rewriting."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, dict(feed))
        nodes = profiled_nodes(session)
    moved = sum(value.nbytes for value in feed.values()) + sum(value.nbytes for value in outputs)
    return Cost(
        flops=sum(node_flops(node) for node in nodes),
        bytes=moved + weight_bytes(path),
        activations=float(sum(int(node.get("output_size", 0)) for node in nodes)),
    )


def weight_bytes(path: Path) -> int:
    """Size of a graph on disk, with the files of its external data: nearly all of it is weights."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))


def node_flops(node: Mapping[str, Any]) -> float:
    """Of one node of a profile; 0 for what is neither a product nor a convolution."""
    inputs, outputs = _shapes(node["input_type_shape"]), _shapes(node["output_type_shape"])
    count = FLOPS.get(node["op_name"])
    return count(inputs, outputs) if count and inputs and outputs else 0.0


def _shapes(described: list[dict[str, Shape]]) -> list[Shape]:
    return [shape for entry in described for shape in entry.values()]


def _product(inputs: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * inputs[0][-1]


def _gemm(inputs: list[Shape], outputs: list[Shape]) -> float:
    # A (M, K) or its transpose: K is what is left of its size beside the output's rows
    return 2.0 * math.prod(outputs[0]) * math.prod(inputs[0]) / outputs[0][0]


def _convolution(inputs: list[Shape], outputs: list[Shape]) -> float:
    return 2.0 * math.prod(outputs[0]) * math.prod(inputs[1][1:])


def _transposed(inputs: list[Shape], outputs: list[Shape]) -> float:
    del outputs
    return 2.0 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(inputs: list[Shape], outputs: list[Shape]) -> float:
    # queries (B, L, heads x size) or (B, heads, L, size), keys alike: two products over all pairs
    keys = inputs[1][-2]
    del outputs
    return 4.0 * math.prod(inputs[0]) * keys


FLOPS: dict[str, Callable[[list[Shape], list[Shape]], float]] = {
    "MatMul": _product,
    "FusedMatMul": _product,
    "Gemm": _gemm,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
}


def profiled_nodes(session: Any) -> list[dict[str, Any]]:
    """The nodes of a session's profile, which ends here."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    return [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def random_feed(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Normal random inputs in float32; `timestep` in the middle of the usual schedule."""
    rng = np.random.default_rng(seed)
    feed: dict[str, NDArray[Any]] = {}
    for name, shape in shapes.items():
        if name == "timestep":
            feed[name] = np.full(shape, 500, np.int64)
        else:
            feed[name] = rng.standard_normal(shape).astype(np.float32)
    return feed
