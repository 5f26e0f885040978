"""python -m training.add_distilled: a UNet with new distilled steps -> a bundle, all else as it was."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from export.bundle_writer import replace_graph
from export.stem_unet import StemUNet, StemUNetConfig
from training.bundle import describe_training, replacing_arguments, with_training
from training.distill import TAUGHT
from training.loop import load_ema

GRAPH = "unet"


def add_distilled(
    source: Path, run: Path, out: Path, version: str, *, unet: Path | None = None, force: bool = False
) -> Manifest:
    """Write the bundle `out`: that of `source` with the UNet of a folder of `training.distill`.

    It declares what that taught: distilled steps, and the weakened prediction that they were guided by. The
    run has to start from the UNet of this bundle, by `training.from_bundle`. unet: the training folder in
    which that was trained on since; what `run` holds of it is what is written. Raises BacklineError as
    load_bundle and replace_graph, FileNotFoundError without a checkpoint, RuntimeError for other sizes.
    """
    bundle = load_bundle(source)
    before = bundle.manifest
    sizes = StemUNetConfig(**before.networks[GRAPH])
    sizes = replace(sizes, distilled=before.schedule.steps, weakened=True)
    declared = {
        "version": version,
        "capabilities": (*(c for c in before.capabilities if c not in TAUGHT), *TAUGHT),
        "networks": before.networks | {GRAPH: asdict(sizes)},
    }
    manifest = Manifest(**(dict(before) | TAUGHT | declared))
    runs = {"distilled": run} | ({} if unet is None else {GRAPH: unet})
    manifest = with_training(manifest, describe_training(runs))
    return replace_graph(bundle, manifest, GRAPH, load_ema(run, StemUNet(sizes)), out, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    replacing_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of training.distill")
    parser.add_argument("--unet", type=Path, help="folder of training.train_unet, if it was trained on, too")
    args = parser.parse_args()
    written = add_distilled(args.bundle, args.run, args.out, args.version, unet=args.unet, force=args.force)
    print(f"{args.out}: {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
