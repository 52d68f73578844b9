"""Several models at one slide: which jobs take the very same tiles, and one reader's tiles handed to all of them.

Promise: every tile is read once, however many take it; what waits for the slowest taker is a fixed number of tiles; and a taker
that leaves early holds up no other.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pathology.batches import Pixels, chunk_tiles
from pathology.clock import timed
from pathology.errors import PathologyError
from pathology.job import Job
from pathology.model import ModelSpec

# Chunks that wait for a taker; one more is in its hands, and one in the reader's.
WAITING = 1


def tiles_handed(input_px: int) -> int:
    """Most tiles of one region that were read and that not all takers are done with."""
    return chunk_tiles(input_px) * (WAITING + 2)


def pixels_of(spec: ModelSpec) -> tuple[object, ...]:
    """What of a model's card decides which tiles it takes from a slide, and their pixels."""
    return spec.mpp, spec.tile_px, spec.input_px, spec.read


def reading(job: Job, spec: ModelSpec) -> tuple[object, ...]:
    """What decides a job's tiles and their pixels, as far as is known before its slide is opened."""
    alike = replace(
        job,
        model="",
        precision="fp32",
        compile=False,
        batch_size=1,
        blend="hann",
        heatmap_mpp=None,
        heatmap_dtype="auto",
    )
    return alike, pixels_of(spec)


def groups(jobs: Sequence[Job], specs: Sequence[ModelSpec]) -> list[tuple[int, ...]]:
    """Places of the jobs that are run together, in order; neighbours of one slide that read alike, each in one group."""
    found: list[tuple[int, ...]] = []
    for _, places in itertools.groupby(range(len(jobs)), lambda place: jobs[place].slide):
        alike: dict[tuple[object, ...], list[int]] = {}
        for place in places:
            alike.setdefault(reading(jobs[place], specs[place]), []).append(place)
        found.extend(map(tuple, alike.values()))
    return found


class ReadingEnded(PathologyError):
    """Told to a taker: the reader has ended before it had all tiles."""


class Handout:
    """Tiles that one thread reads, for takers in threads of their own.

    wanted  for each taker the tiles (row, col) that it takes, row-major
    tiles   (n, 2) int32 all of them, row-major, each once: what is to be read
    """

    def __init__(self, wanted: Sequence[NDArray[np.int32]], input_px: int) -> None:
        self.tiles: NDArray[np.int32] = np.unique(np.concatenate(wanted), axis=0)
        self._wanted = [set(map(tuple, tiles.tolist())) for tiles in wanted]
        self._chunk = chunk_tiles(input_px)
        self._waiting: list[deque[list[Pixels | None]]] = [deque() for _ in wanted]
        self._left = [False] * len(wanted)
        self._ended = False
        self._changed = threading.Condition()

    def give(self, pixels: Iterable[Pixels | None]) -> None:
        """Hand out what is read of `tiles`, in their order, as long as a taker is left; call `end` whatever comes of it."""
        hands: list[list[Pixels | None]] = [[] for _ in self._waiting]
        for read, (tile, tile_pixels) in enumerate(zip(map(tuple, self.tiles.tolist()), pixels, strict=True), 1):
            with timed("copy"):
                # They may be written over when the next ones are asked for.
                kept = None if tile_pixels is None else tile_pixels.copy()
            for hand, wanted in zip(hands, self._wanted, strict=True):
                if tile in wanted:
                    hand.append(kept)
            if read % self._chunk == 0:
                if not self._hand_over(hands):
                    return
                hands = [[] for _ in self._waiting]
        self._hand_over(hands)

    def end(self) -> None:
        """No more will be handed out: tell those that wait."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, taker: int) -> Iterator[Pixels | None]:
        """The tiles that `taker` wants, in order, in its thread; they are not to be written to. Raises ReadingEnded."""
        waiting, left = self._waiting[taker], len(self._wanted[taker])
        while left:
            with self._changed:
                self._changed.wait_for(lambda: waiting or self._ended)
                if not waiting:
                    raise ReadingEnded("reading ended early")
                chunk = waiting.popleft()
                self._changed.notify_all()
            left -= len(chunk)
            yield from chunk

    def leave(self, taker: int) -> None:
        """`taker` takes no more, because it has all or because it failed."""
        with self._changed:
            self._left[taker] = True
            self._waiting[taker].clear()
            self._changed.notify_all()

    def _hand_over(self, hands: list[list[Pixels | None]]) -> bool:
        """Wait until there is room with every taker that is left, and hand over; False if there is none."""

        def room() -> bool:
            places = range(len(hands))
            return all(self._left[place] or not hands[place] or len(self._waiting[place]) < WAITING for place in places)

        with self._changed:
            self._changed.wait_for(room)
            for place, hand in enumerate(hands):
                if hand and not self._left[place]:
                    self._waiting[place].append(hand)
            self._changed.notify_all()
            return not all(self._left)
