"""python -m training.add_separator: a trained separator -> a bundle that is there, all else as it was."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from engine.manifest import Separator as Geometry
from export.bundle_writer import replace_graph
from export.separator import Separator, SeparatorConfig
from training.bundle import describe_training, replacing_arguments, with_training
from training.loop import blend, load_ema
from training.render import SEPARATION_RATE
from training.train_separator import HOP, N_FFT

GRAPH = "separator"
WINDOW = 432  # frames, 10 s
HIGHEST = 9500.0  # Hz; the resampling of the training's audio begins to fade out a little above
SIZES = ({"batch": 1, "frames": 64}, {"batch": 2, "frames": 96})  # at which the graph is compared with torch


def with_separator(manifest: Manifest, network: Separator, share: float = 1.0) -> Manifest:
    """What a bundle with this separator declares, share as in engine.manifest.Separator.

    Raises pydantic.ValidationError where it cannot.
    """
    geometry = Geometry(
        sample_rate=SEPARATION_RATE,
        n_fft=N_FFT,
        hop=HOP,
        patch=network.config.patch,
        window_frames=WINDOW,
        f_max=HIGHEST,
        share=share,
    )
    changed = {
        "capabilities": (*(c for c in manifest.capabilities if c != GRAPH), GRAPH),
        "separator": geometry,
        "networks": manifest.networks | {GRAPH: asdict(network.config)},
    }
    return Manifest(**(dict(manifest) | changed))


def add_separator(
    source: Path,
    run: Path,
    out: Path,
    version: str,
    *,
    share: float = 1.0,
    earlier: Path | None = None,
    config: SeparatorConfig | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle `out`: that of `source` with the separator of a training folder.

    earlier: a copy of that folder from before, whose weights and the later ones it then has the mean of.
    Raises BacklineError as load_bundle and replace_graph, ExportMismatch where the graph is not the network.
    """
    bundle = load_bundle(source)
    sizes = config or SeparatorConfig()
    network = load_ema(run, Separator(sizes))
    trained = describe_training({GRAPH: run})
    if earlier is not None:
        blend(network, load_ema(earlier, Separator(sizes)), 0.5)
        trained[GRAPH]["mean_with_minutes"] = describe_training({GRAPH: earlier})[GRAPH]["minutes"]
    manifest = with_training(with_separator(bundle.manifest, network, share), trained)
    manifest = manifest.model_copy(update={"version": version})
    return replace_graph(bundle, manifest, GRAPH, network, out, sizes=SIZES, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    replacing_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, help="folder of training.train_separator")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of its masks where the UNet's join in (%(default)s: alone)"
    )
    parser.add_argument("--earlier", type=Path, help="a copy of the folder from before: the mean of both")
    args = parser.parse_args()
    written = add_separator(
        args.bundle,
        args.run,
        args.out,
        args.version,
        share=args.share,
        earlier=args.earlier,
        force=args.force,
    )
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB, {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
