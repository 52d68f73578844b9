"""Reading ahead: a region's tiles from the slide, in order, by a few threads.

Promise: at most `AHEAD` tiles per thread are in memory before they are asked for, however large the region.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from pathology.errors import Reason, SlideError
from pathology.grid import TileGrid
from pathology.model import ModelSpec
from pathology.slide import Slide

AHEAD = 8


def read_tiles(
    slide: Slide, spec: ModelSpec, grid: TileGrid, tiles: NDArray[np.int32], pool: Executor | None, threads: int = 1
) -> Iterator[NDArray[np.uint8] | None]:
    """(input_px, input_px, 3) uint8 for each of `tiles` (row, col), in order; without a pool, in the calling thread.

    None for a tile that cannot be decoded while the slide is readable elsewhere (CORRUPT_TILES).
    """
    shape, size = (spec.input_px, spec.input_px), (grid.l0_tile, grid.l0_tile)

    def read(origin: NDArray[np.float64]) -> NDArray[np.uint8] | None:
        try:
            return slide.read_tile((float(origin[0]), float(origin[1])), size, shape, spec.read)
        except SlideError as error:
            if error.reason is Reason.CORRUPT_TILES:
                return None
            raise

    origins = grid.l0_origins(tiles)
    if pool is None:
        yield from map(read, origins)
        return
    ahead: deque[Future[NDArray[np.uint8] | None]] = deque()
    try:
        for origin in origins:
            ahead.append(pool.submit(read, origin))
            if len(ahead) >= AHEAD * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
