"""A real Ardour, from arming a track to the region on it. Skipped where Ardour is not installed."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ardour_session
import numpy as np
import pytest
from command import backline, noise, refused
from daemon_process import Talk, daemon
from numpy.typing import NDArray
from pythonosc.osc_message import OscMessage

from bridge.ardour_follow import Following, follow
from bridge.ardour_jobs import fill
from bridge.charts import chart_of_markers
from bridge.filling import Engine, Placed, local_engine
from bridge.models import find_bundle
from engine.audio import Audio, fit, read, resample, write
from engine.errors import BacklineError
from engine.model import Model
from engine.take import Callback
from plugin_host.ardour import ArdourHost
from plugin_host.ardour_link import ArdourGone, SessionChanged, ask, message
from plugin_host.ardour_setup import BRIDGE, FILL, install, uninstall
from plugin_host.host import Span, TrackHost, bounce

REQUIRED = bool(os.environ.get("BACKLINE_REQUIRE_DAW"))
MISSING = ardour_session.missing()
pytestmark = [
    pytest.mark.daw,
    pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or ""),
]

RATE = 48000
SECONDS = 6.0
START = 12345  # samples
PLAYING = Span(START, START + round(SECONDS * RATE))
ADD_PLUGIN = (
    "local id, uri = ... local plugin = ARDOUR.LuaAPI.new_plugin(Session, uri, ARDOUR.PluginType.LV2, '') "
    "return not plugin:isnil() and track_of(id):add_processor_by_index(plugin, 0, nil, true) == 0"
)
FADES = 64  # samples that Ardour fades at both ends of a region
SONG = Path(__file__).parents[1] / "bridge" / "demo_song"


@dataclass(frozen=True)
class Studio:
    """A home with a configuration that has Backline's actions, and a display."""

    home: Path
    config: Path
    screen: str


@dataclass(frozen=True)
class User:
    """Who sits before Ardour: an OSC client that knows nothing of Backline."""

    channel: socket.socket

    def send(self, address: str, *arguments: Any) -> None:
        self.channel.send(message(address, *arguments))

    def strips(self) -> dict[str, int]:
        """Number by name, as Ardour's surfaces count them."""
        for _ in range(20):  # Ardour drops what comes while it is busy
            self.send("/set_surface", 0, 159, 16384, 0, 0, 0)
            self.send("/strip/list")
            found: dict[str, int] = {}
            with contextlib.suppress(TimeoutError):
                while True:
                    heard = OscMessage(self.channel.recv(65536))
                    if heard.address == "/reply" and heard.params[0] == "end_route_list":
                        return found
                    if heard.address == "/reply":
                        found[heard.params[1]] = heard.params[6]
        raise AssertionError("Ardour does not list its strips.")

    def arm(self, *names: str, armed: bool = True) -> None:
        strips = self.strips()
        for name in names:
            self.send("/strip/recenable", strips[name], int(armed))


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    assert MISSING is None, MISSING
    home = tmp_path_factory.mktemp("studio")
    mine = f'return function () local f = io.open("{home}/pressed", "a") f:write("x") f:close() end'
    code = (
        'scripts = {} scripts[1] = {} scripts[1]["a"] = {} scripts[1]["n"] = "mine" scripts[1]["s"] = "-" '
        'scripts[1]["f"] = "' + mine.replace('"', '\\"') + '" '
    )
    actions = b'<ActionScript lua="Lua 5.3">' + base64.b64encode(code.encode()) + b"</ActionScript>"
    with pytest.MonkeyPatch.context() as patch, ardour_session.display() as screen:
        for name in ("CONFIG", "DATA", "CACHE"):
            patch.setenv(f"XDG_{name}_HOME", str(home / name.lower()))
        scripts = b"<UIScripts>" + actions + b"<ActionHooks/></UIScripts>"
        config = ardour_session.new_configuration(home / "config", scripts)
        install(config)
        yield Studio(home, config, screen)


@pytest.fixture(scope="module")
def running(studio: Studio) -> Iterator[ardour_session.Running]:
    """Ardour with bass, drums and guitar audio, and empty tracks for piano, a mix and an unknown part."""
    song = ardour_session.new_session(
        studio.home / "songs" / "song", ["bass", "drums:1", "guitar", "piano", "mix", "Track 7"]
    )
    with ardour_session.ardour(song, studio.screen) as running:
        host = ArdourHost.open(running.port)
        ids = {track.name: track.id for track in host.tracks()}
        for name in ("bass", "drums", "guitar"):
            host.place(ids[name], stem(studio.home, name), START)
        yield running


@pytest.fixture
def host(running: ardour_session.Running) -> Iterator[ArdourHost]:
    """The session, with nothing armed, muted, selected or rolling before and after."""
    host = ArdourHost.open(running.port)
    _calm(host)
    yield host
    _calm(host)


@pytest.fixture
def user(running: ardour_session.Running) -> Iterator[User]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        channel.connect(("127.0.0.1", running.port))
        channel.settimeout(1)
        yield User(channel)


@pytest.fixture(scope="module")
def player() -> Engine:
    """The model that ships."""
    return local_engine(Model.open(find_bundle(None), "cpu", 1))


@dataclass
class Strummer:
    """An engine that plays noise; `meanwhile` happens while it does, and then it goes on for `seconds`."""

    meanwhile: Callable[[], object] = lambda: None
    seconds: float = 0.0
    stems: tuple[str, ...] = ("bass", "drums", "guitar", "piano")
    begun: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def fill(
        self,
        context: Mapping[str, Audio],
        armed: Sequence[str],
        *,
        callback: Callback | None = None,
        **options: Any,
    ) -> Mapping[str, Audio]:
        self.calls += 1
        self.begun.set()
        self.meanwhile()
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if callback:
                callback("play", 0.5)
            time.sleep(0.02)
        like = next(iter(context.values()))
        sound = noise(like.seconds, rate=like.sample_rate, channels=like.channels).T
        return {name: Audio(fit(sound, like.length), like.sample_rate) for name in armed}

    def split(self, mix: Audio, **options: Any) -> Mapping[str, Audio]:
        raise AssertionError("nobody asked for this")


def stem(folder: Path, name: str, rate: int = RATE) -> Path:
    """A part of the demo song as a wav."""
    sound = resample(read(SONG / f"{name}.flac"), rate)
    path = folder / f"{name}-{rate}.wav"
    write(path, Audio(sound.samples[:, : round(SECONDS * rate)], rate))
    return path


def tracks(host: ArdourHost) -> dict[str, Any]:
    return {track.name: track for track in host.look().tracks}


def lua(host: ArdourHost, body: str, *arguments: Any) -> Any:
    """Something the user does in the editor."""
    return ask(host.way, f"(function(...) {body} end)", *arguments)


def awaited(look: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if look():
            return True
        time.sleep(0.05)
    return look()


def is_whole(path: Path) -> bool:
    """Whether Ardour has written an XML file to its end."""
    try:
        ElementTree.parse(path)
    except (FileNotFoundError, ElementTree.ParseError):
        return False
    return True


def select(host: ArdourHost, span: Span) -> None:
    """As with the range tool."""
    lua(
        host,
        "local first, last = ... "
        "Editor:set_loop_range(Temporal.timepos_t(first), Temporal.timepos_t(last), '') "
        "Editor:access_action('Editor', 'select-loop-range')",
        span.start,
        span.end,
    )


def sound_of(host: ArdourHost, name: str, span: Span | None = None) -> NDArray[np.float32]:
    """(channels, samples) of what lies on a track."""
    track_id = tracks(host)[name].id
    return read(host.export([track_id], span, sounding=False)[track_id]).samples


def regions(host: ArdourHost, name: str) -> list[list[int]]:
    """[first sample, length] of each region on a track."""
    found: list[list[int]] = lua(
        host,
        "local found = {} for _, part in ipairs(regions_of(track_of(...))) do "
        "found[#found + 1] = { part.first, part.last - part.first } end return found",
        tracks(host)[name].id,
    )
    return found


@contextlib.contextmanager
def followed(host: ArdourHost, engine: Any, **options: Any) -> Iterator[list[str]]:
    """Somebody follows; what is said."""
    said: list[str] = []
    following = Following(
        lambda: ArdourHost.open(host.way.port), engine, said.append, patience=0.4, seed=1, **options
    )
    stop = threading.Event()
    thread = threading.Thread(target=follow, args=(following, stop))
    thread.start()
    try:
        assert awaited(lambda: bool(said)), "nobody follows"
        yield said
    finally:
        stop.set()
        thread.join()


def _calm(host: ArdourHost) -> None:
    lua(
        host,
        "Session:request_stop(false, false, ARDOUR.TransportRequestSource.TRS_UI) "
        "Session:disable_record(false) "
        "Editor:get_selection():clear_all()",
    )
    for track in host.look().tracks:
        if track.armed:
            host.arm(track.id, False)
        lua(host, "set(track_of(...):mute_control(), 0)", track.id)
    assert awaited(lambda: not host.look().rolling)


def test_ardour_is_a_track_host(host: ArdourHost, capsys: pytest.CaptureFixture[str]) -> None:
    known: TrackHost = host
    state = host.look()
    assert (known.sample_rate, known.tempo, known.length) == (RATE, 120, PLAYING.end)
    assert (state.name, state.rolling, state.position, state.selection) == ("song", False, 0, None)
    assert [track.name for track in known.tracks()][:6] == [
        "bass",
        "drums",
        "guitar",
        "piano",
        "mix",
        "Track 7",
    ]
    assert [track.role for track in known.tracks()][:4] == ["bass", "drums", "guitar", "piano"]
    shown = backline(capsys, "ardour", "status", "--json").json["ardours"]
    assert [(one["port"], one["tried"], one["session"]) for one in shown] == [
        (host.way.port, True, host.session)
    ]
    assert shown[0]["tracks"][1]["channels"] == 1


def test_ardour_bounces_what_lies_on_a_track_to_the_sample(host: ArdourHost, studio: Studio) -> None:
    given = read(stem(studio.home, "bass")).samples[0]
    heard = sound_of(host, "bass", Span(START, START + len(given)))
    assert heard.shape == (2, len(given))
    assert np.array_equal(heard[0, FADES:-FADES], given[FADES:-FADES])
    wide = sound_of(host, "bass", Span(0, PLAYING.end + RATE))
    assert not wide[:, :START].any() and not wide[:, PLAYING.end :].any()
    assert not sound_of(host, "piano").any()


def test_ardour_tells_the_grid_and_the_selection(host: ArdourHost) -> None:
    grid = host.grid(Span(START, START + 10 * RATE))
    assert grid is not None and (grid.bpm, grid.beats_per_bar) == (120, 4)
    assert round(grid.first_beat * RATE) == 2 * RATE - START
    assert replace(host, free=True).grid(Span(0, RATE)) is None
    select(host, Span(4800, 96000))
    assert host.selection == Span(4800, 96000)


def test_ardour_markers_name_chords(host: ArdourHost, user: User) -> None:
    names = {"Verse": 0, "Am": RATE, "F": 3 * RATE}
    for name, position in names.items():
        user.send("/locate", position, 0)
        assert awaited(lambda position=position: host.look().position == position)
        user.send("/add_marker", name)
        assert awaited(lambda name=name: name in [marker.name for marker in host.markers()])
    assert {marker.name: marker.position for marker in host.markers()} == names
    grid = host.grid(Span(0, 4 * RATE))
    assert grid is not None
    chart = chart_of_markers(host.markers(), Span(0, 4 * RATE), grid, RATE)
    assert chart == "N.C. N.C. Am Am | Am Am F F | N.C. N.C. N.C. N.C."


def test_ardour_piano_armed_by_an_osc_client_is_filled(host: ArdourHost, user: User, player: Engine) -> None:
    select(host, PLAYING)
    with followed(host, player, on_arm=True) as said:
        user.arm("piano")
        assert awaited(lambda: any("Filled" in line for line in said), 30), said
    assert regions(host, "piano") == [[START, PLAYING.length]]
    assert not tracks(host)["piano"].armed
    sound = sound_of(host, "piano", PLAYING)
    assert np.abs(sound).max() > 0.01 and np.sqrt(np.mean(sound**2)) > 1e-3
    user.send("/undo")
    assert awaited(lambda: regions(host, "piano") == [])
    user.send("/redo")
    assert awaited(lambda: regions(host, "piano") == [[START, PLAYING.length]])
    assert np.array_equal(sound_of(host, "piano", PLAYING), sound)
    user.send("/undo")
    assert awaited(lambda: regions(host, "piano") == [])


def test_ardour_bass_and_drums_armed_at_once_are_filled_in_one_step(
    host: ArdourHost, user: User, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("bass", "drums")
    before = {name: sound_of(host, name) for name in names}
    user.arm(*names)
    assert awaited(lambda: all(tracks(host)[name].armed for name in names))
    place = ("--from", PLAYING.start, "--to", PLAYING.end)
    ran = backline(capsys, "ardour", "fill", "--seed", 5, "--device", "cpu", *place, "--json")
    assert ran.status == 0, ran.err
    made = ran.json["regions"]
    assert [(part["role"], part["position"], part["length"]) for part in made] == [
        (name, START, PLAYING.length) for name in names
    ]
    after = {name: sound_of(host, name) for name in names}
    for name in names:
        assert not tracks(host)[name].armed
        assert np.abs(after[name]).max() > 0.01 and not np.array_equal(after[name], before[name])
        # What was there lies untouched in the playlist it was in, under the new region in the copy.
        assert tracks(host)[name].playlist != name and tracks(host)[name].regions == 2
        assert lua(host, "return Session:playlists():by_name(...):n_regions()", name) == 1
    assert len(after["bass"]) == 2 and len(after["drums"]) == 1  # a mono track gets a mono region
    user.send("/undo")
    assert awaited(lambda: all(tracks(host)[name].regions == 1 for name in names))
    assert all(np.array_equal(sound_of(host, name), before[name]) for name in names)
    user.send("/redo")
    assert awaited(lambda: all(tracks(host)[name].regions == 2 for name in names))
    assert all(np.array_equal(sound_of(host, name), after[name]) for name in names)
    user.send("/undo")
    assert awaited(lambda: all(tracks(host)[name].regions == 1 for name in names))


def test_ardour_mix_is_split_to_tracks_that_null_against_it(
    host: ArdourHost, user: User, studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [read(stem(studio.home, name)).samples for name in ("bass", "drums", "guitar", "piano")]
    mix = np.concatenate([sum(parts), 0.8 * np.float32(sum(parts))]).astype(np.float32)
    write(studio.home / "mix.wav", Audio(mix, RATE))
    host.place(tracks(host)["mix"].id, studio.home / "mix.wav", START)
    before = sound_of(host, "mix", PLAYING)
    refused(backline(capsys, "ardour", "split", "--device", "cpu"), 2, "No region is selected")
    lua(
        host,
        "local list = ArdourUI.SelectionList() for _, part in ipairs(regions_of(track_of(...))) do "
        "list:push_back(Editor:regionview_from_region(part.region)) end "
        "Editor:set_selection(list, ArdourUI.SelectionOp.Set)",
        tracks(host)["mix"].id,
    )
    ran = backline(capsys, "ardour", "split", "--device", "cpu", "--json")
    assert ran.status == 0, ran.err
    made = ran.json["regions"]
    assert [part["role"] for part in made] == ["bass", "drums", "guitar", "piano", "other"]
    ids = [part["track_id"] for part in made]
    total = sum(read(path).samples for path in host.export(ids, PLAYING).values())
    error = (total - before)[:, FADES:-FADES]
    level = 20 * np.log10(np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(before**2)))
    worst = 20 * np.log10(np.abs(error).max())
    assert level < -90 and worst < -90, (level, worst)
    assert all(np.abs(read(path).samples).max() > 1e-3 for path in host.export(ids[:4], PLAYING).values())
    assert not sound_of(host, "mix", PLAYING).any()  # the region that was split is muted, in the same step
    user.send("/undo")
    assert awaited(lambda: np.array_equal(sound_of(host, "mix", PLAYING), before))
    assert all(tracks(host)[part["name"]].regions == 0 for part in made)
    user.send("/undo")  # one step was the split, the next is what was there before it
    assert awaited(lambda: tracks(host)["mix"].regions == 0)


def test_ardour_fills_on_arm_only_who_wants_it_and_stays_armed(host: ArdourHost, user: User) -> None:
    strummer = Strummer(seconds=3)
    with followed(host, strummer):
        user.arm("piano")
        assert not strummer.begun.wait(1.5)
    user.arm("piano", armed=False)
    with followed(host, strummer, on_arm=True):  # armed, and disarmed before anything began
        user.arm("piano")
        user.arm("piano", armed=False)
        assert not strummer.begun.wait(1.5)
    user.arm("piano")
    assert awaited(lambda: tracks(host)["piano"].armed)
    with followed(host, strummer, on_arm=True):  # armed before anybody followed
        assert not strummer.begun.wait(1.5)
    assert regions(host, "piano") == []


@pytest.mark.parametrize("how", ["disarming", "rolling", "rolling before it began"])
def test_ardour_fill_on_arm_is_called_off(host: ArdourHost, user: User, how: str) -> None:
    strummer = Strummer(seconds=20)
    with followed(host, strummer, on_arm=True) as said:
        user.arm("piano", "guitar")
        if how == "rolling before it began":
            assert awaited(lambda: tracks(host)["guitar"].armed)
            user.send("/transport_play")
            assert not strummer.begun.wait(1.5)
            user.send("/transport_stop")
            assert not strummer.begun.wait(1.0)
        else:
            assert strummer.begun.wait(5)
            if how == "disarming":
                user.arm("guitar", armed=False)
            else:
                user.send("/transport_play")
            assert awaited(lambda: any("called off" in line for line in said), 3), said
    assert strummer.calls == (how != "rolling before it began")
    assert regions(host, "piano") == [] and len(regions(host, "guitar")) == 1
    assert tracks(host)["piano"].armed


def test_ardour_fill_on_arm_finds_no_place_once_it_rolls(host: ArdourHost, user: User) -> None:
    careful = replace(host, careful=True)
    user.arm("piano")
    assert awaited(lambda: tracks(host)["piano"].armed)
    rolls = Strummer(lambda: (user.send("/transport_play"), awaited(lambda: host.look().rolling)))
    with pytest.raises(BacklineError, match=r"transport rolls.* What was played is in .*unplaced") as caught:
        fill(careful, rolls, span=PLAYING, seed=1)
    assert read(kept(caught.value) / "piano.wav").length == PLAYING.length
    user.send("/transport_stop")
    assert awaited(lambda: not host.look().rolling)
    disarms = Strummer(lambda: host.arm(tracks(host)["piano"].id, False))
    with pytest.raises(BacklineError, match="no longer armed"):
        fill(careful, disarms, span=PLAYING, seed=1)
    assert regions(host, "piano") == []


def test_ardour_is_played_by_the_daemon_which_hears_of_disarming(
    host: ArdourHost, user: User, studio: Studio
) -> None:
    select(host, PLAYING)
    with daemon(studio.home / "daemon", None, "--ardour", host.way.port, "--on-arm") as played:
        said = studio.home / "daemon.err"
        assert awaited(lambda: "Following song" in said.read_text(), 60), said.read_text()
        user.arm("piano")
        assert awaited(lambda: "Filled piano" in said.read_text(), 60), said.read_text()
        assert regions(host, "piano") == [[START, PLAYING.length]]
        user.send("/undo")
        talk = Talk(played.port)
        done = talk.ask("/backline/job/list", 0, 1, answer="/backline/job/state")
        assert (done["task"], done["state"]) == ("fill", "done")
        far = 120 * RATE  # a long session takes long enough to change one's mind
        host.place(tracks(host)["bass"].id, stem(studio.home, "bass"), far)
        lua(host, "Editor:get_selection():clear_all()")
        user.arm("piano")
        state = done
        until = time.monotonic() + 60
        while (state["id"] == done["id"] or state["state"] == "queued") and time.monotonic() < until:
            state = talk.ask("/backline/job/list", 0, 1, answer="/backline/job/state")
            time.sleep(0.1)
        assert state["state"] == "running"
        user.arm("piano", armed=False)
        assert awaited(lambda: "called off" in said.read_text()), said.read_text()
        until = time.monotonic() + 60
        while state["state"] != "cancelled" and time.monotonic() < until:
            state = talk.ask("/backline/job/status", state["id"], answer="/backline/job/state")
            time.sleep(0.2)
        talk.close()
        assert state["state"] == "cancelled"
    assert regions(host, "piano") == []
    user.send("/undo")
    assert awaited(lambda: host.length == PLAYING.end)


def test_ardour_action_fills_what_is_armed(host: ArdourHost, user: User, studio: Studio) -> None:
    slots = install_places(studio)
    user.arm("piano")
    assert awaited(lambda: tracks(host)["piano"].armed)
    strummer = Strummer()
    with followed(host, strummer) as said:
        user.send("/access_action", f"LuaAction/script-{slots[FILL]}")
        assert awaited(lambda: any(line.startswith("Filled piano") for line in said)), said
    assert strummer.calls == 1 and regions(host, "piano") == [[0, PLAYING.end]]
    assert not (studio.home / "pressed").exists()
    user.send("/access_action", "LuaAction/script-1")  # what the user had there works as before
    assert awaited(lambda: (studio.home / "pressed").exists())
    user.send("/undo")
    assert awaited(lambda: regions(host, "piano") == [])


def test_ardour_follow_ends_with_ctrl_c(host: ArdourHost, studio: Studio) -> None:
    command = [sys.executable, "-P", "-m", "bridge.cli", "ardour", "follow", "--port", str(host.way.port)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    said = studio.home / "follow.err"
    with said.open("wb") as err, subprocess.Popen(command, stderr=err, env=environment) as process:
        assert awaited(lambda: "Following song" in said.read_text(), 60), said.read_text()
        assert list(host.way.folder.glob("following-*"))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert said.read_text().splitlines()[-1] == "No longer following."
    assert not list(host.way.folder.glob("following-*"))


def install_places(studio: Studio) -> dict[str, int]:
    from plugin_host.ardour_setup import installed

    found = installed(studio.config)
    assert found is not None
    with pytest.raises(BacklineError, match="Ardour is running"):
        install(studio.config)
    with pytest.raises(BacklineError, match="Ardour is running"):
        uninstall(studio.config)
    return found.slots


def test_ardour_recording_is_never_touched(host: ArdourHost, user: User) -> None:
    user.arm("piano")
    user.send("/locate", START, 0)
    assert awaited(lambda: tracks(host)["piano"].armed and host.look().position == START)
    user.send("/rec_enable_toggle")
    assert awaited(lambda: lua(host, "return Session:record_status() == ARDOUR.Session.RecordState.Enabled"))
    user.send("/transport_play")
    assert awaited(lambda: host.look().recording), host.look()
    strummer = Strummer(lambda: time.sleep(1.2))
    with pytest.raises(BacklineError, match="Ardour is recording"):
        fill(host, strummer, span=PLAYING, seed=1)
    user.send("/transport_stop")
    user.send("/rec_enable_toggle")
    assert awaited(lambda: not host.look().rolling and len(regions(host, "piano")) == 1)
    recorded = regions(host, "piano")
    user.arm("piano")
    assert awaited(lambda: tracks(host)["piano"].armed)
    fill(host, Strummer(), span=PLAYING, seed=1)
    assert tracks(host)["piano"].playlist == "piano.1"
    first = (
        "for region in Session:playlists():by_name('piano'):region_list():iter() do "
        "return { region:position():samples(), region:length():samples() } end"
    )
    assert lua(host, first) == recorded[0]
    user.send("/undo")
    assert awaited(lambda: regions(host, "piano") == recorded)
    lua(
        host,
        "local t = track_of(...) local first = Session:playlists():by_name('piano') "
        "t:use_playlist(ARDOUR.DataType('audio'), first, false)"
        " for _, part in ipairs(regions_of(t)) do t:playlist():remove_region(part.region) end",
        tracks(host)["piano"].id,
    )
    assert regions(host, "piano") == []


def test_ardour_track_is_renamed_while_a_job_runs(host: ArdourHost, user: User) -> None:
    first = host.create_track("piano left")
    user.arm("piano left")
    assert awaited(lambda: tracks(host)["piano left"].armed)
    strummer = Strummer(lambda: lua(host, "track_of(...):set_name('other name')", first.id))
    placed = fill(host, strummer, span=PLAYING, seed=1)
    assert [part.track_id for part in placed] == [first.id]
    assert regions(host, "other name") == [[START, PLAYING.length]]
    assert not list(Path(host.folder.name).iterdir())  # what was exported for it is gone
    user.send("/undo")
    assert awaited(lambda: regions(host, "other name") == [])


def test_ardour_track_is_moved_while_a_job_runs(host: ArdourHost, user: User) -> None:
    """To the top of the list: what counts is which track it is, not where it stands."""
    wanted = host.create_track("piano right")
    user.arm("piano right")
    assert awaited(lambda: tracks(host)["piano right"].armed)
    before = user.strips()
    kept = {track.name: regions(host, track.name) for track in host.tracks() if track.name != "piano right"}
    strummer = Strummer(lambda: lua(host, "track_of(...):set_presentation_order(0)", wanted.id))
    placed = fill(host, strummer, span=PLAYING, seed=1)
    after = user.strips()
    assert after.keys() == before.keys() and after["piano right"] < before["piano right"], "it moved"
    assert [part.track_id for part in placed] == [wanted.id]
    assert regions(host, "piano right") == [[START, PLAYING.length]]
    assert {name: regions(host, name) for name in kept} == kept
    user.send("/undo")
    assert awaited(lambda: regions(host, "piano right") == [])


def test_ardour_mistakes_are_sentences(
    host: ArdourHost, user: User, studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(backline(capsys, "ardour", "fill", "--device", "cpu"), 2, "No track is armed")
    user.arm("Track 7")
    assert awaited(lambda: tracks(host)["Track 7"].armed)
    refused(
        backline(capsys, "ardour", "fill", "--device", "cpu"), 2, "Track 7", "bass, drums, guitar or piano"
    )
    place = ("--from", PLAYING.start, "--to", PLAYING.end, "--role", "Track 7=piano")
    ran = backline(capsys, "ardour", "fill", "--device", "cpu", *place, "--json")
    assert ran.status == 0 and ran.json["regions"][0]["role"] == "piano"
    user.send("/undo")
    refused(backline(capsys, "ardour", "fill", "--from", 5), 2, "--to")
    with pytest.raises(BacklineError, match="no track 99"):
        host.arm("99")
    with pytest.raises(BacklineError, match="no longer in the session"):
        host.export(["99"], PLAYING)
    with pytest.raises(BacklineError, match="could not do it"):
        lua(host, "error('so')")
    assert host.look().name == "song"  # an action that raises would have been removed


def test_ardour_midi_tracks_are_heard_through_their_instruments(host: ArdourHost, studio: Studio) -> None:
    made = lua(
        host,
        "local midi = ARDOUR.ChanCount(ARDOUR.DataType('midi'), 1) "
        "for track in Session:new_midi_track(midi, midi, true, "
        "ARDOUR.PluginInfo(), nil, nil, 1, 'Rhodes', ARDOUR.PresentationInfo.max_order, "
        "ARDOUR.TrackMode.Normal, true):iter() do return id_of(track) end",
    )
    notes = bytes.fromhex("00903c40 8740803c40 00ff2f00")  # a quarter note on middle C
    head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480)
    (studio.home / "notes.mid").write_bytes(head + b"MTrk" + struct.pack(">I", len(notes)) + notes)
    lua(
        host,
        "local path, id = ... local files = C.StringVector() files:push_back(path) "
        "Editor:do_import(files, Editing.ImportSerializeFiles, Editing.ImportToTrack, "
        "ARDOUR.SrcQuality.SrcBest, ARDOUR.MidiTrackNameSource.SMFTrackName, "
        "ARDOUR.MidiTempoMapDisposition.SMFTempoIgnore, "
        "Temporal.timepos_t(0), ARDOUR.PluginInfo(), track_of(id), false)",
        str(studio.home / "notes.mid"),
        made,
    )
    assert tracks(host)["Rhodes"].regions == 1 and not tracks(host)["Rhodes"].audio
    assert not sound_of(host, "Rhodes", PLAYING).any() and bounce(host, PLAYING).samples.any()
    host.arm(made)
    with pytest.raises(BacklineError, match="'Rhodes' is a MIDI track"):
        fill(host, Strummer(), span=PLAYING, seed=1)
    assert lua(host, ADD_PLUGIN, made, "https://community.ardour.org/node/7596")  # Ardour's own little synth
    assert np.abs(read(host.export([made], Span(0, RATE))[made]).samples).max() > 0.001
    assert not sound_of(host, "Rhodes", PLAYING).any()


def test_ardour_ignores_a_missing_file_and_backline_does_not(host: ArdourHost) -> None:
    item = {
        "path": "/nowhere/x.wav",
        "position": 0,
        "length": 9,
        "name": "x",
        "track": tracks(host)["piano"].id,
    }
    answer = ask(host.way, "place", "Backline: nothing", [item], [], [], [], False)
    assert answer == {"missing": 1} and regions(host, "piano") == []


def test_ardour_faders_are_heard(host: ArdourHost) -> None:
    plain = sound_of(host, "guitar", PLAYING)
    guitar = tracks(host)["guitar"].id
    lua(host, "track_of(...):gain_control():set_value(0.5, PBD.GroupControlDisposition.NoGroup)", guitar)
    quiet = read(host.export([guitar], PLAYING)[guitar]).samples
    lua(host, "track_of(...):gain_control():set_value(1, PBD.GroupControlDisposition.NoGroup)", guitar)
    ramp = RATE // 10  # a fader that was moved glides
    np.testing.assert_allclose(quiet[:, ramp:], plain[:, ramp:] / 2, atol=1e-6)
    host_bounce = bounce(host, PLAYING).samples
    total = sum(
        np.broadcast_to(sound_of(host, name, PLAYING), (2, PLAYING.length))
        for name in ("bass", "drums", "guitar")
    )
    np.testing.assert_allclose(host_bounce[:, ramp:], total[:, ramp:], atol=1e-5)


def test_ardour_plugins_are_heard(host: ArdourHost, user: User, studio: Studio) -> None:
    track = tracks(host)["Track 7"].id
    if not lua(host, ADD_PLUGIN, track, "urn:zamaudio:ZamTube"):
        assert not REQUIRED, "zam-plugins is not installed."
        pytest.skip("zam-plugins is not installed.")
    host.place(track, stem(studio.home, "bass"), START)
    bare = read(host.export([track], PLAYING, sounding=False)[track]).samples
    heard = read(host.export([track], PLAYING)[track]).samples
    assert np.array_equal(bare[0, FADES:-FADES], read(stem(studio.home, "bass")).samples[0, FADES:-FADES])
    assert heard.shape == bare.shape and np.isfinite(heard).all() and np.abs(heard).max() > 0.01
    assert np.abs(heard - bare).max() > 0.01
    user.send("/undo")
    assert awaited(lambda: tracks(host)["Track 7"].regions == 0)


def test_ardour_second_one_on_another_port_is_killed_and_started_again(
    host: ArdourHost, studio: Studio, player: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 44.1 kHz; in the end with a track less, and moved ones; the first one goes on as if nothing was."""
    rate, end = 44100, round(SECONDS * 44100)
    songs = studio.home / "songs"
    second = ardour_session.new_session(songs / "second", ["guitar", "drums:1", "piano:1"], rate=rate)
    third = ardour_session.new_session(songs / "third", ["piano"], rate=rate)
    with contextlib.ExitStack() as ardours:
        running = ardours.enter_context(ardour_session.ardour(second, studio.screen))
        assert running.port != host.way.port
        there = ArdourHost.open(running.port)
        assert there.sample_rate == rate and there.session != host.session
        both = backline(capsys, "ardour", "status", "--json").json["ardours"]
        assert {one["port"]: one["name"] for one in both} == {host.way.port: "song", running.port: "second"}
        ids = {track.name: track.id for track in there.tracks()}
        there.place(ids["drums"], stem(studio.home, "drums", rate), 0)
        there.arm(ids["piano"])
        assert fill(there, player, seed=1) == [Placed(ids["piano"], "piano", "piano", 0, end)]
        assert regions(there, "piano") == [[0, end]] and np.abs(sound_of(there, "piano")).max() > 0.01
        lua(there, "Session:save_state('', false, false, false, false, false)")

        def killed() -> None:
            ardour_session.kill(running)

        def started_again() -> None:
            killed()
            ardour_session.remove_track(second, "guitar")
            again = ardours.enter_context(ardour_session.ardour(second, studio.screen))
            assert again.port == running.port

        there.arm(ids["piano"])
        there.arm(ids["guitar"])
        said: list[str] = []
        placed = fill(there, Strummer(started_again), seed=1, warn=said.append)
        assert [part.track_id for part in placed] == [ids["piano"]] and "'guitar' is no longer there" in said[
            0
        ]
        assert [track.name for track in there.tracks()] == ["drums", "piano"]
        assert tracks(there)["piano"].regions == 2
    with pytest.raises(ArdourGone, match=rf"port {running.port}"):
        there.look()
    with ardour_session.ardour(third, studio.screen) as running:
        for call in (there.look, lambda: there.arm(ids["piano"])):
            with pytest.raises(SessionChanged, match="third"):
                call()
        there = ArdourHost.open(running.port)
        piano, bass = there.tracks()[0].id, there.create_track("bass").id
        there.place(bass, stem(studio.home, "bass", rate), 0)
        there.arm(piano)
        with pytest.raises(BacklineError, match=rf"port {running.port}.* What was played is in") as caught:
            fill(there, Strummer(killed), seed=1)
        assert read(kept(caught.value) / "piano.wav").length == end
    assert host.look().name == "song" and regions(host, "piano") == []


def kept(error: Exception) -> Path:
    """Where the wavs are that found no place."""
    return Path(str(error).split(" is in ")[1].rstrip("."))


def test_ardour_that_comes_and_goes_is_followed(host: ArdourHost, studio: Studio) -> None:
    song = ardour_session.new_session(studio.home / "songs" / "fourth", ["bass", "piano"])
    said: list[str] = []
    port = ardour_session.free_port()
    strummer, stop = Strummer(), threading.Event()
    following = Following(lambda: ArdourHost.open(port), strummer, said.append, on_arm=True, patience=0.3)
    thread = threading.Thread(target=follow, args=(following, stop))
    thread.start()
    try:
        for _ in range(2):
            said.clear()
            with ardour_session.ardour(song, studio.screen) as running:
                assert running.port == port
                assert awaited(
                    lambda: any("Following fourth" in line for line in said), ardour_session.STARTS
                ), said
            assert awaited(lambda: any("Waiting for it" in line for line in said), ardour_session.STARTS), (
                said
            )
    finally:
        stop.set()
        thread.join()


def test_ardour_wrote_its_own_actions_and_gets_them_back(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration as Ardour itself makes it, with the bytecode of its own actions."""
    home = studio.home / "fresh"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    config = ardour_session.new_configuration(home, b"")
    (config / "ui_scripts").unlink()
    with pytest.raises(BacklineError, match="open a session in Ardour once"):
        install(config)
    song = ardour_session.new_session(studio.home / "songs" / "fifth", ["bass"])
    with ardour_session.ardour(song, studio.screen):
        # Ardour is ended after that, in the middle of writing if need be
        assert awaited(lambda: is_whole(config / "ui_scripts"))
    before = (config / "ui_scripts").read_bytes()
    assert install(config).slots[BRIDGE] == 32 and (config / "ui_scripts").read_bytes() != before
    with ardour_session.ardour(song, studio.screen) as running:
        assert ArdourHost.open(running.port).look().version == "7.3"
    assert uninstall(config) and (config / "ui_scripts").read_bytes() == before
