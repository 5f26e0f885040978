"""`backline session ...` from an empty folder to a bounce, an export and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import Ran, backline, noise, refused, samples, write_song

from bridge import session_commands
from plugin_host import plugins
from plugin_host.session import SessionHost

STEMS = ("bass", "drums", "guitar", "piano")


class Session:
    """The command on one session folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, command: str, *arguments: object) -> Ran:
        return backline(self.capsys, "session", command, self.folder, *arguments)

    def ok(self, command: str, *arguments: object) -> Ran:
        ran = self(command, *arguments)
        assert ran.status == 0, ran.err
        return ran


@pytest.fixture
def session(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Session:
    return Session(capsys, tmp_path / "song")


def db(values: np.ndarray, reference: np.ndarray) -> float:
    return float(20 * np.log10(np.abs(values).max() / np.abs(reference).max()))


@pytest.mark.parametrize(
    ("rate", "channels"), [(44100, 1), (44100, 2), (48000, 1), (48000, 2), (96000, 1), (96000, 2)]
)
def test_the_story(session: Session, tiny_bundle: Path, tmp_path: Path, rate: int, channels: int) -> None:
    """Arm the piano, fill it, undo and redo, fill bass and drums, bounce, split the bounce: it nulls."""
    stems = write_song(tmp_path / "stems", STEMS[:3], seconds=2.0, rate=rate, channels=channels)
    session.ok("new", "--rate", rate, "--tempo", 100)
    session.ok("add", *(stems / f"{name}.wav" for name in STEMS[:3]))
    session.ok("add", "--track", "Klavier")
    session.ok("arm", "klavier")
    start = rate // 2 + 1
    filled = session.ok(
        "fill", "--from", f"{start}smp", "--to", "1.8", "--model", tiny_bundle, "--seed", 3, "--json"
    ).json
    (placed,) = filled["placed"]
    assert (placed["role"], placed["position"]) == ("piano", start)
    host = SessionHost.open(session.folder)
    piano = samples(host.export(["4"])["4"])
    assert piano.shape[1] == channels and not piano[:start].any() and np.abs(piano[start:]).max() > 1e-4
    assert not host.tracks()[3].armed
    assert "fill piano" in session.ok("undo").out
    assert not SessionHost.open(session.folder).state.tracks[3].regions
    assert "fill piano" in session.ok("redo").out
    assert len(SessionHost.open(session.folder).state.tracks[3].regions) == 1

    session.ok("arm", "bass", "drums")
    both = session.ok("fill", "--model", tiny_bundle, "--seed", 4, "--json").json
    assert [part["role"] for part in both["placed"]] == ["bass", "drums"]
    regions = SessionHost.open(session.folder).state.tracks[0].regions
    assert [len(region.takes) for region in regions] == [2], "a take beside what was recorded"

    mix = tmp_path / "mix.wav"
    session.ok("bounce", "--out", mix)
    assert soundfile.info(mix).samplerate == rate and soundfile.info(mix).channels == channels
    before = samples(mix)
    for name in ("bass", "drums", "guitar", "Klavier"):
        session.ok("mute", name)
    session.ok("split", mix, "--model", tiny_bundle)
    session.ok("bounce", "--out", tmp_path / "again.wav")
    assert len(SessionHost.open(session.folder).tracks()) == 9
    assert db(samples(tmp_path / "again.wav") - before, before) < -90


def test_show_says_it_all(session: Session, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", ("bass", "vocals"), seconds=1.0)
    session.ok("new", "--rate", 22050, "--tempo", 96.5, "--metre", "3/4", "--first-bar", "0.25")
    session.ok("add", stems / "bass.wav", "--at", "0.5")
    session.ok("add", stems / "vocals.wav", "--track", "Lead")
    session.ok("arm", "bass")
    session.ok("mute", "Lead")
    session.ok("gain", "bass", -6.5)
    session.ok("pan", "bass", -0.5)
    session.ok("plugins", "bass", "--add", "Compressor")
    shown = session.ok("show").out
    for words in (
        "22050 Hz",
        "96.5 bpm",
        "3/4",
        "1.50 s",
        "bass",
        "Lead",
        "other",
        "armed",
        "muted",
        "-6.5",
        "L50",
        "Compressor",
        "━",
        "·",
        "can be undone",
    ):
        assert words in shown, words
    told = session.ok("show", "--json").json
    assert told["session"]["tempo_map"][0]["position"] == round(0.25 * 22050)
    assert told["session"]["tracks"][0]["regions"][0]["position"] == round(0.5 * 22050)


def test_the_mixer_and_the_rest_of_the_editing(session: Session, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", ("bass", "drums"), seconds=1.0, rate=44100)
    session.ok("new")
    session.ok("add", stems / "bass.wav", stems / "drums.wav")
    session.ok("solo", "drums")
    session.ok("gain", "drums", -6)
    session.ok("bounce", "--out", tmp_path / "solo.wav")
    np.testing.assert_allclose(
        samples(tmp_path / "solo.wav"), samples(stems / "drums.wav") * 10 ** (-6 / 20), rtol=1e-5
    )
    refused(session("bounce", "--out", tmp_path / "solo.wav"), 1, "exists", "--force")
    session.ok("solo", "drums", "--off")
    session.ok("rename", "drums", "Kit")
    session.ok("role", "Kit", "other")
    session.ok("move", "Kit", "--at", "100smp")
    session.ok("tempo", 90, "--metre", "6/8")
    session.ok("tempo", 120, "--at", "1.0")
    session.ok("add", stems / "bass.wav", "--track", "Kit")  # another range: another region
    listed = session.ok("takes", "Kit").out
    assert "drums-00002.wav" in listed and "Kit" in listed
    session.ok("remove", "Kit", "--region", 2)
    state = SessionHost.open(session.folder).state
    assert [(track.name, track.role) for track in state.tracks] == [("bass", "bass"), ("Kit", "other")]
    assert [region.position for region in state.tracks[1].regions] == [100]
    assert [(p.bpm, p.numerator, p.denominator) for p in state.tempo_map] == [(90, 6, 8), (120, 6, 8)]
    session.ok("remove", "bass")
    session.ok("undo", "--steps", 2)
    assert len(SessionHost.open(session.folder).state.tracks[1].regions) == 2


def test_markers_name_the_chords_of_a_fill(session: Session, tiny_bundle: Path, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", STEMS[:3], seconds=2.0)
    session.ok("new", "--tempo", 120)
    session.ok("add", *(stems / f"{name}.wav" for name in STEMS[:3]))
    session.ok("add", "--track", "piano")
    session.ok("marker", "Verse")
    refused(session("fill", "--chords", "markers", "--model", tiny_bundle), 2, "armed")
    session.ok("arm", "piano")
    refused(session("fill", "--chords", "markers", "--model", tiny_bundle), 2, "No marker")
    session.ok("marker", "Am", "--at", "0.5")
    session.ok("marker", "F", "--at", "66150smp")
    session.ok("marker", "G", "--at", "66150smp")  # takes its place
    shown = session.ok("marker").out
    assert "0.500 s" in shown and "G" in shown and "F" not in shown
    by_marker = session.ok("fill", "--chords", "markers", "--model", tiny_bundle, "--seed", 1, "--json").json[
        "placed"
    ]
    session.ok("undo")
    chart = "N.C. Am Am G | N.C."
    assert (
        by_marker
        == session.ok("fill", "--chords", chart, "--model", tiny_bundle, "--seed", 1, "--json").json["placed"]
    )
    takes = sorted((session.folder / "audio").glob("piano*.wav"))
    assert len(takes) == 2
    assert np.array_equal(samples(takes[0]), samples(takes[1]))
    session.ok("marker", "--at", "0.5", "--remove")
    refused(session("marker", "--at", "0.5", "--remove"), 2, "no marker")
    refused(session("marker", " "), 2, "characters")


def test_takes_are_chosen(session: Session, tiny_bundle: Path, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", ("bass",), seconds=1.5, rate=44100)
    session.ok("new")
    session.ok("add", stems / "bass.wav")
    session.ok("add", "--track", "piano")
    sounds = []
    for seed in (1, 2):
        session.ok("arm", "piano")
        session.ok("fill", "--model", tiny_bundle, "--seed", seed)
        host = SessionHost.open(session.folder)
        sounds.append(samples(host.export(["2"])["2"]))
    assert not np.array_equal(*sounds)
    assert "chosen" in session.ok("takes", "piano", "--choose", 1).out
    host = SessionHost.open(session.folder)
    assert np.array_equal(samples(host.export(["2"])["2"]), sounds[0])
    refused(session("takes", "piano", "--choose", 3), 2, "take 3")


def test_effects_change_the_bounce_and_are_shown(session: Session, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", ("guitar",), seconds=1.0, rate=44100)
    session.ok("new")
    session.ok("add", stems / "guitar.wav")
    assert "Reverb" in backline(session.capsys, "session", "effects").out
    session.ok("plugins", "guitar", "--add", "Gain", "--add", "invert", "--set", "1.gain_db=3")
    shown = session.ok("plugins", "guitar", "--set", "1.gain_db=-12").out
    assert "gain_db" in shown and "-12" in shown and "2. Invert" in shown
    session.ok("bounce", "--out", tmp_path / "a.wav")
    dry = samples(stems / "guitar.wav")
    np.testing.assert_allclose(samples(tmp_path / "a.wav"), -dry * 10 ** (-12 / 20), rtol=1e-5)
    session.ok("plugins", "guitar", "--bypass", 2, "--remove", 1)
    session.ok("bounce", "--out", tmp_path / "b.wav")
    assert np.array_equal(samples(tmp_path / "b.wav"), dry)
    refused(session("plugins", "guitar", "--set", "1.gain=3"), 1, "none of its parameters")
    refused(session("plugins", "guitar", "--remove", 2), 2, "no effect 2")
    refused(
        session("plugins", "guitar", "--add", "Gain", "--set", "2.gain_db=x"), 1, "takes a number, not 'x'"
    )
    refused(session("plugins", "guitar", "--set", "gain=3"), 2, "which effect")
    refused(session("plugins", "guitar", "--preset", "1=x.vstpreset"), 2, "takes no presets")


def test_a_tail_lets_effects_ring_and_a_picture_is_drawn(session: Session, tmp_path: Path) -> None:
    stems = write_song(tmp_path / "stems", ("drums",), seconds=1.0, rate=44100)
    session.ok("new")
    session.ok("add", stems / "drums.wav")
    session.ok("plugins", "drums", "--add", "Reverb")
    ran = session.ok("bounce", "--out", tmp_path / "a.wav", "--tail", 1, "--picture", "--json").json
    sound = samples(tmp_path / "a.wav")
    assert len(sound) == 2 * 44100 and sound[44100:].any()
    assert Path(ran["files"]["picture"]).read_bytes().startswith(b"\x89PNG")


def test_a_plugin_that_breaks_is_named_and_the_bounce_done(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems = write_song(tmp_path / "stems", ("guitar",), seconds=1.0, rate=44100)
    session.ok("new")
    session.ok("add", stems / "guitar.wav")
    (tmp_path / "Broken.vst3").mkdir()
    (tmp_path / "broken.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(plugins, "PROCESS", tmp_path / "broken.py")
    state = plugins.PluginState(name="Broken", path=str(tmp_path / "Broken.vst3"))
    SessionHost.open(session.folder).set_plugins("1", [state], "plugins")
    ran = session.ok("bounce", "--out", tmp_path / "a.wav", "--plugin-seconds", 0.5, "--json")
    (warning,) = ran.json["warnings"]
    assert (
        warning == ("The plugin Broken took longer than 0.5 s. It was left out on the track 'guitar'.")
        and warning in ran.err
    )
    assert np.array_equal(samples(tmp_path / "a.wav"), samples(stems / "guitar.wav"))


@pytest.mark.parametrize("suffix", [".dawproject", ".rpp"])
def test_export_and_new_from_it(session: Session, tmp_path: Path, suffix: str) -> None:
    stems = write_song(tmp_path / "stems", ("bass", "drums"), seconds=1.0, rate=48000)
    session.ok("new", "--rate", 48000, "--tempo", 87)
    session.ok("add", stems / "bass.wav", stems / "drums.wav", "--at", "0.1")
    out = tmp_path / f"out{suffix}"
    session.ok("export", "--out", out)
    refused(session("export", "--out", out), 1, "exists")
    again = Session(session.capsys, tmp_path / "again")
    again.ok("new", "--from", out)
    for one in (session, again):
        one.ok("bounce", "--out", tmp_path / f"{one.folder.name}.wav")
    assert np.array_equal(samples(tmp_path / "song.wav"), samples(tmp_path / "again.wav"))
    assert again.ok("show", "--json").json["session"]["tempo_map"][0]["bpm"] == 87
    refused(again("undo"), 1, "nothing to undo")
    again.ok("mute", "bass")
    assert "muted" in again.ok("undo").out


def test_files_of_any_rate_and_length_come_in(session: Session, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "hit.wav", noise(0.2, rate=22050)[:, 0], 22050)
    session.ok("new", "--rate", 48000)
    ran = session.ok("add", tmp_path / "hit.wav", tmp_path / "hit.wav", "--track", "Kick")
    assert "resampled from 22050 to 48000" in ran.err
    (track,) = SessionHost.open(session.folder).state.tracks
    assert (track.role, len(track.regions), len(track.regions[0].takes)) == ("drums", 1, 2)
    assert track.regions[0].length == 9600


def test_every_command_is_in_the_documentation() -> None:
    listed = (Path(__file__).parents[1] / "docs" / "cli.md").read_text("utf-8").split("## session")[1]
    for command in session_commands.app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"`{name}" in listed or f"`{name} DIR" in listed, name


def test_mistakes(session: Session, tmp_path: Path, tiny_bundle: Path) -> None:
    refused(session("show"), 1, "holds no session")
    refused(session("new", "--metre", "4-4"), 2, "no metre")
    refused(session("new", "--from", tmp_path / "x.als"), 2, "neither")
    session.ok("new")
    refused(session("new"), 1, "holds a session already")
    refused(session("add"), 2, "Say what to add")
    refused(session("add", tmp_path / "nothing.wav"), 1, "does not exist")
    refused(session("arm", "piano"), 2, "no track 'piano'", "none yet")
    session.ok("add", "--track", "Audio 7")
    ran = session.ok("arm", "Audio 7")
    assert "not known" in ran.err
    refused(session("fill", "--model", tiny_bundle), 1, "empty")
    write_song(tmp_path / "stems", ("bass",), seconds=1.5)
    session.ok("add", tmp_path / "stems" / "bass.wav")
    refused(session("fill", "--model", tiny_bundle), 2, "'Audio 7'", "bass, drums, guitar or piano")
    refused(session("fill", "--from", "x", "--model", tiny_bundle), 2, "no time")
    refused(session("fill", "--from", "1", "--to", "0.5", "--model", tiny_bundle), 2, "Nothing lies between")
    refused(session("fill", "--to", "0.5", "--model", tiny_bundle), 2, "'Audio 7'")
    session.ok("arm", "Audio 7", "--off")
    session.ok("add", "--track", "piano")
    session.ok("arm", "piano")
    refused(session("fill", "--to", "0.5", "--model", tiny_bundle), 1, "only 0.50 s long")
    refused(session("split", "bass", "--to", "0.5", "--model", tiny_bundle), 1, "only 0.50 s long")
    refused(session("fill", "--from=-1", "--model", tiny_bundle), 2, "before the session")
    refused(session("split", "nothing.wav", "--model", tiny_bundle), 2, "no track 'nothing.wav'")
    refused(session("split", "bass", "--region", 2, "--model", tiny_bundle), 2, "no region 2")
    refused(session("pan", "bass", 3), 2, "out of range")
    refused(session("undo", "--steps", 99), 2, "Only 6 steps")
    refused(session("redo"), 1, "nothing to redo")
    refused(session("bounce", "--out", tmp_path / "no" / "mix.wav"), 1, "not a folder")
    refused(session("plugins", "bass", "--add", "Nothing"), 2, "no effect 'Nothing'")
    (session.folder / "session.json").write_text("{")
    refused(session("show"), 1, "cannot be read as JSON")
    failed = session("show", "--json")
    assert failed.status == 1 and json.loads(failed.out)["status"] == "error"
