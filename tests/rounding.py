"""A classifier that in half precision is wrong by a little, and by how much is known. It writes its calls to a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.job import Precision
from pathology.model import ModelSpec

ERROR = 0.04  # at most, in half precision


@dataclass(frozen=True, slots=True)
class Rounding:
    spec: ModelSpec
    precision: Precision
    log: str
    most: int

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{self.precision} {len(tiles)}\n")
        if self.precision == "fp32" and 0 < self.most < len(tiles):
            raise MemoryError
        score = tiles.astype(np.float64).mean(axis=(1, 2, 3)) / 255
        if self.precision != "fp32":
            score = np.clip(score + ERROR * np.sin(1e4 * score), 0, 1)
        classes = [score, 1 - score, score / 2][: len(self.spec.classes)]
        return np.stack(classes, axis=1).astype(np.float32)[:, :, None, None]


def rounding(
    tile_px: int = 32,
    classes: int = 1,
    scores: str = "probability",
    log: str = "",
    most: int = 0,
    precision: Precision = "fp32",
) -> Rounding:
    """most  tiles for which there is memory in float32; 0: any number"""
    kind = "value" if scores == "value" else "probability"
    names = ("a", "b", "c")[:classes]
    spec = ModelSpec("rounding", "", names, mpp=0.5, tile_px=tile_px, input_px=tile_px, scores=kind)  # type: ignore[arg-type]
    return Rounding(spec, precision, log, most)
