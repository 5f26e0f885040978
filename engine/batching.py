"""Jobs that share the hardware: whose run of a network is next, and runs of several jobs made as one.

Each job works in a thread of its own and says who it is with `as_job`; outside of it nothing here does
anything. Only one network runs at a time. While a live job is at work no other job's run begins, so a live
job waits for one step at most. Jobs that are `shared` meet: their runs of the UNet at equal shapes become
one, whatever their steps (the timestep is an input per window). On the CPU the default bundle's windows had
the same bits in every batch from 1 to 16 that was measured; a GPU's library may choose another kernel for
another batch, so a job is shared only if it says so.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]
Run = Callable[[Feeds], FloatArray]

MOST = 16  # windows in one run; halved where the memory does not suffice
LINGER = 0.03  # seconds that a shared run waits for those who were in the last one
LOOK = 0.1  # seconds between two looks at whether a job that waits is cancelled


@dataclass(eq=False)
class Line:
    """The jobs of one process. most: windows that may run as one. live: live jobs at work."""

    most: int = MOST
    live: int = 0
    busy: bool = False
    freed: float = 0.0  # when it last ceased to be
    waiting: list[_Ticket] = field(default_factory=list)
    met: set[_Job] = field(default_factory=set)  # the jobs of the last shared run
    changed: threading.Condition = field(default_factory=threading.Condition)


@dataclass(eq=False)
class _Job:
    line: Line
    live: bool
    shared: bool
    check: Callable[[], None]


@dataclass(eq=False)
class _Ticket:
    """A run that waits. feeds: of one that may be merged; result: what came of it, in whose thread ever."""

    job: _Job
    number: int
    feeds: Feeds | None = None
    arrived: float = field(default_factory=time.monotonic)
    result: FloatArray | Exception | None = None

    @property
    def rank(self) -> tuple[bool, int]:
        return not self.job.live, self.number


_current: ContextVar[_Job | None] = ContextVar("job", default=None)
_numbers = itertools.count()


@contextlib.contextmanager
def as_job(line: Line, *, live: bool, shared: bool, check: Callable[[], None]) -> Iterator[None]:
    """What this thread runs belongs to one job of `line`. check: raises where the job is cancelled."""
    job = _Job(line, live, shared and not live, check)
    before = _current.set(job)
    with line.changed:
        line.live += live
    try:
        yield
    finally:
        _current.reset(before)
        with line.changed:
            line.live -= live
            line.met.discard(job)
            line.changed.notify_all()


def is_shared() -> bool:
    """Whether this thread's job lets its windows run with those of others."""
    job = _current.get()
    return job is not None and job.shared


def give_way() -> None:
    """Waits while a live job is at work, where this thread's job is none. Raises as the job's `check`."""
    job = _current.get()
    if job is None or job.live:
        return
    with job.line.changed:
        while job.line.live:
            job.check()
            job.line.changed.wait(LOOK)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Around one run of a network: waits until it is this thread's turn. Raises as the job's `check`."""
    job = _current.get()
    if job is None:
        yield
        return
    ticket = _enter(job, None)
    _wait(job.line, ticket)
    try:
        yield
    finally:
        _leave(job.line)


def run_shared(run: Run, feeds: Feeds) -> FloatArray:
    """`run(feeds)` (rows, ...) for this thread's job, which is shared, perhaps as part of a larger batch.

    run: the same function of the same model for all jobs; feeds: arrays of as many rows each.
    """
    job = _current.get()
    assert job is not None
    line = job.line
    ticket = _enter(job, feeds)
    _wait(line, ticket)
    if ticket.result is None:
        group = [ticket]
        try:
            with line.changed:
                group += _partners(line, ticket)
                line.met = {member.job for member in group}
            for member, result in zip(group, _run_all(line, run, group), strict=True):
                member.result = result
        finally:
            for member in group:  # whatever happened, nobody waits for ever
                member.result = (
                    RuntimeError("the run was broken off") if member.result is None else member.result
                )
            _leave(line)
    if not isinstance(ticket.result, np.ndarray):
        raise ticket.result or RuntimeError("the run was broken off")
    return ticket.result


def _run_all(line: Line, run: Run, group: list[_Ticket]) -> list[FloatArray | Exception]:
    """The results of a group in one run; where that fails each for itself, smaller groups from then on."""
    parts = [member.feeds for member in group if member.feeds is not None]
    try:
        made = run({name: np.concatenate([feeds[name] for feeds in parts]) for name in parts[0]})
    except Exception as error:
        if len(group) == 1:
            return [error]
        line.most = max(1, line.most // 2)
        return [result for member in group for result in _run_all(line, run, [member])]
    ends = np.cumsum([_rows(feeds) for feeds in parts])[:-1]
    return [np.ascontiguousarray(part) for part in np.split(made, ends)]


def _enter(job: _Job, feeds: Feeds | None) -> _Ticket:
    ticket = _Ticket(job, next(_numbers), feeds)
    with job.line.changed:
        job.line.waiting.append(ticket)
        job.line.changed.notify_all()
    return ticket


def _wait(line: Line, ticket: _Ticket) -> None:
    """Until it is this ticket's turn, and the line is then busy with it; or until it has its result."""
    with line.changed:
        try:
            while ticket.result is None and not _is_next(line, ticket):
                if ticket in line.waiting:  # what is running already is not worth breaking off
                    ticket.job.check()
                line.changed.wait(LINGER / 4 if ticket.feeds is not None and not line.busy else LOOK)
            if ticket.result is None:
                line.busy = True
        finally:
            if ticket in line.waiting:
                line.waiting.remove(ticket)
                line.changed.notify_all()


def _is_next(line: Line, ticket: _Ticket) -> bool:
    if line.busy or ticket not in line.waiting or (line.live and not ticket.job.live):
        return False
    if min(line.waiting, key=lambda other: other.rank) is not ticket:
        return False
    return (
        ticket.feeds is None
        or not _absent(line)
        or time.monotonic() - max(ticket.arrived, line.freed) > LINGER
    )


def _absent(line: Line) -> set[_Job]:
    """Who was in the last shared run and has not come back for the next one."""
    return line.met - {other.job for other in line.waiting}


def _partners(line: Line, ticket: _Ticket) -> list[_Ticket]:
    """Takes those out of the line that fit into one run with this ticket, in the order of their arrival."""
    assert ticket.feeds is not None
    room = line.most - _rows(ticket.feeds)
    taken: list[_Ticket] = []
    for other in list(line.waiting):
        if other.feeds is None or _key(other.feeds) != _key(ticket.feeds) or _rows(other.feeds) > room:
            continue
        room -= _rows(other.feeds)
        line.waiting.remove(other)
        taken.append(other)
    return taken


def _leave(line: Line) -> None:
    with line.changed:
        line.busy, line.freed = False, time.monotonic()
        line.changed.notify_all()


def _rows(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _key(feeds: Feeds) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape[1:]) for name, value in feeds.items())
