"""Where a region's time went: seconds by stage, summed over all threads that worked for it.

Promise: counting costs two clock readings a step and changes nothing; what no clock is active for is not counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Stages in the order of the flow. All but the last are work; `waiting` is a region's own thread without any.
STAGES = ("read", "decode", "resample", "copy", "model", "stitch", "write", "waiting")


class Clock:
    """Seconds by stage; safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage in `STAGES`, rounded to microseconds."""
        with self._lock:
            return {stage: round(self._seconds.get(stage, 0.0), 6) for stage in STAGES}


_active = threading.local()


@contextmanager
def counting(clock: Clock | None) -> Iterator[None]:
    """Let what this thread does inside count for `clock`."""
    before: Clock | None = getattr(_active, "clock", None)
    _active.clock = clock
    try:
        yield
    finally:
        _active.clock = before


class timed:
    """Count the time spent inside as `stage` of this thread's clock."""

    __slots__ = ("_began", "_clock", "_stage")

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._clock: Clock | None = getattr(_active, "clock", None)
        self._began = time.perf_counter() if self._clock is not None else 0.0

    def __exit__(self, *raised: object) -> None:
        if self._clock is not None:
            self._clock.add(self._stage, time.perf_counter() - self._began)
