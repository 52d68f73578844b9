"""One region's canvas: tile answers go in, one seamless piece of heatmap comes out.

Promise: constant in, constant out; and a pixel's value depends only on the tiles that touch it, added in row-major
order, not on how the slide was cut into regions. Sums are float64 of exact float32 products, so both hold to the bit.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.geometry import Box

Blend = Literal["hann", "constant"]


def blend_window(side: int, blend: Blend) -> NDArray[np.float32]:
    """(side, side) float32 weights > 0 for one tile's answer.

    "hann" falls off towards the edges as sin^2, sampled at pixel centres, so it is nowhere 0 and a pixel that only
    a tile's edge reaches still gets that tile's value. "constant" is the plain mean.
    """
    if blend == "constant":
        return np.ones((side, side), np.float32)
    if blend == "hann":
        line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
        return np.outer(line, line).astype(np.float32)
    raise UsageError(f"blend {blend!r} is unknown; use hann or constant")


class Canvas:
    """Weighted sums over `box` (heatmap px) for `classes` channels; lives as long as its region."""

    def __init__(self, box: Box, classes: int, window: NDArray[np.float32]) -> None:
        self.box = box
        self._window = window.astype(np.float64)
        self._sums = np.zeros((classes, *box.shape), np.float64)
        self._weights = np.zeros(box.shape, np.float64)

    def add(self, scores: NDArray[np.float32], y: int, x: int) -> None:
        """Add one tile's (C, h, w) scores whose corner lies at heatmap pixel (y, x); what falls outside the box is dropped."""
        tile = Box(y, x, *self._window.shape)
        inside = tile.intersect(self.box)
        if inside.empty:
            return
        on_canvas, on_tile = inside.slices(self.box), inside.slices(tile)
        weights = self._window[on_tile]
        self._sums[:, *on_canvas] += weights * scores[:, *on_tile]
        self._weights[on_canvas] += weights

    def mean(self) -> NDArray[np.float32]:
        """(C, H, W) float32 weighted means; NaN where no tile fell."""
        # Divided in float64 and rounded once, piece by piece: no second float64 canvas. Where nothing fell the NaN is the
        # one that every array here is filled with, not that of 0/0, whose sign depends on the processor.
        mean = np.full(self._sums.shape, np.nan, np.float32)
        return np.divide(self._sums, self._weights, out=mean, where=self._weights > 0, casting="same_kind")
