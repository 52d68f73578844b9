"""A batch computed on the CPU in pieces, side by side on threads of torch's.

Promise: a piece's size follows from the batch and its tiles alone, so as long as there are no more threads than pieces, scores
do not depend on how many there are.

Why not one call with all threads: they would wait for each other after every operation, and the answers of early layers are so
large that each call has the system clear new memory for them. On two cores ResNet-18 takes 28 ms a tile in pieces, 33 at once.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pathology.device import thread_count
from pathology.pulse import beat

if TYPE_CHECKING:
    import torch

# Pixels of a piece: 8 tiles of 224 px. Half of it costs a tenth of the speed, and twice of it falls out of malloc's reach.
PIECE_PX = 8 * 224**2

# A batch that nobody asked for: as many tiles, and fewer of larger ones, whose batches and answers would fill the memory, while
# as many pixels keep a device as busy.
USUAL, USUAL_PX = 32, 64 * 224**2


def usual_batch(tile_px: int, cores: int = 1) -> int:
    """Tiles of a batch unless it is given: a power of two, at most USUAL.

    Of at most USUAL_PX pixels, unless `cores` that compute pieces are more than that has tiles. Pieces are the same for all.
    """
    most = min(USUAL, max(1, USUAL_PX // tile_px**2))
    return max(int(2 ** (most.bit_length() - 1)), min(USUAL, int(2 ** (cores - 1).bit_length())))


def piece_tiles(batch_size: int, tile_px: int) -> int:
    """Tiles of a piece: at most PIECE_PX pixels, at least one tile, and a divisor of the batch, as all pieces are alike."""
    most = min(batch_size, max(1, PIECE_PX // tile_px**2))
    return next(size for size in range(most, 0, -1) if batch_size % size == 0)


def twin(network: torch.nn.Module) -> torch.nn.Module:
    """A copy of `network` with the very same weights: what a forward keeps in its modules meanwhile is apart."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


class Crew:
    """The threads that compute pieces, each with its share of torch's threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size = (0, 0)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, compute: Callable[[int], None], firsts: Sequence[int], alone: bool = False) -> None:
        """`compute(first)` for each of `firsts`, side by side; the first error is raised once all have ended.

        alone  one after the other, each with all threads
        """

        def piece(first: int) -> None:
            compute(first)
            beat()

        pool = self._threads(1 if alone else len(firsts))
        futures = [pool.submit(piece, first) for first in firsts]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def _threads(self, pieces: int) -> ThreadPoolExecutor:
        """Threads for so many pieces; what they leave of the threads allowed is shared among them."""
        import torch

        workers = min(thread_count(), pieces)
        size = (workers, thread_count() // workers)
        with self._lock:
            if self._pool is None or self._size != size:
                if self._pool is not None:
                    self._pool.shutdown(wait=False)
                self._pool = ThreadPoolExecutor(workers, "torch", torch.set_num_threads, (size[1],))
                self._size = size
            return self._pool
