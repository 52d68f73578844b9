"""What each way of opening a file hands over. Promise: all that `SlideInfo` says of a file but mpp, which has its own rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathology.geometry import Box
from pathology.readers.mpp import Claim
from pathology.slide import WHITE, Reader

# Decoded tiles kept for neighbours, per open slide, unless a row of windows needs more and is allowed it.
CACHE_BYTES = 48 * 2**20


@dataclass(frozen=True, slots=True)
class Opened:
    """An open file; fields as in `SlideInfo`, `library` is its `reader`, `claim` the resolution the file states."""

    reader: Reader
    library: str
    vendor: str
    level_shapes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    claim: Claim | None
    bounds: Box | None = None
    objective: float | None = None


def whole_downsample(l0_shape: tuple[int, int], shape: tuple[int, int], downsample: float) -> float:
    """The whole number k that made a level, if both sides are level 0's over k rounded either way; else `downsample`.

    What a file or library states is often the mean of the sides' quotients, which the rounding of the sides takes off k.
    """
    k = max(1, round(downsample))
    return float(k) if all(n // k <= m <= -(-n // k) for n, m in zip(l0_shape, shape, strict=True)) else downsample


def over_white(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """RGBA, colours not multiplied by alpha -> (H, W, 3) uint8 over white, (H, W) bool alpha > 0 None if all opaque."""
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return np.array(image.convert("RGB")), None
    rgb = Image.new("RGB", image.size, (WHITE, WHITE, WHITE))
    rgb.paste(image, mask=alpha)
    return np.array(rgb), np.asarray(alpha) > 0
