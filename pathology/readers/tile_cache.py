"""Decoded tiles of one slide, kept while there is room. Promise: of all threads that want a tile, one makes it.

Kept arrays are never written to: a thread may still copy from one that is forgotten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from pathology.readers.codecs import Corrupt, Pixels

Name = TypeVar("Name", bound=Hashable)
Make = Callable[[Sequence[Name]], Sequence[Pixels | Corrupt]]  # tiles by their names, in order


class TileCache(Generic[Name]):
    """The tiles used last, `limit_bytes` of them at most. That one is corrupt is kept as well.

    The limit should be what is needed and no more: memory that was written to lately is quicker to write to again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._made = threading.Condition(self._lock)
        self._waiting = 0  # threads that wait for tiles which others make
        self._kept: OrderedDict[Name, Pixels | Corrupt] = OrderedDict()
        self._making: set[Name] = set()

    def lacking(self, names: Iterable[Name]) -> list[Name]:
        """Those of the tiles that are neither kept nor being made."""
        with self._lock:
            return [name for name in names if name not in self._kept and name not in self._making]

    def get(self, names: Sequence[Name], make: Make[Name]) -> list[Pixels | Corrupt]:
        """The tiles called `names`, in order: those that are neither kept nor being made for another thread by `make`.

        Raises what `make` raises.
        """
        found: dict[Name, Pixels | Corrupt] = {}
        while missing := [name for name in names if name not in found]:
            claimed = self._claim(missing, found)
            if not claimed:
                continue
            try:
                made = make(claimed)
            except BaseException:
                with self._lock:
                    self._making.difference_update(claimed)
                    self._made.notify_all()
                raise
            self._keep(claimed, made)
            found.update(zip(claimed, made, strict=True))
        return [found[name] for name in names]

    def _claim(self, names: Sequence[Name], found: dict[Name, Pixels | Corrupt]) -> list[Name]:
        """Put what is kept into `found`; what this thread has to make. Waits where it is neither, but others make it."""
        claimed: list[Name] = []
        with self._lock:
            while not claimed:
                before = len(found)
                for name in names:
                    kept = self._kept.get(name)
                    if kept is not None:
                        self._kept.move_to_end(name)
                        found[name] = kept
                    elif name not in self._making:
                        self._making.add(name)
                        claimed.append(name)
                if len(found) > before:
                    break
                if not claimed:
                    self._waiting += 1
                    self._made.wait()  # then look again: it may be forgotten already
                    self._waiting -= 1
        return claimed

    def _keep(self, names: Sequence[Name], tiles: Sequence[Pixels | Corrupt]) -> None:
        with self._lock:
            self._making.difference_update(names)
            self._kept.update(zip(names, tiles, strict=True))
            self._bytes += sum(map(_size, tiles))
            while self._bytes > self.limit_bytes and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= _size(dropped)
            if self._waiting:
                self._made.notify_all()


def _size(kept: Pixels | Corrupt) -> int:
    return kept.nbytes if isinstance(kept, np.ndarray) else 1024
