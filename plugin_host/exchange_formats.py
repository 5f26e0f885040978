"""Which file's ending is which format of another DAW."""

from __future__ import annotations

from pathlib import Path

from engine.errors import BacklineError, UsageError
from plugin_host.exchange import ReadProject, Warn
from plugin_host.exchange_dawproject import read_dawproject, write_dawproject
from plugin_host.exchange_rpp import read_rpp, write_rpp
from plugin_host.session import SessionHost

WRITERS = {".dawproject": write_dawproject, ".rpp": write_rpp}
READERS = {".dawproject": read_dawproject, ".rpp": read_rpp}


def export_session(host: SessionHost, path: Path, warn: Warn) -> None:
    """Write the session as `path`, a .dawproject or an .rpp, whole or not at all.

    `warn` is told what the format cannot hold. Raises UsageError for another ending.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise UsageError(f"{path.name} ends in neither .dawproject nor .rpp: these are what can be written.")
    write(host, path, warn)


def read_project(path: Path) -> ReadProject:
    """Read a .dawproject or an .rpp. Raises BacklineError where it is neither or cannot be read."""
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"{path.name} ends in neither .dawproject nor .rpp: these are what can be read.")
    if not path.is_file():
        raise BacklineError(f"{path} does not exist.")
    return read(path)
