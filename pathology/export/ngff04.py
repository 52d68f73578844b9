"""A heatmap as OME-Zarr 0.4 (Zarr v2), which QuPath and Fiji open. Promise: the numbers that are stored, chunk by chunk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numcodecs
import zarr
from zarr.storage import LocalStore

from pathology.durable import output_faults
from pathology.geometry import Box
from pathology.labels import LABELS_NAME
from pathology.result import Heatmap

NAME = "heatmap-0.4.ome.zarr"
VERSION = "0.4"
# Zlib needs nothing that Java programs lack.
ZLIB_LEVEL = 5


def write_ngff04(path: Path, heatmap: Heatmap) -> None:
    """Write a copy of `heatmap` at `path`, replacing what lies there: its pyramid, its channels, its label image.

    Scores keep their dtype: bytes are shown by the window that is written, float32 has NaN where nothing was predicted.
    """
    temporary = path.with_name(path.name + ".tmp")
    with output_faults(path):
        shutil.rmtree(temporary, ignore_errors=True)
        _write_image(temporary, heatmap.path, heatmap.arrays)
        if heatmap.label_arrays:
            (temporary / "labels").mkdir()
            (temporary / "labels" / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
            (temporary / "labels" / ".zattrs").write_text(json.dumps({"labels": [LABELS_NAME]}))
            labels = Path("labels") / LABELS_NAME
            _write_image(temporary / labels, heatmap.path / labels, heatmap.label_arrays)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)


def _write_image(path: Path, source: Path, arrays: tuple[zarr.Array[Any], ...]) -> None:
    """A multiscale image: the attributes of the one at `source` as 0.4 has them, and the pixels of its levels."""
    ome = json.loads((source / "zarr.json").read_bytes())["attributes"]["ome"]
    attributes = {name: value for name, value in ome.items() if name != "version"}
    attributes["multiscales"] = [{**image, "version": VERSION} for image in ome["multiscales"]]
    if "image-label" in attributes:
        attributes["image-label"] = {**attributes["image-label"], "version": VERSION}
    group = zarr.create_group(LocalStore(path), zarr_format=2, attributes=attributes)
    for level, array in enumerate(arrays):
        copy = group.create_array(
            str(level),
            shape=array.shape,
            chunks=array.chunks,
            dtype=array.dtype,
            fill_value=array.fill_value,
            compressors=numcodecs.Zlib(ZLIB_LEVEL),
            chunk_key_encoding={"name": "v2", "separator": "/"},
            config={"write_empty_chunks": False},
        )
        height, width = array.shape[-2:]
        rows, columns = (array.shards or array.chunks)[-2:]
        for y in range(0, height, rows):
            for x in range(0, width, columns):
                at = Box(y, x, rows, columns).intersect(Box(0, 0, height, width)).slices()
                copy[..., *at] = array[..., *at]
