"""The three validators of OME-Zarr 0.5 that a store must pass, all offline."""

from __future__ import annotations

import json
from pathlib import Path

import ngff_zarr
import ome_zarr_models.v05
import yaozarrs
import zarr
from ngff_zarr.structural_validation import validate_structural
from ngff_zarr.validate import validate


def assert_valid(path: Path) -> int:
    """Raise unless ome-zarr-models, yaozarrs and ngff-zarr (schema, strict, and structure) accept `path`; its levels."""
    image = ome_zarr_models.v05.image.Image.from_zarr(zarr.open_group(path, mode="r"))
    yaozarrs.validate_zarr_store(path)
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    validate(attributes, version="0.5", model="image", strict=True)
    validate_structural(ngff_zarr.from_ngff_zarr(path, validate=True).metadata, version="0.5")
    return len(image.datasets[0])
