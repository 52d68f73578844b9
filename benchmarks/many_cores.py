"""How many tiles a second processes hand out that read with more threads than this machine has cores.

    python benchmarks/many_cores.py PROCESSES THREADS       of each process

Decoding is replaced by sleep of the time that it takes here: it lets Python's lock go as decoding does, and needs no core. All
else is real, so the machine's own cores are what limits it in the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reading import chunks
from benchmarks.run import slide, tiles
from pathology.readers.codecs import Data, Pixels, TileCodec

SLIDE = "s40"
DECODE_S = 230e-6  # of a 240-px tile and its mean of 2 x 2


def asleep(codec: TileCodec, data: Iterable[Data], factor: int, fast: bool) -> list[Pixels]:
    """In place of `TileCodec.decode_all`."""
    made = []
    for tile in data:
        codec._check(tile)
        time.sleep(DECODE_S)
        made.append(np.empty((codec.shape[0] // factor, codec.shape[1] // factor, 3), np.uint8))
    return made


def read(part: int, parts: int, threads: int, together: Barrier) -> None:
    """Read the chunks of one of so many parts of the list."""
    TileCodec.decode_all = asleep  # type: ignore[method-assign,assignment]
    every = chunks(str(slide(SLIDE)), np.load(tiles(SLIDE)))
    mine = every[part * len(every) // parts : (part + 1) * len(every) // parts]
    with ThreadPoolExecutor(threads) as pool:
        together.wait()
        for _ in pool.map(lambda chunk: list(chunk()), mine):
            pass
    together.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    context = get_context("spawn")
    together = context.Barrier(options.processes + 1)
    for part in range(options.processes):
        context.Process(target=read, args=(part, options.processes, options.threads, together), daemon=True).start()
    together.wait()
    began = time.perf_counter()
    together.wait()
    print(f"{len(np.load(tiles(SLIDE))) / (time.perf_counter() - began):.0f} tiles/s")


if __name__ == "__main__":
    main()
