"""Backline's actions in Ardour's configuration: nothing of the user's is lost. Needs no Ardour."""

from __future__ import annotations

import base64
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import backline, refused

from engine.errors import BacklineError, UsageError
from plugin_host.ardour import State, _version, untried
from plugin_host.ardour_setup import (
    BRIDGE,
    FILL,
    SPLIT,
    bridge_slot,
    configurations,
    install,
    installed,
    mailbox,
    quoted,
    uninstall,
)

# As Ardour writes them: bytecode with every kind of byte, an origin, an icon, a name with quotes.
MINE = (
    b'scripts = {} scripts[1] = {} scripts[1]["a"] = {} '
    b'scripts[1]["a"]["x-script-origin"] = "/usr/mine.lua"   '
    b'scripts[1]["c"] = "\\27LuaS\\0\\25\x93\\13\\\n\\26\xff\\"]= " '
    b'scripts[1]["f"] = "return function () end" '
    b'scripts[1]["n"] = "The \\"best\\" Backline: ever" scripts[1]["s"] = "scripts[3] = {} " '
    b'scripts[2] = {} scripts[2]["a"] = {} scripts[2]["c"] = true scripts[2]["n"] = "Other" '
    b'scripts[2]["v"] = -1.5e-3 '
)
HOOKS = b"<ActionHooks>\n    <LuaCallback lua='Lua 5.3' id='7'>c2NyaXB0cw==</LuaCallback>\n  </ActionHooks>"


def written(code: bytes) -> bytes:
    encoded = base64.b64encode(code)
    return (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<UIScripts>\n  <ActionScript lua="Lua 5.3">'
        + encoded
        + b"</ActionScript>\n  "
        + HOOKS
        + b"\n</UIScripts>\n"
    )


def code_of(config: Path) -> bytes:
    found = re.search(rb"<ActionScript[^>]*>([^<]*)<", (config / "ui_scripts").read_bytes())
    assert found
    return base64.b64decode(found[1])


def await_name(process: subprocess.Popen[bytes]) -> None:
    """A new process has no name and no environment for a moment."""
    while not Path(f"/proc/{process.pid}/environ").read_bytes():
        time.sleep(0.01)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of an Ardour 7 that has been used, in a home of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "config" / "ardour7"
    folder.mkdir(parents=True)
    (folder / "ui_scripts").write_bytes(written(MINE))
    return folder


def test_ardour_actions_come_and_go_without_a_trace(config: Path) -> None:
    before = (config / "ui_scripts").read_bytes()
    (config / "ui_scripts").chmod(0o640)
    done = install(config)
    assert done.slots == {FILL: 3, SPLIT: 4, BRIDGE: 32} and installed(config) == done
    code = code_of(config)
    assert code.startswith(MINE) and HOOKS in (config / "ui_scripts").read_bytes()
    assert (config / "ui_scripts").stat().st_mode & 0o777 == 0o640
    assert install(config) == done and code_of(config) == code  # a second time changes nothing
    assert uninstall(config) and not uninstall(config)
    assert (config / "ui_scripts").read_bytes() == before
    assert sorted(path.name for path in config.iterdir()) == ["ui_scripts"]


def test_ardour_actions_keep_their_places(config: Path) -> None:
    install(config)
    more = b'scripts[5] = {} scripts[5]["n"] = "Later" '
    (config / "ui_scripts").write_bytes(written(code_of(config) + more))
    assert install(config).slots == {FILL: 3, SPLIT: 4, BRIDGE: 32}
    uninstall(config)
    assert code_of(config) == MINE + more


def test_ardour_actions_are_lua_that_ardour_can_read(config: Path) -> None:
    install(config)
    assert mailbox().stat().st_mode & 0o777 == 0o700
    assert str(mailbox()).encode() in code_of(config)
    assert quoted('a"\\\n\r\0') == '"a\\"\\\\\\\n\\13\\0"'


@pytest.mark.parametrize(
    "empty", [b'<ActionScript lua="Lua 5.3"/>', b'<ActionScript lua="x"></ActionScript>']
)
def test_ardour_without_any_action(config: Path, empty: bytes) -> None:
    (config / "ui_scripts").write_bytes(b"<UIScripts>" + empty + b"<ActionHooks/></UIScripts>")
    assert install(config).slots == {FILL: 1, SPLIT: 2, BRIDGE: 32}
    assert uninstall(config) and code_of(config) == b""


@pytest.mark.parametrize(
    "text",
    [
        b"<UIScripts></UIScripts>",
        b"<UIScripts><ActionScript>no base64!</ActionScript></UIScripts>",
        written(b"scripts = {} os.remove('x')"),
        written(b"") + written(b""),
    ],
)
def test_ardour_files_that_are_not_understood_stay_as_they_are(config: Path, text: bytes) -> None:
    (config / "ui_scripts").write_bytes(text)
    for change in (install, uninstall):
        with pytest.raises(BacklineError, match="left as it is"):
            change(config)
    assert (config / "ui_scripts").read_bytes() == text and installed(config) is None


def test_ardour_with_every_place_taken(config: Path) -> None:
    taken = b"".join(b'scripts[%d] = {} scripts[%d]["n"] = "x" ' % (i, i) for i in range(1, 32))
    (config / "ui_scripts").write_bytes(written(b"scripts = {} " + taken))
    with pytest.raises(BacklineError, match="all taken"):
        install(config)
    assert code_of(config) == b"scripts = {} " + taken


@pytest.mark.skipif(sys.platform != "linux", reason="It reads /proc.")
def test_ardour_that_runs_keeps_its_configuration(config: Path, tmp_path: Path) -> None:
    program = tmp_path / "ardour-7.3.0~ds0"
    program.symlink_to("/bin/sleep")
    before = (config / "ui_scripts").read_bytes()
    elsewhere = {"XDG_CONFIG_HOME": str(tmp_path / "another")}
    with subprocess.Popen([program, "60"], env=elsewhere) as other:
        await_name(other)
        assert FILL in install(config).slots and uninstall(config)  # that one has another configuration
        other.kill()
    with subprocess.Popen([program, "60"]) as same:
        await_name(same)
        for change in (install, uninstall):
            with pytest.raises(BacklineError, match=rf"process {same.pid}\) .* quit it first"):
                change(config)
        same.kill()
    assert (config / "ui_scripts").read_bytes() == before


def test_ardour_configurations_the_newest_first(config: Path, tmp_path: Path) -> None:
    for name in ("ardour8", "ardour10", "ardour", "ardour-old"):
        (config.parent / name).mkdir()
    assert [path.name for path in configurations()] == ["ardour10", "ardour8", "ardour7"]
    install(config)
    assert bridge_slot() == 32
    other = config.parent / "ardour8"
    taken = b'scripts = {} scripts[32] = {} scripts[32]["n"] = "mine" '
    (other / "ui_scripts").write_bytes(written(taken))
    install(other)
    with pytest.raises(UsageError, match="--config"):
        bridge_slot()
    assert (bridge_slot(other), bridge_slot(config)) == (31, 32)


def test_ardour_commands_say_what_is_missing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("status", "fill", "split", "follow"):
        refused(backline(capsys, "ardour", command), 1, "ardour install")
    refused(backline(capsys, "ardour", "install", "--config", tmp_path / "none"), 2, "no folder")
    ran = backline(capsys, "ardour", "install", "--json")
    assert ran.json["slots"][FILL] == 3
    ran = backline(capsys, "ardour", "install")
    assert ran.status == 0 and "password" in ran.err and str(config) in ran.out.replace("\n", "")
    refused(backline(capsys, "ardour", "status", "--port", "9"), 1, "port 9", "OSC")
    refused(backline(capsys, "ardour", "fill", "--port", "9"), 1, "port 9", "OSC")
    refused(backline(capsys, "ardour", "fill", "--role", "piano"), 2, "NAME=ROLE")
    assert backline(capsys, "ardour", "uninstall", "--json").json["removed"] is True
    (config / "ui_scripts").unlink()
    refused(backline(capsys, "ardour", "install"), 1, "open a session in Ardour once")
    config.rename(config.with_name("other"))
    refused(backline(capsys, "ardour", "install"), 2, "start it once")


def test_ardour_versions_that_were_not_tried_are_said_to_be_so() -> None:
    assert _version("/usr/lib/ardour7/ardour-7.3.0~ds0", "/home/x/.config/ardour7") == "7.3"
    assert _version("/opt/Ardour-8.6.0/bin/ardour-8.6.0", "/home/x/.config/ardour8") == "8.6"
    assert _version("", "/home/x/.config/ardour8") == "8" and _version("", "") == ""
    state = State("/s", "s", "7.3", 48000, 120.0, 0, 0, False, False, None, (), ())
    assert untried(state) is None
    for version, words in (("8.6", "not with Ardour 8.6"), ("7", "not with Ardour 7"), ("", "not known")):
        sentence = untried(State("/s", "s", version, 48000, 120.0, 0, 0, False, False, None, (), ()))
        assert sentence and words in sentence


def test_ardour_is_not_what_else_listens_on_its_ports(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(config)
    monkeypatch.setattr("bridge.ardour_commands.STATUS_SECONDS", 0.3)
    monkeypatch.setattr("bridge.ardour_commands.PORTS", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        monkeypatch.setattr("bridge.ardour_commands.PORT", other.getsockname()[1])
        ran = backline(capsys, "ardour", "status")
        assert ran.status == 1 and "did not answer" in ran.err and "No Ardour answers" in ran.err
        assert not list(mailbox().glob("command*")) and not list(mailbox().glob("answer*"))
