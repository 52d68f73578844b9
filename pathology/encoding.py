"""How scores lie on disk: as float32, as float16, or scaled to a byte. Promise: no score is taken for not predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathology.errors import UsageError
from pathology.model import ModelSpec

Dtype = Literal["uint8", "float16", "float32"]

# Of a byte's codes 0 is not predicted; 1 to 255 are LEVELS even steps from the lowest score to the highest.
LEVELS = 254


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the numbers of a heatmap are stored.

    low, high  of uint8: the scores of the codes 1 and 255; what lies outside is stored as the nearer of them
    """

    dtype: Dtype = "float32"
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in ("uint8", "float16", "float32"):
            raise UsageError(f"heatmap dtype {self.dtype!r} is unknown; use uint8, float16 or float32")
        if not self.low < self.high:
            raise UsageError(
                f"scores from {self.low:g} to {self.high:g} cannot be scaled to a byte; use --heatmap-dtype float32"
            )

    @property
    def fill(self) -> float:
        """What is stored where nothing was predicted."""
        return 0 if self.dtype == "uint8" else float("nan")

    def encode(self, scores: NDArray[np.float32]) -> NDArray[Any]:
        """Scores, NaN where not predicted, as they are stored; every NaN has one bit pattern, as processors' own differ."""
        stored, flat = np.empty(scores.size, self.dtype), scores.reshape(-1)
        for at in range(0, scores.size, AT_ONCE):
            stored[at : at + AT_ONCE] = self._encoded(flat[at : at + AT_ONCE])
        return stored.reshape(scores.shape)

    def _encoded(self, scores: NDArray[np.float32]) -> NDArray[Any]:
        missing = np.isnan(scores)
        if self.dtype != "uint8":
            # Half precision ends at 65,504: what is beyond is stored as that, not as infinity.
            most = float(np.finfo(self.dtype).max)
            stored: NDArray[Any] = np.where(missing, np.float32(np.nan), np.clip(scores, -most, most)).astype(self.dtype)
            return stored
        share = (np.where(missing, self.low, scores).astype(np.float64) - self.low) / (self.high - self.low)
        return np.where(missing, 0, np.rint(np.clip(share, 0, 1) * LEVELS) + 1).astype(np.uint8)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Scores, NaN where not predicted, of what is stored; those of uint8 within half a step of what was encoded."""
        if self.dtype != "uint8":
            return stored.astype(np.float32)
        table = np.concatenate([[np.nan], np.linspace(self.low, self.high, LEVELS + 1)]).astype(np.float32)
        scores: NDArray[np.float32] = table[stored]
        return scores


# Scores that are worked on at once: what is made of them on the way stays in the processor's caches, and takes no memory.
AT_ONCE = 2**16

FLOAT32 = Encoding()
# From this many pixels a side on a heatmap has coarser levels, which take a third of its bytes.
LARGE_PX = 256


def choose_encoding(spec: ModelSpec, dtype: Dtype | Literal["auto"]) -> Encoding:
    """How a model's heatmap is stored. Only dense maps are large enough to be stored in less than float32.

    "auto" is uint8 for probabilities, float32 for values. Values are scaled to a byte over the card's range of display.
    """
    if spec.output != "map":
        return FLOAT32
    if dtype == "auto":
        dtype = "uint8" if spec.scores == "probability" else "float32"
    low, high = (0.0, 1.0) if spec.scores == "probability" else spec.display
    return Encoding(dtype, low, high) if dtype == "uint8" else Encoding(dtype)


def stored_bytes(spec: ModelSpec, dtype: Dtype | Literal["auto"], shape: tuple[int, int], tiles: int) -> int:
    """Bytes of a result's heatmap of `shape`, or of its features, with answers for so many tiles; before they are compressed.

    Where nothing was predicted is left out: chunks of that alone are not stored, and elsewhere it is compressed to nothing.
    """
    if spec.features:
        return tiles * spec.features * 4
    height, width = shape
    pyramid = 4 / 3 if max(height, width) > LARGE_PX else 1.0
    pixels = min(height * width, tiles * spec.output_px**2)
    return int(pixels * len(spec.classes) * pyramid * np.dtype(choose_encoding(spec, dtype).dtype).itemsize)
