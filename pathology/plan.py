"""Cutting a slide's heatmap into regions. Pure arithmetic: no pixels, no models, no files.

Promise: every heatmap pixel lies in exactly one region, and a region lists every chosen tile that touches it, in
row-major order; so regions share nothing, and any cut gives the same heatmap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.cores import reading_processes
from pathology.errors import UsageError
from pathology.geometry import Box, HeatmapFrame
from pathology.grid import TileGrid
from pathology.model import ModelSpec
from pathology.stitch import BAND_PX, Blend, canvas_bytes
from pathology.tissue import TissueMask

SCHEMA = 2

# A region's strides a side: small enough to retry, large enough that files and tasks stay few. A dense region's are counted
# per stride that a tile reaches beyond its own, because tiles that straddle a border are computed on both sides: at 50 %
# overlap one in 32 does, along each axis.
BLOCK = 32
# More overlap than 67 % makes no larger region: too much work would hang on one retry.
BLOCK_MAX = 64
# What a worker may hold unless it is told, how many regions it has at work, and the share that each one's canvas may take.
MEMORY_BYTES = 2**30
REGIONS_AT_ONCE = 2
CANVAS_SHARE = 5 / 16


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
    block      (rows, columns) of a region in strides
    """

    grid: TileGrid
    frame: HeatmapFrame
    output_px: int
    blend: Blend
    block: tuple[int, int]
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

    def cell(self, region: Region) -> tuple[int, int]:
        """Row and column of a region's place among all blocks; the same for plans of one grid and block."""
        return region.box.y // (self.block[0] * self.h_stride), region.box.x // (self.block[1] * self.h_stride)

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
            (data["block"][0], data["block"][1]),
            np.array(data["tiles"], np.int32).reshape(-1, 2),
            np.array(data["coverage"], np.float32),
            data["tissue_mm2"],
        )


def make_plan(
    grid: TileGrid,
    spec: ModelSpec,
    tissue: TissueMask,
    *,
    min_tissue: float,
    blend: Blend = "hann",
    block: int | None = None,
    memory: int = MEMORY_BYTES,
    together: Sequence[ModelSpec] = (),
) -> Plan:
    """The plan for one slide and model.

    min_tissue  a tile is inferred if at least this share of it (and more than nothing) is tissue, 0..1
    block       strides a side of a region; None: as `choose_block` sees fit
    memory      bytes that a worker may hold: a dense region's canvas takes at most `CANVAS_SHARE` of it
    together    cards of models on the same grid, `spec` among them, whose canvases share that: each gets the same regions
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
    shape = choose_block(grid, together or (spec,), memory) if block is None else (block, block)
    return cut(grid, spec.output_px, blend, shape, tiles[chosen], coverage[chosen], tissue.area_mm2)


def cut(
    grid: TileGrid,
    output_px: int,
    blend: Blend,
    block: tuple[int, int],
    tiles: NDArray[np.int32],
    coverage: NDArray[np.float32],
    tissue_mm2: float,
) -> Plan:
    """Cut the chosen tiles into regions of `block` (rows, columns) strides; regions without a tile are left out."""
    frame = grid.heatmap_frame(output_px)
    h_stride = grid.heatmap_pixels_per_stride(output_px)
    regions: list[Region] = []
    for box, touching in _touching(frame, output_px, h_stride, block, tiles):
        regions.append(Region(len(regions), box, touching))
    return Plan(grid, frame, output_px, blend, block, tiles, coverage, tissue_mm2, tuple(regions))


def _touching(
    frame: HeatmapFrame, output_px: int, h_stride: int, block: tuple[int, int], tiles: NDArray[np.int32]
) -> Iterator[tuple[Box, NDArray[np.int32]]]:
    """Boxes of `block` strides in row-major order, with the tiles whose answers touch them, where there are any."""
    whole = Box(0, 0, *frame.shape)
    height, width = block[0] * h_stride, block[1] * h_stride
    y0, x0 = (tiles * np.int64(h_stride)).T
    for top in range(0, whole.height, height):
        row = Box(top, 0, height, whole.width).intersect(whole)
        in_row = (y0 < row.y1) & (y0 + output_px > row.y)
        row_tiles, row_x0 = tiles[in_row], x0[in_row]
        if not len(row_tiles):
            continue
        for left in range(0, whole.width, width):
            box = Box(top, left, row.height, width).intersect(whole)
            touching = row_tiles[(row_x0 < box.x1) & (row_x0 + output_px > box.x)]
            if len(touching):
                yield box, touching


def regions_at_once(cores: int) -> int:
    """Regions at work for such a device: one reads while another's last batch is with the model, and each process has one."""
    return max(REGIONS_AT_ONCE, reading_processes(cores))


def choose_block(grid: TileGrid, specs: Sequence[ModelSpec], memory: int) -> tuple[int, int]:
    """(rows, columns) of a region in strides, for workers that may hold `memory` bytes. The same for all of `specs`.

    32 x 32; where dense answers overlap, that many for each stride that a tile reaches beyond its own, 64 at most; where they
    don't, 16 across, since no tile straddles a border. A region that its canvases' memory, or the slide, makes narrower is as
    much taller: rows cost no memory, and the work stays the same.
    """
    strides = {spec.output_px: grid.heatmap_pixels_per_stride(spec.output_px) for spec in specs}
    dense = [output_px for output_px in strides if output_px > 1]
    if not dense:
        return BLOCK, BLOCK
    side = min(BLOCK_MAX, BLOCK * max(1, math.ceil(grid.tile_px / grid.stride_px) - 1))

    def fits(cols: int) -> bool:
        canvases = (canvas_bytes(s.channels, s.output_px, h := strides[s.output_px], cols * h) for s in specs)
        return sum(canvases) <= memory * CANVAS_SHARE

    across = max(math.ceil(grid.heatmap_frame(output_px).shape[1] / strides[output_px]) for output_px in dense)
    widest = min(side if grid.stride_px < grid.tile_px else side // 2, across)
    cols = next((cols for cols in range(widest, 1, -1) if fits(cols)), 1)
    return side * side // cols, cols


def region_bytes(plan: Plan, classes: int) -> int:
    """Most bytes of a region at work, beside its tiles: the canvas of the widest one, and a band on its way to disk."""
    width = max((region.box.width for region in plan.regions), default=0)
    if not width:
        return 0
    return canvas_bytes(classes, plan.output_px, plan.h_stride, width) + BAND_PX * width * classes * 4
