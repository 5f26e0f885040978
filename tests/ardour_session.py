"""A real Ardour for the tests, without a click: a session made by Ardour's own Lua, a display in memory,
no audio device, OSC switched on.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from plugin_host.ardour_link import PORT, ArdourGone, Link, send

STARTS = 60.0  # seconds that Ardour may take to come up

NEW_SESSION = """
AudioEngine:set_backend("None (Dummy)", "", ""):set_device_name("Silence")
AudioEngine:set_sample_rate({rate})
local session = create_session("{folder}", "{name}", {rate})
assert(session, "no session")
for track in string.gmatch("{tracks}", "[^,]+") do
   local name, channels = track:match("(.*):(%d)")
   session:new_audio_track(channels, 2, nil, 1, name, ARDOUR.PresentationInfo.max_order,
      ARDOUR.TrackMode.Normal, true)
end
session:save_state("")
close_session()
quit()
"""
OSC = (
    '<Protocol name="Open Sound Control (OSC)" active="1" debugmode="0" address-only="0" remote-port="8000" '
    'banksize="0" striptypes="159" feedback="0" gainmode="0" send-page-size="0" plug-page-size="0"/>'
)
CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Ardour>
 <Config>
  <Option name="try-autostart-engine" value="1"/>
  <Option name="hide-dummy-backend" value="0"/>
  <Option name="check-announcements" value="0"/>
  <Option name="discover-plugins-on-start" value="0"/>
 </Config>
 <ControlProtocols>{osc}</ControlProtocols>
 <Extra>
  <AudioMIDISetup>
   <EngineStates>
    <State backend="None (Dummy)" driver="Normal Speed" device="Silence" input-device="" output-device=""
     sample-rate="{rate}" buffer-size="1024" n-periods="0" input-latency="0" output-latency="0" lm-input=""
     lm-output="" active="1" use-buffered-io="0" midi-option="1 in, 1 out, Silence" lru="0"/>
   </EngineStates>
  </AudioMIDISetup>
 </Extra>
</Ardour>
"""


@dataclass(frozen=True)
class Running:
    """An Ardour that runs: its OSC port, its process, and the display it draws on."""

    port: int
    process: subprocess.Popen[bytes]
    display: str


def missing() -> str | None:
    """What the tests lack here, as a sentence; None where they can run."""
    for program in ("ardour", "Xvfb"):
        if shutil.which(program) is None:
            return f"{program} is not installed."
    return None if _lua() else "Ardour's Lua interpreter is not installed."


def new_session(folder: Path, tracks: Sequence[str], *, rate: int = 48000) -> Path:
    """A session with audio tracks, stereo ones or "name:1" for mono, and OSC on; its .ardour file."""
    listed = ",".join(track if ":" in track else f"{track}:2" for track in tracks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    script = folder.parent / "new_session.lua"
    script.write_text(NEW_SESSION.format(folder=folder, name=folder.name, rate=rate, tracks=listed))
    made = subprocess.run([str(_lua()), str(script)], capture_output=True, text=True, timeout=STARTS)
    file = folder / f"{folder.name}.ardour"
    assert file.exists(), made.stdout + made.stderr
    text = file.read_text("utf-8")
    text, count = re.subn(r'<Protocol name="Open Sound Control \(OSC\)"[^>]*/>', OSC, text)
    file.write_text(
        text if count else text.replace("</ControlProtocols>", f"{OSC}</ControlProtocols>"), "utf-8"
    )
    return file


def remove_track(session: Path, name: str) -> None:
    """Take a track out of a session that is not open."""
    tree = ElementTree.parse(session)
    routes = tree.getroot().find("Routes")
    assert routes is not None
    for route in routes.findall("Route"):
        if route.get("name") == name:
            routes.remove(route)
    tree.write(session, "utf-8", xml_declaration=True)


def new_configuration(home: Path, scripts: bytes, *, rate: int = 48000) -> Path:
    """A user's configuration folder that asks nothing and has no audio device, with these Lua actions."""
    config = home / "ardour7"
    config.mkdir(parents=True)
    (config / ".a7").touch()  # the wizard for new users has been seen
    (config / "config").write_text(CONFIG.format(osc=OSC, rate=rate), "utf-8")
    (config / "ui_scripts").write_bytes(scripts)
    return config


@contextlib.contextmanager
def display() -> Iterator[str]:
    """A display in memory; its name."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1600x1000x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with os.fdopen(read) as pipe:
            yield f":{pipe.readline().strip()}"
    finally:
        _end(server)


def free_port() -> int:
    """Which one Ardour will take."""
    for port in range(PORT, PORT + 20):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
            try:
                channel.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise AssertionError("Ardour would find no free port.")


@contextlib.contextmanager
def ardour(session: Path, screen: str) -> Iterator[Running]:
    """Ardour with a session open, on the first free OSC port from 3819 on. It is ended whatever happens."""
    port = free_port()
    (session.parent / f"{session.stem}.pending").unlink(missing_ok=True)
    environment = os.environ | {
        "DISPLAY": screen,
        "ARDOUR_TRY_AUTOSTART_ENGINE": "1",
        "NO_AT_BRIDGE": "1",
        "GTK2_RC_FILES": os.devnull,
    }
    with (session.parent.parent / f"{session.stem}-{port}.log").open("ab") as log:
        process = subprocess.Popen(
            ["ardour", "--no-announcements", "--no-splash", str(session)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _await(process, port, Path(log.name))
        yield Running(port, process, screen)
    finally:
        _end(process)


def kill(running: Running) -> None:
    """As a crash would end it."""
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + STARTS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(ArdourGone):
            send(Link(port, log.parent, 0), "/strip/list")
            return
        time.sleep(0.2)
    raise AssertionError(f"Ardour did not come up:\n{log.read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for end in (process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


def _lua() -> Path | None:
    found = [path for folder in os.get_exec_path() for path in Path(folder).glob("ardour[0-9]*-lua")]
    return found[0] if found else None
