"""How a process divides its cores between reading and the model, from a short measurement.

Promise: the division is a function of measured seconds, made once, before a run's first region; the measuring itself is a fixed
small number of model calls and tiles. The number of torch threads can decide last bits, so it never changes within a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from pathology.model import Model, answer
from pathology.models.checks import made_up_batch

TILES = 16  # read for the measurement
BUDGET_S = 0.2  # a second call, or further tiles, only within this


@dataclass(frozen=True, slots=True)
class Split:
    """Threads that read tiles, and torch's threads, of one process."""

    readers: int
    threads: int


def split_threads(cores: int, read_s: float, model_s: float, threads: int = 0) -> Split:
    """The division of `cores` whose slower side is quickest.

    read_s, model_s   seconds a tile on one thread each
    threads           torch threads where they are given; 0: to be found

    A model on t threads takes model_s / t, as reading on the r = cores - t others takes read_s / r. A model on all cores is
    interrupted by its reader: torch's threads wait for each other, so both take model_s / cores + read_s. Ties go to fewer
    torch threads. A model on one thread waits for nobody, so there reading may have all cores, and the system shares them.
    """
    if cores < 1:
        raise ValueError(f"{cores} cores; a process has 1 or more")

    def slower(threads: int) -> float:
        left = cores - threads
        return max(model_s / threads, read_s / left) if left else model_s / cores + read_s

    threads = threads or min(range(1, cores + 1), key=slower)
    return Split(readers=cores if threads == 1 else max(1, cores - threads), threads=threads)


def measure_model(model: Model, batch_size: int, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds a tile of a warm model's call with made-up tiles; the quicker of two calls, or the only one of a slow model.

    Torch has to be set to one thread before.
    """
    batch = made_up_batch(model.spec, batch_size)
    first = _seconds(lambda: answer(model, *batch), clock)
    return (min(first, _seconds(lambda: answer(model, *batch), clock)) if first < BUDGET_S else first) / batch_size


def measure_reading(tiles: Iterator[object], clock: Callable[[], float] = perf_counter) -> float:
    """Seconds a tile of reading the first of `tiles`, at most `TILES` of them; infinity where there are none.

    The very first, which opens files and fills caches, is not counted if there are others.
    """
    ends = [began := clock()]
    for _ in islice(tiles, TILES):
        ends.append(clock())
        if ends[-1] - began > BUDGET_S and len(ends) > 2:
            break
    if len(ends) == 1:
        return float("inf")
    start = 1 if len(ends) > 2 else 0
    return (ends[-1] - ends[start]) / (len(ends) - 1 - start)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began
