"""python -m training.demo_song: the four-stem song that the demo plays along with, as small FLAC files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile as sf

from training.bands import split_grooves, try_song
from training.grooves import list_grooves
from training.instruments import RATE
from training.render import levelled
from training.sources import soundfont
from training.stems import STEMS

FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"  # MIT licence
PROGRAMS = {"bass": 33, "drums": 0, "guitar": 25, "piano": 0}
LEVELS = {"bass": -21.0, "drums": -21.0, "guitar": -24.0, "piano": -24.0}  # dBFS RMS where they sound
SEED, BARS = 3_000_009, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grooves", type=Path, required=True, help="cache of the groove probe")
    parser.add_argument("--out", type=Path, default=Path("bridge/demo_song"), help="folder (%(default)s)")
    parser.add_argument("--library", default="softrock", help="held-out MMA library of the rhythm section")
    args = parser.parse_args()
    held_out = split_grooves(list_grooves(args.grooves), held_out=True)
    played = [g for g in held_out if not g.name.endswith(("End", "Intro"))]
    grooves = [g for g in played if g.library == args.library]
    rng = np.random.default_rng(SEED)
    song = try_song(grooves, rng)
    bar = song.beats_per_bar * 60 / song.bpm
    first, length = round(8 * bar * RATE), round(BARS * bar * RATE)
    args.out.mkdir(parents=True, exist_ok=True)
    for stem in STEMS:
        render = soundfont(FONT, PROGRAMS[stem], drums=stem == "drums")
        audio = render(song.notes[stem], int(song.seconds * RATE), rng)[first : first + length]
        sf.write(args.out / f"{stem}.flac", levelled(audio, LEVELS[stem]), RATE, subtype="PCM_16")
    chords = [c.symbol for c in song.chords if 8 <= c.beat / song.beats_per_bar < 8 + BARS]
    about = {
        "bpm": song.bpm,
        "beats_per_bar": song.beats_per_bar,
        "key": song.key,
        "chords": chords,
        "grooves": song.grooves,
        "licence": "CC0-1.0",
        "made_with": "MMA's stdlib, played by FluidR3 (MIT)",
    }
    (args.out / "song.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
