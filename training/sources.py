"""Where sounds come from: soundfonts, sampled instruments, sampled kits and our own synthesis.

Every source is a function `(notes, n_samples, rng) -> mono float32 at 44.1 kHz`, with notes as an array of
rows (onset s, duration s, pitch, velocity). Timbre variety decides how well the model hears strangers, so
the pools are wide and a random member is drawn per stem and render.

Held out, never in these pools: TimGM6mb, and whatever shares its samples. Measured by correlating single
notes, csound's GMbank is the same recordings nearly throughout, Merlin in about half its programs and A320U
in its kits and a few more; GMbank is left out, Merlin keeps only the programs below 0.8, A320U those below
0.85. Of the SFZ bank of GM, the Rhodes is left out.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt

from training.instruments import RATE, Bank, Notes, hydrogen_bank, npm_bank, sfz_bank

Render = Callable[[Notes, int, np.random.Generator], NDArray[np.float32]]


@dataclass(frozen=True)
class Source:
    """One sound of one stem. `words` are what a caption may call it."""

    name: str
    stem: str
    words: tuple[str, ...]
    render: Render


# --- soundfonts ---------------------------------------------------------------------------------------

PROGRAM_WORDS = {
    0: ("acoustic", "grand piano"),
    1: ("bright", "piano"),
    2: ("electric", "grand piano"),
    3: ("honky-tonk", "piano"),
    4: ("electric", "electric piano"),
    5: ("electric", "fm electric piano"),
    6: ("acoustic", "harpsichord"),
    7: ("electric", "clavinet"),
    24: ("acoustic", "nylon guitar"),
    25: ("acoustic", "steel guitar"),
    26: ("electric", "jazz guitar"),
    27: ("electric", "clean guitar"),
    28: ("electric", "muted guitar"),
    29: ("electric", "overdriven guitar"),
    30: ("electric", "distorted guitar"),
    32: ("acoustic", "upright bass"),
    33: ("electric", "finger bass"),
    34: ("electric", "picked bass"),
    35: ("electric", "fretless bass"),
    36: ("electric", "slap bass"),
    37: ("electric", "slap bass"),
    38: ("electric", "synth bass"),
    39: ("electric", "synth bass"),
}
KITS = (0, 8, 16, 24, 25, 32, 40)
ELECTRIC_KITS = (24, 25)
EVERY_PROGRAM: dict[str, tuple[int, ...]] = {
    "piano": tuple(range(8)),
    "guitar": tuple(range(24, 31)),
    "bass": tuple(range(32, 40)),
}
# Below a correlation of 0.8 with TimGM6mb (training.overlap); guitar 24 would be another, but renders as NaN.
OWN_MERLIN: dict[str, tuple[int, ...]] = {"piano": (0, 1, 3, 6), "guitar": (29,)}
HELD_OUT_FONT = "/usr/share/sounds/sf2/TimGM6mb.sf2"
HELD_OUT_PROGRAMS: dict[str, tuple[int, ...]] = {
    "piano": (0, 1, 2, 4, 5),
    "guitar": (24, 25, 26, 27, 28),
    "bass": (32, 33, 34, 35, 36),
}


# All but guitar 26, whose notes correlate at up to 0.89 with TimGM6mb's.
FREEPATS = "/etc/timidity/freepats.cfg"
FREEPATS_PROGRAMS: dict[str, tuple[int, ...]] = {
    "piano": (0, 1, 2, 4, 5, 6, 7),
    "guitar": (24, 25, 27, 28, 29, 30),
    "bass": tuple(range(32, 39)),
}

# What is below 0.85 in A320U, whose kits and other programs share recordings with TimGM6mb.
OWN_A320U: dict[str, tuple[int, ...]] = {
    "piano": (0, 1, 2, 3, 5),
    "guitar": (24, 25, 27, 28, 29, 30),
    "bass": (32, 33, 34, 36, 37),
}

FLUIDSYNTH_BLOCK = 64  # samples


@functools.lru_cache(maxsize=8)
def _fluidsynth(path: str) -> tuple[Any, int]:
    import fluidsynth

    synth = fluidsynth.Synth(gain=0.5, samplerate=float(RATE))
    synth.setting("synth.reverb.active", 0)
    synth.setting("synth.chorus.active", 0)
    return synth, synth.sfload(path)


def soundfont(path: str, program: int, drums: bool) -> Render:
    """A program (or drum kit) of an .sf2 soundfont, played by FluidSynth.

    symusic's own synthesizer is faster, but plays the zones of most .sf2 fonts at wrong pitches.
    """

    def render(notes: Notes, n_samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
        del rng
        synth, font = _fluidsynth(path)
        channel = 9 if drums else 0
        synth.system_reset()
        synth.get_samples(256 * FLUIDSYNTH_BLOCK)  # what still rang dies away
        if synth.program_select(channel, font, 128 if drums else 0, program) != 0:
            raise ValueError(f"{path} has no {'kit' if drums else 'program'} {program}")
        events = []
        for onset, duration, pitch, velocity in notes:
            start = int(onset * RATE)
            events.append((start, 1, int(pitch), int(velocity)))
            events.append((start + max(1000, int(duration * RATE)), 0, int(pitch), 0))
        # notes begin with FluidSynth's blocks, so whole blocks leave nothing over to shift the next render
        end = n_samples + -n_samples % FLUIDSYNTH_BLOCK
        position, parts = 0, []
        for time, on, pitch, velocity in sorted(events):
            if min(time, end) > position:
                parts.append(synth.get_samples(min(time, end) - position))
                position = min(time, end)
            if on:
                synth.noteon(channel, pitch, velocity)
            else:
                synth.noteoff(channel, pitch)
        if position < end:
            parts.append(synth.get_samples(end - position))
        mono = np.concatenate(parts).reshape(-1, 2).mean(1)[:n_samples]
        return mono.astype(np.float32) / 32768

    return render


@functools.lru_cache(maxsize=2)
def _symusic(path: str) -> Any:
    import symusic

    return symusic.Synthesizer(path, RATE)


def compressed_soundfont(path: str, program: int, drums: bool) -> Render:
    """The same of an .sf3, played by symusic: FluidSynth decodes such a file whole, for half a minute."""

    def render(notes: Notes, n_samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
        del rng
        mono = np.asarray(_symusic(path).render(_score(notes, program, drums), stereo=True)).mean(0)
        return _fit(mono.astype(np.float32), n_samples)

    return render


def _score(notes: Notes, program: int, drums: bool) -> Any:
    import symusic

    score: Any = symusic.Score(480)
    score.tempos.append(symusic.Tempo(0, qpm=125.0))  # 1,000 ticks a second
    track: Any = symusic.Track(name="stem", program=program, is_drum=drums)
    for onset, duration, pitch, velocity in notes:
        length = max(30, round(duration * 1000))
        track.notes.append(symusic.Note(round(onset * 1000), length, int(pitch), int(velocity)))
    score.tracks.append(track)
    return score


def patches(path: str, program: int, drums: bool) -> Render:
    """The same of Gravis Ultrasound patches, by their configuration file, played by TiMidity++."""

    def render(notes: Notes, n_samples: int, rng: np.random.Generator) -> NDArray[np.float32]:
        del rng
        with tempfile.TemporaryDirectory() as folder:
            song, played = Path(folder) / "song.mid", Path(folder) / "song.wav"
            _score(notes, program, drums).dump_midi(song)
            effects = ("-EFreverb=d", "-EFchorus=d", "-EFdelay=d", "--preserve-silence", "-A40")
            subprocess.run(
                ["timidity", "-c", path, "-s", str(RATE), "-OwM", "-o", str(played), *effects, str(song)],
                check=True,
                capture_output=True,
            )
            audio, _ = sf.read(played, dtype="float32")
        return _fit(np.asarray(audio, np.float32), n_samples)

    return render


def _fit(signal: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    return signal[:n] if len(signal) >= n else np.pad(signal, (0, n - len(signal)))


# --- our own synthesis --------------------------------------------------------------------------------


def _partials(
    f0: float,
    amplitudes: NDArray[np.floating],
    decays: NDArray[np.floating],
    stiffness: float,
    seconds: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """A sum of decaying partials of a stiff string: f_k = k f0 sqrt(1 + B k^2) (Fletcher 1964)."""
    k = np.arange(1, len(amplitudes) + 1)
    freqs = k * f0 * np.sqrt(1 + stiffness * k**2)
    t = np.arange(int(seconds * RATE), dtype=np.float32) / RATE
    out = np.zeros(len(t), np.float32)
    for f, a, d in zip(freqs, amplitudes, decays, strict=True):
        if f < 0.45 * RATE and a > 1e-4:
            n = min(len(t), int(9 / d * RATE))  # below -78 dB after nine time constants
            wave = a * np.exp(-d * t[:n]) * np.sin(2 * np.pi * f * t[:n] + rng.uniform(0, 6.3))
            out[:n] += wave.astype(np.float32)
    attack = min(len(out), 1 + int(rng.uniform(0.0005, 0.004) * RATE))
    out[:attack] *= np.linspace(0, 1, attack, dtype=np.float32)
    return out


def string_bank(rng: np.random.Generator, low: int, high: int, bright: float) -> Bank:
    """Plucked or struck strings: pluck position, stiffness, damping and body are drawn at random."""
    position, stiffness = rng.uniform(0.06, 0.45), 10 ** rng.uniform(-5.5, -3.3)
    tilt, damping = rng.uniform(0.4, 1.6) / bright, 10 ** rng.uniform(-0.5, 0.6)
    body = [(rng.uniform(80, 3000), rng.uniform(0.3, 3.0), rng.uniform(0.15, 0.6)) for _ in range(5)]
    sustain = 10 ** rng.uniform(-0.6, 0.3)
    samples = {}
    for pitch in range(low, high + 1, 3):
        f0 = 440 * 2 ** ((pitch - 69) / 12)
        k = np.arange(1, min(70, int(14000 / f0)) + 2)
        amplitudes = np.abs(np.sin(np.pi * k * position)) / k**tilt
        for centre, gain, width in body:
            amplitudes = amplitudes * (1 + gain * np.exp(-((np.log(k * f0 / centre) / width) ** 2)))
        decays = (0.5 + f0 / 300) / sustain * (1 + damping * 0.05 * (k - 1) ** 1.3)
        samples[pitch] = _partials(f0, amplitudes, decays, stiffness, 4.0, rng)
        samples[pitch] *= 0.5 / (np.abs(samples[pitch]).max() + 1e-9)
    return Bank(samples, release=rng.uniform(0.04, 0.3))


def fm_bank(rng: np.random.Generator, low: int, high: int) -> Bank:
    """Two-operator FM (Chowning 1973): electric pianos, basses, bells."""
    ratio, ratio2 = rng.choice([0.5, 1, 1, 2, 3, 7, 14]), rng.choice([1, 1, 2])
    index, decay, decay2 = rng.uniform(0.3, 5), rng.uniform(1.5, 12), rng.uniform(0.7, 4)
    t = np.arange(4 * RATE) / RATE
    samples = {}
    for pitch in range(low, high + 1, 3):
        f0 = 440 * 2 ** ((pitch - 69) / 12)
        modulator = index * np.exp(-decay * t) * np.sin(2 * np.pi * ratio * f0 * t)
        wave = np.exp(-decay2 * t) * np.sin(2 * np.pi * ratio2 * f0 * t + modulator)
        wave[:90] *= np.linspace(0, 1, 90)
        samples[pitch] = (0.5 * wave).astype(np.float32)
    return Bank(samples, release=rng.uniform(0.03, 0.2))


def subtractive_bank(rng: np.random.Generator, low: int, high: int) -> Bank:
    """Saw, square or mixed oscillators through a decaying low-pass, summed as harmonics."""
    odd, cutoff, sweep = rng.uniform(0, 1), 10 ** rng.uniform(2.2, 3.6), rng.uniform(0.5, 8)
    detune, decay = rng.uniform(0, 0.004), rng.uniform(0.2, 3)
    t = np.arange(3 * RATE, dtype=np.float32) / RATE
    moving = (cutoff * (1 + sweep * np.exp(-decay * 4 * t))).astype(np.float32)
    samples = {}
    for pitch in range(low, high + 1, 3):
        f0 = 440 * 2 ** ((pitch - 69) / 12)
        wave = np.zeros_like(t)
        for k in range(1, min(40, int(12000 / f0)) + 1):
            amplitude = (1 - odd * (k % 2 == 0)) / k / (1 + (k * f0 / moving) ** 4)
            wave += amplitude * np.sin(2 * np.pi * k * f0 * (1 + detune * (-1) ** k) * t)
        wave *= np.exp(-decay * t)
        wave[:60] *= np.linspace(0, 1, 60)
        samples[pitch] = (0.5 * wave / (np.abs(wave).max() + 1e-9)).astype(np.float32)
    return Bank(samples, release=rng.uniform(0.02, 0.1))


def _noise(
    rng: np.random.Generator, seconds: float, decay: float, low: float, high: float
) -> NDArray[np.float32]:
    n = int(seconds * RATE)
    sos = butter(2, (low, min(high, 20000)), "bandpass", fs=RATE, output="sos")
    noise = sosfilt(sos, rng.standard_normal(n)) * np.exp(-np.arange(n) / RATE * decay)
    return (noise / (np.abs(noise).max() + 1e-9)).astype(np.float32)


def _drum(
    rng: np.random.Generator, f0: float, drop: float, decay: float, seconds: float
) -> NDArray[np.float32]:
    """A sine whose pitch falls from (1 + drop) f0 to f0: kicks and toms."""
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(f0 * (1 + drop * np.exp(-t * rng.uniform(15, 60)))) / RATE
    return (np.sin(phase) * np.exp(-decay * t)).astype(np.float32)


def _mixed(*parts: tuple[float, NDArray[np.float32]]) -> NDArray[np.float32]:
    out = np.zeros(max(len(p) for _, p in parts), np.float32)
    for gain, part in parts:
        out[: len(part)] += gain * part
    return out


def kit_bank(rng: np.random.Generator) -> Bank:
    """A drum machine with random tuning, decays and noise colours."""
    u = rng.uniform
    kick = _mixed(
        (1, _drum(rng, u(38, 75), u(1, 6), u(4, 16), 0.8)), (u(0, 0.3), _noise(rng, 0.1, 120, 800, 8000))
    )
    snare = _mixed(
        (u(0.2, 0.7), _drum(rng, u(140, 260), u(0.1, 1), u(10, 30), 0.4)),
        (u(0.4, 0.9), _noise(rng, 0.5, u(9, 28), u(300, 1800), u(6000, 15000))),
    )
    low, high = u(4000, 8000), u(11000, 18000)
    samples = {36: kick, 38: 0.8 * snare, 42: u(0.2, 0.5) * _noise(rng, 0.3, u(30, 90), low, high)}
    samples[46] = u(0.2, 0.5) * _noise(rng, 1.2, u(4, 10), low, high)
    samples[44] = 0.3 * _noise(rng, 0.2, 60, low, high)
    samples[49] = u(0.3, 0.6) * _noise(rng, 2.5, u(1.2, 3), u(2000, 4500), 17000)
    samples[51] = u(0.15, 0.4) * _noise(rng, 1.5, u(3, 7), u(3500, 6500), 15000)
    samples[37] = 0.4 * _noise(rng, 0.1, 80, 1200, 6000)
    samples[39] = 0.5 * _noise(rng, 0.3, 18, 900, 5000)
    samples[54] = 0.3 * _noise(rng, 0.2, 25, 6000, 16000)
    samples[56] = _mixed((0.3, _drum(rng, u(500, 800), 0, 12, 0.4)))
    tom = u(70, 130)
    for pitch, step in zip((41, 43, 45, 47, 48, 50), range(6), strict=True):
        samples[pitch] = 0.7 * _drum(rng, tom * 1.16**step, u(0.2, 0.8), u(4, 9), 0.8)
    samples[35], samples[40], samples[57], samples[59] = samples[36], samples[38], samples[49], samples[51]
    return Bank(samples, one_shot=True)


# --- the pools ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _made_bank(kind: str, seed: int, low: int, high: int) -> Bank:
    rng = np.random.default_rng(seed)
    if kind == "string":
        return string_bank(rng, low, high, 1.0)
    if kind == "fm":
        return fm_bank(rng, low, high)
    if kind == "kit":
        return kit_bank(rng)
    return subtractive_bank(rng, low, high)


def made(kind: str, seed: int, low: int = 0, high: int = 0) -> Render:
    """Our own synthesis as a source; the notes are computed at first use."""
    return lambda notes, n, rng: _made_bank(kind, seed, low, high).render(notes, n, rng)


@functools.lru_cache(maxsize=32)
def _archive_bank(path: Path) -> Bank | None:
    return npm_bank(path) if path.suffix == ".tgz" else hydrogen_bank(path)


_sfz_bank = functools.lru_cache(maxsize=64)(sfz_bank)


def sfz(path: Path, velocity: int, stem: str) -> Render:
    """An SFZ instrument as a source, one of its layers throughout, read at first use."""
    return lambda notes, n, rng: _sfz_bank(path, velocity, stem).render(notes, n, rng)


def recorded(path: Path) -> Render:
    """A recorded bank as a source, read at first use."""

    def render(notes: Notes, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
        bank = _archive_bank(path)
        if bank is None:
            raise ValueError(f"{path} has no kick, snare and hi-hat")
        return bank.render(notes, n, rng)

    return render


MADE_PER_STEM = 24
# Stem and words of a packed npm instrument, by a part of its name.
ARCHIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "guitar-acoustic": ("guitar", ("acoustic", "steel guitar")),
    "guitar-nylon": ("guitar", ("acoustic", "nylon guitar")),
    "guitar-electric": ("guitar", ("electric", "clean guitar")),
    "bass-electric": ("bass", ("electric", "finger bass")),
    "piano-mp3": ("piano", ("acoustic", "grand piano")),
    "piano-velocity": ("piano", ("acoustic", "grand piano")),
}


GM = "Discord-SFZ-GM-Bank/Discord GM/Melodic/"
LAYERS = (50, 105)  # velocities whose recordings count as sounds of their own
# Below the folder `sfz` of the samples.
SFZ_INSTRUMENTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("electric-bass-YR/FingerBassYR 20190930.sfz", "bass", ("electric", "finger bass")),
    ("electric-bass-YR/PickedBassYR 20190930.sfz", "bass", ("electric", "picked bass")),
    ("karoryfer.growlybass/growlybass_clean.sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.swagbass/swagbass_clean.sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.swagbass/swagbass_shiny.sfz", "bass", ("electric", "picked bass")),
    ("karoryfer.pastabass/linguine.sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.pastabass/spaghetti.sfz", "bass", ("electric", "picked bass")),
    ("karoryfer.pastabass/fetuccine.sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.pastabass/tagliatelle.sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.meatbass/Programs/pizz_basic.sfz", "bass", ("acoustic", "upright bass")),
    ("dsmolken.double-bass/d_smolken_rubner_bass_pizz.sfz", "bass", ("acoustic", "upright bass")),
    ("synth-bass-1/SynthBass1 20190723.sfz", "bass", ("electric", "synth bass")),
    ("synth-bass-2/SynthBass2 20210405.sfz", "bass", ("electric", "synth bass")),
    ("lately-bass/LatelyBass 20240409.sfz", "bass", ("electric", "synth bass")),
    (GM + "034-Electric Bass (finger).sfz", "bass", ("electric", "finger bass")),
    ("karoryfer.emilyguitar/emily_clean.sfz", "guitar", ("electric", "clean guitar")),
    ("karoryfer.shinyguitar/Programs/acoustic_one.sfz", "guitar", ("acoustic", "steel guitar")),
    ("karoryfer.shinyguitar/Programs/electric_one.sfz", "guitar", ("electric", "clean guitar")),
    ("spanish-classical-guitar/SpanishClassicalGuitar-20190618.sfz", "guitar", ("acoustic", "nylon guitar")),
    (GM + "026-Acoustic Guitar (steel).sfz", "guitar", ("acoustic", "steel guitar")),
    ("GregSullivan.E-Pianos/Pianet T/Pianet T.sfz", "piano", ("electric", "electric piano")),
    ("GregSullivan.E-Pianos/Wurlitzer EP200/Wurlitzer EP200.sfz", "piano", ("electric", "electric piano")),
    ("GregSullivan.E-Pianos/CP80/CP80.sfz", "piano", ("electric", "grand piano")),
    ("fm-piano1/FM-Piano1 20190916.sfz", "piano", ("electric", "fm electric piano")),
    ("fm-piano2/FM-Piano2 20161112.sfz", "piano", ("electric", "fm electric piano")),
    ("upright-piano-KW/UprightPianoKW-20220221.sfz", "piano", ("acoustic", "upright piano")),
    ("old-piano-FB/PianoFB 20200401.sfz", "piano", ("acoustic", "upright piano")),
    ("SplendidGrandPiano/Splendid Grand Piano.sfz", "piano", ("acoustic", "grand piano")),
    (GM + "002-Bright Acoustic Piano.sfz", "piano", ("bright", "piano")),
)


def font_player(path: str) -> Callable[[str, int, bool], Render]:
    """What plays a soundfont, by the kind of its file."""
    return {".sf3": compressed_soundfont, ".cfg": patches}.get(Path(path).suffix, soundfont)


def _font_sources(
    name: str, path: str, programs: dict[str, tuple[int, ...]], kits: tuple[int, ...]
) -> list[Source]:
    play = font_player(path)
    sources = [
        Source(f"{name}:{p}", stem, PROGRAM_WORDS[p], play(path, p, False))
        for stem, numbers in programs.items()
        for p in numbers
    ]
    for k in kits:
        words = ("electric" if k in ELECTRIC_KITS else "acoustic", "drum kit")
        sources.append(Source(f"{name}:kit{k}", "drums", words, play(path, k, True)))
    return sources


def held_out_sources(font: str = HELD_OUT_FONT) -> list[Source]:
    """TimGM6mb: the public validation and test font."""
    return _font_sources("timgm6mb", font, HELD_OUT_PROGRAMS, KITS)


def training_sources(samples: Path, made_from: int = 0) -> list[Source]:
    """Every source that may be trained on. `samples` holds fetched soundfonts and packed npm instruments.

    made_from: the seed of the first sounds of our own synthesis, of which there are MADE_PER_STEM.
    """
    sources = _font_sources("fluidr3", "/usr/share/sounds/sf2/FluidR3_GM.sf2", EVERY_PROGRAM, KITS)
    sources += _font_sources(
        "musescore", "/usr/share/sounds/sf3/MuseScore_General_Full.sf3", EVERY_PROGRAM, KITS
    )
    sources += _font_sources("opl3", str(samples / "OPL-3_FM_128M.sf2"), EVERY_PROGRAM, ())
    sources += _font_sources("merlin", str(samples / "Merlin.sf2"), OWN_MERLIN, ())
    for _ in range(3):  # recordings that no other font has count thrice, here and below
        sources += _font_sources("freepats", FREEPATS, FREEPATS_PROGRAMS, (0,))
        sources += _font_sources("sonivox", str(samples / "sonivox.sf2"), EVERY_PROGRAM, (0,))
        sources += _font_sources("a320u", str(samples / "A320U.sf2"), OWN_A320U, ())
    for archive in sorted(samples.glob("*.tgz")):
        stem, words = next(v for k, v in ARCHIVES.items() if k in archive.name)
        sources += [Source(archive.stem, stem, words, recorded(archive))] * 3
    for kit in sorted(Path("/usr/share/hydrogen/data/drumkits").glob("*")):
        if hydrogen_bank(kit) is not None:
            electric = any(w in kit.name for w in ("Electr", "Audiophob", "Vari", "rumpf"))
            words = ("electric" if electric else "acoustic", "drum kit")
            sources.append(Source(kit.name, "drums", words, recorded(kit)))
    for name, stem, words in SFZ_INSTRUMENTS:
        path = samples / "sfz" / name
        if path.exists():
            sources += [Source(f"sfz:{path.stem}:{v}", stem, words, sfz(path, v, stem)) for v in LAYERS]
    for seed in range(made_from, made_from + MADE_PER_STEM):
        sources += _made_sources(seed)
    return sources


def _made_sources(seed: int) -> list[Source]:
    kind = ("string", "subtractive", "fm")[seed % 3]
    bass = "picked bass" if kind == "string" else "synth bass"
    strings, keys = made("string", seed, 38, 86), made("string", seed + 100, 28, 98)
    fm_keys, low = made("fm", seed + 200, 28, 98), made(kind, seed + 300, 24, 62)
    return [
        Source(f"kit{seed}", "drums", ("electric", "drum machine"), made("kit", seed)),
        Source(f"strings{seed}", "guitar", ("acoustic", "steel guitar"), strings),
        Source(f"keys{seed}", "piano", ("acoustic", "piano"), keys),
        Source(f"fmkeys{seed}", "piano", ("electric", "electric piano"), fm_keys),
        Source(f"bass{seed}", "bass", ("electric", bass), low),
    ]
