"""Room for results. Promise: a run that will not fit is refused before it works; one that turns out not to stops in time."""

from __future__ import annotations

from pathlib import Path

from pathology.durable import free_bytes
from pathology.errors import EnvironmentFault, Fault

MIN_FREE_BYTES = 100 * 2**20


class Room:
    """What is free where `out` lies, or will.

    min_free  bytes to be left; 0: whatever comes, go on until the disk is full
    """

    def __init__(self, out: Path, min_free: int) -> None:
        self._out = out
        self._min_free = min_free

    def require(self, needed: int = 0) -> None:
        """Raise EnvironmentFault where `needed` more bytes would leave less than `min_free`."""
        if not self._min_free or (free := free_bytes(self._out)) >= needed + self._min_free:
            return
        keep = f"--min-free keeps {size(self._min_free)}"
        if not needed:
            message = f"{size(free)} are free at {self._out}, and {keep}: make room, then run the same again"
            raise EnvironmentFault(message, Fault.DISK_FULL)
        raise EnvironmentFault(
            f"results may take {size(needed)} at {self._out}, of which {size(free)} are free, and {keep}: make room, choose "
            "another --out, fewer slides or a coarser --heatmap-mpp, or let it run until the disk is full with --min-free 0",
            Fault.DISK_FULL,
        )


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
