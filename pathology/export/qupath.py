"""Tiles and detections as GeoJSON for QuPath: drag the file onto the opened slide.

Promise: an object has the same id in every export of the same slide and model, so importing again adds nothing new.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.detections import Objects
from pathology.errors import UsageError
from pathology.export.colormap import class_colors
from pathology.export.table import CHUNK_ROWS, TileTable
from pathology.geometry import Box
from pathology.model import ModelSpec

# Namespace of the ids of tiles; any fixed uuid will do.
ID_NAMESPACE = uuid.UUID("5f0c2a6e-3b0d-5c57-8c0e-6d1b7e7a4a39")


def write_qupath(path: Path, table: TileTable, spec: ModelSpec, fingerprint: str, bounds: Box | None) -> None:
    """One tile object per row, written feature by feature.

    fingerprint  of the slide (`SlideInfo.fingerprint`); ids are made of it, the model's name and the tile's place
    bounds       `SlideInfo.bounds`: QuPath crops slides to it, so coordinates count from its corner; None: from level 0's

    Measurements are the scores, NaN left out. Classification is the likeliest class of several probabilities; for one
    class, and for values, the class that reaches its threshold, and none where no class or more than one does.
    Raises UsageError where the table's columns aren't the model's.
    """
    if table.columns != spec.columns():
        raise UsageError(
            f"table columns {table.columns} are not those of model {spec.name}, {spec.columns()}; export with its own model"
        )
    _write(path, _tiles(table, spec, fingerprint, bounds))


def write_qupath_objects(path: Path, objects: Objects, spec: ModelSpec, fingerprint: str, bounds: Box | None) -> None:
    """One detection object per row: a point, or the polygon of its outline, classified, with its score as a measurement.

    Parameters as for `write_qupath`.
    """
    _write(path, _detections(objects, spec, fingerprint, bounds))


def _write(path: Path, features: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for i, feature in enumerate(features):
            file.write(",\n" if i else "\n")
            file.write(json.dumps(feature, separators=(",", ":"), allow_nan=False))
        file.write("\n]}\n")


def _classes(spec: ModelSpec) -> list[dict[str, Any]]:
    colors = class_colors(spec.colors, len(spec.classes))
    return [{"name": name, "color": list(color)} for name, color in zip(spec.classes, colors, strict=True)]


def _id(fingerprint: str, spec: ModelSpec, *place: object) -> str:
    return str(uuid.uuid5(ID_NAMESPACE, " ".join([fingerprint, spec.name, *map(str, place)])))


def _detections(objects: Objects, spec: ModelSpec, fingerprint: str, bounds: Box | None) -> Iterator[dict[str, Any]]:
    corner = (0, 0) if bounds is None else (bounds.y, bounds.x)
    classes, rings = _classes(spec), objects.rings()
    for start in range(0, len(objects), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        # By way of text, as scores of tiles.
        scores = objects.scores[rows].astype(np.float32).astype(str).astype(np.float64).tolist()
        numbers, places = objects.classes[rows].tolist(), objects.centres[rows].tolist()
        centres, outlines = (objects.centres[rows] - corner)[:, ::-1].tolist(), (rings[rows] - corner)[..., ::-1].tolist()
        for place, number, score, centre, ring in zip(places, numbers, scores, centres, outlines, strict=True):
            geometry = {"type": "Polygon", "coordinates": [ring]} if ring else {"type": "Point", "coordinates": centre}
            yield {
                "type": "Feature",
                "id": _id(fingerprint, spec, number, *place),
                "geometry": geometry,
                "properties": {
                    "objectType": "detection",
                    "classification": classes[number],
                    "measurements": {"score": score},
                },
            }


def _tiles(table: TileTable, spec: ModelSpec, fingerprint: str, bounds: Box | None) -> Iterator[dict[str, Any]]:
    dy, dx = (0, 0) if bounds is None else (bounds.y, bounds.x)
    classes = _classes(spec)
    for start in range(0, len(table), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        places = np.stack([table.minx[rows], table.miny[rows], table.width[rows], table.height[rows]], axis=1).tolist()
        # By way of text, which is a float32's shortest form: 0.7, not 0.699999988079071.
        scores = table.scores[rows].astype(str).astype(np.float64).tolist()
        chosen = classify(table.scores[rows], spec).tolist()
        for (x, y, width, height), values, index in zip(places, scores, chosen, strict=True):
            properties: dict[str, Any] = {
                "objectType": "tile",
                "measurements": {name: value for name, value in zip(table.columns, values, strict=True) if value == value},
            }
            if index >= 0:
                properties["classification"] = classes[index]
            x0, y0, x1, y1 = x - dx, y - dy, x - dx + width, y - dy + height
            yield {
                "type": "Feature",
                "id": _id(fingerprint, spec, x, y),
                "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
                "properties": properties,
            }


def classify(scores: NDArray[np.float32], spec: ModelSpec) -> NDArray[np.int64]:
    """(n,) index of the class that each row of (n, C) scores speaks for, -1 for none; the first of equally likely ones."""
    if spec.scores == "probability" and len(spec.classes) > 1:
        likeliest = np.argmax(np.where(np.isnan(scores), -np.inf, scores), axis=1)
        return np.where(np.isnan(scores).all(axis=1), -1, likeliest)
    present = scores >= np.array(spec.threshold, np.float32)  # NaN is not
    return np.where(present.sum(axis=1) == 1, np.argmax(present, axis=1), -1)
