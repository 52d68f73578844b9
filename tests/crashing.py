"""Models that go wrong: one takes its process down, as a crash in a native library does, one answers NaN,
one does not come back.

Named as `tests.crashing:fragile`, `tests.crashing:unsure` and `tests.crashing:stuck`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.model import Model, ModelSpec
from pathology.testing import mean_colour

POISON = (1, 254, 3)
COLOURFUL = 60.0


@dataclass(frozen=True)
class Fragile:
    """Mean colours; ends the process at a tile whose first pixel is POISON: once per `flag` file, always without one."""

    inner: Model
    flag: str

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        if (tiles[:, 0, 0] == POISON).all(axis=1).any():
            if not self.flag:
                os._exit(134)
            try:
                Path(self.flag).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(134)
        return self.inner(tiles)


def fragile(flag: str = "") -> Fragile:
    return Fragile(mean_colour(tile_px=32), flag)


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
