"""`nuclei-density`: a built-in tile classifier without weights that sees nuclei in the haematoxylin stain.

Promise: a tile's score depends on that tile's pixels alone. Everything that is summed is a whole number, so the bits do
not depend on the batch, the threads or the order in which a device adds.

Stain separation: A.C. Ruifrok and D.A. Johnston, Quantification of histochemical staining by color deconvolution, Anal
Quant Cytol Histol 23:291-299 (2001). Optical density is a sum of stains, so inverting the matrix of their unit vectors
gives each stain's amount; the third vector, the residual, is the complement (cross product) of haematoxylin and eosin.

The score is the share of the tile's area that is nucleus, 0 to 1, with soft borders. On 100-px tiles of two 20x H&E fields
of a high-grade serous ovarian carcinoma it ranks with counted nuclei at Spearman 0.87 (tumour nest, 1,294 nuclei, mean
score 0.21 where 0.19 of the area is labelled nucleus) and 0.67 (stroma, 423 nuclei, 0.09 where 0.04 is). The constants
below were chosen on those fields, so expect less elsewhere. Stained 0.7 or 1.4 times as strongly, the nest gives 0.86 and
0.78, and scores move by up to a factor of two: compare slides of one laboratory only. Pen marks and pigment count as nuclei.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pathology.errors import ModelError
from pathology.model import ModelSpec

if TYPE_CHECKING:
    import torch

NAME = "nuclei-density"
MPP = 0.5
TILE_PX = 128
SMALLEST_TILE_PX, LARGEST_TILE_PX = 16, 2048

HAEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.07, 0.99, 0.11)
LEVELS = 1024  # whole steps per unit of optical density

SMOOTH_PX = 3  # takes away grain
BACKGROUND_PX = 41  # 20 um: wider than a nucleus, so its mean is the nucleus and its surroundings
BACKGROUND_SHARE = 0.4  # of the surroundings taken off: pale and strong stains come closer, crowded nuclei stay
LOW, HIGH = 0.2, 0.6  # haematoxylin above the background at which a pixel begins to be, and fully is, nucleus
MEMBERSHIP_STEPS = 255


def spec(tile_px: int = TILE_PX) -> ModelSpec:
    """The card for tiles of `tile_px` px at 0.5 um/px (a whole number, 16 to 2048). Other sizes than 128 are in the name."""
    if not isinstance(tile_px, int) or not SMALLEST_TILE_PX <= tile_px <= LARGEST_TILE_PX:
        raise ModelError(f"{NAME}: tile_px {tile_px!r}; use a whole number from {SMALLEST_TILE_PX} to {LARGEST_TILE_PX}")
    return ModelSpec(
        name=NAME if tile_px == TILE_PX else f"{NAME}-{tile_px}px",
        sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        classes=("nuclei",),
        mpp=MPP,
        tile_px=tile_px,
        input_px=tile_px,
        scores="value",
        units="nuclear area fraction",
        threshold=(0.15,),
        colors=("#7b3294",),
        display=(0.0, 0.4),
    )


class NucleiDensity:
    """The model on one device. See the module's docstring for the arithmetic."""

    def __init__(self, device: str = "cpu", tile_px: int = TILE_PX) -> None:
        import torch

        self.spec = spec(tile_px)
        self._device = torch.device(device)
        self._tables = torch.from_numpy(haematoxylin_tables()).to(self._device)

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, tile_px, tile_px, 3) uint8 RGB -> (B, 1, 1, 1) float32 nuclear area fraction, 0 to 1."""
        import torch

        with torch.inference_mode():
            rgb = torch.from_numpy(tiles).to(self._device)
            response = self._response(rgb).sum(dim=(1, 2), dtype=torch.int64).cpu().numpy()
        return (response / (MEMBERSHIP_STEPS * self.spec.tile_px**2)).astype(np.float32).reshape(-1, 1, 1, 1)

    def _response(self, rgb: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> (B, H, W) int32: how much each pixel is nucleus, 0 to MEMBERSHIP_STEPS."""
        import torch

        stain = haematoxylin(self._tables, rgb)
        above = box_mean(stain, SMOOTH_PX).sub_(box_mean(stain, BACKGROUND_PX).mul_(BACKGROUND_SHARE))
        share = above.sub_(LOW * LEVELS).div_((HIGH - LOW) * LEVELS).clamp_(0, 1)
        return share.mul_(MEMBERSHIP_STEPS).round_().to(torch.int32)


def haematoxylin_tables() -> NDArray[np.float32]:
    """(3, 256) float32 of whole numbers: what a channel's grey level adds to a pixel's haematoxylin.

    The unit is 1 / LEVELS of optical density. Haematoxylin is linear in the three optical densities -log10((v + 1) / 256),
    so that three look-ups and two sums separate the stain.
    """
    stains = np.array([HAEMATOXYLIN, EOSIN])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    residual = np.cross(stains[0], stains[1])
    from_density = np.linalg.inv(np.vstack([stains, residual / np.linalg.norm(residual)]))
    density = -np.log10((np.arange(256) + 1) / 256)
    return np.round(np.outer(from_density[:, 0], density) * LEVELS).astype(np.float32)


def haematoxylin(tables: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, H, W) float32 of whole numbers: haematoxylin in 1 / LEVELS of optical density."""
    import torch

    planes = rgb.permute(3, 0, 1, 2).contiguous().to(torch.int32)
    red, green, blue = (table.index_select(0, plane.view(-1)) for table, plane in zip(tables, planes, strict=True))
    stain: torch.Tensor = red + green + blue
    return stain.view(rgb.shape[:3])


def box_mean(values: torch.Tensor, width: int) -> torch.Tensor:
    """(B, N, N) float32 -> the same: mean over the `width` x `width` box around each pixel, cut at the tile's edges.

    Sums are products with a band of ones. They are exact for whole numbers whose box sums stay below 2**24.
    """
    import torch

    at = torch.arange(values.shape[-1], device=values.device)
    band = ((at[:, None] - at[None, :]).abs() <= width // 2).to(torch.float32)
    lengths = band.sum(0)
    return (band @ values @ band).div_(lengths[:, None] * lengths[None, :])
