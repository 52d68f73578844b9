"""A slide all of whose regions are done. Promise: names the same things whatever the answers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pathology.encoding import Dtype, choose_encoding
from pathology.export.png import overlay_l0_pixel, overlay_png
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.plan import Plan
from pathology.slide import Slide
from pathology.stain import Stains
from pathology.work import Work

if TYPE_CHECKING:  # they bring zarr, which a run's driver has no use for
    from pathology.result import Heatmap
    from pathology.store import HeatmapMeta

OVERLAY, TILES = "overlay.png", "tiles.parquet"


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """What a result is made of.

    bad_tiles  (m, 2) int32 row, col of the plan's tiles that could not be read
    dtype      of a dense map's store
    stains     of the slide, where the model took them
    """

    work: Work
    plan: Plan
    slide: Slide
    spec: ModelSpec
    bad_tiles: NDArray[np.int32]
    dtype: Dtype | Literal["auto"] = "auto"
    stains: Stains | None = None

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(n,) which of the plan's tiles the model saw."""
        bad = np.zeros(self.plan.grid.shape, bool)
        bad[self.bad_tiles[:, 0], self.bad_tiles[:, 1]] = True
        seen: NDArray[np.bool_] = ~bad[self.plan.tiles[:, 0], self.plan.tiles[:, 1]]
        return seen

    def meta(self, spec: ModelSpec) -> HeatmapMeta:
        """What is written beside the numbers of a store, whose channels `spec` describes."""
        from pathology.store import HeatmapMeta

        grid, provenance = self.plan.grid, {"key": self.work.key, "fields": self.work.fields}
        if self.stains is not None:
            provenance["stain"] = self.stains.record()
        encoding = choose_encoding(self.spec, self.dtype)
        return HeatmapMeta(
            self.plan.frame, spec, grid.tile_px, grid.stride_px, self.slide.info.fingerprint, provenance, encoding
        )


def overlay(slide: Slide, heatmap: Heatmap) -> bytes:
    """`overlay.png` of the first class, from the pyramid level that suits the picture."""
    finest = overlay_l0_pixel(slide.info.shape)
    level = max((k for k in range(len(heatmap.arrays)) if heatmap.level_frame(k).l0_pixel <= finest), default=0)
    scores = heatmap.read(level, Box(0, 0, *heatmap.level_shape(level)))[0]
    return overlay_png(slide, scores, heatmap.level_frame(level), heatmap.spec, 0)
