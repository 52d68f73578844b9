"""Where the tiles of a TIFF's levels lie and how they are compressed: what `direct` reads by. The only import of tifffile.

Promise: no place outside the file is named, and what is not understood is a reason, never a guess.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathology.errors import one_line
from pathology.geometry import Box
from pathology.readers import codecs
from pathology.readers.codecs import TileCodec
from pathology.readers.inspect import SlideFile
from pathology.readers.opened import Opened

VERSION = tifffile.__version__

# What tifffile says of damaged files line by line is said here in one.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
# What it raises on them.
NOT_UNDERSTOOD = (
    *(tifffile.TiffFileError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError, struct.error),
)


@dataclass(frozen=True, slots=True, eq=False)
class TiledLevel:
    """Where one level's tiles lie: `places` and `sizes` (n,) int64 in row-major order, 0 where the file has no such tile.

    across  tiles in a row
    stored  (n,) 1 where the file has the tile, else 0: the same as `sizes`, quicker to look up one by one
    """

    shape: tuple[int, int]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    codec: TileCodec
    across: int
    stored: bytes

    def under(self, box: Box, factor: int) -> Iterator[int]:
        """Indices of the tiles that touch `box`, which is in pixels of the level reduced by `factor`."""
        height, width = (side // factor for side in self.codec.shape)
        for row in range(box.y // height, -(-box.y1 // height)):
            yield from range(row * self.across + box.x // width, row * self.across - (-box.x1 // width))


def tiled_levels(file: SlideFile, opened: Opened | None) -> tuple[tuple[TiledLevel, ...], str | None] | str:
    """(levels, OME-XML or None) of the pyramid in a TIFF, or why they cannot be read directly.

    The levels are those of `opened`, each the first directory of that size; without it, and of an OME-TIFF, the pyramid that
    tifffile finds in the file, sub-directories included.
    """
    try:
        with tifffile.TiffFile(file.path) as tiff:
            ome = tiff.ome_metadata if tiff.is_ome else None
            if opened is None or ome is not None:
                pages = [level.keyframe for level in tiff.series[0].levels]
            else:
                tiled = [p for p in tiff.pages if isinstance(p, tifffile.TiffPage) and p.is_tiled]
                by_shape = {(p.imagelength, p.imagewidth): p for p in reversed(tiled)}
                if not all(shape in by_shape for shape in opened.level_shapes):
                    return "not every level is a tiled picture of its own"
                pages = [by_shape[shape] for shape in opened.level_shapes]
            levels = []
            for page in pages:
                codec = _codec(page)
                if isinstance(codec, str):
                    return codec
                shape, across = (page.imagelength, page.imagewidth), -(-page.imagewidth // codec.shape[1])
                places, sizes = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
                tiles = across * -(-shape[0] // codec.shape[0])
                if not len(places) == len(sizes) == tiles:
                    return f"a level names {len(places)} tiles where {tiles} are due"
                sizes[places == 0] = 0
                ends = file.size - sizes  # not places + sizes, which may be too large a number
                if (sizes < 0).any() or ((sizes > 0) & ((places < 0) | (places > ends))).any():
                    return "a level has tiles beyond the end of the file"
                levels.append(TiledLevel(shape, places, sizes, codec, across, (sizes > 0).tobytes()))
    except NOT_UNDERSTOOD as error:
        return f"tifffile does not understand it ({one_line(error)})"
    return tuple(levels), ome


def _codec(page: tifffile.TiffPage) -> TileCodec | str:
    """How a page's tiles are decoded, or why not."""
    if not page.is_tiled or page.tiledepth != 1 or page.imagedepth != 1:
        return "a level is not tiled"
    if page.compression not in codecs.DECODERS:
        return f"compression {page.compression} is not decoded here"
    if page.bitspersample != 8 or page.samplesperpixel not in (1, 3) or (page.samplesperpixel == 3 and page.planarconfig != 1):
        return f"{page.samplesperpixel} samples of {page.bitspersample} bits are not decoded here"
    grey = page.samplesperpixel == 1
    if page.photometric not in ((codecs.WHITE_IS_ZERO, codecs.BLACK_IS_ZERO) if grey else (codecs.RGB, codecs.YCBCR)):
        return f"colours of photometric kind {int(page.photometric)} are not decoded here"
    if page.photometric == codecs.YCBCR and page.compression in (codecs.NONE, codecs.LZW, codecs.DEFLATE, codecs.OLD_DEFLATE):
        return "YCbCr without JPEG is not decoded here"
    if page.predictor not in (1, codecs.DIFFERENCES):
        return f"predictor {page.predictor} is not decoded here"
    if page.fillorder != 1:
        return "bits are stored in reversed order"
    return TileCodec(
        compression=int(page.compression),
        photometric=int(page.photometric),
        shape=(page.tilelength, page.tilewidth),
        samples=page.samplesperpixel,
        predictor=int(page.predictor) if page.compression in (codecs.LZW, codecs.DEFLATE, codecs.OLD_DEFLATE) else 1,
        tables=page.jpegtables or b"",
        header=page.jpegheader or b"",
    )
