"""A model's scores of given tiles beside expected ones. Promise: every expected score is compared, or the reason is said."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathology.errors import ModelError, PathologyError, UsageError, one_line
from pathology.model import Model, ModelSpec
from pathology.predictor import predict_in_order
from pathology.resample import reduced

TILE_COLUMN = "tile"
BATCH = 16
FILTERS = {"area": Image.Resampling.BILINEAR, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True)
class Difference:
    """One tile: its file's name, and the class whose score differs most from the expected one."""

    tile: str
    column: str
    expected: float
    score: float

    @property
    def size(self) -> float:
        return abs(self.score - self.expected)


def compare(model: Model, folder: Path, expected: Path) -> list[Difference]:
    """The worst class of each tile of the table `expected` (column `tile`: a file in `folder`; one column per class).

    For classifiers. UsageError for a table or pictures that do not fit.
    """
    spec = model.spec
    if spec.output_px != 1:
        raise UsageError(f"model {spec.name} answers maps; tiles can be compared for models with a score per tile and class")
    if spec.stain:
        raise UsageError(f"model {spec.name} takes the stains of a whole slide, which tiles do not show; compare heatmaps")
    names, wanted = _read_table(expected, spec)
    tiles = (_read_tile(folder / name, spec) for name in names)
    try:
        scores = np.stack([answer[:, 0, 0] for answer in predict_in_order(model, min(BATCH, len(names)), tiles)])
    except PathologyError:
        raise
    except Exception as error:  # a model's own code
        raise ModelError(f"model {spec.name} failed: {type(error).__name__}: {one_line(error)}") from error
    if not np.isfinite(scores).all():
        raise ModelError(
            f"model {spec.name} answered NaN or infinity for {names[int(np.argmin(np.isfinite(scores).all(axis=1)))]}"
        )
    worst = np.abs(scores - wanted).argmax(axis=1)
    return [
        Difference(name, spec.columns()[at], float(row[at]), float(got[at]))
        for name, at, row, got in zip(names, worst, wanted, scores, strict=True)
    ]


def _read_table(path: Path, spec: ModelSpec) -> tuple[list[str], NDArray[np.float64]]:
    """Names of tiles, and (n, classes) scores."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a table of scores: {error}") from error
    if not rows:
        raise UsageError(f"{path} has no rows; give a header and a row per tile")
    columns = [
        next((c for c in (full, name) if c in rows[0]), None) for full, name in zip(spec.columns(), spec.classes, strict=True)
    ]
    if TILE_COLUMN not in rows[0] or None in columns:
        raise UsageError(f"{path} has columns {', '.join(rows[0])}; needed are {', '.join((TILE_COLUMN, *spec.columns()))}")
    try:
        scores = np.array([[float(row[column]) for column in columns if column] for row in rows])
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}; give a number for each class") from error
    if not np.isfinite(scores).all():
        raise UsageError(f"{path} holds a score that is no finite number")
    if not all(row[TILE_COLUMN] for row in rows):
        raise UsageError(f"{path} has a row without a tile; give each one's file name")
    return [row[TILE_COLUMN] for row in rows], scores


def _read_tile(path: Path, spec: ModelSpec) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"tile {path} cannot be read: {error}") from error
    height, width = pixels.shape[:2]
    if (height, width) == (spec.input_px, spec.input_px):
        return pixels
    if (height, width) != (spec.tile_px, spec.tile_px):
        sides = " or ".join(str(side) for side in sorted({spec.tile_px, spec.input_px}))
        raise UsageError(f"tile {path} is {width} x {height} px; model {spec.name} takes {sides} px a side")
    if spec.read.filter == "area" and spec.tile_px % spec.input_px == 0:
        return reduced(pixels, spec.tile_px // spec.input_px)
    return np.asarray(Image.fromarray(pixels).resize((spec.input_px, spec.input_px), FILTERS[spec.read.filter]))
