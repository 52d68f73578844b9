"""What a process is at, in memory that its holder sees even where a native call holds all of its threads.

Promise: nothing here waits or fails, and in a process that nobody watches nothing happens. No clock is read: whoever holds the
process sees which numbers stay the same, and for how long.
"""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

# A process has a page of 64-bit words. The first changes with every step that anything in it comes on by, the last as long as
# its threads run at all. Each of the others belongs to a call that is under way: 0 for none, else a number that changes with
# every step of that call.
PAGE_BYTES = 4096
WORDS = PAGE_BYTES // 8
TICKS = WORDS - 1
TICK_S = 0.5

# What is under way: a read of a slide, or a write to the output.
Kind = Literal["read", "write"]
SLOTS: dict[Kind, range] = {"read": range(1, 3 * WORDS // 4), "write": range(3 * WORDS // 4, TICKS)}


class _Page:
    """This process's page, which slots of it are free, and the next number."""

    def __init__(self, descriptor: int, number: int) -> None:
        mapped = memoryview(mmap.mmap(descriptor, 0))  # whole: not every system maps from any place on
        self.words = mapped[number * PAGE_BYTES : (number + 1) * PAGE_BYTES].cast("Q")
        self.free = {kind: deque(slots) for kind, slots in SLOTS.items()}
        self.numbers = itertools.count(1)


class _Thread(threading.local):
    """The slot of what this thread is at."""

    slot = 0


_page: _Page | None = None
_thread = _Thread()


def show_in(descriptor: int, number: int) -> None:
    """From now on show what this process is at, in the page of that number."""
    global _page
    _page = _Page(descriptor, number)
    threading.Thread(target=_tick, args=(_page,), name="tick", daemon=True).start()


def _tick(page: _Page) -> None:
    while _page is page:
        page.words[TICKS] = next(page.numbers)
        time.sleep(TICK_S)


def beat() -> None:
    """Something has come on: a tile was read or computed, a part written."""
    if _page is not None:
        _page.words[0] = number = next(_page.numbers)
        if _thread.slot:
            _page.words[_thread.slot] = number


@contextmanager
def under_way(kind: Kind) -> Iterator[None]:
    """A call of that kind is under way in this thread; its end is a step of whatever it is part of."""
    page, before = _page, _thread.slot
    if page is None:
        yield
        return
    try:
        slot = page.free[kind].pop()
    except IndexError:  # so many at once: this one goes unseen
        yield
        return
    page.words[slot] = next(page.numbers)
    _thread.slot = slot
    try:
        yield
    finally:
        page.words[slot] = 0
        page.free[kind].append(slot)
        _thread.slot = before
        beat()
