"""python -m training.makeup: how much quieter than true stems the fills of a bundle are; writes it there.

A log mel is guessed at its median, which is below the mean of magnitudes wherever the model is unsure. The
median over windows of held-out songs that no test uses goes into the manifest, and the engine makes up for
it. `--listening` gives the bundle another default of how much `fill` is guided by what it hears, under which
it is then measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.audio import Audio
from engine.errors import BacklineError
from engine.manifest import Manifest
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill
from training.held_out import RATE, Window, held_out_windows
from training.metrics import rms_db
from training.stems import STEMS

FIRST_SEED = 1_600_000  # validation while training uses those from 1,000,000, the tests those from 2,000,000
SAMPLES = 10 * RATE


def too_quiet(model: Model, windows: list[Window]) -> dict[str, float]:
    """By stem, the median of the true stem's level less the fill's, in dB, as the bundle makes it now."""
    found = {}
    for i, stem in enumerate(STEMS):
        differences = []
        for window in tqdm(windows, desc=stem, mininterval=5):
            truth = window.stems[:, :SAMPLES]
            given = {name: Audio(truth[j][None], RATE) for j, name in enumerate(STEMS) if j != i}
            made = fill(model, given, [stem], settings=Settings(seed=window.seed)).stems[stem]
            differences.append(rms_db(truth[i]) - rms_db(made.samples[0]))
        found[stem] = float(np.median(differences))
    return found


def retuned(manifest: Manifest, listening: float | None, version: str | None) -> Manifest:
    """The manifest with another default listening and version, where they are given."""
    sampling = manifest.sampling
    if listening is not None:
        sampling = sampling.model_copy(update={"listening": listening})
    return manifest.model_copy(update={"sampling": sampling, "version": version or manifest.version})


def made_up(manifest: Manifest, quieter: dict[str, float]) -> Manifest:
    """The manifest with what fills are still too quiet by (dB, by stem) added to its makeup."""
    if manifest.level is None:
        raise BacklineError(f"The model {manifest.name} declares no level to make up for.")
    before = manifest.level.makeup_db
    makeup = {stem: round(before.get(stem, 0.0) + by, 1) for stem, by in quieter.items()}
    level = manifest.level.model_copy(update={"makeup_db": makeup})
    return manifest.model_copy(update={"level": level})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder whose manifest is changed")
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--listening", type=float, help="new default of fill; as it was where not given")
    parser.add_argument("--version", help="new version of the model; as it was where not given")
    args = parser.parse_args()
    windows = held_out_windows(args.windows, args.grooves, FIRST_SEED)
    model = Model.open(args.bundle, "cpu")
    model.manifest = retuned(model.manifest, args.listening, args.version)
    manifest = made_up(model.manifest, too_quiet(model, windows))
    path = args.bundle / "manifest.json"
    path.write_text(manifest.model_dump_json(indent=1) + "\n")
    print(f"{path}: {manifest.level}")


if __name__ == "__main__":
    main()
