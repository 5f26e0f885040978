"""python -m training.bundle: the trained networks -> the default bundle (ONNX, float16 weights, manifest)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from engine.bundle import load_bundle
from engine.manifest import (
    Chords,
    Clap,
    Grid,
    Latent,
    Level,
    Manifest,
    Preset,
    Sampling,
    Vocoder,
)
from export.bundle_writer import export_bundle
from export.griffin_lim import GriffinLim, GriffinLimConfig
from export.onnx_writer import Precision
from export.stem_unet import StemUNet
from export.vocos import Vocos, VocosConfig
from training.captions import encode, for_prompts
from training.dataset import MIXTURE_DB, load_songs
from training.distill import HARMONY_GUIDANCE, STEPS, TAUGHT
from training.from_bundle import read_unet
from training.loop import blend, load_ema
from training.mel import GEOMETRY, LATENT_FRAMES, WINDOW
from training.stems import STEMS
from training.train_decoder import with_decoder
from training.train_unet import SCHEDULE, STATISTICS, freeze, unet_config

PROVENANCE = (
    "Trained by the Backline authors on synthetic bands: Musical MIDI Accompaniment's stdlib grooves over "
    "generated chord charts, rendered with FluidR3, MuseScore General, OPL3-FM, parts of Merlin, sampled "
    "instruments from npm and in SFZ, freepats, Sonivox, parts of A320U, Hydrogen drum kits and our own "
    "synthesis; see docs/data.md. TimGM6mb was held out."
)
POWER = 0.65  # of masks that the UNet's mels make: softer than a Wiener filter's, as its estimates are
CONTEXT_DB = MIXTURE_DB - 1.5  # a band without one of its stems


def describe_training(runs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Steps and minutes of each network's training, from the last line of its log."""
    rows = {name: json.loads((run / "log.jsonl").read_text().splitlines()[-1]) for name, run in runs.items()}
    return {name: {"steps": row["step"], "minutes": round(row["minutes"], 1)} for name, row in rows.items()}


def replacing_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the commands that replace one graph of a bundle."""
    parser.add_argument(
        "--bundle", type=Path, required=True, help="folder or zip that all else is taken from"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--version", required=True, help="of the model, for its manifest")
    parser.add_argument("--force", action="store_true", help="replace the bundle in --out")


def with_training(manifest: Manifest, training: dict[str, dict[str, float]]) -> Manifest:
    """The manifest with what `describe_training` says of some networks in its provenance, too."""
    spent = manifest.provenance.get("training", {}) | training
    return manifest.model_copy(update={"provenance": manifest.provenance | {"training": spent}})


def with_more_training(
    manifest: Manifest, name: str, run: Path, begun_as: str | None = None, **how: float
) -> Manifest:
    """`with_training` of a network that was trained on: the steps and minutes of both, and how it was.

    begun_as: the network whose training the folder went on with (`training.from_bundle`) and has in its log.
    """
    known = manifest.provenance.get("training", {})
    before, begun = known.get(name, {}), known.get(begun_as, {})
    trained = describe_training({name: run})[name]
    spent = {key: round(before.get(key, 0) + value - begun.get(key, 0), 1) for key, value in trained.items()}
    return with_training(manifest, {name: spent | how})


def with_distilled(sampling: Sampling, steps: int, normal: bool) -> Sampling:
    """Drafts in distilled steps, or with `normal` all but `best`, which is what was normal if not given."""
    few = Preset(sampler="distilled", steps=steps)
    best = Preset(sampler=sampling.sampler, steps=sampling.steps)
    if not normal:
        return sampling.model_copy(update={"quality": sampling.quality | {"draft": few}})
    quality = {"best": best} | sampling.quality | {"draft": few}
    return sampling.model_copy(update={"sampler": few.sampler, "steps": few.steps, "quality": quality})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ of training.render")
    parser.add_argument(
        "--runs",
        type=Path,
        required=True,
        help="with vae/, towers/, harmony/ and unet/, and distilled/ and decoder/ where there are any",
    )
    parser.add_argument("--vocoder", type=Path, help="folder of training.train_vocoder, not Griffin-Lim")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--version", required=True, help="of the model, for its manifest")
    parser.add_argument("--steps", type=int, default=20, help="default of the jobs (%(default)s)")
    parser.add_argument("--draft-steps", type=int, help="for --quality draft; half of --steps if not given")
    parser.add_argument("--best-steps", type=int, help="for --quality best; twice --steps if not given")
    parser.add_argument("--sampler", default="dpmpp_2m", help="default of the jobs (%(default)s)")
    parser.add_argument(
        "--distilled-for",
        choices=("draft", "normal"),
        default="draft",
        help="up to which quality distilled steps are taken, where there are any (%(default)s)",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="default of the jobs (%(default)s)")
    parser.add_argument("--listening", type=float, default=1.0, help="default of fill (%(default)s)")
    parser.add_argument(
        "--harmony-guidance", type=float, default=HARMONY_GUIDANCE, help="of the tones (%(default)s)"
    )
    parser.add_argument("--keep", type=float, default=0.0, help="share of the shipped UNet in the new one")
    parser.add_argument(
        "--decoder-share", type=float, default=1.0, help="of runs/decoder in the VAE's (%(default)s)"
    )
    parser.add_argument("--mask-power", type=float, default=POWER, help="exponent of split's masks")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp16", help="(%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the bundle in --out")
    args = parser.parse_args()
    runs = {name: args.runs / name for name in ("vae", "towers", "unet")}
    runs |= {
        name: args.runs / name for name in ("harmony", "distilled", "decoder") if (args.runs / name).exists()
    }
    if args.keep and "distilled" in runs:
        parser.error("--keep changes the UNet that runs/distilled was taught by: distil after it")
    training = describe_training(runs)
    songs = load_songs(args.data / "train")
    frozen = freeze(runs["vae"], runs["towers"], runs["unet"] / STATISTICS, songs)
    vae, towers = frozen.vae, frozen.towers
    if "decoder" in runs:
        with_decoder(vae, runs["decoder"], args.decoder_share)
        training["decoder"]["share"] = args.decoder_share
    sizes = replace(unet_config(frozen), harmony_guidance=args.harmony_guidance)
    taught = TAUGHT if "distilled" in runs else {}
    if taught:
        sizes = replace(sizes, distilled=SCHEDULE.steps, weakened=True)
    unet = load_ema(runs["distilled" if taught else "unet"], StemUNet(sizes))
    kept = {}
    if args.keep:
        shipped = load_bundle()
        blend(unet, read_unet(shipped), args.keep)
        kept = {"kept": {"share": args.keep, "of": shipped.manifest.version}}
    vocoder: Vocos | GriffinLim = GriffinLim(GriffinLimConfig.of(GEOMETRY))
    if args.vocoder:
        vocoder = load_ema(args.vocoder, Vocos(VocosConfig(mels=GEOMETRY.n_mels)))
    presets: dict[Literal["draft", "best"], int | None]
    presets = {"draft": args.draft_steps, "best": args.best_steps}
    sampling = Sampling(
        sampler=args.sampler,
        steps=args.steps,
        quality={name: Preset(sampler=args.sampler, steps=n) for name, n in presets.items() if n},
        guidance=args.guidance,
        listening=args.listening,
    )
    if taught:
        sampling = with_distilled(sampling, STEPS, args.distilled_for == "normal")
    with torch.no_grad():
        uncond = towers.text(*encode(frozen.tokenizer, [""]))[0]
    manifest = Manifest(
        name="backline-default",
        version=args.version,
        licence="GPL-3.0-or-later",
        provenance={"text": PROVENANCE, "songs": len(songs), "training": training} | kept,
        stems=STEMS,
        mel=GEOMETRY,
        latent=Latent(channels=vae.config.latents, frames=LATENT_FRAMES, freq=1, scale_factor=frozen.scale),
        vocoder=Vocoder(sample_rate=GEOMETRY.sample_rate, hop=GEOMETRY.hop, trim=0),
        schedule=SCHEDULE,
        prediction="v",
        sampling=sampling,
        window_frames=WINDOW,
        capabilities=("text", "audio", "context", "mixture", "grid", "chords", *taught),
        **taught,
        film_dim=towers.config.embedding,
        film_uncond=tuple(round(v, 6) for v in uncond.tolist()),
        clap=Clap(tokenizer="tokenizer.json", audio_input="mel"),
        grid=Grid(),
        chords=Chords(),
        mask_power=args.mask_power,
        level=Level(mixture_db=MIXTURE_DB, context_db=CONTEXT_DB),
        networks={
            "unet": asdict(unet.config),
            "vae_encoder": asdict(vae.config),
            "vae_decoder": asdict(vae.config),
            "vocoder": asdict(vocoder.config),
            "clap_text": asdict(towers.config),
            "clap_audio": asdict(towers.config),
        },
    )
    networks = {
        "unet": unet,
        "vae_encoder": vae.encoder,
        "vae_decoder": vae.decoder,
        "vocoder": vocoder,
        "clap_text": towers.text,
        "clap_audio": towers.audio,
    }
    extra = {"tokenizer.json": for_prompts(frozen.tokenizer).to_str(pretty=True).encode()}
    written = export_bundle(
        args.out, manifest, networks, precision=args.precision, extra=extra, force=args.force
    )
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB, {written.provenance['export']['relative_error']}")


if __name__ == "__main__":
    main()
