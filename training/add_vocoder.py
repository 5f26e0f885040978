"""python -m training.add_vocoder: the phase search of export.griffin_lim -> a bundle, all else as it was."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from engine.bundle import load_bundle
from engine.manifest import Manifest
from export.bundle_writer import replace_graph
from export.griffin_lim import GriffinLim, GriffinLimConfig
from training.bundle import replacing_arguments

GRAPH = "vocoder"


def add_vocoder(source: Path, out: Path, version: str, *, force: bool = False) -> Manifest:
    """Write the bundle `out`: that of `source` with the vocoder as export.griffin_lim has it for its mels.

    Raises BacklineError as load_bundle and replace_graph, ValueError for mels that it cannot search.
    """
    bundle = load_bundle(source)
    vocoder = GriffinLim(GriffinLimConfig.of(bundle.manifest.mel))
    networks = bundle.manifest.networks | {GRAPH: asdict(vocoder.config)}
    manifest = bundle.manifest.model_copy(update={"networks": networks, "version": version})
    return replace_graph(bundle, manifest, GRAPH, vocoder, out, force=force)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    replacing_arguments(parser)
    args = parser.parse_args()
    written = add_vocoder(args.bundle, args.out, args.version, force=args.force)
    print(f"{args.out}: {written.provenance['export']['relative_error'][GRAPH]}")


if __name__ == "__main__":
    main()
