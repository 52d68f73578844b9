"""Reading ahead: a region's tiles from the slide, in order, by a few threads.

Promise: at most `CHUNKS_AHEAD` chunks a thread are in memory before they are asked for, however large the region; and
slow storage is waited for by threads that do nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pathology.clock import Clock, counting
from pathology.errors import Reason, SlideError
from pathology.grid import TileGrid
from pathology.model import ModelSpec
from pathology.resample import Window
from pathology.slide import Slide

Pixels = NDArray[np.uint8]

# Tiles are read by the chunk: handing each over to a thread by itself costs as much as copying it.
CHUNK_BYTES = 2**21
CHUNKS_AHEAD = 2
# Of tiles side by side so many of a level's pixels are read as one: what lies under the border of two is then looked up once.
STRIP_PX = 5 * 2**18
# Of slow storage the bytes under a row of tiles are fetched together, this many rows ahead, by threads that only wait.
FETCH_THREADS = 4
ROWS_AHEAD = 4
ROW_TILES = 64


class ReadPool:
    """Threads that read for all regions of a process: `decode` to decode and resize, `fetch` to wait for storage."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.decode = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.fetch = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")

    def close(self) -> None:
        self.decode.shutdown(cancel_futures=True)
        self.fetch.shutdown(cancel_futures=True)


def chunk_tiles(input_px: int) -> int:
    """Tiles in a chunk."""
    return max(1, min(16, CHUNK_BYTES // (input_px**2 * 3)))


def tiles_ahead(input_px: int, threads: int) -> int:
    """Most tiles of one region that are read and not yet asked for, the chunk being handed out included."""
    return chunk_tiles(input_px) * (CHUNKS_AHEAD * threads + 1)


class Chunk(Protocol):
    """Tiles that are being read."""

    def tiles(self) -> Iterator[Pixels | None]:
        """Once, in order. A tile's pixels may be written over as soon as the next one is asked for."""
        ...

    def drop(self) -> None:
        """They will not be asked for."""
        ...


class Source(Protocol):
    """The tiles of one region, by their number, and who reads them."""

    @property
    def threads(self) -> int:
        """How many chunks are read at once."""
        ...

    @property
    def slow(self) -> bool:
        """Whether `fetch` is worth a thread that waits for it."""
        ...

    def reserve(self, first: int, end: int) -> None:
        """Make room for what rows of tiles share; these are the widest row."""
        ...

    def read(self, first: int, end: int) -> Chunk: ...

    def fetch(self, first: int, end: int) -> Future[Any]:
        """Fetch the bytes under these tiles, without decoding them."""
        ...


def read_ahead(source: Source, tiles: NDArray[np.int32], chunk: int) -> Generator[Pixels | None, None, None]:
    """What `source` gives for its `tiles` (row, col), in order: by chunks of so many, some of them read ahead."""
    fetched: deque[Future[Any]] = deque()
    ahead: deque[Chunk] = deque()
    rows = deque(_rows(tiles[:, 0]))
    if rows:
        source.reserve(*max(rows, key=lambda row: row[1] - row[0]))
    try:
        while rows:
            first, end = rows.popleft()
            if fetched:
                fetched.popleft().result()
            if source.slow:
                for row in list(rows)[len(fetched) : ROWS_AHEAD]:
                    fetched.append(source.fetch(*row))
            for start in range(first, end, chunk):
                ahead.append(source.read(start, min(start + chunk, end)))
                if len(ahead) >= CHUNKS_AHEAD * source.threads:
                    yield from ahead.popleft().tiles()
        while ahead:
            yield from ahead.popleft().tiles()
    finally:
        for waited in fetched:
            waited.cancel()
        for read in ahead:
            read.drop()


def read_tiles(
    slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32], pool: ReadPool | None, clock: Clock | None = None
) -> Generator[Pixels | None, None, None]:
    """(input_px, input_px, 3) uint8 for each of `tiles` (row, col), in order; None for one whose pixels are corrupt.

    Without a pool everything happens in the calling thread, tile by tile. `clock` is told what time the reading took.
    """
    if pool is not None:
        yield from read_ahead(_Local(slide, spec, grid, tiles, pool, clock), tiles, chunk_tiles(spec.input_px))
        return
    for place in range(len(tiles)):
        with counting(clock):
            tile = next(read_chunk(slide, spec, grid, tiles[place : place + 1]))
        yield tile


def windows(slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32]) -> Iterator[Window]:
    """What has to be read for each of `tiles` (row, col)."""
    shape, size = (spec.input_px, spec.input_px), (grid.l0_tile, grid.l0_tile)
    return (slide.window((y, x), size, shape, spec.read) for y, x in grid.l0_origins(tiles).tolist())


def read_chunk(
    slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32], into: Pixels | None = None
) -> Iterator[Pixels | None]:
    """As `read_tiles`, in this thread, of tiles side by side, whose bytes are fetched together.

    into  (n, input_px, input_px, 3) uint8 where they are put; None: new memory
    """
    chunk = list(windows(slide, spec, grid, tiles))
    if len(chunk) > 1:
        slide.prefetch(chunk)
    first = 0
    for strip in strips(slide, chunk):
        end = first + len(strip)
        yield from _read(slide, strip, None if into is None else into[first:end])
        first = end


def strips(slide: Slide, windows: Iterable[Window]) -> Iterator[list[Window]]:
    """The windows, those in a row that touch together, as many as `STRIP_PX` allow; alone what is not inside the slide."""
    strip: list[Window] = []
    for window in windows:
        if strip and not (_touch(strip[-1], window) and _pixels(strip[0], window) <= STRIP_PX):
            yield from _inside(slide, strip)
            strip = []
        strip.append(window)
    yield from _inside(slide, strip)


def _inside(slide: Slide, strip: list[Window]) -> Iterator[list[Window]]:
    """The strip, cut where it leaves the slide."""
    if strip and slide.inside(strip[0]) and slide.inside(strip[-1]):
        yield strip
        return
    for inside, run in groupby(strip, slide.inside):
        part = list(run)
        yield from [part] if inside else ([window] for window in part)


def _touch(left: Window, right: Window) -> bool:
    """Whether `right` begins in `left` or where that ends, in the same row."""
    a, b = left.box, right.box
    return (left.level, left.reduce, a.y, a.height) == (right.level, right.reduce, b.y, b.height) and a.x <= b.x <= a.x1


def _pixels(first: Window, last: Window) -> int:
    """Pixels of the level from one window to another."""
    return first.box.height * (last.box.x1 - first.box.x) * first.reduce**2


class _Local:
    """Tiles read by threads of this process."""

    def __init__(
        self, slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32], pool: ReadPool, clock: Clock | None
    ) -> None:
        self._place = (slide, spec, grid)
        self._tiles = tiles
        self._pool = pool
        self._clock = clock

    @property
    def threads(self) -> int:
        return self._pool.threads

    @property
    def slow(self) -> bool:
        return self._place[0].slow

    def reserve(self, first: int, end: int) -> None:
        self._place[0].reserve(windows(*self._place, self._tiles[first:end]))

    def read(self, first: int, end: int) -> Chunk:
        def work() -> list[Pixels | None]:
            with counting(self._clock):
                return list(read_chunk(*self._place, self._tiles[first:end]))

        return _LocalChunk(self._pool.decode.submit(work))

    def fetch(self, first: int, end: int) -> Future[Any]:
        def work() -> None:
            with counting(self._clock):
                self._place[0].prefetch(windows(*self._place, self._tiles[first:end]))

        return self._pool.fetch.submit(work)


@dataclass(frozen=True, slots=True)
class _LocalChunk:
    read: Future[list[Pixels | None]]

    def tiles(self) -> Iterator[Pixels | None]:
        yield from self.read.result()

    def drop(self) -> None:
        self.read.cancel()


def _read(slide: Slide, strip: list[Window], into: Pixels | None) -> list[Pixels | None]:
    try:
        return [*slide.read_strip(strip, into)]
    except SlideError as error:
        if error.reason is not Reason.CORRUPT_TILES:
            raise
    if len(strip) == 1:
        return [None]
    # Of several only those are lost that hold the damage.
    slots = [None if into is None else into[place : place + 1] for place in range(len(strip))]
    return [tile for window, slot in zip(strip, slots, strict=True) for tile in _read(slide, [window], slot)]


def _rows(rows: NDArray[np.int32]) -> list[tuple[int, int]]:
    """(first, end) of runs of equal grid rows, none longer than ROW_TILES."""
    starts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
    return [(at, min(at + ROW_TILES, end)) for first, end in pairwise(starts) for at in range(first, end, ROW_TILES)]
