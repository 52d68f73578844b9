"""Processes of a run as tests find them from outside: by a mark in their environment, so that orphans are found as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Command:
    """`pathology` under way, and all processes it has started, whoever is their parent by now."""

    process: subprocess.Popen[str]
    mark: str

    def living(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def workers(self) -> list[int]:
        return [pid for pid in self.living() if pid != self.process.pid]

    def heeds(self, number: signal.Signals) -> bool:
        """Whether the command has a handler of its own for a signal by now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    def wait(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for a condition, during which the command must not end."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def all_gone(self, seconds: float = 5) -> bool:
        """Whether no process is left, after a while at most."""
        end = time.monotonic() + seconds
        while self.living() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.living()


@contextmanager
def command(
    *arguments: object, terminal: int | None = None, begin: Callable[[], None] | None = None, **environment: str
) -> Iterator[Command]:
    """`pathology` with `arguments`; killed where it is left before it has ended.

    terminal  descriptor of what it reads from and prints to; else its output is kept for `communicate`
    begin     called in it before anything else
    """
    mark = f"RUN_MARK={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        stdin=terminal,
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=begin is None,
        preexec_fn=begin,
        env={**os.environ, **environment, name: value},
    ) as process:
        try:
            yield Command(process, mark)
        finally:
            process.kill()
