"""Dense answers at a coarser resolution. Promise: a pixel is the mean of those it stands for, taken where the model runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.model import Answer, Model, ModelSpec, QueuedModel, answer, begin


@runtime_checkable
class PoolsItself(Protocol):
    """A model that takes the means on its device."""

    def pool(self, spec: ModelSpec) -> None:
        """Answer maps of `spec.output_px` from now on, a whole fraction of what it was."""
        ...


def pooled_spec(spec: ModelSpec, heatmap_mpp: float | None) -> ModelSpec:
    """The card of a dense model whose map is pooled to pixels of at most `heatmap_mpp` um.

    They are the largest that divide a tile evenly and leave something inside its margins. Other models, and None, leave the
    card as it is. UsageError for finer pixels than the model answers.
    """
    if heatmap_mpp is None or spec.output != "map":
        return spec
    mpp = spec.tile_px * spec.mpp / spec.output_px
    if heatmap_mpp < mpp * (1 - 1e-9):
        raise UsageError(f"heatmap mpp {heatmap_mpp:g} is finer than model {spec.name} answers; use {mpp:g} or more")

    def fits(factor: int) -> bool:
        side, rest = divmod(spec.output_px, factor)
        return not rest and factor * mpp <= heatmap_mpp * (1 + 1e-9) and 2 * math.ceil(spec.margin_px / factor) < side

    factor = next(filter(fits, range(spec.output_px // 2, 1, -1)), 1)
    return replace(spec, output_px=spec.output_px // factor, margin_px=math.ceil(spec.margin_px / factor))


def pooled(model: Model, heatmap_mpp: float | None) -> Model:
    """`model` with maps as `pooled_spec` says."""
    spec = pooled_spec(model.spec, heatmap_mpp)
    if spec == model.spec:
        return model
    if isinstance(model, PoolsItself):
        model.pool(spec)
        return model
    return PooledQueuedModel(spec, model) if isinstance(model, QueuedModel) else PooledModel(spec, model)


@dataclass(frozen=True, slots=True)
class PooledModel:
    """`inner`, whose answers are pooled on the host."""

    spec: ModelSpec
    inner: Model

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return _means(answer(self.inner, tiles, stains), self.spec.output_px)


@dataclass(frozen=True, slots=True)
class PooledQueuedModel:
    """The same of a model that works by itself."""

    spec: ModelSpec
    inner: QueuedModel

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return _means(answer(self.inner, tiles, stains), self.spec.output_px)

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        return self.inner.staging(batch_size)

    def submit(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> Answer:
        return _PooledAnswer(begin(self.inner, tiles, stains), self.spec.output_px)


@dataclass(frozen=True, slots=True)
class _PooledAnswer:
    inner: Answer
    side: int

    def result(self) -> NDArray[np.float32]:
        return _means(self.inner.result(), self.side)


def _means(scores: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(B, C, h, w) -> (B, C, side, side) means over blocks, summed in float64."""
    batch, classes, height, width = scores.shape
    blocks = scores.reshape(batch, classes, side, height // side, side, width // side)
    return np.ascontiguousarray(blocks.mean(axis=(3, 5), dtype=np.float64), dtype=np.float32)
