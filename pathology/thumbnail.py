"""Small pictures of whole slides, and the few drawing pieces that every picture shares.

Promise: memory is bounded by the picture and one block of the slide, whatever levels the slide has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.resample import level_for
from pathology.slide import WHITE, Slide, SlideInfo

# Side of the largest block that is decoded at once, in level px: 12 MiB of RGB.
BLOCK_PX = 2048
# Where tiles are corrupt, blocks are halved until they are this small.
LEAST_PX = 64

# Every picture of a slide is made from one of this size, which is kept as long as the slide is open.
LARGEST_PX = 1560
_kept: WeakKeyDictionary[Slide, NDArray[np.uint8]] = WeakKeyDictionary()

# Photographs hardly shrink further at higher levels, which take up to four times as long.
PNG_LEVEL = 1

# A thumbnail may be smaller than asked for by this factor.
SMALLER = 1.5

# Blocks are whole multiples of the reduction, so a larger one would make blocks larger; what is left is done by a resize.
MAX_FACTOR = 256

INK = (32, 32, 32)
GREY = (110, 110, 110)


def reduced_shape(info: SlideInfo, level: int, factor: int) -> tuple[int, int]:
    """(height, width) of a level reduced by a whole factor; the last row and column may cover less than the others."""
    height, width = info.level_shapes[level]
    return -(-height // factor), -(-width // factor)


def reduced_blocks(
    slide: Slide, level: int, factor: int, corrupt: list[Box] | None = None
) -> Iterator[tuple[Box, NDArray[np.uint8], NDArray[np.bool_]]]:
    """A whole level, each pixel the mean of factor x factor level pixels, block by block in row-major order.

    Yields (box in reduced px, (H, W, 3) uint8 RGB, (H, W) bool: at least half of the pixel has data).
    `corrupt` takes the boxes, in level px, that cannot be decoded; they are white and have no data.
    """
    corrupt = [] if corrupt is None else corrupt
    extent = Box(0, 0, *slide.info.level_shapes[level])
    side = max(1, BLOCK_PX // factor) * factor
    for y in range(0, extent.height, side):
        for x in range(0, extent.width, side):
            box = Box(y, x, side, side).intersect(extent)
            small = Box(y // factor, x // factor, -(-box.height // factor), -(-box.width // factor))
            if slide.blank(level, box):  # most of a huge slide may be
                yield small, np.full((*small.shape, 3), WHITE, np.uint8), np.zeros(small.shape, bool)
                continue
            rgb, valid = _readable(slide, level, box, corrupt)
            if factor == 1:
                yield small, rgb, valid
                continue
            if valid.all():
                has_data = np.ones(small.shape, bool)
            else:
                has_data = np.asarray(Image.fromarray(valid.astype(np.uint8) * 255).reduce(factor)) >= 128
            yield small, np.asarray(Image.fromarray(rgb).reduce(factor)), has_data


def _readable(slide: Slide, level: int, box: Box, corrupt: list[Box]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels and data mask of a box; parts whose pixels are corrupt are white and no data, down to pieces of LEAST_PX."""
    try:
        return slide.read_masked(level, box)
    except SlideError as error:
        if error.reason is not Reason.CORRUPT_TILES:
            raise
    pixels, valid = np.full((*box.shape, 3), WHITE, np.uint8), np.zeros(box.shape, bool)
    if max(box.shape) > LEAST_PX:
        h, w = -(-box.height // 2), -(-box.width // 2)
        for y, x in ((0, 0), (0, w), (h, 0), (h, w)):
            quarter = Box(box.y + y, box.x + x, h, w).intersect(box)
            if not quarter.empty:
                at = quarter.slices(box)
                pixels[at], valid[at] = _readable(slide, level, quarter, corrupt)
    else:
        corrupt.append(box)
    return pixels, valid


def thumbnail(slide: Slide, max_px: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the whole slide, its longer side at most `max_px`, or its own size if smaller; white outside the scan.

    Up to a third smaller than `max_px` where that spares reading a level many times as large.
    """
    info = slide.info
    scale = max(1.0, max(info.shape) / max_px)
    level = level_for(info.level_downsamples, scale * SMALLER)
    downsample = info.level_downsamples[level]
    scale = max(scale, downsample)
    factor = min(max(1, int(scale / downsample)), MAX_FACTOR)
    pixels = np.full((*reduced_shape(info, level, factor), 3), WHITE, np.uint8)
    for box, rgb, _ in reduced_blocks(slide, level, factor):
        pixels[box.slices()] = rgb
    height, width = (max(1, round(side / scale)) for side in info.shape)
    if pixels.shape[:2] == (height, width):
        return pixels
    # The level may end a little before the slide's own edge or after it: drawn out and cut there, it isn't stretched.
    y1, x1 = (side / (downsample * factor) for side in info.shape)
    missing = [(0, max(0, math.ceil(end) - n)) for end, n in zip((y1, x1), pixels.shape[:2], strict=True)]
    pixels = np.pad(pixels, [*missing, (0, 0)], mode="edge")
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.HAMMING, box=(0, 0, x1, y1)))


def picture(slide: Slide, min_px: int, max_px: int) -> Image.Image:
    """The whole slide as RGB for people: the longer side at most `max_px`, small slides enlarged to `min_px`."""
    kept = _kept.get(slide)
    if kept is None:
        kept = _kept[slide] = thumbnail(slide, LARGEST_PX)
    image = Image.fromarray(kept)
    wanted = min(max(max(image.size), min_px), max_px)
    if wanted == max(image.size):
        return image
    scale = wanted / max(image.size)
    shape = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(shape, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.HAMMING)


def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, the same on every machine. It holds ASCII and little more: write um, not the letter mu."""
    loaded = ImageFont.load_default(size=size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which draws text; install Pillow's own wheel")
    return loaded


def fit_text(text: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut and ended by "..." where it is wider than `width` px."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def png_bytes(image: Image.Image) -> bytes:
    """The image, RGB or RGBA, as PNG with no metadata: equal pixels, equal bytes."""
    pixels = np.ascontiguousarray(image)
    # Each row less the one above it: for photographs as small as the best of all filters, found in a third of the time.
    return bytes(imagecodecs.png_encode(pixels, level=PNG_LEVEL, filter=imagecodecs.PNG.FILTER.UP))
