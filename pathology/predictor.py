"""From a stream of tiles to a stream of scores, through batches of one fixed shape.

Promise: a tile's scores do not depend on which tiles share its batch, because the shape never changes: what is missing
from the last batch is padded. `predict_in_order` is the reference; `Predictor` gives the same for many regions at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pathology.model import Model

Predict = Callable[[Iterable[NDArray[np.uint8]]], Iterator[NDArray[np.float32]]]


def predict_in_order(model: Model, batch_size: int, tiles: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
    """(C, h, w) scores for each (H, W, 3) tile, in order, in the calling thread."""
    remaining = iter(tiles)
    while batch := list(islice(remaining, batch_size)):
        yield from call_model(model, batch_size, batch)


def call_model(model: Model, batch_size: int, tiles: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """(n, C, h, w) scores of n <= batch_size tiles, by one call with exactly `batch_size` tiles."""
    side = model.spec.input_px
    batch = np.zeros((batch_size, side, side, 3), np.uint8)
    for slot, tile in zip(batch, tiles, strict=False):
        slot[...] = tile
    scores = model(batch)
    expected = (batch_size, len(model.spec.classes), model.spec.output_px, model.spec.output_px)
    if scores.shape != expected or scores.dtype != np.float32:
        raise ValueError(f"model {model.spec.name} answered {scores.dtype} {scores.shape}, its card says float32 {expected}")
    return scores[: len(tiles)]


class _Lane:
    """One region's tiles on their way: how many are with the predictor, and answers not yet taken."""

    def __init__(self) -> None:
        self.waiting = 0
        self.answers: deque[NDArray[np.float32]] = deque()
        self.error: BaseException | None = None


class Predictor:
    """One per process and model: fills batches across all regions that are being fed, in one thread that owns the device.

    A partial batch goes out only when every region being fed has handed in all its tiles; there is no timer, so the
    batches are full whenever there is work for them.
    """

    def __init__(self, model: Model, batch_size: int, device_lock: threading.Lock | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.calls = 0
        self._device_lock = device_lock or threading.Lock()
        self._changed = threading.Condition()
        self._pending: deque[tuple[_Lane, NDArray[np.uint8]]] = deque()
        self._feeding = 0
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"predictor-{model.spec.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; tiles still pending are not answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def predict(self, tiles: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """(C, h, w) scores for each (H, W, 3) uint8 tile, in order.

        Takes tiles ahead of its answers, at most two batches of them: enough for one full batch to be always possible,
        so no region can wait for ever.
        """
        lane = _Lane()
        with self._changed:
            self._feeding += 1
        feeding = True
        try:
            for tile in tiles:
                self._hand_in(lane, tile)
                while lane.waiting >= 2 * self.batch_size or lane.answers:
                    yield self._answer(lane)
            self._end_feeding()
            feeding = False
            while lane.waiting or lane.answers:
                yield self._answer(lane)
        finally:
            if feeding:
                self._end_feeding()
            with self._changed:
                self._pending = deque((owner, tile) for owner, tile in self._pending if owner is not lane)

    def _hand_in(self, lane: _Lane, tile: NDArray[np.uint8]) -> None:
        with self._changed:
            self._pending.append((lane, tile))
            lane.waiting += 1
            if len(self._pending) >= self.batch_size:
                self._changed.notify_all()

    def _end_feeding(self) -> None:
        with self._changed:
            self._feeding -= 1
            self._changed.notify_all()

    def _answer(self, lane: _Lane) -> NDArray[np.float32]:
        with self._changed:
            self._changed.wait_for(lambda: lane.answers or lane.error or self._closed)
            if lane.answers:
                return lane.answers.popleft()
            if lane.error:
                raise lane.error
            raise RuntimeError("the predictor was closed while a region waited for it")

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._ready())
                if self._closed:
                    return
                batch = [self._pending.popleft() for _ in range(min(self.batch_size, len(self._pending)))]
            self._run(batch)

    def _ready(self) -> bool:
        return len(self._pending) >= self.batch_size or (bool(self._pending) and self._feeding == 0)

    def _run(self, batch: list[tuple[_Lane, NDArray[np.uint8]]]) -> None:
        try:
            scores = self._call([tile for _, tile in batch])
        except Exception as error:
            lanes = list({id(lane): lane for lane, _ in batch}.values())
            if len(lanes) == 1:
                with self._changed:
                    lanes[0].error = error
                    self._changed.notify_all()
                return
            # Only the region whose tiles the model cannot take may fail: ask again for each alone.
            for lane in lanes:
                self._run([entry for entry in batch if entry[0] is lane])
            return
        with self._changed:
            for (lane, _), answer in zip(batch, scores, strict=True):
                lane.answers.append(answer)
                lane.waiting -= 1
            self._changed.notify_all()

    def _call(self, tiles: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        with self._device_lock:
            self.calls += 1
            return call_model(self.model, self.batch_size, tiles)
