"""What a command costs: wall seconds, CPU seconds of all its processes, and their summed memory at its highest.

Promise: every process a command leaves behind counts as well, since this process takes over orphans (Linux).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Cost:
    """wall_s and cpu_s of a command; peak_pss: bytes, summed over the process tree, 0 where it was not asked for."""

    wall_s: float
    cpu_s: float
    peak_pss: int
    output: str


def measure(command: Sequence[str], environment: Mapping[str, str], memory: bool = False) -> Cost:
    """Run `command` to its end. Raises SystemExit with its output where it fails.

    memory  sample the memory of all processes ten times a second, which itself takes time: not for timings
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    before = _children(os.getpid())
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        child = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment))
        peak = _Peak() if memory else None
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        while left := sorted(_children(os.getpid()) - before):  # what it left behind, for instance workers that end after it
            _, _, usage = os.wait4(left[0], 0)
            cpu += usage.ru_utime + usage.ru_stime
        highest = peak.stop() if peak else 0
        log.seek(0)
        output = log.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{output}")
    return Cost(wall, cpu, highest, output)


class _Peak:
    """The highest sum of PSS over this process's descendants, sampled by a thread."""

    def __init__(self) -> None:
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._highest

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._highest = max(self._highest, sum(pss(pid) for pid in descendants(os.getpid())))


def descendants(root: int) -> list[int]:
    """Process ids of all processes below `root`."""
    children = _families()
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _children(parent: int) -> set[int]:
    return set(_families().get(parent, []))


def _families() -> dict[int, list[int]]:
    """Process ids by their parent's."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    return children


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes; 0 where it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
