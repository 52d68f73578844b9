"""One region from slide to result: read -> batch -> model -> stitch, the whole flow on one screen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathology.clock import timed
from pathology.decide import doubtful
from pathology.detections import objects_of
from pathology.errors import Reason, SlideError
from pathology.model import DetectionRule, ModelSpec
from pathology.models.checks import crowded, unsound
from pathology.plan import Plan, Region
from pathology.predictor import Predict
from pathology.stitch import Canvas, blend_window

Tile = tuple[int, int]
Read = Callable[[NDArray[np.int32]], Iterator[NDArray[np.uint8] | None]]


@dataclass(frozen=True, slots=True)
class Again:
    """How tiles are computed that a network in half precision leaves in doubt.

    read, predict  as for `infer_region`, the latter in float32
    doubt          how near log-odds are in doubt, see `decide.doubtful`
    on_doubt       told how many they are
    """

    read: Read
    predict: Predict
    doubt: float
    on_doubt: Callable[[int], None]


def infer_region(
    read: Read,
    spec: ModelSpec,
    plan: Plan,
    region: Region,
    predict: Predict,
    on_bad: Callable[[Tile], None],
    again: Again | None = None,
) -> Generator[NDArray[np.float32], None, None]:
    """The rows of `region.box` as `stitch.bands` cuts them: (C, h, W) float32 scores, NaN where no tile fell.

    read    gives the pixels of tiles (row, col), in order, as `read_tiles` does; None for one that cannot be decoded
    on_bad  told of each such tile (row, col). It goes to no model and leaves nothing on the canvas
    again   by which doubtful tiles of a classifier are decided; None: they stand

    Raises SlideError(BAD_SCORES) where the model answers NaN or infinity: it must not spread into its neighbours.
    """
    canvas = Canvas(region.box, spec.channels, blend_window(spec.output_px, plan.blend, spec.margin_px))
    answers = _answers(read, spec, region.tiles, predict, on_bad)
    stride, before = plan.h_stride, -1
    for (row, col), scores in answers if again is None else _decided(answers, spec, again, on_bad):
        if row != before:
            yield from _timed(canvas.final(row * stride))
            before = row
        with timed("stitch"):
            canvas.add(scores, row * stride, col * stride)
    yield from _timed(canvas.final(region.box.y1))


def detect_region(
    read: Read,
    spec: ModelSpec,
    rule: DetectionRule,
    plan: Plan,
    region: Region,
    predict: Predict,
    on_bad: Callable[[Tile], None],
) -> NDArray[np.float64]:
    """All that a detector sees with its centre in `region.box`, an object a row (`Objects.to_rows`), doubles and all.

    Parameters and errors are those of `infer_region`.
    """
    found = [np.empty((0, 5 + 2 * rule.vertices))]
    for tile, answer in _answers(read, spec, region.tiles, predict, on_bad):
        with timed("stitch"):
            found.append(objects_of(answer, spec, rule, plan.grid, tile, region.box).to_rows())
    return np.concatenate(found)


def _decided(
    answers: Iterator[tuple[Tile, NDArray[np.float32]]], spec: ModelSpec, again: Again, on_bad: Callable[[Tile], None]
) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
    """`answers` (a number a class, so a region's are few), in their order; of doubtful tiles what `again` gives."""
    first = list(answers)
    scores = np.array([scores.reshape(-1) for _, scores in first], np.float32).reshape(len(first), -1)
    tiles = [first[place][0] for place in np.flatnonzero(doubtful(scores, spec.threshold, again.doubt))] if first else []
    again.on_doubt(len(tiles))
    wanted = np.array(tiles, np.int32).reshape(-1, 2)
    decided = dict(_answers(again.read, spec, wanted, again.predict, on_bad)) if tiles else {}
    if len(decided) < len(tiles):
        raise SlideError(Reason.READ_ERROR, "a tile could be read once, and not a second time; run the same again")
    for tile, answer in first:
        yield tile, decided.get(tile, answer)


def _answers(
    read: Read, spec: ModelSpec, tiles: NDArray[np.int32], predict: Predict, on_bad: Callable[[Tile], None]
) -> Iterator[tuple[Tile, NDArray[np.float32]]]:
    """(row, col) and answer of each of the tiles that can be read, in their order."""
    asked: deque[Tile] = deque()  # tiles that the model was given and has not answered: it takes them ahead

    def readable() -> Iterator[NDArray[np.uint8]]:
        for (row, col), tile in zip(tiles.tolist(), read(tiles), strict=True):
            if tile is None:
                on_bad((row, col))
                continue
            asked.append((row, col))
            yield tile

    for scores in predict(readable()):
        row, col = asked.popleft()
        if what := unsound(spec, scores) or crowded(spec, scores):
            raise SlideError(
                Reason.BAD_SCORES,
                f"model {spec.name} answered {what} for the tile in row {row}, column {col}; check it on that tile",
            )
        yield (row, col), scores
    if asked:
        raise RuntimeError(f"model {spec.name} left {len(asked)} tiles unanswered")


def _timed(rows: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """`rows`, the time of making each counted as stitching."""
    while True:
        with timed("stitch"):
            band = next(rows, None)
        if band is None:
            return
        yield band
