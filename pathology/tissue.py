"""Where tissue lies on a slide: found once at low resolution, asked for as coverage of tiles, shown as polygons and picture.

Promise: the same slide gives the same mask, and a tile's coverage is exact for that mask, fractional pixels included.
"""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pathology.components import drop_small, fill_holes
from pathology.errors import UsageError
from pathology.geometry import Box
from pathology.outline import Ring
from pathology.resample import level_for
from pathology.slide import Slide, SlideInfo
from pathology.thumbnail import INK, fit_text, font, picture, png_bytes, reduced_blocks, reduced_shape

# Mask pixels are about PIXEL_UM wide whatever levels the slide has: nuclei blur away, glands and cores don't. A level is
# used as it is up to COARSEST_UM, a finer one reduced by the whole factor that comes nearest: 5.3 to 11.3 um in all.
PIXEL_UM = 8.0
COARSEST_UM = 11.3
# A slide too large for that has a coarser mask: 64 Mpx hold 65 x 65 mm at 8 um.
MAX_MASK_PX = 2**26

# Saturation is (max - min) / max of RGB. Below this brightness the ratio is mostly noise, so the divisor stops falling:
# black ink, air bubbles' rims and scan edges come out unsaturated and are no tissue; dark stain is coloured and stays.
DARK = 96
# Otsu's threshold is kept in a range where it can be trusted. Below LEAST (bare glass, its tint, JPEG noise) nothing is
# tissue, so a slide of glass alone has none; above SURE everything is, so a field full of tissue isn't cut into pale and dark.
LEAST_SATURATION = 0.05
SURE_SATURATION = 0.12
# Rows whose medians are found at once: what that takes stays in the processor's caches.
MEDIAN_ROWS = 64

# Pieces of tissue smaller than this are dust; of a field so small that it would hold no more than ten of them, a tenth.
MIN_OBJECT_UM2 = 10_000.0
# Holes smaller than this (vessels, gland lumens, single fat cells) belong to the tissue.
MIN_HOLE_UM2 = 50_000.0

PICTURE_PX = 1024
SMALL_PICTURE_PX = 512
OUTLINE_COLOR = (0, 150, 80)

# Namespace of the ids of tissue polygons; any fixed uuid will do.
ID_NAMESPACE = uuid.UUID("0d3f9a52-7c1e-5b7a-9b63-2f1f4f0c8e11")

# Coverage below this is a rounding error of coordinates, not tissue: a tile with it would be inferred for nothing.
LEAST_COVERAGE = 1e-9


METHODS = ("otsu", "none")

Whole = NDArray[np.int64]
Outline = list[tuple[Ring, ...]]  # `polygons` of a mask


@dataclass(frozen=True, slots=True, eq=False)
class TissueMask:
    """Tissue as pixels over the whole slide, from level 0's corner.

    mask       (h, w) bool, True where there is tissue
    l0_pixel   (height, width) of a mask pixel in level-0 px; the last row and column are cut or drawn out to the slide's edge
    slide_mpp  um per level-0 px
    l0_shape   (height, width) of the slide in level-0 px
    method     how it was found, for people
    """

    mask: NDArray[np.bool_]
    l0_pixel: tuple[float, float]
    slide_mpp: float
    l0_shape: tuple[int, int]
    method: str = "given"

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != np.bool_ or 0 in self.mask.shape:
            raise UsageError(
                f"tissue mask {self.mask.shape} of {self.mask.dtype}: give a (h, w) bool array with at least one pixel"
            )
        if not min(self.l0_pixel) > 0 or not self.slide_mpp > 0:
            raise UsageError(f"tissue mask pixel {self.l0_pixel} level-0 px at {self.slide_mpp} um/px: both must be above 0")
        for pixels, pixel, extent in zip(self.mask.shape, self.l0_pixel, self.l0_shape, strict=True):
            if abs(pixels * pixel - extent) > max(2 * pixel, 0.02 * extent):
                raise UsageError(
                    f"tissue mask of {pixels} px, {pixel:g} level-0 px each, does not fit the slide's {extent} px; "
                    "it must cover the whole slide from its corner"
                )

    def l0_edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(h + 1,) and (w + 1,) level-0 y and x of the mask pixels' edges, from 0 to the slide's edge."""
        return (
            _edges(self.mask.shape[0], self.l0_pixel[0], self.l0_shape[0]),
            _edges(self.mask.shape[1], self.l0_pixel[1], self.l0_shape[1]),
        )

    @property
    def area_mm2(self) -> float:
        """Area of the tissue on the slide."""
        heights, widths = (np.diff(edges) for edges in self.l0_edges())
        return float(heights @ (self.mask @ widths)) * self.slide_mpp**2 / 1e6

    def coverage(self, l0_origins: NDArray[np.float64], l0_tile: float) -> NDArray[np.float64]:
        """(n,) float64 in 0..1: the share of tissue in the part of each tile that lies on the slide; 0 for tiles beside it.

        l0_origins  (n, 2) level-0 y, x of the tiles' outer corners
        l0_tile     side of a tile in level-0 px

        Exact for a mask of whole pixels: the integral of the mask is linear in y and x inside a pixel, so interpolating
        it loses nothing. Whole pixels are counted in integers, so that a tile without tissue has exactly 0.
        """
        tops, bottoms, tall = _span(l0_origins[:, 0], l0_tile, self.l0_pixel[0], self.l0_shape[0])
        lefts, rights, wide = _span(l0_origins[:, 1], l0_tile, self.l0_pixel[1], self.l0_shape[1])
        sums = _summed(self.mask, (tall, wide))
        (y0, fy0), (y1, fy1), (x0, fx0), (x1, fx1) = (_split(edge) for edge in (tops, bottoms, lefts, rights))

        def count(ya: Whole, yb: Whole, xa: Whole, xb: Whole) -> NDArray[np.signedinteger]:
            pixels: NDArray[np.signedinteger] = sums[yb, xb] - sums[ya, xb] - sums[yb, xa] + sums[ya, xa]
            return pixels

        tissue = (
            count(y0, y1, x0, x1)
            + fy1 * count(y1, y1 + 1, x0, x1)
            - fy0 * count(y0, y0 + 1, x0, x1)
            + fx1 * count(y0, y1, x1, x1 + 1)
            - fx0 * count(y0, y1, x0, x0 + 1)
            + fy1 * (fx1 * count(y1, y1 + 1, x1, x1 + 1) - fx0 * count(y1, y1 + 1, x0, x0 + 1))
            - fy0 * (fx1 * count(y0, y0 + 1, x1, x1 + 1) - fx0 * count(y0, y0 + 1, x0, x0 + 1))
        )
        area: NDArray[np.float64] = (bottoms - tops) * (rights - lefts)
        share: NDArray[np.float64] = np.divide(tissue, area, out=np.zeros(len(l0_origins)), where=area > 0)
        share[share < LEAST_COVERAGE] = 0.0
        np.minimum(share, 1.0, out=share)
        return share


def _edges(pixels: int, pixel: float, extent: int) -> NDArray[np.float64]:
    edges: NDArray[np.float64] = np.minimum(np.arange(pixels + 1) * pixel, float(extent))
    edges[-1] = extent
    return edges


def _span(
    l0_start: NDArray[np.float64], l0_tile: float, pixel: float, extent: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Both ends of tiles along one axis in mask px, cut to the slide, and how many mask px the slide is long."""
    start = np.clip(l0_start, 0, extent) / pixel
    end = np.clip(l0_start + l0_tile, 0, extent) / pixel
    return start, end, max(1, math.ceil(extent / pixel))


def _split(edge: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    whole = np.floor(edge).astype(np.int64)
    return whole, edge - whole


def _summed(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.signedinteger]:
    """(H + 2, W + 2): tissue pixels above and left of each corner of the mask, drawn out or cut to `shape`.

    The row and column after the last corner repeat it, so that the pixel right of the last corner is empty, not missing.
    """
    grown = [(0, max(0, wanted - size)) for wanted, size in zip(shape, mask.shape, strict=True)]
    fitted = np.pad(mask, grown, mode="edge")[: shape[0], : shape[1]]
    sums = np.zeros((shape[0] + 2, shape[1] + 2), np.int32 if fitted.size < 2**31 else np.int64)
    inner = sums[1:-1, 1:-1]
    np.cumsum(fitted, axis=0, out=inner)
    np.cumsum(inner, axis=1, out=inner)
    sums[-1], sums[:, -1] = sums[-2], sums[:, -2]
    sums[-1, -1] = sums[-2, -2]
    return sums


def find_tissue(slide: Slide, method: str = "otsu") -> TissueMask:
    """The slide's tissue, at about 8 um per mask pixel.

    "otsu"  coloured parts: Otsu's threshold (IEEE Trans. SMC 9, 1979) on the smoothed saturation of the parts with data,
            small pieces dropped and small holes filled. Coloured ink counts as tissue; black ink, grey slides,
            fluorescence and the palest stroma of immunostains don't: use "none" where that matters.
    "none"  everything that has data.

    Parts that cannot be decoded here count as tissue, lest a corrupt tile pass for glass: they are planned, and if they
    cannot be decoded for the model either, found and listed.

    Raises UsageError for another method, SlideError where pixels can't be read.
    """
    if method not in METHODS:
        raise UsageError(f"tissue method {method!r} is unknown; use otsu or none")
    info = slide.info
    level, factor = _working_level(info)
    shape = reduced_shape(info, level, factor)
    saturation, valid = np.zeros(shape, np.uint8), np.zeros(shape, bool)
    corrupt: list[Box] = []
    for box, rgb, has_data in reduced_blocks(slide, level, factor, corrupt):
        saturation[box.slices()] = np.where(has_data, _saturation(rgb), 0)
        valid[box.slices()] = has_data
    l0_pixel = info.level_downsamples[level] * factor
    mask = _coloured(saturation, valid, l0_pixel * info.mpp) if method == "otsu" else valid
    for box in corrupt:
        mask[box.y // factor : -(-box.y1 // factor), box.x // factor : -(-box.x1 // factor)] = True
    return TissueMask(mask, (l0_pixel, l0_pixel), info.mpp, info.shape, method)


def _working_level(info: SlideInfo) -> tuple[int, int]:
    """The level to read and the whole factor to reduce it by."""
    level = level_for(info.level_downsamples, COARSEST_UM / info.mpp)
    factor = max(1, round(PIXEL_UM / (info.level_downsamples[level] * info.mpp)))
    return level, max(factor, math.ceil(math.sqrt(math.prod(info.level_shapes[level]) / MAX_MASK_PX)))


def _saturation(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8, 255 for pure colours. Channel by channel: along an axis of three numpy is ten times slower."""
    red, green, blue = (rgb[..., channel] for channel in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    spread = (brightest - np.minimum(np.minimum(red, green), blue)).astype(np.uint16) * 255
    return np.asarray(spread // np.maximum(brightest, DARK), np.uint8)


def _coloured(saturation: NDArray[np.uint8], valid: NDArray[np.bool_], pixel_um: float) -> NDArray[np.bool_]:
    smooth = median(saturation)
    threshold = otsu_threshold(np.bincount(smooth[valid], minlength=256))
    threshold = min(max(threshold, round(LEAST_SATURATION * 255)), round(SURE_SATURATION * 255))
    pixel_um2 = pixel_um**2
    min_object_um2 = min(MIN_OBJECT_UM2, valid.size * pixel_um2 / 10)
    mask = drop_small((smooth > threshold) & valid, min_object_um2 / pixel_um2)
    return fill_holes(mask, MIN_HOLE_UM2 / pixel_um2) & valid


def median(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8: the median of each pixel's 3 x 3 neighbourhood, the image's edge repeated beyond it.

    Of the three columns of a neighbourhood, each in order: the median of the largest of their smallest, the median of their
    medians and the smallest of their largest (Paeth, Graphics Gems, 1990). Pillow's takes many times as long.
    """
    grown, found = np.pad(image, 1, mode="edge"), np.empty_like(image)
    for first in range(0, len(image), MEDIAN_ROWS):
        band = grown[first : first + MEDIAN_ROWS + 2]
        low, middle, high = _in_order(band[:-2], band[1:-1], band[2:])
        highest_low = np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
        lowest_high = np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
        _, medians, _ = _in_order(middle[:, :-2], middle[:, 1:-1], middle[:, 2:])
        found[first : first + MEDIAN_ROWS] = _in_order(highest_low, medians, lowest_high)[1]
    return found


def _in_order(
    a: NDArray[np.uint8], b: NDArray[np.uint8], c: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """The smallest, the middle and the largest of three arrays, pixel by pixel."""
    smaller, larger = np.minimum(a, b), np.maximum(a, b)
    return np.minimum(smaller, c), np.maximum(smaller, np.minimum(larger, c)), np.maximum(larger, c)


def otsu_threshold(histogram: NDArray[np.int64]) -> int:
    """The bin that best ends the lower class: greatest variance between `<= bin` and `> bin`; 0 if there is one class."""
    weights = np.cumsum(histogram, dtype=np.float64)
    sums = np.cumsum(histogram * np.arange(len(histogram)), dtype=np.float64)
    total, mass = weights[-1], sums[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        between = (mass * weights - total * sums) ** 2 / (weights * (total - weights))
    return int(np.argmax(np.nan_to_num(between, nan=0.0, posinf=0.0)))


def tissue_geojson(tissue: TissueMask, outline: Outline, fingerprint: str, bounds: Box | None = None) -> bytes:
    """A GeoJSON FeatureCollection of tissue polygons with holes in level-0 px, which QuPath reads as annotations.

    fingerprint  of the slide: ids are made of it and of the polygon's place, so that importing twice changes nothing
    bounds       part of level 0 that the reader of this file shows; coordinates count from its corner. QuPath crops slides
                 to `SlideInfo.bounds`; without it coordinates count from level 0's corner.
    """
    l0_y, l0_x = tissue.l0_edges()
    dy, dx = (0, 0) if bounds is None else (bounds.y, bounds.x)
    features: list[dict[str, Any]] = []
    for polygon in outline:
        top, left = min(polygon[0].tolist())  # of the component's first pixel: no other component has it
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(ID_NAMESPACE, f"{fingerprint} tissue {float(l0_y[top])!r} {float(l0_x[left])!r}")),
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [
                        [[_number(l0_x[x] - dx), _number(l0_y[y] - dy)] for y, x in [*ring.tolist(), ring[0].tolist()]]
                        for ring in polygon
                    ],
                },
                "properties": {"objectType": "annotation", "classification": {"name": "Tissue", "color": list(OUTLINE_COLOR)}},
            }
        )
    collection = {
        "type": "FeatureCollection",
        "tissue_mm2": round(tissue.area_mm2, 6),
        "tissue_method": tissue.method,
        "features": features,
    }
    return json.dumps(collection, separators=(",", ":"), allow_nan=False).encode()


def _number(value: float) -> int | float:
    """Coordinates to a ten-thousandth of a pixel, whole ones without a fraction: a third of the bytes."""
    rounded = round(float(value), 4)
    return int(rounded) if rounded.is_integer() else rounded


def tissue_png(slide: Slide, tissue: TissueMask, outline: Outline) -> bytes:
    """A PNG of the slide, at most 1024 px a side, with the tissue's outline drawn in and its area written below."""
    image = picture(slide, SMALL_PICTURE_PX, PICTURE_PX)
    draw = ImageDraw.Draw(image)
    l0_y, l0_x = tissue.l0_edges()
    ys, xs = l0_y * (image.height / tissue.l0_shape[0]), l0_x * (image.width / tissue.l0_shape[1])
    for ring in chain.from_iterable(outline):
        closed = np.append(ring, ring[:1], axis=0)
        draw.line([(float(xs[x]), float(ys[y])) for y, x in closed], fill=OUTLINE_COLOR, width=2)
    face = font(15)
    page = Image.new("RGB", (max(image.width, 240), image.height + 26), "white")
    page.paste(image, ((page.width - image.width) // 2, 0))
    caption = f"tissue: {tissue.method}, {tissue.area_mm2:.{1 if tissue.area_mm2 >= 1 else 3}f} mm2"
    ImageDraw.Draw(page).text((6, image.height + 4), fit_text(caption, face, page.width - 12), INK, face)
    return png_bytes(page)
