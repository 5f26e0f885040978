"""The engine's process: jobs come as JSON lines on standard input; it never outlives its daemon.

The daemon speaks {"do": "job" | "cancel" | "load" | "unload", ...}; the worker says {"say": "ready" |
"model" | "beat" | "progress" | "done" | "failed" | "cancelled", ...}. A job is worked on in `work/`
and becomes `jobs/ID` by one rename when everything in it is on the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import queue
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import engine.model
from bridge.jobs import find_stems
from bridge.store import JOB, Root, sync_folder
from engine.audio import Audio, read, write
from engine.batching import Line, as_job, give_way
from engine.bundle import file_sha256
from engine.errors import BacklineError, Cancelled, UsageError
from engine.model import Device, Model
from engine.take import Callback, Settings, Take
from engine.tasks import continue_, fill, generate, split
from engine.windows import Batch

BEAT = 1.0  # seconds between signs of life
PROGRESS = 0.1  # seconds between reports of one job
BATCH = 8  # takes that are sampled together at most
SAMPLED = 0.8  # of a task's progress is behind it when it has sampled
MUSIC = ("text", "bpm", "chords", "beats_per_bar", "first_beat")
NO_MEMORY = (
    "out of memory",
    "failed to allocate",
    "bad_alloc",
    "memoryallocation",
    "cannot allocate memory",
)


@dataclass
class Worker:
    """What the threads share. waiting: jobs and commands in order. line: whose run of a network is next.

    A batch job runs in the main thread; live and shared ones run beside it, each in a thread of `beside`.
    """

    root: Root
    folders: list[Path]
    device: Device
    threads: int | None
    out: TextIO
    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    line: Line = field(default_factory=Line)
    beside: list[threading.Thread] = field(default_factory=list)
    opening: threading.Lock = field(default_factory=threading.Lock)
    cancelled: set[str] = field(default_factory=set)
    model: Model | None = None
    model_path: str | None = None


class FileRefused(UsageError):
    """A file that may not be read, or cannot."""


def main() -> None:
    """Entry point: the settings are one JSON argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the daemon decides
    _die_with_parent(int(os.environ["BACKLINE_DAEMON"]))
    settings = json.loads(sys.argv[1])
    os.umask(0o077)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    worker = Worker(
        Root(Path(settings["root"])),
        [Path(folder) for folder in settings["folders"]],
        settings["device"],
        settings["threads"],
        out,
    )
    threading.Thread(target=_listen, args=(worker,), daemon=True).start()
    threading.Thread(target=_beat, args=(worker,), daemon=True).start()
    _say(worker, say="ready", pid=os.getpid())
    while True:
        _obey(worker, worker.waiting.get())


def _die_with_parent(daemon: int) -> None:
    """Ask Linux for SIGKILL when the daemon ends; elsewhere the end of standard input is the sign."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != daemon:  # it ended before it could be asked for
            os._exit(1)


def _listen(worker: Worker) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "cancel":
            worker.cancelled.add(command["id"])
        elif command["do"] == "job" and (command["live"] or command["request"].get("shared")):
            _run_beside(worker, command)
        else:
            worker.waiting.put(command)
    os._exit(0)


def _run_beside(worker: Worker, job: dict[str, Any]) -> None:
    thread = threading.Thread(target=_run, args=(worker, job), daemon=True)
    worker.beside = [*(other for other in worker.beside if other.is_alive()), thread]
    thread.start()


def _beat(worker: Worker) -> None:
    while True:
        _say(worker, say="beat", memory=_memory())
        time.sleep(BEAT)


def _memory() -> int:
    """Resident bytes of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _say(worker: Worker, **message: Any) -> None:
    with worker.lock:
        try:
            worker.out.write(json.dumps(message) + "\n")
            worker.out.flush()
        except OSError:  # nobody listens any more
            os._exit(1)


def _obey(worker: Worker, command: dict[str, Any]) -> None:
    if command["do"] == "job":
        _run(worker, command)
        return
    for thread in worker.beside:  # there may be room for one model only
        thread.join()
    if command["do"] == "load":
        _load(worker, command["path"])
    else:
        worker.model = worker.model_path = None
        gc.collect()
        _say(worker, say="model", state="unloaded", provider="", note="")


def _load(worker: Worker, path: str | None) -> None:
    opened = worker.model is not None and worker.model_path == path
    try:
        _model(worker, path)
        if opened:  # what was opened just now has been said
            _say_model(worker)
    except Exception as error:
        _say(worker, say="model", state="failed", provider="", note=_sentence(error))


def _say_model(worker: Worker) -> None:
    model = worker.model
    assert model is not None
    manifest = model.manifest
    _say(
        worker,
        say="model",
        state="loaded",
        provider=model.provider,
        note=" ".join(model.warnings),
        bundle=f"{manifest.name} {manifest.version}",
        capabilities=[*manifest.capabilities, *(f"stem:{stem}" for stem in manifest.stems)],
    )


def _model(worker: Worker, path: str | None) -> Model:
    with worker.opening:
        if worker.model is not None and worker.model_path == path:
            return worker.model
        worker.model = None  # before the next one is opened: there may be room for one only
        gc.collect()
        model = worker.model = Model.open(path, worker.device, worker.threads)
        worker.model_path = path
        _say_model(worker)
        return model


def _run(worker: Worker, job: dict[str, Any]) -> None:
    """Does a job to its end and says how it ended: exactly one of done, failed, cancelled."""
    shared = bool(job["request"].get("shared"))
    with as_job(worker.line, live=job["live"], shared=shared, check=partial(_check, worker, job["id"])):
        ending = _ending(worker, job)
    worker.cancelled.discard(job["id"])
    _say(worker, id=job["id"], **ending)


def _check(worker: Worker, job_id: str) -> None:
    if job_id in worker.cancelled:
        raise Cancelled("The job was cancelled.")


def _ending(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Does a job to its end; nothing half made is left when this returns what is to be said of it."""
    job_id = job["id"]
    work = worker.root.work / f"{job_id}.{secrets.token_hex(4)}"
    try:
        _check(worker, job_id)
        work.mkdir(mode=0o700)
        facts = _work(worker, job, work, _callback(worker, job_id))
        _check(worker, job_id)
        work.rename(worker.root.jobs / job_id)
        with contextlib.suppress(OSError):  # it is there now, whatever the disk says
            sync_folder(worker.root.jobs)
        return {"say": "done", **facts}
    except Cancelled:
        return {"say": "cancelled"}
    except Exception as error:
        code = _code(error)
        if code == "memory":
            worker.model = worker.model_path = None  # its arena never shrinks: the next job starts afresh
        if code == "internal":
            sys.excepthook(type(error), error, error.__traceback__)
        return {"say": "failed", "code": code, "sentence": _sentence(error)}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _callback(worker: Worker, job_id: str) -> Callback:
    """Reports progress, raises Cancelled, and, in a batch job, waits while a live one is at work."""
    last = 0.0

    def callback(phase: str, fraction: float) -> None:
        nonlocal last
        _check(worker, job_id)
        now = time.monotonic()
        if now - last >= PROGRESS:
            last = now
            _say(worker, say="progress", id=job_id, phase=phase, fraction=round(fraction, 4))
        give_way()

    return callback


def _work(worker: Worker, job: dict[str, Any], work: Path, callback: Callback) -> dict[str, Any]:
    """Makes all takes of a job in the folder `work`; returns what `done` says of them."""
    started = time.perf_counter()
    request = job["request"]
    callback("load", 0.0)
    model = _model(worker, job["model"])
    inputs = _read_inputs(worker, request, model.manifest.stems)
    takes = int(request.get("takes", 1))
    seed = int(request["seed"])
    batch = Batch([seed + number for number in range(takes)], 1 if job["task"] == "split" else BATCH)
    notes: list[str] = []
    record: dict[str, Any] = {}
    for number in range(takes):
        part = _share(callback, number, takes, batch.size)
        make = partial(_make, model, job["task"], request, inputs, seed + number, batch, part)
        take = _with_less_memory(make, batch, notes)
        record = take.record | {
            "backline": job["backline"],
            "job": job["id"],
            "take": number + 1,
            "takes": takes,
            "batch": batch.seeds[number - number % batch.size :][: batch.size],
            "inputs": {name: {"file": str(path), "sha256": sha} for name, (path, sha, _) in inputs.items()},
        }
        record["warnings"] = list(dict.fromkeys([*record["warnings"], *notes]))
        notes += [warning for warning in record["warnings"] if warning not in notes]
        _write_take(work / str(number + 1), take, record)
    facts = {
        "takes": takes,
        "seconds": round(time.perf_counter() - started, 3),
        "provider": record["provider"],
        "note": " ".join(dict.fromkeys(notes)),
        "bytes": sum(path.stat().st_size for path in work.rglob("*") if path.is_file()),
        "ended": time.time(),
    }
    asked = {key: job[key] for key in ("id", "task", "request", "asked", "client", "accepted", "backline")}
    _write_json(work / JOB, asked | facts | {"model": record["model"], "settings": record["settings"]})
    sync_folder(work)
    return facts


def _share(callback: Callback, number: int, takes: int, size: int) -> Callback:
    """A take's progress as the job's: the first of a batch samples for all of it."""
    first = number - number % size
    group = min(size, takes - first)

    def share(phase: str, fraction: float) -> None:
        sampled = SAMPLED * group if number > first else min(fraction, SAMPLED) * group
        rendered = (number - first) * (1 - SAMPLED) + max(0.0, fraction - SAMPLED)
        callback(phase, (first + sampled + rendered) / takes)

    return share


def _with_less_memory(make: Callable[[], Take], batch: Batch, notes: list[str]) -> Take:
    """`make()`; where the memory does not suffice, once more with takes, windows and stems one at a time."""
    try:
        return make()
    except Exception as error:
        if _code(error) != "memory" or batch.size == engine.model.BATCH == 1:
            raise
    batch.size = 1
    batch.made.clear()
    gc.collect()
    usual = engine.model.BATCH
    engine.model.BATCH = 1
    try:
        take = make()
    finally:
        engine.model.BATCH = usual
    notes.append("The memory did not suffice for the usual batch: this was made in smaller ones.")
    return take


def _make(
    model: Model,
    task: str,
    request: Mapping[str, Any],
    inputs: Mapping[str, tuple[Path, str, Audio]],
    seed: int,
    batch: Batch,
    callback: Callback,
) -> Take:
    settings = Settings(
        seed=seed,
        quality=request.get("quality"),
        steps=request.get("steps"),
        sampler=request.get("sampler"),
        guidance=request.get("guidance"),
    )
    sounds = {name: sound for name, (_, _, sound) in inputs.items()}
    music = {name: request[name] for name in MUSIC if name in request}
    music |= {name: sounds[name] for name in ("audio",) if name in sounds}
    stems = {name: sound for name, sound in sounds.items() if name in model.manifest.stems}
    if task == "generate":
        return generate(
            model,
            seconds=request["seconds"],
            free=bool(request.get("free")),
            settings=settings,
            batch=batch,
            callback=callback,
            **music,
        )
    if task == "split":
        how = {"residual": bool(request.get("residual")), "raw": bool(request.get("raw"))}
        method = request.get("method", "mask")
        return split(model, sounds["mix"], method=method, **how, settings=settings, callback=callback)
    if task == "continue":
        if not stems and "mix" in sounds:
            stems = split(model, sounds["mix"], settings=Settings(seed=seed)).stems
        return continue_(
            model,
            stems,
            seconds=request["seconds"],
            settings=settings,
            batch=batch,
            callback=callback,
            **music,
        )
    return fill(
        model,
        stems,
        _listed(request["armed"]),
        silent=_listed(request.get("silent", "")),
        other=sounds.get("other"),
        settings=settings,
        batch=batch,
        callback=callback,
        **music,
    )


def _read_inputs(
    worker: Worker, request: Mapping[str, Any], stems: Sequence[str]
) -> dict[str, tuple[Path, str, Audio]]:
    """The files of a request, (path, sha256, sound) by what they are: mix, audio, other, or a stem's name.

    Of a folder the files that are named after stems; a file to continue that is not is a mix.
    """
    named = {name: Path(request[name]) for name in ("mix", "audio", "other") if name in request}
    for name, path in request.items():
        if name.startswith("stem:"):
            named[name.removeprefix("stem:")] = Path(path)
    folder = Path(request.get("folder") or request.get("source") or "")
    if folder.is_absolute():
        given = find_stems(folder, stems) if folder.is_dir() else {_stem_of(folder, stems): folder}
        armed = _listed(request.get("armed", ""))
        named = {name: path for name, path in given.items() if name not in armed} | named
    inputs = {}
    for name, path in named.items():
        with _opened(path, [worker.root.jobs, worker.root.inputs, *worker.folders]) as opened:
            try:
                inputs[name] = (path, file_sha256(opened), read(opened))
            except BacklineError as error:
                raise type(error)(str(error).replace(str(opened), str(path))) from error
    return inputs


def _stem_of(path: Path, stems: Sequence[str]) -> str:
    name = path.stem.lower()
    return name if name in stems else "mix"


@contextlib.contextmanager
def _opened(path: Path, folders: list[Path]) -> Iterator[Path]:
    """A name for the file at `path` that no link can lead elsewhere while it is read.

    Every folder on the way is opened without following links, so a file that was swapped for a link after
    the daemon looked at it is refused. Raises FileRefused outside `folders` and for what is no plain file.
    """
    real = path.resolve()
    if not any(real.is_relative_to(folder) for folder in folders):
        raise FileRefused(f"{path} is not in the job root or a folder that was allowed.")
    if sys.platform != "linux":
        yield real
        return
    handle = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for depth, part in enumerate(real.parts[1:], 2):
            kind = os.O_NONBLOCK if depth == len(real.parts) else os.O_PATH | os.O_DIRECTORY
            flags = os.O_RDONLY | os.O_NOFOLLOW | kind
            try:
                inner = os.open(part, flags, dir_fd=handle)
            except OSError as error:
                why = "a link is in the way" if error.errno == errno.ELOOP else error.strerror
                raise FileRefused(f"{path} cannot be opened: {why}.") from error
            os.close(handle)
            handle = inner
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FileRefused(f"{path} is not a file.")
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def _write_take(folder: Path, take: Take, record: dict[str, Any]) -> None:
    folder.mkdir(mode=0o700)
    for name, sound in take.stems.items():
        write(folder / f"{name}.wav", sound)
    if record["task"] in ("generate", "continue"):
        write(folder / "mix.wav", take.mix())
    _write_json(folder / "take.json", record)
    sync_folder(folder)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _listed(names: str) -> list[str]:
    return [name for part in names.split(",") if (name := part.strip().lower())]


def _code(error: Exception) -> str:
    """The protocol's code for what ended a job."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        return "memory"
    if isinstance(error, OSError):
        return "disk" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS) else "internal"
    if isinstance(error, FileRefused):
        return "path"
    if isinstance(error, BacklineError):
        return "disk" if text.startswith("the disk is full") else "request"
    return "internal"


def _sentence(error: Exception) -> str:
    if _code(error) == "memory":
        return "The memory does not suffice for this, even one window and one stem at a time."
    if isinstance(error, OSError):
        return f"The files could not be written: {error.strerror or error}."
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if isinstance(error, BacklineError) else f"Something unexpected went wrong ({text})."


if __name__ == "__main__":
    main()
