"""The built-in track host: what is placed comes back to the sample, and every save is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import noise, samples

from engine.audio import Audio, write
from engine.errors import BacklineError, UsageError
from plugin_host.host import Span, Track, TrackHost, audible, bounce
from plugin_host.session import SessionHost

RATE = 44100


@pytest.fixture
def session(tmp_path: Path) -> SessionHost:
    return SessionHost.create(tmp_path / "song", sample_rate=RATE, tempo=96.5)


def wav(folder: Path, name: str, *, seconds: float = 1.5, channels: int = 1, rate: int = RATE) -> Path:
    path = folder / f"{name}.wav"
    write(path, Audio(noise(seconds, rate=rate, channels=channels, seed=len(name)).T, rate))
    return path


def test_it_is_a_track_host(session: SessionHost) -> None:
    host: TrackHost = session
    assert (host.sample_rate, host.tempo, host.length, host.tracks()) == (RATE, 96.5, 0, [])


def test_tracks_survive_reopening(session: SessionHost, tmp_path: Path) -> None:
    bass = session.create_track("Low end", role="bass")
    keys = session.create_track("Keys")  # a role is guessed where none is given
    session.arm(keys.id)
    session.place(bass.id, wav(tmp_path, "bass"), 1000)
    again = SessionHost.open(tmp_path / "song")
    assert again.state == session.state
    assert again.tracks() == [Track("1", "Low end", "bass"), Track("2", "Keys", "piano", armed=True)]
    again.arm(keys.id, False)
    assert not SessionHost.open(tmp_path / "song").tracks()[1].armed


def test_what_is_placed_is_exported_to_the_sample(session: SessionHost, tmp_path: Path) -> None:
    track = session.create_track("guitar")
    source = wav(tmp_path, "guitar", channels=2)
    session.place(track.id, source, 777)
    source.unlink()  # the session keeps its own copy
    whole = samples(session.export([track.id])[track.id])
    assert whole.shape == (777 + round(1.5 * RATE), 2) and not whole[:777].any()
    expected = noise(1.5, rate=RATE, channels=2, seed=len("guitar"))
    assert np.array_equal(whole[777:], expected)
    part = samples(session.export([track.id], Span(1000, 1000 + RATE))[track.id])
    assert np.array_equal(part, expected[223 : 223 + RATE])
    beyond = samples(session.export([track.id], Span(RATE, 3 * RATE))[track.id])
    assert beyond.shape == (2 * RATE, 2) and not beyond[777 + round(0.5 * RATE) :].any()


def test_a_later_region_lies_on_top_and_the_first_stays(session: SessionHost, tmp_path: Path) -> None:
    track = session.create_track("piano")
    session.place(track.id, wav(tmp_path, "one", seconds=2), 0)
    session.place(track.id, wav(tmp_path, "later", seconds=1), RATE // 2)
    sound = samples(session.export([track.id])[track.id])
    one, later = noise(2, rate=RATE, seed=len("one")), noise(1, rate=RATE, seed=len("later"))
    assert np.array_equal(sound[: RATE // 2], one[: RATE // 2])
    assert np.array_equal(sound[RATE // 2 : RATE // 2 + RATE], later)
    assert np.array_equal(sound[RATE // 2 + RATE :], one[RATE // 2 + RATE :])
    assert len(list((tmp_path / "song" / "audio").iterdir())) == 2


def test_bounce_is_the_sum_of_what_is_audible(session: SessionHost, tmp_path: Path) -> None:
    for name, channels in (("bass", 1), ("drums", 2), ("guitar", 1)):
        session.place(session.create_track(name).id, wav(tmp_path, name, channels=channels), 0)
    parts = {name: samples(tmp_path / f"{name}.wav") for name in ("bass", "drums", "guitar")}
    mix = bounce(session).samples.T
    np.testing.assert_allclose(mix, parts["bass"] + parts["drums"] + parts["guitar"], atol=1e-7)


def test_mute_and_solo() -> None:
    tracks = [Track("1", "a"), Track("2", "b", muted=True), Track("3", "c", soloed=True)]
    assert [track.id for track in audible(tracks[:2])] == ["1"]
    assert [track.id for track in audible(tracks)] == ["3"]
    assert audible([Track("1", "a", muted=True, soloed=True)]) == []


def test_mistakes_are_sentences(session: SessionHost, tmp_path: Path) -> None:
    track = session.create_track("bass")
    with pytest.raises(UsageError, match="no track 9"):
        session.arm("9")
    with pytest.raises(UsageError, match="before the session"):
        session.place(track.id, wav(tmp_path, "bass"), -1)
    with pytest.raises(BacklineError, match="48000 Hz, the session 44100 Hz"):
        session.place(track.id, wav(tmp_path, "fast", rate=48000), 0)
    with pytest.raises(BacklineError, match="holds a session"):
        SessionHost.create(tmp_path / "song", sample_rate=RATE, tempo=120)
    with pytest.raises(BacklineError, match="holds no session"):
        SessionHost.open(tmp_path)
    with pytest.raises(BacklineError, match="no audible track"):
        bounce(SessionHost.create(tmp_path / "new", sample_rate=RATE, tempo=120))
    with pytest.raises(ValueError, match="forward"):
        Span(5, 5)
    assert session.tracks() == [track] and session.length == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ('{"version": 7}', "newer"),
        ('{"version": 1, "sample_rate": 44100, "tempo": -1}', "tempo"),
        ('{"version": 2, "session": {"sample_rate": 44100, "tempo_map": []}}', "tempo_map"),
        ("[]", "not a valid session"),
    ],
)
def test_a_session_file_that_cannot_be_read(session: SessionHost, text: str, words: str) -> None:
    (session.folder / "session.json").write_text(text)
    with pytest.raises(BacklineError, match=words):
        SessionHost.open(session.folder)


def test_a_save_that_fails_leaves_the_last_one(session: SessionHost, monkeypatch: pytest.MonkeyPatch) -> None:
    session.create_track("bass")
    before = (session.folder / "session.json").read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plugin_host.session_file.os.fsync", fails)
    with pytest.raises(BacklineError, match="No space left"):
        session.create_track("drums")
    assert (session.folder / "session.json").read_bytes() == before
    assert [track.name for track in session.tracks()] == ["bass"]
    assert not [path for path in session.folder.rglob("*") if path.name.endswith(".part")]
    assert json.loads(before)["version"] == 3


def test_exports_are_plain_wavs(session: SessionHost, tmp_path: Path) -> None:
    track = session.create_track("drums")
    session.place(track.id, wav(tmp_path, "drums"), 0)
    info = soundfile.info(session.export([track.id])[track.id])
    assert (info.samplerate, info.subtype, info.format) == (RATE, "FLOAT", "WAV")
