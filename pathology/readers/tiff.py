"""The directories of a TIFF, read without a TIFF library, so that damage is found before a library meets it.

Promise: nothing larger than one directory's own tags is read, nothing outside the file is believed, and a file that was cut
short is told from one that is whole: every directory, tag value, strip and tile has to lie inside it.

Follows TIFF 6.0, BigTIFF, and Hamamatsu's NDPI: classic TIFF with 64-bit offsets, whose upper halves stand after the directory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Limits on what a header may make us read or a library allocate. Real slides stay far below all of them.
MAX_DIRECTORIES = 4096
MAX_TAGS = 4096
MAX_VALUES = 2**22  # of a tag: libraries take 40 bytes for each
MAX_TAG_BYTES = 2**26  # of a tag that is of no use here, but which libraries read: descriptions, colour profiles
# Of all directories together: they may be many, and may lie over one another.
MAX_ALL_TAGS = 2**17
MAX_ALL_VALUES = 2**24
MAX_TILE_PX = 2**24
MAX_SIDE_PX = 2**21
MAX_PIXELS = 2**38  # of a picture: 75 x 25 mm at 0.1 um are 1.9e11

TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
RATIONAL = 5

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR = 256, 257, 258, 259, 262, 277, 284
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
STRIP_OFFSETS, STRIP_BYTES, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES = 273, 279, 322, 323, 324, 325
SUB_DIRECTORIES = 330
NDPI_MARK = 65421
PLANES_APART = 2  # TIFF's PlanarConfiguration: a tile for each sample
NDPI_MAX_BYTES = 2**40  # larger 64-bit "offsets" are other bytes of a plain TIFF
SIZES = (WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT)
PLACES = (STRIP_OFFSETS, STRIP_BYTES, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES, SUB_DIRECTORIES)
WANTED = frozenset((*SIZES, *PLACES))

Values = NDArray[np.unsignedinteger[Any]] | tuple[float, ...]


class CutShort(Exception):
    """Something lies outside the file; the message says what."""


class Malformed(Exception):
    """Whole perhaps, but no reader should be given it; the message says why."""


@dataclass(frozen=True, slots=True)
class Directory:
    """What one directory (IFD) says of its picture.

    shape        (height, width) in px
    tile         (height, width) of its tiles, None where it has strips
    bits         per sample, the largest
    samples      per pixel
    photometric  TIFF's PhotometricInterpretation: 0, 1 grey, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr
    compression  TIFF's Compression
    resolution   (y, x, unit): px per unit, None where a tag is missing; unit 1 none, 2 inch, 3 cm
    """

    shape: tuple[int, int]
    tile: tuple[int, int] | None
    bits: int
    samples: int
    photometric: int
    compression: int
    resolution: tuple[float | None, float | None, int]

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


def read_directories(descriptor: int, size: int) -> tuple[Directory, ...]:
    """Every directory of the open TIFF file of `size` bytes, sub-directories included, in the order of the chain.

    Raises CutShort where anything lies outside the file, Malformed where the structure is senseless or beyond the limits.
    """
    layout, first = _layout(_Bytes(descriptor, size))
    directories: list[Directory] = []
    chains, seen = [first], set[int]()
    tags_read = values_read = 0
    while chains:
        at, chain = chains.pop(0), set[int]()
        while at and (at not in seen or at in chain):  # sub-directories are listed, and may form a chain besides
            if at in chain:
                raise Malformed("its directories form a loop")
            if len(seen) == MAX_DIRECTORIES:
                raise Malformed(f"it has more than {MAX_DIRECTORIES} directories")
            seen.add(at)
            chain.add(at)
            tags, listed, at = layout.directory(at)
            tags_read += listed
            values_read += sum(map(len, tags.values()))
            if tags_read > MAX_ALL_TAGS or values_read > MAX_ALL_VALUES:
                raise Malformed(f"its directories list more than {MAX_ALL_TAGS} tags, or {MAX_ALL_VALUES} places of tiles")
            directories.append(_picture(tags, size))
            chains.extend(int(v) for v in tags.get(SUB_DIRECTORIES, ()) if v)
    return tuple(directories)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A file that refuses to be read beyond its end."""

    descriptor: int
    size: int

    def take(self, at: int, count: int, what: str) -> bytes:
        if at + count > self.size:
            raise CutShort(f"{what} should lie at byte {at} to {at + count}, the file has {self.size}")
        data = os.pread(self.descriptor, count, at)
        if len(data) < count:
            raise CutShort(f"{what} at byte {at} ends early")
        return data


@dataclass(frozen=True, slots=True)
class _Layout:
    """How wide numbers are: `order` is struct's byte order, `wide` BigTIFF, `ndpi` classic with 64-bit offsets."""

    file: _Bytes
    order: str
    wide: bool
    ndpi: bool

    def directory(self, at: int) -> tuple[dict[int, Values], int, int]:
        """(wanted tags' values, how many tags there are, place of the next directory or 0)."""
        count_format, entry_bytes, next_format = ("Q", 20, "Q") if self.wide else ("H", 12, "Q" if self.ndpi else "I")
        head = struct.calcsize(count_format)
        (count,) = struct.unpack(self.order + count_format, self.file.take(at, head, "a directory"))
        if not 0 < count <= MAX_TAGS:
            raise Malformed(f"a directory lists {count} tags")
        body, tail = entry_bytes * count, struct.calcsize("=" + next_format)
        data = self.file.take(at + head, body + tail, "a directory")
        upper = self.file.take(at + head + body + tail, 4 * count, "a directory") if self.ndpi else b""
        tags: dict[int, Values] = {}
        for i in range(count):
            entry = data[i * entry_bytes : (i + 1) * entry_bytes]
            tag, kind, number = struct.unpack_from(self.order + ("HHQ" if self.wide else "HHI"), entry)
            values = self._values(tag, kind, number, entry[12 if self.wide else 8 :] + upper[4 * i : 4 * i + 4])
            if values is not None:
                if tag in tags:
                    raise Malformed(f"a directory lists tag {tag} twice")  # libraries differ in which of them they believe
                tags[tag] = values
        (following,) = struct.unpack_from("=" + next_format if self.ndpi else self.order + next_format, data, body)
        return tags, count, following

    def _values(self, tag: int, kind: int, number: int, field: bytes) -> Values | None:
        """A tag's values where they are wanted; where they lie is looked at in any case."""
        if kind not in TYPE_BYTES:
            return None
        needed = number * TYPE_BYTES[kind]
        if needed <= (8 if self.wide else 4):
            if self.ndpi and number == 1 and kind in (4, 13):
                return np.frombuffer(field, "<u8") if tag in WANTED else None
            data = field[:needed]
        else:
            (at,) = struct.unpack(self.order + ("Q" if len(field) == 8 else "I"), field)
            if at + needed > self.file.size:
                raise CutShort(f"tag {tag} should lie at byte {at} to {at + needed}, the file has {self.file.size}")
            if tag not in WANTED:
                if needed > MAX_TAG_BYTES:
                    raise Malformed(f"tag {tag} has {needed} bytes")
                return None
            if number > MAX_VALUES:
                raise Malformed(f"tag {tag} has {number} values")
            data = self.file.take(at, needed, f"tag {tag}")
        if kind == RATIONAL:
            pairs = np.frombuffer(data, self.order + "u4").astype(np.float64).reshape(-1, 2)
            return tuple(float(top / bottom) if bottom else 0.0 for top, bottom in pairs)
        if kind in INTEGERS:
            return np.frombuffer(data, self.order + INTEGERS[kind])
        return None


def _layout(file: _Bytes) -> tuple[_Layout, int]:
    """(layout, place of the first directory)."""
    head = file.take(0, 8, "the header")
    order, wide = "<" if head[:2] == b"II" else ">", b"+" in head[2:4]
    if wide:
        layout, first = _Layout(file, order, True, False), int(struct.unpack(order + "Q", file.take(8, 8, "the header"))[0])
    else:
        layout, first = _Layout(file, order, False, False), int(struct.unpack(order + "I", head[4:])[0])
        long = int.from_bytes(file.take(4, 8, "the header"), "little")
        if order == "<" and _lists(file, long, NDPI_MARK):
            layout, first = _Layout(file, order, False, True), long
        elif order == "<" and 2**32 <= long < NDPI_MAX_BYTES and not _lists(file, first, WIDTH):
            raise CutShort(f"a directory should lie whole at byte {long}, the file has {file.size}")
    if first == 0:
        raise CutShort("it names no directory: it was not written to its end")
    return layout, first


def _lists(file: _Bytes, at: int, tag: int) -> bool:
    """Whether there is a little-endian classic or NDPI directory at `at` that lists `tag`."""
    if at + 2 > file.size:
        return False
    (count,) = struct.unpack("<H", file.take(at, 2, "a directory"))
    if count > MAX_TAGS or at + 2 + 12 * count > file.size:
        return False
    entries = np.frombuffer(file.take(at + 2, 12 * count, "a directory"), "<u2").reshape(count, 6)
    return bool((entries[:, 0] == tag).any())


def _picture(tags: dict[int, Values], size: int) -> Directory:
    """The facts of one directory, once its pixels are known to lie inside the file."""

    def number(tag: int, default: int) -> int:
        values = tags.get(tag, ())
        return int(max(values)) if len(values) else default

    def resolution(tag: int) -> float | None:
        values = tags.get(tag, ())
        return float(values[0]) if len(values) else None

    for offsets, counts in ((TILE_OFFSETS, TILE_BYTES), (STRIP_OFFSETS, STRIP_BYTES)):
        if offsets in tags:
            _check_segments(np.asarray(tags[offsets]), np.asarray(tags.get(counts, ())), size)
    tile = (number(TILE_LENGTH, 0), number(TILE_WIDTH, 0)) if TILE_OFFSETS in tags else None
    shape, samples = (number(LENGTH, 0), number(WIDTH, 0)), number(SAMPLES, 1)
    if too_large(shape) or min(shape) < 1:
        raise Malformed(f"a picture in it has {shape[1]} x {shape[0]} px")
    if tile is not None:
        if not 0 < tile[0] * tile[1] <= MAX_TILE_PX:
            raise Malformed(f"its tiles are {tile[1]} x {tile[0]} px")
        due = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1]) * (samples if number(PLANAR, 1) == PLANES_APART else 1)
        if len(tags[TILE_OFFSETS]) < due:
            raise Malformed(f"a picture of {shape[1]} x {shape[0]} px lists {len(tags[TILE_OFFSETS])} of its {due} tiles")
    return Directory(
        shape=shape,
        tile=tile,
        bits=number(BITS, 1),
        samples=samples,
        photometric=number(PHOTOMETRIC, 0),
        compression=number(COMPRESSION, 1),
        resolution=(resolution(Y_RESOLUTION), resolution(X_RESOLUTION), number(RESOLUTION_UNIT, 2)),
    )


def _check_segments(offsets: NDArray[Any], counts: NDArray[Any], size: int) -> None:
    """Refuse where a strip or tile ends beyond the file. Places of 0 or of no bytes are sparse: there is nothing to miss."""
    starts, sizes = offsets.astype(np.uint64), np.ones(len(offsets), np.uint64)
    sizes[: len(counts)] = counts[: len(offsets)]
    outside = (starts > 0) & (sizes > 0) & ((sizes > size) | (starts > size - np.minimum(sizes, size)))
    if outside.any():
        raise CutShort(f"{int(outside.sum())} of {len(offsets)} strips or tiles of a picture lie beyond its {size} bytes")


def too_large(shape: tuple[int, int]) -> bool:
    """Whether a picture of (height, width) px is larger than any slide: plans and tables are made in proportion to it."""
    return max(shape) > MAX_SIDE_PX or shape[0] * shape[1] > MAX_PIXELS


def largest(directories: tuple[Directory, ...]) -> Iterator[Directory]:
    """The directories that no other exceeds in pixels."""
    most = max(d.pixels for d in directories)
    return (d for d in directories if d.pixels == most)
