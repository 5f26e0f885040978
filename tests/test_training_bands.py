"""From grooves to notes to sound: what is read of MMA, what plays it, and what is kept out of training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from training import held_out, instruments, overlap, render, sources
from training.bands import FIFTH_STRING, RANGES, Song, folded, lowered, part_of, split_grooves, try_song
from training.charts import timeline
from training.dataset import load_songs
from training.grooves import HELD_OUT, Groove, list_grooves, role_of, spread
from training.instruments import RATE, Bank, hydrogen_bank, npm_bank, sfz_bank
from training.mel import FLOOR, GEOMETRY, QUANTUM, log_mel
from training.sources import (
    ARCHIVES,
    FREEPATS,
    FREEPATS_PROGRAMS,
    HELD_OUT_FONT,
    LAYERS,
    SFZ_INSTRUMENTS,
    Source,
    held_out_sources,
    made,
    patches,
    recorded,
    sfz,
    soundfont,
    training_sources,
)
from training.stems import STEMS


@dataclass
class Note:
    time: int
    duration: int
    pitch: int
    velocity: int


@dataclass
class Track:
    name: str
    program: int = 0
    is_drum: bool = False
    notes: list[Note] = field(default_factory=list)


@dataclass
class Score:
    tracks: list[Track]
    ticks_per_quarter: int = 480


@pytest.mark.parametrize(
    ("track", "role"),
    [
        (Track("Drum-Kick", is_drum=True), "drums"),
        (Track("Bass", 33), "bass"),
        (Track("Walk-Bass", 0), "bass"),
        (Track("Chord-Piano", 4), "piano"),
        (Track("Chord", 25), "guitar"),
        (Track("Arpeggio", 46), "chordal"),
        (Track("Plectrum", 105), "chordal"),
        (Track("Melody", 73), None),
    ],
)
def test_roles_of_tracks(track: Track, role: str | None) -> None:
    assert role_of(track) == role


def test_half_bars_are_placed_in_mmas_notation() -> None:
    chart = [["C"], ["F", "G7"]]
    assert spread(chart, 4) == [["C"], ["F", "/", "G7"]]
    assert spread(chart, 3) == [["C"], ["F", "/", "G7"]]
    assert spread(chart, 6) == [["C"], ["F", "/", "/", "G7"]]
    assert spread(chart, 2) == [["C"], ["F", "G7"]]


def test_notes_in_seconds_sorted_over_tracks() -> None:
    score = Score(
        [
            Track("Bass", 33, notes=[Note(960, 240, 40, 90), Note(0, 480, 36, 100)]),
            Track("Walk", 34, notes=[Note(480, 480, 43, 80)]),
            Track("Chord", 0, notes=[Note(0, 1, 60, 1)]),
        ]
    )
    notes = part_of(score, "bass", 120.0)
    assert notes.tolist() == [[0, 0.5, 36, 100], [0.5, 0.5, 43, 80], [1.0, 0.25, 40, 90]]
    assert part_of(score, "drums", 120.0).shape == (0, 4)


def test_a_chordal_part_stands_in_for_guitar_and_piano_only() -> None:
    score = Score([Track("Arpeggio", 46, notes=[Note(0, 480, 60, 100)])])
    assert len(part_of(score, "guitar", 120.0)) == len(part_of(score, "piano", 120.0)) == 1
    assert len(part_of(score, "bass", 120.0)) == 0
    score.tracks.append(Track("Chord", 24, notes=[Note(0, 480, 64, 100), Note(0, 480, 67, 100)]))
    assert part_of(score, "guitar", 120.0)[:, 2].tolist() == [64, 67]


def test_folding_keeps_pitch_classes_and_brings_them_into_range() -> None:
    notes = np.zeros((128, 4))
    notes[:, 2] = np.arange(128)
    for stem, (low, high) in RANGES.items():
        pitch = folded(notes.copy(), stem)[:, 2]
        assert pitch.min() >= low and pitch.max() <= high
        assert (pitch % 12 == np.arange(128) % 12).all()
        assert pitch[:low].max() < low + 12 and pitch[high + 1 :].min() > high - 12, "no further than needed"
        inside = (notes[:, 2] >= low) & (notes[:, 2] <= high)
        assert (pitch[inside] == notes[inside, 2]).all()
    assert (folded(notes.copy(), "drums") == notes).all()


def test_lowered_basses_play_their_lowest_notes_and_nothing_else_changes() -> None:
    notes = np.zeros((128, 4))
    notes[:, 2] = np.arange(128)
    song = Song(dict.fromkeys(STEMS, notes), 120, 4, 9, [], "C major", "rock", {}, False)
    lowest = []
    for seed in range(40):
        low = lowered(song, np.random.default_rng(seed))
        bass = low.notes["bass"]
        assert (bass[:, 2] % 12 == notes[:, 2] % 12).all() and not bass[:, [0, 1, 3]].any()
        assert np.ptp(bass[:, 2]) <= 19
        assert all(low.notes[stem] is notes for stem in STEMS if stem != "bass")
        lowest.append(int(bass[:, 2].min()))
    assert set(lowest) == {FIFTH_STRING, RANGES["bass"][0]}
    assert (notes[:, 2] == np.arange(128)).all(), "the song it was made from is as it was"


def test_no_library_is_on_both_sides_of_the_split(tmp_path: Path) -> None:
    groove = {"beats_per_bar": 4.0, "swing": False, "roles": ["bass", "drums"], "chordal": True}
    libraries = ["rock", "rb", "tango", "waltz"]
    rows = [{"name": f"G{i}", "library": library, **groove} for i, library in enumerate(libraries)]
    (tmp_path / "grooves.json").write_text(json.dumps(rows))
    grooves = list_grooves(tmp_path / "grooves.json")
    assert grooves[0] == Groove("G0", "rock", 4.0, False, ("bass", "drums"), True)
    training, kept = split_grooves(grooves, False), split_grooves(grooves, True)
    assert {g.library for g in training} == {"rock", "tango"}
    assert {g.library for g in kept} == {"rb", "waltz"} <= HELD_OUT


def test_the_held_out_font_is_never_trained_on(tmp_path: Path) -> None:
    for name in ARCHIVES:
        (tmp_path / f"instrument-{name}-1.0.0.tgz").touch()
    pool = training_sources(tmp_path)
    assert not {s.name.split(":")[0] for s in pool} & {s.name.split(":")[0] for s in held_out_sources()}
    assert {s.stem for s in held_out_sources()} == {s.stem for s in pool} == set(STEMS)
    for stem in STEMS:
        assert len({s.name for s in pool if s.stem == stem}) >= 24
    for source in (*pool, *held_out_sources()):
        assert len(source.words) == 2 and all(word.islower() for word in source.words)
    archived = {s.name: s.stem for s in pool if s.name.startswith("instrument")}
    assert archived == {f"instrument-{name}-1.0.0": stem for name, (stem, _) in ARCHIVES.items()}


def test_songs_may_be_played_by_chosen_sounds_only(tmp_path: Path) -> None:
    chosen = render.pools(training_sources(tmp_path, made_from=7), ["sonivox", "a320u", "kit", "fluidr3:kit"])
    names = {stem: {source.name for source in pool} for stem, pool in chosen.items()}
    assert {"sonivox:24", "a320u:24"} < names["guitar"] and "a320u:26" not in names["guitar"]
    for stem in ("bass", "guitar", "piano"):
        assert {name.split(":")[0] for name in names[stem]} == {"sonivox", "a320u"}
    assert {"sonivox:kit0", "kit7", "fluidr3:kit0"} < names["drums"]
    assert "musescore:kit0" not in names["drums"]


def played(source: sources.Render, *notes: tuple[float, float, int, int], seconds: float = 2.0) -> np.ndarray:
    return source(np.array(notes, float), round(seconds * RATE), np.random.default_rng(0))


def pitch_of(audio: np.ndarray) -> float:
    """MIDI pitch of a harmonic signal: the shortest lag at which it repeats, between 50 and 1000 Hz."""
    part = audio[RATE // 10 : RATE // 10 + 8192].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * len(part))) ** 2
    repeats = np.fft.irfft(spectrum)[: len(part)]
    lags = np.arange(RATE // 1000, RATE // 50)
    good = (repeats[lags] > 0.8 * repeats[lags].max()) & (repeats[lags] >= repeats[lags - 1])
    lag = lags[np.flatnonzero(good & (repeats[lags] > repeats[lags + 1]))[0]]
    near = repeats[lag - 1 : lag + 2]
    lag = lag + 0.5 * (near[0] - near[2]) / (near[0] - 2 * near[1] + near[2])
    return float(69 + 12 * np.log2(RATE / lag / 440))


@pytest.mark.parametrize("kind", ["string", "subtractive"])
def test_our_instruments_are_in_tune(kind: str) -> None:
    for seed in (0, 1):
        instrument = made(kind, seed, 45, 60)
        for pitch in (45, 49, 60):
            audio = played(instrument, (0.0, 1.0, pitch, 100))
            # strings are stiff, oscillators detuned: a third of a semitone
            assert pitch_of(audio) == pytest.approx(pitch, abs=0.34)


def test_our_electric_pianos_repeat_at_the_octave() -> None:
    low, high = (played(made("fm", 0, 60, 72), (0.0, 1.0, p, 100)) for p in (60, 72))
    assert pitch_of(high) - pitch_of(low) == pytest.approx(12, abs=0.1)


def test_a_kit_has_the_drums_that_grooves_play() -> None:
    kit = sources.kit_bank(np.random.default_rng(0))
    assert {35, 36, 37, 38, 40, 42, 44, 46, 49, 51, 41, 43, 45, 47, 48, 50} <= set(kit.samples)
    assert all(np.isfinite(s).all() and 0 < np.abs(s).max() < 2 for s in kit.samples.values())
    kick, hat = (np.abs(np.fft.rfft(kit.samples[p], RATE)) for p in (36, 42))
    assert kick.argmax() < 150 < 3000 < hat.argmax()


def test_a_bank_plays_in_time_louder_with_velocity_and_lets_go() -> None:
    bank = Bank({60: np.full(RATE, 0.5, np.float32)}, release=0.1)
    audio = played(bank.render, (0.5, 0.25, 60, 127), (1.2, 0.25, 60, 64))
    assert not audio[: RATE // 2].any() and audio[RATE // 2] > 0.4
    assert (
        audio[int(0.76 * RATE)] < audio[int(0.74 * RATE)]
        and not audio[int(0.86 * RATE) : int(1.19 * RATE)].any()
    )
    loud, soft = audio[int(0.6 * RATE)], audio[int(1.3 * RATE)]
    assert 20 * np.log10(loud / soft) == pytest.approx(20 * 1.6 * np.log10(127 / 64), abs=1.2)
    late = played(bank.render, (1.99, 5.0, 60, 100), (2.5, 1.0, 60, 100))
    assert len(late) == 2 * RATE
    ringing = Bank({36: np.full(RATE, 0.5, np.float32)}, one_shot=True)
    assert played(ringing.render, (0.0, 0.01, 36, 127))[RATE - 1] > 0.4


def test_a_bank_plays_the_nearest_recording_resampled() -> None:
    tone = np.sin(2 * np.pi * 220 * np.arange(2 * RATE) / RATE).astype(np.float32)
    bank = Bank({57: tone, 90: np.zeros(RATE, np.float32)})
    assert pitch_of(played(bank.render, (0, 1, 60, 100))) == pytest.approx(60, abs=0.05)


@pytest.mark.parametrize(
    ("name", "number"), [("A4", 69), ("C4", 60), ("As3", 58), ("C#4", 61), ("Ds1v8", 27), ("A0v12", 21)]
)
def test_note_names(name: str, number: int) -> None:
    assert instruments._note_number(name) == number


def test_packed_instruments_are_read_trimmed_and_levelled(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "piano.tgz", "w:gz") as tar:
        for name, frequency in (("A3", 220.0), ("C#4", 277.18)):
            tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE)
            sf.write(tmp_path / f"{name}.ogg", np.concatenate([np.zeros(RATE // 2), tone]), RATE)
            tar.add(tmp_path / f"{name}.ogg", f"package/audio/{name}.ogg")
        (tmp_path / "README.md").write_text("no sound")
        tar.add(tmp_path / "README.md", "package/README.md")
    bank = npm_bank(tmp_path / "piano.tgz")
    assert set(bank.samples) == {57, 61}
    assert max(np.abs(s).max() for s in bank.samples.values()) == pytest.approx(1)
    assert len(bank.samples[57]) == pytest.approx(RATE, rel=0.01), "silence before the attack is cut"
    assert pitch_of(played(recorded(tmp_path / "piano.tgz"), (0, 1, 61, 100))) == pytest.approx(61, abs=0.05)


SFZ = """
// nothing<region> sample=comment.wav key=50
#define $EXT wav
<control> default_path=notes\\
<global> ampeg_release=0.3 <group> lovel=1 hivel=63
#include "soft.txt"
<group> lovel=64
<region> sample=loud one.$EXT pitch_keycenter=c4 lokey=58 hikey=62
<region> sample=late.wav key=60
<region> sample=let go.wav key=62 trigger=release
<region> sample=absent.wav key=64
<region> sample=low.wav key=12
"""


def test_sfz_instruments_play_one_layer(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name, level in (("soft", 0.1), ("loud one", 0.2), ("late", 0.3), ("let go", 0.4), ("low", 0.5)):
        sf.write(tmp_path / "notes" / f"{name}.wav", np.full(1000, level), RATE)
    (tmp_path / "soft.txt").write_text("<region> sample=soft.$EXT key=57\n<region>sample=soft.wav key=C#4")
    path = tmp_path / "piano.sfz"
    path.write_text(SFZ)
    soft, loud = (sfz_bank(path, velocity, "piano") for velocity in LAYERS)
    assert set(soft.samples) == {57, 61} and set(loud.samples) == {60}
    regions = instruments._sfz_regions(path)
    assert regions[0] == {
        "default_path": "notes\\",
        "ampeg_release": "0.3",
        "lovel": "1",
        "hivel": "63",
        "sample": "soft.wav",
        "key": "57",
    }
    assert "hivel" not in regions[2], "a group's opcodes end with it"
    assert played(sfz(path, 105, "piano"), (0, 1, 60, 127))[500] > 0.9, "levelled by the loudest"
    with pytest.raises(ValueError, match="no recording"):
        sfz_bank(path, 0, "piano")


def test_sfz_instruments_join_the_pools_where_they_are(tmp_path: Path) -> None:
    name, stem, _ = SFZ_INSTRUMENTS[0]
    path = tmp_path / "sfz" / name
    path.parent.mkdir(parents=True)
    path.touch()
    found = [source for source in training_sources(tmp_path) if source.name.startswith("sfz:")]
    assert [source.name for source in found] == [f"sfz:{path.stem}:{velocity}" for velocity in LAYERS]
    assert {source.stem for source in found} == {stem}


def drum_kit(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    parts = ""
    for i, name in enumerate(names):
        sf.write(folder / f"{i}.wav", np.full(1000, 0.1 * (i + 1)), RATE)
        where = f"<layer><filename>{i}.wav</filename></layer>" if i % 2 else f"<filename>{i}.wav</filename>"
        parts += f"<instrument><name>{name}</name>{where}</instrument>"
    text = f'<drumkit_info xmlns="http://www.hydrogen-music.org/drumkit">{parts}</drumkit_info>'
    (folder / "drumkit.xml").write_text(text)
    return folder


def test_hydrogen_kits_are_mapped_to_general_midi(tmp_path: Path) -> None:
    whole = drum_kit(tmp_path / "whole", ["Kick", "Snare 1", "Hat closed", "Hat Open", "Ride", "Missing"])
    (whole / "5.wav").unlink()
    bank = hydrogen_bank(whole)
    assert bank is not None and bank.one_shot
    loudness = {p: round(float(bank.samples[p].max()), 3) for p in (36, 38, 42, 46, 51)}
    assert loudness == {36: 0.2, 38: 0.4, 42: 0.6, 46: 0.8, 51: 1.0}
    half = drum_kit(tmp_path / "half", ["Kick", "Snare"])
    assert hydrogen_bank(half) is None
    with pytest.raises(ValueError, match="no kick, snare and hi-hat"):
        played(recorded(half), (0, 1, 36, 100))


def test_levels_are_of_the_sounding_parts() -> None:
    noise = np.random.default_rng(0).normal(0, 0.03, RATE).astype(np.float32)
    half = np.concatenate([noise, np.zeros(3 * RATE, np.float32)])
    for signal in (noise, half):
        out = render.levelled(signal, -20.0)
        assert 20 * np.log10(out[:RATE].std()) == pytest.approx(-20, abs=0.1)
    silence = np.zeros(RATE, np.float32)
    assert render.levelled(silence, -20.0) is silence


def simple_song(seconds: float = 32.0, bpm: float = 100.0) -> Song:
    rng = np.random.default_rng(0)
    beats = np.arange(0, seconds * bpm / 60)
    onsets = beats * 60 / bpm
    rows = {stem: np.stack([onsets, 0 * onsets + 0.3, 0 * onsets + 45, 0 * onsets + 90], 1) for stem in STEMS}
    rows["drums"][:, 2] = rng.choice([36, 38, 42], len(beats))
    chart = [["C"], ["F"]] * 20
    grooves = dict.fromkeys(STEMS, "Rock")
    return Song(rows, bpm, 4.0, seconds, timeline(chart, 4.0), "C major", "rock", grooves, False)


def simple_sources() -> list[Source]:
    kit = Source("kit", "drums", ("electric", "drum machine"), made("kit", 0))
    return [kit] + [
        Source("s", stem, ("acoustic", stem), made("string", 0, 45, 45)) for stem in STEMS if stem != "drums"
    ]


def test_a_rendered_song_is_written_whole_and_read_back(tmp_path: Path) -> None:
    song = simple_song()
    pool = render.pools(simple_sources())
    path = tmp_path / "000000"
    render.write(song, pool, path, renders=1, audio=True, dry=True, rng=np.random.default_rng(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.audio.npy", "000000.json", "000000.npy"]
    (loaded,) = load_songs(tmp_path)
    frames = int(song.seconds * RATE) // GEOMETRY.hop
    assert loaded.mels.shape == (4, 1, frames, GEOMETRY.n_mels) and loaded.mels.dtype == np.uint8
    assert loaded.labels["bpm"] == 100.0 and loaded.labels["chords"][1]["symbol"] == "F"
    assert loaded.labels["sources"][1] == [{"name": "kit", "words": ["electric", "drum machine"]}]
    assert loaded.labels["onsets"]["piano"][:3] == [0.0, 0.6, 1.2]
    notes = {stem: song.notes[stem][:, :3].round(3).tolist() for stem in ("bass", "guitar", "piano")}
    assert loaded.labels["notes"] == notes
    audio = np.load(tmp_path / "000000.audio.npy")
    assert audio.shape == (4, 20 * RATE) and audio.dtype == np.int16
    # the kept audio is the song from 8 s on, as its mels show it
    mel = log_mel(torch.from_numpy(audio[1] / 32767).float()[None])[0][100:200]
    stored = loaded.mels[1, 0][8 * RATE // GEOMETRY.hop :] * QUANTUM + FLOOR
    error = min(float(np.abs(stored[100 + k : 200 + k] - mel.numpy()).mean()) for k in (0, 1))
    assert error < 0.25


def test_held_out_windows_begin_on_a_bar_and_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "try_song", lambda grooves, rng: simple_song(bpm=110.0))
    first, again = (held_out.make_window(5, [], simple_sources()) for _ in range(2))
    assert first.stems.shape == (4, round(held_out.SECONDS * RATE))
    assert np.array_equal(first.stems, again.stems)
    bars = first.start / (4 * 60 / 110)
    assert bars == pytest.approx(round(bars)) and 14 < first.start < 18
    assert first.beat == pytest.approx(60 / 110)
    assert np.allclose(first.mixture, first.stems.sum(0))


def test_overlap_finds_the_same_recording_at_any_delay_and_level() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 4000), rng.normal(0, 1, 4000)
    assert overlap.correlation(a[:3000], -0.1 * a[500:3500] + 3) > 0.8
    assert overlap.correlation(a, a) == pytest.approx(1)
    assert overlap.correlation(a, b) < 0.1
    assert overlap.correlation(a, np.zeros(4000)) == 0


def test_training_starts_without_what_only_rendering_needs() -> None:
    modules = "bundle evaluate render train_classifier train_towers train_unet train_vae train_vocoder"
    code = f"""
import importlib, sys
for name in {modules.split()}:
    importlib.import_module("training." + name)
print([m for m in ("symusic", "fluidsynth", "pedalboard") if m in sys.modules])
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


needs_font = pytest.mark.skipif(not Path(HELD_OUT_FONT).exists(), reason="needs Debian's timgm6mb-soundfont")


@needs_font
def test_soundfonts_are_in_tune_and_forget_what_they_played() -> None:
    reason = "needs the extra 'train' and libfluidsynth"
    pytest.importorskip("fluidsynth", reason=reason, exc_type=ImportError)
    piano = soundfont(HELD_OUT_FONT, 0, False)
    played(piano, (0.0, 5.0, 40, 127), seconds=1.0)
    first = played(piano, (0.5, 1.0, 60, 100))
    played(soundfont(HELD_OUT_FONT, 26, False), (0.0, 5.0, 40, 127), seconds=1.001)
    second = played(piano, (0.5, 1.0, 60, 100))
    assert pitch_of(first[RATE // 2 :]) == pytest.approx(60, abs=0.1)
    assert np.abs(first[: int(0.49 * RATE)]).max() < 1e-3
    assert np.abs(first - second).max() < 0.01 * np.abs(first).max()
    with pytest.raises(ValueError, match="has no kit 99"):
        played(soundfont(HELD_OUT_FONT, 99, True), (0, 1, 36, 100))


@pytest.mark.skipif(
    shutil.which("timidity") is None or not Path(FREEPATS).exists(),
    reason="needs Debian's timidity and freepats",
)
def test_patches_are_in_tune_and_begin_when_they_are_played() -> None:
    """TiMidity++ drops the silence before the first note unless it is told not to."""
    pytest.importorskip("symusic", reason="needs the extra 'train'")
    for stem, program in (("guitar", 25), ("piano", 0), ("bass", 33)):
        assert program in FREEPATS_PROGRAMS[stem]
        heard = played(patches(FREEPATS, program, False), (0.75, 1.0, 57, 100))
        first = np.flatnonzero(np.abs(heard) > 0.05 * np.abs(heard).max())[0] / RATE
        assert len(heard) == 2 * RATE and abs(first - 0.75) < 0.02
        assert pitch_of(heard[int(0.75 * RATE) :]) == pytest.approx(57, abs=0.3)


@pytest.mark.skipif(shutil.which("mma") is None, reason="needs Debian's mma")
def test_mma_plays_a_chart() -> None:
    pytest.importorskip("symusic", reason="needs the extra 'train'")
    grooves = [Groove("R&BPlus", "rb", 4.0, False, STEMS, True)]
    song = try_song(grooves, np.random.default_rng(0), seconds=10.0)
    assert set(song.notes) == set(STEMS) and 70 <= song.bpm <= 160
    length = 60 / song.bpm * 4
    assert song.seconds % length == pytest.approx(0, abs=1e-6) or song.seconds % length == pytest.approx(
        length
    )
    for stem in STEMS:
        onsets = song.notes[stem][:, 0]
        assert len(onsets) >= 8 and (onsets >= 0).all() and onsets.max() < song.seconds + 0.1
    # drums hit the beats
    phase = (song.notes["drums"][:, 0] * song.bpm / 60 * 4 + 0.5) % 1 - 0.5
    assert np.abs(phase).mean() < 0.15


def test_effects_keep_the_length_and_the_signal_finite() -> None:
    pytest.importorskip("pedalboard", reason="needs the extra 'train'")
    noise = np.random.default_rng(0).normal(0, 0.1, RATE // 2).astype(np.float32)
    rng = np.random.default_rng(0)
    for stem in STEMS:
        out = render.effects(stem, rng)(noise[None], RATE)[0]
        assert out.shape == noise.shape and np.isfinite(out).all()
