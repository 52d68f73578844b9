"""Tiles and their scores as Parquet and CSV. The only import of pyarrow.

Promise: a row's rectangle has whole level-0 pixels, and its centre lies less than half a pixel from the tile's true one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.detections import Objects
from pathology.errors import UsageError
from pathology.grid import TileGrid
from pathology.model import PLACE_COLUMNS

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


def write_objects(path: Path, objects: Objects, classes: Sequence[str]) -> None:
    """Columns x, y (float64, continuous level-0 px), class (text), score (float32), and of outlines x, y of each vertex."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    vertices = objects.outlines.shape[1]
    columns: dict[str, Any] = {
        "x": pa.array(objects.centres[:, 1]),
        "y": pa.array(objects.centres[:, 0]),
        "class": pa.DictionaryArray.from_arrays(
            pa.array(objects.classes.astype(np.int32)), pa.array(list(classes), pa.string())
        ),
        "score": pa.array(objects.scores.astype(np.float32)),
    }
    if vertices:
        flat = np.ascontiguousarray(objects.outlines[..., ::-1]).reshape(-1)
        columns["outline"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), 2 * vertices)
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    units = "x, y, outline (x, y of each vertex): continuous level-0 px"
    schema = pa.schema(fields, metadata={"schema": str(SCHEMA), "kind": "detections", "units": units})
    pq.write_table(pa.Table.from_arrays(list(columns.values()), schema=schema), path, compression="zstd")


def read_objects(path: Path, classes: Sequence[str]) -> Objects:
    """What `write_objects` wrote. Raises UsageError for a file of another kind or schema version, and for other classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid:
        raise UsageError(f"{path.name} is no Parquet file; make the result again") from None
    about = table.schema.metadata or {}
    if about.get(b"schema") != str(SCHEMA).encode() or about.get(b"kind") != b"detections":
        raise UsageError(f"{path.name} is no table of detections of schema {SCHEMA}; write it again with this version")
    number = {name: i for i, name in enumerate(classes)}
    names = table["class"].to_pylist()
    if unknown := set(names) - set(number):
        raise UsageError(f"{path.name} has the class {sorted(unknown)[0]!r}, which its model has not; make the result again")
    count = table.num_rows
    outlines = np.empty((count, 0, 2))
    if "outline" in table.column_names:
        flat = table["outline"].combine_chunks().flatten().to_numpy()
        outlines = (
            flat.reshape(count, -1, 2)[..., ::-1]
            if count
            else np.empty((0, table.schema.field("outline").type.list_size // 2, 2))
        )
    return Objects(
        np.stack([table["y"].to_numpy(), table["x"].to_numpy()], axis=1),
        np.array([number[name] for name in names], np.int64),
        table["score"].to_numpy().astype(np.float64),
        np.zeros(count, bool),
        outlines,
    )


def write_csv(path: Path, table: TileTable) -> None:
    """The same columns as text: numbers with as many digits as float32 needs, NaN as an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*PLACE_COLUMNS, *table.columns))
        writer.writerows(_rows_as_text(table))


def write_objects_csv(path: Path, objects: Objects, classes: Sequence[str]) -> None:
    """The columns of `write_objects` as text; outlines as WKT polygons, boxes by their corners."""
    outlined = objects.outlines.shape[1] > 0
    scores = objects.scores.astype(np.float32).astype(str)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("x", "y", "class", "score", *(("outline",) if outlined else ())))
        for (y, x), number, score, ring in zip(objects.centres.tolist(), objects.classes, scores, objects.rings(), strict=True):
            text = ", ".join(f"{across} {down}" for down, across in ring.tolist())
            writer.writerow((x, y, classes[number], score, *((f"POLYGON (({text}))",) if outlined else ())))


def _rows_as_text(table: TileTable) -> Iterator[list[str]]:
    for start in range(0, len(table), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        whole = np.stack([table.minx[rows], table.miny[rows], table.width[rows], table.height[rows]], axis=1).astype(str)
        numbers = np.column_stack([table.coverage[rows], table.scores[rows]])
        text = np.where(np.isnan(numbers), "", numbers.astype(str))
        yield from np.concatenate([whole, text], axis=1).tolist()
