"""The lower levels of a heatmap: their shapes, shards and pixels, and the NGFF metadata that places all levels. No files.

Promise: a pixel of a lower level is the mean of the predicted pixels among the 2 x 2 below it, and its NGFF transform
puts its centre at the mean of their centres.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.encoding import AT_ONCE
from pathology.export.colormap import class_colors
from pathology.geometry import Box, HeatmapFrame
from pathology.model import ModelSpec

NGFF_VERSION = "0.5"

# Levels are added until the longer side is at most this many px.
SMALLEST_PX = 256
# Unit of viewing, and unit of writing at level 0, in px a side.
CHUNK_PX = 512
SHARD_PX = 2048
# A shard holds all classes; many classes make it smaller, since one shard per level is held in memory.
SHARD_BYTES = 256 * 2**20
SMALLEST_SHARD_PX = 16


@dataclass(frozen=True, slots=True)
class Level:
    """One array of the pyramid; all shapes are (classes, height, width)."""

    shape: tuple[int, int, int]
    chunk: tuple[int, int, int]
    shard: tuple[int, int, int]

    def shard_box(self, row: int, col: int) -> Box:
        """The part of the level that one shard covers."""
        _, height, width = self.shard
        return Box(row * height, col * width, height, width).intersect(Box(0, 0, *self.shape[1:]))

    def shard_boxes(self) -> Iterator[Box]:
        """All shards in row-major order: every pixel once."""
        for row in range(math.ceil(self.shape[1] / self.shard[1])):
            for col in range(math.ceil(self.shape[2] / self.shard[2])):
                yield self.shard_box(row, col)


def make_levels(classes: int, shape: tuple[int, int]) -> tuple[Level, ...]:
    """Level 0 of `shape` (height, width) and its halves, sides rounded up, until the longer side is at most 256 px.

    Shards of all levels hold the same number of pixels, but those of lower levels are flatter and wider. So one row of
    level-0 shards completes whole shards of the next levels too, and few unfinished ones wait in memory.
    """
    side = SHARD_PX
    while side > SMALLEST_SHARD_PX and classes * side * side * 4 > SHARD_BYTES:
        side //= 2
    chunk_side = min(CHUNK_PX, side)
    levels: list[Level] = []
    height, width = shape
    while True:
        shard_height = max(chunk_side, side >> len(levels))
        chunk_y, shard_y = _cut(height, chunk_side, shard_height)
        chunk_x, shard_x = _cut(width, chunk_side, side * side // shard_height)
        levels.append(Level((classes, height, width), (1, chunk_y, chunk_x), (classes, shard_y, shard_x)))
        if max(height, width) <= SMALLEST_PX:
            return tuple(levels)
        height, width = (height + 1) // 2, (width + 1) // 2


def _cut(extent: int, chunk: int, shard: int) -> tuple[int, int]:
    """(chunk, shard) along one axis, no longer than the array needs."""
    chunk = min(chunk, extent)
    return chunk, min(shard, math.ceil(extent / chunk) * chunk)


def halve(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, h, w) -> (C, ceil(h/2), ceil(w/2)) float32: the mean of up to 2 x 2 pixels that are not NaN."""
    classes, height, width = block.shape
    means = np.full((classes, (height + 1) // 2, (width + 1) // 2), np.nan, np.float32)
    rows = 2 * max(1, AT_ONCE // max(1, width))
    for half, whole in zip(means, block, strict=True):
        for y in range(0, height, rows):
            _halve(whole[y : y + rows], half[y // 2 : (y + rows) // 2])
    return means


def _halve(block: NDArray[np.float32], means: NDArray[np.float32]) -> None:
    """Put the means of (h, w) pixels into those of `means`, NaN up to then, that have any."""
    sums, counts = np.zeros(means.shape, np.float64), np.zeros(means.shape, np.uint8)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = block[dy::2, dx::2]
        predicted = ~np.isnan(part)
        at = (slice(part.shape[0]), slice(part.shape[1]))
        sums[at] += np.where(predicted, part, np.float32(0))
        counts[at] += predicted
    np.divide(sums, counts, out=means, where=counts > 0, casting="same_kind")


Window = tuple[float, float, float, float]


class ShardGather:
    """Makes the whole shards of a lower level from those of the level before; holds the unfinished ones only."""

    def __init__(self, level: Level) -> None:
        self._level = level
        self._open: dict[tuple[int, int], tuple[NDArray[np.float32], int]] = {}

    def add(self, box: Box, block: NDArray[np.float32]) -> tuple[Box, NDArray[np.float32]] | None:
        """Add one shard of the level before, (C, h, w) at `box`; gives this level's shard, box and pixels, once it is whole."""
        half = halve(block)
        box = Box(box.y // 2, box.x // 2, *half.shape[1:])
        at = (box.y // self._level.shard[1], box.x // self._level.shard[2])
        whole = self._level.shard_box(*at)
        if at not in self._open:
            self._open[at] = np.empty((self._level.shape[0], *whole.shape), np.float32), math.prod(whole.shape)
        pixels, missing = self._open.pop(at)
        pixels[:, *box.slices(whole)] = half
        missing -= math.prod(box.shape)
        if missing:
            self._open[at] = pixels, missing
            return None
        return whole, pixels


def transforms(frame: HeatmapFrame, levels: int, leading: int) -> list[dict[str, Any]]:
    """NGFF `datasets`: where the levels' pixels lie, for y and x after so many `leading` axes.

    NGFF places pixel centres, and um from the centre of the slide's pixel 0: the centre of the first pixel of level k is
    that of heatmap pixel 0 plus (2^k - 1) / 2 heatmap pixels (https://ngff.openmicroscopy.org/0.5).
    """
    datasets = []
    for k in range(levels):
        pixel = frame.mpp * 2**k
        first = frame.translation_um + frame.mpp * (2**k - 1) / 2
        scale = {"type": "scale", "scale": [*[1.0] * leading, pixel, pixel]}
        translation = {"type": "translation", "translation": [*[0.0] * leading, first, first]}
        datasets.append({"path": str(k), "coordinateTransformations": [scale, translation]})
    return datasets


def ngff_attributes(frame: HeatmapFrame, spec: ModelSpec, levels: int, window: Window) -> dict[str, Any]:
    """The `ome` attributes of a heatmap: one multiscale image in um with one named, coloured channel per class.

    window  of what is stored: the whole range, and that shown
    """
    channels = [
        {
            "label": name,
            "color": "{:02X}{:02X}{:02X}".format(*color),
            "window": dict(zip(("min", "max", "start", "end"), window, strict=True)),
            "active": True,
        }
        for name, color in zip(spec.classes, class_colors(spec.colors, len(spec.classes)), strict=True)
    ]
    datasets = transforms(frame, levels, 1)
    axes = [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]
    method = {
        "description": "mean of the predicted pixels among 2 x 2; NaN is not predicted",
        "method": "pathology.pyramid.halve",
    }
    return {
        "version": NGFF_VERSION,
        "multiscales": [{"name": spec.name, "type": "mean", "metadata": method, "axes": axes, "datasets": datasets}],
        "omero": {"channels": channels},
    }
