"""python -m training.add_decoder: another decoder -> a bundle, all else as it was.

One of training.train_decoder, or the same one that steadies what it writes (`export.patch_vae.steadied`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from export.bundle_writer import replace_graph
from export.patch_vae import PatchVAE, PatchVAEConfig
from training.bundle import replacing_arguments, with_more_training
from training.from_bundle import fill_in, read_weights
from training.train_decoder import with_decoder

GRAPH = "vae_decoder"


def add_decoder(
    source: Path,
    out: Path,
    version: str,
    *,
    run: Path | None = None,
    share: float = 1.0,
    steady: float | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`: that of `source` with another decoder.

    run: a folder of `training.train_decoder` that has been trained for `source`'s latents
    (`training.from_bundle`); None: the weights stay. share: of its weights in the decoder's; the rest is
    `source`'s. steady: threshold of `steadied`, log mel, 0 for none; None: as in `source`. Raises
    BacklineError as load_bundle and replace_graph, FileNotFoundError without a checkpoint, RuntimeError for
    other sizes.
    """
    bundle = load_bundle(source)
    networks = bundle.manifest.networks
    config = PatchVAEConfig(**networks[GRAPH])
    if steady is not None:
        config = replace(config, steady=steady)
    vae = PatchVAE(config)
    fill_in(vae.decoder, read_weights(bundle.path(f"{GRAPH}.onnx")))
    manifest = bundle.manifest
    if run is not None:
        with_decoder(vae, run, share)
        manifest = with_more_training(manifest, "decoder", run, share=share)
    update = {"version": version, "networks": networks | {GRAPH: asdict(config)}}
    return replace_graph(bundle, manifest.model_copy(update=update), GRAPH, vae.decoder, out, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    replacing_arguments(parser)
    parser.add_argument(
        "--run", type=Path, help="folder of training.train_decoder; without: the same weights"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of it in the decoder's weights (%(default)s)"
    )
    parser.add_argument(
        "--steady", type=float, help="log mel: what moves less is averaged over frames (as it was)"
    )
    args = parser.parse_args()
    if args.run is None and args.steady is None:
        parser.error("--run or --steady")
    options = {"run": args.run, "share": args.share, "steady": args.steady, "force": args.force}
    written = add_decoder(args.bundle, args.out, args.version, **options)
    print(f"{args.out}: {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
