"""Reading in the processes beside this one, which have slides open and no model to wait for.

Promise: the tiles are those of `read_tiles`, a region's are all read by one process, which so decodes each of the slide's own
once, and no decoder shares Python's lock with a model. Pixels cross in shared memory, in blocks that are written again only
when nobody reads them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology import slide_worker
from pathology.batches import Chunk, Pixels, chunk_tiles, read_ahead
from pathology.calls import Calls, SharedMemory, neighbour
from pathology.clock import Clock
from pathology.job import Job
from pathology.model import ModelSpec
from pathology.pulse import beat


def asker() -> Calls | None:
    """By which this process asks its first neighbour; None where it has none, or is one that is asked."""
    beside = neighbour()
    return None if beside is None else beside.calls


def asked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it is called for a slide: in the neighbour, where there is one."""
    calls = asker()
    return function if calls is None else lambda *arguments: calls.ask(function, *arguments).result()


def read_beside(job: Job, spec: ModelSpec, clock: Clock, tiles: NDArray[np.int32]) -> Generator[Pixels | None, None, None]:
    """As `read_tiles`, by the neighbour that reads for the fewest regions. `clock` is told what time it takes them."""
    beside = neighbour()
    assert beside is not None
    with _reading.by_one_of(beside.readers) as calls:
        threads = math.ceil(job.readers / len(beside.readers))
        source = _Beside(job, spec, clock, tiles, calls, beside.memory, threads)
        yield from read_ahead(source, tiles, chunk_tiles(spec.input_px))


class _Reading:
    """How many regions each neighbour reads for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions = Counter[Calls]()

    @contextmanager
    def by_one_of(self, readers: Sequence[Calls]) -> Iterator[Calls]:
        """The one that reads for the fewest, until the end of the block for one more."""
        with self._lock:
            chosen = min(readers, key=self._regions.__getitem__)
            self._regions[chosen] += 1
        try:
            yield chosen
        finally:
            with self._lock:
                self._regions[chosen] -= 1


_reading = _Reading()


class _Beside:
    """Tiles that a neighbour reads, by so many threads, into memory which both see."""

    def __init__(
        self,
        job: Job,
        spec: ModelSpec,
        clock: Clock,
        tiles: NDArray[np.int32],
        calls: Calls,
        memory: SharedMemory,
        threads: int,
    ) -> None:
        self.calls = calls
        self.memory = memory
        self.threads = threads
        self.job = job
        self.input_px = spec.input_px
        self.clock = clock
        self._tiles = tiles
        self.slow = False

    def reserve(self, first: int, end: int) -> None:
        self.slow = self.calls.ask(slide_worker.begin_reading, self.job, self._tiles[first:end]).result()

    def read(self, first: int, end: int) -> Chunk:
        shape = (end - first, self.input_px, self.input_px, 3)
        place = self.memory.take(math.prod(shape))
        tiles = self._tiles[first:end]
        return _BesideChunk(self, shape, place, self.calls.ask(slide_worker.read_into, self.job, tiles, self.threads, place))

    def fetch(self, first: int, end: int) -> Future[Any]:
        fetched = self.calls.ask(slide_worker.fetch, self.job, self._tiles[first:end], self.threads)
        fetched.add_done_callback(self._count)
        return fetched

    def _count(self, fetched: Future[dict[str, float]]) -> None:
        if not fetched.cancelled() and fetched.exception() is None:
            self.clock.merge(fetched.result())


@dataclass(frozen=True, slots=True)
class _BesideChunk:
    source: _Beside
    shape: tuple[int, int, int, int]
    place: int
    read: Future[slide_worker.ChunkRead]

    def tiles(self) -> Iterator[Pixels | None]:
        try:
            chunk = self.read.result()
            beat()
            self.source.slow = chunk.slow
            self.source.clock.merge(chunk.seconds)
            block = self.source.memory.array(self.place, math.prod(self.shape)).reshape(self.shape)
            for tile, readable in zip(block, chunk.readable, strict=True):
                yield tile if readable else None
        finally:
            self._give()

    def drop(self) -> None:
        self.read.add_done_callback(lambda _: self._give())  # until then it may be written to

    def _give(self) -> None:
        self.source.memory.give(self.place, math.prod(self.shape))
