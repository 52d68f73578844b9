"""Writers of small slides for tests. Promise: pixels are what was asked for, and equal arguments give equal bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

TILE_PX = 128
THUMBNAIL = "Aperio Image Library v0\r\nthumbnail"


def smooth_pixels(height: int, width: int, seed: int = 0) -> Pixels:
    """(H, W, 3) uint8 colours that change slowly and differ everywhere; no pixel is white."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6.28, (3, 2))
    waves = [110 + 60 * np.sin(y / 37 + a) + 50 * np.cos(x / 53 + b) for a, b in phase]
    return np.stack(waves, axis=-1).round().astype(np.uint8)


def noise_pixels(height: int, width: int, seed: int = 0) -> Pixels:
    """(H, W, 3) uint8, every pixel its own; no pixel is white."""
    return np.random.default_rng(seed).integers(0, 250, (height, width, 3), np.uint8)


def pyramid(pixels: Pixels, downsamples: Sequence[int]) -> list[Pixels]:
    """`pixels` and its area means by whole factors; rows and columns left over are dropped."""
    levels = []
    for k in downsamples:
        h, w = pixels.shape[0] // k, pixels.shape[1] // k
        blocks = pixels[: h * k, : w * k].reshape(h, k, w, k, -1)
        levels.append(blocks.mean(axis=(1, 3)).round().astype(np.uint8))
    return levels


def write_tiff(
    path: Path,
    levels: Sequence[Pixels],
    *,
    mpp: float | str | None = 0.5,
    compression: str | None = "deflate",
    aperio: bool = True,
    tile_px: int = TILE_PX,
    label: Pixels | None = None,
    macro: Pixels | None = None,
    resolution: tuple[float, float, str] | None = None,
) -> Path:
    """A tiled TIFF pyramid, which OpenSlide opens as `aperio` or, without, as `generic-tiff`.

    levels       (H, W, 3) or (H, W) uint8, the largest first
    mpp          written into Aperio's description as it stands; None leaves it out
    compression  "deflate", "jpeg" (YCbCr 4:4:4, quality 90) or None
    resolution   (x, y) px per unit and the unit ("INCH", "CENTIMETER"), for the tags of level 0
    """
    height, width = levels[0].shape[:2]
    described = "" if mpp is None else f"|MPP = {mpp}"
    text = f"Aperio Image Library v0\r\n{width}x{height} ({tile_px}x{tile_px})|AppMag = 20{described}" if aperio else None
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            grey = level.ndim == 2
            tiff.write(
                _tiles(level, tile_px),
                shape=level.shape,
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                photometric="minisblack" if grey else "rgb",
                subsampling=(1, 1) if compression == "jpeg" and not grey else None,
                compression=compression,
                compressionargs={"level": 90} if compression == "jpeg" else None,
                description=text,
                metadata=None,
                software=False,
                subfiletype=0 if aperio or number == 0 else 1,
                resolution=resolution[:2] if resolution and number == 0 else None,
                resolutionunit=resolution[2] if resolution and number == 0 else None,
            )
            if aperio and number == 0:
                _strip(
                    tiff,
                    pyramid(level, [max(1, min(max(level.shape) // 64, *level.shape[:2]))])[0],
                    "Aperio Image Library v0\r\nthumbnail",
                    0,
                )
        for name, picture, kind in (("label", label, 1), ("macro", macro, 9)):
            if picture is not None:
                _strip(tiff, picture, f"Aperio Image Library v0\r\n{name} {picture.shape[1]}x{picture.shape[0]}", kind)
    return path


def tile_span(path: Path, tile: int, page: int = 0) -> tuple[int, int]:
    """(place, bytes) of a tile or strip in the file."""
    with tifffile.TiffFile(path) as tiff:
        return tiff.pages[page].dataoffsets[tile], tiff.pages[page].databytecounts[tile]


def drop_tiles(path: Path, tiles: Iterable[int], page: int = 0) -> None:
    """Make a file sparse: these tiles are not in it, which a reader has to show as no data."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in (tiff.pages[page].tags["TileOffsets"], tiff.pages[page].tags["TileByteCounts"]):
            values = list(tag.value)
            for tile in tiles:
                values[tile] = 0
            tag.overwrite(values)


def corrupt_tile(path: Path, tile: int, page: int = 0) -> None:
    """Overwrite a tile's bytes by others, so that reading it fails."""
    at, count = tile_span(path, tile, page)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * count)


def patch_tag(path: Path, tag: int, value: int, page: int = 0) -> Path:
    """Let a tag of the file say something else."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[page].tags[tag].overwrite(value)
    return path


def cut(path: Path, share: float) -> Path:
    """Keep the first `share` of a file."""
    os.truncate(path, int(path.stat().st_size * share))
    return path


def _tiles(level: Pixels, tile_px: int) -> Iterator[Pixels]:
    """Whole tiles in row-major order, filled up with the edge's own pixels."""
    height, width = level.shape[:2]
    for y in range(0, height, tile_px):
        for x in range(0, width, tile_px):
            tile = level[y : y + tile_px, x : x + tile_px]
            more = ((0, tile_px - tile.shape[0]), (0, tile_px - tile.shape[1]), (0, 0))[: level.ndim]
            yield np.pad(tile, more, mode="edge")


def _strip(tiff: tifffile.TiffWriter, picture: Pixels, description: str, subfiletype: int) -> None:
    tiff.write(
        picture, rowsperstrip=picture.shape[0], description=description, metadata=None, software=False, subfiletype=subfiletype
    )
