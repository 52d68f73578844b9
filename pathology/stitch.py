"""One region's canvas: tile answers go in, one seamless piece of heatmap comes out.

Promise: constant in, constant out; and a pixel's value depends only on the tiles that touch it, added in row-major
order, not on how the slide was cut into regions. Sums are float64 of exact float32 products, so both hold to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.geometry import Box

Blend = Literal["hann", "gaussian", "constant"]

# MONAI's defaults for its Gaussian: deviation as a share of the side, and the least weight beside the centre's 1.
GAUSSIAN_SIGMA, GAUSSIAN_LEAST = 0.125, 1e-3


# Weight of a margin: nothing beside the least weight elsewhere (about 1e-12, in the corners of a large Hann window), and enough
# where there is nothing else.
MARGIN_WEIGHT = 1e-24


def blend_window(side: int, blend: Blend, margin: int = 0) -> NDArray[np.float32]:
    """(side, side) float32 weights > 0 for one tile's answer.

    margin  pixels from the edges in which an answer counts only where no tile answers with its inner part

    "hann" falls off towards the edges as sin^2, sampled at pixel centres, so it is nowhere 0 and a pixel that only
    a tile's edge reaches still gets that tile's value. "gaussian" is MONAI's importance map of that name: a deviation of an
    eighth of the side, no weight below a thousandth. "constant" is the plain mean.
    """
    if margin:
        window = np.full((side, side), MARGIN_WEIGHT, np.float32)
        window[margin:-margin, margin:-margin] = blend_window(side - 2 * margin, blend)
        return window
    if blend == "constant":
        return np.ones((side, side), np.float32)
    if blend == "hann":
        line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
        return np.outer(line, line).astype(np.float32)
    if blend == "gaussian":
        line = np.exp(-((np.arange(side) - (side - 1) / 2) ** 2) / (2 * (GAUSSIAN_SIGMA * side) ** 2))
        window = np.outer(line, line)
        return np.maximum(window, max(window.min(), GAUSSIAN_LEAST)).astype(np.float32)
    raise UsageError(f"blend {blend!r} is unknown; use hann, gaussian or constant")


# What a canvas remembers of each tile that reaches into rows not handed out.
CORNER_BYTES = 120
# Rows of the heatmap are handed out, staged and hashed in bands that end at multiples of this.
BAND_PX = 64


def bands(box: Box) -> Iterator[Box]:
    """`box` from top to bottom, cut at the heatmap's multiples of `BAND_PX` rows."""
    cuts = range(box.y // BAND_PX * BAND_PX + BAND_PX, box.y1, BAND_PX)
    for y, y1 in pairwise((box.y, *cuts, box.y1)):
        yield Box(y, box.x, y1 - y, box.width)


class Canvas:
    """Weighted sums over `box` (heatmap px) for `classes` channels; lives as long as its region.

    It rolls: tiles come in row-major order, so where a row of tiles begins, all above is final. A band of rows has sums
    from the first tile that touches it until it is handed out, so memory follows the region's width, not its height. Weights
    are summed when a band is handed out: of one band at a time, whatever the tile.
    """

    def __init__(self, box: Box, classes: int, window: NDArray[np.float32]) -> None:
        self._classes = classes
        self._window = window.astype(np.float64)
        self._left = deque(bands(box))  # not handed out
        self._open: dict[int, NDArray[np.float64]] = {}  # their sums, once touched, by their first row
        self._tiles: deque[tuple[int, int]] = deque()  # corners of those that reach into bands not handed out, as they came
        self._final = -math.inf  # rows above are final

    def add(self, scores: NDArray[np.float32], y: int, x: int) -> None:
        """Add one tile's (C, h, w) scores whose corner lies at heatmap pixel (y, x); what falls outside the box is dropped.

        Raises ValueError for a tile that begins above one that was added before, or above rows that were handed out.
        """
        if y < max(self._final, self._tiles[-1][0] if self._tiles else -math.inf):
            raise ValueError(
                f"tile at heatmap row {y} after one below it, or after all rows above {self._final} were final; "
                "add tiles in row-major order"
            )
        for band in takewhile(lambda band: band.y < y + len(self._window), self._left):
            if common := self._common(band, y, x):
                on_band, on_tile = common
                if band.y not in self._open:
                    self._open[band.y] = np.zeros((self._classes, *band.shape))
                self._open[band.y][:, *on_band] += self._window[on_tile] * scores[:, *on_tile]
        self._tiles.append((y, x))

    def _common(self, band: Box, y: int, x: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
        """What `band` and the tile at (y, x) have in common, as slices of either; None for nothing.

        In plain numbers: it is asked for every tile.
        """
        height, width = self._window.shape
        top, end = max(y, band.y), min(y + height, band.y1)
        left, right = max(x, band.x), min(x + width, band.x1)
        if top >= end or left >= right:
            return None
        on_band = slice(top - band.y, end - band.y), slice(left - band.x, right - band.x)
        return on_band, (slice(top - y, end - y), slice(left - x, right - x))

    def final(self, row: int) -> Iterator[NDArray[np.float32]]:
        """The bands above heatmap row `row` that were not handed out yet, given that no tile to come begins above it.

        Each is (C, h, width of the box) float32 weighted means; NaN where no tile fell.
        """
        self._final = max(self._final, row)
        while self._left and self._left[0].y1 <= row:
            band = self._left.popleft()
            # Where nothing fell the NaN is the one that every array here is filled with, not that of 0/0, whose sign
            # depends on the processor.
            mean = np.full((self._classes, *band.shape), np.nan, np.float32)
            if band.y in self._open:
                weights = self._weights(band)
                # Divided in float64, rounded once.
                np.divide(self._open.pop(band.y), weights, out=mean, where=weights > 0, casting="same_kind")
                del weights
            while self._tiles and self._tiles[0][0] + len(self._window) <= band.y1:
                self._tiles.popleft()
            yield mean

    def _weights(self, band: Box) -> NDArray[np.float64]:
        """(h, w) sums of the weights of all tiles in `band`, added in their order."""
        weights = np.zeros(band.shape)
        for y, x in takewhile(lambda tile: tile[0] < band.y1, self._tiles):
            if common := self._common(band, y, x):
                weights[common[0]] += self._window[common[1]]
        return weights


def canvas_bytes(classes: int, output_px: int, h_stride: int, width: int) -> int:
    """Most bytes of a canvas of `width` heatmap px at work, with the band that it hands out.

    classes    channels
    output_px  side of a tile's answer
    h_stride   heatmap px between tiles' answers: their first rows are multiples of it
    """
    # A tile's first row lies at most this far inside its band.
    inside = BAND_PX - math.gcd(h_stride, BAND_PX)
    rows = math.ceil((inside + output_px) / BAND_PX) * BAND_PX
    sums = rows * width * classes * 8
    handed_out = BAND_PX * width * (classes * 4 + 8 + 1)  # means, weights, and where there are any
    adding = (output_px + classes * BAND_PX) * output_px * 8  # the window, and a tile's weighted scores in one band
    places = ((output_px + BAND_PX) // h_stride + 1) * ((width + output_px) // h_stride) * CORNER_BYTES
    return sums + handed_out + adding + places
