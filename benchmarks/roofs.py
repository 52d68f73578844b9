"""The two roofs under which any pipeline stays: decoding alone, and the model alone. Imports nothing of the pipeline.

    python roofs.py decode SLIDE TILES.npy          every tile of the file under the list, once, by imagecodecs, one thread
    python roofs.py model NETWORK                   torch at its best batch, one thread, from normalised float tiles

Prints a JSON object with CPU and wall seconds, in all (decode) or per tile (model).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

TILE_PX, MPP = 224, 0.5


def decode(slide: str, tiles: str, side: int) -> dict[str, float]:
    import imagecodecs
    import tifffile

    corners = np.load(tiles)
    with tifffile.TiffFile(slide) as tiff:
        page = tiff.pages[0]
        height, width = page.tilelength, page.tilewidth
        across = -(-page.imagewidth // width)
        wanted = set()
        for y, x in corners.tolist():
            for row in range(y // height, -(-min(y + side, page.imagelength) // height)):
                for col in range(x // width, -(-min(x + side, page.imagewidth) // width)):
                    wanted.add(row * across + col)
        places = [(page.dataoffsets[i], page.databytecounts[i]) for i in sorted(wanted)]
        tables = page.jpegtables
    out = np.empty((height, width, 3), np.uint8)
    with Path(slide).open("rb") as file:
        wall, cpu = time.perf_counter(), time.process_time()
        for at, count in places:
            file.seek(at)
            imagecodecs.jpeg8_decode(file.read(count), tables=tables, colorspace="YCBCR", outcolorspace="RGB", out=out)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"source_tiles": len(places), "wall_s": wall, "cpu_s": cpu, "tiles": len(corners)}


def model(network: str, side: int) -> dict[str, float]:
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from networks import make

    torch.set_num_threads(1)
    module = make(network).to(memory_format=torch.channels_last)
    best: dict[str, float] = {"cpu_s": float("inf")}
    with torch.inference_mode():
        for batch in (4, 8, 16, 32, 64):
            pixels = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
            module(pixels)
            times = []
            for _ in range(3):
                wall, cpu = time.perf_counter(), time.process_time()
                module(pixels)
                times.append(((time.process_time() - cpu) / batch, (time.perf_counter() - wall) / batch))
            cpu_s, wall_s = sorted(times)[1]
            if cpu_s < best["cpu_s"]:
                best = {"cpu_s": cpu_s, "wall_s": wall_s, "batch": batch}
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="roof", required=True)
    decoding = commands.add_parser("decode")
    decoding.add_argument("slide")
    decoding.add_argument("tiles")
    decoding.add_argument("--side", type=int, required=True, help="side of a tile in level-0 px")
    modelling = commands.add_parser("model")
    modelling.add_argument("network")
    modelling.add_argument("--side", type=int, default=TILE_PX)
    options = parser.parse_args()
    facts = (
        decode(options.slide, options.tiles, options.side) if options.roof == "decode" else model(options.network, options.side)
    )
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
