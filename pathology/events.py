"""What happened and when: one line of JSON a state change, one file a process, under `<out>/events/`.

Promise: a line that `emit` returned from is on disk; lines are whole (one write each), a torn last line is the only damage.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, output_faults

SCHEMA = 1


def emit(out: Path, event: str, fields: Mapping[str, Any]) -> None:
    """Append {time, event, ...fields} to this process's file and fsync it."""
    path = out / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    line = json.dumps({"schema": SCHEMA, "time": time.time(), "event": event, **fields}) + "\n"
    make_folders(path.parent)
    with output_faults(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, line.encode())
            os.fsync(fd)
        finally:
            os.close(fd)


def read_events(out: Path) -> Iterator[dict[str, Any]]:
    """All events under `out`, file by file in name order; a torn last line of a file is left out."""
    for path in sorted((out / "events").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                break
