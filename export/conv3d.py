"""Three-dimensional convolutions written as 2-D ones, which onnxruntime has fast kernels for.

Both forms take the same weights and differ from the native one in rounding alone. `FoldedConv3d` does the
same arithmetic; `WinogradConv3d` needs half of its products, at the price of some of float32's last digits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

TILE = 4  # slices in depth that are computed together
# F(4, 3) of Lavin and Gray 2015 (arXiv:1509.09308), its transforms of input, kernel and output.
INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
NARROW = 4  # bands: of so few, time makes the longer rows, which the kernels run along faster
NARROWEST = 32  # channels; with fewer the transforms cost more than they save


class FoldedConv3d(nn.Module):
    """A 3x3x3 convolution (stride 1 in depth) as the sum of three 2-D ones, one per tap in depth.

    The slices in depth are a batch, so that a shift in depth is one of slices and what lies outside costs
    nothing. A 1x1x1 convolution is a single 2-D one.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.stride = conv.stride[1]
        self.bias = conv.bias
        self.taps = _taps(conv)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.taps) > 1:
            return _along_the_longer(self._convolved, x, list(self.taps), self.stride)
        batch, channels, depth, time, frequency = x.shape
        rows = x.reshape(batch, channels, depth * time, frequency)
        y = functional.conv2d(rows, self.taps[0], self.bias)
        return y.reshape(batch, y.shape[1], depth, time, frequency)

    def _convolved(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        slices = x.transpose(1, 2)
        before = self._by_slices(slices[:, :-1], taps[0], None)
        here = self._by_slices(slices, taps[1], self.bias)
        after = self._by_slices(slices[:, 1:], taps[2], None)
        inner = (0, 0, 0, 0, 0, 0)
        y = here + functional.pad(before, (*inner, 1, 0)) + functional.pad(after, (*inner, 0, 1))
        return y.transpose(1, 2)

    def _by_slices(self, x: Tensor, tap: Tensor, bias: Tensor | None) -> Tensor:
        """(B, slices, C, time, frequency) -> the same with the tap's channels."""
        batch, _, channels, time, frequency = x.shape
        rows = x.reshape(-1, channels, time, frequency)
        y = functional.conv2d(rows, tap, bias, stride=self.stride, padding=1)
        return y.reshape(batch, -1, y.shape[1], y.shape[2], y.shape[3])


class WinogradConv3d(nn.Module):
    """A 3x3x3 convolution (stride 1 in depth) by Winograd's minimal filtering over depth.

    Six 2-D convolutions of sums of slices make four slices, where tap by tap it takes twelve. The kernels'
    sums are made of the stored taps in the graph, and onnxruntime computes them once as it loads: a file is
    as large as before, its weights in memory are twice as large. The input is summed with factors of up to 5
    and the output of up to 8, so this is for float32 alone.
    """

    before: Tensor
    kernel: Tensor
    after: Tensor

    def __init__(self, conv: nn.Conv3d, depth: int) -> None:
        super().__init__()
        self.stride = conv.stride[1]
        self.bias = conv.bias
        self.taps = _taps(conv)
        before, after = depth_transforms(depth)
        self.register_buffer("before", torch.from_numpy(before))
        self.register_buffer("kernel", torch.from_numpy(KERNEL.astype(np.float32)))
        self.register_buffer("after", torch.from_numpy(after))

    def forward(self, x: Tensor) -> Tensor:
        return _along_the_longer(self._convolved, x, list(self.taps), self.stride)

    def _convolved(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        batch, channels, _, time, frequency = x.shape
        summed = torch.matmul(self.before, x.flatten(3)).reshape(batch, channels, -1, time, frequency)
        tiles = len(self.before) // len(KERNEL)
        made = [
            functional.conv2d(summed[:, :, tiles * number + tile], kernel, stride=self.stride, padding=1)
            for number, kernel in enumerate(self._kernels(taps))
            for tile in range(tiles)
        ]
        y = torch.matmul(self.after, torch.stack(made, 2).flatten(3))
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y.reshape(batch, y.shape[1], -1, made[0].shape[2], made[0].shape[3])

    def _kernels(self, taps: list[Tensor]) -> list[Tensor]:
        return [torch.einsum("d,doihw->oihw", weights, torch.stack(taps)) for weights in self.kernel]


def _along_the_longer(
    convolved: Callable[[Tensor, list[Tensor]], Tensor], x: Tensor, taps: list[Tensor], stride: int
) -> Tensor:
    """`convolved(x, taps)` of x (B, C, depth, time, frequency), with time innermost where bands are few.

    The forms divide the axis before the innermost by the stride, so it has to go into the bands.
    """
    if x.shape[4] > NARROW or x.shape[4] % stride:
        return convolved(x, taps)
    return convolved(x.transpose(3, 4), [tap.transpose(2, 3) for tap in taps]).transpose(3, 4)


def depth_transforms(depth: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(6 tiles, depth) and (depth, 6 tiles) float32: what `depth` slices are summed to, by kernel and then by
    tile, and how the convolved sums make the slices of the output. Slices outside are zeros."""
    tiles = -(-depth // TILE)
    taps = len(KERNEL)
    before = np.zeros((taps, tiles, tiles * TILE + 2), np.float32)
    after = np.zeros((tiles * TILE, taps, tiles), np.float32)
    for tile in range(tiles):
        first = tile * TILE
        before[:, tile, first : first + taps] = INPUT
        after[first : first + TILE, :, tile] = OUTPUT
    return (
        np.ascontiguousarray(before[:, :, 1 : depth + 1]).reshape(taps * tiles, depth),
        np.ascontiguousarray(after[:depth]).reshape(depth, taps * tiles),
    )


def fold_depth(module: nn.Module) -> nn.Module:
    """Replace every Conv3d inside `module` by its folded form, in place and one by one; return `module`."""
    return _replaced(module, FoldedConv3d)


def winograd_depth(module: nn.Module, depth: int, widest: int) -> nn.Module:
    """The same with Winograd's form for `depth` slices, where a convolution has up to `widest` channels.

    Wider ones hold most of a UNet's weights, which would be twice as many in memory, and little of its work.
    """

    def form(conv: nn.Conv3d) -> nn.Module:
        narrow = min(conv.in_channels, conv.out_channels) < NARROWEST
        gains = conv.kernel_size[0] == 3 and not narrow and conv.out_channels <= widest
        return WinogradConv3d(conv, depth) if gains else FoldedConv3d(conv)

    return _replaced(module, form)


def _replaced(module: nn.Module, form: Callable[[nn.Conv3d], nn.Module]) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d):
            setattr(module, name, form(child))
        else:
            _replaced(child, form)
    return module


def _taps(conv: nn.Conv3d) -> nn.ParameterList:
    taps = conv.weight.detach().unbind(2)
    return nn.ParameterList(nn.Parameter(tap.contiguous(), requires_grad=False) for tap in taps)
