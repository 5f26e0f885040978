"""`backline serve` and `backline send`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from bridge.client import Client, ClientJob, JobResult, connect
from bridge.console import print_json, print_table, progress, say
from bridge.doctor import Finding
from bridge.logs import start_log
from bridge.models import find_bundle
from bridge.options import DeviceName, Json, ModelName
from bridge.osc import Value
from bridge.protocol import OPTIONS, PORT, REQUESTS, parameters
from engine.errors import BacklineError, UsageError
from engine.model import Device, Model

LOOPBACK = ("127.0.0.1", "::1", "localhost")
DEFAULT_HOSTS = LOOPBACK[:2]
TOKEN_LENGTH = 16  # characters at least
JOBS = {
    "generate": ("seconds",),
    "fill": ("folder", "armed"),
    "split": ("mix",),
    "continue": ("source", "seconds"),
}
WORDS = {
    "hello": "/backline/hello",
    "status": "/backline/job/status",
    "cancel": "/backline/job/cancel",
    "fetched": "/backline/job/fetched",
    "list": "/backline/job/list",
    "models": "/backline/model/list",
    "load": "/backline/model/load",
    "unload": "/backline/model/unload",
}
SEVERAL = {"list": "jobs", "models": "models"}  # answered by several messages
UNIT = """\
[Unit]
Description=Backline, the generative engine behind a DAW

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=2
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""

Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="UDP and TCP.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="A file that only you can read, with the clients' token.")
]


def default_root() -> Path:
    """Where the daemon keeps its state and results: `daemon` in the user's data folder."""
    return Path(platformdirs.user_data_dir("backline")) / "daemon"


def serve(
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Address to listen on; only this machine if not given.")
    ] = None,
    port: Port = PORT,
    root: Annotated[Path | None, typer.Option("--root", help="Folder for state and results.")] = None,
    allow: Annotated[
        list[Path] | None, typer.Option("--allow", help="A folder whose files jobs may read; repeatable.")
    ] = None,
    token_file: TokenFile = None,
    model: ModelName = None,
    device: DeviceName = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="The engine's; all cores if not given.")
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, max=1000, help="Jobs that may wait.")] = 32,
    keep_jobs: Annotated[int, typer.Option("--keep-jobs", min=0, help="Fetched jobs that stay.")] = 200,
    keep_gb: Annotated[float, typer.Option("--keep-gb", min=0.0, help="Room for results, in GB.")] = 20.0,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds a job may run.")] = 3600.0,
    check: Annotated[bool, typer.Option("--check", help="Look whether it would run, and end.")] = False,
    unit: Annotated[
        bool, typer.Option("--unit", help="Print a systemd user unit with these options, and end.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log everything, also here.")] = False,
    ardour: Annotated[
        int | None,
        typer.Option("--ardour", help="Also follow the Ardour on this OSC port, such as 3819."),
    ] = None,
    on_arm: Annotated[
        bool, typer.Option("--on-arm", help="With --ardour: fill tracks as they are armed.")
    ] = False,
) -> None:
    """The daemon: jobs over OSC (docs/osc.md), until Ctrl-C or SIGTERM."""
    if os.name != "posix":
        raise BacklineError("The daemon runs on Linux and macOS so far.")
    from bridge.daemon import prepare_root, run
    from bridge.daemon_state import Config

    hosts = tuple(host) if host else DEFAULT_HOSTS
    token = None if token_file is None else read_token(token_file)
    far = not set(hosts) <= set(LOOPBACK)
    if far and token is None:
        raise UsageError(
            f"Listening on {', '.join(hosts)} lets other machines start jobs and hear of their results: "
            "give a --token-file with a token that they must know."
        )
    config = Config(
        root=root or default_root(),
        hosts=hosts,
        port=port,
        model=find_bundle(model),
        device=device,
        threads=threads,
        folders=tuple(_folder(path) for path in allow or []),
        token=token,
        queue=queue,
        keep_jobs=keep_jobs,
        keep_bytes=round(keep_gb * 1e9),
        timeout=timeout,
    )
    if unit:
        print(UNIT.format(command=_unit_command()), end="")
        return
    if check:
        findings = list(_examine(config.root, config.model, device, port, token))
        print_table(None, ["", "", ""], [[f.subject, f.state, f.text] for f in findings])
        raise typer.Exit(int(any(finding.state == "problem" for finding in findings)))
    folders = prepare_root(config.root)
    start_log(folders.log, verbose)
    follower, stop = None, threading.Event()
    if ardour is not None:
        from bridge.ardour_follow import follow_with_daemon

        follower = threading.Thread(target=follow_with_daemon, args=(ardour, port, token, on_arm, say, stop))

    def ready() -> None:
        if follower is not None:
            follower.start()
        say(f"Listening on {', '.join(hosts)} port {port}, UDP and TCP; results in {folders.jobs}.")
        if far:
            say(
                "Other machines that know the token can start jobs and read the folders of --allow through "
                "them; OSC is not encrypted, so use this on a network that you trust."
            )

    try:
        asyncio.run(run(config, ready))
    finally:
        stop.set()
        if follower is not None and follower.ident is not None:
            follower.join()


def send(
    words: Annotated[
        list[str],
        typer.Argument(
            help="fill FOLDER ARMED, generate SECONDS, split MIX, continue SOURCE SECONDS (and name=value) "
            "or status ID, cancel ID, fetched ID, list, models, load NAME, unload, hello, or an OSC address."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Copy the results here.")] = None,
    job_id: Annotated[str | None, typer.Option("--id", help="The job's id; a new one if not given.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the job's end.")] = True,
    host: Annotated[str, typer.Option("--host", help="Where the daemon runs.")] = "127.0.0.1",
    port: Port = PORT,
    udp: Annotated[bool, typer.Option("--udp", help="UDP instead of TCP.")] = False,
    token_file: TokenFile = None,
    json_output: Json = False,
) -> None:
    """Send one request to a running daemon, for scripts: a job is waited for, its files are printed."""
    token = None if token_file is None else read_token(token_file)

    async def talk() -> dict[str, Any]:
        async with connect(host, port, name="send", transport="udp" if udp else "tcp", token=token) as client:
            if words[0] in JOBS:
                return await _send_job(client, words, job_id, wait, out)
            return await _send_request(client, words)

    answer = asyncio.run(talk())
    if json_output:
        print_json(answer)
    else:
        _show(answer)


async def _send_job(
    client: Client, words: list[str], job_id: str | None, wait: bool, out: Path | None
) -> dict[str, Any]:
    task, given = words[0], JOBS[words[0]]
    if len(words) < 1 + len(given):
        raise UsageError(f"It is: backline send {task} {' '.join(given).upper()} [name=value ...].")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    pairs = zip(given, words[1:], strict=False)
    arguments = [_number(word) if name == "seconds" else word for name, word in pairs]
    options = dict(_option(word) for word in words[1 + len(given) :])
    starters: dict[str, Any] = {
        "generate": client.generate,
        "fill": client.fill,
        "split": client.split,
        "continue": client.continue_,
    }
    job: ClientJob = await starters[task](*arguments, id=job_id, **options)
    if not wait:
        return {"status": "accepted", "id": job.id, "state": job.state}
    with progress(task) as bar:
        async for phase, fraction in job.progress():
            bar(phase, fraction)
    result = await job.result(keep=True)
    files = [str(path) for take in result.takes for path in take.files.values()]
    if out is not None:
        files = [str(path) for path in _copy_out(result, out)]
        await job.fetched()
    return {
        "status": "done",
        "id": result.id,
        "folder": str(result.folder if out is None else out),
        "files": files,
        "seconds": result.seconds,
        "provider": result.provider,
        "note": result.note,
    }


def _copy_out(result: JobResult, out: Path) -> Iterator[Path]:
    """Copies a result's takes: one into `out` itself, several into `out`/1, `out`/2, ..."""
    for take in result.takes:
        folder = out if len(result.takes) == 1 else out / str(take.number)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*take.files.values(), take.folder / "take.json"]:
            target = folder / path.name
            if target.exists():
                raise BacklineError(f"{target} exists; the result is in {take.folder}.")
            shutil.copyfile(path, target)
            if path.suffix == ".wav":
                yield target


async def _send_request(client: Client, words: list[str]) -> dict[str, Any]:
    word, rest = words[0], words[1:]
    address = WORDS.get(word, word)
    if address not in REQUESTS:
        known = ", ".join([*JOBS, *WORDS])
        raise UsageError(f"There is no request {word!r}: choose {known}, or an address of docs/osc.md.")
    signature, answer = REQUESTS[address]
    if address == "/backline/hello":
        return dict(client.welcome)
    wanted = parameters(signature)
    if not sum(not p.optional for p in wanted) <= len(rest) <= len(wanted):
        raise UsageError(f"{address} takes: {signature or 'no arguments'}.")
    arguments = [text if p.tag == "s" else _number(text) for p, text in zip(wanted, rest, strict=False)]
    if word in SEVERAL:
        entries = await (client.models() if word == "models" else client.list_jobs(*map(int, arguments)))
        return {SEVERAL[word]: entries}
    return await client.request(address, *arguments, answer=answer)


def _show(answer: dict[str, Any]) -> None:
    for several in SEVERAL.values():
        if several in answer:
            rows = [[str(value) for value in entry.values()] for entry in answer[several]]
            columns = list(answer[several][0]) if answer[several] else [several]
            print_table(None, columns, rows)
            return
    if "files" in answer:
        print("\n".join(answer["files"]))
        if answer["note"]:
            say(answer["note"])
        return
    print_table(None, ["", ""], [[name, str(value)] for name, value in answer.items()])


def _option(word: str) -> tuple[str, Value]:
    name, equals, text = word.partition("=")
    known = "stem:" if name.startswith("stem:") else name
    if not equals or known not in OPTIONS:
        raise UsageError(f"{word!r} is no option: they are name=value, with {', '.join(OPTIONS)} as names.")
    return name, text if OPTIONS[known][0] == "s" else _number(text)


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        with contextlib.suppress(ValueError):
            return float(text)
    raise UsageError(f"{text!r} is not a number.")


def read_token(path: Path) -> str:
    """The token in a file that nobody else may read. Raises UsageError."""
    try:
        mode = path.stat().st_mode
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The token file {path} cannot be read: {error}.") from error
    if mode & 0o077:
        raise UsageError(f"Others may read {path}: run chmod 600 on it.")
    if len(token) < TOKEN_LENGTH:
        raise UsageError(f"The token in {path} is too short: at least {TOKEN_LENGTH} characters.")
    return token


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise BacklineError(f"{path} is not a folder.")
    return path.resolve()


def _unit_command() -> str:
    """This command line without --unit, as systemd reads it."""
    arguments = [word for word in sys.argv[1:] if word != "--unit"]
    words = [sys.executable, "-P", "-m", "bridge.cli", *arguments]
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") for word in words)
    return " ".join(f'"{word}"' for word in escaped)


def _examine(
    root: Path, model: Path | None, device: Device, port: int, token: str | None
) -> Iterator[Finding]:
    """What `serve --check` looks at: the folder, the port, the model."""
    from bridge.daemon import prepare_root

    try:
        prepare_root(root)
        probe = root / ".check"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(root).free
        state: Any = "ok" if free > 1e9 else "warning"
        yield Finding("folder", state, f"{root} can be written, {free / 1e9:.1f} GB free")
    except (BacklineError, OSError) as error:
        yield Finding("folder", "problem", str(error))
    yield asyncio.run(_examine_port(port, token))
    try:
        opened = Model.open(model, device)
    except BacklineError as error:
        yield Finding("model", "problem", str(error))
        return
    named = f"{opened.manifest.name} {opened.manifest.version} on {opened.provider}"
    yield Finding("model", "warning" if opened.warnings else "ok", " ".join([named, *opened.warnings]))


async def _examine_port(port: int, token: str | None) -> Finding:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(type=kind) as tried:
            if kind == socket.SOCK_STREAM and os.name != "nt":
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                break
    else:
        return Finding("port", "ok", f"{port} is free, UDP and TCP")
    try:
        async with connect(port=port, name="check", token=token) as client:
            model, state = client.welcome["model"], client.welcome["state"]
            return Finding("port", "ok", f"a daemon answers on {port} already, its model {model} is {state}")
    except (BacklineError, OSError):
        return Finding("port", "problem", f"{port} is taken by something that is no Backline daemon")
