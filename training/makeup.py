"""python -m training.makeup: how much quieter than true stems a bundle plays; writes it there.

A log mel is guessed at its median, which is below the mean of magnitudes wherever the model is unsure. The
median over windows of held-out songs that no test uses goes into the manifest, and the engine makes up for
it: what fills lack, and what bands do that are made up from nothing, half of them told a tempo and chords,
and where normal steps are distilled, how much louder ordinary ones are.
`--listening` gives the bundle another default of how much `fill` is guided by what it hears, under which
it is then measured.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.audio import Audio
from engine.errors import BacklineError
from engine.manifest import Manifest, Quality
from engine.model import Model
from engine.take import Settings
from engine.tasks import fill, generate
from training.held_out import RATE, Window, held_out_windows
from training.metrics import rms_db
from training.stems import STEMS

FIRST_SEED = 1_600_000  # validation while training uses those from 1,000,000, the tests those from 2,000,000
SAMPLES = 10 * RATE
HEADROOM = 20.0  # dB


def level_of_fill(model: Model, window: Window, stem: str, quality: Quality = "normal") -> float:
    """The level (dB) at which the bundle plays a stem of a window against the true others."""
    given = {
        name: Audio(window.stems[j][None, :SAMPLES], RATE) for j, name in enumerate(STEMS) if name != stem
    }
    made = fill(model, given, [stem], settings=Settings(seed=window.seed, quality=quality)).stems[stem]
    return rms_db(made.samples[0])


def too_quiet(model: Model, windows: list[Window]) -> dict[str, float]:
    """By stem, the median of the true stem's level less the fill's, in dB, as the bundle makes it now."""
    found = {}
    for i, stem in enumerate(STEMS):
        differences = [
            rms_db(window.stems[i, :SAMPLES]) - level_of_fill(model, window, stem)
            for window in tqdm(windows, desc=stem, mininterval=5)
        ]
        found[stem] = float(np.median(differences))
    return found


def too_quiet_alone(model: Model, windows: list[Window]) -> dict[str, float]:
    """The same of bands that are made up from nothing, without makeup, against these windows' true stems.

    They are played HEADROOM dB quieter, so that the engine has nothing to bring within full scale.
    """
    quiet = copy.copy(model)
    quiet.manifest = with_levels(model.manifest, alone_db=dict.fromkeys(STEMS, -HEADROOM))
    differences: dict[str, list[float]] = {stem: [] for stem in STEMS}
    for number, window in enumerate(tqdm(windows, desc="bands", mininterval=5)):
        told: dict[str, Any] = {}
        if number % 2 and model.supports("chords"):
            told = {"bpm": window.song.bpm, "chords": window.song.chart}
        made = generate(quiet, seconds=SAMPLES / RATE, settings=Settings(seed=window.seed), **told)
        for i, stem in enumerate(STEMS):
            truth = rms_db(window.stems[i, :SAMPLES])
            differences[stem].append(truth - rms_db(made.stems[stem].samples[0]))
    return {stem: float(np.median(values)) - HEADROOM for stem, values in differences.items()}


def louder_in_ordinary_steps(model: Model, windows: list[Window]) -> dict[str, float]:
    """By stem, the median of the level of fills in the ordinary steps of `best` above that of normal ones,
    in dB; nothing where normal steps are not distilled."""
    if model.manifest.sampling.sampler != "distilled":
        return {}
    found = {}
    for stem in STEMS:
        differences = [
            level_of_fill(model, window, stem, "best") - level_of_fill(model, window, stem)
            for window in tqdm(windows, desc=f"{stem}, best", mininterval=5)
        ]
        found[stem] = float(np.median(differences))
    return found


def retuned(manifest: Manifest, listening: float | None, version: str | None) -> Manifest:
    """The manifest with another default listening and version, where they are given."""
    sampling = manifest.sampling
    if listening is not None:
        sampling = sampling.model_copy(update={"listening": listening})
    return manifest.model_copy(update={"sampling": sampling, "version": version or manifest.version})


def with_levels(manifest: Manifest, **gains: dict[str, float]) -> Manifest:
    """The manifest with other makeup_db, alone_db or ordinary_db."""
    if manifest.level is None:
        raise BacklineError(f"The model {manifest.name} declares no level to make up for.")
    return manifest.model_copy(update={"level": manifest.level.model_copy(update=gains)})


def made_up(
    manifest: Manifest, quieter: dict[str, float], alone: dict[str, float], louder: dict[str, float]
) -> Manifest:
    """The manifest with what fills are still too quiet by (dB, by stem) added to its makeup, with that of
    bands from nothing, and with what ordinary steps are still too loud by taken from theirs."""
    level = manifest.level
    makeup, ordinary = ({}, {}) if level is None else (level.makeup_db, level.ordinary_db)
    return with_levels(
        manifest,
        makeup_db={stem: round(makeup.get(stem, 0.0) + by, 1) for stem, by in quieter.items()},
        alone_db={stem: round(by, 1) for stem, by in alone.items()},
        ordinary_db={stem: round(ordinary.get(stem, 0.0) - by, 1) for stem, by in louder.items()},
    )


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
    manifest = made_up(
        model.manifest,
        too_quiet(model, windows),
        too_quiet_alone(model, windows),
        louder_in_ordinary_steps(model, windows[: args.windows // 2]),
    )
    path = args.bundle / "manifest.json"
    path.write_text(manifest.model_dump_json(indent=1) + "\n")
    print(f"{path}: {manifest.level}")


if __name__ == "__main__":
    main()
