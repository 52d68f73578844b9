"""What happened and when: one line of JSON a state change, one file a process, under `<out>/events/`.

Promise: a line that `emit` returned from is on disk and will be read; a line torn by a crash is left out and hides no other.

run-begin     a driver's: {jobs, slides, models, device}; all slides' ids with all models
slide-open    a process opens a slide and plans it: {slide, model}, as in all that follow
slide-begin   it did: {regions, todo, tiles}, the last two of what is left
region-start  {region}
region-done   {region, tiles, bad_tiles, decided, seconds, began, process, halved_to, stages}
slide-finish  a process writes the slide's result
slide-done    it did: {status, reason}
slide-kept    the driver found how it ended in an earlier run: {status, reason}
slide-failed  {reason}
slide-staged  {bytes, seconds}
slide-in-place  {why}
run-end       {failed, why, fault}; why it stopped before all was done, "" otherwise; of a fault of the machine its word
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, output_faults, sync_folder
from pathology.faults import retried

SCHEMA = 4


def emit(out: Path, event: str, fields: Mapping[str, Any]) -> None:
    """Append {time, event, ...fields} to this process's file and fsync it."""
    path = out / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    line = (json.dumps({"schema": SCHEMA, "time": time.time(), "event": event, **fields}) + "\n").encode()
    make_folders(path.parent)
    with output_faults(path):
        if retried(lambda: _append(path, line)):
            retried(lambda: sync_folder(path.parent))


def _append(path: Path, line: bytes) -> bool:
    """Append a line and fsync it; whether it is the first. Tried again after an error it may be there twice."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(fd).st_size
        # Process numbers come again: this file may be a dead process's, its last line torn.
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        # One write, so that lines of threads do not mix; only a full disk takes less than all of it.
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)
    return size == 0


@dataclass(frozen=True, slots=True)
class Log:
    """What the files of a run's events hold.

    events   by time; each with the `host` and `pid` of the process that wrote it
    damaged  lines that are no event; a last line without its end is not counted: it may be on its way
    foreign  lines of another schema version
    """

    events: list[dict[str, Any]]
    damaged: int = 0
    foreign: int = 0


def read_log(out: Path) -> Log:
    """All events under `out`, by time; while they are written as well as after a crash."""
    events: list[dict[str, Any]] = []
    damaged = foreign = 0
    for path in sorted((out / "events").glob("*.jsonl")):
        host, _, number = path.stem.rpartition("-")
        if not number.isdecimal() or not path.is_file():
            continue
        with path.open("rb") as file:
            for line in file:
                event = _event(line)
                if event is not None and event.get("schema") != SCHEMA:
                    foreign += 1
                elif event is not None:
                    events.append({**event, "host": host, "pid": int(number)})
                elif line.endswith(b"\n"):
                    damaged += line != b"\n"
    return Log(sorted(events, key=itemgetter("time")), damaged, foreign)


def read_events(out: Path) -> list[dict[str, Any]]:
    """The events of `read_log`."""
    return read_log(out).events


def _event(line: bytes) -> dict[str, Any] | None:
    """A line as an object with a time and an event's name; None where it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return None
    at = value.get("time")
    return value if isinstance(at, float) and math.isfinite(at) else None
