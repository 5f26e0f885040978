"""What the hardware can do at most: a large product, a large copy, timed in turns with all the rest."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine.errors import BacklineError

SIDE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 1 << 27, "cuda": 1 << 31}  # bytes
COPY = "ceiling: copy"
PRODUCT = "ceiling: product by "

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """flops: multiplications and additions a second, in `precision`. bytes: read and written a second."""

    flops: float
    bytes: float
    precision: str
    by: str


def ceiling_calls(device: str, threads: int) -> dict[str, Call]:
    """Products of square matrices by whatever can make them here, and a copy, by name.

    float32 on the CPU, float16 on a GPU. Raises BacklineError for `cuda` where torch has no CUDA.
    """
    return _cuda_calls() if device == "cuda" else _cpu_calls(threads)


def read_ceilings(seconds: Mapping[str, list[float]], device: str) -> Ceilings:
    """From seconds by the names of `ceiling_calls`: the fastest product, the copy.

    Of each the median of the faster half of the rounds: a ceiling is what is possible, not what is usual.
    """
    best = {name: _faster_half(row) for name, row in seconds.items() if name.startswith(PRODUCT)}
    by = min(best, key=lambda name: best[name])
    copied = 2 * COPIED[device] / _faster_half(seconds[COPY])
    precision = "float16" if device == "cuda" else "float32"
    return Ceilings(2 * SIDE[device] ** 3 / best[by], copied, precision, by.removeprefix(PRODUCT))


def _faster_half(row: list[float]) -> float:
    return median(sorted(row)[: len(row) // 2 + 1])


def _cpu_calls(threads: int) -> dict[str, Call]:
    a = np.random.default_rng(0).standard_normal((SIDE["cpu"], SIDE["cpu"]), np.float32)
    product = np.empty_like(a)
    source = np.ones(COPIED["cpu"], np.uint8)
    target = np.empty_like(source)
    calls: dict[str, Call] = {
        COPY: lambda: np.copyto(target, source),
        f"{PRODUCT}numpy": lambda: np.matmul(a, a, out=product),
    }
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
        b = torch.from_numpy(a)
        into = torch.empty_like(b)
        calls[f"{PRODUCT}torch"] = lambda: torch.matmul(b, b, out=into)
    if importlib.util.find_spec("onnx"):
        calls[f"{PRODUCT}onnxruntime"] = _onnx_product(a, threads)
    return calls


def _onnx_product(a: np.ndarray[Any, np.dtype[np.float32]], threads: int) -> Call:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    kind = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "a"], ["b"])],
        "product",
        [kind("a", TensorProto.FLOAT, a.shape)],
        [kind("b", TensorProto.FLOAT, a.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(model, str(path))
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": a})


def _cuda_calls() -> dict[str, Call]:
    if not importlib.util.find_spec("torch"):
        raise BacklineError("The ceilings of a GPU are measured with torch, which is not installed.")
    import torch

    if not torch.cuda.is_available():
        raise BacklineError("The ceilings of a GPU are measured with torch, which finds no CUDA here.")
    source = torch.empty(COPIED["cuda"], dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(SIDE["cuda"], SIDE["cuda"], dtype=torch.float16, device="cuda")
    product = torch.empty_like(a)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    def multiply() -> None:
        torch.matmul(a, a, out=product)
        torch.cuda.synchronize()

    return {COPY: copy, f"{PRODUCT}torch": multiply}
