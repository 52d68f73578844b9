"""Objects that a detector found: a table of them, and the heatmap of their density."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.detections import Objects, resolve
from pathology.export.table import write_objects
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.outputs.ended import OVERLAY, Ended, overlay
from pathology.plan import Plan

DETECTIONS = "detections.parquet"
DENSITY_UNITS = "per mm2"


def write_output(folder: Path, ended: Ended) -> dict[str, Any]:
    """detections.parquet, heatmap.ome.zarr of objects per mm2, overlay.png; {detections, classes, ...} for the record.

    All objects of the slide are in memory at once: 40 bytes each and 16 for each vertex.
    """
    from pathology.result import open_heatmap
    from pathology.store import STORE_NAME, write_heatmap

    spec, plan, rule = ended.spec, ended.plan, ended.spec.detections
    assert rule is not None
    rows = [ended.work.load_rows(region, 5 + 2 * rule.vertices) for region in plan.regions]
    seen = Objects.from_rows(np.concatenate([np.empty((0, 5 + 2 * rule.vertices)), *rows]))
    objects = resolve(seen, spec, rule, plan.grid, plan.tiles[ended.answered])
    write_objects(folder / DETECTIONS, objects, spec.classes)
    density = Density(objects, plan, ended.answered, len(spec.classes))
    summary = write_heatmap(folder / STORE_NAME, ended.meta(density_spec(spec)), density.read)
    (folder / OVERLAY).write_bytes(overlay(ended.slide, open_heatmap(folder / STORE_NAME)))
    counts = np.bincount(objects.classes, minlength=len(spec.classes)).tolist()
    return {
        "detections": len(objects),
        "classes": {
            c.name: {"mean": c.mean, "max": c.max, "area_mm2": c.area_mm2, "count": count}
            for c, count in zip(summary.classes, counts, strict=True)
        },
        "threshold": dict(zip(spec.classes, spec.threshold, strict=True)),
        "units": DENSITY_UNITS,
    }


def density_spec(spec: ModelSpec) -> ModelSpec:
    """The card of the heatmap of density: a class is present where there is any of its objects."""
    any_at_all = (float(np.finfo(np.float32).tiny),) * len(spec.classes)  # scores are compared in float32
    return replace(spec, detections=None, scores="value", units=DENSITY_UNITS, threshold=any_at_all)


class Density:
    """Objects per mm2 and class in every heatmap pixel that a tile was answered for; NaN in the others."""

    def __init__(self, objects: Objects, plan: Plan, answered: NDArray[np.bool_], classes: int) -> None:
        height, width = plan.frame.shape
        place = np.floor(np.stack(plan.frame.level0_to_heatmap(*objects.centres.T), axis=1)).astype(np.int64)
        self._place = np.clip(place, 0, (height - 1, width - 1))
        self._class = objects.classes
        self._plan = plan
        self._tiles = plan.tiles[answered].astype(np.int64) * plan.h_stride
        self._classes = classes
        self._area_mm2 = plan.frame.mpp**2 / 1e6

    def read(self, box: Box) -> NDArray[np.float32]:
        """(C, h, w) float32 of a box in heatmap px."""
        counts = np.zeros((self._classes, *box.shape), np.float64)
        inside = ((self._place >= (box.y, box.x)) & (self._place < (box.y1, box.x1))).all(axis=1)
        place = self._place[inside] - (box.y, box.x)
        np.add.at(counts, (self._class[inside], place[:, 0], place[:, 1]), 1)
        covered = np.zeros(box.shape, bool)
        side = self._plan.output_px
        touching = ((self._tiles < (box.y1, box.x1)) & (self._tiles + side > (box.y, box.x))).all(axis=1)
        for y, x in self._tiles[touching].tolist():
            covered[Box(y, x, side, side).intersect(box).slices(box)] = True
        return np.where(covered, counts / self._area_mm2, np.nan).astype(np.float32)
