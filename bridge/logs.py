"""The daemon's log: a JSON object a line in a file that is rotated, and plain lines for people."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE_BYTES, FILES = 2_000_000, 4


class Lines(logging.Formatter):
    """time, level, event, then the facts by name; an exception's traceback as one string."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Words(logging.Formatter):
    """The same for a terminal: "12:00:01 accepted job=take1 task=fill"."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{name}={value}" for name, value in getattr(record, "facts", {}).items())
        text = f"{datetime.fromtimestamp(record.created):%H:%M:%S} {record.getMessage()} {facts}".rstrip()
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def start_log(path: Path, verbose: bool) -> None:
    """Everything of INFO and above to `path`; with `verbose` all of it, also to standard error."""
    logger = logging.getLogger("backline")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    file = logging.handlers.RotatingFileHandler(
        path, maxBytes=FILE_BYTES, backupCount=FILES - 1, encoding="utf-8"
    )
    file.setFormatter(Lines())
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(Words())
    screen.setLevel(logging.DEBUG if verbose else logging.WARNING)
    for handler in (file, screen):
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends no daemon
        logger.addHandler(handler)
