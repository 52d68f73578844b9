"""The tile grid: which tiles cover a slide, and where each lies. Pure arithmetic on indices.

Promise: a tile's origin is index x stride x ratio, computed once in float64, never accumulated or rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.geometry import Box, HeatmapFrame, mpp_ratio

# A slide may end this fraction of a grid pixel beyond the last tile before another row of tiles is added for it:
# float noise of shape x mpp must not create a row of empty tiles.
EDGE_SLACK_PX = 1e-6


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles of `tile_px`, every `stride_px`, over a slide seen at `mpp`.

    l0_shape   (height, width) of the slide's level 0 in px
    slide_mpp  um per level-0 px
    mpp        um per grid px (the model's)
    """

    l0_shape: tuple[int, int]
    slide_mpp: float
    mpp: float
    tile_px: int
    stride_px: int

    def __post_init__(self) -> None:
        if min(self.l0_shape) < 1:
            raise UsageError(f"slide of {self.l0_shape[0]} x {self.l0_shape[1]} px has no pixels to tile")
        if self.tile_px < 1:
            raise UsageError(f"tile {self.tile_px} px is smaller than one pixel; use tile >= 1")
        if not 1 <= self.stride_px <= self.tile_px:
            raise UsageError(
                f"stride {self.stride_px} px does not fit tile {self.tile_px} px: a larger one leaves gaps between tiles; "
                "use 1 <= stride <= tile"
            )

    @property
    def ratio(self) -> float:
        """Level-0 px per grid px."""
        return mpp_ratio(self.mpp, self.slide_mpp)

    @property
    def g_extent(self) -> tuple[float, float]:
        """(height, width) of the slide in grid px, not rounded."""
        return self.l0_shape[0] / self.ratio, self.l0_shape[1] / self.ratio

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of tiles: enough that every pixel of the slide lies in one; the last may reach past the edge."""

        def count(extent: float) -> int:
            return 1 + max(0, math.ceil((extent - self.tile_px - EDGE_SLACK_PX) / self.stride_px))

        return count(self.g_extent[0]), count(self.g_extent[1])

    def tiles(self, within: Box) -> NDArray[np.int32]:
        """(n, 2) row, col of all tiles that share a pixel with `within` (grid px), in row-major order."""
        if within.empty:
            return np.empty((0, 2), np.int32)

        def span(lo: int, hi: int, count: int) -> NDArray[np.int32]:
            # index * stride < hi  and  index * stride + tile > lo
            first = max(0, (lo - self.tile_px) // self.stride_px + 1)
            last = min(count, -(-hi // self.stride_px))
            return np.arange(first, max(first, last), dtype=np.int32)

        rows, cols = span(within.y, within.y1, self.shape[0]), span(within.x, within.x1, self.shape[1])
        grid = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1)
        return grid.reshape(-1, 2).astype(np.int32)

    def l0_origins(self, tiles: NDArray[np.integer]) -> NDArray[np.float64]:
        """(n, 2) level-0 y, x of the tiles' outer corners."""
        return tiles.astype(np.float64) * self.stride_px * self.ratio

    @property
    def l0_tile(self) -> float:
        """Side of a tile in level-0 px."""
        return self.tile_px * self.ratio

    def heatmap_pixels_per_stride(self, output_px: int) -> int:
        """How far the answers of neighbouring tiles lie apart in the heatmap, in heatmap px.

        A tile classifier (output 1) has one heatmap pixel per stride, so overlapping tiles do not overlap there.
        """
        if output_px == 1:
            return 1
        if (self.stride_px * output_px) % self.tile_px:
            raise UsageError(
                f"stride {self.stride_px} px of tile {self.tile_px} px is no whole number of the {output_px} output pixels: "
                f"answers of neighbouring tiles would not lie on one raster; use a stride that is a multiple of "
                f"{self.tile_px // math.gcd(self.tile_px, output_px)}"
            )
        return self.stride_px * output_px // self.tile_px

    def heatmap_frame(self, output_px: int) -> HeatmapFrame:
        """The heatmap's shape and place for a model that answers `output_px` x `output_px` per tile.

        Classifier: one pixel per tile, as large as the stride, around the tile's centre. Dense: tile/output px from
        the slide's corner, cut where the slide ends.
        """
        self.heatmap_pixels_per_stride(output_px)
        if output_px == 1:
            offset = (self.tile_px - self.stride_px) / 2
            return HeatmapFrame(self.shape, offset * self.ratio, self.stride_px * self.ratio, self.slide_mpp)
        pixel = self.tile_px / output_px
        height, width = (max(1, math.ceil(e / pixel - EDGE_SLACK_PX)) for e in self.g_extent)
        return HeatmapFrame((height, width), 0.0, pixel * self.ratio, self.slide_mpp)
