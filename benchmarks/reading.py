"""Reading tiles with one thread and no model: CPU and wall seconds for the tiles of a list.

    python reading.py READER SLIDE TILES.npy        READER: openslide, pyvips, ours, ours-fast

Prints a JSON object {tiles, wall_s, cpu_s, sum}: `sum` of all pixels, by which readers are compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

TILE_PX, MPP = 224, 0.5
Tiles = Iterator[NDArray[np.uint8]]


def with_openslide(slide: str, corners: NDArray[np.int64]) -> Tiles:
    import openslide

    opened = openslide.OpenSlide(slide)
    factor = round(MPP / float(opened.properties["openslide.mpp-x"]))
    side = TILE_PX * factor
    for y, x in corners.tolist():
        image = opened.read_region((x, y), 0, (side, side)).convert("RGB")
        yield np.asarray(image.reduce(factor) if factor > 1 else image)


def with_pyvips(slide: str, corners: NDArray[np.int64]) -> Tiles:
    os.environ["VIPS_CONCURRENCY"] = "1"
    import pyvips

    image = pyvips.Image.new_from_file(slide, access="random")
    factor = round(MPP / float(image.get("openslide.mpp-x") if "openslide.mpp-x" in image.get_fields() else MPP_OF[slide]))
    if image.bands == 4:
        image = image.extract_band(0, n=3)
    region = pyvips.Region.new(image)
    side = TILE_PX * factor
    for y, x in corners.tolist():
        data = region.fetch(x, y, side, side)
        if factor == 1:
            yield np.frombuffer(data, np.uint8).reshape(side, side, 3)
        else:
            small = pyvips.Image.new_from_memory(data, side, side, 3, "uchar").shrink(factor, factor)
            yield small.numpy()


MPP_OF: dict[str, float] = {}


def chunks(
    slide: str, corners: NDArray[np.int64], fast: bool = False
) -> list[Callable[[], Iterator[NDArray[np.uint8] | None]]]:
    """As the pipeline reads: rows of tiles by the chunk. Each is read when it is called."""
    from pathology.batches import chunk_tiles, read_chunk
    from pathology.grid import TileGrid
    from pathology.models import load_spec
    from pathology.readers import open_slide

    spec = load_spec("benchmarks.models:classifier?network=tiny")
    opened = open_slide(slide, reader="direct", fast_decode=fast)
    grid = TileGrid(opened.info.shape, opened.info.mpp, MPP, TILE_PX, TILE_PX)
    tiles, count = np.rint(corners / grid.l0_tile).astype(np.int32), chunk_tiles(TILE_PX)
    return [
        functools.partial(read_chunk, opened, spec, grid, row[first : first + count])
        for row in np.split(tiles, np.flatnonzero(np.diff(tiles[:, 0])) + 1)
        for first in range(0, len(row), count)
    ]


def with_ours(slide: str, corners: NDArray[np.int64], fast: bool = False) -> Tiles:
    """In one thread."""
    for chunk in chunks(slide, corners, fast):
        for tile in chunk():
            assert tile is not None
            yield tile


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reader", choices=["openslide", "pyvips", "ours", "ours-fast"])
    parser.add_argument("slide")
    parser.add_argument("tiles")
    parser.add_argument("--mpp", type=float, default=0.5, help="the slide's, for pyvips")
    options = parser.parse_args()
    corners = np.load(options.tiles)
    MPP_OF[options.slide] = options.mpp
    if options.reader == "openslide":
        tiles = with_openslide(options.slide, corners)
    elif options.reader == "pyvips":
        tiles = with_pyvips(options.slide, corners)
    else:
        tiles = with_ours(options.slide, corners, options.reader == "ours-fast")
    total = int(next(tiles).sum())  # the first opens the file
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    for tile in tiles:
        count += 1
        total += int(tile[::16, ::16].sum())
    facts = {"tiles": count, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "sum": total}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
