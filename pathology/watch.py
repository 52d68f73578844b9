"""What a worker's processes may take, in time and memory, and how their holder sees that they have taken more.

Promise: only time that the holder itself was running counts, and only time in which nothing came on: a slow model on a large
region is never taken for one that hangs, nor is anything while the whole machine stood still.
"""

from __future__ import annotations

import functools
import mmap
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathology.calls import Death, WorkerDied, shared_file
from pathology.cores import memory_bytes
from pathology.pulse import PAGE_BYTES, SLOTS, TICKS, WORDS, Kind

if TYPE_CHECKING:  # as in `calls`: it is loaded while the processes start
    import numpy as np
    from numpy.typing import NDArray

# Of the machine's memory, or the cgroup's; who takes more will be killed by the system, or have something else be killed.
MEMORY_SHARE = 0.9
# A process that still loads its libraries may take so long, where that is more than a region may.
START_S = 600.0
# Signals by which native code ends its own process. Others come from outside.
OWN_SIGNALS = frozenset(
    (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP)
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may take before it is ended.

    read_s        a read of a slide that does not come on for so long
    region_s      nothing at all comes on for so long: no tile is read, none computed, nothing written
    memory_bytes  that its processes hold; 0: nearly all there is
    """

    read_s: float = 300.0
    region_s: float = 1800.0
    memory_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        return self.memory_bytes or _nearly_all()


@functools.cache
def _nearly_all() -> int:
    return int(MEMORY_SHARE * memory_bytes())


class Pulses:
    """The pages of so many processes, and how long what stands there has stood."""

    def __init__(self, count: int) -> None:
        self.descriptor = shared_file()
        os.ftruncate(self.descriptor, count * PAGE_BYTES)
        self._mapped = mmap.mmap(self.descriptor, count * PAGE_BYTES, prot=mmap.PROT_READ)
        self._last: NDArray[np.uint64] | None = None  # as nobody has looked yet
        self._stood: NDArray[np.float64]
        self._still = 0.0

    def overdue(self, passed: float, busy: bool, limits: Limits) -> WorkerDied | None:
        """What has taken too long, None for nothing, when `passed` seconds have gone by since this was last asked.

        busy  anything is being waited for
        """
        import numpy as np

        now = np.frombuffer(self._mapped, np.uint64).reshape(-1, WORDS).copy()
        if self._last is None:  # nothing has come on before
            self._last, self._stood = np.zeros_like(now), np.zeros(now.shape)
        self._stood = np.where((now == self._last) & (now > 0), self._stood + passed, 0.0)
        self._still = self._still + passed if busy and (now[:, 0] == self._last[:, 0]).all() else 0.0
        self._last = now
        # It beats first when all is loaded, and that begins the time anew.
        region_s = limits.region_s if now[:, 0].all() else max(limits.region_s, START_S)
        if self._longest("read") > limits.read_s:
            return WorkerDied(f"a read of the slide did not come back within {limits.read_s:g} s", Death.READ)
        # Where all wait for the output, both have stood for about as long. A write in a process that a native call holds as a
        # whole says nothing.
        longest = limits.region_s
        writing = self._longest("write", self._stood[:, TICKS] < longest / 2)
        if writing > longest or (self._still > longest and writing > longest / 2):
            return WorkerDied(f"the output took nothing for {longest:g} s", Death.WRITE)
        if self._still > region_s:
            return WorkerDied(f"nothing came on for {region_s:g} s", Death.STILL)
        return None

    def _longest(self, kind: Kind, processes: NDArray[np.bool_] | slice = slice(None)) -> float:
        slots = SLOTS[kind]
        return float(self._stood[processes, slots.start : slots.stop].max(initial=0.0))


def overweight(pids: Iterable[int], limits: Limits) -> WorkerDied | None:
    """What is said of processes that hold more memory than they may; None where they do not."""
    if (held := sum(map(held_bytes, pids))) <= limits.most_bytes:
        return None
    return WorkerDied(
        f"it held {held / 1e9:.1f} GB of memory, more than the {limits.most_bytes / 1e9:.1f} GB that it may", Death.MEMORY
    )


def held_bytes(pid: int) -> int:
    """Memory of a process that the system cannot take from it: no files, nothing shared. 0 where it is gone."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except (OSError, ValueError):
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def killed_for_memory() -> int:
    """How many processes this system has killed so far because memory ran out; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def death_by(what: str, code: int, killed_before: int) -> WorkerDied:
    """What is known of `what`, a process that ended by itself with `code`, as `subprocess` gives it.

    killed_before  `killed_for_memory` when it began
    """
    if code >= 0:
        return WorkerDied(f"{what} ended with code {code}", Death.CRASH)
    number = signal.Signals(-code)
    if number is signal.SIGKILL and killed_for_memory() > killed_before:
        return WorkerDied(f"{what} was killed by the system when memory ran out", Death.MEMORY)
    return WorkerDied(f"{what} was ended by {number.name}", Death.CRASH if number in OWN_SIGNALS else Death.KILL)
