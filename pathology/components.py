"""Connected components of bool masks, by runs of pixels. Pure numpy.

Promise: time and memory grow with the number of runs, not with the number of components; no result depends on an order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The runs of a mask in row-major order, and the component of each.

    starts, ends  (n,) positions in the flattened mask with one empty column on each side (row stride: `stride`)
    roots         (n,) the first run of the run's component
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    roots: NDArray[np.int64]
    stride: int

    @property
    def areas_px(self) -> NDArray[np.int64]:
        """(n,) size in pixels of each run's component."""
        return np.bincount(self.roots, weights=self.ends - self.starts, minlength=len(self.roots)).astype(np.int64)[self.roots]

    def at(self, y: NDArray[np.integer], x: NDArray[np.integer]) -> NDArray[np.int64]:
        """Component (its first run) of set pixels at (y, x)."""
        place = y.astype(np.int64) * self.stride + x + 1
        return self.roots[np.searchsorted(self.starts, place, side="right") - 1]

    def mask(self, keep: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """(h, w) bool: the pixels of the runs in `keep`."""
        steps = np.zeros(shape[0] * self.stride, np.int8)
        steps[self.starts[keep]] = 1
        steps[self.ends[keep]] = -1
        return np.cumsum(steps, dtype=np.int8).reshape(shape[0], self.stride)[:, 1:-1] > 0


def components(mask: NDArray[np.bool_], *, diagonal: bool) -> Components:
    """Label the set pixels of an (h, w) mask; `diagonal`: pixels that share only a corner belong together."""
    height, width = mask.shape
    stride = width + 2
    padded = np.zeros((height, stride), np.int8)
    padded[:, 1:-1] = mask
    changes = np.flatnonzero(np.diff(padded.ravel())) + 1
    starts, ends = changes[::2], changes[1::2]
    # Runs of the next row that share an edge (or a corner) with this one are neighbours in the sorted runs.
    reach = int(diagonal)
    first = np.searchsorted(ends, starts + stride - reach, side="right")
    last = np.searchsorted(starts, ends + stride + reach, side="left")
    count = last - first
    above = np.repeat(np.arange(len(starts)), count)
    below = np.arange(len(above)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    return Components(starts, ends, _unite(len(starts), above, below), stride)


def _unite(n: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest member of each of n nodes' components, given edges a-b. Each round at least halves a component's roots."""
    roots = np.arange(n)
    while True:
        ra, rb = roots[a], roots[b]
        apart = ra != rb
        if not apart.any():
            return roots
        np.minimum.at(roots, np.maximum(ra, rb)[apart], np.minimum(ra, rb)[apart])
        while not np.array_equal(up := roots[roots], roots):
            roots = up


def drop_small(mask: NDArray[np.bool_], min_px: float) -> NDArray[np.bool_]:
    """The mask without components (corners connect) of fewer than `min_px` pixels."""
    found = components(mask, diagonal=True)
    return found.mask(found.areas_px >= min_px, (mask.shape[0], mask.shape[1]))


def fill_holes(mask: NDArray[np.bool_], max_px: float) -> NDArray[np.bool_]:
    """The mask with enclosed holes of fewer than `max_px` pixels filled; what touches the mask's border is no hole."""
    outside = np.pad(~mask, 1, constant_values=True)
    found = components(outside, diagonal=False)
    holes = (found.areas_px < max_px) & (found.roots != 0)  # run 0 is the border
    return mask | found.mask(holes, (outside.shape[0], outside.shape[1]))[1:-1, 1:-1]
