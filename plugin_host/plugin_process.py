"""A process that holds one external plugin: plugin_host.plugins starts it, so that none can hurt the host.

`python plugin_process.py FOLDER` reads FOLDER/request.json (Request, below, as a dictionary) and, where there
is one, FOLDER/in.npy (channels, n); it writes FOLDER/out.npy and then FOLDER/reply.json. Nothing is said on
standard output: plugins print what they like there. It ends itself when the time is up, also when the host is
no longer there to end it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

PROBE = 512  # samples of silence a plugin is tried with
BUFFER = 8192
# What plugins made with DPF show as parameters: the host's own affairs, not to be touched.
HOST_PARAMETERS = ("buffer_size_frames", "sample_rate_frames", "latency_frames", "current_program")


class Request(TypedDict):
    """path, name: the VST3 and which of its plugins (None: the only one). preset: a file, or None.

    parameters: set after the preset. rate: Hz. buffer: samples. seconds: when to give up.
    """

    path: str
    name: str | None
    preset: str | None
    parameters: dict[str, bool | float | str]
    rate: int
    buffer: int
    seconds: float


def set_parameters(plugin: Any, values: dict[str, bool | float | str], names: list[str]) -> None:
    """Set parameters by name. Raises ValueError, a sentence, for a name or value it does not take."""
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{name} is none of its parameters ({', '.join(names)})")
        try:
            setattr(plugin, name, value)
        except TypeError as error:
            raise ValueError(f"{name} takes a number, not {value!r}") from error
        except Exception as error:  # pedalboard raises several
            raise ValueError(f"{name} cannot be {value}: {error}") from error


def adapted(
    make: Callable[[], Any], samples: NDArray[np.float32], rate: int, buffer: int = BUFFER
) -> NDArray[np.float32]:
    """(channels, n) through a plugin, whatever channels it takes, aligned to the sample; n stays.

    A plugin that takes one channel gets every channel by itself, one that takes two gets pairs, or one
    channel twice, and then a single channel becomes two. pedalboard takes out the latency a plugin reports.
    """
    channels, length = samples.shape
    groups = [[*range(channels)], *([[0]] if channels > 1 else []), [0, 0 if channels == 1 else 1]]
    for group in groups:
        plugin = make()
        try:
            plugin.process(np.zeros((len(group), PROBE), np.float32), rate, buffer, True)
        except ValueError as error:
            refused = error
            continue
        break
    else:
        raise refused
    if group == [*range(channels)]:
        parts = [plugin.process(samples, rate, buffer, True)]
    elif len(group) == 1:
        parts = [make().process(samples[i : i + 1], rate, buffer, True) for i in range(channels)]
    else:
        pairs = [samples[[i, min(i + 1, channels - 1)]] for i in range(0, channels, 2)]
        parts = [make().process(pair, rate, buffer, True) for pair in pairs]
    result = np.concatenate(parts)
    if channels > 1:
        result = result[:channels]
    if result.shape[1] != length:
        raise ValueError(f"it gave {result.shape[1]} samples for {length}")
    if not np.isfinite(result).all():
        raise ValueError("it gave NaN or infinite samples")
    return result.astype(np.float32, copy=False)


def main(folder: Path) -> None:
    request: Request = json.loads((folder / "request.json").read_text("utf-8"))
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even where a plugin never returns
        signal.alarm(int(request["seconds"]) + 5)
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply = _reply(folder, request)
    temporary = folder / "reply.part"
    temporary.write_text(json.dumps(reply), "utf-8")
    temporary.replace(folder / "reply.json")


def _reply(folder: Path, request: Request) -> dict[str, Any]:
    from pedalboard import load_plugin

    def make() -> Any:
        plugin: Any = load_plugin(request["path"], plugin_name=request["name"])
        if request["preset"]:
            plugin.load_preset(request["preset"])
        set_parameters(plugin, request["parameters"], _parameters(plugin))
        return plugin

    try:
        if (folder / "in.npy").exists():
            samples = np.load(folder / "in.npy", mmap_mode="r")
            np.save(folder / "out.npy", adapted(make, samples, request["rate"], request["buffer"]))
            return {}
        plugin = make()
        if not plugin.is_effect:
            return {"error": "it is an instrument, not an effect"}
        # A plugin takes its parameters over as it processes: a preset taken before holds the old ones.
        adapted(lambda: plugin, np.zeros((2, PROBE), np.float32), request["rate"])
        (folder / "preset").write_bytes(plugin.preset_data)
        return {
            "name": plugin.name,
            "maker": plugin.manufacturer_name,
            "version": plugin.version,
            "latency": plugin.reported_latency_samples,
            "parameters": [_described(plugin, name) for name in _parameters(plugin)],
        }
    except Exception as error:  # whatever a plugin does wrong is the host's to tell
        return {"error": " ".join(str(error).split())[:400] or type(error).__name__}


def _parameters(plugin: Any) -> list[str]:
    return [name for name in plugin.parameters if name not in HOST_PARAMETERS]


def _described(plugin: Any, name: str) -> dict[str, Any]:
    """Name, value, unit and range of a parameter, as plain values."""
    parameter = plugin.parameters[name]
    value = parameter.string_value if parameter.type is str else parameter.type(getattr(plugin, name))
    low, high = parameter.range[:2]
    return {
        "name": name,
        "value": value,
        "unit": parameter.label or "",
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "choices": list(parameter.valid_values) if parameter.type is str else [],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
