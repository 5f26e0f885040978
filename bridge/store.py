"""What the daemon knows on disk: a row per job in sqlite, a folder per finished job.

A finished job's folder appears by one rename, with `job.json` inside it. So a folder in `jobs/` is a finished
job whatever its row says, and everything in `work/` is what a crash left.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bridge.protocol import ENDED
from engine.errors import BacklineError

JOB = "job.json"
KEPT_ROWS = 20000  # ended jobs that are remembered; their ids cannot be used again until then
SCHEMA = """
create table if not exists jobs (
    id text primary key,
    task text not null,
    request text not null,
    client text not null,
    state text not null,
    code text not null default '',
    sentence text not null default '',
    takes integer not null default 0,
    seconds real not null default 0,
    provider text not null default '',
    note text not null default '',
    bytes integer not null default 0,
    fetched integer not null default 0,
    accepted real not null,
    ended real not null default 0
);
create index if not exists by_time on jobs (accepted);
"""


@dataclass
class Row:
    """A job as the database keeps it.

    request: JSON of what was asked, file names resolved. bytes: size of the results, 0 once they are removed.
    accepted, ended: seconds since 1970. The rest as in docs/osc.md.
    """

    id: str
    task: str
    request: str
    client: str
    state: str
    code: str = ""
    sentence: str = ""
    takes: int = 0
    seconds: float = 0.0
    provider: str = ""
    note: str = ""
    bytes: int = 0
    fetched: int = 0
    accepted: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Root:
    """The folders of a daemon. jobs: results. inputs: what clients put there. work: what is being made."""

    folder: Path

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def inputs(self) -> Path:
        return self.folder / "inputs"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def database(self) -> Path:
        return self.folder / "state.sqlite"

    @property
    def lock(self) -> Path:
        return self.folder / "daemon.lock"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"


def make_root(folder: Path) -> Root:
    """Makes the folders where they are missing; nobody else may look into them.

    Raises BacklineError for a folder that holds other things: what lies in its `work` would be removed.
    """
    root = Root(folder.resolve())
    if root.folder.is_dir() and any(root.folder.iterdir()) and not root.lock.exists():
        raise BacklineError(f"{folder} is not empty and no daemon's folder: choose another.")
    for path in (root.folder, root.jobs, root.inputs, root.work):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    root.lock.touch(mode=0o600)
    return root


def open_database(root: Root) -> sqlite3.Connection:
    """One thread at a time may use it. A commit survives the end of the process, and of the machine."""
    connection = sqlite3.connect(root.database, check_same_thread=False, isolation_level=None, timeout=10)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma journal_size_limit = 4194304")
    connection.executescript(SCHEMA)
    return connection


def save(connection: sqlite3.Connection, row: Row) -> None:
    """Writes a row, new or not."""
    values = asdict(row)
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    connection.execute(f"insert or replace into jobs ({names}) values ({marks})", values)


def find(connection: sqlite3.Connection, job_id: str) -> Row | None:
    rows = _rows(connection.execute("select * from jobs where id = ?", (job_id,)))
    return rows[0] if rows else None


def latest(connection: sqlite3.Connection, offset: int, count: int) -> tuple[list[Row], int]:
    """`count` jobs, the newest first, and how many there are."""
    query = "select * from jobs order by accepted desc, id limit ? offset ?"
    total = connection.execute("select count(*) from jobs").fetchone()[0]
    return _rows(connection.execute(query, (count, offset))), int(total)


def unfetched_bytes(connection: sqlite3.Connection) -> int:
    """The size of the results that no host has fetched."""
    query = "select coalesce(sum(bytes), 0) from jobs where fetched = 0"
    return int(connection.execute(query).fetchone()[0])


def recover(connection: sqlite3.Connection, root: Root) -> list[Row]:
    """Brings rows and folders together after any end of the last daemon; returns the rows that changed.

    A job with a folder is done, one without that had not ended is an error `restarted`; what is half made
    goes.
    """
    for path in root.work.iterdir():
        _remove(path)
    changed = []
    open_rows = _rows(connection.execute("select * from jobs where state not in (?, ?, ?)", ENDED))
    for row in open_rows:
        found = read_result(root, row.id)
        if found is not None:
            apply_result(row, found)
        else:
            row.state, row.code = "error", "restarted"
            row.sentence = "The daemon was restarted before this job was done: send it again with another id."
            row.ended = time.time()
        save(connection, row)
        changed.append(row)
    for path in root.inputs.iterdir():
        if find(connection, path.name) is not None:
            _remove(path)
    for row in _rows(connection.execute("select * from jobs where bytes > 0")):
        if not (root.jobs / row.id).is_dir():  # somebody removed it
            row.bytes = 0
            save(connection, row)
    for path in root.jobs.iterdir():
        if find(connection, path.name) is None:
            found = read_result(root, path.name)
            if found is None:
                continue  # not ours
            row = Row(path.name, found["task"], found["asked"], found["client"], "done")
            row.accepted = found["accepted"]
            apply_result(row, found)
            save(connection, row)
            changed.append(row)
    return changed


def read_result(root: Root, job_id: str) -> dict[str, Any] | None:
    """What the worker wrote of a finished job; None where there is no such job."""
    try:
        found = json.loads((root.jobs / job_id / JOB).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remove_inputs(root: Root, job_id: str) -> None:
    """What a client put into `inputs/ID` for a job that has ended now."""
    _remove(root.inputs / job_id)


def apply_result(row: Row, found: dict[str, Any]) -> None:
    """A worker's account of a finished job into its row."""
    row.state, row.code, row.sentence = "done", "", ""
    row.takes, row.seconds = int(found["takes"]), float(found["seconds"])
    row.provider, row.note = str(found["provider"]), str(found["note"])
    row.bytes, row.ended = int(found["bytes"]), float(found["ended"])


def mark_fetched(connection: sqlite3.Connection, job_id: str) -> None:
    """A host has the results: they may go when their room is wanted."""
    connection.execute("update jobs set fetched = 1 where id = ?", (job_id,))


def retain(connection: sqlite3.Connection, root: Root, count: int, size: int) -> list[str]:
    """Removes fetched results, the oldest first, until at most `count` jobs and `size` bytes are left.

    What no host has fetched stays, whatever it takes. Returns the ids of the jobs whose results went.
    """
    query = "select * from jobs where bytes > 0 order by ended desc"
    removed, jobs, kept = [], 0, 0
    for row in _rows(connection.execute(query)):
        jobs, kept = jobs + 1, kept + row.bytes
        if row.fetched and (jobs > count or kept > size):
            gone = root.work / f"{row.id}.removed"
            if (root.jobs / row.id).exists():
                (root.jobs / row.id).replace(gone)  # whole or gone, also after a crash in the middle
            kept -= row.bytes
            jobs -= 1
            row.bytes = 0
            save(connection, row)
            _remove(gone)
            removed.append(row.id)
    connection.execute(
        "delete from jobs where bytes = 0 and state in (?, ?, ?) and id in "
        "(select id from jobs order by accepted desc limit -1 offset ?)",
        (*ENDED, KEPT_ROWS),
    )
    return removed


def files_of(root: Root, job_id: str) -> list[tuple[int, Path, list[tuple[str, Path]]]]:
    """(take, its folder, its wavs by stem) of a finished job."""
    folder = root.jobs / job_id
    takes = []
    for path in sorted(folder.glob("*/"), key=lambda path: int(path.name) if path.name.isdigit() else 0):
        if path.name.isdigit():
            wavs = [(wav.stem, wav) for wav in sorted(path.glob("*.wav"))]
            takes.append((int(path.name), path, wavs))
    return takes


def sync_folder(path: Path) -> None:
    """What was renamed into a folder survives a power cut after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rows(found: Iterable[tuple[Any, ...]]) -> list[Row]:
    names = [field.name for field in fields(Row)]  # the table's columns, in their order
    return [Row(**dict(zip(names, values, strict=True))) for values in found]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
