"""Stained tiles on a model's device: what a network is given instead of RGB, by each tile's own parameters.

Promise: a pixel's channels follow from its colour and its tile's parameters alone, in float32, without a product of matrices:
so they do not depend on which slides share a batch. The formulas: `pathology.stain.parameters`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pathology.model import StainInput
from pathology.stain import log_levels

if TYPE_CHECKING:
    import torch


class Stainer:
    """Makes stained tiles on one device."""

    def __init__(self, kind: StainInput, device: torch.device) -> None:
        import torch

        self._kind = kind
        self._levels = torch.from_numpy(log_levels().astype(np.float32)).to(device)

    def __call__(self, tiles: torch.Tensor, stains: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 and (B, PARAMETERS) float32 on the device -> (B, S, S, 3) float32, 0..255."""
        import torch

        levels = self._levels.index_select(0, tiles.reshape(-1).to(torch.int32)).view(tiles.shape)
        each = stains.view(len(stains), -1, 1, 1)
        red, green, blue = (each[:, 0, ..., None] - levels).clamp_(min=0).unbind(-1)
        stained = torch.empty_like(levels)
        for channel in range(3):
            from_red, from_green, from_blue, offset = (each[:, 1 + 3 * k + channel] for k in range(4))
            stained[..., channel] = red * from_red + green * from_green + blue * from_blue + offset
        if self._kind == "macenko":
            return stained.neg_().exp_().clamp_(max=255)
        return stained.clamp_(0, 1).mul_(255)
