"""Synthetic H&E slides whose truth is known, for the demo, tests and benchmarks.

    python sample_data/generate.py OUT.svs --size 12000 --seed 1 --truth OUT.geojson

Promise: the planted region differs from the rest of the tissue in nothing but how many nuclei there are and how large they
are; the stains, the stroma, the shape and the staining of a single nucleus follow one law everywhere. Size and seed decide
every byte of the slide and of its truth (library versions given). Pixels are held a strip of 960 rows at a time.

The file is an Aperio-style SVS: tiled baseline JPEG, levels 1, 4 and 16, a thumbnail as second page. Coordinates are
continuous level-0 px, (0, 0) the outer corner of pixel 0, in (y, x) order inside this module and (x, y) in GeoJSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]

MPP = 0.5  # um per level-0 px: a 20x scan
TILE_PX = 240  # of every level, as in many Aperio scans
DOWNSAMPLES = (1, 4, 16)
BLOCK_PX = TILE_PX * 4  # rendered at once: one tile of the second level
COARSE_PX = 8  # smooth fields are computed this far apart and interpolated
MIN_SIZE_PX = 640

# Optical density (base 10) per unit of stain, RGB. Ruifrok and Johnston, Quantification of histochemical staining by color
# deconvolution, Anal Quant Cytol Histol 23:291-299 (2001): haematoxylin, eosin and their third vector (DAB). Pure eosin is
# magenta; a share of the third vector gives tissue its warmer pink.
HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
EOSIN = np.array([0.072, 0.990, 0.105])
THIRD = np.array([0.268, 0.570, 0.776])
THIRD_PER_EOSIN = 0.65
GLASS_RGB = np.array([243.0, 243.0, 244.0])

HAEMATOXYLIN_STEPS, HAEMATOXYLIN_MAX = 256, 1.4
EOSIN_STEPS, EOSIN_MAX = 512, 1.0
STROMA_EOSIN = 0.23
STROMA_HAEMATOXYLIN = 0.055
NUCLEUS_HAEMATOXYLIN = 0.90
NUCLEUS_EOSIN = 0.2  # at least this much eosin per haematoxylin: no bare nuclei where a cleft runs below

# Nuclei sit on a jittered lattice: at most one per site, so that they touch and overlap but never pile up.
SITE_PX = 27
SITE_JITTER = 0.36
SITE_ROWS = 64  # sites drawn at once
FILLED_SPARSE, FILLED_RANGE = 0.07, 0.38  # share of sites that hold a nucleus outside the region: smooth between these
FILLED_PLANTED, PLANTED_FALL = 0.98, 0.38  # at the planted region's middle, and how much less at its rim
DIAMETER_PX, PLANTED_DIAMETER_PX = 14.5, 21.5
DIAMETER_SPREAD = 0.11  # of the logarithm
DIAMETERS_PX = range(9, 31)
ELONGATIONS = np.array([1.08, 1.25, 1.5, 1.95])
ELONGATION_SHARES = np.array([0.3, 0.35, 0.22, 0.13])
ANGLES = 16
NUCLEUS_REACH_PX = 28  # no mask reaches farther from its centre

TEXTURE_PX = 1024  # period of the fibre texture, a power of two; a smooth warp hides that it repeats
QUALITY = 70


@dataclass(frozen=True)
class Blob:
    """A smooth irregular outline around `center` (y, x): radius(a) = radius * (1 + sum of wave_k cos(k a + phase_k))."""

    center: tuple[float, float]
    radius: float
    waves: Reals
    phases: Reals

    def radius_at(self, angle: Reals) -> Reals:
        total = np.ones_like(angle)
        for k, (wave, phase) in enumerate(zip(self.waves, self.phases, strict=True), start=2):
            total += wave * np.cos(k * angle + phase)
        return self.radius * total

    def depth(self, y: Reals, x: Reals) -> Reals:
        """How far points lie inside the outline along their radius, px; negative outside."""
        dy, dx = y - self.center[0], x - self.center[1]
        depth: Reals = self.radius_at(np.arctan2(dy, dx)) - np.hypot(dy, dx)
        return depth

    def outline(self, vertices: int) -> Reals:
        """(vertices, 2) y, x."""
        angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
        radius = self.radius_at(angle)
        return np.stack([self.center[0] + radius * np.sin(angle), self.center[1] + radius * np.cos(angle)], axis=1)


@dataclass(frozen=True)
class Field:
    """Smooth noise in 0..1 with features about `cell` px wide, defined at every point of the slide without storing it."""

    values: Reals
    cell: float

    def at(self, y: Reals, x: Reals) -> Reals:
        """Values at y, x (px, of broadcastable shapes)."""
        v, u = np.broadcast_arrays(y / self.cell + 1, x / self.cell + 1)
        i, j = np.floor(v).astype(np.intp), np.floor(u).astype(np.intp)
        fy, fx = _ease(v - i), _ease(u - j)
        top = self.values[i, j] * (1 - fx) + self.values[i, j + 1] * fx
        bottom = self.values[i + 1, j] * (1 - fx) + self.values[i + 1, j + 1] * fx
        value: Reals = top * (1 - fy) + bottom * fy
        return value


@dataclass(frozen=True)
class Layout:
    """What is where on one slide; everything but the nuclei.

    region  (n, 2) whole y, x: the planted polygon
    holes   (n, 3) y, x, radius: vessels and lumina, through which glass shows
    """

    size: int
    pieces: tuple[Blob, ...]
    region: NDArray[np.int64]
    holes: Reals
    density: Field
    eosin: Field
    edge: Field
    warp: tuple[Field, Field]

    def depth(self, y: Reals, x: Reals) -> Reals:
        """How deep points lie in tissue, px; negative on glass and in holes."""
        depth: Reals = np.maximum.reduce([piece.depth(y, x) for piece in self.pieces]) + 36 * (self.edge.at(y, x) - 0.5)
        low, high = (np.min(y), np.min(x)), (np.max(y), np.max(x))
        near = np.all((self.holes[:, :2] > low - self.holes[:, 2:]) & (self.holes[:, :2] < high + self.holes[:, 2:]), axis=1)
        for hole_y, hole_x, radius in self.holes[near]:
            depth = np.minimum(depth, np.hypot(y - hole_y, x - hole_x) - radius)
        return depth


@dataclass(frozen=True)
class Texture:
    """Stroma, period TEXTURE_PX: `eosin` relative to its mean, fibre `angle` (rad, from x towards y), scanner `noise`."""

    eosin: Floats
    angle: Floats
    noise: NDArray[np.uint8]


@dataclass(frozen=True)
class Truth:
    """What was drawn.

    size       side of the slide, px
    region     (n, 2) whole y, x: corners of the planted polygon
    nuclei     (n, 2) whole y, x: centres, by rising y
    area_um2   (n,) drawn area of each
    planted    (n,) bool: whether it belongs to the planted region
    """

    size: int
    region: NDArray[np.int64]
    nuclei: NDArray[np.int64]
    area_um2: Reals
    planted: NDArray[np.bool_]


@dataclass(frozen=True)
class Nuclei:
    """`truth` and how each nucleus looks: its mask in the bank and how dark it is."""

    truth: Truth
    mask: NDArray[np.intp]
    stain: Floats


def make_slide(path: Path, size: int, seed: int, quality: int = QUALITY) -> Truth:
    """Write a `size` x `size` px slide to `path` and return its truth."""
    if size < MIN_SIZE_PX:
        raise ValueError(f"size {size} px leaves no room for tissue; use {MIN_SIZE_PX} or more")
    layout = make_layout(size, seed)
    texture = make_texture(np.random.default_rng([seed, 1]))
    bank = make_bank(np.random.default_rng([seed, 2]))
    nuclei = place_nuclei(layout, texture, bank, np.random.default_rng([seed, 3]))
    pyramid = _Pyramid(layout, texture, bank, nuclei, quality)
    description = (
        f"Aperio Image Library style, synthetic slide, seed {seed}\r\n{size}x{size} [0,0 {size}x{size}] ({TILE_PX}x{TILE_PX}) "
        f"JPEG/YCC Q={quality}|AppMag = 20|MPP = {MPP:.4f}"
    )
    with tifffile.TiffWriter(path) as tiff:

        def write(
            segments: Iterable[bytes], shape: tuple[int, ...], text: str, tile: tuple[int, int] | None = (TILE_PX, TILE_PX)
        ) -> None:
            tiff.write(
                iter(segments),
                shape=shape,
                dtype=np.uint8,
                tile=tile,
                rowsperstrip=None if tile else shape[0],
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                description=text,
                metadata=None,
                software=False,
                subfiletype=0,
            )

        write(pyramid.base_tiles(), (size, size, 3), description)
        thumbnail = pyramid.thumbnail()
        height, width, _ = thumbnail.shape
        smaller = f"Aperio Image Library style, synthetic slide\r\n{size}x{size} -> "
        write([_encode(thumbnail, quality)], thumbnail.shape, f"{smaller}{width}x{height} - |MPP = {MPP:.4f}", tile=None)
        for level, downsample in enumerate(DOWNSAMPLES[1:], start=1):
            side = size // downsample
            write(pyramid.tiles[level], (side, side, 3), f"{smaller}{side}x{side} - JPEG/YCC Q={quality}")
    return nuclei.truth


def write_truth(path: Path, truth: Truth) -> None:
    """GeoJSON that QuPath opens, a line a feature: the region an annotation, each nucleus a point detection with its area."""
    ring = [[int(x), int(y)] for y, x in [*truth.region, truth.region[0]]]
    features: list[dict[str, object]] = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": "Tumour-like", "color": [200, 0, 0]}},
        }
    ]
    features += [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [int(x), int(y)]},
            "properties": {"objectType": "detection", "measurements": {"area_um2": round(float(area), 1)}},
        }
        for (y, x), area in zip(truth.nuclei, truth.area_um2, strict=True)
    ]
    lines = ",\n".join(json.dumps(feature, separators=(",", ":")) for feature in features)
    path.write_text(f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n', encoding="ascii")


def make_layout(size: int, seed: int) -> Layout:
    """Four pieces of tissue, the planted region well inside the largest, vessels and smooth fields."""
    rng = np.random.default_rng([seed, 0])
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))

    def blob(y: float, x: float, radius: float, waviness: float) -> Blob:
        """A blob at a share (y, x) of the slide, turned and mirrored as the slide is."""
        x = 1 - x if mirrored else x
        for _ in range(turns):
            y, x = x, 1 - y
        waves = rng.normal(size=8) / np.arange(2, 10)
        waves *= waviness / np.abs(waves).sum()
        return Blob((y * size, x * size), radius * size, waves, rng.uniform(0, 2 * np.pi, 8))

    def near(share: float, reach: float) -> float:
        return share + float(rng.uniform(-reach, reach))

    middle = near(0.37, 0.015), near(0.38, 0.015)
    pieces = (
        blob(*middle, 0.275, 0.26),
        blob(near(0.75, 0.02), near(0.71, 0.02), 0.165, 0.28),
        blob(near(0.80, 0.02), near(0.24, 0.02), 0.115, 0.28),
        blob(near(0.23, 0.02), near(0.83, 0.02), 0.105, 0.28),
    )
    direction = float(rng.uniform(0, 2 * np.pi))
    planted = blob(middle[0] + 0.05 * math.sin(direction), middle[1] + 0.05 * math.cos(direction), 0.118, 0.30)

    # Holes keep their size in um and their number per area, so they look alike on slides of any size.
    count = max(6, round(size**2 / 1.1e6))
    holes = np.stack([*rng.uniform(0, size, (2, count)), rng.lognormal(math.log(30), 0.45, count)], axis=1)

    def field(cell: float) -> Field:
        side = math.ceil(size / cell) + 4 + math.ceil(2 * BLOCK_PX / cell)
        return Field(rng.uniform(0, 1, (side, side)), cell)

    return Layout(
        size=size,
        pieces=pieces,
        region=np.rint(planted.outline(72)).astype(np.int64),
        holes=holes,
        density=field(max(300.0, size / 12)),
        eosin=field(max(150.0, size / 40)),
        edge=field(45.0),
        warp=(field(420.0), field(420.0)),
    )


def make_texture(rng: np.random.Generator) -> Texture:
    """Wavy collagen with clefts: noise filtered along twelve directions, blended by a smooth field of directions."""
    n = TEXTURE_PX
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None, :]
    radius = np.hypot(fy, fx)

    def filtered(spectrum: NDArray[np.complex128], response: Reals) -> Reals:
        image = np.fft.irfft2(spectrum * response, s=(n, n))
        noise: Reals = (image - image.mean()) / image.std()
        return noise

    def white() -> NDArray[np.complex128]:
        return np.fft.rfft2(rng.normal(size=(n, n)))

    slow = np.exp(-((radius * 300) ** 2) / 2)
    angle = 0.5 * np.arctan2(filtered(white(), slow), filtered(white(), slow))
    noise, fibres, power = white(), np.zeros((n, n)), np.zeros((n, n))
    directions = np.arange(12) * np.pi / 12
    for direction in directions:
        across = -fx * math.sin(direction) + fy * math.cos(direction)
        along = fx * math.cos(direction) + fy * math.sin(direction)
        response = np.abs(across) / (0.012 + np.abs(across)) * np.exp(-((across / 0.036) ** 2) / 2 - ((along / 0.007) ** 2) / 2)
        weight = np.maximum(np.cos(2 * (angle - direction)), 0) ** 8
        fibres += weight * filtered(noise, response)
        power += weight**2
    fibres /= np.sqrt(power)
    bundles = filtered(white(), radius * np.exp(-((radius * 14) ** 2)))
    grain = filtered(white(), np.exp(-(((radius - 0.16) / 0.05) ** 2)))
    level = 0.85 * fibres + 0.6 * bundles
    loose = filtered(white(), np.exp(-((radius * 45) ** 2) / 2))
    cleft = 1 / (1 + np.exp((0.9 * level - 0.75 * loose + 2.15) / 0.2))
    eosin = (1 + 0.20 * np.clip(level, -2.5, 2.5) + 0.06 * grain) * (1 - 0.9 * cleft)
    return Texture(
        eosin=(eosin / eosin.mean()).astype(np.float32),
        angle=angle.astype(np.float32),
        noise=np.rint(rng.normal(0, 0.7, (n, n))).astype(np.int8).view(np.uint8),
    )


def make_bank(rng: np.random.Generator) -> list[Floats]:
    """Haematoxylin masks of nuclei (0..1, even sides, the centre on a pixel corner), by diameter, elongation, then angle."""
    reach = NUCLEUS_REACH_PX
    y, x = np.mgrid[-reach:reach, -reach:reach] + 0.5
    bank = []
    for diameter in DIAMETERS_PX:
        for elongation in ELONGATIONS:
            for turn in range(ANGLES):
                angle = turn * np.pi / ANGLES
                u, v = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
                major, minor = diameter / 2 * math.sqrt(elongation), diameter / 2 / math.sqrt(elongation)
                around = np.arctan2(v, u)
                wobble = 1 + sum(rng.normal(0, 0.05 / k) * np.cos(k * around + rng.uniform(0, 6.3)) for k in (1, 2, 3, 4))
                inside = (wobble - np.hypot(u / major, v / minor)) * minor
                spots = rng.uniform(-1, 1, (7, 2)) * (diameter / 2.6)
                chromatin = sum(np.exp(-((x - sx) ** 2 + (y - sy) ** 2) / 5.0) for sy, sx in spots)
                rim = np.exp(-((inside - 1.2) ** 2) / 2)
                mask = np.clip(inside / 2.2 + 0.5, 0, 1) * (0.62 + 0.22 * np.minimum(chromatin, 1.6) + 0.16 * rim)
                drawn = np.flatnonzero(mask.any(axis=1) | mask.any(axis=0))
                half = max(reach - drawn[0], drawn[-1] + 1 - reach)
                bank.append(mask[reach - half : reach + half, reach - half : reach + half].astype(np.float32))
    return bank


def place_nuclei(layout: Layout, texture: Texture, bank: list[Floats], rng: np.random.Generator) -> Nuclei:
    """Draw every nucleus of the slide: whole centres, the more and the larger inside the planted region."""
    polygon = layout.region
    centroid, reach = _centroid(polygon), np.hypot(*(polygon - _centroid(polygon)).T).max()
    areas = np.array([MPP**2 * (mask > 0.35).sum() for mask in bank])
    sites = math.ceil(layout.size / SITE_PX)
    centers, planted, masks, stains = [], [], [], []
    for first in range(0, sites, SITE_ROWS):
        row, col = (a.ravel() for a in np.mgrid[first : min(first + SITE_ROWS, sites), 0:sites])
        jitter = rng.uniform(-SITE_JITTER, SITE_JITTER, (2, row.size))
        chance, stain = rng.uniform(size=row.size), rng.uniform(0.74, 1.16, row.size)
        bend, spread = rng.normal(0, 0.4, row.size), rng.normal(0, DIAMETER_SPREAD, row.size)
        elongation = rng.choice(len(ELONGATIONS), row.size, p=ELONGATION_SHARES)
        y = np.rint((row + 0.5 + jitter[0]) * SITE_PX)
        x = np.rint((col + 0.25 + 0.5 * (row % 2) + jitter[1]) * SITE_PX)

        region = _inside(polygon, y, x)
        far = np.hypot(y - centroid[0], x - centroid[1]) / reach
        filled = np.where(
            region, FILLED_PLANTED - PLANTED_FALL * far**2, FILLED_SPARSE + FILLED_RANGE * layout.density.at(y, x)
        )
        keep = np.flatnonzero(chance < filled)
        keep = keep[layout.depth(y[keep], x[keep]) > NUCLEUS_REACH_PX / 2]
        keep = keep[(np.minimum(y, x)[keep] > 0) & (np.maximum(y, x)[keep] < layout.size)]

        typical = np.where(region[keep], PLANTED_DIAMETER_PX, DIAMETER_PX)
        diameter = np.clip(np.rint(typical * np.exp(spread[keep])), DIAMETERS_PX[0], DIAMETERS_PX[-1]).astype(np.intp)
        angle = texture.angle[_texture_index(layout, y[keep], x[keep])] + bend[keep]
        turn = np.rint(angle / np.pi * ANGLES).astype(np.intp) % ANGLES
        masks.append(((diameter - DIAMETERS_PX[0]) * len(ELONGATIONS) + elongation[keep]) * ANGLES + turn)
        centers.append(np.stack([y[keep], x[keep]], axis=1).astype(np.int64))
        planted.append(region[keep])
        stains.append((NUCLEUS_HAEMATOXYLIN * stain[keep]).astype(np.float32))
    center, mask = np.concatenate(centers), np.concatenate(masks)
    order = np.argsort(center[:, 0], kind="stable")
    truth = Truth(layout.size, polygon, center[order], areas[mask[order]], np.concatenate(planted)[order])
    return Nuclei(truth, mask[order], np.concatenate(stains)[order])


def render(
    layout: Layout, texture: Texture, bank: list[Floats], nuclei: Nuclei, palette: NDArray[np.uint8], y0: int, x0: int
) -> NDArray[np.uint8]:
    """(BLOCK_PX, BLOCK_PX, 3) uint8 RGB: the block whose corner is level-0 px (y0, x0)."""
    n = BLOCK_PX
    centers = np.arange(-1, n // COARSE_PX + 1) * COARSE_PX + COARSE_PX / 2
    y, x = y0 + centers[:, None], x0 + centers[None, :]
    coarse = layout.depth(y, x)
    if coarse.max() < -20:
        stain = np.zeros((n, n), np.int32)
    else:
        rows, cols = _texture_block(layout, y, x, y0, x0)
        fibres = texture.eosin[rows, cols]
        cover = np.clip((_fine(coarse) + 6 * (fibres - 1)) / 3 + 0.5, 0, 1)
        stroma = cover * fibres
        eosin = stroma * _fine(STROMA_EOSIN * (0.8 + 0.4 * layout.eosin.at(y, x)))
        haematoxylin = (STROMA_HAEMATOXYLIN * stroma).astype(np.float32)
        _stamp(haematoxylin, bank, nuclei, y0, x0)
        eosin = np.maximum(eosin, NUCLEUS_EOSIN * haematoxylin)
        h = np.minimum(haematoxylin * ((HAEMATOXYLIN_STEPS - 1) / HAEMATOXYLIN_MAX) + 0.5, HAEMATOXYLIN_STEPS - 1)
        e = np.minimum(eosin * ((EOSIN_STEPS - 1) / EOSIN_MAX) + 0.5, EOSIN_STEPS - 1)
        stain = h.astype(np.int32) * EOSIN_STEPS + e.astype(np.int32)
    rgb = np.take(palette, stain, axis=0)
    rolled = np.roll(texture.noise, (-(y0 % TEXTURE_PX), -(x0 % TEXTURE_PX)), axis=(0, 1))
    rgb += rolled[:n, :n, None]  # signed noise, wrapped as two's complement
    return rgb


def make_palette() -> NDArray[np.uint8]:
    """(HAEMATOXYLIN_STEPS * EOSIN_STEPS, 3) uint8 RGB of every pair of stain amounts, by Beer and Lambert."""
    h = np.linspace(0, HAEMATOXYLIN_MAX, HAEMATOXYLIN_STEPS)[:, None, None] * HAEMATOXYLIN
    e = np.linspace(0, EOSIN_MAX, EOSIN_STEPS)[None, :, None] * (EOSIN + THIRD_PER_EOSIN * THIRD)
    rgb = np.clip(np.rint(GLASS_RGB * 10.0 ** -(h + e)), 5, 250)  # away from 0 and 255, so that noise never wraps
    return np.asarray(rgb.reshape(-1, 3), np.uint8)


class _Pyramid:
    """Renders strip by strip. `base_tiles` yields level 0; when it is used up, `tiles` and `thumbnail` hold the rest."""

    def __init__(self, layout: Layout, texture: Texture, bank: list[Floats], nuclei: Nuclei, quality: int) -> None:
        self.tiles: dict[int, list[bytes]] = {1: [], 2: []}
        self._parts = layout, texture, bank, nuclei, make_palette()
        self._size, self._quality = layout.size, quality
        self._smallest: list[NDArray[np.uint8]] = []

    def base_tiles(self) -> Iterator[bytes]:
        pending: list[Floats] = []
        for y0 in range(0, self._size, BLOCK_PX):
            blocks = [render(*self._parts, y0, x0) for x0 in range(0, self._size, BLOCK_PX)]
            strip, second = np.concatenate(blocks, axis=1), np.concatenate([_area_mean(block, 4) for block in blocks], axis=1)
            self.tiles[1] += self._encode_strip(_to_uint8(second), self._size // 4 - y0 // 4, self._size // 4)
            pending.append(_area_mean(second, 4))
            if len(pending) == 4 or y0 + BLOCK_PX >= self._size:
                third = _to_uint8(np.concatenate(pending))
                rows = self._size // 16 - sum(part.shape[0] for part in self._smallest)
                self.tiles[2] += self._encode_strip(third, rows, self._size // 16)
                self._smallest.append(third[:rows, : self._size // 16])
                pending = []
            # Last, because whoever takes the final tile may never come back for more.
            yield from self._encode_strip(strip, self._size - y0, self._size)

    def thumbnail(self) -> NDArray[np.uint8]:
        image = Image.fromarray(np.concatenate(self._smallest))
        image.thumbnail((1024, 1024), Image.Resampling.BOX)
        return np.asarray(image)

    def _encode_strip(self, strip: NDArray[np.uint8], rows: int, cols: int) -> Iterator[bytes]:
        """Tiles of the first `rows` x `cols` px of `strip`, where the level ends; edge tiles are filled with their last px."""
        inside = strip[: max(rows, 0), : max(cols, 0)]
        for y in range(0, inside.shape[0], TILE_PX):
            for x in range(0, inside.shape[1], TILE_PX):
                tile = inside[y : y + TILE_PX, x : x + TILE_PX]
                missing = [(0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0)]
                yield _encode(np.pad(tile, missing, mode="edge"), self._quality)


def _encode(rgb: NDArray[np.uint8], quality: int) -> bytes:
    encoded = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(rgb), level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420", optimize=True
    )
    return bytes(encoded)


def _area_mean(image: NDArray[np.uint8] | Floats, factor: int) -> Floats:
    height, width, bands = image.shape
    mean: Floats = image.reshape(height // factor, factor, width // factor, factor, bands).mean(axis=(1, 3), dtype=np.float32)
    return mean


def _to_uint8(image: Floats) -> NDArray[np.uint8]:
    return (image + 0.5).astype(np.uint8)


def _stamp(canvas: Floats, bank: list[Floats], nuclei: Nuclei, y0: int, x0: int) -> None:
    """Raise `canvas` to every nucleus that reaches into the block at (y0, x0)."""
    n, reach, centers = BLOCK_PX, NUCLEUS_REACH_PX, nuclei.truth.nuclei
    first, last = np.searchsorted(centers[:, 0], [y0 - reach, y0 + n + reach])
    columns = centers[first:last, 1]
    for i in first + np.flatnonzero((columns > x0 - reach) & (columns < x0 + n + reach)):
        mask = bank[nuclei.mask[i]]
        half = mask.shape[0] // 2
        top, left = int(centers[i, 0]) - y0 - half, int(centers[i, 1]) - x0 - half
        target = canvas[max(top, 0) : max(top + 2 * half, 0), max(left, 0) : max(left + 2 * half, 0)]
        height, width = target.shape
        source = mask[max(-top, 0) : max(-top, 0) + height, max(-left, 0) : max(-left, 0) + width]
        np.maximum(target, source * nuclei.stain[i], out=target)


def _texture_index(layout: Layout, y: Reals, x: Reals) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of the texture that lies at points y, x."""
    rows, cols = (p + _warp(field, y, x) for p, field in zip((y, x), layout.warp, strict=True))
    return rows.astype(np.intp) % TEXTURE_PX, cols.astype(np.intp) % TEXTURE_PX


def _texture_block(layout: Layout, y: Reals, x: Reals, y0: int, x0: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The same for all pixels of a block, interpolated from the coarse points y, x."""
    at = np.arange(BLOCK_PX, dtype=np.float32) + 0.5
    rows = _fine(_warp(layout.warp[0], y, x)) + (at + y0 % TEXTURE_PX)[:, None]
    cols = _fine(_warp(layout.warp[1], y, x)) + (at + x0 % TEXTURE_PX)[None, :]
    return rows.astype(np.int32) & (TEXTURE_PX - 1), cols.astype(np.int32) & (TEXTURE_PX - 1)


def _warp(field: Field, y: Reals, x: Reals) -> Reals:
    return 160 * field.at(y, x)


def _fine(coarse: Reals) -> Floats:
    """Values every COARSE_PX, one beyond each side, as one per pixel of the block."""
    box = (1, 1, coarse.shape[1] - 1, coarse.shape[0] - 1)
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize((BLOCK_PX, BLOCK_PX), Image.Resampling.BILINEAR, box=box))


def _ease(t: Reals) -> Reals:
    """0..1 -> 0..1, flat at both ends, so that fields have no creases."""
    return t * t * t * (t * (6 * t - 15) + 10)


def _centroid(polygon: NDArray[np.int64]) -> Reals:
    """(y, x) of the polygon's area."""
    here, there = polygon.astype(np.float64), np.roll(polygon, -1, axis=0).astype(np.float64)
    cross = here[:, 1] * there[:, 0] - there[:, 1] * here[:, 0]
    center: Reals = ((here + there) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
    return center


def _inside(polygon: NDArray[np.int64], y: Reals, x: Reals) -> NDArray[np.bool_]:
    """Whether points lie in the polygon, by crossings of a ray; only points within its bounds are looked at."""
    inside = np.zeros(y.shape, bool)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    near = np.flatnonzero((y > low[0]) & (y < high[0]) & (x > low[1]) & (x < high[1]))
    py, px, crossings = y[near], x[near], np.zeros(near.size, bool)
    for (ay, ax), (by, bx) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay != by:
            crossings ^= ((ay > py) != (by > py)) & (px < (bx - ax) * (py - ay) / (by - ay) + ax)
    inside[near] = crossings
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a synthetic H&E slide (SVS) and the truth that it was drawn from (GeoJSON)."
    )
    parser.add_argument("out", type=Path, help="the slide to write, ending in .svs")
    parser.add_argument("--size", type=int, default=12000, help="width and height in px at 0.5 um/px (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="a whole number >= 0; another seed is another slide (default: %(default)s)"
    )
    parser.add_argument("--quality", type=int, default=QUALITY, help="JPEG quality (default: %(default)s)")
    parser.add_argument("--truth", type=Path, help="also write the planted region and all nuclei here, as GeoJSON")
    options = parser.parse_args()
    truth = make_slide(options.out, options.size, options.seed, options.quality)
    if options.truth:
        write_truth(options.truth, truth)
    planted = int(truth.planted.sum())
    print(f"{options.out}: {options.size} x {options.size} px, {len(truth.nuclei)} nuclei, {planted} of them planted")


if __name__ == "__main__":
    main()
