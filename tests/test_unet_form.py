"""The 3-D UNet is written in the form that a measurement says is fastest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export import unet_form
from export.conv3d import FoldedConv3d, WinogradConv3d, depth_transforms, winograd_depth
from export.unet3d import UNet3d, UNet3dConfig
from export.unet_form import FORMS, form_seconds, in_fastest_form

KINDS = {"winograd": WinogradConv3d, "folded": FoldedConv3d, "native": nn.Conv3d}


def small() -> UNet3d:
    torch.manual_seed(0)
    return UNet3d(UNet3dConfig(width=32)).eval()


def test_every_form_is_timed() -> None:
    seconds = form_seconds(16)
    assert set(seconds) == set(FORMS)
    assert all(0 < value < 10 for value in seconds.values())


@pytest.mark.parametrize("fastest", FORMS)
def test_the_fastest_form_is_taken_and_said(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_form, "form_seconds", lambda width: timed(fastest))
    unet, said = in_fastest_form(small(), 8)
    assert KINDS[fastest] in {type(module) for module in unet.modules()}
    assert (nn.Conv3d in {type(module) for module in unet.modules()}) == (fastest == "native")
    assert said["form"] == fastest and said["one_convolution_ms"][fastest] == 1.0


def test_winograd_is_not_for_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet_form, "form_seconds", lambda width: timed("winograd"))
    assert in_fastest_form(small(), 8, "fp16-compute")[1]["form"] == "folded"
    assert in_fastest_form(small(), 8, "fp16")[1]["form"] == "winograd"


@pytest.mark.parametrize("depth", [1, 3, 4, 6, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bands", [6, 4, 2])
def test_every_form_computes_the_convolution(depth: int, stride: int, bands: int) -> None:
    """With time innermost where bands are few. Depth is folded where there is more than one."""
    torch.manual_seed(depth)
    conv = nn.Conv3d(32, 48, 3, padding=1, stride=(1, stride, stride)).requires_grad_(False)
    x = torch.randn(2, 32, depth, 10, bands)
    for form in [WinogradConv3d(conv, depth)] + [FoldedConv3d(conv)] * (depth > 1):
        assert torch.allclose(form(x), conv(x), atol=2e-5)


@pytest.mark.parametrize("bands", [3, 1])
def test_bands_that_the_stride_does_not_divide(bands: int) -> None:
    conv = nn.Conv3d(32, 48, 3, padding=1, stride=(1, 2, 2)).requires_grad_(False)
    x = torch.randn(1, 32, 4, 10, bands)
    assert torch.allclose(WinogradConv3d(conv, 4)(x), conv(x), atol=2e-5)
    assert torch.allclose(FoldedConv3d(conv)(x), conv(x), atol=2e-5)


def test_winograds_transforms_cover_every_slice() -> None:
    for depth in (1, 3, 4, 6, 8):
        before, after = depth_transforms(depth)
        assert before.shape == (6 * (-(-depth // 4)), depth) and after.shape == before.T.shape


@pytest.mark.parametrize("channels", [(4, 32), (32, 96)])
def test_narrow_and_wide_convolutions_are_folded(channels: tuple[int, int]) -> None:
    convs = nn.Sequential(nn.Conv3d(*channels, 3, padding=1), nn.Conv3d(32, 64, 3, padding=1))
    assert [type(module) for module in winograd_depth(convs, 8, widest=64)] == [FoldedConv3d, WinogradConv3d]


def timed(fastest: str) -> dict[str, float]:
    return {form: 0.001 if form == fastest else 0.002 for form in FORMS}
