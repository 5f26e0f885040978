"""What the hardware can do at most: a large product, a large copy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

SIDE = 2048
COPY = 1 << 28  # bytes
ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """flops: multiplications and additions a second, in `precision`. bytes: read and written a second."""

    flops: float
    bytes: float
    precision: str
    by: str


def cpu_ceilings(threads: int) -> Ceilings:
    """The faster of numpy's product and torch's, where torch is installed; a copy by numpy."""
    rates = {"numpy": _numpy_product()}
    torch = _torch()
    if torch is not None:
        torch.set_num_threads(threads)
        rates["torch"] = _torch_product(torch, "cpu", torch.float32)
    by = max(rates, key=lambda name: rates[name])
    return Ceilings(rates[by], _numpy_copy(), "float32", by)


def cuda_ceilings() -> Ceilings:
    """Half-precision products and copies on the first GPU. Raises RuntimeError without torch for CUDA."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        raise RuntimeError("the ceilings of a GPU are measured with torch for CUDA, which is not installed")
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    rate = 2 * source.numel() / _best(copy)
    return Ceilings(_torch_product(torch, "cuda", torch.float16), rate, "float16", "torch")


def _numpy_product() -> float:
    a = np.ones((SIDE, SIDE), np.float32)
    out = np.empty_like(a)
    return 2 * SIDE**3 / _best(lambda: np.matmul(a, a, out=out))


def _torch_product(torch: Any, device: str, kind: Any) -> float:
    side = SIDE if device == "cpu" else 8192
    a = torch.ones(side, side, dtype=kind, device=device)
    out = torch.empty_like(a)

    def product() -> None:
        torch.matmul(a, a, out=out)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / _best(product)


def _numpy_copy() -> float:
    source = np.ones(COPY, np.uint8)
    target = np.empty_like(source)
    return 2 * COPY / _best(lambda: np.copyto(target, source))


def _best(step: Any) -> float:
    """Median seconds of the faster half of the rounds: a ceiling is what is possible, not what is usual."""
    step()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return median(sorted(seconds)[: ROUNDS // 2 + 1])


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch
