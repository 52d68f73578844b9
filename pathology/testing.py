"""Slides and models whose right answer is known, for tests here and for users' own pipelines.

Promise: nothing here reads a file or needs torch; every model is a plain numpy function of one tile at a time.
Models are named to `load_model` as `pathology.testing:identity?tile_px=64`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.slide import Slide, SlideInfo


class ArrayReader:
    """Levels held in memory. Keeps a record of its reads; those that touch a box of `bad` (level, box) find it corrupt."""

    def __init__(
        self,
        levels: Sequence[NDArray[np.uint8]],
        valid: Sequence[NDArray[np.bool_]] | None = None,
        bad: Sequence[tuple[int, Box]] = (),
    ) -> None:
        self.levels = levels
        self.valid = valid
        self.bad = bad
        self.reads: list[tuple[int, Box]] = []

    def read(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        self.reads.append((level, box))
        if any(level == k and not box.intersect(damage).empty for k, damage in self.bad):
            raise SlideError(Reason.CORRUPT_TILES, f"a tile under {box} of level {level} cannot be decoded")
        at = box.slices()
        return self.levels[level][at].copy(), None if self.valid is None else self.valid[level][at].copy()

    def close(self) -> None:
        """Nothing to let go of."""


def array_slide(
    pixels: NDArray[np.uint8],
    mpp: float = 0.5,
    downsamples: Sequence[int] = (1,),
    valid: NDArray[np.bool_] | None = None,
    bad: Sequence[tuple[int, Box]] = (),
) -> Slide:
    """A slide of (H, W, 3) uint8 `pixels`; lower levels are area means, cut to whole pixels. The reader is `slide._reader`.

    bad  (level, box in its px) of pixels that cannot be decoded
    """
    levels = [_shrink(pixels, d).round().astype(np.uint8) for d in downsamples]
    masks = None if valid is None else [_shrink(valid[..., None], d)[..., 0] >= 0.5 for d in downsamples]
    info = SlideInfo(
        shape=(pixels.shape[0], pixels.shape[1]),
        level_shapes=tuple((level.shape[0], level.shape[1]) for level in levels),
        level_downsamples=tuple(float(d) for d in downsamples),
        mpp=mpp,
        mpp_source="option",
        reader="array",
        vendor="array",
        bounds=None,
        fingerprint=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )
    return Slide(Path("array"), info, ArrayReader(levels, masks, bad))


def _shrink(values: NDArray[np.generic], factor: int) -> NDArray[np.float64]:
    """Mean of factor x factor blocks of (H, W, C); what is left over at the ends is dropped."""
    h, w = values.shape[0] // factor, values.shape[1] // factor
    blocks = values[: h * factor, : w * factor].astype(np.float64)
    means: NDArray[np.float64] = blocks.reshape(h, factor, w, factor, -1).mean(axis=(1, 3))
    return means


@dataclass(frozen=True, slots=True)
class _Mean:
    """Answers the mean colour over blocks of a tile, in grey levels 0..255."""

    spec: ModelSpec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        out, block = self.spec.output_px, self.spec.input_px // self.spec.output_px
        blocks = tiles.reshape(len(tiles), out, block, out, block, 3).mean(axis=(2, 4), dtype=np.float64)
        return np.ascontiguousarray(blocks.transpose(0, 3, 1, 2), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Constant:
    """Answers the same score everywhere."""

    spec: ModelSpec
    value: float

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = self.spec.output_px
        return np.full((len(tiles), len(self.spec.classes), side, side), self.value, np.float32)


def _spec(
    name: str, mpp: float, tile_px: int, output_px: int, classes: tuple[str, ...] = ("red", "green", "blue")
) -> ModelSpec:
    return ModelSpec(
        name=name,
        sha256=hashlib.sha256(f"{name} 1".encode()).hexdigest(),
        classes=classes,
        mpp=mpp,
        tile_px=tile_px,
        input_px=tile_px,
        output_px=output_px,
        scores="value",
        threshold=(128.0,) * len(classes),
        display=(0.0, 255.0),
    )


def mean_colour(tile_px: int = 64, mpp: float = 0.5) -> _Mean:
    """A tile classifier that answers the tile's mean colour."""
    return _Mean(_spec("mean-colour", mpp, tile_px, 1))


def identity(tile_px: int = 64, mpp: float = 0.5, output_px: int = 0) -> _Mean:
    """A dense model that answers the tile itself, or its means over blocks where `output_px` is smaller."""
    return _Mean(_spec("identity", mpp, tile_px, output_px or tile_px))


def constant(tile_px: int = 64, mpp: float = 0.5, output_px: int = 1, value: float = 0.7) -> _Constant:
    """A model that answers `value` for every pixel."""
    return _Constant(_spec("constant", mpp, tile_px, output_px, ("constant",)), value)
