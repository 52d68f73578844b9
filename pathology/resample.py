"""From level pixels to model pixels: which window to read for a tile, and one resize in C.

Promise: a tile's pixels are a function of the slide and the tile's position alone, because every tile is resized from
its own window. (Resizing a larger picture and cutting it up gives other bits: Pillow's box loses precision with the
distance from the picture's corner.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathology.geometry import Box
from pathology.model import ReadRule

if TYPE_CHECKING:
    from pathology.slide import SlideInfo

# A level up to this much coarser than asked for still counts as fine enough: level sizes are whole pixels, so a 4x level
# of an odd-sized slide is a hair off 4.
LEVEL_TOLERANCE = 1.01

# Radius of Pillow's filters in output pixels (times the scale when shrinking).
FILTER_RADIUS = {Image.Resampling.BOX: 0.5, Image.Resampling.BILINEAR: 1.0, Image.Resampling.BICUBIC: 2.0}


# A mean of more pixels than this a side is left to one resize: tiles of a file are smaller than 16 x 16 such pixels.
LARGEST_MEAN = 16
# Reductions by JPEG's scaled decoding, the strongest first.
SCALES = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class Window:
    """What to read for one tile: `box` in pixels of `level` reduced by `reduce`, and the tile inside it.

    reduce  whole factor by which the level is averaged before anything else; 1: not at all
    crop    (y0, x0, y1, x1) of the tile relative to the box's corner, in px as of `box`, not rounded
    shape   (height, width) to resize the crop to
    filter  Pillow's resampling filter; BOX stands for the exact mean of whole pixels
    """

    level: int
    box: Box
    crop: tuple[float, float, float, float]
    shape: tuple[int, int]
    filter: Image.Resampling
    reduce: int = 1

    @property
    def plain(self) -> bool:
        """Whether the pixels of `box` are the tile's own: nothing to interpolate, and none beyond it."""
        return self.box.shape == self.shape and self.crop == (0, 0, *self.shape)


def tile_window(
    info: SlideInfo,
    l0_origin: tuple[float, float],
    l0_size: tuple[float, float],
    shape: tuple[int, int],
    rule: ReadRule,
    scales: Callable[[int, int], bool] | None = None,
) -> Window:
    """The window for a tile whose corner is `l0_origin` (y, x) and whose sides are `l0_size`, both level-0 px, unrounded.

    scales  whether a level's tiles may be decoded at 1 / factor (level, factor), which gives other pixels than the mean does
    """
    ratio, level = _level(info.level_downsamples, l0_size, shape, rule.level)
    downsample = info.level_downsamples[level]
    reduce = _reduction(rule, ratio / downsample, (l0_origin[0] / downsample, l0_origin[1] / downsample), level, scales)
    downsample *= reduce
    y0, x0 = l0_origin[0] / downsample, l0_origin[1] / downsample
    y1, x1 = (l0_origin[0] + l0_size[0]) / downsample, (l0_origin[1] + l0_size[1]) / downsample
    scale = ratio / downsample
    on_raster = _on_raster(scale, y0, x0)
    filter = _filter(rule, scale, on_raster)
    # No pixel outside the tile can take part in an exact area mean, nor at scale 1 on whole pixels.
    alone = on_raster and (filter is Image.Resampling.BOX or scale == 1)
    margin = math.ceil(FILTER_RADIUS[filter] * max(scale, 1.0)) if rule.margin and not alone else 0
    top, left = math.floor(y0) - margin, math.floor(x0) - margin
    box = Box(top, left, math.ceil(y1) + margin - top, math.ceil(x1) + margin - left)
    return Window(level, box, (y0 - top, x0 - left, y1 - top, x1 - left), shape, filter, reduce)


@functools.lru_cache(maxsize=64)
def _level(
    downsamples: tuple[float, ...], l0_size: tuple[float, float], shape: tuple[int, int], rule: str
) -> tuple[float, int]:
    """(level-0 px per px of a tile, the level it is read from): the same for all tiles of a slide."""
    ratios = l0_size[0] / shape[0], l0_size[1] / shape[1]
    return max(ratios), 0 if rule == "0" else level_for(downsamples, min(ratios))


def level_for(downsamples: tuple[float, ...], ratio: float) -> int:
    """The coarsest level that is still as fine as `ratio` level-0 px per wanted px; level 0 if none is."""
    fitting = [i for i, d in enumerate(downsamples) if d <= ratio * LEVEL_TOLERANCE]
    return max(fitting, key=lambda i: downsamples[i], default=0)


def resize(pixels: NDArray[np.uint8], window: Window) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 pixels of `window.box` -> (height, width, 3) uint8, one resize."""
    y0, x0, y1, x1 = window.crop
    if (y1 - y0, x1 - x0) == window.shape and y0.is_integer() and x0.is_integer():
        return pixels[int(y0) : int(y1), int(x0) : int(x1)]  # scale 1 on whole pixels: nothing to interpolate
    if window.filter is Image.Resampling.BOX:
        return reduced(pixels[int(y0) : int(y1), int(x0) : int(x1)], round((y1 - y0) / window.shape[0]))
    image = Image.fromarray(pixels).resize(window.shape[::-1], window.filter, box=(x0, y0, x1, y1))
    return np.asarray(image)


def reduced(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (H / factor, W / factor, 3) uint8: means of factor x factor pixels, rounded once."""
    # Pillow's resize with its box filter rounds twice, once a direction.
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def _reduction(
    rule: ReadRule, scale: float, origin: tuple[float, float], level: int, scales: Callable[[int, int], bool] | None
) -> int:
    """The whole factor by which the level is read coarser: none, JPEG's where it is allowed, or the exact mean's."""
    if scales is not None:
        for factor in SCALES:
            if factor <= scale * LEVEL_TOLERANCE and scales(level, factor):
                return factor
    # On the factor's own raster alone, so that a source tile can be averaged by itself, once for all that share it.
    if rule.filter == "area" and 1 < scale <= LARGEST_MEAN and _on_raster(scale, origin[0] / scale, origin[1] / scale):
        return round(scale)
    return 1


def _filter(rule: ReadRule, scale: float, on_raster: bool) -> Image.Resampling:
    if rule.filter == "bicubic":
        return Image.Resampling.BICUBIC
    if rule.filter == "area" and scale > 1 and on_raster:
        return Image.Resampling.BOX
    return Image.Resampling.BILINEAR


def _on_raster(scale: float, y: float, x: float) -> bool:
    """Whether every output pixel covers whole level pixels, so that a box filter is the exact area mean."""
    return float(scale).is_integer() and float(y).is_integer() and float(x).is_integer()
