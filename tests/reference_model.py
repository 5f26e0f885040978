"""Where the reference vectors lie, and checkpoints of the reference's layout made of random numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from export.hifigan import HifiGan
from export.kl_vae import KlVae
from export.reference_config import ReferenceConfig, read_config
from export.unet3d import UNet3d


def parity_folder() -> Path:
    """shared/parity beside the checkout, or $BACKLINE_PARITY; skips the test where there is none."""
    place = os.environ.get("BACKLINE_PARITY")
    folder = Path(place) if place else Path(__file__).resolve().parents[2] / "shared" / "parity"
    if not (folder / "film" / "last.ckpt").is_file():
        pytest.skip(f"no reference vectors at {folder} (set BACKLINE_PARITY)")
    return folder


def small_config(**unet: Any) -> dict[str, Any]:
    """A configuration in the JSON layout, of another size than the reference vectors' in every respect."""
    film = {"extra_film_condition_dim": 24, "extra_film_use_concat": True, "no_condition": False}
    return {
        "unet": {
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 32,
            "dims": 3,
            "attention_resolutions": [4, 2],
            "num_res_blocks": 1,
            "channel_mult": [1, 2],
            "num_head_channels": 8,
            "use_spatial_transformer": False,
        }
        | film
        | unet,
        "first_stage_ddconfig": {
            "double_z": True,
            "z_channels": 6,
            "resolution": 256,
            "in_channels": 1,
            "out_ch": 1,
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [128],
            "dropout": 0.0,
        },
        "embed_dim": 5,
        "hifigan": {
            "resblock": "1",
            "upsample_rates": [4, 4, 4],
            "upsample_kernel_sizes": [8, 7, 8],
            "upsample_initial_channel": 32,
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 2], [1, 3]],
            "num_mels": 32,
            "n_fft": 256,
            "hop_size": 64,
            "win_size": 256,
            "sampling_rate": 8000,
            "fmin": 0,
            "fmax": 4000,
        },
        "linear_start": 0.001,
        "linear_end": 0.02,
        "timesteps": 500,
        "num_stems": 3,
        "stems": ["bass", "drums", "piano"],
        "latent_t_size": 32,
    }


def write_config(path: Path, tree: dict[str, Any]) -> ReferenceConfig:
    path.write_text(json.dumps(tree))
    return read_config(path)


def release_yaml(tree: dict[str, Any]) -> str:
    """A JSON configuration in the release's own shape: YAML, nested, annotated, with much that is not read.

    The release describes no vocoder and comments out what is switched off, so such entries are null.
    """
    mel = tree["hifigan"]
    condition = "CLAPAudioEmbeddingClassifierFreev2" if tree["unet"].get("extra_film_condition_dim") else None
    nested = {
        "project_name": "multichannel_slakh",
        "mode": "test",
        "trainer": {"max_epochs": 1200, "limit_train_batches": None, "devices": [0]},
        "data": {
            "target": "src.utilities.data.datamodule.DataModuleFromConfig",
            "params": {
                "batch_size": 2,
                "path": {"dataset_type": "MultiSource_Slakh", "label_data": None, "stems": tree["stems"]},
                "preprocessing": {
                    "audio": {"sampling_rate": mel["sampling_rate"], "max_wav_value": 32768.0},
                    "stft": {
                        "filter_length": mel["n_fft"],
                        "hop_length": mel["hop_size"],
                        "win_length": mel["win_size"],
                    },
                    "mel": {
                        "n_mel_channels": mel["num_mels"],
                        "mel_fmin": mel["fmin"],
                        "mel_fmax": mel["fmax"],
                        "target_length": 1024,
                    },
                },
            },
        },
        "model": {
            "target": "latent_diffusion.models.musicldm.MusicLDM",
            "params": {
                **{key: tree[key] for key in ("num_stems", "linear_start", "linear_end", "timesteps")},
                "base_learning_rate": 3.0e-05,
                "first_stage_key": "fbank_stems",
                "conditioning_key": "film",
                "latent_t_size": tree.get("latent_t_size", 256),
                "ckpt_path": None,
                "unet_config": {
                    "target": "latent_diffusion.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": tree["unet"],
                },
                "first_stage_config": {
                    "target": "latent_encoder.autoencoder.AutoencoderKL",
                    "params": {
                        "reload_from_ckpt": "lightning_logs/musicldm_checkpoints/vae-ckpt.ckpt",
                        "subband": 1,
                        "embed_dim": tree["embed_dim"],
                        "mel_num": mel["num_mels"],
                        "lossconfig": {"target": "LPIPSWithDiscriminator", "params": {"kl_weight": 1.0}},
                        "ddconfig": tree["first_stage_ddconfig"] | {"hifigan_ckpt": "hifigan-ckpt.ckpt"},
                    },
                },
                "cond_stage_config": {"target": condition} if condition else "__is_unconditional__",
                "evaluation_params": {"unconditional_guidance_scale": 2.0, "ddim_sampling_steps": 200},
            },
        },
    }
    text = yaml.safe_dump(nested, sort_keys=False)
    return text.replace(": null", ": # left out").replace("max_epochs: 1200", "max_epochs: 1200 # enough")


def random_checkpoint(config: ReferenceConfig, seed: int = 0) -> dict[str, Any]:
    """What Lightning saves for such a model: raw and EMA weights (which differ), VAE, vocoder."""
    torch.manual_seed(seed)
    unet, vae, vocoder = UNet3d(config.unet), KlVae(config.vae), HifiGan(config.vocoder)
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae, "first_stage_model.vocoder.": vocoder}
    state = {
        prefix + name: _random_like(name, value)
        for prefix, module in parts.items()
        for name, value in module.state_dict().items()
    }
    for name, value in unet.state_dict().items():
        state["model_ema.diffusion_model" + name.replace(".", "")] = _random_like(name, value)
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["scale_factor"] = torch.tensor(0.7)
    return {"epoch": 3, "global_step": 1000, "state_dict": state, "optimizer_states": [], "callbacks": {}}


def _random_like(name: str, value: torch.Tensor) -> torch.Tensor:
    """Not the initialisation: norms and biases must matter, or a mixed-up key would go unseen."""
    if value.dim() > 1:
        return torch.randn_like(value) * (1.2 / value[0].numel() ** 0.5)
    return torch.randn_like(value) * 0.2 + (1.0 if name.endswith("weight") else 0.0)
