"""python -m training.makeup: how much quieter than true stems the fills of a bundle are; writes it there.

A log mel is guessed at its median, which is below the mean of magnitudes wherever the model is unsure. The
median over windows of held-out songs that no test uses goes into the manifest, and the engine makes up for
it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.audio import Audio
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder whose manifest is changed")
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--windows", type=int, default=12)
    args = parser.parse_args()
    windows = held_out_windows(args.windows, args.grooves, FIRST_SEED)
    found = too_quiet(Model.open(args.bundle, "cpu"), windows)
    path = args.bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    before = manifest["level"].get("makeup_db", {})
    makeup = {stem: round(before.get(stem, 0.0) + by, 1) for stem, by in found.items()}
    manifest["level"]["makeup_db"] = makeup
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{path}: {makeup}")


if __name__ == "__main__":
    main()
