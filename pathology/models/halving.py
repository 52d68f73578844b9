"""A model whose batch is halved when memory runs out. Promise: what it answers then is what it would have answered had it been
given batches of that size from the start, padded to one shape, and how many it answered of each size is known.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pathology.device import free_cached
from pathology.errors import EnvironmentFault, OutOfMemory, PathologyError, one_line
from pathology.model import Answer, Model, ModelSpec, QueuedModel, answer, begin
from pathology.models.checks import check_scores
from pathology.pulse import beat

# How torch's allocators, its libraries (the last is oneDNN) and ONNX say that there is no memory, without a type for it.
RAN_OUT = re.compile(
    r"out of memory|can't allocate memory|STATUS_ALLOC_FAILED|failed to allocate memory|bad_alloc"
    r"|could not create a primitive$",
    re.IGNORECASE,
)

# Numbers that travel beside each tile of a batch, (B, n) float32, for models that take them.
Stains = NDArray[np.float32] | None

S = TypeVar("S", bound=np.generic)


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that there is no memory, on a device or on the host."""
    import torch

    if isinstance(error, (MemoryError, OutOfMemory, torch.OutOfMemoryError)):
        return True
    return not isinstance(error, PathologyError) and RAN_OUT.search(str(error)) is not None


class Sizes:
    """The tiles of a model's calls: those of a batch until memory runs out, and half as many each time it does."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._most = 0  # 0: any number
        self._answered: Counter[int] = Counter()

    def now(self, batch: int) -> int:
        """Tiles of a call for a batch of so many."""
        return min(batch, self._most or batch)

    def halve(self, size: int, error: Exception) -> None:
        """Ask for half of `size` from now on, as a call with so many failed. Raises any `error` that is not want of memory,
        and EnvironmentFault where a single tile was too much."""
        if not ran_out(error):
            raise error
        if size == 1:
            raise EnvironmentFault(
                f"model {self._spec.name}: no memory is left for even one tile ({one_line(error)}); "
                "end what else runs there, or use another --device"
            ) from error
        with self._lock:
            self._most = min(self._most or size, size // 2)

    def answered(self) -> Counter[int]:
        """How many batches were answered so far, by the tiles of their calls."""
        with self._lock:
            return self._answered.copy()

    def joined(self, parts: Iterable[NDArray[np.float32]], size: int, batch: int) -> NDArray[np.float32]:
        """`spec.answer_shape(batch)`: the answers to a batch's calls, as they come, without those to padding."""
        if size == batch:
            (scores,) = parts
        elif self._spec.detections is not None:
            scores = np.concatenate(_as_many_rows([self._checked(part, size) for part in parts]))[:batch]
        else:
            scores = np.empty(self._spec.answer_shape(batch), np.float32)
            for first, part in zip(range(0, batch, size), parts, strict=True):
                beat()
                scores[first : first + size] = self._checked(part, size)[: batch - first]
        beat()
        with self._lock:
            self._answered[size] += 1
        return scores

    def _checked(self, part: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        check_scores(self._spec, size, part)
        return part


class HalvingModel:
    """`inner`, called with fewer tiles at once where memory runs out."""

    def __init__(self, inner: Model) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.sizes = Sizes(inner.spec)

    def __call__(self, tiles: NDArray[np.uint8], stains: Stains = None) -> NDArray[np.float32]:
        """(B, input_px, input_px, 3) uint8 RGB -> float32 of `spec.answer_shape(B)`."""
        while True:
            size = self.sizes.now(len(tiles))
            try:
                parts = (answer(self.inner, *part) for part in _cut(tiles, stains, size))
                return self.sizes.joined(parts, size, len(tiles))
            except Exception as error:
                self.sizes.halve(size, error)
            free_cached()  # once the error is gone: with its traceback it keeps what the failed call had


class QueuedHalvingModel:
    """The same of a model that works by itself."""

    def __init__(self, inner: QueuedModel) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.sizes = Sizes(inner.spec)
        self._submitting = threading.Lock()  # who takes an answer may have to ask again

    def __call__(self, tiles: NDArray[np.uint8], stains: Stains = None) -> NDArray[np.float32]:
        return self.submit(tiles, stains).result()

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        return self.inner.staging(batch_size)

    def submit(self, tiles: NDArray[np.uint8], stains: Stains = None) -> HalvingAnswer:
        """Begin with a batch, in as many calls as it takes; each is submitted before any is waited for."""
        return HalvingAnswer(self, tiles, stains)

    def begin(self, tiles: NDArray[np.uint8], stains: Stains) -> tuple[int, list[Answer]]:
        """(tiles of a call, answers to come) for a batch."""
        while True:
            size = self.sizes.now(len(tiles))
            try:
                with self._submitting:
                    return size, [begin(self.inner, *part) for part in _cut(tiles, stains, size)]
            except Exception as error:
                self.sizes.halve(size, error)
            free_cached()


class HalvingAnswer:
    """Scores on their way; begun again in smaller calls where memory runs out before they are there."""

    def __init__(self, model: QueuedHalvingModel, tiles: NDArray[np.uint8], stains: Stains) -> None:
        self._model = model
        self._tiles = tiles
        self._stains = stains
        self._size, self._answers = model.begin(tiles, stains)

    def result(self) -> NDArray[np.float32]:
        """Float32 of `spec.answer_shape(B)`, once it is there."""
        sizes = self._model.sizes
        while True:
            try:
                return sizes.joined((answer.result() for answer in self._answers), self._size, len(self._tiles))
            except Exception as error:
                sizes.halve(self._size, error)
            self._answers = []
            free_cached()
            self._size, self._answers = self._model.begin(self._tiles, self._stains)


def halving(model: Model) -> HalvingModel | QueuedHalvingModel:
    """`model`, which from now on is asked for less at once when memory runs out, instead of failing."""
    return QueuedHalvingModel(model) if isinstance(model, QueuedModel) else HalvingModel(model)


def _cut(tiles: NDArray[np.uint8], stains: Stains, size: int) -> Iterator[tuple[NDArray[np.uint8], Stains]]:
    """A batch in parts of `size` tiles each, the last one padded: equal shapes are what makes equal bits."""
    for first in range(0, len(tiles), size):
        yield (
            _filled(tiles[first : first + size], size),
            None if stains is None else _filled(stains[first : first + size], size),
        )


def _filled(part: NDArray[S], size: int) -> NDArray[S]:
    """`part` itself if it has `size` rows, else with zeros after it."""
    if len(part) == size:
        return part
    padded = np.zeros((size, *part.shape[1:]), part.dtype)
    padded[: len(part)] = part
    return padded


def _as_many_rows(parts: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """A detector's answers, (B, N, columns), with rows of NaN, which are no objects, up to the same N."""
    most = max(part.shape[1] for part in parts)
    gaps = [((0, 0), (0, most - part.shape[1]), (0, 0)) for part in parts]
    return [np.pad(part, gap, constant_values=np.nan) for part, gap in zip(parts, gaps, strict=True)]
