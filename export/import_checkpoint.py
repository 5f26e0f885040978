"""A published Multi-Track MusicLDM checkpoint -> a bundle.

The networks are built from the configuration, their tensors read by name from the checkpoint, and every name
accounted for: one that is missing or misshapen is an error, one that is left over is listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from torch import nn

from engine.errors import BacklineError, UsageError
from engine.manifest import Capability, Latent, Manifest, Sampling, Vocoder
from engine.schedule import make_schedule
from export.bundle_writer import check_target, export_bundle
from export.checkpoint import LazyTensor, open_checkpoint
from export.hifigan import HifiGan, HifiGanConfig
from export.import_clap import Towers, clap_part, read_towers
from export.kl_vae import Decoder, Encoder, KlVae
from export.onnx_writer import Precision
from export.reference_config import ReferenceConfig, read_config
from export.tensor_source import Source, load_network
from export.unet3d import UNet3d
from export.unet_form import in_fastest_form

UNET, EMA = "model.diffusion_model.", "model_ema.diffusion_model"
VAE, VOCODER = "first_stage_model.", "first_stage_model.vocoder."
# Tables that follow from the schedule in the manifest.
DERIVED = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
)
# The text encoders of Stable Diffusion 1, 2 and XL.
STABLE_DIFFUSION = (
    "cond_stage_model.transformer.",
    "cond_stage_model.model.transformer.",
    "conditioner.embedders.",
)
LICENCE = "as published with the weights (not known to Backline)"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Summary:
    """What an import read, what it left unused, and what the bundle lacks for want of it."""

    manifest: Manifest
    read: dict[str, int]  # network -> tensors
    unused: list[str]  # names in the files that nothing needed
    foreign: list[str]  # classes in the pickle that were not rebuilt
    missing: list[str]  # sentences

    def lines(self) -> list[str]:
        """For a terminal: one fact a line."""
        text = [f"read {network}: {count} tensors" for network, count in self.read.items()]
        text += [f"unused: {group}" for group in _grouped(self.unused)]
        text += [f"not rebuilt: {name}" for name in self.foreign]
        return text + [f"missing: {sentence}" for sentence in self.missing]


def import_checkpoint(
    ckpt: Path,
    config: Path,
    out: Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    precision: Precision = "fp32",
    vae: Path | None = None,
    vocoder: Path | None = None,
    clap: Path | None = None,
    tokenizer: Path | None = None,
    name: str | None = None,
    licence: str = LICENCE,
    force: bool = False,
    callback: Progress | None = None,
) -> Summary:
    """Write the bundle `out` from a released checkpoint (.ckpt, or the .tar.gz that holds it).

    config: the release's YAML, or JSON. vae, vocoder, clap: files for what `ckpt` lacks; where both have it
    the separate file is used. tokenizer: a folder with roberta-base's tokenizer. precision: as
    `export.onnx_writer.write_graph` has it. callback: phase and fraction; raises to cancel.

    Raises BacklineError, one sentence, for files that are missing, truncated or of another model, for a
    tensor that is missing, misshapen or depends on a foreign object, and where `out` cannot be written.
    """
    if weights not in ("ema", "raw"):
        raise UsageError(f"There are no {weights!r} weights: choose ema or raw.")
    if precision not in get_args(Precision):
        raise UsageError(f"There is no precision {precision!r}: choose {', '.join(get_args(Precision))}.")
    out = Path(out)
    check_target(out, force)
    scratch = _scratch(out)
    reference = read_config(Path(config))
    with ExitStack() as stack:

        def open_source(path: Path, *roots: str) -> Source:
            opened = stack.enter_context(open_checkpoint(Path(path), scratch=scratch, callback=callback))
            return Source(opened, opened.tensors(*roots))

        main = open_source(ckpt, "state_dict")
        check_model(main)
        vae_source = open_source(vae, "state_dict") if vae else main
        vocoder_source = open_source(vocoder, "generator", "state_dict") if vocoder else main
        clap_source = open_source(clap, "state_dict") if clap else main
        opened = (main, vae_source, vocoder_source, clap_source)
        sources = list({id(source): source for source in opened}.values())

        _report(callback, "reading the UNet", 0.0)
        unet = read_unet(main, reference, weights)
        _check_schedule(main, reference)
        scale = _scale_factor(main)
        _report(callback, "reading VAE and vocoder", 0.0)
        autoencoder = read_vae(vae_source, reference)
        generator = read_vocoder(vocoder_source if vocoder else _vocoder_holder(main, vae_source), reference)
        read = {network: len(module.state_dict()) for network, module in _named(unet, autoencoder, generator)}

        towers = Towers()
        if reference.unet.film_dim is not None:
            _report(callback, "reading CLAP", 0.0)
            towers = read_towers(clap_source, reference, tokenizer)
            if clap and not (towers.text or towers.audio):
                raise BacklineError(f"{clap} holds no CLAP of laion-clap's layout.")
            read |= {tower: len(module.state_dict()) for tower, module in towers.modules().items()}
        title = name or ("mt-musicldm" if reference.unet.film_dim else "mt-musicldm-unconditional")
        manifest = _manifest(reference, generator.config, towers, scale, title, licence)
        separate = {"vae": vae, "vocoder": vocoder, "clap": clap}
        _report(callback, "choosing the UNet's form", 0.0)
        unet, form = in_fastest_form(unet, manifest.latent.channels, precision)
        provenance = _provenance(main, weights, separate) | {"unet": form}
        manifest = manifest.model_copy(update={"provenance": provenance})
        graphs: dict[str, nn.Module] = {
            "unet": unet,
            "vae_encoder": Encoder(autoencoder),
            "vae_decoder": Decoder(autoencoder),
            "vocoder": generator,
        } | towers.modules()
        stride = reference.unet.stride
        manifest = export_bundle(
            out,
            manifest,
            graphs,
            precision=precision,
            extra=towers.files(),
            times=(stride, 2 * stride + 1),
            force=force,
            callback=callback,
        )
        unused = [key for source in sources for key in source.tensors if key not in source.taken]
        foreign = sorted({item for source in sources for item in source.checkpoint.foreign})
    unused = [key for key in unused if key not in DERIVED]
    return Summary(manifest, read, unused, foreign, towers.missing(reference))


def read_unet(source: Source, config: ReferenceConfig, weights: Literal["ema", "raw"]) -> UNet3d:
    """The UNet, from `model.*` or from its EMA copy, whose names have lost their dots."""
    if weights == "ema" and not source.has(EMA):
        raise BacklineError(f"{source.path} has no EMA weights: pass --weights raw.")

    def name_in_checkpoint(name: str) -> str:
        return EMA + name.replace(".", "") if weights == "ema" else UNET + name

    return load_network(lambda: UNet3d(config.unet), source, name_in_checkpoint)


def read_vae(source: Source, config: ReferenceConfig) -> KlVae:
    """The autoencoder, from inside a Multi-Track MusicLDM checkpoint or from its own."""
    prefix = VAE if source.has(VAE + "encoder.") else ""
    if not source.has(prefix + "encoder."):
        raise BacklineError(f"{source.path} holds no VAE: pass it with --vae.")
    return load_network(lambda: KlVae(config.vae), source, lambda name: prefix + name)


def read_vocoder(source: Source, config: ReferenceConfig) -> HifiGan:
    """The vocoder, from inside a checkpoint or from HiFi-GAN's own, with its weights normalised."""
    prefix = next((p for p in (VOCODER, "vocoder.", "") if source.has(p + "conv_pre.")), None)
    if prefix is None:
        raise BacklineError(f"{source.path} holds no vocoder: pass it with --vocoder.")
    layout = config.vocoder if config.vocoder_known else _layout_from_weights(source, prefix, config.vocoder)
    return load_network(lambda: HifiGan(layout), source, lambda name: prefix + name)


def check_model(source: Source) -> None:
    """Raises BacklineError, saying what it is instead, where this is no Multi-Track MusicLDM checkpoint."""
    names = source.tensors
    first = names.get(UNET + "input_blocks.0.0.weight", names.get(EMA + "input_blocks00weight"))
    if first is not None:
        if isinstance(first, LazyTensor) and len(first.shape) == 5:
            return
        stable = any(source.has(prefix) for prefix in STABLE_DIFFUSION)
        other = "a Stable Diffusion" if stable else "a plain MusicLDM or AudioLDM"
        raise BacklineError(
            f"{source.path} is {other} checkpoint: its UNet is 2-D, and Multi-Track MusicLDM's is 3-D."
        )
    for prefix, what in (
        ("encoder.conv_in.", "only a VAE: pass it with --vae, beside the main checkpoint"),
        ("conv_pre.", "only a vocoder: pass it with --vocoder, beside the main checkpoint"),
        ("generator.conv_pre.", "only a vocoder: pass it with --vocoder, beside the main checkpoint"),
        ("text_branch.", "only CLAP: pass it with --clap, beside the main checkpoint"),
        ("module.text_branch.", "only CLAP: pass it with --clap, beside the main checkpoint"),
    ):
        if source.has(prefix):
            raise BacklineError(f"{source.path} is {what}.")
    if "generator" in source.checkpoint.values:
        raise BacklineError(
            f"{source.path} is only a vocoder: pass it with --vocoder, beside the main checkpoint."
        )
    raise BacklineError(f"{source.path} is no Multi-Track MusicLDM checkpoint: it has no {UNET}* tensors.")


def _layout_from_weights(source: Source, prefix: str, default: HifiGanConfig) -> HifiGanConfig:
    """Widths and kernels as the weights have them; rates and dilations stay the default's."""

    def shape(name: str) -> tuple[int, ...]:
        for suffix in ("weight", "weight_v", "parametrizations.weight.original1"):
            tensor = source.tensors.get(f"{prefix}{name}.{suffix}")
            if isinstance(tensor, LazyTensor):
                return tensor.shape
        raise BacklineError(f"{source.path} lacks the tensor {prefix}{name}.weight.")

    return replace(
        default,
        width=shape("conv_pre")[0],
        rate_kernels=tuple(shape(f"ups.{i}")[2] for i in range(len(default.rates))),
        kernels=tuple(shape(f"resblocks.{i}.convs1.0")[2] for i in range(len(default.kernels))),
    )


def _vocoder_holder(main: Source, vae_source: Source) -> Source:
    """The vocoder travels inside the first stage; of a separate VAE file only where the main one has none."""
    return main if main.has(VOCODER) else vae_source


def _scale_factor(source: Source) -> float:
    scale = source.read("scale_factor")
    if scale.numel() != 1 or float(scale) <= 0:
        raise BacklineError(f"{source.path}: the tensor scale_factor is no positive number.")
    return float(scale)


def _check_schedule(source: Source, config: ReferenceConfig) -> None:
    """The checkpoint's own noise table must be the one that the configuration describes."""
    if "alphas_cumprod" not in source.tensors:
        return
    table = source.read("alphas_cumprod").double().numpy()
    described = make_schedule(config.schedule).alphas_cumprod
    if table.shape != described.shape or not np.allclose(table, described, rtol=1e-3, atol=1e-6):
        raise BacklineError(
            f"{source.path}: its noise schedule is not the configuration's "
            f"({config.schedule.start:g} to {config.schedule.end:g} in {config.schedule.steps} steps)."
        )


def _manifest(
    config: ReferenceConfig, vocoder: HifiGanConfig, towers: Towers, scale: float, name: str, licence: str
) -> Manifest:
    film = config.unet.film_dim
    graphs = towers.modules()
    capabilities: list[Capability] = []
    capabilities += ["text"] if "clap_text" in graphs else []
    capabilities += ["audio"] if "clap_audio" in graphs else []
    networks = {
        "unet": asdict(config.unet),
        "vae_encoder": asdict(config.vae),
        "vae_decoder": asdict(config.vae),
        "vocoder": asdict(vocoder),
    }
    return Manifest(
        name=name,
        licence=licence,
        stems=config.stems,
        mel=config.mel,
        latent=Latent(
            channels=config.vae.latent_channels,
            frames=config.vae.stride,
            freq=config.frequency,
            scale_factor=scale,
        ),
        vocoder=Vocoder(sample_rate=config.mel.sample_rate, hop=vocoder.hop, trim=vocoder.trim),
        schedule=config.schedule,
        prediction=config.prediction,
        # The release samples with eta 1. Without a real empty condition there is nothing to guide away from.
        sampling=Sampling(
            sampler="ddim", steps=config.steps, eta=1.0, guidance=config.guidance if towers.empty else 1.0
        ),
        window_frames=config.window_frames,
        capabilities=tuple(capabilities),
        film_dim=film,
        film_uncond=None if film is None else towers.empty or (0.0,) * film,
        clap=clap_part(towers) if capabilities else None,
        networks=networks | towers.configs(),
    )


def _provenance(main: Source, weights: str, extra: Mapping[str, Path | None]) -> dict[str, object]:
    values = main.checkpoint.values
    facts = {key: values[key] for key in ("epoch", "global_step") if isinstance(values.get(key), int)}
    files = {part: Path(path).name for part, path in extra.items() if path is not None}
    return {"imported_from": main.path.name, "weights": weights, **facts, **files}


def _named(unet: UNet3d, vae: KlVae, vocoder: HifiGan) -> Iterable[tuple[str, nn.Module]]:
    return (("unet", unet), ("vae", vae), ("vocoder", vocoder))


def _scratch(out: Path) -> Path:
    """Where an archive is unpacked: beside the bundle, which must have room for as much anyway.

    Raises BacklineError where there can be no bundle, before minutes are spent on reading.
    """
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise BacklineError(f"{out} cannot be written: {folder} is no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BacklineError(f"{out} cannot be written: {folder} is not yours to write in.")
    return folder


def _report(callback: Progress | None, phase: str, fraction: float) -> None:
    if callback:
        callback(phase, fraction)


def _grouped(names: list[str], most: int = 3) -> list[str]:
    """Names, counted by their first two parts where there are many of a kind."""
    groups: dict[str, list[str]] = {}
    for key in names:
        groups.setdefault(
            ".".join(key.split(".")[:2]) if key.count(".") > 1 else key.split(".")[0], []
        ).append(key)
    lines = []
    for group, keys in groups.items():
        lines += keys if len(keys) <= most else [f"{group}.* ({len(keys)} tensors)"]
    return lines
