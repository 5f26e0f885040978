"""`backline serve` and `backline send`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from bridge.console import say
from bridge.logs import start_log
from bridge.models import find_bundle
from bridge.protocol import PORT
from engine.errors import BacklineError, UsageError
from engine.model import Device

LOOPBACK = ("127.0.0.1", "::1")
TOKEN_LENGTH = 16  # characters at least


def default_root() -> Path:
    """Where the daemon keeps its state and results: `daemon` in the user's data folder."""
    return Path(platformdirs.user_data_dir("backline")) / "daemon"


def serve(
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Address to listen on; this machine only if not given."),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="UDP and TCP.")] = PORT,
    root: Annotated[Path | None, typer.Option("--root", help="Folder for state and results.")] = None,
    allow: Annotated[
        list[Path] | None, typer.Option("--allow", help="A folder whose files jobs may read; repeatable.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file only you can read, with a token for clients.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="A bundle, as for other commands.")] = None,
    device: Annotated[Device, typer.Option("--device", help="Where to run.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="The engine's; all cores.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, max=1000, help="Jobs that may wait.")] = 32,
    keep_jobs: Annotated[int, typer.Option("--keep-jobs", min=0, help="Fetched jobs that stay.")] = 200,
    keep_gb: Annotated[float, typer.Option("--keep-gb", min=0.0, help="Room for results, in GB.")] = 20.0,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds a job may run.")] = 3600.0,
    check: Annotated[bool, typer.Option("--check", help="Look whether it would run, and end.")] = False,
    unit: Annotated[bool, typer.Option("--unit", help="Print a systemd user unit, and end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log everything, also here.")] = False,
) -> None:
    """The daemon: jobs over OSC (docs/osc.md), until Ctrl-C or SIGTERM."""
    from bridge.daemon import serve as run_daemon
    from bridge.daemon_state import Config, Daemon

    hosts = tuple(host) if host else LOOPBACK
    token = None if token_file is None else read_token(token_file)
    if token is None and not set(hosts) <= {*LOOPBACK, "localhost"}:
        raise UsageError(
            f"Listening on {', '.join(hosts)} lets other machines start jobs and hear their results: "
            "give a --token-file that they must know."
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

    def ready(daemon: Daemon) -> None:
        start_log(daemon.root.log, verbose)
        say(f"Listening on {', '.join(hosts)} port {port} (UDP and TCP); results in {daemon.root.jobs}.")
        if not set(hosts) <= {*LOOPBACK, "localhost"}:
            say(
                "Other machines that know the token can start jobs, read the files of --allow through them, "
                "and the token itself is sent unencrypted: use this on a network you trust."
            )

    asyncio.run(run_daemon(config, ready))


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
