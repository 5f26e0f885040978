"""Backline's actions in Ardour's configuration: `install` adds them, `uninstall` takes them out again.

Ardour keeps its Lua actions in `ui_scripts`: XML around base64 around assignments such as
`scripts[1]["n"] = "name"`, which it reads when a session opens and writes when an action changes. Only the
assignments of Backline's own actions are added or taken out; every other byte stays as it is.
"""

from __future__ import annotations

import base64
import binascii
import os
import platform
import re
import stat
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import platformdirs

from engine.errors import BacklineError, UsageError

PREFIX = "Backline: "
BRIDGE = PREFIX + "bridge"
FILL = PREFIX + "fill armed tracks"
SPLIT = PREFIX + "split selected region"
SLOTS = 32  # Ardour has that many places for actions, and buttons for the first of them
SCRIPTS = "ui_scripts"
TRIED = "7.3"

_ASSIGNMENT = re.compile(
    rb'scripts(?P<keys>(?:\[(?:\d+|"(?:[^"\\]|\\.)*")\])*) = '
    rb'(?P<value>\{\}|nil|true|false|-?[0-9.]+(?:[eE][-+]?\d+)?|"(?:[^"\\]|\\.)*")\s*',
    re.DOTALL,
)
_ELEMENT = re.compile(rb"(<ActionScript\b[^>]*?)(?:/>|>([^<]*)</ActionScript>)")
_PROGRAM = re.compile(r"h?ardour(-\d\S*|\d*)", re.IGNORECASE)


@dataclass(frozen=True)
class Installed:
    """Where Backline's actions are: Ardour's configuration folder and the place of each action by name."""

    config: Path
    slots: dict[str, int]


def mailbox() -> Path:
    """The private folder (mode 0700) over which Backline and its actions inside Ardour talk; made if missing.

    Ardour runs what lies there, so a folder that others may write to is refused.
    """
    folder = Path(platformdirs.user_data_dir("backline")) / "ardour"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name != "nt":
            if folder.stat().st_uid != os.getuid():
                raise BacklineError(
                    f"{folder} belongs to somebody else: Ardour must not run what lies there."
                )
            folder.chmod(stat.S_IRWXU)
    except OSError as error:
        raise BacklineError(f"{folder} cannot be used: {error.strerror or error}.") from error
    return folder


def configurations() -> list[Path]:
    """The configuration folders of the Ardours of this user, the newest version first."""
    if platform.system() == "Darwin":
        home = Path.home() / "Library" / "Preferences"
    elif os.name == "nt":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    found = [path for path in home.glob("[Aa]rdour[0-9]*") if path.is_dir() and _major(path)]
    return sorted(found, key=_major, reverse=True)


def configuration(config: Path | None) -> Path:
    """The folder that is meant: `config`, else the newest there is. Raises UsageError where there is none."""
    if config is not None:
        if not config.is_dir():
            raise UsageError(f"{config} is no folder: give Ardour's configuration folder.")
        return config
    found = configurations()
    if not found:
        raise UsageError("Ardour has no configuration here: start it once and quit it, or pass --config.")
    return found[0]


def install(config: Path) -> Installed:
    """Put the actions into a configuration, in the places they had or in free ones.

    Raises BacklineError while Ardour runs with that configuration, for a file that is not understood (which
    is left as it is), and where Ardour has no free place.
    """
    _refuse_while_running(config)
    path, text, assignments = _read(config)
    had = _ours(assignments)
    kept = _without(assignments, had.values())
    taken = {int(keys) for keys in map(_number, kept) if keys}
    # The buttons are for the actions that a user presses; the bridge is none of them.
    slots = {}
    for name, order in (
        (FILL, range(1, SLOTS + 1)),
        (SPLIT, range(1, SLOTS + 1)),
        (BRIDGE, range(SLOTS, 0, -1)),
    ):
        free = [slot for slot in ([had[name]] if name in had else []) + list(order) if slot not in taken]
        if not free:
            raise BacklineError(f"Ardour's {SLOTS} places for Lua actions are all taken: free one first.")
        slots[name] = free[0]
        taken.add(free[0])
    added = b"".join(_entry(slot, name, _source(name)) for name, slot in sorted(slots.items()))
    _write(path, text, b"".join(kept or [b"scripts = {} "]) + added)
    return Installed(config, slots)


def uninstall(config: Path) -> bool:
    """Take the actions out again; returns whether there were any. Raises BacklineError as `install`."""
    _refuse_while_running(config)
    path, text, assignments = _read(config)
    had = _ours(assignments)
    if had:
        kept = _without(assignments, had.values())
        _write(path, text, b"" if kept == [b"scripts = {} "] else b"".join(kept))
    return bool(had)


def installed(config: Path) -> Installed | None:
    """Where the actions are in a configuration; None where they are not."""
    try:
        found = _ours(_read(config)[2])
    except BacklineError:
        return None
    return Installed(config, found) if BRIDGE in found else None


def bridge_slot(config: Path | None = None) -> int:
    """The place of the bridge, which every Ardour of this user must agree on where `config` is not said."""
    folders = configurations() if config is None else [config]
    slots = {found.slots[BRIDGE] for found in map(installed, folders) if found}
    if not slots:
        raise BacklineError("Backline is not in Ardour yet: quit Ardour and run `backline ardour install`.")
    if len(slots) > 1:
        raise UsageError(
            "Several Ardours have Backline's action in different places: say whose with --config."
        )
    return slots.pop()


def running(config: Path) -> list[int]:
    """The ids of the processes of Ardour that use this configuration, or may use it."""
    if platform.system() == "Linux":
        return [pid for pid in _linux_processes() if _uses(pid, config)]
    command = ["tasklist", "/fo", "csv", "/nh"] if os.name == "nt" else ["ps", "-axo", "pid=,comm="]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in listed.splitlines():
        pid, program = (line.split('","')[1::-1] if os.name == "nt" else line.strip().split(None, 1)) or (
            "",
            "",
        )
        name = program.strip('"').removesuffix(".exe").replace("\\", "/").rsplit("/", 1)[-1]
        if _PROGRAM.fullmatch(name) and pid.isdigit():
            found.append(int(pid))
    return found


def _linux_processes() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                program = (folder / "cmdline").read_bytes().split(b"\0")[0].decode("utf-8", "replace")
            except OSError:
                continue
            if _PROGRAM.fullmatch(program.rsplit("/", 1)[-1]):
                found.append(int(folder.name))
    return found


def _uses(pid: int, config: Path) -> bool:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return Path(f"/proc/{pid}").exists()  # it may: somebody else's, or one that cannot be looked into
    values = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
    home = os.fsdecode(values.get(b"XDG_CONFIG_HOME") or values.get(b"HOME", b"") + b"/.config")
    return Path(home).resolve() == config.resolve().parent


def _refuse_while_running(config: Path) -> None:
    found = running(config)
    if found:
        raise BacklineError(
            f"Ardour is running (process {found[0]}) and would overwrite the change: quit it first."
        )


def _major(config: Path) -> int:
    digits = re.search(r"(\d+)$", config.name)
    return int(digits[1]) if digits else 0


def _read(config: Path) -> tuple[Path, bytes, list[bytes]]:
    """The file, its text, and the assignments in it, each with the space after it."""
    path = config / SCRIPTS
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise BacklineError(
            f"{path} is not there yet: open a session in Ardour once, quit it, and try again."
        ) from None
    found = _ELEMENT.findall(text)
    try:
        code = base64.b64decode(b"".join(found[0][1].split()), validate=True) if len(found) == 1 else None
    except binascii.Error:
        code = None
    if code is None:
        raise BacklineError(f"{path} is not what Ardour {TRIED} writes: it was left as it is.")
    assignments, position = [], 0
    while position < len(code):
        match = _ASSIGNMENT.match(code, position)
        if match is None:
            raise BacklineError(f"{path} holds actions that are not understood: it was left as it is.")
        assignments.append(match[0])
        position = match.end()
    return path, text, assignments


def _write(path: Path, text: bytes, code: bytes) -> None:
    match = _ELEMENT.search(text)
    assert match is not None  # _read found it
    element = match[1].rstrip() + b">" + base64.b64encode(code) + b"</ActionScript>"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(text[: match.start()] + element + text[match.end() :])
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BacklineError(f"{path} could not be written: {error.strerror or error}.") from error


def _number(assignment: bytes) -> bytes | None:
    """Of which place an assignment is; None for the one that makes the table."""
    match = re.match(rb"scripts\[(\d+)\]", assignment)
    return match[1] if match else None


def _ours(assignments: Sequence[bytes]) -> dict[str, int]:
    """Place by name of Backline's actions."""
    found = {}
    for assignment in assignments:
        match = re.match(rb'scripts\[(\d+)\]\["n"\] = "((?:[^"\\]|\\.)*)"', assignment, re.DOTALL)
        if match and match[2].startswith(PREFIX.encode()):
            found[match[2].decode("utf-8", "replace")] = int(match[1])
    return found


def _without(assignments: Sequence[bytes], slots: Iterable[int]) -> list[bytes]:
    gone = {str(slot).encode() for slot in slots}
    return [assignment for assignment in assignments if _number(assignment) not in gone]


def _source(name: str) -> str:
    """What an action does, as the body of a Lua function."""
    file = "bridge.lua" if name == BRIDGE else "request.lua"
    values = {"MAILBOX": str(mailbox()), "WHAT": "fill" if name == FILL else "split"}
    head = "".join(f"local {key} = {quoted(value)}\n" for key, value in values.items())
    return head + lua_text(file)


def _entry(slot: int, name: str, body: str) -> bytes:
    script = (
        f'ardour {{ ["type"] = "EditorAction", name = {quoted(name)}, author = "Backline" }}\n'
        f"function factory () return function ()\n{body}end end\n"
    )
    factory = f"return function ()\n{body}end"
    lines = (
        f"scripts[{slot}] = {{}}",
        f'scripts[{slot}]["n"] = {quoted(name)}',
        f'scripts[{slot}]["s"] = {quoted(script)}',
        f'scripts[{slot}]["f"] = {quoted(factory)}',
        f'scripts[{slot}]["a"] = {{}}',
    )
    return "".join(line + " " for line in lines).encode("utf-8", "surrogateescape")


def lua_text(name: str) -> str:
    """One of the files of plugin_host/lua."""
    return (resources.files("plugin_host") / "lua" / name).read_text("utf-8")


def quoted(text: str) -> str:
    """A string as Lua writes it with %q."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\\n").replace("\r", "\\13")
    return '"' + escaped.replace("\0", "\\0") + '"'
