"""Where a region's time went: seconds by stage, summed over all threads that worked for it.

Promise: counting costs two clock readings a step and changes nothing; what no clock is active for is not counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

# Stages in the order of the flow. `model` is the time in which the device computed, a batch of several regions shared by tiles.
STAGES = ("read", "decode", "resample", "copy", "model", "stitch", "write")


class _Active(threading.local):
    """What this thread counts for, and what it has counted since it began to: told at the end, so that a step takes no lock."""

    clock: Clock | None = None
    seconds: dict[str, float] | None = None


_active = _Active()


class Clock:
    """Seconds by stage; safe from many threads.

    among  clocks that get equal shares of what this one is told, which keeps nothing then
    """

    def __init__(self, among: Sequence[Clock] = ()) -> None:
        self._among = tuple(among)
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.merge({stage: seconds})

    def merge(self, seconds: Mapping[str, float]) -> None:
        """Add what another clock has counted."""
        for clock in self._among:
            clock.merge({stage: more / len(self._among) for stage, more in seconds.items()})
        if self._among:
            return
        with self._lock:
            for stage, more in seconds.items():
                self._seconds[stage] = self._seconds.get(stage, 0.0) + more

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage in `STAGES`, rounded to microseconds."""
        with self._lock:
            return {stage: round(self._seconds.get(stage, 0.0), 6) for stage in STAGES}


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum, stage by stage."""
    whole = dict.fromkeys(STAGES, 0.0)
    for part in parts:
        for stage in STAGES:
            whole[stage] += part.get(stage, 0.0)
    return {stage: round(seconds, 6) for stage, seconds in whole.items()}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans (begin, end) ran."""
    seconds, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return seconds


def current() -> Clock | None:
    """The clock that this thread counts for."""
    return _active.clock


@contextmanager
def counting(clock: Clock | None) -> Iterator[None]:
    """Let what this thread does inside count for `clock`, which is told at the end."""
    before = _active.clock, _active.seconds
    seconds: dict[str, float] | None = None if clock is None else {}
    _active.clock, _active.seconds = clock, seconds
    try:
        yield
    finally:
        _active.clock, _active.seconds = before
        if clock is not None and seconds:
            clock.merge(seconds)


class timed:
    """Count the time spent inside as `stage` of this thread's clock."""

    __slots__ = ("_began", "_seconds", "_stage")

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def __enter__(self) -> None:
        self._seconds = _active.seconds
        self._began = time.perf_counter() if self._seconds is not None else 0.0

    def __exit__(self, *raised: object) -> None:
        if self._seconds is not None:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + time.perf_counter() - self._began
