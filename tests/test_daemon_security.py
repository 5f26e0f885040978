"""Who may do what: files, tokens, rates, amplification, and datagrams from people who mean ill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from command import backline, noise, write_song
from daemon_process import Running, Talk, daemon, resident, start, stop, workers
from test_daemon_jobs import ACCEPTED, STATE

from bridge.client import connect, message_of
from bridge.daemon_net import Bounded, Bucket
from bridge.osc import write_message
from bridge.worker import _opened as opened
from engine.errors import BacklineError, UsageError

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_song(tmp_path_factory.mktemp("songs") / "one", ("bass", "drums"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, song: Path) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("daemon") / "root"
    with daemon(root, tiny_bundle, "--allow", song, "--queue", "900", "--keep-gb", "0.003") as started:
        yield started


@pytest.fixture
def talk(running: Running) -> Iterator[Talk]:
    speaking = Talk(running.port)
    yield speaking
    speaking.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text(TOKEN + "\n")
    (folder / "token").chmod(0o600)
    with _guarded(folder, tiny_bundle) as started:
        yield started


def _guarded(folder: Path, bundle: Path):  # type: ignore[no-untyped-def]
    @contextlib.contextmanager
    def run() -> Iterator[Running]:
        options = ("--token-file", folder / "token", "--host", "127.0.0.1")
        started = start(folder / "root", bundle, *options)
        speaking = Talk(started.port)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                speaking.send("/backline/hello", "me", "token", TOKEN)
                heard = speaking.hear(0.2)
                if heard and heard[1].get("state") == "loaded":
                    break
            yield started
        finally:
            speaking.close()
            stop(started)

    return run()


def test_files_outside_the_allowed_folders_are_refused(
    talk: Talk, running: Running, song: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, noise(1.5), 22050, "FLOAT")
    link = song / "link.wav"
    link.symlink_to(secret)
    outside = song / "outside"
    outside.symlink_to(tmp_path)
    names = (
        str(secret),
        str(song / ".." / "x.wav"),
        f"{song}/../../../../../etc/passwd",
        "relative.wav",
        "~/x.wav",
        str(link),
        str(outside / "secret.wav"),
        str(song) + "-and-more/mix.wav",
        "/etc/passwd",
        "/proc/self/mem",
        str(running.root / "state.sqlite"),
        str(running.root / "jobs" / ".." / "state.sqlite"),
        str(song / "missing.wav"),
    )
    for number, name in enumerate(names):
        talk.refused("/backline/job/split", f"evil{number}", name, code="path")
    talk.refused("/backline/job/fill", "evil", str(tmp_path), "piano", code="path")
    talk.refused("/backline/job/fill", "evil", str(song), "piano", "audio", str(secret), code="path")
    talk.refused("/backline/job/fill", "evil", "", "piano", "stem:bass", str(link), code="path")
    link.unlink()
    outside.unlink()


def test_a_link_inside_an_allowed_folder_does_not_lead_out_of_it(
    talk: Talk, song: Path, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "guitar.wav", noise(1.5), 22050, "FLOAT")
    (song / "guitar.wav").symlink_to(tmp_path / "guitar.wav")
    talk.ask("/backline/job/fill", "linked", str(song), "piano", answer=ACCEPTED)
    assert talk.end_of("linked") == "error"
    assert "not in the job root or a folder that was allowed" in talk.heard[-1][1]["sentence"]
    (song / "guitar.wav").unlink()


def test_a_file_swapped_for_a_link_after_the_check_is_not_followed(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "a.wav").write_bytes(b"fine")
    with opened(allowed / "a.wav", [allowed]) as path:
        assert path.read_bytes() == b"fine"
    (tmp_path / "secret").write_bytes(b"secret")
    (allowed / "b.wav").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="not in the job root"), opened(allowed / "b.wav", [allowed]):
        pass
    os.mkfifo(allowed / "pipe.wav")
    with pytest.raises(UsageError, match="is not a file"), opened(allowed / "pipe.wav", [allowed]):
        pass
    with pytest.raises(UsageError, match="cannot be opened"), opened(allowed / "none.wav", [allowed]):
        pass


def test_wildcards_and_replies_are_not_requests(talk: Talk) -> None:
    for address in ("/backline/*", "/*/hello", "/backline/hell?", "/backline/{hello,x}", "/backline/[a-z]*"):
        talk.raw(write_message(address, "s", ["me"]))
        assert talk.until("/backline/error", seconds=2)["code"] == "wildcard"
    for address in ("/backline/welcome", "/backline/error", "/backline/job/done"):
        talk.raw(write_message(address, "s", ["me"]))
    assert talk.hear(0.2) is None  # answers to answers could go round for ever


def test_timetags_are_not_waited_for(talk: Talk) -> None:
    hello = message_of("/backline/hello", ["me"])
    for timetag in (b"\xff" * 8, b"\0" * 8, b"\xee\xff\xff\xff\0\0\0\0"):
        started = time.monotonic()
        talk.raw(b"#bundle\0" + timetag + 2 * (struct.pack(">i", len(hello)) + hello))
        for _ in range(2):
            talk.until("/backline/welcome", seconds=2)
        assert time.monotonic() - started < 1


def test_new_jobs_are_limited_per_sender_but_hello_status_and_cancel_are_not(running: Running) -> None:
    talk, other = Talk(running.port), Talk(running.port)
    for number in range(60):
        talk.send("/backline/job/status", f"x{number}")  # uses up this sender's errors as well
    codes = []
    for number in range(60):
        talk.send("/backline/job/generate", f"flood{number}", 1800.0)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        heard = talk.hear(0.2)
        codes += [heard[0]] if heard else []
    accepted = codes.count(ACCEPTED)
    assert 40 <= accepted <= 55
    assert codes.count("/backline/error") <= 45  # of 60 and 20
    for _ in range(40):
        talk.ask("/backline/hello", "me", answer="/backline/welcome")
        talk.ask("/backline/job/status", "flood0", answer=STATE)
    assert other.ask("/backline/job/generate", "polite", 1.0, answer=ACCEPTED)["state"] == "queued"
    for number in range(60):
        talk.send("/backline/job/cancel", f"flood{number}")
    assert other.end_of("polite") == "done"
    talk.close()
    other.close()


def test_unfetched_results_fill_their_room_and_stay(running: Running) -> None:
    talk = Talk(running.port)
    size = 0
    for number in range(20):  # --keep-gb is 3 MB
        talk.send("/backline/job/generate", f"kept{number}", 8.0)
        heard = talk.until(ACCEPTED, "/backline/error")
        if heard.get("code") == "full":
            break
        assert talk.end_of(f"kept{number}") == "done"
        size += 1
    else:
        raise AssertionError("nothing filled up")
    assert size and all((running.root / "jobs" / f"kept{number}").is_dir() for number in range(size))
    for number in range(size):
        talk.ask("/backline/job/fetched", f"kept{number}", answer=STATE)
    deadline = time.monotonic() + 5
    while (running.root / "jobs" / "kept0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (running.root / "jobs" / "kept0").exists()
    talk.ask("/backline/job/generate", "room", 1.0, answer=ACCEPTED)
    assert talk.end_of("room") == "done"
    talk.ask("/backline/job/status", "kept0", answer=STATE)
    assert talk.until("/backline/job/done", id="kept0")["folder"] == ""
    talk.close()


def test_without_the_token_nothing_is_done_and_no_answer_is_longer_than_the_question(
    guarded: Running,
) -> None:
    talk = Talk(guarded.port)
    questions = [
        message_of("/backline/hello", ["me"]),
        message_of("/backline/hello", ["me", "token", "wrong-token-wrong-token"]),
        message_of("/backline/job/list", [0, 64]),
        message_of("/backline/job/generate", ["a", 1.0, "text", "x" * 500]),
        message_of("/backline/job/generate", ["a", 1.0, "reply", 9]),
        b"/",
        b"#bundle\0" + bytes(8) + struct.pack(">i", -4),
        b"/a\0\0,b\0\0" + bytes(600),
    ]
    answers = []
    for question in questions:
        talk.raw(question)
        talk.socket.settimeout(0.15)
        try:
            answers.append(talk.socket.recv(1 << 16))
        except TimeoutError:
            continue
        assert len(answers[-1]) <= len(question)
        assert b"token" in answers[-1] or b"malformed" in answers[-1] or b"type" in answers[-1]
    assert answers  # to the long ones
    assert talk.ask("/backline/hello", "me", "token", TOKEN, answer="/backline/welcome")["state"] == "loaded"
    assert talk.ask("/backline/job/list", answer="/backline/job/listed")["total"] == 0
    stranger = Talk(guarded.port)
    stranger.send("/backline/job/list")
    assert stranger.hear(0.2) is None
    stranger.close()
    talk.close()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_the_clients_speak_with_a_token(
    guarded: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    async def speak(token: str | None) -> str:
        async with connect(port=guarded.port, transport=transport, token=token) as client:
            return (await (await client.generate(1.0)).result()).provider

    assert asyncio.run(speak(TOKEN)) == "CPUExecutionProvider"
    monkeypatch.setattr("bridge.client.RESENDS", 2)
    with pytest.raises(BacklineError, match="does it ask for a token"):
        asyncio.run(speak(None))
    token_file = guarded.root.parent / "token"
    ran = backline(capsys, "send", "list", "--port", guarded.port, "--token-file", token_file, "--json")
    assert ran.status == 0 and ran.json["jobs"]


def test_a_tcp_connection_is_trusted_for_itself_only(guarded: Running) -> None:
    def speak(*packets: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", guarded.port)) as connection:
            for packet in packets:
                connection.sendall(struct.pack(">I", len(packet)) + packet)
            connection.settimeout(0.3)
            heard = b""
            try:
                while part := connection.recv(1 << 16):
                    heard += part
            except TimeoutError:
                pass
            return heard

    hello = message_of("/backline/hello", ["me", "token", TOKEN])
    listing = message_of("/backline/job/list", [])
    assert b"/backline/job/listed" in speak(hello, listing)
    assert speak(listing) == b""


def test_twenty_thousand_bad_datagrams_leave_the_daemon_as_it_was(running: Running, song: Path) -> None:
    """A short form of bench/daemon_fuzz.py."""
    rng = random.Random(5)
    talk, sender = Talk(running.port), socket.socket(type=socket.SOCK_DGRAM)
    (worker,) = workers(running)
    valid = [
        message_of("/backline/job/fill", ["evil", str(song), "piano", "bpm", 120.0]),
        message_of("/backline/job/status", ["nobody"]),
        message_of("/backline/hello", ["me", 9]),
    ]
    hang = b"#bundle\0" + bytes(8) + struct.pack(">i", -4)
    future = b"#bundle\0" + b"\xff" * 8 + struct.pack(">i", len(valid[1])) + valid[1]
    for _ in range(300):  # warm: the tables of senders are full
        with socket.socket(type=socket.SOCK_DGRAM) as short:
            short.sendto(hang, ("127.0.0.1", running.port))
    talk.ask("/backline/hello", "me", answer="/backline/welcome")
    before = resident(running.process.pid)
    waits = []
    for number in range(20000):
        packet = bytearray(rng.choice(valid))
        for _ in range(rng.randrange(1, 6)):
            packet[rng.randrange(len(packet))] = rng.choice((0, 255, 44, rng.randrange(256)))
        kind = number % 10
        data = (
            hang,
            future,
            rng.randbytes(rng.randrange(1, 99)),
            bytes(packet[: rng.randrange(1, len(packet))]),
        )
        sender.sendto(data[kind] if kind < 4 else bytes(packet), ("127.0.0.1", running.port))
        if number % 200 == 199:
            started = time.perf_counter()
            talk.ask("/backline/hello", "me", answer="/backline/welcome")
            waits.append(time.perf_counter() - started)
    assert sorted(waits)[97] < 0.1, sorted(waits)[-5:]
    assert resident(running.process.pid) - before < 20e6
    assert running.process.poll() is None and workers(running) == [worker]
    sender.close()
    talk.close()


def test_strange_tcp_streams_are_closed_and_others_go_on(running: Running, talk: Talk) -> None:
    for stream in (
        b"\x7f\xff\xff\xff" * 10,
        struct.pack(">I", 1 << 24) + b"x",
        struct.pack(">I", 1 << 20),
        b"\xc0/a\xdb\xdb\xc0",
        b"POST / HTTP/1.1\r\n\r\n\xc0" + message_of("/backline/job/generate", ["web", 1.0]) + b"\xc0",
    ):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(stream)
            connection.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):  # an error, then the end
                    pass
    talk.refused("/backline/job/status", "web", code="gone")
    many = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(80)]
    talk.ask("/backline/hello", "me", answer="/backline/welcome")
    for connection in many:
        connection.close()


def test_tables_are_bounded_and_forget_the_least_recent() -> None:
    table: Bounded[int] = Bounded(3)
    for key in "abc":
        table.put(key, 1)
    assert table.get("a") == 1
    table.put("d", 1)
    assert [key for key, _ in table.items()] == ["c", "a", "d"] and table.get("b") is None
    assert len(table) == 3


def test_a_bucket_fills_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = Bucket(rate=2.0, burst=3.0)
    assert [bucket.take() for _ in range(5)] == [True, True, True, False, False]
    now += 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 100.0
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
