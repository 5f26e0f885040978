"""Chains of effects: pedalboard's own in this process, VST3s in a process each, with a time limit.

Whatever a plugin does (crash, hang, refuse, return NaN), the chain goes on without it and says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.audio import Audio
from engine.errors import BacklineError, UsageError
from plugin_host import plugin_process
from plugin_host.plugin_process import BUFFER, Request, adapted, set_parameters
from plugin_host.session_file import Parameter, PluginState, write_bytes

PROCESS = Path(plugin_process.__file__)
SECONDS = 30.0  # a plugin may take to load and process, and as long again as the sound lasts
BUILT_IN = (
    "Bitcrush",
    "Chorus",
    "Clipping",
    "Compressor",
    "Delay",
    "Distortion",
    "Gain",
    "HighShelfFilter",
    "HighpassFilter",
    "Invert",
    "LadderFilter",
    "Limiter",
    "LowShelfFilter",
    "LowpassFilter",
    "NoiseGate",
    "PeakFilter",
    "Phaser",
    "PitchShift",
    "Reverb",
)
PRESET_SUFFIX = ".vstpreset"


@dataclass(frozen=True)
class Bypassed:
    """A plugin that was left out of a chain, and why: "timeout", "crash" or "error"."""

    plugin: str
    reason: str
    sentence: str


@dataclass(frozen=True)
class Control:
    """A parameter as a plugin shows it: low and high are None where it has choices instead."""

    name: str
    value: Parameter
    unit: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a plugin is. latency: samples, which processing takes out again."""

    name: str
    maker: str
    version: str
    latency: int
    controls: tuple[Control, ...]


class PluginFailed(BacklineError):
    """A plugin that could not be used; `reason` as in Bypassed."""

    def __init__(self, plugin: str, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.bypassed = Bypassed(plugin, reason, sentence)


def run_chain(
    plugins: Sequence[PluginState],
    audio: Audio,
    *,
    presets: Path,
    buffer: int = BUFFER,
    seconds: float | None = None,
    bypassed: Callable[[Bypassed], None],
) -> Audio:
    """Audio through the enabled plugins in order; its length stays, a stereo effect makes mono stereo.

    presets: the folder of their presets. buffer: samples they get at a time. seconds: how long each may
    take. One that fails is told to `bypassed` and left out.
    """
    for plugin in plugins:
        if not plugin.enabled:
            continue
        try:
            audio = run_plugin(plugin, audio, presets=presets, buffer=buffer, seconds=seconds)
        except PluginFailed as failed:
            bypassed(failed.bypassed)
    return audio


def run_plugin(
    plugin: PluginState, audio: Audio, *, presets: Path, buffer: int = BUFFER, seconds: float | None = None
) -> Audio:
    """Audio through one plugin. Raises PluginFailed."""
    if plugin.path is None:
        try:
            samples = adapted(lambda: _built_in(plugin), audio.samples, audio.sample_rate, buffer)
        except Exception as error:  # pedalboard raises several
            raise _failed(plugin.name, "error", f"failed: {_line(error)}") from error
        return Audio(samples, audio.sample_rate)
    with tempfile.TemporaryDirectory(prefix="backline-plugin-") as name:
        folder = Path(name)
        np.save(folder / "in.npy", np.ascontiguousarray(audio.samples, np.float32))
        limit = SECONDS + audio.seconds if seconds is None else seconds
        _ask(folder, plugin, presets, audio.sample_rate, buffer, limit)
        samples = np.load(folder / "out.npy")
    return Audio(samples, audio.sample_rate)


def describe(
    plugin: PluginState, *, presets: Path, rate: int = 44100, seconds: float = SECONDS
) -> tuple[Description, PluginState]:
    """What a plugin is with these parameters, and the plugin with its whole state kept in `presets`.

    Raises PluginFailed, also for a parameter it does not have.
    """
    if plugin.path is None:
        try:
            made = _built_in(plugin)
        except ValueError as error:
            raise _failed(plugin.name, "error", f"cannot be used so: {_line(error)}") from error
        controls = tuple(Control(name, _plain(getattr(made, name))) for name in _controls(made))
        return Description(plugin.name, "pedalboard", "", 0, controls), plugin
    with tempfile.TemporaryDirectory(prefix="backline-plugin-") as name:
        folder = Path(name)
        told = _ask(folder, plugin, presets, rate, BUFFER, seconds)
        data = (folder / "preset").read_bytes()
    preset = keep_preset(presets, data)
    controls = tuple(Control(**{**told_, "choices": tuple(told_["choices"])}) for told_ in told["parameters"])
    found = Description(
        str(told["name"]), str(told["maker"]), str(told["version"]), int(told["latency"]), controls
    )
    return found, plugin.model_copy(update={"preset": preset, "name": found.name})


def keep_preset(presets: Path, data: bytes) -> str:
    """Store the bytes of a .vstpreset under a name made of them; returns the name."""
    name = hashlib.sha256(data).hexdigest()[:24] + PRESET_SUFFIX
    if not (presets / name).exists():
        write_bytes(presets / name, data)
    return name


def find_plugin(word: str) -> PluginState:
    """A built-in effect by name, or a VST3 by its path or the name of its file. Raises UsageError."""
    for name in BUILT_IN:
        if name.casefold() == word.casefold():
            return PluginState(name=name)
    path = Path(word)
    if path.suffix.lower() == ".vst3":
        if not path.exists():
            raise UsageError(f"There is no plugin {word}.")
        return PluginState(name=path.stem, path=str(path.resolve()))
    for path in installed():
        if path.stem.casefold() == word.casefold():
            return PluginState(name=path.stem, path=str(path))
    own = ", ".join(BUILT_IN)
    raise UsageError(
        f"There is no effect {word!r}: it is none of {own}, and no VST3 of that name is installed."
    )


def installed() -> list[Path]:
    """The VST3s of this machine, by name."""
    import pedalboard

    found = cast(Any, pedalboard.VST3Plugin).installed_plugins  # which pedalboard's stubs do not have
    return sorted({Path(path) for path in found}, key=lambda path: path.stem.casefold())


def _built_in(plugin: PluginState) -> Any:
    """Raises ValueError for an effect or parameter there is not."""
    import pedalboard

    if plugin.name not in BUILT_IN:
        raise ValueError(f"there is no effect {plugin.name}")
    made = getattr(pedalboard, plugin.name)()
    values = dict(plugin.parameters)
    mode = getattr(type(made), "Mode", None)
    if mode is not None and isinstance(values.get("mode"), str):
        names = mode.__members__
        if values["mode"] not in names:
            raise ValueError(f"mode is one of {', '.join(names)}, not {values['mode']}")
        made.mode = names[str(values.pop("mode"))]
    set_parameters(made, values, _controls(made))
    return made


def _controls(made: Any) -> list[str]:
    hidden = ("is_effect", "is_instrument")
    kind = type(made)
    return [n for n in dir(kind) if n not in hidden and isinstance(getattr(kind, n), property)]


def _plain(value: Any) -> Parameter:
    """A built-in's value as JSON has it; an enumeration by its name."""
    if isinstance(value, bool | int | float | str):
        return value
    return str(getattr(value, "name", value))


def _ask(
    folder: Path, plugin: PluginState, presets: Path, rate: int, buffer: int, seconds: float
) -> dict[str, Any]:
    """Run the plugin's process on a folder; returns its reply. Raises PluginFailed."""
    request = Request(
        path=str(plugin.path),
        name=None,
        preset=str(presets / plugin.preset) if plugin.preset else None,
        parameters=dict(plugin.parameters),
        rate=rate,
        buffer=buffer,
        seconds=seconds,
    )
    (folder / "request.json").write_text(json.dumps(request), "utf-8")
    if not Path(str(plugin.path)).exists():
        raise _failed(plugin.name, "error", f"is not at {plugin.path} any more")
    command = [sys.executable, "-P", str(PROCESS), str(folder)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=os.name != "nt",
    )
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        raise _failed(plugin.name, "timeout", f"took longer than {seconds:g} s") from None
    finally:
        _end(child)
    try:
        reply: dict[str, Any] = json.loads((folder / "reply.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise _failed(plugin.name, "crash", f"crashed ({_ending(status)})") from None
    if "error" in reply:
        raise _failed(plugin.name, "error", f"failed: {reply['error']}")
    return reply


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a plugin's process, and what it may have started, whatever it does."""
    with contextlib.suppress(OSError):
        if os.name == "nt":
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _failed(name: str, reason: str, what: str) -> PluginFailed:
    return PluginFailed(name, reason, f"The plugin {name} {what.rstrip('.')}.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
