"""The configuration of a Multi-Track MusicLDM checkpoint: the release's YAML, or JSON with the same names.

Only what decides the arithmetic is read. An option that would change it and is not supported is an error that
names it, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from engine.errors import BacklineError
from engine.manifest import Mel, NoiseSchedule
from export.hifigan import HifiGanConfig
from export.kl_vae import KlVaeConfig
from export.unet3d import NORM_GROUPS, UNet3dConfig

DEFAULT_STEMS = ("bass", "drums", "guitar", "piano")
MEL_FLOOR = 1e-5
LATENT_FRAMES = 256
SAMPLING_STEPS = 200
# Options of the UNet that would change what it computes, and the only value that is supported.
FIXED_UNET = {
    "dims": 3,
    "use_spatial_transformer": False,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "use_new_attention_order": False,
    "num_classes": None,
    "n_embed": None,
}
FIXED_VAE = {
    "double_z": True,
    "downsample_time": False,
    "downsample_time_stride4_levels": [],
    "use_linear_attn": False,
    "attn_type": "vanilla",
    "tanh_out": False,
    "resamp_with_conv": True,
}
PREDICTIONS: dict[str, Literal["eps", "v", "x0"]] = {"eps": "eps", "v": "v", "x0": "x0"}


@dataclass(frozen=True)
class ReferenceConfig:
    """Everything that a bundle needs and the weights do not say.

    `vocoder_known`: the file describes the vocoder. The release's YAML does not: then its widths and kernels
    come from the weights, its rates and dilations are HiFi-GAN V1's for a hop of 160.
    """

    unet: UNet3dConfig
    vae: KlVaeConfig
    vocoder: HifiGanConfig
    vocoder_known: bool
    mel: Mel
    schedule: NoiseSchedule
    prediction: Literal["eps", "v", "x0"]
    stems: tuple[str, ...]
    window_frames: int
    steps: int
    guidance: float

    @property
    def frequency(self) -> int:
        """F of the latents."""
        return self.mel.n_mels // self.vae.stride


def read_config(path: Path) -> ReferenceConfig:
    """Raises BacklineError, naming the entry, for what is missing, unsupported or contradictory."""
    tree = _load(Path(path))
    try:
        config = _from_release(tree) if "model" in tree else _from_json(tree.get("config", tree))
    except KeyError as error:
        raise BacklineError(f"{path} has no entry {error.args[0]!r}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BacklineError(f"{path}: {place} makes no sense: {first['msg']}.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BacklineError(f"{path} is no model configuration: {error}.") from error
    except BacklineError as error:
        raise BacklineError(f"{path}: {error}") from error
    return config


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BacklineError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BacklineError(f"{path} is no text, so it is no configuration (.yaml or .json).") from error
    try:
        if path.suffix == ".json":
            tree = json.loads(text)
        else:
            import yaml

            tree = yaml.safe_load(text)
    except Exception as error:  # json and yaml name their errors differently
        raise BacklineError(f"{path} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(tree, dict):
        raise BacklineError(f"{path} is no model configuration.")
    return tree


def _from_release(tree: Mapping[str, Any]) -> ReferenceConfig:
    """The YAML as upstream writes it: `model.params` for the networks, `data.params` for stems and mel."""
    params = tree["model"]["params"]
    data = (tree.get("data") or {}).get("params") or {}
    first = params["first_stage_config"]["params"]
    if int(first.get("subband") or 1) != 1:
        raise BacklineError("a VAE with subbands is not supported.")
    evaluation = params.get("evaluation_params") or {}
    flat = {
        "unet": params["unet_config"]["params"],
        "first_stage_ddconfig": first["ddconfig"],
        "embed_dim": first["embed_dim"],
        "num_stems": params.get("num_stems"),
        "stems": (data.get("path") or {}).get("stems"),
        "linear_start": params["linear_start"],
        "linear_end": params["linear_end"],
        "timesteps": params["timesteps"],
        "parameterization": params.get("parameterization"),
        "beta_schedule": params.get("beta_schedule"),
        "latent_t_size": params.get("latent_t_size"),
        "ddim_sampling_steps": evaluation.get("ddim_sampling_steps"),
        "unconditional_guidance_scale": evaluation.get("unconditional_guidance_scale"),
    }
    preprocessing = data.get("preprocessing") or {}
    stft, mel = preprocessing.get("stft") or {}, preprocessing.get("mel") or {}
    rate = (preprocessing.get("audio") or {}).get("sampling_rate") or 16000
    return _build(
        flat,
        Mel(
            sample_rate=rate,
            n_fft=stft.get("filter_length") or 1024,
            win_length=stft.get("win_length") or 1024,
            hop=stft.get("hop_length") or 160,
            n_mels=mel.get("n_mel_channels") or first.get("mel_num") or 64,
            f_min=mel.get("mel_fmin") or 0,
            f_max=mel.get("mel_fmax") or rate / 2,
            floor=MEL_FLOOR,
        ),
        None,
    )


def _from_json(tree: Mapping[str, Any]) -> ReferenceConfig:
    vocoder = tree["hifigan"]
    return _build(
        tree,
        Mel(
            sample_rate=vocoder["sampling_rate"],
            n_fft=vocoder["n_fft"],
            win_length=vocoder["win_size"],
            hop=vocoder["hop_size"],
            n_mels=vocoder["num_mels"],
            f_min=vocoder.get("fmin") or 0,
            f_max=vocoder.get("fmax") or vocoder["sampling_rate"] / 2,
            floor=MEL_FLOOR,
        ),
        vocoder,
    )


def _build(tree: Mapping[str, Any], mel: Mel, vocoder: Mapping[str, Any] | None) -> ReferenceConfig:
    unet, ddconfig = tree["unet"], tree["first_stage_ddconfig"]
    if unet.get("dims", 2) != 3:
        raise BacklineError(
            "this is a 2-D UNet, as of a plain MusicLDM or AudioLDM; Multi-Track MusicLDM's has dims: 3."
        )
    _check_fixed(unet, FIXED_UNET, "the UNet")
    _check_fixed(ddconfig, FIXED_VAE, "the VAE")
    if (tree.get("beta_schedule") or "linear") != "linear":
        raise BacklineError(f"the noise schedule {tree['beta_schedule']!r} is not supported.")
    prediction = tree.get("parameterization") or "eps"
    if prediction not in PREDICTIONS:
        raise BacklineError(f"the parameterization {prediction!r} is not supported.")

    networks = _unet_config(unet), _vae_config(ddconfig, int(tree["embed_dim"]))
    config = ReferenceConfig(
        unet=networks[0],
        vae=networks[1],
        vocoder=_vocoder_config(vocoder) if vocoder else replace(HifiGanConfig(), mels=mel.n_mels),
        vocoder_known=vocoder is not None,
        mel=mel,
        schedule=NoiseSchedule(start=tree["linear_start"], end=tree["linear_end"], steps=tree["timesteps"]),
        prediction=PREDICTIONS[prediction],
        stems=_stems(tree, networks[0].stems),
        window_frames=int(tree.get("latent_t_size") or LATENT_FRAMES),
        steps=int(tree.get("ddim_sampling_steps") or SAMPLING_STEPS),
        guidance=float(tree.get("unconditional_guidance_scale") or 1.0),
    )
    _check_sizes(config)
    return config


def _unet_config(unet: Mapping[str, Any]) -> UNet3dConfig:
    if unet["in_channels"] != unet["out_channels"]:
        raise BacklineError(
            f"the UNet has {unet['in_channels']} input and {unet['out_channels']} output channels, "
            "and both are the stems."
        )
    film = unet.get("extra_film_condition_dim")
    head_width, heads, heads_up = (
        max(0, int(unet.get(name) or 0)) for name in ("num_head_channels", "num_heads", "num_heads_upsample")
    )
    if not head_width and not heads:
        raise KeyError("num_head_channels")
    if not head_width and heads_up not in (0, heads):
        raise BacklineError(f"the UNet's option num_heads_upsample: {heads_up} is not supported.")
    return UNet3dConfig(
        stems=int(unet["in_channels"]),
        width=int(unet["model_channels"]),
        multipliers=tuple(map(int, unet["channel_mult"])),
        blocks=int(unet["num_res_blocks"]),
        attention_at=tuple(sorted(map(int, unet["attention_resolutions"]))),
        head_width=head_width,
        heads=None if head_width else heads,
        film_dim=int(film) if film else None,
        film_concat=bool(unet.get("extra_film_use_concat", False)),
    )


def _vae_config(ddconfig: Mapping[str, Any], latent_channels: int) -> KlVaeConfig:
    multipliers = tuple(map(int, ddconfig["ch_mult"]))
    attends = set(map(int, ddconfig.get("attn_resolutions") or ()))
    resolution = int(ddconfig.get("resolution") or 256)
    return KlVaeConfig(
        width=int(ddconfig["ch"]),
        multipliers=multipliers,
        blocks=int(ddconfig["num_res_blocks"]),
        z_channels=int(ddconfig["z_channels"]),
        latent_channels=latent_channels,
        attention_levels=tuple(i for i in range(len(multipliers)) if resolution >> i in attends),
        input_channels=int(ddconfig["in_channels"]),
        output_channels=int(ddconfig["out_ch"]),
    )


def _vocoder_config(vocoder: Mapping[str, Any]) -> HifiGanConfig:
    if str(vocoder.get("resblock", "1")) != "1":
        raise BacklineError("a HiFi-GAN with resblock 2 is not supported.")
    return HifiGanConfig(
        mels=int(vocoder["num_mels"]),
        width=int(vocoder["upsample_initial_channel"]),
        rates=tuple(vocoder["upsample_rates"]),
        rate_kernels=tuple(vocoder["upsample_kernel_sizes"]),
        kernels=tuple(vocoder["resblock_kernel_sizes"]),
        dilations=tuple(tuple(row) for row in vocoder["resblock_dilation_sizes"]),
    )


def _stems(tree: Mapping[str, Any], channels: int) -> tuple[str, ...]:
    count = int(tree.get("num_stems") or channels)
    named = tree.get("stems") or (DEFAULT_STEMS if count == len(DEFAULT_STEMS) else None)
    if named is None:
        raise BacklineError(
            f"the {count} stems are not named: add `stems`, in the order of the training data."
        )
    stems = tuple(str(stem).lower() for stem in named)
    if len(stems) != channels or count != channels:
        raise BacklineError(f"the UNet has {channels} channels, and there are {len(stems)} stems.")
    return stems


def _check_fixed(given: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, value in fixed.items():
        if name in given and given[name] != value and not (value is None and not given[name]):
            raise BacklineError(f"{where}'s option {name}: {given[name]} is not supported.")


def _check_sizes(config: ReferenceConfig) -> None:
    if config.vocoder.hop != config.mel.hop:
        raise BacklineError(
            f"the vocoder writes {config.vocoder.hop} samples a frame and the mel's hop is {config.mel.hop}"
            + ("." if config.vocoder_known else ": describe it under `hifigan`, in JSON.")
        )
    if config.mel.n_mels % config.vae.stride or config.frequency % config.unet.stride:
        raise BacklineError(
            f"{config.mel.n_mels} mel bands do not divide by what VAE and UNet reduce them by."
        )
    widths = [config.unet.width * m for m in config.unet.multipliers]
    heads = config.unet.heads or config.unet.head_width
    if config.unet.width % NORM_GROUPS or any(width % heads for width in widths):
        raise BacklineError(f"the UNet's widths {widths} must be multiples of {NORM_GROUPS} and of {heads}.")
    if config.vae.width % NORM_GROUPS:
        raise BacklineError(f"the VAE's width {config.vae.width} must be a multiple of {NORM_GROUPS}.")
    vocoder = config.vocoder
    fits = len(vocoder.rates) == len(vocoder.rate_kernels) and len(vocoder.kernels) == len(vocoder.dilations)
    small = any(kernel < rate for rate, kernel in zip(vocoder.rates, vocoder.rate_kernels, strict=False))
    if not fits or small or vocoder.width < 2 ** len(vocoder.rates):
        raise BacklineError("the vocoder's rates, kernels, dilations and width do not go together.")
