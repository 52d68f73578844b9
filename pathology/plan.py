"""Cutting a slide's heatmap into regions. Pure arithmetic: no pixels, no models, no files.

Promise: every heatmap pixel lies in exactly one region, and a region lists every chosen tile that touches it, in
row-major order; so regions share nothing, and any cut gives the same heatmap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.geometry import Box, HeatmapFrame
from pathology.grid import TileGrid
from pathology.model import ModelSpec
from pathology.stitch import Blend
from pathology.tissue import TissueMask

SCHEMA = 1

# A classifier's region, in strides a side: small enough to retry, large enough that files and tasks stay few.
CLASSIFIER_BLOCK = 16
# A dense region is as large as a canvas of this size allows: tiles straddling its border are computed on both sides.
CANVAS_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One unit of work, retry and resume.

    index     place in `Plan.regions`
    box       its part of the heatmap, in heatmap px
    tiles     (n, 2) int32 row, col of the tiles to infer, row-major
    """

    index: int
    box: Box
    tiles: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that will be computed for one slide and model.

    tiles      (n, 2) int32 row, col of the tiles chosen by tissue, row-major, each once
    coverage   (n,) float32, the tissue share of each
    block      strides a side of a region
    """

    grid: TileGrid
    frame: HeatmapFrame
    output_px: int
    blend: Blend
    block: int
    tiles: NDArray[np.int32]
    coverage: NDArray[np.float32]
    tissue_mm2: float
    regions: tuple[Region, ...]

    @property
    def h_stride(self) -> int:
        """Heatmap px between the answers of neighbouring tiles."""
        return self.grid.heatmap_pixels_per_stride(self.output_px)

    @property
    def forward_passes(self) -> int:
        """Tiles inferred in all regions; tiles on a border between regions count once for each."""
        return sum(len(r.tiles) for r in self.regions)

    @property
    def recompute_share(self) -> float:
        """Forward passes beyond one per tile, as a share of the tiles."""
        return self.forward_passes / len(self.tiles) - 1 if len(self.tiles) else 0.0

    def to_json(self) -> str:
        """One line of JSON from which `from_json` makes an equal plan."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "grid": asdict(self.grid),
                "output_px": self.output_px,
                "blend": self.blend,
                "block": self.block,
                "tissue_mm2": self.tissue_mm2,
                "tiles": self.tiles.tolist(),
                "coverage": self.coverage.tolist(),
            },
            sort_keys=True,
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises UsageError for a plan of another schema version."""
        data: dict[str, Any] = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise UsageError(
                f"plan has schema {data.get('schema')!r}, this version reads {SCHEMA}; finish it with the version that began it"
            )
        grid = TileGrid(**{**data["grid"], "l0_shape": tuple(data["grid"]["l0_shape"])})
        return cut(
            grid,
            data["output_px"],
            data["blend"],
            data["block"],
            np.array(data["tiles"], np.int32).reshape(-1, 2),
            np.array(data["coverage"], np.float32),
            data["tissue_mm2"],
        )


def make_plan(
    grid: TileGrid, spec: ModelSpec, tissue: TissueMask, *, min_tissue: float, blend: Blend = "hann", block: int | None = None
) -> Plan:
    """The plan for one slide and model.

    min_tissue  a tile is inferred if at least this share of it (and more than nothing) is tissue, 0..1
    block       strides a side of a region; by default 16 for a classifier, as many as fit a canvas of 512 MiB otherwise
    """
    if not 0 <= min_tissue <= 1:
        raise UsageError(f"min tissue {min_tissue} is outside 0..1; it is the share of a tile that must be tissue")
    if block is not None and block < 1:
        raise UsageError(f"region of {block} strides: use 1 or more")
    rows, cols = grid.shape
    tiles = np.stack(np.meshgrid(np.arange(rows, dtype=np.int32), np.arange(cols, dtype=np.int32), indexing="ij"), -1).reshape(
        -1, 2
    )
    coverage = tissue.coverage(grid.l0_origins(tiles), grid.l0_tile).astype(np.float32)
    chosen = (coverage >= np.float32(min_tissue)) & (coverage > 0)
    if block is None:
        block = _block(grid, spec)
    return cut(grid, spec.output_px, blend, block, tiles[chosen], coverage[chosen], tissue.area_mm2)


def cut(
    grid: TileGrid,
    output_px: int,
    blend: Blend,
    block: int,
    tiles: NDArray[np.int32],
    coverage: NDArray[np.float32],
    tissue_mm2: float,
) -> Plan:
    """Cut the chosen tiles into regions of `block` x `block` strides; regions without a tile are left out."""
    frame = grid.heatmap_frame(output_px)
    side = block * grid.heatmap_pixels_per_stride(output_px)
    regions: list[Region] = []
    for box, touching in _touching(grid, frame, output_px, side, tiles):
        regions.append(Region(len(regions), box, touching))
    return Plan(grid, frame, output_px, blend, block, tiles, coverage, tissue_mm2, tuple(regions))


def _touching(
    grid: TileGrid, frame: HeatmapFrame, output_px: int, side: int, tiles: NDArray[np.int32]
) -> Iterator[tuple[Box, NDArray[np.int32]]]:
    """Boxes of `side` heatmap px in row-major order, with the tiles whose answers touch them, where there are any."""
    h_stride = grid.heatmap_pixels_per_stride(output_px)
    height, width = frame.shape
    y0, x0 = (tiles * np.int64(h_stride)).T
    for top in range(0, height, side):
        in_rows = (y0 < min(top + side, height)) & (y0 + output_px > top)
        band, band_x0 = tiles[in_rows], x0[in_rows]
        if not len(band):
            continue
        for left in range(0, width, side):
            box = Box(top, left, min(side, height - top), min(side, width - left))
            touching = band[(band_x0 < box.x1) & (band_x0 + output_px > left)]
            if len(touching):
                yield box, touching


def _block(grid: TileGrid, spec: ModelSpec) -> int:
    if spec.output_px == 1:
        return CLASSIFIER_BLOCK
    side = math.isqrt(CANVAS_BYTES // canvas_pixel_bytes(len(spec.classes)))
    return max(1, side // grid.heatmap_pixels_per_stride(spec.output_px))


def canvas_pixel_bytes(classes: int) -> int:
    """Memory per heatmap pixel of a region at work: float64 sums and weights, the float32 answer, and where there is one."""
    return classes * (8 + 4) + 8 + 1


def memory_bound(plan: Plan, spec: ModelSpec, *, batch_size: int, readers: int, regions: int = 2) -> int:
    """Most bytes that one worker holds for `regions` regions at once, beyond libraries and the model itself.

    Canvases; tiles handed in and not yet answered (two batches a region), read ahead (8 a reader), and the batch;
    and a source window for each reader, as RGB with mask, and as Pillow's four bytes a pixel.
    """
    tile = spec.input_px**2 * 3
    window = (plan.grid.l0_tile + 8) ** 2 * (3 + 1 + 4)
    tiles = regions * (2 * batch_size + 8 * readers) + batch_size
    return int(regions * canvas_bytes(plan, len(spec.classes)) + tiles * tile + readers * window)


def canvas_bytes(plan: Plan, classes: int) -> int:
    """Memory of the largest region's canvas."""
    return max((math.prod(r.box.shape) for r in plan.regions), default=0) * canvas_pixel_bytes(classes)
