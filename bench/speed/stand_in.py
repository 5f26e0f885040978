"""python -m bench.speed.stand_in --out BUNDLE: a bundle of the released layout with random weights.

The 3-D UNet, the KL-VAE and HiFi-GAN of Multi-Track MusicLDM, at the released widths unless told
otherwise: the UNet's 192 is 696 M parameters, 3 GB of files in float32. What it makes is noise;
it takes as long as the real one.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from engine.manifest import Latent, Manifest, Mel, NoiseSchedule, Sampling, Vocoder
from export.bundle_writer import export_bundle
from export.hifigan import HifiGan, HifiGanConfig
from export.kl_vae import Decoder, Encoder, KlVae, KlVaeConfig
from export.onnx_writer import Precision
from export.unet3d import UNet3d, UNet3dConfig
from export.unet_form import in_fastest_form

WIDTH, FRAMES, Z = 192, 256, 8
STEPS = 20
MEL = Mel(
    sample_rate=16000, n_fft=1024, win_length=1024, hop=160, n_mels=64, f_min=0.0, f_max=8000.0, floor=1e-5
)


def write_stand_in(
    out: Path, width: int = WIDTH, frames: int = FRAMES, *, precision: Precision = "fp32"
) -> UNet3d:
    """Writes the bundle and returns its UNet in torch. VAE and vocoder shrink with the UNet's width.

    width: of the UNet, a multiple of 32. frames: latent frames of a window. precision: as `write_graph`'s.
    """
    torch.manual_seed(0)
    unet_config = UNet3dConfig(width=width)
    vae_config = KlVaeConfig(width=_share(128, width, 32))
    vocoder_config = replace(HifiGanConfig(), width=_share(1024, width, 64))
    unet, vae, vocoder = UNet3d(unet_config), KlVae(vae_config), HifiGan(vocoder_config)
    for network in (unet, vae, vocoder):
        network.eval().requires_grad_(False)
    rewritten, form = in_fastest_form(copy.deepcopy(unet), Z, precision)
    networks: dict[str, nn.Module] = {
        "unet": rewritten,
        "vae_encoder": Encoder(vae),
        "vae_decoder": Decoder(vae),
        "vocoder": vocoder,
    }
    manifest = Manifest(
        name=f"stand-in of width {width}",
        licence="random weights",
        provenance={"unet": form},
        stems=("bass", "drums", "guitar", "piano"),
        mel=MEL,
        latent=Latent(channels=Z, frames=vae_config.stride, freq=64 // vae_config.stride, scale_factor=1.0),
        vocoder=Vocoder(sample_rate=16000, hop=vocoder_config.hop, trim=vocoder_config.trim),
        schedule=NoiseSchedule(start=0.0015, end=0.0195, steps=1000),
        prediction="eps",
        sampling=Sampling(sampler="ddim", steps=STEPS),
        window_frames=frames,
        film_dim=unet_config.film_dim,
        film_uncond=(0.0,) * (unet_config.film_dim or 0),
        networks={
            "unet": asdict(unet_config),
            "vae_encoder": asdict(vae_config),
            "vae_decoder": asdict(vae_config),
            "vocoder": asdict(vocoder_config),
        },
    )
    export_bundle(
        out,
        manifest,
        networks,
        precision=precision,
        times=(unet_config.stride, 2 * unet_config.stride + 1),
        force=True,
    )
    return unet


def _share(of: int, width: int, multiple: int) -> int:
    """The same part of a width as the UNet's, whole groups of channels of it and at least one."""
    return max(1, of * width // WIDTH // multiple) * multiple


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=WIDTH, help="of the UNet, a multiple of 32")
    parser.add_argument("--frames", type=int, default=FRAMES, help="latent frames of a window")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    args = parser.parse_args()
    write_stand_in(args.out, args.width, args.frames, precision=args.precision)


if __name__ == "__main__":
    main()
