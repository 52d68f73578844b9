"""From a stream of tiles to a stream of scores, through batches of one fixed shape.

Promise: a tile's scores do not depend on which tiles share its batch, because the shape never changes: what is missing
from the last batch is padded. `predict_in_order` is the reference; `Predictor` gives the same for many regions at once.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pathology.clock import current, timed
from pathology.device import poisoned
from pathology.errors import ModelError
from pathology.model import Answer, Model, ModelSpec, QueuedModel, answer, begin
from pathology.models.checks import check_scores, raised_by_model
from pathology.stain import PARAMETERS

Predict = Callable[[Iterable[NDArray[np.uint8]]], Generator[NDArray[np.float32], None, None]]
# What a tile's slide is stained with, (`stain.PARAMETERS`,) float32, or those of a batch: for models that take it.
Stain = NDArray[np.float32] | None

T = TypeVar("T")

# Batches that are with a model that works by itself: one being computed, one going up or coming down.
IN_FLIGHT = 2
CLOSED = "the predictor was closed while a region waited for it"


@dataclass(frozen=True, slots=True)
class Spent:
    """What a predictor has done so far.

    calls       batches computed; `padded`: their slots that held no tile
    copy_s      seconds of copying tiles into batches, summed over the regions that have ended
    model_s     seconds in which the model had at least one batch: its busy time
    waiting_s   seconds in which it had none although regions were under way
    """

    calls: int = 0
    padded: int = 0
    copy_s: float = 0.0
    model_s: float = 0.0
    waiting_s: float = 0.0


def predict_in_order(
    model: Model, batch_size: int, tiles: Iterable[NDArray[np.uint8]], stain: Stain = None
) -> Generator[NDArray[np.float32], None, None]:
    """(C, h, w) scores for each (H, W, 3) tile, in order, in the calling thread. Counts for that thread's clock.

    stain  (`stain.PARAMETERS`,) of the tiles' slide, for a model that takes it
    """
    batch, stain = _empty_batch(model.spec, batch_size), checked_stain(model.spec, stain)
    stains = None if stain is None else np.tile(stain, (batch_size, 1))
    remaining = iter(tiles)
    while taken := list(islice(remaining, batch_size)):
        with timed("copy"):
            for slot, tile in zip(batch, taken, strict=False):
                slot[...] = checked_tile(model.spec, tile)
            batch[len(taken) :] = 0
        with timed("model"):
            scores = call_model(model, batch, stains)
        yield from scores[: len(taken)]


def call_model(model: Model, batch: NDArray[np.uint8], stains: Stain = None) -> NDArray[np.float32]:
    """(B, C, h, w) scores of a whole batch. ModelError where the model raises, or does not answer what its card says."""
    with raised_by_model(model.spec):
        scores = answer(model, batch, stains)
    check_scores(model.spec, len(batch), scores)
    return scores


def checked_tile(spec: ModelSpec, tile: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`tile`, if the model takes such tiles: numpy would stretch a smaller one over the slot."""
    if tile.shape != (spec.input_px, spec.input_px, 3) or tile.dtype != np.uint8:
        raise ModelError(
            f"model {spec.name} takes uint8 tiles of {spec.input_px} x {spec.input_px} x 3, not {tile.dtype} {tile.shape}"
        )
    return tile


def checked_stain(spec: ModelSpec, stain: Stain) -> Stain:
    """`stain`, if the model takes one exactly where there is one."""
    if (stain is None) == bool(spec.stain):
        raise ModelError(
            f"model {spec.name} takes tiles stained as {spec.stain}, and was given no stains of their slide"
            if spec.stain
            else f"model {spec.name} takes no stains, and was given some"
        )
    return stain


@contextmanager
def closed_at_end(predict: Predict) -> Iterator[Predict]:
    """`predict`, whose unfinished regions are given up at the end of the block.

    An error's traceback keeps its generators alive, and as long as one lives others wait for the tiles it may still bring.
    """
    with ExitStack() as begun:
        yield lambda tiles: begun.enter_context(closing(predict(tiles)))


def _empty_batch(spec: ModelSpec, batch_size: int) -> NDArray[np.uint8]:
    return np.zeros((batch_size, spec.input_px, spec.input_px, 3), np.uint8)


def _empty_stains(spec: ModelSpec, batch_size: int) -> NDArray[np.float32] | None:
    """One row for each tile of a batch, for a model that takes them. Zeros make a plain tile of any."""
    return np.zeros((batch_size, PARAMETERS), np.float32) if spec.stain else None


class _Lane:
    """One region's tiles on their way: how many are with the predictor, and answers not yet taken."""

    def __init__(self, lock: threading.Lock, stain: Stain) -> None:
        self.changed = threading.Condition(lock)
        self.clock = current()
        self.stain = stain
        self.waiting = 0
        self.copy_s = 0.0
        self.answers: deque[NDArray[np.float32]] = deque()
        self.error: BaseException | None = None
        self.closed = False


class _Batch:
    """Arrays that are used again and again, the owners of the slots taken, and how many of these are filled."""

    def __init__(self, array: NDArray[np.uint8], stains: NDArray[np.float32] | None) -> None:
        self.array = array
        self.stains = stains
        self.lanes: list[_Lane] = []
        self.filled = 0
        self.began = 0.0  # when it went to the model


class Predictor:
    """One per process and model: fills batches across all regions that are being fed, in one thread that owns the device.

    Regions copy their tiles straight into the batch that is next, side by side; there are two such arrays (and one more for
    each batch that a `QueuedModel` works on), so one fills while another is computed, and who reads faster than the model
    computes waits for room. Batches go out, and are answered, in the order they were filled. A partial one goes out only when
    every region being fed has handed in all its tiles; there is no timer, so batches are full whenever there is work for them.
    """

    def __init__(self, model: Model, batch_size: int, device_lock: threading.Lock | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self._device_lock = device_lock or threading.Lock()
        self._queued = model if isinstance(model, QueuedModel) else None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # a batch is ready, or the end
        self._room = threading.Condition(self._lock)  # a batch can be filled, or the end
        if self._queued is None:
            arrays = [_empty_batch(model.spec, batch_size) for _ in range(2)]
        else:
            arrays = [self._queued.staging(batch_size) for _ in range(1 + IN_FLIGHT)]
        self._free = [_Batch(array, _empty_stains(model.spec, batch_size)) for array in arrays]
        self._filling: _Batch | None = self._free.pop()
        self._full: deque[_Batch] = deque()
        self._lanes: set[_Lane] = set()
        self._feeding = 0
        self._closed = False
        self._calls = self._padded = 0
        self._copy_s = self._model_s = self._waiting_s = 0.0
        self._settled = 0.0  # when the last batch was done
        self._with_model = 0  # batches the model has
        self._since = perf_counter()  # it has had any, or none though regions were under way
        self._flying: queue.SimpleQueue[tuple[_Batch, Answer | Exception] | None] = queue.SimpleQueue()
        self._may_fly = threading.Semaphore(IN_FLIGHT)
        name = f"predictor-{model.spec.name}"
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True)]
        if self._queued is not None:
            self._threads.append(threading.Thread(target=self._collect, name=f"{name}-answers", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def calls(self) -> int:
        """How often the model was called."""
        return self._calls

    def spent(self) -> Spent:
        """Counts and seconds so far."""
        with self._lock:
            return Spent(self._calls, self._padded, self._copy_s, self._model_s, self._waiting_s)

    def close(self) -> None:
        """End the threads; tiles still pending are not answered."""
        with self._lock:
            self._closed = True
            for condition in (self._work, self._room, *(lane.changed for lane in self._lanes)):
                condition.notify_all()
        for thread in self._threads:
            thread.join()

    def predict(self, tiles: Iterable[NDArray[np.uint8]], stain: Stain = None) -> Generator[NDArray[np.float32], None, None]:
        """(C, h, w) scores for each (H, W, 3) uint8 tile, in order; `stain` as for `predict_in_order`.

        Takes tiles ahead of its answers, at most two batches of them: enough for one full batch to be always possible,
        so no region can wait for ever.
        """
        lane = _Lane(self._lock, checked_stain(self.model.spec, stain))
        self._open(lane)
        feeding = True
        try:
            for tile in tiles:
                self._hand_in(lane, checked_tile(self.model.spec, tile))
                while lane.answers or lane.error or lane.waiting >= 2 * self.batch_size:
                    yield self._answer(lane)
            self._end_feeding()
            feeding = False
            while lane.answers or lane.waiting:
                yield self._answer(lane)
        finally:
            if feeding:
                self._end_feeding()
            with self._lock:
                lane.closed = True
                self._lanes.discard(lane)
                self._copy_s += lane.copy_s
            if lane.clock is not None:
                lane.clock.add("copy", lane.copy_s)

    # What regions do, in their threads.

    def _open(self, lane: _Lane) -> None:
        with self._lock:
            self._feeding += 1
            if not self._lanes and not self._with_model:
                self._since = perf_counter()
            self._lanes.add(lane)

    def _hand_in(self, lane: _Lane, tile: NDArray[np.uint8]) -> None:
        with self._lock:
            while (batch := self._filling) is None and not self._closed:
                self._room.wait()
            if batch is None:
                raise RuntimeError(CLOSED)
            slot = len(batch.lanes)
            batch.lanes.append(lane)
            lane.waiting += 1
            if slot + 1 == self.batch_size:
                self._full.append(batch)
                self._filling = self._free.pop() if self._free else None
        began = perf_counter()
        batch.array[slot] = tile  # outside the lock: other regions fill other slots
        if batch.stains is not None:
            batch.stains[slot] = lane.stain
        took = perf_counter() - began
        with self._lock:
            lane.copy_s += took
            batch.filled += 1
            if batch.filled == self.batch_size:
                self._work.notify()

    def _end_feeding(self) -> None:
        with self._lock:
            self._feeding -= 1
            self._work.notify()

    def _answer(self, lane: _Lane) -> NDArray[np.float32]:
        if not lane.answers:  # only this thread takes them away, so looking needs no lock
            with self._lock:
                lane.changed.wait_for(lambda: lane.answers or lane.error or self._closed)
        if lane.answers:
            return lane.answers.popleft()
        raise lane.error or RuntimeError(CLOSED)

    # What the predictor does, in its own.

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            if self._queued is None:
                self._settle(batch, self._tried(batch, self._call))
                continue
            self._may_fly.acquire()
            self._flying.put((batch, self._tried(batch, self._submit)))
        self._flying.put(None)

    def _collect(self) -> None:
        while (flying := self._flying.get()) is not None:
            batch, answer = flying
            self._settle(batch, answer if isinstance(answer, Exception) else self._landed(answer))
            self._may_fly.release()

    def _next(self) -> _Batch | None:
        """The batch to compute, waited for, its rest padded; None at the end."""
        with self._lock:
            while True:
                while not self._closed and not self._ready():
                    self._work.wait()
                if self._closed:
                    return None
                if self._full:
                    batch = self._full.popleft()
                else:
                    assert self._filling is not None
                    batch = self._filling
                    self._filling = self._free.pop() if self._free else None
                if not all(lane.closed for lane in batch.lanes):
                    break
                self._recycle(batch)
            used = len(batch.lanes)
            self._count(+1)
            batch.began = perf_counter()
            self._calls += 1
            self._padded += self.batch_size - used
        batch.array[used:] = 0
        if batch.stains is not None:
            batch.stains[used:] = 0
        return batch

    def _ready(self) -> bool:
        if self._full:
            return self._full[0].filled == self.batch_size
        # Nobody feeds, so no slot of it is still being filled.
        return self._feeding == 0 and self._filling is not None and bool(self._filling.lanes)

    def _tried(self, batch: _Batch, begin: Callable[[_Batch], T]) -> T | Exception:
        try:
            with self._device_lock:
                return begin(batch)
        except Exception as error:
            return error

    def _call(self, batch: _Batch) -> NDArray[np.float32]:
        return call_model(self.model, batch.array, batch.stains)

    def _submit(self, batch: _Batch) -> Answer:
        assert self._queued is not None
        with raised_by_model(self.model.spec):
            return begin(self._queued, batch.array, batch.stains)

    def _landed(self, answer: Answer) -> NDArray[np.float32] | Exception:
        try:
            with raised_by_model(self.model.spec):
                scores = answer.result()
            check_scores(self.model.spec, self.batch_size, scores)
        except Exception as error:
            return error
        return scores

    def _settle(self, batch: _Batch, scores: NDArray[np.float32] | Exception) -> None:
        """Give each region its answers, or its error, and let the batch be filled again."""
        if not isinstance(scores, Exception):
            answers: list[NDArray[np.float32] | Exception] = list(scores[: len(batch.lanes)])
        else:
            answers = self._each_alone(batch, scores)
        with self._lock:
            self._count(-1)
            now = perf_counter()
            # Of batches that overlap on the device each has the time since the one before it was done.
            took, self._settled = (now - max(batch.began, self._settled)) / len(batch.lanes), now
            for lane in set(batch.lanes):
                if lane.clock is not None:
                    lane.clock.add("model", took * batch.lanes.count(lane))
            for lane, answer in zip(batch.lanes, answers, strict=True):
                lane.waiting -= 1
                if lane.error is not None:
                    continue
                if isinstance(answer, Exception):
                    lane.error = answer
                else:
                    lane.answers.append(answer)
            for lane in set(batch.lanes):
                lane.changed.notify()
            self._recycle(batch)

    def _each_alone(self, batch: _Batch, error: Exception) -> list[NDArray[np.float32] | Exception]:
        """Only the region whose tiles the model cannot take may fail: ask again for each alone, unless the device failed."""
        answers: list[NDArray[np.float32] | Exception] = [error] * len(batch.lanes)
        lanes = list(dict.fromkeys(batch.lanes))
        for lane in lanes if len(lanes) > 1 and not poisoned(error) else []:
            slots = [slot for slot, owner in enumerate(batch.lanes) if owner is lane]
            alone = _Batch(np.zeros_like(batch.array), _empty_stains(self.model.spec, self.batch_size))
            alone.array[: len(slots)] = batch.array[slots]
            if alone.stains is not None:
                alone.stains[:] = lane.stain
            scores = self._tried(alone, self._call)
            for place, slot in enumerate(slots):
                answers[slot] = scores if isinstance(scores, Exception) else scores[place]
            with self._lock:
                self._calls += 1
                self._padded += self.batch_size - len(slots)
        return answers

    def _recycle(self, batch: _Batch) -> None:
        batch.lanes, batch.filled = [], 0
        if self._filling is None:
            self._filling = batch
            self._room.notify_all()
        else:
            self._free.append(batch)

    def _count(self, change: int) -> None:
        """A batch goes to the model or is back: the time since the last change of busy and idle is put to its account."""
        before, self._with_model = self._with_model, self._with_model + change
        if bool(before) == bool(self._with_model):
            return
        now = perf_counter()
        if before:
            self._model_s += now - self._since
        else:
            self._waiting_s += now - self._since
        self._since = now
