"""Decoded tiles of one slide, kept while there is room. Promise: of all threads that want a tile, one makes it.

Kept arrays are never written to: a thread may still copy from one that is forgotten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

from pathology.readers.codecs import Corrupt, Pixels


class TileCache:
    """The tiles used last, `limit_bytes` of them at most. That one is corrupt is kept as well.

    The limit should be what is needed and no more: memory that was written to lately is quicker to write to again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._made = threading.Condition(self._lock)
        self._waiting = 0  # threads that wait for a tile which another makes
        self._kept: OrderedDict[Hashable, Pixels | Corrupt] = OrderedDict()
        self._making: set[Hashable] = set()

    def __contains__(self, name: Hashable) -> bool:
        """Whether the tile is kept or being made."""
        with self._lock:
            return name in self._kept or name in self._making

    def get(self, name: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """The tile called `name`, by `make` if it is not kept. Raises what `make` raises; Corrupt again and again."""
        with self._lock:
            while (kept := self._kept.get(name)) is None and name in self._making:
                self._waiting += 1
                self._made.wait()  # then look again: it may be forgotten already
                self._waiting -= 1
            if kept is None:
                self._making.add(name)
            else:
                self._kept.move_to_end(name)
        if kept is None:
            kept = self._make(name, make)
        if isinstance(kept, Corrupt):
            raise Corrupt(str(kept))
        return kept

    def _make(self, name: Hashable, make: Callable[[], Pixels]) -> Pixels | Corrupt:
        kept: Pixels | Corrupt | None = None
        try:
            kept = make()
        except Corrupt as error:
            kept = Corrupt(str(error))  # without its traceback, which holds the frames that decoded, and their pixels
        finally:
            with self._lock:
                self._making.remove(name)
                if kept is not None:
                    self._kept[name] = kept
                    self._bytes += _size(kept)
                while self._bytes > self.limit_bytes and len(self._kept) > 1:
                    _, dropped = self._kept.popitem(last=False)
                    self._bytes -= _size(dropped)
                if self._waiting:
                    self._made.notify_all()
        return kept


def _size(kept: Pixels | Corrupt) -> int:
    return kept.nbytes if isinstance(kept, np.ndarray) else 1024
