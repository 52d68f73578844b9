"""A slide's stains: fitted once, from an even sample of its tissue, and the numbers by which a device makes use of them.

Promise: they follow from the slide and its tissue alone, whatever tiles and regions are inferred; and what is recorded is what
was used, to the last digit.

Source: M. Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009. Optical density of a
pixel is a sum of two stains, so pixels lie in a plane, between the directions of pure haematoxylin and pure eosin: the plane is
that of the two largest eigenvectors of the pixels' second moments, the directions are the 1st and 99th percentile of angles.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.model import StainInput
from pathology.slide import Slide
from pathology.tissue import TissueMask

# Of the sample and the fit; part of a result's key, because it decides values.
VERSION = 1

# The sample: squares at one resolution, whatever the model's. Nuclei are some pixels wide there; 64 squares hold 0.6 mm2.
SAMPLE_MPP = 1.0
SQUARE_PX = 96
SQUARES = 64
SQUARE_TISSUE = 0.5  # share of a square that should be tissue

# Glass is bright and without colour, less than the palest eosin. Its mean, within sane limits, is where optical density counts
# from; pure white is not counted, as scanners write it where they did not look.
GLASS_BRIGHTNESS, GLASS_SATURATION = 0.83, 0.05
LEAST_GLASS_PX = 100
DARKEST_GLASS, BRIGHTEST_GLASS, USUAL_GLASS = 200.0, 255.0, 240.0

# Macenko's beta: a pixel less dense than this says nothing of a stain's direction.
STAINED = 0.15
PERCENTILES = (1.0, 99.0)
LEAST_STAINED_PX = 1000
# Closer directions are one stain and its noise: separating them would blow the noise up. In H&E: 20 to 40 degrees.
LEAST_ANGLE = 5.0

# By which fitted directions are told apart (Ruifrok and Johnston 2001).
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)

# Macenko's reference slide, to which colours are normalised: glass, directions, and the 99th percentile of amounts. The amounts
# are published for the natural logarithm.
TARGET_WHITE = 240.0
TARGET_HAEMATOXYLIN, TARGET_EOSIN = (0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)
TARGET_AMOUNTS = (1.9705 / float(np.log(10)), 1.0308 / float(np.log(10)))

DIGITS = 6
# Parameters of a tile: log10 of the glass, a 3 x 3 matrix (density of red, green, blue to channel), an offset for each channel.
PARAMETERS = 13

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Stains:
    """What was found of a slide's stains. Densities are log10(white / value), amounts multiples of unit vectors.

    white        grey level of glass
    haematoxylin, eosin   their unit vectors of optical density in red, green and blue
    low, high    1st and 99th percentile over tissue of: amount of eosin, of haematoxylin, mean density of the three colours
    pixels       of tissue in the sample
    reference    why these are a reference slide's and not the slide's own; "" where they are its own
    """

    white: float
    haematoxylin: Colour
    eosin: Colour
    low: Colour
    high: Colour
    pixels: int = 0
    reference: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def fit_stains(slide: Slide, tissue: TissueMask) -> Stains:
    """The stains of a slide, from squares spread evenly over its tissue. SlideError where its pixels cannot be read."""
    return stains_of(*sample(slide, tissue))


def sample(slide: Slide, tissue: TissueMask) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(n, 3) uint8 pixels of at most SQUARES squares, and (n,) which of them are tissue. What cannot be decoded is left out."""
    grid = TileGrid(slide.info.shape, slide.info.mpp, SAMPLE_MPP, SQUARE_PX, SQUARE_PX)
    rows, cols = grid.shape
    squares = grid.tiles(Box(0, 0, rows * SQUARE_PX, cols * SQUARE_PX))
    origins = grid.l0_origins(squares)
    coverage = tissue.coverage(origins, grid.l0_tile)
    chosen = np.flatnonzero(coverage >= SQUARE_TISSUE)
    if not len(chosen):
        chosen = np.flatnonzero(coverage > 0)
    count = min(SQUARES, len(chosen))
    pixels, inside = [np.empty((0, 3), np.uint8)], [np.empty(0, np.bool_)]
    for y, x in origins[chosen[np.arange(count) * len(chosen) // max(1, count)]].tolist():
        try:
            square = slide.read_tile((y, x), (grid.l0_tile, grid.l0_tile), (SQUARE_PX, SQUARE_PX))
        except SlideError as error:
            if error.reason is not Reason.CORRUPT_TILES:
                raise
            continue
        pixels.append(square.reshape(-1, 3))
        inside.append(_inside(tissue, y, x, grid.ratio).ravel())
    return np.concatenate(pixels), np.concatenate(inside)


def stains_of(rgb: NDArray[np.uint8], inside: NDArray[np.bool_]) -> Stains:
    """The stains of (n, 3) uint8 pixels, of which those `inside` (n,) are tissue; a reference's where they cannot be fitted."""
    white = _white(rgb)
    density = optical_density(rgb[inside], white)
    count = len(density)
    first, second = _plane(density)
    along, across = _dot(density, first), _dot(density, second)
    angles = np.arctan2(across, along)[np.hypot(along, across) > STAINED]
    if len(angles) < LEAST_STAINED_PX:
        return _reference(white, count, f"only {len(angles)} stained pixels in the sample, {LEAST_STAINED_PX} are needed")
    ends = np.percentile(angles, PERCENTILES)
    if (apart := float(np.degrees(ends[1] - ends[0]))) < LEAST_ANGLE:
        return _reference(white, count, f"one stain: its colours lie {apart:.1f} degrees apart, {LEAST_ANGLE:g} are needed")
    a, b = (np.cos(end) * first + np.sin(end) * second for end in ends)
    if _likeness(a, b) < _likeness(b, a):
        a, b = b, a
    haematoxylin, eosin = _colour(a), _colour(b)
    amounts = separating(haematoxylin, eosin)
    channels = (_dot(density, amounts[1]), _dot(density, amounts[0]), density.sum(axis=1) / 3)
    low, high = np.array([np.percentile(channel, PERCENTILES) for channel in channels]).T
    if float(np.minimum(high, high - low).min()) < 10**-DIGITS:
        return _reference(white, count, "one colour: the amount of a stain does not vary")
    return Stains(white, haematoxylin, eosin, _colour(low), _colour(high), count)


def optical_density(rgb: NDArray[np.uint8], white: float) -> NDArray[np.float64]:
    """log10(white / value) of each grey level, at least 0; 0 counts as 1."""
    table: NDArray[np.float64] = np.maximum(0.0, np.log10(white) - log_levels())
    return table[rgb]


def log_levels() -> NDArray[np.float64]:
    """(256,) log10 of each grey level, 0 counting as 1."""
    levels: NDArray[np.float64] = np.log10(np.maximum(np.arange(256, dtype=np.float64), 1.0))
    return levels


def separating(haematoxylin: Colour, eosin: Colour) -> NDArray[np.float64]:
    """(2, 3): what the densities of red, green and blue add to the amounts of haematoxylin and eosin, by least squares."""
    h, e = np.array(haematoxylin), np.array(eosin)
    hh, he, ee = float((h * h).sum()), float((h * e).sum()), float((e * e).sum())
    return np.stack([ee * h - he * e, hh * e - he * h]) / (hh * ee - he * he)


def parameters(kind: StainInput, stains: Stains) -> NDArray[np.float32]:
    """(PARAMETERS,) float32: what makes stained tiles of a slide's RGB.

    With the densities d of a pixel, channel c is sum(d * matrix[:, c]) + offset[c], and of that
    "eosin-haematoxylin-od"  255 times it, cut to 0..255: amounts of eosin and haematoxylin and mean density, where the 1st
                             percentile of the slide's tissue is 0 and the 99th is 255
    "macenko"                255 at most of exp(-it): red, green and blue of the reference slide
    """
    amounts = separating(stains.haematoxylin, stains.eosin)
    if kind == "macenko":
        strongest = (stains.high[1], stains.high[0])
        target = np.array([TARGET_HAEMATOXYLIN, TARGET_EOSIN])
        scale = np.array(TARGET_AMOUNTS) / np.array(strongest)
        matrix = _product(amounts.T * scale, target) * np.log(10)
        offset = np.full(3, -np.log(TARGET_WHITE))
    else:
        low, high = np.array(stains.low), np.array(stains.high)
        matrix = np.stack([amounts[1], amounts[0], np.full(3, 1 / 3)], axis=1) / (high - low)
        offset = -low / (high - low)
    return np.concatenate([[np.log10(stains.white)], matrix.ravel(), offset]).astype(np.float32)


def made_up_stains(kind: StainInput, count: int) -> NDArray[np.float32]:
    """(count, PARAMETERS) float32 of the reference slide, for tiles that are no slide's."""
    return np.tile(parameters(kind, _reference(USUAL_GLASS, 0, "made up")), (count, 1))


def _reference(white: float, pixels: int, why: str) -> Stains:
    strongest = (TARGET_AMOUNTS[1], TARGET_AMOUNTS[0])
    densest = (TARGET_AMOUNTS[0] * sum(TARGET_HAEMATOXYLIN) + TARGET_AMOUNTS[1] * sum(TARGET_EOSIN)) / 3
    high = _colour(np.array([*strongest, densest]))
    return Stains(white, TARGET_HAEMATOXYLIN, TARGET_EOSIN, (0.0, 0.0, 0.0), high, pixels, why)


def _inside(tissue: TissueMask, y: float, x: float, ratio: float) -> NDArray[np.bool_]:
    """(SQUARE_PX, SQUARE_PX) bool: which pixels of the square at level-0 (y, x) have their centre in tissue."""
    centres = (np.arange(SQUARE_PX) + 0.5) * ratio
    rows, cols = (
        np.where(start + centres < extent, np.minimum((start + centres) // pixel, size - 1), -1).astype(np.int64)
        for start, extent, pixel, size in zip((y, x), tissue.l0_shape, tissue.l0_pixel, tissue.mask.shape, strict=True)
    )
    inside: NDArray[np.bool_] = tissue.mask[rows[:, None], cols[None, :]] & (rows >= 0)[:, None] & (cols >= 0)[None, :]
    return inside


def _white(rgb: NDArray[np.uint8]) -> float:
    brightest, darkest = rgb.max(axis=1), rgb.min(axis=1)
    spread = (brightest - darkest).astype(np.float64)
    glass = (brightest > GLASS_BRIGHTNESS * 255) & (spread < GLASS_SATURATION * brightest) & (darkest < 255)
    if int(glass.sum()) < LEAST_GLASS_PX:
        return USUAL_GLASS
    return round(min(max(float(rgb[glass].mean(dtype=np.float64)), DARKEST_GLASS), BRIGHTEST_GLASS), DIGITS)


def _plane(density: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two directions in which densities reach farthest. Sums without BLAS, whose bits depend on its threads."""
    moments = np.array([[float((density[:, i] * density[:, j]).sum()) for j in range(3)] for i in range(3)])
    vectors = np.linalg.eigh(moments)[1]
    first, second = vectors[:, 2], vectors[:, 1]
    return first * np.sign(first.sum() or 1.0), second * np.sign(second[np.abs(second).argmax()] or 1.0)


def _dot(densities: NDArray[np.float64], direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) densities along a direction, summed in one order on every machine."""
    along: NDArray[np.float64] = densities[:, 0] * direction[0]
    along += densities[:, 1] * direction[1]
    along += densities[:, 2] * direction[2]
    return along


def _product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = (a[:, :, None] * b[None]).sum(axis=1)
    return product


def _likeness(haematoxylin: NDArray[np.float64], eosin: NDArray[np.float64]) -> float:
    """How well two unit vectors fit the stains they are taken for."""
    pairs = ((haematoxylin, HAEMATOXYLIN), (eosin, EOSIN))
    return sum(float((found * np.array(known)).sum()) / float(np.sqrt((np.array(known) ** 2).sum())) for found, known in pairs)


def _colour(values: NDArray[np.float64]) -> Colour:
    red, green, blue = (round(float(value), DIGITS) + 0.0 for value in values)  # + 0.0: no minus before zero
    return red, green, blue
