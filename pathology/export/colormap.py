"""Scores to colours. Promise: equal steps of score look equally large, also to colour-blind eyes, and NaN is transparent."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError

# Every tenth of viridis (S. van der Walt, N. Smith, E. Firing; CC0): lightness rises evenly, blue to yellow.
VIRIDIS = (
    "#440154",
    "#482475",
    "#414487",
    "#355f8d",
    "#2a788e",
    "#21918c",
    "#22a884",
    "#44bf70",
    "#7ad151",
    "#bddf26",
    "#fde725",
)

# Colours of classes that name none (Okabe and Ito, Color Universal Design): told apart by colour-blind eyes too.
OKABE_ITO = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """ "#rrggbb" -> red, green, blue 0..255."""
    if len(color) != 7 or color[0] != "#":
        raise UsageError(f"color {color!r} is not of the form #rrggbb")
    try:
        red, green, blue = bytes.fromhex(color[1:])
    except ValueError:
        raise UsageError(f"color {color!r} is not of the form #rrggbb") from None
    return red, green, blue


def class_colors(colors: tuple[str, ...], classes: int) -> tuple[tuple[int, int, int], ...]:
    """Red, green, blue per class: the given `colors`, or else a palette that starts again where classes outnumber it."""
    chosen = colors or tuple(OKABE_ITO[i % len(OKABE_ITO)] for i in range(classes))
    return tuple(hex_to_rgb(color) for color in chosen)


def lookup_table() -> NDArray[np.uint8]:
    """(256, 3) uint8 RGB from low to high."""
    anchors = np.array([hex_to_rgb(color) for color in VIRIDIS], np.float64)
    at, steps = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, 256)
    return np.stack([np.interp(steps, at, channel) for channel in anchors.T], axis=-1).round().astype(np.uint8)


def colorize(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """(..., 4) uint8 RGBA: values of `low` and less are the first colour, of `high` and more the last; NaN is transparent."""
    if not low < high:
        raise UsageError(f"display range {low:g} to {high:g} is empty; the low end must be below the high end")
    missing = np.isnan(values)
    scaled = np.clip((np.where(missing, low, values) - low) / (high - low), 0, 1)
    rgba = np.empty((*values.shape, 4), np.uint8)
    rgba[..., :3] = lookup_table()[np.round(scaled * 255).astype(np.uint8)]
    rgba[..., 3] = np.where(missing, 0, 255)
    return rgba
