"""Pictures without a pyramid: PNG, JPEG, and TIFF in strips. Promise: decoded once, whole, under a limit on pixels.

Positions are those of the file's own rows and columns; colour profiles and a photograph's orientation are not applied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from pathology.errors import Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.readers.inspect import Kind, SlideFile, refuse_channels
from pathology.readers.mpp import directory_claim
from pathology.readers.opened import Opened, over_white
from pathology.readers.tiff import largest

MAX_PIXELS = 2**28  # 768 MiB of RGB, which each process holds

# The classes themselves: PIL.Image.open would try other formats, and has a limit of its own that is set for all of a process.
PICTURES: dict[Kind, Callable[[BinaryIO], ImageFile.ImageFile]] = {
    Kind.PNG: PngImagePlugin.PngImageFile,
    Kind.JPEG: JpegImagePlugin.JpegImageFile,
    Kind.TIFF: TiffImagePlugin.TiffImageFile,
}
OPAQUE_MODES = frozenset(("1", "L", "P", "RGB", "YCbCr"))
ALPHA_MODES = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))

# What a whole file of the kind has near its end.
ENDS = {Kind.PNG: b"IEND", Kind.JPEG: b"\xff\xd9"}
END_BYTES = 64 * 1024


class PlainReader:
    """One level, held in memory."""

    def __init__(self, pixels: NDArray[np.uint8], valid: NDArray[np.bool_] | None) -> None:
        self._held: tuple[NDArray[np.uint8], NDArray[np.bool_] | None] | None = pixels, valid

    def read(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        if self._held is None:
            raise UsageError("the slide is closed; open it again")
        pixels, valid = self._held
        at = box.slices()
        return pixels[at].copy(), None if valid is None else valid[at].copy()

    def close(self) -> None:
        self._held = None


def open_plain(file: SlideFile) -> Opened:
    """The picture, decoded. Raises SlideError: TRUNCATED, READ_ERROR, UNSUPPORTED (too large, or not grey, palette or RGB)."""
    if file.kind is Kind.TIFF:
        refuse_channels(file)
        if next(largest(file.directories)) is not file.directories[0]:
            message = f"{file.name} has its largest picture behind a smaller one; convert it to a tiled pyramid"
            raise SlideError(Reason.UNSUPPORTED, message)
    pixels, valid = _decode(file)
    return Opened(
        reader=PlainReader(pixels, valid),
        library=f"pillow {PIL.__version__}",
        vendor=str(file.kind),
        level_shapes=((pixels.shape[0], pixels.shape[1]),),
        level_downsamples=(1.0,),
        claim=directory_claim(file.directories[0]) if file.directories else None,
    )


def _decode(file: SlideFile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    try:
        with file.path.open("rb") as stream, PICTURES[file.kind](stream) as image:
            if image.width * image.height > MAX_PIXELS:
                message = f"{file.name} has {image.width} x {image.height} px in one piece; convert it to a tiled pyramid"
                raise SlideError(Reason.UNSUPPORTED, message)
            if image.mode not in OPAQUE_MODES | ALPHA_MODES:
                message = f"{file.name} has colours of the kind {image.mode}; convert it to 8-bit RGB"
                raise SlideError(Reason.UNSUPPORTED, message)
            if image.mode in ALPHA_MODES or "transparency" in image.info:
                return over_white(image.convert("RGBA"))
            return np.array(image.convert("RGB")), None
    except SlideError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # Pillow's, for damaged files
        if _ends_early(file):
            message = f"{file.name} is cut short: the mark that ends a {file.kind} is missing; copy it again from its source"
            raise SlideError(Reason.TRUNCATED, message) from error
        raise SlideError(Reason.READ_ERROR, f"{file.name} cannot be decoded: {error}; write it anew") from error


def _ends_early(file: SlideFile) -> bool:
    """Whether the file lacks the mark that ends one of its kind."""
    if file.kind not in ENDS:
        return False
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - END_BYTES))
        return ENDS[file.kind] not in stream.read()
