"""Results reach their folder whole or not at all."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import BacklineError


@contextmanager
def outputs(folder: Path, names: Iterable[str], *, force: bool = False) -> Iterator[Path]:
    """A hidden folder inside `folder`; what the block writes into it moves to `folder` at the end.

    If the block raises, also through Ctrl-C, nothing of it stays, not even a `folder` made here.
    Raises BacklineError before the block runs where `folder` cannot be written, or where one of the names
    (all that may be written) exists and `force` is not given.
    """
    names = list(names)
    made = _make(folder)
    try:
        _refuse_existing(folder, names, force)
        staging = Path(tempfile.mkdtemp(prefix=".backline-", dir=folder))
    except OSError as error:
        _remove(made)
        raise _unwritable(folder, error) from error
    except BaseException:
        _remove(made)
        raise
    try:
        yield staging
        _refuse_existing(folder, names, force)  # again: it may have taken minutes
        _move_in(staging, folder)
        made = []
    except BacklineError as error:
        raise type(error)(str(error).replace(str(staging), str(folder))) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(made)


def free_folder(name: str) -> Path:
    """`name` in the current folder, or `name`-2, -3, ... where that exists."""
    path, count = Path(name), 1
    while path.exists():
        count += 1
        path = Path(f"{name}-{count}")
    return path


def _move_in(staging: Path, folder: Path) -> None:
    """Move every file of `staging` to `folder`: all, or none and what they would replace is as it was."""
    files = sorted(staging.iterdir())
    replaced = staging / "replaced"
    replaced.mkdir()
    placed = []
    try:
        for path in files:
            target = folder / path.name
            if target.exists():
                target.replace(replaced / path.name)
            path.replace(target)
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for path in replaced.iterdir():
            path.replace(folder / path.name)
        raise


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove(missing)
        raise _unwritable(folder, error) from error
    return missing


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # not empty: somebody else uses it by now


def _refuse_existing(folder: Path, names: list[str], force: bool) -> None:
    for path in (folder / name for name in names):
        if path.is_dir():
            raise BacklineError(f"{path} is a folder where a file is to be written.")
        if path.exists() and not force:
            raise BacklineError(f"{path} exists; pass --force to replace it.")


def _unwritable(folder: Path, error: OSError) -> BacklineError:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return BacklineError(f"{folder} cannot be a folder: a file of that name is in the way.")
    if error.errno == errno.ENOSPC:
        return BacklineError(f"The disk is full: nothing was written to {folder}.")
    return BacklineError(f"{folder} cannot be written: {error.strerror or error}.")
