"""Slides and models whose right answer is known, for tests here and for users' own pipelines.

Promise: nothing here reads a file or needs torch; every model is a plain numpy function of one tile at a time.
Models are named to `load_model` as `pathology.testing:identity?tile_px=64`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.model import DetectionRule, ModelSpec
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


def _block_means(tiles: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """(B, S, S, 3) -> (B, side, side, 3): the mean colours of side x side blocks of each tile."""
    block = tiles.shape[1] // side
    means: NDArray[np.float64] = tiles.reshape(len(tiles), side, block, side, block, 3).mean(axis=(2, 4), dtype=np.float64)
    return means


@dataclass(frozen=True, slots=True)
class _Mean:
    """Answers the mean colour over blocks of a tile, in grey levels 0..255."""

    spec: ModelSpec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.ascontiguousarray(_block_means(tiles, self.spec.output_px).transpose(0, 3, 1, 2), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Constant:
    """Answers the same score everywhere."""

    spec: ModelSpec
    value: float

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = self.spec.output_px
        return np.full((len(tiles), len(self.spec.classes), side, side), self.value, np.float32)


def _spec(
    name: str,
    mpp: float,
    tile_px: int,
    output_px: int,
    classes: tuple[str, ...] = ("red", "green", "blue"),
    features: int = 0,
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
        features=features,
    )


def mean_colour(tile_px: int = 64, mpp: float = 0.5) -> _Mean:
    """A tile classifier that answers the tile's mean colour."""
    return _Mean(_spec("mean-colour", mpp, tile_px, 1))


def identity(tile_px: int = 64, mpp: float = 0.5, output_px: int = 0) -> _Mean:
    """A dense model that answers the tile itself, or its means over blocks where `output_px` is smaller."""
    return _Mean(_spec("identity", mpp, tile_px, output_px or tile_px))


@dataclass(frozen=True, slots=True)
class _Thumbnail:
    """Answers a tile's means over 4 x 4 blocks of each colour as its 48 features."""

    spec: ModelSpec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.ascontiguousarray(_block_means(tiles, 4).reshape(len(tiles), -1, 1, 1), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Marks:
    """Finds pixels of pure red (class 0) and pure blue (class 1) where they are, but for `shift` px that differ by tile."""

    spec: ModelSpec
    shift: float

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        rule = self.spec.detections
        assert rule is not None
        answer = np.full(self.spec.answer_shape(len(tiles)), np.nan, np.float32)
        for rows, tile in zip(answer, tiles, strict=True):
            for number, colour in enumerate(((255, 0, 0), (0, 0, 255))):
                place = np.argwhere((tile == colour).all(axis=2)) + 0.5
                free = int(np.isnan(rows[:, 3]).argmax())
                found = rows[free : free + len(place)]
                # Higher scores towards the middle, so that tiles disagree about a mark in place and score.
                away = np.abs(place - self.spec.input_px / 2).max(axis=1)
                found[:, :2] = place + self.shift * np.sin(place)
                found[:, 2], found[:, 3] = number, 1 - away / self.spec.input_px
                corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)])[:: 2 if rule.vertices == 2 else 1]
                found[:, 4:] = (found[:, None, :2] + 6 * corners[: rule.vertices]).reshape(len(place), 2 * rule.vertices)
        return answer


def thumbnail(tile_px: int = 64, mpp: float = 0.5) -> _Thumbnail:
    """An embedding model."""
    return _Thumbnail(_spec("thumbnail", mpp, tile_px, 1, (), features=48))


def marks(tile_px: int = 64, mpp: float = 0.5, vertices: int = 0, shift: float = 0.0, margin_px: int = 0) -> _Marks:
    """A detector of points (`vertices` 0), boxes (2) or squares as contours (4)."""
    rule = DetectionRule(vertices=vertices, margin_px=margin_px)
    spec = replace(
        _spec("marks", mpp, tile_px, 4, ("red", "blue")), detections=rule, display=(0.0, 5000.0), threshold=(0.0, 0.0)
    )
    return _Marks(spec, shift)


def constant(tile_px: int = 64, mpp: float = 0.5, output_px: int = 1, value: float = 0.7) -> _Constant:
    """A model that answers `value` for every pixel."""
    return _Constant(_spec("constant", mpp, tile_px, output_px, ("constant",)), value)
