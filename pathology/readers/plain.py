"""Pictures without a pyramid: PNG, JPEG, and TIFF in strips. Promise: decoded once, whole, under a limit on pixels, and not
before pixels are wanted.

Positions are those of the file's own rows and columns; colour profiles and a photograph's orientation are not applied.
"""

from __future__ import annotations

import functools
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from pathology.errors import Reason, SlideError, UsageError, one_line
from pathology.faults import read_fault, retried
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

# What Pillow raises on damaged files.
NOT_UNDERSTOOD = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError, struct.error, zlib.error),
)

# What a whole file of the kind has near its end.
ENDS = {Kind.PNG: b"IEND", Kind.JPEG: b"\xff\xd9"}
END_BYTES = 64 * 1024


class PlainReader:
    """One level, held in memory from its first read on."""

    def __init__(self, file: SlideFile) -> None:
        self._file: SlideFile | None = file
        self._held: tuple[NDArray[np.uint8], NDArray[np.bool_] | None] | None = None
        self._lock = threading.Lock()

    def read(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        pixels, valid = self._pixels()
        at = box.slices()
        return pixels[at].copy(), None if valid is None else valid[at].copy()

    def close(self) -> None:
        with self._lock:
            self._file = self._held = None

    def _pixels(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        with self._lock:
            if self._file is None:
                raise UsageError("the slide is closed; open it again")
            if self._held is None:
                self._held = retried(functools.partial(_decoded, self._file))
            return self._held


def _decoded(file: SlideFile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    with _picture(file) as image:
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            return over_white(image.convert("RGBA"))
        return np.array(image.convert("RGB")), None


def open_plain(file: SlideFile) -> Opened:
    """The picture, not yet decoded. Raises SlideError: TRUNCATED, READ_ERROR, UNSUPPORTED (too large, or not grey, palette or
    RGB)."""
    if file.kind is Kind.TIFF:
        refuse_channels(file)
        if next(largest(file.directories)) is not file.directories[0]:
            message = f"{file.name} has its largest picture behind a smaller one; convert it to a tiled pyramid"
            raise SlideError(Reason.UNSUPPORTED, message)
    with _picture(file) as image:
        width, height = image.size
        mode = image.mode
    if width * height > MAX_PIXELS:
        message = f"{file.name} has {width} x {height} px in one piece; convert it to a tiled pyramid"
        raise SlideError(Reason.UNSUPPORTED, message)
    if mode not in OPAQUE_MODES | ALPHA_MODES:
        raise SlideError(Reason.UNSUPPORTED, f"{file.name} has colours of the kind {mode}; convert it to 8-bit RGB")
    if _ends_early(file):
        raise _cut_short(file)
    return Opened(
        reader=PlainReader(file),
        library=f"pillow {PIL.__version__}",
        vendor=str(file.kind),
        level_shapes=((height, width),),
        level_downsamples=(1.0,),
        claim=directory_claim(file.directories[0]) if file.directories else None,
    )


@contextmanager
def _picture(file: SlideFile) -> Iterator[ImageFile.ImageFile]:
    """The picture as Pillow opens it; what Pillow raises on damaged files, while it is open, is a SlideError."""
    try:
        with file.path.open("rb") as stream, PICTURES[file.kind](stream) as image:
            yield image
    except SlideError:
        raise
    except NOT_UNDERSTOOD as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Pillow's own have none
            raise read_fault(file.name, file.path, error) from error
        if _ends_early(file):
            raise _cut_short(file) from error
        raise SlideError(Reason.READ_ERROR, f"{file.name} cannot be decoded: {one_line(error)}; write it anew") from error


def _cut_short(file: SlideFile) -> SlideError:
    message = f"{file.name} is cut short: the mark that ends a {file.kind} is missing; copy it again from its source"
    return SlideError(Reason.TRUNCATED, message)


def _ends_early(file: SlideFile) -> bool:
    """Whether the file lacks the mark that ends one of its kind."""
    if file.kind not in ENDS:
        return False
    with file.path.open("rb") as stream:
        stream.seek(max(0, file.size - END_BYTES))
        return ENDS[file.kind] not in stream.read(END_BYTES)
