"""Sessions as DAWproject and RPP: valid for others, and the same session when read again."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rpp
import soundfile
from command import noise, samples
from dawproject_rules import broken_rules, schema
from lxml import etree

from bench.session_rounds import random_step
from engine.audio import Audio, write
from engine.errors import BacklineError, UsageError
from plugin_host.exchange import segments
from plugin_host.exchange_formats import export_session
from plugin_host.exchange_import import import_session
from plugin_host.exchange_rpp import parse_rpp
from plugin_host.host import Placement, Span, bounce
from plugin_host.session import SessionHost
from plugin_host.session_file import MarkerPoint, PluginState, TempoPoint

ZAM = Path("/usr/lib/vst3/ZamEQ2.vst3")
NAMES = ("Bass & <Sub>", 'Drums "live"', "it's `piano`", "ギター", "plain")


def wav(folder: Path, name: str, seconds: float, rate: int, channels: int = 1, seed: int = 0) -> Path:
    path = folder / f"{name}.wav"
    write(path, Audio(noise(seconds, rate=rate, channels=channels, seed=seed).T, rate))
    return path


def song(folder: Path, rate: int = 44100) -> SessionHost:
    """All a session can hold: odd names and positions, overlaps, takes, mixer, tempo changes, effects."""
    folder.mkdir(exist_ok=True)
    host = SessionHost.create(folder / "song", sample_rate=rate, tempo=97.3, numerator=3)
    ids = [host.create_track(name).id for name in NAMES]
    host.place(ids[0], wav(folder, "a", 1.7, rate, seed=1), 12345)
    host.place(ids[0], wav(folder, "b", 0.3, rate, channels=2, seed=2), 30001)  # inside the first
    for seed in (3, 4, 5):
        take = wav(folder, f"t{seed}", 1.1, rate, channels=2, seed=seed)
        host.place_all("fill", [Placement(take, 777, f"take {seed}", ids[1])])
    host.choose_take(ids[1], 0, 1)
    host.place(ids[2], wav(folder, "c", 0.01, rate, seed=6), 0)
    host.set_track(ids[0], gain_db=-4.5, pan=-0.3)
    host.set_track(ids[1], muted=True, armed=True)
    host.set_track(ids[2], soloed=True, role="piano")
    host.set_track(ids[3], role="other")
    filters = [
        PluginState(name="LadderFilter", parameters={"mode": "HPF24", "cutoff_hz": 300.0}),
        PluginState(name="Compressor", parameters={"threshold_db": -20.0, "ratio": 3.0, "attack_ms": 2.5}),
        PluginState(name="Reverb", parameters={"room_size": 0.7}, enabled=False),
    ]
    host.set_plugins(ids[2], filters, "plugins")
    host.set_tempo(
        [
            TempoPoint(position=0, bpm=97.3, numerator=3),
            TempoPoint(position=20001, bpm=120, numerator=6, denominator=8),
        ]
    )
    chords = [(0, "Am"), (4410, 'a "part" & <more>'), (88201, "F#m7/C#")]
    host.set_markers([MarkerPoint(position=position, name=name) for position, name in chords])
    return host


def heard(host: SessionHost) -> dict[str, np.ndarray]:
    """Each track as it sounds, over the same span."""
    span = Span(0, 2 * host.sample_rate)
    paths = host.export([track.id for track in host.tracks()], span)
    return {t.name: soundfile.read(paths[t.id], dtype="float32", always_2d=True)[0] for t in host.tracks()}


def validated(path: Path) -> etree._Element:
    """project.xml, which must be as DAWproject asks, and whose files must be there."""
    with zipfile.ZipFile(path) as archive:
        project = etree.fromstring(archive.read("project.xml"))
        metadata = etree.fromstring(archive.read("metadata.xml"))
        names = archive.namelist()
        assert archive.testzip() is None
    assert broken_rules(project) == []
    assert [metadata.tag, *(node.tag for node in metadata)] == ["MetaData", "Title"]
    for name, root in (("Project.xsd", project), ("MetaData.xsd", metadata)):
        if (published := schema(name)) is not None:
            published.assertValid(root)
    assert {node.get("path") for node in project.iter("File", "State")} <= set(names)
    return project


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
@pytest.mark.parametrize("suffix", [".dawproject", ".rpp"])
def test_a_session_comes_back_as_it_was(suffix: str, rate: int, tmp_path: Path) -> None:
    host = song(tmp_path, rate)
    said: list[str] = []
    path = tmp_path / "out" / f"my song{suffix}"
    path.parent.mkdir()
    export_session(host, path, said.append)
    again = import_session(path, tmp_path / "again")
    assert again.sample_rate == rate
    assert again.state.tempo_map == host.state.tempo_map
    assert again.markers() == host.markers()
    for old, new in zip(host.state.tracks, again.state.tracks, strict=True):
        assert (new.name, new.muted, new.soloed) == (old.name, old.muted, old.soloed)
        assert new.gain_db == pytest.approx(old.gain_db, abs=1e-9)
        assert new.pan == pytest.approx(old.pan, abs=1e-9)
        assert [(s.position, s.length) for s in segments(new)] == [
            (s.position, s.length) for s in segments(old)
        ]
        if suffix == ".dawproject":
            assert new.role == old.role
            assert new.plugins == old.plugins
        else:
            assert new.armed == old.armed
            assert [len(region.takes) for region in new.regions][:1] == [len(r.takes) for r in old.regions][
                :1
            ]
    if suffix == ".rpp":
        host.set_plugins("3", [], "without")
        assert any("plugins" in sentence and "piano" in sentence for sentence in said)
        assert [take.name for take in again.state.tracks[1].regions[0].takes] == [
            "take 3",
            "take 4",
            "take 5",
        ]
        assert again.state.tracks[1].regions[0].chosen == 1
    else:
        assert any("no takes" in sentence for sentence in said)
    before, after = heard(host), heard(again)
    for name in NAMES:
        np.testing.assert_allclose(after[name], before[name][:, : after[name].shape[1]], atol=1e-6)
    assert np.abs(bounce(again, Span(0, rate)).samples - bounce(host, Span(0, rate)).samples).max() < 1e-6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_session_is_exported_and_read_again(seed: int, tmp_path: Path) -> None:
    """What 40 random edits leave."""
    rng = random.Random(seed)
    host = SessionHost.create(tmp_path / "song", sample_rate=44100, tempo=120)
    host.create_track("first")
    for _ in range(40):
        random_step(host, rng, tmp_path)
    span = Span(0, 12000)
    wanted = [samples(path) for path in host.export([t.id for t in host.tracks()], span).values()]
    for suffix in (".dawproject", ".rpp"):
        path = tmp_path / f"out{suffix}"
        export_session(host, path, lambda sentence: None)
        again = import_session(path, tmp_path / suffix[1:])
        found = [samples(path) for path in again.export([t.id for t in again.tracks()], span).values()]
        for before, after in zip(wanted, found, strict=True):
            np.testing.assert_allclose(after, before, atol=1e-6)
    validated(tmp_path / "out.dawproject")
    with (tmp_path / "out.rpp").open(encoding="utf-8") as file:
        assert len(rpp.load(file).findall("TRACK")) == len(host.tracks())


def test_a_dawproject_is_as_the_format_asks(tmp_path: Path) -> None:
    host = song(tmp_path)
    path = tmp_path / "song.dawproject"
    export_session(host, path, lambda sentence: None)
    project = validated(path)
    assert [track.get("name") for track in project.iter("Track")] == [*NAMES, "Master"]
    clips = [(float(c.get("time")) * 44100, float(c.get("duration")) * 44100) for c in project.iter("Clip")]
    assert clips[0] == (pytest.approx(12345), pytest.approx(30001 - 12345)), "overlaps are cut for other DAWs"
    assert len(clips) == 3 + 1 + 1
    empty = SessionHost.create(tmp_path / "empty", sample_rate=48000, tempo=120, first_bar=99)
    export_session(empty, tmp_path / "empty.dawproject", lambda sentence: None)
    validated(tmp_path / "empty.dawproject")
    assert import_session(tmp_path / "empty.dawproject", tmp_path / "empty2").state.tempo_map[0].position > 0


def test_the_rules_refuse_what_is_wrong(tmp_path: Path) -> None:
    """Each of these breaks a valid project, by our rules and, where it is here, by the published schema.

    But for the last: lxml does not look whether what an IDREF names is there.
    """
    host = song(tmp_path)
    export_session(host, tmp_path / "song.dawproject", lambda sentence: None)
    good = etree.tostring(validated(tmp_path / "song.dawproject")).decode()
    breaks = [
        ("<Application", "<Program"),
        ('version="1.0"', ""),
        ('unit="bpm"', 'unit="beats per minute"'),
        ('unit="bpm"', ""),
        ("<Mute", "<Silence"),
        ('role="regular"', 'role="audio"'),
        ('time="', 'start="'),
        ("<Structure>", '<Structure at="0">'),
        ('sampleRate="44100"', 'sampleRate="44.1k"'),
        (' destination="', ' destination="x'),
    ]
    published = schema("Project.xsd")
    for old, new in breaks:
        assert old in good
        wrong = good.replace(old, new)
        wrong = wrong.replace("</Application", "</Program") if new == "<Program" else wrong
        root = etree.fromstring(wrong)
        assert broken_rules(root), (old, new)
        assert published is None or "destination" in old or not published.validate(root), (old, new)


@pytest.mark.skipif(
    schema("Project.xsd") is None, reason="DAWproject's published schemas are not on this machine"
)
def test_dawprojects_are_valid_by_the_published_schemas(tmp_path: Path) -> None:
    host = song(tmp_path)
    export_session(host, tmp_path / "song.dawproject", lambda sentence: None)
    with zipfile.ZipFile(tmp_path / "song.dawproject") as archive:
        for name in ("Project", "MetaData"):
            published = schema(f"{name}.xsd")
            assert published is not None
            published.assertValid(etree.fromstring(archive.read(f"{name.lower()}.xml")))


def test_an_rpp_opens_with_a_library_nobody_here_wrote(tmp_path: Path) -> None:
    host = song(tmp_path)
    path = tmp_path / "song.rpp"
    export_session(host, path, lambda sentence: None)
    with path.open(encoding="utf-8") as file:
        root = rpp.load(file)
    assert root.tag == "REAPER_PROJECT"
    tracks = root.findall("TRACK")
    assert [track.find("NAME")[1] for track in tracks] == list(NAMES)
    assert float(tracks[0].find("VOLPAN")[1]) == pytest.approx(10 ** (-4.5 / 20))
    items = tracks[0].findall("ITEM")
    assert [round(float(item.find("POSITION")[1]) * 44100) for item in items] == [12345, 30001, 30001 + 13230]
    assert round(float(items[2].find("SOFFS")[1]) * 44100) == 30001 + 13230 - 12345
    files = [source.find("FILE")[1] for item in items for source in item.findall("SOURCE")]
    assert all((tmp_path / file).is_file() for file in files)
    # And what it writes opens with our reader; of backquotes it makes others.
    assert parse_rpp(rpp.dumps(root)) is not None
    (tmp_path / "written.rpp").write_text(rpp.dumps(root), "utf-8")
    again = import_session(tmp_path / "written.rpp", tmp_path / "again")
    assert [track.name for track in again.tracks()] == [name.replace("`", "'") for name in NAMES]


@pytest.mark.skipif(not ZAM.exists(), reason="Debian's zam-plugins are not installed")
def test_a_vst3_travels_with_its_state(tmp_path: Path) -> None:
    host = song(tmp_path)
    plugin = PluginState(name="ZamEQ2", path=str(ZAM), parameters={"boost_cut_1_db": 12.0})
    host.set_plugins("1", [plugin], "plugins")
    path = tmp_path / "song.dawproject"
    export_session(host, path, lambda sentence: None)
    (node,) = validated(path).iter("Vst3Plugin")
    assert node.get("deviceName") == "ZamEQ2" and len(node.get("deviceID")) == 36
    again = import_session(path, tmp_path / "again")
    assert again.state.tracks[0].plugins[0].path == str(ZAM)
    np.testing.assert_allclose(heard(again)[NAMES[0]], heard(host)[NAMES[0]], atol=1e-4)


FOREIGN = """<?xml version="1.0"?><Project version="1.0"><Application name="x" version="1"/>
<Transport><Tempo id="t" unit="bpm" value="60"/></Transport>
<Structure><Track id="a" name="Group" contentType="tracks">
<Track id="b" name="Loop"><Channel id="c"/></Track></Track></Structure>
<Arrangement id="d"><Lanes id="e" timeUnit="beats"><Lanes id="f" track="b"><Clips id="g">
<Clip time="2" duration="2" playStart="0"><Clips id="h"><Clip time="0" duration="1" contentTimeUnit="beats">
<Warps id="i" contentTimeUnit="seconds" timeUnit="beats">
<Audio id="j" channels="1" sampleRate="44100" duration="1"><File path="x.wav"/></Audio>
<Warp time="0" contentTime="0"/><Warp time="1" contentTime="1"/></Warps>
</Clip></Clips></Clip></Clips></Lanes></Lanes></Arrangement></Project>"""


def test_a_dawproject_in_beats_with_nested_clips_as_bitwig_writes_them(tmp_path: Path) -> None:
    if (published := schema("Project.xsd")) is not None:
        published.assertValid(etree.fromstring(FOREIGN.encode()))
    sound = wav(tmp_path, "x", 1.0, 44100)
    with zipfile.ZipFile(tmp_path / "foreign.dawproject", "w") as archive:
        archive.writestr("project.xml", FOREIGN)
        archive.write(sound, "x.wav")
    host = import_session(tmp_path / "foreign.dawproject", tmp_path / "again")
    assert [track.name for track in host.tracks()] == ["Group", "Loop"]
    (region,) = host.state.tracks[1].regions
    assert (region.position, region.length) == (2 * 44100, 44100)


def test_what_cannot_be_read_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.dawproject").write_text("no zip")
    (tmp_path / "a.rpp").write_text("hello")
    (tmp_path / "b.rpp").write_text("<REAPER_PROJECT 0.1\n  TEMPO fast\n>\n")
    (tmp_path / "c.rpp").write_text(
        "<REAPER_PROJECT 0.1\n<TRACK\n<ITEM\nPOSITION 0\nLENGTH 1\n<SOURCE WAVE\nFILE gone.wav\n>\n>\n>\n>\n"
    )
    with zipfile.ZipFile(tmp_path / "b.dawproject", "w") as archive:
        archive.writestr("project.xml", FOREIGN)
    cases = {
        "a.dawproject": "not a DAWproject",
        "a.rpp": "not a REAPER project",
        "b.rpp": "not understood",
        "c.rpp": "gone.wav, which .* names, is missing",
        "b.dawproject": r"does not hold x\.wav",
        "nothing.rpp": "does not exist",
        "song.als": "neither",
    }
    for name, words in cases.items():
        with pytest.raises(BacklineError, match=words):
            import_session(tmp_path / name, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    host = SessionHost.create(tmp_path / "song", sample_rate=44100, tempo=120)
    with pytest.raises(UsageError, match=r"ends in neither \.dawproject nor \.rpp"):
        export_session(host, tmp_path / "song.als", lambda sentence: None)
    with pytest.raises(BacklineError, match="could not be written"):
        export_session(host, tmp_path / "no" / "such" / "song.dawproject", lambda sentence: None)
