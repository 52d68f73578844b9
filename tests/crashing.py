"""A model that takes its process down, as a crash in a native library does. Named as `tests.crashing:fragile`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.model import Model, ModelSpec
from pathology.testing import mean_colour

POISON = (1, 254, 3)


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
