"""The default family's own networks, very small, exported as a bundle with every capability."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from engine.manifest import Chords, Clap, Grid, Latent, Level, Manifest, Mel, NoiseSchedule, Sampling, Vocoder
from engine.manifest import Separator as SeparatorGeometry
from export.bundle_writer import export_bundle
from export.caption_towers import CaptionTowers, CaptionTowersConfig
from export.patch_vae import PatchVAE, PatchVAEConfig
from export.separator import Separator, SeparatorConfig
from export.stem_unet import StemUNet, StemUNetConfig
from export.vocos import Vocos, VocosConfig

MELS, CHANNELS, FRAMES, WINDOW, FILM = 16, 6, 4, 48, 12
WORDS = ("[PAD]", "[UNK]", "warm", "bright", "slow", "fast", "piano", "drums")


def networks() -> dict[str, nn.Module]:
    """By graph name, with random weights in place of the zeros that training starts some of them from."""
    torch.manual_seed(0)
    unet = StemUNet(
        StemUNetConfig(
            channels=CHANNELS,
            film=FILM,
            width=32,
            inner=32,
            blocks_down=1,
            blocks_up=1,
            layers=1,
            heads=2,
            cond=16,
        )
    )
    vae = PatchVAE(PatchVAEConfig(MELS, FRAMES, CHANNELS, width=16, encoder_blocks=1, decoder_blocks=1))
    vocoder = Vocos(VocosConfig(mels=MELS, width=16, blocks=1, n_fft=256, split=2))
    towers = CaptionTowers(
        CaptionTowersConfig(len(WORDS), FILM, 16, 1, mels=MELS, audio_width=16, audio_blocks=1)
    )
    separator = Separator(
        SeparatorConfig(bands=((8, 4), (6, 16)), dim=8, blocks=2, seen=2, track=16)
    )  # 128 bins
    for module in (unet, vae, vocoder, towers, separator):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return {
        "unet": unet,
        "vae_encoder": vae.encoder,
        "vae_decoder": vae.decoder,
        "vocoder": vocoder,
        "clap_text": towers.text,
        "clap_audio": towers.audio,
        "separator": separator,
    }


def write_default_bundle(folder: Path) -> Path:
    """Export the networks, 16 kHz, half a second a window; returns the folder."""
    modules = networks()
    manifest = Manifest(
        name="tiny-default",
        licence="CC0-1.0",
        stems=("bass", "drums", "guitar", "piano"),
        mel=Mel(
            sample_rate=16000,
            n_fft=512,
            win_length=512,
            hop=128,
            n_mels=MELS,
            f_min=0,
            f_max=8000,
            floor=1e-4,
        ),
        latent=Latent(channels=CHANNELS, frames=FRAMES, freq=1, scale_factor=0.5),
        vocoder=Vocoder(sample_rate=16000, hop=128, trim=0),
        schedule=NoiseSchedule(start=0.0015, end=0.0195, steps=1000),
        prediction="v",
        sampling=Sampling(sampler="dpmpp_2m", steps=2),
        window_frames=WINDOW,
        capabilities=("text", "audio", "context", "mixture", "grid", "chords", "separator"),
        film_dim=FILM,
        film_uncond=(0.1,) * FILM,
        clap=Clap(tokenizer="tokenizer.json", audio_input="mel"),
        grid=Grid(),
        chords=Chords(),
        level=Level(mixture_db=-20.0, context_db=-22.0),
        separator=SeparatorGeometry(
            sample_rate=8000, n_fft=256, hop=64, patch=2, window_frames=40, f_max=3800
        ),
        networks={graph: _config(module) for graph, module in modules.items()},
    )
    export_bundle(folder, manifest, modules, precision="fp16", extra={"tokenizer.json": _tokenizer()})
    return folder


def _config(module: nn.Module) -> dict[str, object]:
    config = getattr(module, "config", None)
    return asdict(config) if config is not None else {"vocabulary": len(WORDS)}


def _tokenizer() -> bytes:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()
