"""Features of tiles: a vector for each, with its place; a table of the tiles, and a picture of the vectors' lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.export.png import overlay_png
from pathology.export.table import tile_table, write_parquet
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.outputs.ended import OVERLAY, TILES, Ended

# The picture's colours run between these percentiles of the lengths.
DISPLAY_PERCENTILES = (1, 99)


def write_output(folder: Path, ended: Ended) -> dict[str, Any]:
    """features.zarr, tiles.parquet with the same rows, overlay.png; {features, classes} for the record.

    Tiles that could not be read have no row.
    """
    from pathology.features import STORE_NAME, write_features

    plan, seen = ended.plan, ended.answered
    tiles = plan.tiles[seen]
    lengths = np.full(plan.frame.shape, np.nan, np.float32)

    def vectors() -> Iterator[NDArray[np.float32]]:
        for chosen, rows in _rows(ended, tiles):
            squares = (rows.astype(np.float64) ** 2).sum(axis=1)
            lengths[chosen[:, 0], chosen[:, 1]] = np.sqrt(squares)
            yield rows

    write_features(folder / STORE_NAME, ended.meta(ended.spec), plan.grid.l0_origins(tiles), vectors())
    none = np.empty((len(tiles), 0), np.float32)
    write_parquet(folder / TILES, tile_table(plan.grid, tiles, plan.coverage[seen], none, ()))
    (folder / OVERLAY).write_bytes(overlay_png(ended.slide, lengths, plan.frame, _length_spec(ended.spec, lengths), 0))
    return {"features": ended.spec.features, "classes": {}, "threshold": {}, "units": ""}


def _rows(ended: Ended, tiles: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """The tiles (row, col), in order, with their vectors (m, D); a row of regions of the plan at a time."""
    plan = ended.plan
    for top in range(0, plan.frame.shape[0], plan.block[0]):
        box = Box(top, 0, plan.block[0], plan.frame.shape[1]).intersect(Box(0, 0, *plan.frame.shape))
        chosen = tiles[(tiles[:, 0] >= box.y) & (tiles[:, 0] < box.y1)]
        if len(chosen):
            band = ended.work.gather(plan, ended.spec.features, box)
            yield chosen, band[:, chosen[:, 0] - top, chosen[:, 1]].T


def _length_spec(spec: ModelSpec, lengths: NDArray[np.float32]) -> ModelSpec:
    """A card for the picture of the vectors' lengths."""
    known = lengths[~np.isnan(lengths)].astype(np.float64)
    low, high = (float(f"{v:.3g}") for v in np.percentile(known, DISPLAY_PERCENTILES)) if known.size else (0.0, 1.0)
    display = (low, high) if low < high else (low - 1, low + 1)
    return replace(
        spec, features=0, classes=("length of the feature vector",), scores="value", display=display, threshold=(0.0,)
    )
