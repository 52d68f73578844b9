"""One region from slide to heatmap: read -> batch -> model -> stitch, the whole flow on one screen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from pathology.clock import timed
from pathology.errors import Reason, SlideError
from pathology.model import ModelSpec
from pathology.plan import Plan, Region
from pathology.predictor import Predict
from pathology.stitch import Canvas, blend_window

Tile = tuple[int, int]


def infer_region(
    read: Callable[[NDArray[np.int32]], Iterator[NDArray[np.uint8] | None]],
    spec: ModelSpec,
    plan: Plan,
    region: Region,
    predict: Predict,
    on_bad: Callable[[Tile], None],
) -> Generator[NDArray[np.float32], None, None]:
    """The rows of `region.box` as `stitch.bands` cuts them: (C, h, W) float32 scores, NaN where no tile fell.

    read    gives the pixels of tiles (row, col), in order, as `read_tiles` does; None for one that cannot be decoded
    on_bad  told of each such tile (row, col). It goes to no model and leaves nothing on the canvas

    Raises SlideError(BAD_SCORES) where the model answers NaN or infinity: it must not spread into its neighbours.
    """
    canvas = Canvas(region.box, len(spec.classes), blend_window(spec.output_px, plan.blend, spec.margin_px))
    asked: deque[Tile] = deque()  # tiles that the model was given and has not answered: it takes them ahead

    def readable() -> Iterator[NDArray[np.uint8]]:
        for (row, col), tile in zip(region.tiles.tolist(), read(region.tiles), strict=True):
            if tile is None:
                on_bad((row, col))
                continue
            asked.append((row, col))
            yield tile

    for scores in predict(readable()):
        row, col = asked.popleft()
        y, x = row * plan.h_stride, col * plan.h_stride
        if not np.isfinite(scores).all():
            raise SlideError(
                Reason.BAD_SCORES,
                f"model {spec.name} answered NaN or infinity at heatmap pixel ({y}, {x}); check it on that tile",
            )
        yield from _timed(canvas.final(y))
        with timed("stitch"):
            canvas.add(scores, y, x)
    if asked:
        raise RuntimeError(f"model {spec.name} left {len(asked)} tiles unanswered")
    yield from _timed(canvas.final(region.box.y1))


def _timed(rows: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """`rows`, the time of making each counted as stitching."""
    while True:
        with timed("stitch"):
            band = next(rows, None)
        if band is None:
            return
        yield band
