"""The protocol as tables: what docs/osc.md promises, and the checks of a request before anything is done."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.osc import Message, Value, write_message

VERSION = "1"
PORT = 9123
TOPICS = ("jobs", "model", "tracks", "tempo", "transport")
ENDED = ("done", "cancelled", "error")
PRIORITIES = ("live", "batch")

# Every request: its arguments in order ("[...]" may be left out, "options" are pairs) and what answers it.
REQUESTS: dict[str, tuple[str, str]] = {
    "/backline/hello": ("s client, [i reply_port]", "/backline/welcome"),
    "/backline/job/generate": ("s id, f seconds, options", "/backline/job/accepted"),
    "/backline/job/fill": ("s id, s folder, s armed, options", "/backline/job/accepted"),
    "/backline/job/split": ("s id, s mix, options", "/backline/job/accepted"),
    "/backline/job/continue": ("s id, s source, f seconds, options", "/backline/job/accepted"),
    "/backline/job/status": ("s id", "/backline/job/state"),
    "/backline/job/cancel": ("s id", "/backline/job/state"),
    "/backline/job/fetched": ("s id", "/backline/job/state"),
    "/backline/job/list": ("[i offset], [i count]", "/backline/job/listed"),
    "/backline/model/list": ("", "/backline/model/listed"),
    "/backline/model/load": ("s name", "/backline/model/state"),
    "/backline/model/unload": ("", "/backline/model/state"),
    "/backline/track/arm": ("s track, i armed", "/backline/track/armed"),
    "/backline/track/rename": ("s track, s name", "/backline/track/renamed"),
    "/backline/track/mute": ("s track, i muted", "/backline/track/muted"),
    "/backline/track/remove": ("s track", "/backline/track/removed"),
    "/backline/tempo/set": ("f bpm, [i beats_per_bar]", "/backline/tempo/is"),
    "/backline/transport/set": ("s state, f seconds", "/backline/transport/is"),
    "/backline/subscription/add": ("s topic", "/backline/subscription/added"),
    "/backline/subscription/remove": ("s topic", "/backline/subscription/removed"),
}

# Every message of the daemon: its arguments in order; "..." repeats what stands before it in brackets.
REPLIES: dict[str, str] = {
    "/backline/welcome": "s version, s backline, s state, s model, s device, s provider, s note, s root, "
    "[s capability]...",
    "/backline/error": "s code, s sentence, s address, s id",
    "/backline/job/accepted": "s id, s state, i position",
    "/backline/job/progress": "s id, s phase, f fraction",
    "/backline/job/heartbeat": "s id, s state, f seconds",
    "/backline/job/take": "s id, i take, s folder, [s stem, s path]...",
    "/backline/job/done": "s id, s folder, i takes, f seconds, s provider, s note",
    "/backline/job/cancelled": "s id",
    "/backline/job/error": "s id, s code, s sentence",
    "/backline/job/state": "s id, s task, s state, s phase, f fraction, i fetched",
    "/backline/job/listed": "i sent, i total",
    "/backline/model/entry": "s name, s version, s state, s note",
    "/backline/model/listed": "i count",
    "/backline/model/state": "s name, s state, s provider, s note",
    "/backline/track/armed": "s track, i armed",
    "/backline/track/renamed": "s track, s name",
    "/backline/track/muted": "s track, i muted",
    "/backline/track/removed": "s track",
    "/backline/tempo/is": "f bpm, i beats_per_bar",
    "/backline/transport/is": "s state, f seconds",
    "/backline/subscription/added": "s topic",
    "/backline/subscription/removed": "s topic",
}

# Options of job requests: type and the tasks that take them. "stem:" is followed by the stem's name.
ALL_TASKS = ("generate", "fill", "split", "continue")
PLAYING = ("generate", "fill", "continue")
OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text": ("s", PLAYING),
    "audio": ("s", PLAYING),
    "bpm": ("f", PLAYING),
    "chords": ("s", PLAYING),
    "beats_per_bar": ("i", PLAYING),
    "first_beat": ("f", PLAYING),
    "free": ("i", ("generate",)),
    "takes": ("i", ALL_TASKS),
    "seed": ("i", ALL_TASKS),
    "quality": ("s", ALL_TASKS),
    "steps": ("i", ALL_TASKS),
    "sampler": ("s", ALL_TASKS),
    "guidance": ("f", PLAYING),
    "stem:": ("s", ("fill",)),
    "silent": ("s", ("fill",)),
    "other": ("s", ("fill",)),
    "method": ("s", ("split",)),
    "residual": ("i", ("split",)),
    "raw": ("i", ("split",)),
    "model": ("s", ALL_TASKS),
    "priority": ("s", ALL_TASKS),
    "shared": ("i", ALL_TASKS),
    "timeout": ("f", ALL_TASKS),
}
PATHS = ("folder", "mix", "source", "audio", "other", "stem:")  # arguments and options that are file names

# Pairs that any request may end with.
ENVELOPE = {"reply": "i", "token": "s"}

ERRORS: dict[str, str] = {
    "malformed": "the bytes are no OSC",
    "wildcard": "the address holds wildcards or spaces",
    "size": "a packet, string, bundle or list is too large",
    "unknown": "there is no such address",
    "arguments": "the number of arguments, or an option's name, is wrong",
    "type": "an argument has the wrong type",
    "value": "an argument is out of range, not finite, or names nothing that there is",
    "path": "a file is not in the job root or an allowed folder, or cannot be read",
    "token": "this daemon asks for a token",
    "rate": "too many new jobs from this sender: try again in a second",
    "busy": "the queue is full: try again when a job has ended",
    "full": "results that nobody has fetched fill the room for them",
    "disk": "the disk is full, or does not take the files",
    "conflict": "this id belongs to another job",
    "gone": "there is no job of this id",
    "request": "the engine cannot meet this request: the sentence says why",
    "memory": "the memory does not suffice, even for one take at a time",
    "timeout": "the job took longer than its time-out",
    "worker": "the engine's process died or did not start; it is started again",
    "restarted": "the daemon was restarted while the job waited or ran",
    "internal": "a bug: the log has more",
}

RANGES: dict[str, tuple[float, float]] = {
    "reply_port": (0, 65535),
    "reply": (1, 65535),
    "seconds": (0, 1e7),
    "bpm": (10, 1000),
    "beats_per_bar": (1, 32),
    "first_beat": (-1e6, 1e6),
    "takes": (1, 16),
    "seed": (0, 2**63 - 17),
    "steps": (1, 100000),
    "guidance": (0, 1000),
    "timeout": (0.1, 86400),
    "armed": (0, 1),
    "muted": (0, 1),
    "residual": (0, 1),
    "shared": (0, 1),
    "raw": (0, 1),
    "free": (0, 1),
    "offset": (0, 2**31 - 1),
    "count": (1, 64),
}
LENGTHS = {"text": 2000, "chords": 4000, "token": 512} | dict.fromkeys(PATHS, 4000)
MAX_TEXT = 200  # characters of any other string
CHOICES = {
    "state": ("stopped", "rolling", "recording"),
    "topic": TOPICS,
    "priority": PRIORITIES,
    "method": ("mask", "dirac", "gaussian"),
    "quality": ("draft", "normal", "best"),
}
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


class Refused(Exception):
    """A request that is answered with an error; `code` is one of ERRORS, `str()` a sentence."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Parameter:
    """One argument of a request: its type letter, its name, and whether it may be left out."""

    tag: str
    name: str
    optional: bool


def parameters(signature: str) -> list[Parameter]:
    """ "s client, [i reply_port]" as parameters; "options" is none of them."""
    parts = [part.strip() for part in signature.split(",")]
    words = [
        (part.strip("[]").split(), part.startswith("[")) for part in parts if part not in ("", "options")
    ]
    return [Parameter(tag, name, optional) for (tag, name), optional in words]


def take_envelope(message: Message) -> tuple[Message, dict[str, Any]]:
    """The message without the pairs that any request may end with, and these. Raises Refused."""
    arguments, tags = list(message.arguments), message.tags
    envelope: dict[str, Any] = {}
    while len(arguments) >= 2 and tags[-2] == "s" and arguments[-2] in ENVELOPE:
        name = str(arguments[-2])
        if (tags[-1] == "s") != (ENVELOPE[name] == "s") or name in envelope:
            break
        envelope[name] = _checked(ENVELOPE[name], name, tags[-1], arguments[-1])
        arguments, tags = arguments[:-2], tags[:-2]
    return Message(message.address, tags, tuple(arguments)), envelope


def check_request(message: Message) -> dict[str, Any]:
    """The request's arguments and options by name. Raises Refused with the first thing that is wrong.

    What may be left out and is, is not in the result; "id" is a job's name that can be a folder's.
    """
    if message.address not in REQUESTS:
        raise Refused("unknown", f"There is no address {_shown(message.address)}.")
    signature = REQUESTS[message.address][0]
    wanted = parameters(signature)
    needed = sum(not parameter.optional for parameter in wanted)
    given = len(message.arguments)
    takes_options = signature.endswith("options")
    if given < needed or (given > len(wanted) and not takes_options):
        raise Refused("arguments", f"{message.address} takes: {signature or 'no arguments'}; {given} came.")
    values: dict[str, Any] = {}
    for parameter, tag, value in zip(wanted, message.tags, message.arguments, strict=False):
        values[parameter.name] = _checked(parameter.tag, parameter.name, tag, value)
    if takes_options:
        task = message.address.rsplit("/", 1)[1]
        values |= _check_options(task, message.tags[needed:], message.arguments[needed:])
    return values


def _check_options(task: str, tags: str, arguments: Sequence[Value]) -> dict[str, Any]:
    if len(arguments) % 2:
        raise Refused("arguments", "Options are pairs of a name and a value; the last one has no value.")
    values: dict[str, Any] = {}
    for place in range(0, len(arguments), 2):
        name = str(arguments[place])
        known = "stem:" if name.startswith("stem:") else name
        if tags[place] != "s" or task not in OPTIONS.get(known, ("", ()))[1]:
            names = ", ".join(option for option, (_, tasks) in OPTIONS.items() if task in tasks)
            raise Refused("arguments", f"There is no option {_shown(name)} of {task}; there are: {names}.")
        if name in values:
            raise Refused("arguments", f"The option {_shown(name)} is given twice.")
        values[name] = _checked(OPTIONS[known][0], known, tags[place + 1], arguments[place + 1])
    return values


def _checked(wanted: str, name: str, tag: str, value: Value) -> Value:
    """A value of the wanted type and within its range: numbers may come as any number that fits."""
    if (wanted == "s") != isinstance(value, str):
        raise Refused("type", f"{name} must be {'a string' if wanted == 's' else 'a number'}.")
    if isinstance(value, str):
        return _checked_text(name, value)
    if not math.isfinite(value):
        raise Refused("value", f"{name} must be finite.")
    if wanted == "i" and value != int(value):
        raise Refused("type", f"{name} must be a whole number.")
    low, high = RANGES[name]
    if not low <= value <= high:
        raise Refused("value", f"{name} must be {low:g} to {high:g}, not {value:g}.")
    if tag == "f" and wanted == "f":
        value = float(f"{value:.7g}")  # 0.1 and not 0.10000000149: what a 32-bit float was meant to say
    return int(value) if wanted == "i" else float(value)


def _checked_text(name: str, value: str) -> str:
    limit = LENGTHS.get(name, MAX_TEXT)
    if len(value) > limit:
        raise Refused("size", f"{name} has {len(value)} characters; at most {limit} are taken.")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise Refused("value", f"{name} must not hold control characters.")
    if name in CHOICES and value not in CHOICES[name]:
        raise Refused("value", f"{name} must be one of {', '.join(CHOICES[name])}.")
    if name == "id" and not JOB_ID.match(value):
        raise Refused("value", "id must be 1 to 64 letters, digits, dots, dashes or underscores.")
    if name in ("client", "track", "armed") and not value:
        raise Refused("value", f"{name} must not be empty.")
    return value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")


def reply(address: str, *arguments: Value) -> bytes:
    """The bytes of a message of the daemon, its arguments typed as REPLIES says."""
    parts = [part.strip() for part in REPLIES[address].split(", ")]
    tags = [part.strip("[].").split()[0] for part in parts if not part.startswith("[")]
    more = re.search(r"\[(.*)\]\.\.\.", REPLIES[address])
    if more:
        tags = [part.split()[0] for part in REPLIES[address][: more.start()].split(", ") if part]
        repeated = [part.split()[0] for part in more.group(1).split(", ")]
        while len(tags) < len(arguments):
            tags += repeated
    return write_message(address, "".join(tags), arguments)


def named(address: str, arguments: Sequence[Value]) -> Mapping[str, Any]:
    """A daemon's message by the names of REPLIES; what repeats is the list `more`."""
    head = REPLIES[address].split("[")[0]
    names = [part.split()[1] for part in head.split(", ") if part.strip()]
    values: dict[str, Any] = dict(zip(names, arguments, strict=False))
    if "[" in REPLIES[address]:
        values["more"] = list(arguments[len(names) :])
    return values
