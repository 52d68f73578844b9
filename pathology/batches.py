"""Reading ahead: a region's tiles from the slide, in order, by a few threads.

Promise: at most `CHUNKS_AHEAD` chunks a thread are in memory before they are asked for, however large the region; and
slow storage is waited for by threads that do nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

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
CHUNK_BYTES = 2**20
CHUNKS_AHEAD = 2
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


def read_tiles(
    slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32], pool: ReadPool | None, clock: Clock | None = None
) -> Iterator[Pixels | None]:
    """(input_px, input_px, 3) uint8 for each of `tiles` (row, col), in order; None for one whose pixels are corrupt.

    Without a pool everything happens in the calling thread, tile by tile. `clock` is told what time the reading took.
    """
    shape, size = (spec.input_px, spec.input_px), (grid.l0_tile, grid.l0_tile)
    origins = grid.l0_origins(tiles)

    def windows(first: int, end: int) -> Iterator[Window]:
        return (slide.window((y, x), size, shape, spec.read) for y, x in origins[first:end].tolist())

    def read(first: int, end: int) -> list[Pixels | None]:
        with counting(clock):
            chunk = list(windows(first, end))
            if len(chunk) > 1:
                slide.prefetch(chunk)
            return [_read(slide, window) for window in chunk]

    def fetch(first: int, end: int) -> None:
        with counting(clock):
            slide.prefetch(windows(first, end))

    if pool is None:
        for place in range(len(tiles)):
            yield from read(place, place + 1)
        return
    fetched: deque[Future[None]] = deque()
    ahead: deque[Future[list[Pixels | None]]] = deque()
    rows = deque(_rows(tiles[:, 0]))
    chunk = chunk_tiles(spec.input_px)
    if rows:
        slide.reserve(windows(*max(rows, key=lambda row: row[1] - row[0])))
    try:
        while rows:
            first, end = rows.popleft()
            if fetched:
                fetched.popleft().result()
            if slide.slow:
                for row in list(rows)[len(fetched) : ROWS_AHEAD]:
                    fetched.append(pool.fetch.submit(fetch, *row))
            for start in range(first, end, chunk):
                ahead.append(pool.decode.submit(read, start, min(start + chunk, end)))
                if len(ahead) >= CHUNKS_AHEAD * pool.threads:
                    yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        for waited in fetched:
            waited.cancel()
        for future in ahead:
            future.cancel()


def _read(slide: Slide, window: Window) -> Pixels | None:
    try:
        return slide.read_window(window)
    except SlideError as error:
        if error.reason is not Reason.CORRUPT_TILES:
            raise
        return None


def _rows(rows: NDArray[np.int32]) -> list[tuple[int, int]]:
    """(first, end) of runs of equal grid rows, none longer than ROW_TILES."""
    starts = [0, *(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)]
    return [(at, min(at + ROW_TILES, end)) for first, end in pairwise(starts) for at in range(first, end, ROW_TILES)]
