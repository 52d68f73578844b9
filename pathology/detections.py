"""Objects that a detector finds: where they lie on the slide, and which of its answers are one object.

Promise: an answer belongs to the one region that holds its centre, and what is kept is decided on the whole slide, by place and
score alone: borders of tiles and regions lose and double none, and any cut into regions gives the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.model import DetectionRule, ModelSpec

# Input px by which tiles may disagree on where an object is.
SHIFT_PX = 4.0
# Pairs of objects that are looked at together.
PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Objects of a slide, or a part of it.

    centres   (n, 2) float64 y, x in continuous level-0 px
    classes   (n,) int64 numbers of the model's classes
    scores    (n,) float64
    at_edge   (n,) bool: seen in the margin of its tile
    outlines  (n, vertices, 2) float64 y, x likewise
    """

    centres: NDArray[np.float64]
    classes: NDArray[np.int64]
    scores: NDArray[np.float64]
    at_edge: NDArray[np.bool_]
    outlines: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> Objects:
        return Objects(
            self.centres[chosen], self.classes[chosen], self.scores[chosen], self.at_edge[chosen], self.outlines[chosen]
        )

    def boxes(self) -> NDArray[np.float64]:
        """(n, 4) y0, x0, y1, x1 around the outlines."""
        return np.concatenate([self.outlines.min(axis=1), self.outlines.max(axis=1)], axis=1)

    def rings(self) -> NDArray[np.float64]:
        """(n, vertices + 1, 2) closed outlines; of a box its four corners; (n, 0, 2) of points."""
        outlines = self.outlines
        if outlines.shape[1] == 2:
            outlines = self.boxes()[:, [0, 1, 0, 3, 2, 3, 2, 1]].reshape(-1, 4, 2)
        return np.concatenate([outlines, outlines[:, :1]], axis=1)

    def to_rows(self) -> NDArray[np.float64]:
        """(n, 5 + 2 * vertices) float64, of which `from_rows` makes equal objects."""
        numbers = np.column_stack([self.centres, self.classes, self.scores, self.at_edge])
        return np.concatenate([numbers, self.outlines.reshape(len(self), 2 * self.outlines.shape[1])], axis=1)

    @staticmethod
    def from_rows(rows: NDArray[np.float64]) -> Objects:
        outlines = rows[:, 5:].reshape(len(rows), (rows.shape[1] - 5) // 2, 2)
        return Objects(rows[:, :2], rows[:, 2].astype(np.int64), rows[:, 3], rows[:, 4] != 0, outlines)


def objects_of(
    answer: NDArray[np.float32], spec: ModelSpec, rule: DetectionRule, grid: TileGrid, tile: tuple[int, int], box: Box
) -> Objects:
    """The objects in one tile's answer (N, columns) whose centre lies in the tile, and in `box` of the heatmap (h_ px).

    A centre further outside the tile than `SHIFT_PX` is left to the tile that it lies in; so far outside the slide, it is none.
    """
    rows = answer[~np.isnan(answer[:, 3])].astype(np.float64)
    l0_origin, l0_pixel = grid.l0_origins(np.array([tile])), grid.l0_tile / spec.input_px
    l0_centre, l0_end = l0_origin + rows[:, :2] * l0_pixel, np.array(grid.l0_shape, np.float64)
    reach = SHIFT_PX * l0_pixel
    inside = ((rows[:, :2] >= -SHIFT_PX) & (rows[:, :2] < spec.input_px + SHIFT_PX)).all(axis=1)
    inside &= ((l0_centre >= -reach) & (l0_centre < l0_end + reach)).all(axis=1)
    centre = np.clip(rows[:, :2], 0, np.nextafter(spec.input_px, 0))
    # The heatmap pixel is counted from the tile, not from the slide, where float noise could put it into a region that does
    # not look at this tile.
    stride = grid.heatmap_pixels_per_stride(spec.output_px)
    pixel = np.floor(centre * (spec.output_px / spec.input_px)) + np.array(tile) * stride
    pixel = np.minimum(pixel, np.array(grid.heatmap_frame(spec.output_px).shape) - 1)
    inside &= (pixel >= (box.y, box.x)).all(axis=1) & (pixel < (box.y1, box.x1)).all(axis=1)
    rows, l0_centre = rows[inside], l0_centre[inside]
    margin = rule.margin_px
    # Without a margin nothing is cut off, not even what is placed outside the tile.
    at_edge = ((rows[:, :2] < margin) | (rows[:, :2] >= spec.input_px - margin)).any(axis=1) & (margin > 0)
    return Objects(
        np.clip(l0_centre, 0, np.nextafter(l0_end, 0)),
        rows[:, 2].astype(np.int64),
        rows[:, 3],
        at_edge,
        l0_origin[:, None] + rows[:, 4:].reshape(len(rows), rule.vertices, 2) * l0_pixel,
    )


def resolve(objects: Objects, spec: ModelSpec, rule: DetectionRule, grid: TileGrid, tiles: NDArray[np.int32]) -> Objects:
    """What is left of all that was seen on a slide: each object once, by place from top to bottom, left to right.

    tiles  (n, 2) row, col of the tiles that the model answered
    """
    objects = objects.take(~objects.at_edge | ~_seen_whole(objects, spec, rule, grid, tiles))
    objects = objects.take(_order(objects, by_score=True))
    first, second = _same(objects, rule, grid.ratio)
    kept = objects.take(first_of_each(len(objects), first, second))
    return kept.take(_order(kept, by_score=False))


def _order(objects: Objects, by_score: bool) -> NDArray[np.intp]:
    """A total order by all that is known of objects: by place, or the best first and then by place."""
    outline = objects.outlines.reshape(len(objects), 2 * objects.outlines.shape[1]).T
    place = (objects.centres[:, 0], objects.centres[:, 1], objects.classes)
    keys = (-objects.scores, *place, *outline) if by_score else (*place, -objects.scores, *outline)
    return np.lexsort(keys[::-1])


def _seen_whole(
    objects: Objects, spec: ModelSpec, rule: DetectionRule, grid: TileGrid, tiles: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """(n,) bool: whether the centre lies inside the margin of any tile that was answered, and not just inside.

    At a margin's very edge two tiles may each take the object for the other's, as they place it a little differently.
    """
    margin = (rule.margin_px + min(SHIFT_PX, rule.margin_px / 2)) * grid.tile_px / spec.input_px
    answered = np.zeros(grid.shape, bool)
    answered[tiles[:, 0], tiles[:, 1]] = True
    place = objects.centres / grid.ratio
    last = np.floor((place - margin) / grid.stride_px).astype(np.int64)
    seen = np.zeros(len(objects), bool)
    reach = math.ceil(grid.tile_px / grid.stride_px)
    for dy in range(reach):
        for dx in range(reach):
            tile = last - (dy, dx)
            offset = place - tile * grid.stride_px
            inside = ((tile >= 0) & (tile < grid.shape) & (offset >= margin) & (offset < grid.tile_px - margin)).all(axis=1)
            seen[inside] |= answered[tile[inside, 0], tile[inside, 1]]
    return seen


def _same(objects: Objects, rule: DetectionRule, ratio: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (first, second) of objects, by number, that are one by the rule, the smaller number first."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    if rule.vertices == 0:
        reach = rule.nms_px * ratio
        for first, second in near_pairs(objects.centres, reach):
            distance = ((objects.centres[first] - objects.centres[second]) ** 2).sum(axis=1)
            found.append((first[distance < reach**2], second[distance < reach**2]))
    else:
        boxes = objects.boxes()
        middles, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        # Boxes that share anything have their middles no further apart than the longest side.
        for first, second in near_pairs(middles, float(sides.max(initial=0.0))):
            same = overlap_share(boxes[first], boxes[second]) >= rule.nms_iou
            found.append((first[same], second[same]))
    first, second = (np.concatenate(part) for part in zip(*found, strict=True))
    return np.minimum(first, second), np.maximum(first, second)


def overlap_share(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) intersection over union of boxes (n, 4) y0, x0, y1, x1; 0 for boxes without area."""
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    common = np.clip(sides, 0, None).prod(axis=1)
    union = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1) - common
    share = np.zeros(len(one))
    np.divide(common, union, out=share, where=union > 0)
    return share


def first_of_each(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(count,) bool: the objects kept when, from 0 on, each one kept puts out all that a pair names with it.

    Greedy suppression, but in rounds over arrays: whoever no undecided better one can put out is kept, with the same result.
    """
    undecided, kept = np.ones(count, bool), np.zeros(count, bool)
    while undecided.any():
        threatened = np.zeros(count, bool)
        threatened[second] = True
        safe = undecided & ~threatened
        kept |= safe
        undecided &= ~safe
        undecided[second[safe[first]]] = False
        open_pairs = undecided[first] & undecided[second]
        first, second = first[open_pairs], second[open_pairs]
    return kept


def near_pairs(places: NDArray[np.float64], reach: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of `places` (n, 2) no further apart than `reach` along both axes, each once, and some that are further.

    Places are sorted into squares of that side; a pair lies in the same square or in neighbouring ones.
    """
    if len(places) < 2 or not reach > 0:
        return
    square = np.floor((places - places.min(axis=0)) / reach).astype(np.int64) + 1
    width = int(square[:, 1].max()) + 2
    key = square[:, 0] * width + square[:, 1]
    order = np.argsort(key, kind="stable")
    key = key[order]
    at = np.arange(len(key))
    for step in (0, 1, width - 1, width, width + 1):
        start = at + 1 if step == 0 else np.searchsorted(key, key + step, "left")
        counts = np.searchsorted(key, key + step, "right") - start
        ends = np.cumsum(counts)
        cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) + PAIRS_AT_ONCE, PAIRS_AT_ONCE), "right")
        for low, high in pairwise(cuts.tolist()):
            some = counts[low:high]
            first = np.repeat(at[low:high], some)
            second = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some) + np.repeat(start[low:high], some)
            yield order[first], order[second]
