"""Slides for the benchmarks: real pixels of a CC0 slide, mirrored over as much glass as slides have, as Aperio writes them.

Promise: equal arguments give equal bytes. Tissue is the part of the CC0 slide that is full of it, and its mirror images side by
side, in a few large blobs; glass is the slide's own emptiest tiles.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

TILE = 240
LEVELS = (1, 4, 16)
QUALITY = 75

# The part of the CC0 slide without glass, in whole tiles.
TISSUE = (slice(3 * TILE, 12 * TILE), slice(3 * TILE, 7 * TILE))

# Centres and radii of the blobs of tissue, in shares of the slide's sides: 40 % of its area in all, the first 20, the last 8.
BLOBS = ((0.30, 0.26, 0.253), (0.70, 0.69, 0.2), (0.24, 0.76, 0.156))

Pixels = NDArray[np.uint8]
Key = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """One slide: (height, width) in px, um/px, magnification, which of BLOBS, and whether equal tiles are stored once."""

    shape: tuple[int, int]
    mpp: float
    objective: int
    blobs: tuple[int, ...] = (0, 1, 2)
    shared: bool = False


SLIDES = {
    "s20": Layout((20160, 20160), 0.5, 20),
    "s20dot": Layout((20160, 20160), 0.5, 20, blobs=(2,)),
    "s40": Layout((50400, 60000), 0.25, 40),
    "s40half": Layout((50400, 60000), 0.25, 40, blobs=(0,)),
    "s40dot": Layout((50400, 60000), 0.25, 40, blobs=(2,)),
    "s40small": Layout((21600, 21600), 0.25, 40),
    "s20small": Layout((10800, 10800), 0.5, 20),
    "s8g": Layout((84000, 96000), 0.25, 40, shared=True),
}


def build(name: str, source: Path, folder: Path) -> Path:
    """The slide called `name`, made from the CC0 slide `source` unless it is there already."""
    path = folder / f"{name}.svs"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        _write(partial, SLIDES[name], _Source(source))
        partial.rename(path)
    return path


class _Source:
    """The real region mirrored to a whole number of tiles, and tiles of bare glass."""

    def __init__(self, path: Path) -> None:
        with tifffile.TiffFile(path) as tiff:
            region = tiff.pages[0].asarray()
        region = region[: region.shape[0] // TILE * TILE, : region.shape[1] // TILE * TILE]
        dense = region[TISSUE]
        whole = np.concatenate([dense, dense[:, ::-1]], axis=1)
        self.tissue = np.concatenate([whole, whole[::-1]], axis=0)
        tiles = [
            region[y : y + TILE, x : x + TILE] for y in range(0, region.shape[0], TILE) for x in range(0, region.shape[1], TILE)
        ]
        spread = [float(np.ptp(tile, axis=-1).mean() + tile.std()) for tile in tiles]
        self.glass = [tiles[i] for i in np.argsort(spread)[:4]]


def _write(path: Path, layout: Layout, source: _Source) -> None:
    height, width = layout.shape
    down, across = height // TILE, width // TILE
    y, x = (np.arange(n) + 0.5 for n in (down, across))
    tissue = np.zeros((down, across), bool)
    for centre_y, centre_x, radius in (BLOBS[i] for i in layout.blobs):
        tissue |= (y[:, None] / down - centre_y) ** 2 + (x[None, :] / across - centre_x) ** 2 < radius**2
    mirrored = tuple(n // TILE for n in source.tissue.shape[:2])

    def content(row: int, col: int) -> Key:
        """What a level-0 tile shows: a place in the mirrored tissue, or a piece of glass."""
        if row < down and col < across and tissue[row, col]:
            return ("tissue", row % mirrored[0], col % mirrored[1])
        return ("glass", (row * 7 + col * 3) % len(source.glass))

    def pixels(key: Key, k: int) -> Pixels:
        if key[0] == "glass":
            tile = source.glass[key[1]]  # type: ignore[index]
        else:
            _, row, col = key
            tile = source.tissue[row * TILE : (row + 1) * TILE, col * TILE : (col + 1) * TILE]  # type: ignore[operator]
        return tile if k == 1 else np.asarray(Image.fromarray(np.ascontiguousarray(tile)).reduce(k))

    levels = []
    for k in LEVELS:
        rows, cols = -(-(height // k) // TILE), -(-(width // k) // TILE)
        keys: list[Key] = []
        for row in range(rows):
            for col in range(cols):
                if k == 1:
                    keys.append(content(row, col))
                else:
                    keys.append((k, *(content(row * k + i, col * k + j) for i in range(k) for j in range(k))))
        levels.append(((height // k, width // k), keys))

    def encoded(key: Key) -> bytes:
        if key[0] in ("tissue", "glass"):
            return _jpeg(pixels(key, 1))
        k, *parts = key
        assert isinstance(k, int)
        small = [pixels(part, k) for part in parts]  # type: ignore[arg-type]
        return _jpeg(np.concatenate([np.concatenate(small[i * k : (i + 1) * k], axis=1) for i in range(k)], axis=0))

    text = f"Aperio Image Library v12.0.15\r\n{width}x{height} ({TILE}x{TILE}) JPEG/RGB Q={QUALITY}"
    text += f"|AppMag = {layout.objective}|MPP = {layout.mpp}"
    write_bigtiff(path, levels, encoded, text, layout.shared)


def _jpeg(pixels: Pixels) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(pixels), level=QUALITY, colorspace="RGB", outcolorspace="YCbCr", subsampling="422"
        )
    )


def write_bigtiff(
    path: Path,
    levels: list[tuple[tuple[int, int], list[Key]]],
    encoded: Callable[[Key], bytes],
    description: str,
    shared: bool,
) -> None:
    """A BigTIFF pyramid of JPEG tiles (YCbCr 4:2:2): one directory a level, then the thumbnail that Aperio puts second.

    levels  ((height, width), one key per tile in row-major order); `encoded` gives a key's bytes, asked once per key
    shared  store the bytes of equal keys once, and let all their tiles name that one place
    """
    directories = []
    known: dict[Key, bytes] = {}
    places: dict[Key, int] = {}
    with path.open("wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        for number, (shape, keys) in enumerate(levels):
            offsets = np.empty(len(keys), np.uint64)
            sizes = np.empty(len(keys), np.uint64)
            for i, key in enumerate(keys):
                if key not in known:
                    known[key] = encoded(key)
                if not shared or key not in places:
                    places[key] = file.tell()
                    file.write(known[key])
                offsets[i], sizes[i] = places[key], len(known[key])
            directories.append(_directory(shape, offsets, sizes, description, tiled=True, reduced=number > 0))
            if number == 0:
                small = np.full((192, 192, 3), 240, np.uint8)
                at = file.tell()
                file.write(small.tobytes())
                strip = np.array([at], np.uint64), np.array([small.nbytes], np.uint64)
                directories.append(_directory((192, 192), *strip, "Aperio Image Library v12.0.15\r\nthumbnail", tiled=False))
            if not shared and number == 0:
                known = {key: data for key, data in known.items() if key[0] in ("tissue", "glass")}
        pointer = 8
        for tags in directories:
            at = _aligned(file)
            file.seek(pointer)
            file.write(struct.pack("<Q", at))
            file.seek(at)
            outside, entries = b"", b""
            body = at + 8 + 20 * len(tags) + 8
            for tag, kind, values in sorted(tags):
                data = values if isinstance(values, bytes) else np.asarray(values, {3: "<u2", 16: "<u8"}[kind]).tobytes()
                count = len(data) // {2: 1, 3: 2, 16: 8}[kind]
                if len(data) > 8:
                    field = struct.pack("<Q", body + len(outside))
                    outside += data + bytes(-len(data) % 8)
                else:
                    field = data.ljust(8, b"\0")
                entries += struct.pack("<HHQ", tag, kind, count) + field
            pointer = at + 8 + len(entries)
            file.write(struct.pack("<Q", len(tags)) + entries + struct.pack("<Q", 0) + outside)


def _aligned(file: object) -> int:
    at = file.seek(0, 2)  # type: ignore[attr-defined]
    file.write(bytes(-at % 8))  # type: ignore[attr-defined]
    return int(at + -at % 8)


def _directory(
    shape: tuple[int, int],
    offsets: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    description: str,
    *,
    tiled: bool,
    reduced: bool = False,
) -> list[tuple[int, int, object]]:
    tags: list[tuple[int, int, object]] = [
        (254, 16, [1 if reduced else 0]),
        (256, 16, [shape[1]]),
        (257, 16, [shape[0]]),
        (258, 3, [8, 8, 8]),
        (259, 3, [7 if tiled else 1]),
        (262, 3, [6 if tiled else 2]),
        (270, 2, description.encode() + b"\0"),
        (277, 3, [3]),
        (284, 3, [1]),
    ]
    if tiled:
        tags += [(322, 3, [TILE]), (323, 3, [TILE]), (324, 16, offsets), (325, 16, sizes), (530, 3, [2, 1])]
    else:
        tags += [(273, 16, offsets), (278, 16, [shape[0]]), (279, 16, sizes)]
    return tags


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the benchmarks' slides.")
    parser.add_argument("names", nargs="*", default=list(SLIDES), help=f"which: {', '.join(SLIDES)} (default: all)")
    parser.add_argument("--source", type=Path, required=True, help="the CC0 slide cmu_small_region.svs")
    parser.add_argument("--folder", type=Path, required=True, help="where to put them")
    options = parser.parse_args()
    for name in options.names:
        path = build(name, options.source, options.folder)
        print(f"{path} {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
