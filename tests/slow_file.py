"""Reads as slow as those of network storage, for tests. Promise: latency per call, and a rate that all threads share."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable


class SlowFile:
    """`pread` with 5 ms more per call and at most 200 MB/s in all; counts what was asked of it.

    Calls wait for their own latency side by side, as requests to a server do; their bytes come one after another through one
    line, which may be ahead by `burst_bytes` after a pause.
    """

    def __init__(
        self,
        latency_s: float = 0.005,
        bytes_per_s: float = 200e6,
        burst_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.calls = 0
        self.bytes = 0
        self._pread = os.pread  # as it is now: this may take its place
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._line_free = clock() - self._burst_s  # when the line has sent all that was asked for

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        """Up to `count` bytes of the file at `offset`, as os.pread gives them, but late."""
        data = self._pread(descriptor, count, offset)
        with self._lock:
            now = self._clock()
            self.calls += 1
            self.bytes += len(data)
            # The request travels first, then its bytes queue behind those of other calls.
            start = max(self._line_free, now + self._latency_s - self._burst_s)
            self._line_free = start + len(data) / self._bytes_per_s
            late = max(self._line_free, now + self._latency_s) - now
        self._sleep(late)
        return data
