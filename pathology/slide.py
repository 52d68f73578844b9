"""A slide: facts that decide planning (`SlideInfo`) and one door to pixels (`Slide`), whatever library reads the file.

Promise: `read` gives RGB of any box of any level, white outside the scan, from any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pathology.clock import timed
from pathology.errors import UsageError
from pathology.geometry import Box, mpp_ratio
from pathology.model import ReadRule
from pathology.pulse import under_way
from pathology.resample import Window, reduced, resize, tile_window

if TYPE_CHECKING:
    import dask.array as da

WHITE = 255
DEFAULT_RULE = ReadRule()


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """What is known of a slide without reading pixels.

    shape              (height, width) of level 0 in px
    level_shapes       (height, width) per level
    level_downsamples  level-0 px per level px; a whole number k where the level's size is level 0's over k, rounded
    mpp                um per level-0 px, mean of y and x (they differ by at most 5 %)
    mpp_source         where mpp came from: "option", "openslide.mpp", a vendor's field, "tiff tags"
    reader             library and version that give the pixels, e.g. "openslide 4.0.1"
    vendor             format as the reader names it ("aperio", "png")
    bounds             part of level 0 that was scanned (openslide.bounds-*), None where the file says nothing
    fingerprint        sha256 hex over size and sampled content, never the modification time
    objective          nominal magnification for people, None where unknown; decides nothing
    reader_why         why this reader, for people
    """

    shape: tuple[int, int]
    level_shapes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp: float
    mpp_source: str
    reader: str
    vendor: str
    bounds: Box | None
    fingerprint: str
    objective: float | None = None
    reader_why: str = ""


class Reader(Protocol):
    """What a file format has to offer; `Slide` does the rest. Safe from many threads."""

    def read(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Pixels of a box that lies inside the level, in the level's own px.

        Returns (H, W, 3) uint8 RGB, white where the scan has no data, and (H, W) bool, True where it has (None: everywhere).
        Raises SlideError(READ_ERROR) where the file cannot be decoded; the next read must work again.
        """
        ...

    def close(self) -> None:
        """Twice is once."""
        ...


@runtime_checkable
class TileReader(Reader, Protocol):
    """A reader that decodes a file's own tiles, and so can average each by itself and fetch neighbours together."""

    def read_boxes(self, level: int, boxes: Sequence[Box], factor: int, into: Sequence[NDArray[np.uint8]]) -> bool:
        """Fill the (H, W, 3) arrays `into` with `boxes` of one row, in pixels of the level reduced by a whole factor and wholly
        inside it; False: it cannot here."""
        ...

    def scales(self, level: int, factor: int) -> bool:
        """Whether `read_boxes` gives pixels that only come near the mean, which the user asked for."""
        ...

    def prefetch(self, windows: Iterable[tuple[int, Box, int]]) -> None:
        """Fetch what lies under windows (level, box, factor) that will be read soon."""
        ...

    def reserve(self, windows: Iterable[tuple[int, Box, int]]) -> None:
        """Make room for what rows of windows like these share."""
        ...

    def blank(self, level: int, box: Box) -> bool:
        """Whether the file holds none of the tiles under `box`, which is inside the level: all of it is white and no data."""
        ...

    @property
    def slow(self) -> bool:
        """Whether storage is so slow that it should be read well ahead."""
        ...


class Slide:
    """An open slide. Made by `pathology.open_slide`; a context manager."""

    def __init__(self, path: Path, info: SlideInfo, reader: Reader) -> None:
        self.path = path
        self.info = info
        self._reader = reader
        # Asked once: telling whether an object keeps a protocol takes longer than a small read.
        self._tiles = reader if isinstance(reader, TileReader) else None

    def __repr__(self) -> str:
        h, w = self.info.shape
        return f"<Slide {h} x {w} px, {self.info.mpp:g} um/px, {len(self.info.level_shapes)} levels, {self.info.reader}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of `box` in the level's own pixels; white outside the scan."""
        if self._holds(level, box):
            with under_way("read"):
                return self._reader.read(level, box)[0]
        return self.read_masked(level, box)[0]

    def valid(self, level: int, box: Box) -> NDArray[np.bool_]:
        """(H, W) bool: where the scan has data, in the level's own pixels; False outside the slide."""
        return self.read_masked(level, box)[1]

    def read_masked(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """`read` and `valid` of the same box, decoded once."""
        inside = box.intersect(self._level_box(level))
        if inside == box:
            with under_way("read"):
                rgb, valid = self._reader.read(level, box)
            return rgb, np.ones(box.shape, bool) if valid is None else valid
        pixels, mask = np.full((*box.shape, 3), WHITE, np.uint8), np.zeros(box.shape, bool)
        if not inside.empty:
            with under_way("read"):
                rgb, valid = self._reader.read(level, inside)
            at = inside.slices(box)
            pixels[at] = rgb
            mask[at] = True if valid is None else valid
        return pixels, mask

    def read_tile(
        self,
        l0_origin: tuple[float, float],
        l0_size: tuple[float, float],
        shape: tuple[int, int],
        rule: ReadRule = DEFAULT_RULE,
    ) -> NDArray[np.uint8]:
        """(height, width, 3) uint8: the part at `l0_origin` (y, x), `l0_size` level-0 px large, as `shape` pixels."""
        return self.read_window(self.window(l0_origin, l0_size, shape, rule))

    def window(
        self,
        l0_origin: tuple[float, float],
        l0_size: tuple[float, float],
        shape: tuple[int, int],
        rule: ReadRule = DEFAULT_RULE,
    ) -> Window:
        """What `read_tile` of the same arguments reads."""
        scales = self._tiles.scales if self._tiles is not None else None
        return tile_window(self.info, l0_origin, l0_size, shape, rule, scales)

    def read_window(self, window: Window) -> NDArray[np.uint8]:
        """(height, width, 3) uint8 of a window."""
        return self.read_strip([window])[0]

    def read_strip(self, windows: Sequence[Window], into: NDArray[np.uint8] | None = None) -> list[NDArray[np.uint8]]:
        """`read_window` of each of windows of one row, read as one: of the same level, height and `reduce`, each beginning no
        farther right than the one before it ends; several only where all are `inside`.

        into  (n, height, width, 3) uint8 where they are put; None: new memory
        """
        first = windows[0]
        if self._tiles is not None and all(w.plain for w in windows) and self.inside(first) and self.inside(windows[-1]):
            tiles = list(np.empty((len(windows), *first.shape, 3), np.uint8) if into is None else into)
            with under_way("read"):
                if self._tiles.read_boxes(first.level, [w.box for w in windows], first.reduce, tiles):
                    return tiles
        box = Box(first.box.y, first.box.x, first.box.height, windows[-1].box.x1 - first.box.x)
        pixels = self.read(first.level, box) if first.reduce == 1 else self._read_reduced(first.level, box, first.reduce)
        with timed("resample"):
            tiles = [resize(pixels[:, w.box.x - box.x : w.box.x1 - box.x], w) for w in windows]
            if into is None:
                return tiles
            for slot, tile in zip(into, tiles, strict=True):
                slot[...] = tile
            return list(into)

    def inside(self, window: Window) -> bool:
        """Whether all that the window reads lies on the slide."""
        return self._holds(window.level, _whole(window.box, window.reduce))

    def prefetch(self, windows: Iterable[Window]) -> None:
        """Fetch the bytes under `windows` that will be read soon; without effect where the reader has no use for it."""
        if self._tiles is not None:
            with under_way("read"):
                self._tiles.prefetch((w.level, w.box, w.reduce) for w in windows)

    def reserve(self, windows: Iterable[Window]) -> None:
        """Make room, within the limit the slide was opened with, for what rows of windows like these share."""
        if self._tiles is not None:
            self._tiles.reserve((w.level, w.box, w.reduce) for w in windows)

    def blank(self, level: int, box: Box) -> bool:
        """Whether it is known without a read that `box`, which is inside the level, is white and no data."""
        return self._tiles is not None and self._tiles.blank(level, box)

    @property
    def slow(self) -> bool:
        """Whether `prefetch` is worth a thread that waits for it."""
        return self._tiles is not None and self._tiles.slow

    def _read_reduced(self, level: int, box: Box, factor: int) -> NDArray[np.uint8]:
        """`box` in pixels of the level reduced by `factor`."""
        whole = _whole(box, factor)
        if self._tiles is not None and self._holds(level, whole):
            pixels = np.empty((*box.shape, 3), np.uint8)
            with under_way("read"):
                if self._tiles.read_boxes(level, [box], factor, [pixels]):
                    return pixels
        full = self.read(level, whole)
        with timed("resample"):
            return reduced(full, factor)

    def read_mpp(self, box: Box, mpp: float) -> NDArray[np.uint8]:
        """(H, W, 3) uint8: `box` in pixels of the slide seen at `mpp` um/px; (0, 0) is the slide's corner."""
        ratio = self._ratio(mpp)
        return self.read_tile((box.y * ratio, box.x * ratio), (box.height * ratio, box.width * ratio), box.shape)

    def to_dask(self, mpp: float, chunk_px: int = 1024) -> da.Array:
        """The whole slide at `mpp` um/px as a lazy (H, W, 3) uint8 dask array, read chunk by chunk when computed."""
        from pathology.lazy import slide_to_dask

        return slide_to_dask(self, mpp, chunk_px)

    def shape_at(self, mpp: float) -> tuple[int, int]:
        """(height, width) in whole pixels of the slide seen at `mpp`: every level-0 pixel is covered."""
        ratio = self._ratio(mpp)
        return int(-(-self.info.shape[0] // ratio)), int(-(-self.info.shape[1] // ratio))

    def _holds(self, level: int, box: Box) -> bool:
        return box.intersect(self._level_box(level)) == box

    def _level_box(self, level: int) -> Box:
        if not 0 <= level < len(self.info.level_shapes):
            raise UsageError(f"level {level} does not exist; this slide has levels 0 to {len(self.info.level_shapes) - 1}")
        return Box(0, 0, *self.info.level_shapes[level])

    def _ratio(self, mpp: float) -> float:
        if not mpp > 0:
            raise UsageError(f"mpp {mpp} um/px: ask for a resolution above 0")
        return mpp_ratio(mpp, self.info.mpp)


def _whole(box: Box, factor: int) -> Box:
    """A box in pixels of a level reduced by `factor`, in those of the level."""
    return Box(box.y * factor, box.x * factor, box.height * factor, box.width * factor)
