"""The script a good programmer writes in an afternoon: OpenSlide per tile, a torch DataLoader, one loop.

    python plain.py SLIDE TILES.npy SCORES.npy --network tiny [--threads 1] [--workers 2] [--batch 32]

Imports nothing of the pipeline. TILES.npy holds level-0 (y, x) of the corners of tiles; scores are softmax, in that order.
Tiles go to the model as uint8 and are normalised there. A 40x slide is read at level 0 and averaged 2 x 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import openslide
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))

from networks import MEAN, STD, make

TILE_PX, MPP = 224, 0.5


class Tiles(Dataset[NDArray[np.uint8]]):
    def __init__(self, slide: str, corners: NDArray[np.int64]) -> None:
        self.path = slide
        self.corners = corners
        self.slide: openslide.OpenSlide | None = None
        with openslide.OpenSlide(slide) as opened:
            self.factor = round(MPP / float(opened.properties["openslide.mpp-x"]))

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        y, x = (int(v) for v in self.corners[index])
        side = TILE_PX * self.factor
        image = self.slide.read_region((x, y), 0, (side, side))
        if y + side > self.slide.dimensions[1] or x + side > self.slide.dimensions[0]:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
        image = image.convert("RGB")
        return np.array(image.reduce(self.factor) if self.factor > 1 else image)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("slide")
    parser.add_argument("tiles")
    parser.add_argument("scores")
    parser.add_argument("--network", default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = make(options.network).to(memory_format=torch.channels_last)
    mean = torch.tensor(MEAN).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD).view(1, 3, 1, 1) * 255
    data = Tiles(options.slide, np.load(options.tiles))
    scores = []
    with torch.inference_mode():
        for batch in DataLoader(data, options.batch, num_workers=options.workers):
            pixels = batch.permute(0, 3, 1, 2).float().sub_(mean).div_(std)
            scores.append(network(pixels).softmax(dim=1).numpy())
    np.save(options.scores, np.concatenate(scores))


if __name__ == "__main__":
    main()
