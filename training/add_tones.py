"""python -m training.add_tones: what hears pitch classes -> a bundle that is there, all else as it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from export.bundle_writer import replace_graph
from export.patch_vae import PatchVAE, PatchVAEConfig
from training.bundle import replacing_arguments, with_more_training
from training.from_bundle import fill_in, read_weights
from training.loop import load_ema

GRAPH = "vae_encoder"


def add_tones(source: Path, run: Path, out: Path, version: str, *, force: bool = False) -> Manifest:
    """Write the bundle `out`: that of `source` with what hears pitch classes in its encoder from a folder.

    run: of `training.train_vae --tones-only`, begun from `source` by `training.from_bundle`. The other
    latents stay as the UNet and the decoder know them. Raises BacklineError as load_bundle and replace_graph,
    FileNotFoundError without a checkpoint, ValueError for a bundle whose latents have no tones, RuntimeError
    for other sizes.
    """
    bundle = load_bundle(source)
    config = PatchVAEConfig(**bundle.manifest.networks[GRAPH])
    if not config.tones:
        raise ValueError(f"the latents of {source} have no tones")
    weights = read_weights(bundle.path(f"{GRAPH}.onnx"))
    trained = load_ema(run, PatchVAE(config)).encoder.state_dict()
    weights |= {name: tensor for name, tensor in trained.items() if name.startswith("tones.")}
    encoder = fill_in(PatchVAE(config).encoder, weights)
    manifest = with_more_training(bundle.manifest, "tones", run, begun_as="vae")
    manifest = manifest.model_copy(update={"version": version})
    return replace_graph(bundle, manifest, GRAPH, encoder, out, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    replacing_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of training.train_vae --tones-only")
    args = parser.parse_args()
    written = add_tones(args.bundle, args.run, args.out, args.version, force=args.force)
    print(f"{args.out}: {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
