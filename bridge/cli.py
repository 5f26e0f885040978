"""The command `backline`: exit status 0 for done, 1 for failed, 2 for a request that makes no sense.

Every failure becomes one sentence on standard error. The commands themselves are in `bridge.commands`, which
is imported late, so that Ctrl-C while Python still loads libraries is a sentence too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from engine.errors import BacklineError

STOPPED = "Stopped; nothing half-written is left."


def main() -> NoReturn:
    """Entry point of the installed command."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not fit the terminal's encoding
    status = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or it goes to a full disk: Python must not try again as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 1
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    try:
        from bridge.commands import command

        status = command()(list(arguments), prog_name="backline", standalone_mode=False)
        sys.stdout.flush()
    except BacklineError as error:
        return _failed(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return _failed(STOPPED, 1, arguments)
    except BrokenPipeError:
        return 1
    except MemoryError:
        return _failed("There is not enough memory for this.", 1, arguments)
    except OSError as error:
        return _failed(_sentence(error), 1, arguments)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's usage errors, whose classes moved between its versions
            return _failed(" ".join(error.format_message().split()), 2, arguments)
        if os.environ.get("BACKLINE_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        text = f"Something unexpected went wrong ({type(error).__name__}: {first})"
        return _failed(f"{text}; run it again with BACKLINE_DEBUG=1 to see where.", 1, arguments)
    # typer turns Ctrl-C into the shell's 130 and returns that
    return _failed(STOPPED, 1, arguments) if status == 130 else int(status or 0)


def _failed(sentence: str, status: int, arguments: Sequence[str]) -> int:
    sentence = sentence if sentence.endswith((".", "?", "!")) else sentence + "."
    print(sentence, file=sys.stderr)
    if "--json" in arguments:
        with contextlib.suppress(OSError):
            print(json.dumps({"status": "error", "error": sentence}, ensure_ascii=False), flush=True)
    return status


def _sentence(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "The disk is full."
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}." if error.filename else f"{reason}."


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Stop once; a second signal must not interrupt the cleaning up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
