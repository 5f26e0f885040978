"""The 3-D UNet is written in the form that a measurement says is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export import unet_form
from export.unet3d import FoldedConv3d, UNet3d, UNet3dConfig
from export.unet_form import FORMS, form_seconds, in_fastest_form


def small() -> UNet3d:
    torch.manual_seed(0)
    return UNet3d(UNet3dConfig(width=32)).eval()


def test_both_forms_are_timed() -> None:
    seconds = form_seconds(16)
    assert set(seconds) == set(FORMS)
    assert all(0 < value < 10 for value in seconds.values())


@pytest.mark.parametrize("fastest", FORMS)
def test_the_faster_form_is_taken_and_said(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        unet_form, "form_seconds", lambda width: {form: 0.001 if form == fastest else 0.002 for form in FORMS}
    )
    unet, said = in_fastest_form(small())
    kinds = {type(module) for module in unet.modules()}
    assert (FoldedConv3d in kinds) == (fastest == "folded")
    assert (nn.Conv3d in kinds) == (fastest == "native")
    assert said["form"] == fastest and said["one_convolution_ms"][fastest] == 1.0
