"""Scores of tile classifiers and dense maps: the heatmap, its picture, and a classifier's table of tiles."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathology.export.table import TileTable, tile_table, write_parquet
from pathology.geometry import Box
from pathology.outputs.ended import OVERLAY, TILES, Ended, overlay
from pathology.plan import Plan

if TYPE_CHECKING:
    from pathology.result import Heatmap

# Rows of a classifier's heatmap in memory at once.
TABLE_ROWS = 2048


def write_output(folder: Path, ended: Ended) -> dict[str, Any]:
    """heatmap.ome.zarr, overlay.png, for a tile classifier tiles.parquet; {classes, threshold, units} for the record."""
    from pathology.result import open_heatmap
    from pathology.store import STORE_NAME, write_heatmap

    spec, store = ended.spec, folder / STORE_NAME
    summary = write_heatmap(store, ended.meta(spec), functools.partial(ended.work.gather, ended.plan, spec.channels))
    heatmap = open_heatmap(store)
    if spec.output == "classes":
        write_parquet(folder / TILES, classifier_table(ended.plan, heatmap))
    (folder / OVERLAY).write_bytes(overlay(ended.slide, heatmap))
    return {
        "classes": {c.name: {"mean": c.mean, "max": c.max, "area_mm2": c.area_mm2} for c in summary.classes},
        "threshold": dict(zip(spec.classes, spec.threshold, strict=True)),
        "units": spec.units,
    }


def classifier_table(plan: Plan, heatmap: Heatmap) -> TileTable:
    """The tiles of a tile classifier with their scores: heatmap pixel (row, col) is tile (row, col)."""
    height, width = heatmap.frame.shape
    scores = np.empty((len(plan.tiles), len(heatmap.classes)), np.float32)
    for top in range(0, height, TABLE_ROWS):
        chosen = (plan.tiles[:, 0] >= top) & (plan.tiles[:, 0] < top + TABLE_ROWS)
        if chosen.any():
            block = heatmap.read(0, Box(top, 0, min(TABLE_ROWS, height - top), width))
            scores[chosen] = block[:, plan.tiles[chosen, 0] - top, plan.tiles[chosen, 1]].T
    return tile_table(plan.grid, plan.tiles, plan.coverage, scores, heatmap.spec.columns())
