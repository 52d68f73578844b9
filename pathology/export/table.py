"""Tiles and their scores as Parquet and CSV. The only import of pyarrow.

Promise: a row's rectangle has whole level-0 pixels, and its centre lies less than half a pixel from the tile's true one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.grid import TileGrid

SCHEMA = 1

# Rows formatted at once when writing text.
CHUNK_ROWS = 4096

# A centre this close to half a pixel off is treated as exactly half: float noise must not push it over.
TIE_PX = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class TileTable:
    """One row per tile.

    minx, miny     (n,) int64 left and top edge in level-0 px
    width, height  (n,) int64 in level-0 px
    coverage       (n,) float32 tissue share, 0..1
    scores         (n, C) float32; NaN: not predicted
    columns        the C names of the scores
    """

    minx: NDArray[np.int64]
    miny: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    coverage: NDArray[np.float32]
    scores: NDArray[np.float32]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = {len(self.minx), len(self.miny), len(self.width), len(self.height), len(self.coverage), len(self.scores)}
        if len(rows) != 1 or self.scores.ndim != 2:
            raise ValueError(f"a tile table's columns have {sorted(rows)} rows; all must have the same")
        if self.scores.shape[1] != len(self.columns):
            raise ValueError(f"{self.scores.shape[1]} scores a tile for {len(self.columns)} columns; give one each")
        if taken := set(self.columns) & set(PLACE_COLUMNS):
            raise UsageError(f"class name {sorted(taken)[0]!r} is also a column of the tile's place; rename the class")

    def __len__(self) -> int:
        return len(self.minx)


PLACE_COLUMNS = ("minx", "miny", "width", "height", "coverage")


def tile_table(
    grid: TileGrid,
    tiles: NDArray[np.integer],
    coverage: NDArray[np.float32],
    scores: NDArray[np.float32],
    columns: tuple[str, ...],
) -> TileTable:
    """The table of `tiles` ((n, 2) row, col), in their order; tiles at the slide's edge keep their full size."""
    centres = grid.l0_origins(tiles) + grid.l0_tile / 2
    miny, height = round_span(centres[:, 0], grid.l0_tile)
    minx, width = round_span(centres[:, 1], grid.l0_tile)
    return TileTable(minx, miny, width, height, coverage.astype(np.float32), scores.astype(np.float32), columns)


def round_span(centres: NDArray[np.float64], size: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) start and (n,) length in whole px of spans of `size` px around `centres`, with centres moved by less than 0.5 px.

    The length is `size` rounded, the start the nearest; where two starts are equally near, the span covers both, one px longer.
    """
    whole = max(1, round(size))
    start = centres - whole / 2
    below = np.floor(start)
    tie = np.abs(start - below - 0.5) < TIE_PX
    return np.where(tie, below, np.round(start)).astype(np.int64), np.where(tie, whole + 1, whole).astype(np.int64)


def write_parquet(path: Path, table: TileTable) -> None:
    """Columns minx, miny, width, height (int64), coverage and the scores (float32); NaN stays NaN, never null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = (*PLACE_COLUMNS, *table.columns)
    arrays = [table.minx, table.miny, table.width, table.height, table.coverage, *np.ascontiguousarray(table.scores.T)]
    columns = [pa.array(values) for values in arrays]
    schema = pa.schema(
        [pa.field(name, column.type, nullable=False) for name, column in zip(names, columns, strict=True)],
        metadata={"schema": str(SCHEMA), "units": "minx, miny, width, height: level-0 px; coverage: tissue share 0..1"},
    )
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")


def read_parquet(path: Path) -> TileTable:
    """What `write_parquet` wrote. Raises UsageError for a file of another kind or schema version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid:
        raise UsageError(f"{path.name} is no Parquet file; write it again") from None
    version = (table.schema.metadata or {}).get(b"schema", b"").decode()
    if version != str(SCHEMA) or tuple(table.column_names[: len(PLACE_COLUMNS)]) != PLACE_COLUMNS:
        raise UsageError(
            f"{path.name} is no tile table of schema {SCHEMA} (it says {version!r}); write it again with this version"
        )
    names = tuple(table.column_names[len(PLACE_COLUMNS) :])
    minx, miny, width, height, coverage = (table[name].to_numpy() for name in PLACE_COLUMNS)
    scores = np.empty((table.num_rows, len(names)), np.float32)
    for i, name in enumerate(names):
        scores[:, i] = table[name].to_numpy()
    return TileTable(minx, miny, width, height, coverage, scores, names)


def write_csv(path: Path, table: TileTable) -> None:
    """The same columns as text: numbers with as many digits as float32 needs, NaN as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*PLACE_COLUMNS, *table.columns))
        writer.writerows(_rows_as_text(table))


def _rows_as_text(table: TileTable) -> Iterator[list[str]]:
    for start in range(0, len(table), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        whole = np.stack([table.minx[rows], table.miny[rows], table.width[rows], table.height[rows]], axis=1).astype(str)
        numbers = np.column_stack([table.coverage[rows], table.scores[rows]])
        text = np.where(np.isnan(numbers), "", numbers.astype(str))
        yield from np.concatenate([whole, text], axis=1).tolist()
