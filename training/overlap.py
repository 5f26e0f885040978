"""python -m training.overlap: does a soundfont, or an SFZ instrument, hold the recordings of another font?

Fonts pass samples on to each other, so a font that was never trained on may still have been heard. Both play
the same single notes, and the largest correlation over all delays is printed: near 1 it is one recording. An
SFZ instrument is compared with every program of the stems whose range it has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.instruments import RANGES, RATE
from training.sources import EVERY_PROGRAM, HELD_OUT_FONT, KITS, LAYERS, font_player, sfz
from training.stems import STEMS

PITCHES = {"bass": (33, 43), "drums": (36, 38, 42, 45, 46, 49, 51), "guitar": (50, 64), "piano": (48, 60, 72)}
PROGRAMS = EVERY_PROGRAM | {"drums": KITS}
SECONDS = 0.5


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Largest absolute cross-correlation of two signals over all delays, 0 .. 1; 0 where one is silent."""
    x, y = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    if not scale > 1e-9:
        return 0.0
    size = len(x) + len(y)
    product = np.fft.rfft(x, size) * np.fft.rfft(y, size).conj()
    return float(np.abs(np.fft.irfft(product, size)).max() / scale)


def note(font: str, stem: str, program: int, pitch: int) -> NDArray[np.float32]:
    """One note of a font's program, held for SECONDS; NaN, which some fonts give, is silence."""
    played = np.array([[0.0, SECONDS, pitch, 100.0]])
    if font.endswith(".sfz"):
        render = sfz(Path(font), LAYERS[-1], stem)
    else:
        render = font_player(font)(font, program, stem == "drums")
    return np.nan_to_num(render(played, int(SECONDS * RATE), np.random.default_rng(0)))


def overlap(font: str, reference: str, stem: str, program: int) -> list[float]:
    """The correlation of each of PITCHES."""
    pairs = ((note(font, stem, program, p), note(reference, stem, program, p)) for p in PITCHES[stem])
    return [correlation(a, b) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fonts", nargs="+", type=Path, help="soundfonts or .sfz files to look at")
    parser.add_argument("--reference", default=HELD_OUT_FONT, help="compare with this one (%(default)s)")
    args = parser.parse_args()
    for font in args.fonts:
        print(f"{font} against {args.reference}")
        for stem in RANGES if font.suffix == ".sfz" else STEMS:
            for program in PROGRAMS[stem]:
                try:
                    found = overlap(str(font), args.reference, stem, program)
                except ValueError:  # without this program, or range
                    continue
                print(f"  {stem} {program}: {' '.join(f'{c:.2f}' for c in found)}", flush=True)


if __name__ == "__main__":
    main()
