"""Instruments of recorded notes: packed npm ones, Hydrogen's kits, SFZ.

Notes are an array of rows (onset s, duration s, pitch, velocity); audio is mono float32 at RATE.
"""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

RATE = 44100
Notes = NDArray[np.float64]


@dataclass
class Bank:
    """Recorded or synthesised notes by MIDI pitch; a note plays the nearest one, resampled."""

    samples: dict[int, NDArray[np.float32]]
    release: float = 0.15  # s
    one_shot: bool = False

    def __post_init__(self) -> None:
        self._shifted: dict[int, NDArray[np.float32]] = {}

    def at(self, pitch: int) -> NDArray[np.float32]:
        """The sample of a pitch, resampled once and kept."""
        if pitch not in self._shifted:
            nearest = min(self.samples, key=lambda p: abs(p - pitch))
            ratio = 1.0 if self.one_shot else 2 ** ((pitch - nearest) / 12)
            sample = self.samples[nearest]
            if ratio != 1.0:
                sample = soxr.resample(sample, RATE * ratio, RATE, quality="MQ").astype(np.float32)
            self._shifted[pitch] = sample
        return self._shifted[pitch]

    def render(self, notes: Notes, n_samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """Mono (n_samples,): notes let go fade over `release`, one-shots ring out."""
        out = np.zeros(n_samples + RATE * 6, np.float32)
        fade = np.linspace(1, 0, int(self.release * RATE), dtype=np.float32)
        for onset, duration, pitch, velocity in notes:
            sample = self.at(int(pitch))
            if not self.one_shot:
                held = int(duration * RATE)
                sample = sample[: held + len(fade)].copy()
                tail = sample[held:]
                tail *= fade[: len(tail)]
            start = int(onset * RATE)
            if 0 <= start < n_samples:
                gain = (velocity / 127) ** 1.6 * float(rng.uniform(0.92, 1.05))
                sample = sample[: len(out) - start]
                out[start : start + len(sample)] += gain * sample
        return out[:n_samples]


def _mono(path_or_file: Any) -> NDArray[np.float32]:
    """The first 5 s."""
    audio, rate = sf.read(path_or_file, dtype="float32", always_2d=True)
    mono = audio.mean(1)[: rate * 5]
    return mono if rate == RATE else soxr.resample(mono, rate, RATE).astype(np.float32)


def _note_number(name: str) -> int:
    """MIDI number of a name such as As3, C#4 or Ds1v8."""
    name = name.split("v")[0].replace("#", "s")
    steps = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
    return steps[name[0]] + (name[1] == "s") + 12 * (int(name[-1]) + 1)


def npm_bank(archive: Path) -> Bank:
    """A packed npm instrument with one recording per note (`A2.mp3`, `Cs4.ogg`, `A0v8.ogg`)."""
    samples = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            if path.suffix in {".mp3", ".ogg"}:
                file = tar.extractfile(member)
                if file is not None:
                    samples[_note_number(path.stem)] = _trimmed(_mono(file))
    return _levelled(samples)


def _levelled(samples: dict[int, NDArray[np.float32]], one_shot: bool = False) -> Bank:
    """A bank of these, the loudest at 1."""
    peak = max(float(np.abs(s).max()) for s in samples.values())
    return Bank({p: (s / peak).astype(np.float32) for p, s in samples.items()}, one_shot=one_shot)


def _trimmed(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cuts silence before the attack, so that notes start when they are played."""
    loud = np.flatnonzero(np.abs(sample) > 0.02 * np.abs(sample).max())
    return sample[max(0, int(loud[0]) - 40) :] if len(loud) else sample


KIT_WORDS_TO_PITCHES = (
    (("kick", "bassdrum", "bass drum", "thump"), (35, 36)),
    (("stick", "rim click", "click"), (37,)),
    (("snare", "slap"), (38, 40)),
    (("clap",), (39,)),
    (("closed", "hat cl", " cl", "hat low", "hat ring"), (42,)),
    (("pedal", " pd"), (44,)),
    (("open", "hat op", " op", "ohh", "opened"), (46,)),
    (("tom low", "floor", "tom lo", "low tom"), (41, 43, 45)),
    (("tom mid", "tom 2", "middle tom", "tom"), (47,)),
    (("tom hi", "tom 1", "high tom", "tomhi"), (48, 50)),
    (("crash", "cymbal", "splash"), (49, 57, 55, 52)),
    (("ride",), (51, 59)),
    (("bell", "cup"), (53,)),
    (("cowbell",), (56,)),
    (("tambourine",), (54,)),
)


def hydrogen_bank(folder: Path) -> Bank | None:
    """A Hydrogen kit's first layers on General MIDI pitches; None where kick, snare or hi-hat is missing."""
    samples: dict[int, NDArray[np.float32]] = {}
    root = ET.parse(folder / "drumkit.xml").getroot()
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
    for instrument in root.iter("instrument"):
        name = (instrument.findtext("name") or "").lower()
        named = [part.findtext("filename") for part in (*instrument.iter("layer"), instrument)]
        files = [folder / f for f in named if f and (folder / f).exists()]
        if not files:
            continue
        for words, pitches in KIT_WORDS_TO_PITCHES:
            if any(w in name for w in words) and pitches[0] not in samples:
                sample = _trimmed(_mono(files[0]))
                samples.update(dict.fromkeys(pitches, sample))
                break
    if not {36, 38, 42} <= set(samples):
        return None
    return _levelled(samples, one_shot=True)


RANGES = {"bass": (20, 60), "guitar": (36, 80), "piano": (21, 108)}  # beyond them SFZ files keep noises
SELDOM = {"release", "release_key", "legato"}  # triggers of what a note's beginning does not play
LEVELS = ("control", "global", "master", "group", "region")  # of SFZ headers, each inherits from those before
OPCODE = re.compile(r"<(\w+)>|(\w+)=(.*?)(?=\s+\w+=|\s*<|\s*$)")


def sfz_bank(path: Path, velocity: int, stem: str) -> Bank:
    """The first recording of every pitch in a stem's range that an SFZ instrument plays at a velocity.

    Loops, envelopes and controllers are not played. Raises ValueError where no recording is.
    """
    samples: dict[int, NDArray[np.float32]] = {}
    low, high = RANGES[stem]
    for region in _sfz_regions(path):
        played = int(region.get("lovel", 0)) <= velocity <= int(region.get("hivel", 127))
        pitch = _key(region.get("pitch_keycenter", region.get("key", "-1")))
        file = _recording(path, region)
        wanted = played and low <= pitch <= high and pitch not in samples
        if wanted and file is not None and region.get("trigger") not in SELDOM:
            samples[pitch] = _trimmed(_mono(file))
    if not samples:
        raise ValueError(f"{path} plays no recording at velocity {velocity}")
    return _levelled(samples)


def _recording(path: Path, region: dict[str, str]) -> Path | None:
    """The file of a region, beside the instrument or in `Samples` beside its folder; None where absent."""
    name = (region.get("default_path", "") + region.get("sample", "")).replace("\\", "/")
    places = (path.parent / name, path.parent.parent / "Samples" / name)
    return next((place for place in places if place.is_file()), None)


def _sfz_regions(path: Path) -> list[dict[str, str]]:
    """The opcodes of every region, those it inherits among them."""
    given: dict[str, dict[str, str]] = {level: {} for level in LEVELS}
    regions, level = [], "global"
    for line in _sfz_lines(path, path.parent, {}):
        for header, name, value in OPCODE.findall(line):
            if not header:
                given[level][name] = value
            elif header in LEVELS:
                level = header
                for below in LEVELS[max(1, LEVELS.index(level)) :]:
                    given[below] = {}
            if header == "region":
                regions.append(given[level])
                regions[-1].update({k: v for above in LEVELS[:-1] for k, v in given[above].items()})
    return regions


def _sfz_lines(path: Path, root: Path, defined: dict[str, str]) -> Iterator[str]:
    """With what is included, definitions put in and comments left out."""
    for line in path.read_text(errors="replace").splitlines():
        line = line.split("//")[0].strip()
        for name in sorted(defined, key=len, reverse=True):
            line = line.replace(name, defined[name])
        if line.startswith("#define"):
            _, name, value = line.split()
            defined[name] = value
        elif line.startswith("#include"):
            yield from _sfz_lines(root / line.split('"')[1].replace("\\", "/"), root, defined)
        else:
            yield line


def _key(name: str) -> int:
    """A MIDI number as SFZ writes it: 60, c4 or C#4."""
    return int(name) if name.lstrip("-").isdigit() else _note_number(name[0].upper() + name[1:])
