"""python -m training.add_decoder: a decoder of training.train_decoder -> a bundle, all else as it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from export.bundle_writer import replace_graph
from export.patch_vae import PatchVAE, PatchVAEConfig
from training.bundle import describe_training, replacing_arguments, with_training
from training.from_bundle import fill_in, read_weights
from training.train_decoder import with_decoder

GRAPH = "vae_decoder"


def add_decoder(
    source: Path, run: Path, out: Path, version: str, *, share: float = 1.0, force: bool = False
) -> Manifest:
    """Write the bundle `out`: that of `source` with the decoder of a folder of `training.train_decoder`.

    share: of its weights in the decoder's; the rest is the one of `source`, whose latents it has to have been
    trained for (`training.from_bundle`). Raises BacklineError as load_bundle and replace_graph,
    FileNotFoundError without a checkpoint, RuntimeError for other sizes.
    """
    bundle = load_bundle(source)
    vae = PatchVAE(PatchVAEConfig(**bundle.manifest.networks[GRAPH]))
    fill_in(vae.decoder, read_weights(bundle.path(f"{GRAPH}.onnx")))
    with_decoder(vae, run, share)
    before = bundle.manifest.provenance.get("training", {}).get("decoder", {})
    trained = describe_training({"decoder": run})["decoder"]
    spent = {name: round(before.get(name, 0) + value, 1) for name, value in trained.items()}
    manifest = with_training(bundle.manifest, {"decoder": spent | {"share": share}})
    manifest = manifest.model_copy(update={"version": version})
    return replace_graph(bundle, manifest, GRAPH, vae.decoder, out, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    replacing_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of training.train_decoder")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of it in the decoder's weights (%(default)s)"
    )
    args = parser.parse_args()
    written = add_decoder(args.bundle, args.run, args.out, args.version, share=args.share, force=args.force)
    print(f"{args.out}: {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
