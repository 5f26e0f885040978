"""Every row of docs/osc.md over real sockets: python-osc and liblo's oscsend and oscdump, UDP and TCP."""

from __future__ import annotations

import queue
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import soundfile
from command import noise, write_song
from daemon_process import Running, daemon, free_port
from pythonosc.osc_message import OscMessage
from pythonosc.osc_message_builder import OscMessageBuilder
from pythonosc.tcp_client import SimpleTCPClient
from pythonosc.udp_client import SimpleUDPClient
from test_osc_protocol import example, requests

from bridge.osc import Message
from bridge.protocol import OPTIONS, REPLIES, REQUESTS, named

Heard = tuple[str, str, list[Any]]  # address, type tags, arguments
RESEND = 1.0  # seconds
# An Ardour of another test goes on telling ports whose sockets are gone, and one may be given out again.
OURS = "/backline/"
HAVE_LIBLO = shutil.which("oscsend") is not None and shutil.which("oscdump") is not None


class Way:
    """A way to speak to the daemon: `send` a message, and what comes back is in `inbox`."""

    def __init__(self, send: Callable[[Message], None], inbox: queue.Queue[Heard]):
        self.send, self.inbox = send, inbox


def build(message: Message) -> Any:
    builder = OscMessageBuilder(message.address)
    for tag, value in zip(message.tags, message.arguments, strict=True):
        builder.add_arg(value, tag)
    return builder.build()


def tags_of(message: OscMessage) -> str:
    kinds = {str: "s", int: "i", float: "f"}
    return "".join(kinds[type(value)] for value in message.params)


@contextmanager
def python_osc_udp(port: int) -> Iterator[Way]:
    client = SimpleUDPClient("127.0.0.1", port)
    inbox: queue.Queue[Heard] = queue.Queue()
    with reader(lambda: [client.receive(timeout=0.2)], inbox):
        yield Way(lambda message: client.send(build(message)), inbox)


@contextmanager
def python_osc_tcp(port: int, mode: str) -> Iterator[Way]:
    client = SimpleTCPClient("127.0.0.1", port, mode=mode)
    inbox: queue.Queue[Heard] = queue.Queue()
    with reader(lambda: client.receive(timeout=0.2), inbox):
        yield Way(lambda message: client.send(build(message)), inbox)
    client.close()


@contextmanager
def reader(receive: Callable[[], list[bytes]], inbox: queue.Queue[Heard]) -> Iterator[None]:
    """Puts what `receive` returns into the inbox until the block ends."""
    going = True

    def read() -> None:
        while going:
            for packet in receive():
                message = OscMessage(packet) if packet else None
                if message and message.address.startswith(OURS):
                    inbox.put((message.address, tags_of(message), message.params))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        going = False
        thread.join()


@contextmanager
def liblo(port: int, scheme: str) -> Iterator[Way]:
    """oscsend closes its socket at once, so the answers go to an oscdump: every request ends with `reply`."""
    listening = free_port()
    inbox: queue.Queue[Heard] = queue.Queue()
    dump = subprocess.Popen(["oscdump", "-L", str(listening)], stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert dump.stdout is not None
        for line in dump.stdout:
            if line.split(" ")[1].startswith(OURS):
                inbox.put(parse_dump(line))

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.2)

    def send(message: Message) -> None:
        words = [str(value) for value in message.arguments]
        command = [
            "oscsend",
            f"osc.{scheme}://127.0.0.1:{port}",
            message.address,
            message.tags + "si",
            *words,
        ]
        subprocess.run([*command, "reply", str(listening)], check=True)

    try:
        yield Way(send, inbox)
    finally:
        dump.terminate()
        thread.join()


def parse_dump(line: str) -> Heard:
    """A line of oscdump: timetag, address, type tags, arguments with strings in quotes."""
    _, address, tags, rest = [*line.rstrip("\n").split(" ", 3), ""][:4]
    patterns = {"s": '"(.*?)"', "i": r"(-?\d+)", "f": r"(-?[\d.]+)"}
    found = re.fullmatch(" ".join(patterns[tag] for tag in tags), rest)
    assert found, line
    casts: dict[str, Callable[[str], Any]] = {"s": str, "i": int, "f": float}
    return address, tags, [casts[tag](word) for tag, word in zip(tags, found.groups(), strict=True)]


needs_liblo = pytest.mark.skipif(not HAVE_LIBLO, reason="liblo-tools (oscsend, oscdump) are not installed")
WAYS = [
    pytest.param(python_osc_udp, id="python-osc UDP"),
    pytest.param(lambda port: python_osc_tcp(port, "1.0"), id="python-osc TCP, lengths"),
    pytest.param(lambda port: python_osc_tcp(port, "1.1"), id="python-osc TCP, SLIP"),
    pytest.param(lambda port: liblo(port, "udp"), id="oscsend UDP", marks=needs_liblo),
    pytest.param(lambda port: liblo(port, "tcp"), id="oscsend TCP", marks=needs_liblo),
]


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_song(tmp_path_factory.mktemp("songs") / "one", ("bass", "drums", "guitar"))
    soundfile.write(folder / "mix.wav", noise(3.0), 22050, "FLOAT")
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, song: Path) -> Iterator[Running]:
    with daemon(tmp_path_factory.mktemp("daemon") / "root", tiny_bundle, "--allow", song.parent) as started:
        yield started


class Conversation:
    """What was heard, and waiting for more of it; a request without an answer is sent again."""

    def __init__(self, way: Way):
        self.way = way
        self.heard: list[Heard] = []

    def until(self, wanted: Callable[[Heard], bool], seconds: float = 10.0) -> Heard | None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.heard.append(self.way.inbox.get(timeout=max(0.01, deadline - time.monotonic())))
            except queue.Empty:
                return None
            if wanted(self.heard[-1]):
                return self.heard[-1]
        return None

    def ask(self, message: Message, answer: str) -> Heard:
        for _ in range(4):
            self.way.send(message)
            found = self.until(lambda heard: heard[0] in (answer, "/backline/error"), RESEND)
            if found:
                assert found[0] == answer, (message, found)
                return found
        raise AssertionError(f"{message} was not answered by {answer}; heard: {self.heard[-8:]}")

    def end(self, job: str) -> str:
        ends = ("/backline/job/done", "/backline/job/cancelled", "/backline/job/error")
        past = [heard for heard in self.heard if heard[0] in ends and heard[2][0] == job]
        found = past[0] if past else self.until(lambda heard: heard[0] in ends and heard[2][0] == job, 30.0)
        assert found, (job, self.heard[-8:])
        return found[0].rsplit("/", 1)[1]


@pytest.mark.parametrize("way", WAYS)
def test_every_row_of_the_docs(
    way: Callable[[int], Any], running: Running, song: Path, request: pytest.FixtureRequest
) -> None:
    name = re.sub(r"\W+", "-", request.node.callspec.id)
    words = {word: f"{word}-{name}" for word in ("band1", "take1", "stems1", "more1")}
    words |= {"/songs/one": str(song), "/songs/one/mix.wav": str(song / "mix.wav")}
    with ExitStack() as stack:
        talk = Conversation(stack.enter_context(way(running.port)))
        talk.ask(Message("/backline/subscription/add", "s", ("model",)), "/backline/subscription/added")
        for row in requests():
            if row[0] == "/backline/job/fetched":
                assert talk.end(words["take1"]) == "done"
            talk.ask(example(row, **words), REQUESTS[row[0]][1])
        assert talk.end(words["band1"]) in ("done", "cancelled")
        for job in ("take1", "stems1", "more1"):
            assert talk.end(words[job]) == "done"
        # The rows that a good day does not have.
        talk.way.send(Message("/backline/job/status", "s", (f"nobody-{name}",)))
        assert talk.until(lambda heard: heard[0] == "/backline/error" and heard[2][0] == "gone")
        talk.ask(Message("/backline/job/fill", "sss", (f"bad-{name}", str(song), "kazoo")), ACCEPTED)
        assert talk.end(f"bad-{name}") == "error"
        talk.ask(Message("/backline/job/generate", "sf", (f"long-{name}", 1800.0)), ACCEPTED)
        assert talk.until(
            lambda heard: heard[0] == "/backline/job/heartbeat" and heard[2][0] == f"long-{name}"
        )
        talk.ask(Message("/backline/job/cancel", "s", (f"long-{name}",)), "/backline/job/state")
        assert talk.end(f"long-{name}") == "cancelled"
        refuse_what_is_wrong(talk, song, name, f"{words['take1']}")
        use_every_option(talk, song, name)
    assert set(REPLIES) - {heard[0] for heard in talk.heard} == set()
    for address, tags, arguments in talk.heard:
        assert fits(tags, REPLIES[address]), (address, tags, arguments)
    takes = [named(address, values) for address, _, values in talk.heard if address == "/backline/job/take"]
    done = next(take for take in takes if take["id"] == words["take1"])
    assert done["more"][0] == "piano"
    sound = soundfile.info(done["more"][1])
    assert (sound.samplerate, sound.frames, sound.subtype) == (22050, 3 * 22050, "FLOAT")


def refuse_what_is_wrong(talk: Conversation, song: Path, name: str, used: str) -> None:
    """The errors that a single request can bring about."""
    for code, message in {
        "unknown": Message("/backline/nothing", "s", ("me",)),
        "arguments": Message("/backline/job/status", "", ()),
        "type": Message("/backline/tempo/set", "s", ("fast",)),
        "value": Message("/backline/job/generate", "sf", (f"x-{name}", 0.5)),
        "size": Message("/backline/track/rename", "ss", ("1", "x" * 300)),
        "path": Message("/backline/job/split", "ss", (f"x-{name}", "/etc/passwd")),
        "gone": Message("/backline/job/cancel", "s", (f"x-{name}",)),
        "conflict": Message("/backline/job/fill", "sss", (used, str(song), "guitar")),
    }.items():
        talk.way.send(message)
        found = talk.until(lambda heard: heard[0] == "/backline/error")
        assert found, (message, talk.heard[-4:])
        assert (found[2][0], found[2][2]) == (code, message.address)


def use_every_option(talk: Conversation, song: Path, name: str) -> None:
    """One job of each task with every option that it takes."""
    values: dict[str, tuple[str, object]] = {
        "text": ("s", "warm piano"),
        "audio": ("s", str(song / "bass.wav")),
        "bpm": ("f", 120.0),
        "chords": ("s", "C | Am"),
        "beats_per_bar": ("i", 3),
        "first_beat": ("f", 0.25),
        "takes": ("i", 2),
        "seed": ("i", 7),
        "quality": ("s", "draft"),
        "steps": ("i", 2),
        "sampler": ("s", "ddim"),
        "guidance": ("f", 2.0),
        "stem:": ("s", str(song / "drums.wav")),
        "silent": ("s", "bass"),
        "other": ("s", str(song / "mix.wav")),
        "method": ("s", "dirac"),
        "residual": ("i", 1),
        "raw": ("i", 0),
        "free": ("i", 1),
        "model": ("s", ""),
        "priority": ("s", "live"),
        "shared": ("i", 1),
        "timeout": ("f", 60.0),
    }
    assert set(values) == set(OPTIONS)
    first: dict[str, tuple[str, tuple[object, ...]]] = {
        "generate": ("sf", (1.5,)),
        "fill": ("sss", ("", "piano")),
        "split": ("ss", (str(song / "mix.wav"),)),
        "continue": ("ssf", (str(song), 1.5)),
    }
    for task, (tags, arguments) in first.items():
        words: list[object] = [f"all-{task}-{name}", *arguments]
        for option, (tag, value) in values.items():
            if task in OPTIONS[option][1]:
                words += ["stem:drums" if option == "stem:" else option, value]
                tags += "s" + tag
        talk.ask(Message(f"/backline/job/{task}", tags, tuple(words)), ACCEPTED)  # type: ignore[arg-type]
        assert talk.end(f"all-{task}-{name}") == "done", talk.heard[-3:]


ACCEPTED = "/backline/job/accepted"


def fits(tags: str, signature: str) -> bool:
    """Whether type tags are those of a row: whole numbers may be written as i, others as f."""
    head, _, more = signature.partition("[")
    first = "".join(part.split()[0] for part in head.split(", ") if part.strip())
    repeated = "".join(part.split()[0] for part in more.split("]")[0].split(", ")) if more else ""
    return re.fullmatch(f"{first}({repeated})*" if more else first, tags) is not None


def test_signatures_are_compared_with_care() -> None:
    assert fits("sis", "s id, i take, s folder, [s stem, s path]...")
    assert fits("sisssss", "s id, i take, s folder, [s stem, s path]...")
    assert not fits("siss", "s id, i take, s folder, [s stem, s path]...")
    assert not fits("ss", "s id")
