"""Whole heatmaps from the engine's parts, without files. Promise: nothing is computed here that a run does not compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pathology.batches import ReadPool, read_tiles
from pathology.grid import TileGrid
from pathology.infer import Tile, infer_region
from pathology.model import Model, ModelSpec
from pathology.plan import Plan, cut
from pathology.predictor import Predict, predict_in_order
from pathology.slide import Slide
from pathology.stitch import Blend


def all_tiles(grid: TileGrid) -> NDArray[np.int32]:
    """(n, 2) every tile of the grid, row-major."""
    return np.array([(row, col) for row in range(grid.shape[0]) for col in range(grid.shape[1])], np.int32)


def plan_for(
    slide: Slide,
    spec: ModelSpec,
    stride_px: int,
    *,
    block: int | tuple[int, int],
    blend: Blend = "hann",
    chosen: Sequence[bool] | None = None,
) -> Plan:
    """A plan of all tiles, or of those for which `chosen`, repeated as often as needed, is True; `block`: one side or two."""
    grid = TileGrid(slide.info.shape, slide.info.mpp, spec.mpp, spec.tile_px, stride_px)
    tiles = all_tiles(grid)
    if chosen is not None:
        tiles = tiles[np.resize(np.array(chosen, bool), len(tiles))]
    shape = (block, block) if isinstance(block, int) else block
    return cut(grid, spec.output_px, blend, shape, tiles, np.ones(len(tiles), np.float32), 0.0)


def heatmap(
    slide: Slide,
    model: Model,
    plan: Plan,
    batch_size: int = 4,
    predict: Predict | None = None,
    pool: ReadPool | None = None,
    bad_tiles: set[Tile] | None = None,
) -> NDArray[np.float32]:
    """(C, H, W) float32 of all regions put in their places; NaN where there is no region. `bad_tiles`: takes those."""
    bad_tiles = set() if bad_tiles is None else bad_tiles
    whole = np.full((len(model.spec.classes), *plan.frame.shape), np.nan, np.float32)
    predict = predict or partial(predict_in_order, model, batch_size)
    read = partial(read_tiles, slide, model.spec, plan.grid, pool=pool)
    for region in plan.regions:
        rows = infer_region(read, model.spec, plan, region, predict, bad_tiles.add)
        whole[:, *region.box.slices()] = np.concatenate(list(rows), axis=1)
    return whole
