"""From a finished result to the files other programs take. Promise: made from the result alone, without the slide."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pathology.errors import UsageError
from pathology.export import KINDS, can_export
from pathology.export.ngff04 import NAME as NGFF04
from pathology.export.ngff04 import write_ngff04
from pathology.export.png import heatmap_png
from pathology.export.qupath import write_qupath, write_qupath_objects
from pathology.export.table import read_objects, read_parquet, write_csv, write_objects_csv
from pathology.finish import read_record
from pathology.geometry import Box
from pathology.job import slug
from pathology.outputs.detections import DETECTIONS
from pathology.outputs.ended import TILES
from pathology.result import open_heatmap

# A picture of a dense map is made of the finest pyramid level that is no larger.
PICTURE_SIDE_PX = 8192


def export_result(folder: Path, kind: str) -> list[Path]:
    """Write `kind` beside the result in `folder`: "csv" tiles.csv, "qupath" tiles.geojson, "png" heatmap-<class>.png,
    "ngff-0.4" heatmap-0.4.ome.zarr.

    Of detections csv and qupath are detections.csv and detections.geojson. Returns the files written. Raises UsageError for
    another kind, and for one that the model's answers cannot be written as.
    """
    if kind not in KINDS:
        raise UsageError(f"export {kind!r} is unknown; use {', '.join(KINDS)}")
    record = read_record(folder)
    if record is None:
        raise UsageError(f"{folder} holds no finished result; give the --out folder of a run")
    if not can_export(record["output"], kind):
        what = "a dense map" if record["output"] == "map" else record["output"]
        others = ", ".join(other for other in KINDS if can_export(record["output"], other))
        raise UsageError(f"{folder} holds {what}, which cannot be written as {kind}; use {others}")
    if kind == "csv" and (folder / TILES).is_file():
        return [_replace(folder / "tiles.csv", lambda path: write_csv(path, read_parquet(folder / TILES)))]
    heatmap = open_heatmap(folder)
    bounds = None if record["bounds"] is None else Box(*record["bounds"])
    fingerprint = heatmap.meta.fingerprint
    if kind == "ngff-0.4":
        write_ngff04(folder / NGFF04, heatmap)
        return [folder / NGFF04]
    if kind == "png":
        fitting = [k for k in range(len(heatmap.arrays)) if max(heatmap.level_shape(k)) <= PICTURE_SIDE_PX]
        level = fitting[0] if fitting else len(heatmap.arrays) - 1
        scores = heatmap.read(level, Box(0, 0, *heatmap.level_shape(level)))
        names = [f"heatmap-{slug(name)}.png" for name in heatmap.classes]
        if len(set(names)) < len(names):
            names = [f"heatmap-{i}.png" for i in range(len(names))]
        pictures = [heatmap_png(one, heatmap.spec) for one in scores]
        return [_replace(folder / name, partial(_write, picture)) for name, picture in zip(names, pictures, strict=True)]
    if (folder / DETECTIONS).is_file():
        objects = read_objects(folder / DETECTIONS, heatmap.classes)
        if kind == "csv":
            return [_replace(folder / "detections.csv", lambda path: write_objects_csv(path, objects, heatmap.classes))]
        write = partial(write_qupath_objects, objects=objects, spec=heatmap.spec, fingerprint=fingerprint, bounds=bounds)
        return [_replace(folder / "detections.geojson", write)]
    table = read_parquet(folder / TILES)
    return [_replace(folder / "tiles.geojson", lambda path: write_qupath(path, table, heatmap.spec, fingerprint, bounds))]


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _replace(path: Path, write: Callable[[Path], object]) -> Path:
    """Write beside and rename, so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
    return path
