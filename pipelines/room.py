"""Room for results. Promise: a slide whose result may not fit is not begun, and a run stops before the disk is full."""

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

    def require(self) -> None:
        """Raise EnvironmentFault where less than `min_free` is left."""
        self.lack(0)

    def lack(self, needed: int) -> str:
        """What to say where `needed` more bytes would leave less than `min_free`, "" where they would not; EnvironmentFault
        where less is left as it is.
        """
        if not self._min_free or (free := free_bytes(self._out)) is None or free >= needed + self._min_free:
            return ""
        keep = f"--min-free keeps {size(self._min_free)}"
        if free < self._min_free:
            message = f"{size(free)} are free at {self._out}, and {keep}: make room, then run the same again"
            raise EnvironmentFault(message, Fault.DISK_FULL)
        return (
            f"may take {size(needed)} at {self._out}, of which {size(free)} are free, and {keep}: make room, "
            "choose another --out or a coarser --heatmap-mpp, or let it run until the disk is full with --min-free 0"
        )

    def shortage(self, most: int) -> str:
        """What to know where all results, `most` bytes at the very most, may not fit; "" where they do.

        Glass and compression make results a fraction of that: no reason to refuse a run, but one to look.
        """
        if not self._min_free or (free := free_bytes(self._out)) is None or free >= most + self._min_free:
            return ""
        return (
            f", and {size(free)} are free: should less than {size(self._min_free)} be left, the run stops, to be gone on with"
        )


def size(count: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
