"""One region from slide to heatmap: read -> batch -> model -> stitch, the whole flow on one screen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pathology.batches import ReadPool, read_tiles
from pathology.errors import Reason, SlideError
from pathology.model import ModelSpec
from pathology.plan import Plan, Region
from pathology.predictor import Predict
from pathology.slide import Slide
from pathology.stitch import Canvas, blend_window


def infer_region(
    slide: Slide, spec: ModelSpec, plan: Plan, region: Region, predict: Predict, pool: ReadPool | None = None
) -> NDArray[np.float32]:
    """(C, H, W) float32 scores of `region.box`, NaN where no tile fell.

    Raises SlideError(BAD_SCORES) where the model answers NaN or infinity: it must not spread into its neighbours.
    """
    canvas = Canvas(region.box, len(spec.classes), blend_window(spec.output_px, plan.blend))
    places = region.tiles.astype(np.int64) * plan.h_stride
    tiles = _whole(read_tiles(slide, spec, plan.grid, region.tiles, pool))
    for (y, x), scores in zip(places, predict(tiles), strict=True):
        if not np.isfinite(scores).all():
            raise SlideError(
                Reason.BAD_SCORES,
                f"model {spec.name} answered NaN or infinity at heatmap pixel ({y}, {x}); check it on that tile",
            )
        canvas.add(scores, int(y), int(x))
    return canvas.mean()


def _whole(tiles: Iterator[NDArray[np.uint8] | None]) -> Iterator[NDArray[np.uint8]]:
    for tile in tiles:
        if tile is None:
            raise SlideError(Reason.CORRUPT_TILES, "the slide has tiles that cannot be decoded; copy it again from its source")
        yield tile
