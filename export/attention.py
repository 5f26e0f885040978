"""Attention that exports to onnxruntime's fused operator.

Written out as MatMul, Softmax, MatMul, the published UNet's attention over 8192 positions would need 3 GB for
its scores alone. onnxruntime's MultiHeadAttention (domain com.microsoft) goes over them in blocks, on the CPU
as on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.onnx.symbolic_helper import parse_args


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(width of a head)) v per head: q (B, L, C), k and v (B, M, C) -> (B, L, C)."""
    if torch.onnx.is_in_onnx_export():
        return torch.ops.backline.attend(q, k, v, heads)
    # torch has a fast kernel for channels that lie side by side only.
    split = [x.contiguous().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    if q.requires_grad and q.device.type == "cpu":
        return _written_out(*split).transpose(1, 2).flatten(2)
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fast kernel for the CPU takes several times as long for its gradients (torch 2.13)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1, dtype=q.dtype) @ v


def _untouched(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One node in a trace. Its values are not looked at: graphs are compared with the module afterwards."""
    return torch.empty_like(q)


@parse_args("v", "v", "v", "i")
def _symbolic(graph: Any, q: Any, k: Any, v: Any, heads: int) -> Any:
    fused = graph.op("com.microsoft::MultiHeadAttention", q, k, v, num_heads_i=heads)
    fused.setType(q.type().with_sizes([None] * 3))  # what was traced is one size of many
    return fused


# `torch.library.custom_op` would do the same, and import torch's compiler for seconds.
_library = torch.library.Library("backline", "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, int heads) -> Tensor")
_library.impl("attend", _untouched, "CompositeExplicitAutograd")
torch.onnx.register_custom_op_symbolic("backline::attend", _symbolic, 17)
