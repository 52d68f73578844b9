"""One region from slide to heatmap: read -> batch -> model -> stitch, the whole flow on one screen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from pathology.batches import ReadPool, read_tiles
from pathology.clock import Clock, timed
from pathology.errors import Reason, SlideError
from pathology.model import ModelSpec
from pathology.plan import Plan, Region
from pathology.predictor import Predict
from pathology.slide import Slide
from pathology.stitch import Canvas, blend_window

Tile = tuple[int, int]


def infer_region(
    slide: Slide,
    spec: ModelSpec,
    plan: Plan,
    region: Region,
    predict: Predict,
    on_bad: Callable[[Tile], None],
    pool: ReadPool | None = None,
    clock: Clock | None = None,
) -> Generator[NDArray[np.float32], None, None]:
    """The rows of `region.box` as `stitch.bands` cuts them: (C, h, W) float32 scores, NaN where no tile fell.

    on_bad  told of each tile (row, col) that cannot be decoded. It goes to no model and leaves nothing on the canvas
    clock   told what time reading takes; the other stages count for this thread's own clock

    Raises SlideError(BAD_SCORES) where the model answers NaN or infinity: it must not spread into its neighbours.
    """
    canvas = Canvas(region.box, len(spec.classes), blend_window(spec.output_px, plan.blend))
    asked: deque[Tile] = deque()  # tiles that the model was given and has not answered: it takes them ahead

    def readable() -> Iterator[NDArray[np.uint8]]:
        pixels = read_tiles(slide, spec, plan.grid, region.tiles, pool, clock)
        for (row, col), tile in zip(region.tiles.tolist(), pixels, strict=True):
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
