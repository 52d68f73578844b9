"""Models that go wrong: one takes its process down, hangs, raises, breaks its device or takes all memory, one answers NaN.

Named as `tests.crashing:fragile`, `tests.crashing:unsure` and `tests.crashing:stuck`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pathology.model import Model, ModelSpec
from pathology.testing import mean_colour

POISON = (1, 254, 3)
COLOURFUL = 60.0


def crash() -> None:
    os._exit(134)


def hang() -> None:
    ctypes.PyDLL(None).sleep(600)  # no other thread of the process runs meanwhile


def break_device() -> None:
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def take_memory() -> None:
    blocks = []
    while True:
        blocks.append(np.ones(2**26, np.uint8))
        time.sleep(0.02)


def refuse() -> None:
    raise ValueError("no such tile")


def leave() -> None:
    sys.exit(5)


def pause() -> None:
    time.sleep(8)


WAYS: dict[str, Callable[[], None]] = {
    "crash": crash,
    "hang": hang,
    "device": break_device,
    "memory": take_memory,
    "pause": pause,
    "refuse": refuse,
    "leave": leave,
}


@dataclass(frozen=True)
class Fragile:
    """Mean colours; goes wrong at a tile whose first pixel is POISON.

    flag     file that keeps it from going wrong a second time, and names the process in which it did; "": it always does
    lasting  what went wrong once stays wrong: at any tile, in any process
    """

    inner: Model
    flag: str
    how: str
    lasting: bool

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.lasting and Path(self.flag).exists():
            WAYS[self.how]()
        if (tiles[:, 0, 0] == POISON).all(axis=1).any():
            if not self.flag:
                WAYS[self.how]()
            try:
                with Path(self.flag).open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                pass
            else:
                WAYS[self.how]()
        return self.inner(tiles)


def fragile(flag: str = "", how: str = "crash", lasting: bool = False) -> Fragile:
    return Fragile(mean_colour(tile_px=32), flag, how, lasting)


@dataclass(frozen=True)
class Unsure:
    """Mean colours, and NaN where they are far from grey, as no tile is that a model is tried with."""

    inner: Model

    @property
    def spec(self) -> ModelSpec:
        return replace(self.inner.spec, name="unsure")

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = self.inner(tiles)
        scores[np.ptp(scores, axis=(1, 2, 3)) > COLOURFUL] = np.nan
        return scores


def unsure() -> Unsure:
    return Unsure(mean_colour(tile_px=32))


@dataclass(frozen=True)
class Stuck:
    """Mean colours; where STUCK_S is set, a call with a tile whose first pixel is POISON takes so long; STUCK_FLAG tells."""

    inner: Model

    @property
    def spec(self) -> ModelSpec:
        return replace(self.inner.spec, name="stuck")

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        if "STUCK_S" in os.environ and (tiles[:, 0, 0] == POISON).all(axis=1).any():
            Path(os.environ["STUCK_FLAG"]).touch()
            time.sleep(float(os.environ["STUCK_S"]))
        return self.inner(tiles)


def stuck() -> Stuck:
    return Stuck(mean_colour(tile_px=32))
