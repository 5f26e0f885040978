"""`backline serve` and `backline send` as a user meets them, the log, and what memory that runs out means."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from command import backline, refused, write_song
from daemon_process import Running, Talk, daemon, free_port, start, stop, wait_loaded, workers
from tiny_bundle import write_tiny_bundle

from bridge import worker as worker_module
from bridge.logs import start_log
from bridge.store import make_root
from bridge.worker import Worker
from engine import model as model_module
from engine import windows
from engine.model import Model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[Running]:
    with daemon(tmp_path_factory.mktemp("daemon") / "root", tiny_bundle, "--verbose") as started:
        yield started


def test_check_looks_at_folder_port_and_model(
    capsys: Capture, tmp_path: Path, tiny_bundle: Path, running: Running
) -> None:
    free = free_port()
    asked = ("serve", "--check", "--root", tmp_path / "root", "--model", tiny_bundle)
    ran = backline(capsys, *asked, "--port", free)
    assert ran.status == 0 and "is free" in ran.out and "tiny 1" in ran.out and "problem" not in ran.out
    ran = backline(capsys, *asked, "--port", running.port)
    assert ran.status == 0 and "a daemon answers" in " ".join(ran.out.split())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free))
        taken.listen()
        ran = backline(capsys, *asked, "--port", free)
        assert ran.status == 1 and "problem" in ran.out
    (tmp_path / "file").write_text("")
    ran = backline(capsys, "serve", "--check", "--root", tmp_path / "file" / "x", "--port", free)
    assert ran.status == 1 and "problem" in ran.out


def test_the_unit_file_starts_what_was_asked_for(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my songs"
    folder.mkdir()
    arguments = ["serve", "--unit", "--allow", str(folder), "--port", "9200"]
    monkeypatch.setattr("sys.argv", ["backline", *arguments])
    unit = backline(capsys, *arguments).out
    line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert line.endswith(f'"-m" "bridge.cli" "serve" "--allow" "{folder}" "--port" "9200"')
    if shutil.which("systemd-analyze"):
        path = tmp_path / "backline.service"
        path.write_text(unit)
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--user", str(path)], capture_output=True, text=True
        )
        assert "backline.service" not in checked.stderr, checked.stderr


def test_other_machines_need_a_token_that_only_the_user_can_read(capsys: Capture, tmp_path: Path) -> None:
    refused(backline(capsys, "serve", "--host", "0.0.0.0"), 2, "lets other machines", "--token-file")
    token = tmp_path / "token"
    asked = ("serve", "--host", "0.0.0.0", "--token-file", token)
    refused(backline(capsys, *asked), 2, "cannot be read")
    token.write_text("0123456789abcdef")
    token.chmod(0o644)
    refused(backline(capsys, *asked), 2, "chmod 600")
    token.write_text("short")
    token.chmod(0o600)
    refused(backline(capsys, *asked), 2, "too short")
    refused(backline(capsys, "serve", "--allow", tmp_path / "none"), 1, "is not a folder")


def test_a_folder_with_other_things_in_it_is_not_taken_for_the_daemons(
    capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.wav").write_text("mine")
    refused(backline(capsys, "serve", "--root", tmp_path), 1, "is not empty")
    assert (tmp_path / "work" / "mine.wav").exists() and not (tmp_path / "jobs").exists()


def test_a_taken_port_is_said_in_a_sentence(tmp_path: Path, running: Running, tiny_bundle: Path) -> None:
    other = start(tmp_path / "root", tiny_bundle, port=running.port)
    assert other.process.wait(20) == 1
    errors = (tmp_path / "root.err").read_text().strip()
    assert errors.startswith("The daemon cannot listen on") and "Traceback" not in errors


def test_listening_beyond_this_machine_says_what_it_exposes(tmp_path: Path, tiny_bundle: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    running = start(tmp_path / "root", tiny_bundle, "--host", "0.0.0.0", "--token-file", token)
    try:
        deadline = time.monotonic() + 20
        while "not encrypted" not in (said := (tmp_path / "root.err").read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
    finally:
        stop(running)


def test_send_waits_and_prints_files(capsys: Capture, running: Running, tmp_path: Path) -> None:
    song = write_song(tmp_path / "song", ("bass", "drums"))
    at = ("--port", running.port)
    ran = backline(capsys, "send", "fill", song, "piano", "bpm=120", "seed=3", "--out", tmp_path / "out", *at)
    assert ran.status == 0 and ran.out.split() == [str(tmp_path / "out" / "piano.wav")]
    assert soundfile.info(tmp_path / "out" / "piano.wav").frames == 3 * 22050
    assert json.loads((tmp_path / "out" / "take.json").read_text())["seed"] == 3
    ran = backline(capsys, "send", "generate", 1, "takes=2", "--id", "g1", "--json", "--udp", *at)
    assert ran.json["id"] == "g1" and len(ran.json["files"]) == 10 and ran.json["provider"]
    ran = backline(capsys, "send", "generate", "1", "--no-wait", "--json", *at)
    assert ran.json["status"] == "accepted"
    assert backline(capsys, "send", "status", "g1", "--json", *at).json["state"] == "done"
    assert backline(capsys, "send", "fetched", "g1", "--json", *at).json["fetched"] == 1
    listed = backline(capsys, "send", "list", "--json", *at).json["jobs"]
    assert {"g1", ran.json["id"]} <= {entry["id"] for entry in listed}
    assert backline(capsys, "send", "hello", "--json", *at).json["model"] == "tiny 1"
    assert "default" in backline(capsys, "send", "models", *at).out
    assert backline(capsys, "send", "/backline/tempo/set", "97", "--json", *at).json["bpm"] == 97.0
    ran = backline(capsys, "send", "continue", song, 1, "--json", *at)
    assert {Path(path).stem for path in ran.json["files"]} == {"bass", "drums", "mix"}


def test_send_refuses_in_sentences(capsys: Capture, running: Running, tmp_path: Path) -> None:
    at = ("--port", running.port)
    refused(backline(capsys, "send", "hello", "--port", free_port()), 1, "No daemon answers")
    refused(backline(capsys, "send", "dance", *at), 2, "There is no request 'dance'")
    refused(backline(capsys, "send", "fill", tmp_path, *at), 2, "backline send fill")
    refused(backline(capsys, "send", "generate", "ten", *at), 2, "is not a number")
    refused(backline(capsys, "send", "generate", 1, "tempo=3", *at), 2, "is no option")
    refused(backline(capsys, "send", "generate", 1, "bpm=-3", *at), 1, "bpm must be")
    refused(backline(capsys, "send", "status", *at), 2, "takes: s id")
    refused(backline(capsys, "send", "status", "nobody", *at), 1, "There is no job")
    refused(backline(capsys, "send", "split", tmp_path / "none.wav", *at), 1, "none.wav")
    song = write_song(tmp_path / "song", ("bass",))
    out = tmp_path / "out"
    out.mkdir()
    (out / "piano.wav").write_text("mine")
    refused(backline(capsys, "send", "fill", song, "piano", "--out", out, *at), 1, "exists")
    assert (out / "piano.wav").read_text() == "mine"


def test_the_log_has_a_json_object_a_line(running: Running, capsys: Capture) -> None:
    backline(capsys, "send", "generate", 1, "--id", "logged", "--port", running.port)
    lines = [json.loads(line) for line in running.log.splitlines()]
    assert {"started", "worker ready", "model", "accepted", "running", "ended"} <= {x["event"] for x in lines}
    ended = next(line for line in lines if line["event"] == "ended" and line["job"] == "logged")
    assert ended["state"] == "done" and ended["level"] == "info" and ended["time"].endswith("+00:00")
    errors = (running.root.parent / "root.err").read_text()
    assert "accepted job=logged" in errors  # --verbose


def test_the_log_is_rotated_and_survives_a_full_disk(tmp_path: Path) -> None:
    logger = logging.getLogger("backline")
    before = list(logger.handlers)
    start_log(tmp_path / "daemon.log", verbose=False)
    try:
        for number in range(20000):
            logger.info("event %d %s", number, "x" * 400)
        sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
        assert len(sizes) == 4 and sizes[-1] <= 2_000_000
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logger.handlers[-2], "emit", _full)
            logger.info("nobody hears this")
    finally:
        for handler in [handler for handler in logger.handlers if handler not in before]:
            logger.removeHandler(handler)
            handler.close()


def _full(record: logging.LogRecord) -> None:
    logging.getLogger("backline").handlers[-2].handleError(record)


def test_a_stopped_worker_is_noticed_and_replaced(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that hangs for good (here: stopped) must not take the queue with it: the time-out ends it."""
    monkeypatch.setenv("BACKLINE_CANCEL_GRACE", "1")
    with daemon(tmp_path / "root", tiny_bundle) as running:
        talk = Talk(running.port)
        (worker,) = workers(running)
        talk.ask("/backline/job/generate", "hangs", 1800.0, answer="/backline/job/accepted")
        talk.until("/backline/job/progress", id="hangs")
        os.kill(worker, signal.SIGSTOP)
        talk.ask("/backline/job/cancel", "hangs", answer="/backline/job/state")
        assert talk.end_of("hangs", seconds=15) == "cancelled"
        talk.ask("/backline/job/generate", "next", 1.0, answer="/backline/job/accepted")
        assert talk.end_of("next") == "done"
        assert workers(running) != [worker]
        talk.close()


@dataclass
class Own:
    """The worker's own code in this process; called with a request, it returns what it says of that job."""

    worker: Worker
    said: StringIO
    bundle: Path

    def __call__(self, **request: Any) -> list[dict[str, Any]]:
        self.said.seek(0)
        self.said.truncate()
        job = {"id": "j", "task": "generate", "live": False, "model": str(self.bundle), "asked": "{}"}
        job |= {"client": "me", "accepted": 0.0, "backline": "0", "request": {"seed": 1} | request}
        worker_module._run(self.worker, job)
        shutil.rmtree(self.worker.root.jobs / "j", ignore_errors=True)
        return [json.loads(line) for line in self.said.getvalue().splitlines()]


@pytest.fixture
def own_worker(tmp_path: Path, tiny_bundle: Path) -> Iterator[Own]:
    root, said = make_root(tmp_path / "root"), StringIO()
    yield Own(Worker(root, [], "cpu", 1, said, threading.Lock()), said, tiny_bundle)
    assert not list(root.work.iterdir())


def test_cancel_takes_effect_within_one_denoising_step(
    own_worker: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = windows.sample_on_device
    steps = 0

    def counted(*args: Any, callback: Any, **kwargs: Any) -> Any:
        def cancelled_in_the_third(done: int, total: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                own_worker.worker.cancelled.add("j")
            callback(done, total)

        return whole(*args, callback=cancelled_in_the_third, **kwargs)

    monkeypatch.setattr(windows, "sample_on_device", counted)
    assert own_worker(seconds=60.0, steps=200)[-1]["say"] == "cancelled"
    assert steps <= 4
    assert not (own_worker.worker.root.jobs / "j").exists()


def test_memory_that_runs_out_means_smaller_batches_then_an_error_then_the_next_job_works(
    own_worker: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's own words for a GPU without room, said by the vocoder: a stand-in for a full GPU."""
    whole = Model._run
    room = 2

    def cramped(self: Model, graph: str, **inputs: Any) -> np.ndarray:
        if graph == "vocoder" and len(inputs["mel"]) >= room:
            raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory")
        return whole(self, graph, **inputs)

    monkeypatch.setattr(Model, "_run", cramped)
    *_, done = own_worker(seconds=1.0)
    assert done["say"] == "done" and "smaller" in done["note"]
    assert model_module.BATCH == 8
    room = 1
    *_, failed = own_worker(seconds=1.0)
    assert (failed["say"], failed["code"]) == ("failed", "memory")
    assert failed["sentence"].startswith("The memory does not suffice")
    monkeypatch.setattr(Model, "_run", whole)
    *_, done = own_worker(seconds=1.0)
    assert done["say"] == "done" and done["note"] == ""


def test_a_bug_in_the_engine_ends_the_job_and_not_the_worker(
    own_worker: Own,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(worker_module, "generate", lambda *args, **rest: 1 / 0)
    *_, failed = own_worker(seconds=1.0)
    assert (failed["say"], failed["code"]) == ("failed", "internal")
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.undo()
    assert own_worker(seconds=1.0)[-1]["say"] == "done"


def test_models_are_listed_loaded_by_name_and_chosen_by_a_job(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    write_tiny_bundle(models / "other", name="other")
    (models / "broken").mkdir()
    (models / "broken" / "manifest.json").write_text("{")
    monkeypatch.setenv("BACKLINE_MODELS", str(models))
    with daemon(tmp_path / "root", tiny_bundle) as running:
        talk = Talk(running.port)
        talk.ask("/backline/subscription/add", "model", answer="/backline/subscription/added")
        assert talk.ask("/backline/model/list", answer="/backline/model/listed")["count"] == 3
        entries = [values for address, values in talk.heard if address == "/backline/model/entry"]
        assert {entry["name"]: entry["state"] for entry in entries} == {
            "default": "available",
            "other": "available",
            "broken": "broken",
        }
        talk.send("/backline/model/load", "other")
        talk.until("/backline/model/state", state="loaded", name="other 1")
        talk.ask("/backline/job/generate", "by-name", 1.0, answer="/backline/job/accepted")
        assert talk.end_of("by-name") == "done"
        talk.ask("/backline/job/generate", "own", 1.0, "model", "", answer="/backline/job/accepted")
        assert talk.end_of("own") == "done"
        for name, model in (("by-name", "other"), ("own", "tiny")):
            record = json.loads((running.root / "jobs" / name / "1" / "take.json").read_text("utf-8"))
            assert record["model"]["name"] == model
        talk.send("/backline/model/load", "broken")
        failed = talk.until("/backline/model/state", state="failed")
        assert "is damaged" in failed["note"]
        talk.refused("/backline/model/load", "../other", code="value")
        talk.send("/backline/model/load", "")
        talk.until("/backline/model/state", state="loaded", name="tiny 1")
        talk.close()


def test_a_fall_to_the_cpu_is_said_everywhere(tmp_path: Path, tiny_bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA: nothing falls")
    with daemon(tmp_path / "root", tiny_bundle, "--device", "cuda") as running:
        talk = Talk(running.port)
        welcome = talk.ask("/backline/hello", "me", answer="/backline/welcome")
        assert welcome["device"] == "cuda" and welcome["provider"] == "CPUExecutionProvider"
        assert "runs on the CPU" in welcome["note"]
        talk.ask("/backline/job/generate", "fell", 1.0, answer="/backline/job/accepted")
        done = talk.until("/backline/job/done", id="fell")
        assert done["provider"] == "CPUExecutionProvider" and "runs on the CPU" in done["note"]
        assert "runs on the CPU" in (tmp_path / "root.err").read_text()
        talk.close()


def test_a_model_that_cannot_be_opened_is_said_in_welcome_and_in_the_job(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    running = start(tmp_path / "root", broken)
    try:
        welcome = wait_loaded(running)
        assert welcome["state"] == "failed" and "is no model bundle" in welcome["note"]
        talk = Talk(running.port)
        talk.ask("/backline/job/generate", "a", 1.0, answer="/backline/job/accepted")
        assert talk.end_of("a") == "error"
        assert talk.heard[-1][1]["code"] == "request"
        talk.close()
    finally:
        stop(running)
