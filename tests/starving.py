"""A model that finds no memory for large batches, as on a device that others use too. Named as `tests.starving:starving`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pathology.model import Model, ModelSpec
from pathology.testing import mean_colour

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "numpy": MemoryError("Unable to allocate 20 GiB"),
}


@dataclass
class Starving:
    """Mean colours, and a thousandth for each tile of the call, so that another size of calls gives other bits.

    most   tiles for which there is memory
    calls  so many calls find memory for any number
    log    file with a line for each call: its tiles
    """

    inner: Model
    most: int
    calls: int
    log: str
    error: str

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        with Path(self.log or os.devnull).open("a") as file:
            file.write(f"{len(tiles)}\n")
        self.calls -= 1
        if self.calls < 0 and len(tiles) > self.most:
            raise ERRORS[self.error].with_traceback(None)
        return self.inner(tiles) + np.float32(len(tiles) / 1000)


@dataclass
class Later:
    """An answer that is computed, and may fail, when it is asked for."""

    model: Starving
    tiles: NDArray[np.uint8]

    def result(self) -> NDArray[np.float32]:
        return self.model(self.tiles)


@dataclass
class QueuedStarving:
    """The same with answers that come later. `late`: so do the errors, else they come with the submission."""

    model: Starving
    late: bool

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.submit(tiles).result()

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        return np.zeros((batch_size, self.spec.input_px, self.spec.input_px, 3), np.uint8)

    def submit(self, tiles: NDArray[np.uint8]) -> Later | Done:
        return Later(self.model, tiles) if self.late else Done(self.model(tiles))


@dataclass
class Done:
    """An answer that is there."""

    scores: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        return self.scores


def starving(
    most: int = 0, calls: int = 0, log: str = "", error: str = "cuda", queued: str = "", tile_px: int = 32, name: str = ""
) -> Starving | QueuedStarving:
    """queued  "": answers at once; "early" or "late": later, with errors of a submission or of the answer
    name    any: a process keeps a model of another name apart
    """
    model = Starving(mean_colour(tile_px), most, calls, log, error)
    return QueuedStarving(model, queued == "late") if queued else model


@dataclass
class Hungry:
    """Mean colours for as many calls as the file `left` says, and no memory for anything after."""

    inner: Model
    left: Path

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        left = int(self.left.read_text()) - 1
        self.left.write_text(str(left))
        if left < 0:
            raise MemoryError
        return self.inner(tiles)


def hungry(left: str) -> Hungry:
    return Hungry(mean_colour(tile_px=32), Path(left))
