"""A slide's pixels as a lazy dask array. Promise: a chunk is `read_mpp` of the chunk's own box, however the array is sliced."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.geometry import Box

if TYPE_CHECKING:
    import dask.array as da

    from pathology.slide import Slide


def slide_to_dask(slide: Slide, mpp: float, chunk_px: int) -> da.Array:
    """(H, W, 3) uint8 of the slide at `mpp` um/px, read when computed, in chunks of `chunk_px` cut at the slide's edge.

    The array holds the open slide: keep it open until computed, and compute with threads, which is dask's default.
    """
    import dask.array as da
    from dask.base import tokenize

    if chunk_px < 1:
        raise UsageError(f"chunk of {chunk_px} px: use 1 or more")
    extent = Box(0, 0, *slide.shape_at(mpp))

    # dask hands in the chunk's place by this name of the argument.
    def read_chunk(block_id: tuple[int, int, int]) -> NDArray[np.uint8]:
        box = Box(block_id[0] * chunk_px, block_id[1] * chunk_px, chunk_px, chunk_px).intersect(extent)
        return slide.read_mpp(box, mpp)

    pixels: da.Array = da.map_blocks(  # type: ignore[no-untyped-call]
        read_chunk,
        chunks=da.core.normalize_chunks((chunk_px, chunk_px, 3), (*extent.shape, 3)),  # type: ignore[no-untyped-call]
        dtype=np.uint8,
        meta=np.empty((0, 0, 0), np.uint8),
        # Named by what decides the pixels: an open file has no content that dask could hash.
        name=f"slide-{tokenize(slide.info.fingerprint, slide.info.mpp, slide.info.reader, mpp, chunk_px)}",
    )
    return pixels
