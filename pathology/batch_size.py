"""The batch size of a run that leaves it open, found before its first region.

Promise: on a device of its own it is the smallest power of two that is about as quick as any, with memory to spare; on the
CPU, where a batch is computed in pieces, a piece for each core. The number can decide last bits, so whoever asks keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from pathology.device import free_cached
from pathology.memory import slot_bytes
from pathology.model import Model, ModelSpec
from pathology.models.checks import warm_up
from pathology.models.halving import ran_out
from pathology.models.pieces import PIECE_PX
from pathology.threads import measure_model

# A larger batch has to be quicker by this share than one a quarter its size to be worth its memory.
GAIN = 0.05
MOST = 1024
# A batch that takes so long keeps any device busy.
LONG_S = 2.0
# Of a job's memory, for batches on their way and their answers: 1 / BATCH_SHARE.
BATCH_SHARE = 8


def choose_batch(model: Model, device: str, cores: int, memory: int) -> int:
    """Tiles of a batch for `model` on `device`, in a process that may hold `memory` bytes."""
    if device == "cpu":
        return cpu_batch(model.spec, cores, memory)
    return find_batch(model, most_tiles(model.spec, memory))


def most_tiles(spec: ModelSpec, memory: int) -> int:
    """Tiles of a batch that a process which may hold `memory` bytes should not exceed, whatever the device has."""
    return max(1, memory // BATCH_SHARE // slot_bytes(spec))


def cpu_batch(spec: ModelSpec, cores: int, memory: int) -> int:
    """A piece (see `models.pieces`) for each of `cores`, their number a power of two, as far as `memory` allows."""
    most = most_tiles(spec, memory)
    piece = min(most, max(1, PIECE_PX // spec.input_px**2))
    pieces = 1
    while pieces < cores and 2 * pieces * piece <= most:
        pieces *= 2
    return pieces * piece


def find_batch(model: Model, most: int, clock: Callable[[], float] = perf_counter) -> int:
    """Of powers of two up to `most`, the smallest whose tiles a second are within `GAIN` of the best.

    Larger ones are tried until memory runs out, two doublings have gained little, or a call takes long. A size counts only if
    there is memory for a quarter more. Raises ModelError as `warm_up` does.
    """
    a_tile: dict[int, float] = {}  # seconds
    size = 1
    while size <= min(most, MOST):
        seconds = _tried(model, size, clock)
        if seconds is None:
            free_cached()
            break
        a_tile[size] = seconds
        if size * seconds > LONG_S or seconds * (1 + GAIN) > a_tile.get(size // 4, float("inf")):
            break
        size *= 2
    free_cached()
    if not a_tile:
        return 1  # there may be memory for it; if not, the run will say so
    return min(size for size, seconds in a_tile.items() if seconds <= min(a_tile.values()) * (1 + GAIN))


def _tried(model: Model, size: int, clock: Callable[[], float]) -> float | None:
    """Seconds a tile of batches of `size`; None where there is not the memory."""
    try:
        warm_up(model, size + -(-size // 4))
        return measure_model(model, size, clock)
    except Exception as error:
        if not ran_out(error.__cause__ or error):
            raise
        return None
