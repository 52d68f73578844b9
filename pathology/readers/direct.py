"""Tiled TIFF without a slide library: places of tiles from tifffile, bytes by pread, pixels from `codecs`.

Promise: the pixels are OpenSlide's, or the file is left to OpenSlide. While there is room for it every tile is decoded once,
however many windows and threads want it; tiles that nobody asks for are never touched; and neighbours in the file are
fetched in one read.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.clock import timed
from pathology.errors import Reason, SlideError, UsageError
from pathology.faults import read_fault, retried
from pathology.geometry import Box
from pathology.pulse import beat
from pathology.readers import codecs
from pathology.readers.codecs import Corrupt, Pixels
from pathology.readers.inspect import SlideFile, refuse_channels
from pathology.readers.mpp import directory_claim, ome_claim
from pathology.readers.opened import CACHE_BYTES, Opened, whole_downsample
from pathology.readers.tile_cache import TileCache
from pathology.readers.tiled_levels import VERSION, TiledLevel, tiled_levels
from pathology.slide import WHITE

Pread = Callable[[int, int, int], bytes]  # as os.pread: (descriptor, count, place)

# Tiles that lie no further apart than this are fetched together: a read over a network costs more than these bytes do.
GAP_BYTES = 64 * 2**10
LARGEST_READ = 2 * 2**20
# Storage that takes longer than this for a read, on the mean of the last ones, is read ahead of use.
SLOW_READ_S = 1e-3
READS_REMEMBERED = 8
# A box of more tiles than this is no model's tile: nobody has fetched it ahead.
MANY_TILES = 16
# Regions that read at once from one slide.
REGIONS = 2
# Of a tile, in which its own header lies.
HEADER_BYTES = 2**16
# Compressed bytes fetched ahead and not yet decoded; what is forgotten is read again alone.
FETCHED_BYTES = 32 * 2**20


class _File:
    """A descriptor that lives as long as anyone holds this."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self._path = path
        self._close = os.close  # `os` itself may be gone by the time the interpreter ends
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamp = self._stamp_of(self.descriptor)

    def open_anew(self) -> None:
        """Let the descriptor be one that its server knows. Raises OSError; SlideError(CHANGED) where the file is another."""
        fresh = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self._stamp_of(fresh) != self._stamp:
                message = f"{self._path.name!r} was changed while it was read; run the same again"
                raise SlideError(Reason.CHANGED, message)
            os.dup2(fresh, self.descriptor, inheritable=False)  # for threads that read meanwhile it is one or the other
        finally:
            os.close(fresh)

    @staticmethod
    def _stamp_of(descriptor: int) -> tuple[int, int]:
        state = os.fstat(descriptor)
        return state.st_size, state.st_mtime_ns

    def __del__(self) -> None:
        if self.descriptor >= 0:
            self._close(self.descriptor)


class DirectReader:
    """Reads and decodes tiles by itself, in the threads that ask.

    decodes  how many tiles were decoded; `reads`: how many times the file was read
    """

    def __init__(
        self, path: Path, levels: tuple[TiledLevel, ...], cache_bytes: int, fast: bool = False, pread: Pread = os.pread
    ) -> None:
        self._path = path
        self._name = repr(path.name)
        self._levels = levels
        self._fast = fast
        self._pread = pread
        # Let go, not closed: it is closed when the last thread that reads from it is out.
        self._file: _File | None = _File(path)
        self._cache = TileCache[tuple[int, int, int]](min(CACHE_BYTES, cache_bytes))
        self._most_cached = cache_bytes
        self._lock = threading.Lock()
        self._fetched: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._fetched_bytes = 0
        self._read_s = 0.0  # a running mean
        self.decodes = 0
        self.reads = 0

    def close(self) -> None:
        self._file = None

    def read(self, level: int, box: Box) -> tuple[Pixels, NDArray[np.bool_] | None]:
        height, width = self._levels[level].codec.shape
        if box.height * box.width > MANY_TILES * height * width:
            self.prefetch([(level, box, 1)])
        pixels = np.empty((*box.shape, 3), np.uint8)
        missing = self._fill(level, [box], 1, [pixels])
        if not missing:
            return pixels, None
        valid = np.ones(box.shape, np.bool_)
        for part in missing:
            valid[part.slices(box)] = False
        return pixels, valid

    def read_boxes(self, level: int, boxes: Sequence[Box], factor: int, into: Sequence[Pixels]) -> bool:
        """Fill the (H, W, 3) arrays `into` with `boxes` of one row, in pixels of the level reduced by `factor` and inside it.

        Means of factor x factor pixels, rounded once; of a reader opened as fast, JPEG's scaled decoding where there is one.
        False where tiles do not divide: nothing was read.
        """
        if any(side % factor for side in self._levels[level].codec.shape):
            return False
        self._fill(level, boxes, factor, into)
        return True

    def _fill(self, level: int, boxes: Sequence[Box], factor: int, into: Sequence[Pixels]) -> list[Box]:
        """As `read_boxes`, from the tiles under the boxes; what the file lacks is white, and listed."""
        decode, source = functools.partial(self._decode, self._open()), self._levels[level]
        height, width = source.codec.shape[0] // factor, source.codec.shape[1] // factor
        y0, y1, missing = boxes[0].y, boxes[0].y1, list[Box]()
        # In plain numbers, and what all rows share made once: this loop runs for every tile under every window.
        columns = []
        for box, pixels in zip(boxes, into, strict=True):
            for col in range(box.x // width, -(-box.x1 // width)):
                x, x1 = max(col * width, box.x), min((col + 1) * width, box.x1)
                columns.append((col, pixels, slice(x - box.x, x1 - box.x), slice(x - col * width, x1 - col * width)))
        across = sorted({col for col, *_ in columns})
        for row in range(y0 // height, -(-y1 // height)):
            top, end, first = max(row * height, y0), min((row + 1) * height, y1), row * source.across
            to, of = slice(top - y0, end - y0), slice(top - row * height, end - row * height)
            stored = [col for col in across if source.stored[first + col]]
            tiles = dict(zip(stored, self._cache.get([(level, first + col, factor) for col in stored], decode), strict=True))
            for col, pixels, to_x, of_x in columns:
                tile = tiles.get(col)
                if tile is None:
                    pixels[to, to_x] = WHITE
                    missing.append(Box(top, col * width + of_x.start, end - top, of_x.stop - of_x.start))
                elif isinstance(tile, Corrupt):
                    raise self._corrupt(level, first + col, tile)
                else:
                    pixels[to, to_x] = tile[of, of_x]
        return missing

    def scales(self, level: int, factor: int) -> bool:
        """Whether `read_boxes` gives scaled JPEG here: opened as fast, and of a codec and tile size that can."""
        return self._fast and self._levels[level].codec.scales(factor)

    def prefetch(self, windows: Iterable[tuple[int, Box, int]]) -> None:
        """Fetch the compressed tiles under `windows` (level, box, factor), neighbours together, for reads that follow soon."""
        file = self._open()
        wanted: dict[tuple[int, int], tuple[int, int]] = {}
        for number, box, factor in self._joined(windows):
            level = self._levels[number]
            under = [(number, index, factor) for index in level.under(box, factor) if level.stored[index]]
            for _, index, _ in self._cache.lacking(under):
                wanted[number, index] = int(level.places[index]), int(level.sizes[index])
        with self._lock:
            missing = sorted((*span, tile) for tile, span in wanted.items() if tile not in self._fetched)
        for first, end, tiles in merged(missing):
            data = memoryview(self._bytes(file, first, end - first))
            with self._lock:
                for place, size, tile in tiles:
                    before = self._fetched.pop(tile, b"")  # another thread may have fetched it meanwhile
                    self._fetched[tile] = data[place - first : place - first + size]
                    self._fetched_bytes += size - len(before)
                while self._fetched_bytes > FETCHED_BYTES:
                    self._fetched_bytes -= len(self._fetched.popitem(last=False)[1])

    def reserve(self, windows: Iterable[tuple[int, Box, int]]) -> None:
        """Keep as many tiles as reading rows of windows like these, one after the other, takes to decode each once."""
        needed = 0
        for number, box, factor in self._joined(windows):
            height, width = (side // factor for side in self._levels[number].codec.shape)
            needed += (box.height + 2 * height) * (box.width + 2 * width) * 3
        self._cache.limit_bytes = min(self._most_cached, max(self._cache.limit_bytes, REGIONS * needed))

    def blank(self, level: int, box: Box) -> bool:
        """Whether the file holds none of the tiles under `box`."""
        source = self._levels[level]
        return not any(source.stored[index] for index in source.under(box, 1))

    @property
    def slow(self) -> bool:
        """Whether a read takes so long that threads of their own should wait for it."""
        return self._read_s > SLOW_READ_S

    def _joined(self, windows: Iterable[tuple[int, Box, int]]) -> Iterator[tuple[int, Box, int]]:
        """The windows, neighbours in a row as one, cut to where whole tiles are reduced by themselves."""
        row: tuple[int, int, int, int] | None = None
        x = x1 = 0
        for number, box, factor in windows:
            joins = row == (number, factor, box.y, box.height)
            if joins and x - box.width <= box.x <= x1 + self._levels[number].codec.shape[1] // factor:
                x, x1 = min(x, box.x), max(x1, box.x + box.width)
                continue
            yield from self._cut(row, x, x1)
            row, x, x1 = (number, factor, box.y, box.height), box.x, box.x + box.width
        yield from self._cut(row, x, x1)

    def _cut(self, row: tuple[int, int, int, int] | None, x: int, x1: int) -> Iterator[tuple[int, Box, int]]:
        """(level, box, factor) of what lies between columns `x` and `x1` of a row (level, factor, y, height), if anything."""
        if row is None:
            return
        number, factor, y, height = row
        level = self._levels[number]
        if any(side % factor for side in level.codec.shape):
            return
        box = Box(y, x, height, x1 - x).intersect(Box(0, 0, level.shape[0] // factor, level.shape[1] // factor))
        if not box.empty:
            yield number, box, factor

    def _open(self) -> _File:
        if self._file is None:
            raise UsageError("the slide is closed; open it again")
        return self._file

    def _corrupt(self, level: int, index: int, why: Corrupt) -> SlideError:
        message = f"{self._name}: tile {index} of level {level} cannot be decoded: {why}; copy the slide from its source"
        return SlideError(Reason.CORRUPT_TILES, message)

    def _decode(self, file: _File, names: Sequence[tuple[int, int, int]]) -> list[Pixels | Corrupt]:
        """The tiles called (level, index, factor), all of one level and factor; Corrupt in place of what cannot be decoded."""
        level, _, factor = names[0]
        source, fetched = self._levels[level], self._fetched
        with self._lock:
            data = [fetched.pop((level, index), b"") for _, index, _ in names]
            self._fetched_bytes -= sum(map(len, data))
            self.decodes += len(names)
        for place, (_, index, _) in enumerate(names):
            if not data[place]:
                data[place] = self._bytes(file, int(source.places[index]), int(source.sizes[index]))
        with timed("decode"):
            return source.codec.decode_all(data, factor, self._fast)

    def _bytes(self, file: _File, place: int, count: int) -> bytes:
        self.reads += 1
        began = time.perf_counter()
        try:
            with timed("read"):
                data = retried(lambda: self._pread(file.descriptor, count, place), file.open_anew)
        except SlideError:
            raise
        except OSError as error:
            raise read_fault(self._name, self._path, error) from error
        beat()
        self._read_s += (time.perf_counter() - began - self._read_s) / READS_REMEMBERED
        if len(data) < count:
            message = f"{self._name} ends at byte {place + len(data)} since it was opened; copy it again from its source"
            raise SlideError(Reason.READ_ERROR, message)
        return data


def merged(
    spans: list[tuple[int, int, tuple[int, int]]],
) -> Iterator[tuple[int, int, list[tuple[int, int, tuple[int, int]]]]]:
    """(first byte, end, members) of the reads that cover `spans` (place, size, name), which are sorted by place."""
    members: list[tuple[int, int, tuple[int, int]]] = []
    first = end = 0
    for span in spans:
        place, size, _ = span
        if members and (place > end + GAP_BYTES or max(end, place + size) - first > LARGEST_READ):
            yield first, end, members
            members = []
        if not members:
            first = end = place
        members.append(span)
        end = max(end, place + size)
    if members:
        yield first, end, members


# Makes whose TIFF holds the pyramid as OpenSlide shows it: tiles side by side, level by level. Not Leica and Ventana, whose
# areas and overlapping tiles OpenSlide lays out itself.
VENDORS = frozenset(("aperio", "generic-tiff", "hamamatsu", "philips"))


def open_direct(
    file: SlideFile, opened: Opened | None, cache_bytes: int, fast: bool, pread: Pread = os.pread, compare: bool = True
) -> Opened | str:
    """The TIFF `file` read directly, or why it cannot be.

    opened   the same file as OpenSlide opens it, whose levels and properties are taken over; None where OpenSlide does not
    compare  look at one tile both ways
    """
    if opened is not None and opened.vendor not in VENDORS:
        return f"{opened.vendor} lays its tiles out in a way of its own"
    found = tiled_levels(file, opened)
    if isinstance(found, str):
        return found
    levels, ome = found
    if ome is not None:
        opened = None  # OpenSlide sees neither the levels nor the resolution of an OME-TIFF
    _refuse_lies(file, levels[0])
    if compare and opened is not None and not _agrees(file, levels[0], opened):
        return "one of its tiles comes out otherwise than OpenSlide shows it"
    reader = DirectReader(file.path, levels, cache_bytes, fast, pread)
    library = f"direct (tifffile {VERSION}, imagecodecs {codecs.VERSION})"
    if opened is not None:
        return replace(opened, reader=reader, library=library)
    refuse_channels(file)
    shapes = tuple(level.shape for level in levels)
    downsamples = tuple(max(1.0, (shapes[0][0] / h + shapes[0][1] / w) / 2) for h, w in shapes)
    return Opened(
        reader=reader,
        library=library,
        vendor="ome-tiff" if ome else "generic-tiff",
        level_shapes=shapes,
        level_downsamples=tuple(whole_downsample(shapes[0], s, d) for s, d in zip(shapes, downsamples, strict=True)),
        claim=(ome_claim(ome) if ome else None) or directory_claim(file.directories[0]),
    )


def _refuse_lies(file: SlideFile, level: TiledLevel) -> None:
    """Raise SlideError(CORRUPT_TILES) where the tiles' own headers claim another size than the TIFF does.

    The first, the middle and the last tile are looked at: that all three lie is no accident of one tile.
    """
    stored, claims = np.flatnonzero(level.sizes), [level.codec.shape]
    if not len(stored):
        return
    with file.path.open("rb") as stream:
        for index in {int(stored[0]), int(stored[len(stored) // 2]), int(stored[-1])}:
            count = min(int(level.sizes[index]), HEADER_BYTES)
            claimed = level.codec.claimed(os.pread(stream.fileno(), count, int(level.places[index])))
            if claimed is None or claimed[:2] == level.codec.shape:
                return
            claims.append((claimed[0], claimed[1]))
    stated, claim = (f"{width} x {height} px" for height, width in (claims[0], max(claims[1:])))
    message = f"{file.name}: the file states tiles of {stated}, their own headers {claim}; copy it again from its source"
    raise SlideError(Reason.CORRUPT_TILES, message)


def _agrees(file: SlideFile, level: TiledLevel, opened: Opened) -> bool:
    """Whether the middle one of level 0's tiles is the same through OpenSlide; yes where OpenSlide cannot read it.

    A make may store its tiles in a way that nobody here has seen.
    """
    stored = np.flatnonzero(level.sizes)
    if not len(stored):
        return True
    index = int(stored[len(stored) // 2])
    height, width = level.codec.shape
    tile = Box(index // level.across * height, index % level.across * width, height, width)
    inside = tile.intersect(Box(0, 0, *level.shape))
    try:
        theirs, _ = opened.reader.read(0, inside)
    except SlideError:
        return True
    with file.path.open("rb") as stream:
        data = os.pread(stream.fileno(), int(level.sizes[index]), int(level.places[index]))
    try:
        return np.array_equal(level.codec.decode(data)[inside.slices(tile)], theirs)
    except Corrupt:
        return False
