"""Areas drawn or computed elsewhere: mask pictures, GeoJSON and results of other models, as masks over a slide.

Promise: a mask pixel is inside a polygon if its centre is, by the even-odd rule, holes and overlapping rings included; a file
that does not belong to the slide is refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathology.errors import Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.slide import SlideInfo
from pathology.tissue import COARSEST_UM, MAX_MASK_PX, PIXEL_UM, TissueMask

GEOJSON = {".geojson", ".json"}
SHAPE_TOLERANCE = 0.02  # by which height over width of a mask may differ from the slide's: thumbnails are rounded
MOST_BYTES = 2**28
MANIFEST = "manifest.json"  # of a result's folder

Ring = NDArray[np.float64]


def read_tissue(path: Path, info: SlideInfo) -> TissueMask:
    """The tissue that a file names: GeoJSON polygons, or a picture of the whole slide in which all but black is tissue; or that
    a folder holds, the result of a dense model for this slide.

    Raises SlideError (bad_mask) where it cannot be read or does not fit the slide.
    """
    if path.is_dir():
        return _predicted(path, info)
    if path.suffix.lower() in GEOJSON:
        pixel = max(PIXEL_UM / info.mpp, math.sqrt(math.prod(info.shape) / MAX_MASK_PX), 1.0)
        shape = tuple(math.ceil(side / pixel) for side in info.shape)
        mask = _drawn(path, info, (shape[0], shape[1]), (pixel, pixel))
        return TissueMask(mask, (pixel, pixel), info.mpp, info.shape, "file")
    mask = _picture(path)
    ratio = (mask.shape[0] / mask.shape[1]) / (info.shape[0] / info.shape[1])
    # A pixel more or less is what rounding makes of a small mask.
    if abs(ratio - 1) > max(SHAPE_TOLERANCE, 1.5 / min(mask.shape)):
        raise SlideError(
            Reason.BAD_MASK,
            f"mask {path.name} is {mask.shape[1]} x {mask.shape[0]} px, the slide {info.shape[1]} x {info.shape[0]}: "
            "a mask shows the whole slide; give the one that belongs to it",
        )
    pixel_px = info.shape[0] / mask.shape[0], info.shape[1] / mask.shape[1]
    return TissueMask(mask, pixel_px, info.mpp, info.shape, "file")


def within(tissue: TissueMask, roi: Path, info: SlideInfo) -> TissueMask:
    """The part of `tissue` inside the polygons of the GeoJSON file `roi`. SlideError (bad_mask) where it cannot be read."""
    inside = _drawn(roi, info, tissue.mask.shape, tissue.l0_pixel)
    return TissueMask(tissue.mask & inside, tissue.l0_pixel, info.mpp, info.shape, f"{tissue.method}, roi")


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes, of a result's folder that of its manifest, looked at again only when it has changed.

    SlideError (bad_mask) where it cannot be read.
    """
    path = path / MANIFEST if path.is_dir() else path
    state = _state(path)
    return _sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, *state: int) -> str:
    return hashlib.sha256(_bytes(path)).hexdigest()


def fill(shape: tuple[int, int], rings: Sequence[Ring]) -> NDArray[np.bool_]:
    """(h, w) bool: pixels whose centre lies inside an odd number of `rings` ((n, 2) y, x in pixels, from the outer corner).

    Along each row every edge that it crosses turns inside into outside, so that what is inside is the sum of crossings to the
    left, modulo two.
    """
    turns = np.zeros((shape[0], shape[1] + 1), np.uint8)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        upper = np.where(start[:, :1] <= end[:, :1], start, end)
        lower = np.where(start[:, :1] <= end[:, :1], end, start)
        # Rows whose centre lies in [upper, lower): a corner between two edges is counted once, a horizontal edge never.
        first = np.clip(np.ceil(upper[:, 0] - 0.5), 0, shape[0]).astype(np.int64)
        last = np.clip(np.ceil(lower[:, 0] - 0.5), 0, shape[0]).astype(np.int64)
        count = last - first
        edge = np.repeat(np.arange(len(ring)), count)
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        slope = (lower[edge, 1] - upper[edge, 1]) / (lower[edge, 0] - upper[edge, 0])
        x = upper[edge, 1] + (rows + 0.5 - upper[edge, 0]) * slope
        np.bitwise_xor.at(turns, (rows, np.clip(np.ceil(x - 0.5), 0, shape[1]).astype(np.int64)), 1)
    inside: NDArray[np.bool_] = np.bitwise_xor.accumulate(turns, axis=1)[:, :-1].astype(bool)
    return inside


def tissue_class(spec: ModelSpec) -> int:
    """Which of a model's classes is tissue: the only one, or the one called so. UsageError where there is none."""
    names = [name.casefold() for name in spec.classes]
    if spec.output != "map" or (len(names) > 1 and "tissue" not in names):
        raise UsageError(
            f"model {spec.name} finds no tissue: it answers {spec.output} of {', '.join(names) or 'no class'}; "
            "use one that answers a map with one class, or with one called tissue"
        )
    return names.index("tissue") if len(names) > 1 else 0


def _predicted(folder: Path, info: SlideInfo) -> TissueMask:
    """Where a result's class of tissue reaches its threshold, on the coarsest level that shows it well enough."""
    from pathology.result import open_heatmap  # brings zarr

    try:
        heatmap = open_heatmap(folder)
        number = tissue_class(heatmap.spec)
    except UsageError as error:
        raise _bad(folder, str(error)) from error
    if heatmap.meta.fingerprint != info.fingerprint:
        raise _bad(folder, "it is the result of another slide")
    levels = range(len(heatmap.arrays))
    level = max((k for k in levels if heatmap.level_frame(k).mpp <= COARSEST_UM), default=0)
    frame = heatmap.level_frame(level)
    scores = heatmap.read(level, Box(0, 0, *frame.shape))[number]
    mask = scores >= np.float32(heatmap.spec.threshold[number])
    return TissueMask(mask, (frame.l0_pixel, frame.l0_pixel), info.mpp, info.shape, f"model {heatmap.spec.name}")


def _drawn(path: Path, info: SlideInfo, shape: tuple[int, int], l0_pixel: tuple[float, float]) -> NDArray[np.bool_]:
    """The polygons of a GeoJSON file as a mask of `shape` whose pixels are `l0_pixel` large."""
    mask = np.zeros(shape, bool)
    for rings in _polygons(path, info):
        pixels = [ring / l0_pixel for ring in rings]
        corner = np.clip(np.floor(np.min([r.min(axis=0) for r in pixels], axis=0)), 0, shape).astype(int)
        end = np.clip(np.ceil(np.max([r.max(axis=0) for r in pixels], axis=0)), 0, shape).astype(int)
        if (end > corner).all():
            part = mask[corner[0] : end[0], corner[1] : end[1]]
            part |= fill(part.shape, [ring - corner for ring in pixels])
    return mask


def _polygons(path: Path, info: SlideInfo) -> Iterator[list[Ring]]:
    """The rings, (n, 2) level-0 y, x, of each polygon in a GeoJSON file.

    QuPath counts from the corner of `SlideInfo.bounds`; the tissue files that a run writes count from level 0's.
    """
    content = _json(path)
    ours = isinstance(content, dict) and "tissue_mm2" in content
    corner = (0, 0) if ours or info.bounds is None else (info.bounds.y, info.bounds.x)
    geometries = list(_geometries(content))
    if not geometries:
        raise _bad(path, "it holds no polygon")
    for geometry in geometries:
        kind: Any = geometry.get("type")
        coordinates: Any = geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            raise _bad(path, f"it holds a {kind}, which has no area: export polygons")
        try:
            for polygon in [coordinates] if kind == "Polygon" else coordinates:
                rings = [np.array([(y, x) for x, y, *_ in ring], np.float64) + corner for ring in polygon]
                if not rings or not all(len(ring) >= 3 and np.isfinite(ring).all() for ring in rings):
                    raise ValueError("a ring needs three points")
                yield rings
        except (TypeError, ValueError, OverflowError) as error:
            raise _bad(path, f"a polygon is not understood ({error})") from error


def _geometries(content: Any) -> Iterator[dict[str, Any]]:
    """Geometries of a FeatureCollection, a list of features (older exports of QuPath), a feature, or a geometry."""
    if isinstance(content, list):
        for part in content:
            yield from _geometries(part)
    elif isinstance(content, dict):
        for name in ("features", "geometries", "geometry"):
            if name in content:
                yield from _geometries(content[name])
                return
        yield content


def _json(path: Path) -> Any:
    try:
        return json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"it is no GeoJSON ({error})") from error


def _picture(path: Path) -> NDArray[np.bool_]:
    _state(path)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "RGBA", "CMYK", "YCbCr") else image)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bad(path, f"it is no picture that can be read ({error})") from error
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0)


def _bytes(path: Path) -> bytes:
    _state(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _bad(path, f"it cannot be read ({error.strerror})") from error


def _state(path: Path) -> os.stat_result:
    """What the file system says of a file that can be read: no pipe, which would be waited for, and not too large."""
    try:
        state = path.stat()
    except FileNotFoundError as error:
        of_model = path.parent.parent.name == "slides"
        raise _bad(path, "this model was to find the tissue, and failed" if of_model else "there is no such file") from error
    except OSError as error:
        raise _bad(path, f"it cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(state.st_mode):
        raise _bad(path, "it is no file")
    if state.st_size > MOST_BYTES:
        raise _bad(path, f"it is larger than {MOST_BYTES >> 20} MiB")
    return state


def _bad(path: Path, why: str) -> SlideError:
    return SlideError(Reason.BAD_MASK, f"mask or region of interest {path.name}: {why}; correct it, or leave it out")
