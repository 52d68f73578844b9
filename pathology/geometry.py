"""Rectangles and frames. Promise: positions are multiplied from indices in float64 and never rounded here.

Frames, by prefix: `l0_` level-0 pixels of the slide, `g_` grid pixels (the slide at the model's mpp),
`h_` heatmap pixels. Coordinates are continuous: (0, 0) is the outer corner of pixel 0, its centre is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass


def mpp_ratio(mpp: float, slide_mpp: float) -> float:
    """Level-0 px per px at `mpp`. Whole where it is whole but for float noise: 0.3 / 0.1 is 3, not 2.9999999999999996."""
    ratio = mpp / slide_mpp
    return float(round(ratio)) if abs(ratio - round(ratio)) < 1e-9 * ratio else ratio


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open rectangle of whole pixels, y before x: rows y..y1, columns x..x1."""

    y: int
    x: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise ValueError(f"box of {self.height} x {self.width} px: sides must not be negative")

    @property
    def y1(self) -> int:
        return self.y + self.height

    @property
    def x1(self) -> int:
        return self.x + self.width

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def empty(self) -> bool:
        return self.height == 0 or self.width == 0

    def intersect(self, other: Box) -> Box:
        """The common part; a box of zero sides where there is none."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        return Box(y, x, max(0, min(self.y1, other.y1) - y), max(0, min(self.x1, other.x1) - x))

    def shift(self, dy: int, dx: int) -> Box:
        return Box(self.y + dy, self.x + dx, self.height, self.width)

    def slices(self, origin: Box | None = None) -> tuple[slice, slice]:
        """(rows, columns) slices of this box, in an array whose pixel (0, 0) is `origin`'s corner."""
        dy, dx = (0, 0) if origin is None else (origin.y, origin.x)
        return slice(self.y - dy, self.y1 - dy), slice(self.x - dx, self.x1 - dx)


@dataclass(frozen=True, slots=True)
class HeatmapFrame:
    """Where a heatmap's pixels lie on the slide.

    shape        (height, width) in heatmap pixels
    l0_origin    level-0 coordinate of the outer corner of heatmap pixel 0 (the same for y and x)
    l0_pixel     side of a heatmap pixel in level-0 px (float, never rounded)
    slide_mpp    um per level-0 px
    """

    shape: tuple[int, int]
    l0_origin: float
    l0_pixel: float
    slide_mpp: float

    @property
    def mpp(self) -> float:
        """um per heatmap pixel."""
        return self.l0_pixel * self.slide_mpp

    @property
    def translation_um(self) -> float:
        """NGFF translation of heatmap level 0: from the centre of slide pixel 0 to the centre of heatmap pixel 0."""
        return (self.l0_origin + self.l0_pixel / 2 - 0.5) * self.slide_mpp

    def level0_to_heatmap(self, y: float, x: float) -> tuple[float, float]:
        """Continuous level-0 px -> continuous heatmap px; works on arrays as well."""
        return (y - self.l0_origin) / self.l0_pixel, (x - self.l0_origin) / self.l0_pixel

    def heatmap_to_level0(self, y: float, x: float) -> tuple[float, float]:
        """Continuous heatmap px -> continuous level-0 px; works on arrays as well."""
        return y * self.l0_pixel + self.l0_origin, x * self.l0_pixel + self.l0_origin
