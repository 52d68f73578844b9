"""What happened and when: one line of JSON a state change, one file a process, under `<out>/events/`.

Promise: a line that `emit` returned from is on disk and will be read; a line torn by a crash is left out and hides no other.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, output_faults, sync_folder

SCHEMA = 1


def emit(out: Path, event: str, fields: Mapping[str, Any]) -> None:
    """Append {time, event, ...fields} to this process's file and fsync it."""
    path = out / "events" / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    line = (json.dumps({"schema": SCHEMA, "time": time.time(), "event": event, **fields}) + "\n").encode()
    make_folders(path.parent)
    with output_faults(path):
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
        if size == 0:
            sync_folder(path.parent)


def read_events(out: Path) -> Iterator[dict[str, Any]]:
    """All events under `out`, file by file in name order; torn lines are left out."""
    for path in sorted((out / "events").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue
