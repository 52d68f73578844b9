"""From masks to polygons along pixel edges.

Promise: the polygons cover exactly the mask's pixels, and every ring is simple: it meets no corner twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathology.components import components

# (n, 2) int64 corners y, x in mask px, not closed, n >= 4.
Ring = NDArray[np.int64]


def polygons(mask: NDArray[np.bool_]) -> list[tuple[Ring, ...]]:
    """One polygon per component (edges connect, corners don't): the outer ring, then its holes; in row-major order.

    Outer rings run counterclockwise and holes clockwise where x is drawn to the right and y upwards, as RFC 7946 asks.
    """
    rings = _rings(mask)
    if not rings:
        return []
    # The pixel on the left hand of a ring's first edge is set: it tells to which component the ring belongs.
    y, x = np.array([ring[0] for ring in rings]).T
    dy, dx = np.sign(np.array([ring[1] - ring[0] for ring in rings])).T
    owner = components(mask, diagonal=False).at(y - (dy + dx < 0), x - (dx - dy < 0))
    found: dict[int, list[Ring]] = {}
    for ring, component in zip(rings, owner.tolist(), strict=True):
        group = found.setdefault(component, [])
        if signed_area(ring) > 0:
            group.insert(0, ring)
        else:
            group.append(ring)
    return [tuple(found[component]) for component in sorted(found)]


def signed_area(ring: Ring) -> float:
    """Area in px by the shoelace formula; positive for outer rings, negative for holes."""
    y, x = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _rings(mask: NDArray[np.bool_]) -> list[Ring]:
    """All boundary rings, with the mask's set pixels on the left hand; a ring never meets a corner twice."""
    nodes = _corners(np.pad(mask, 1))
    y, x = nodes.y.tolist(), nodes.x.tolist()
    following, crossing = nodes.following.tolist(), nodes.crossing.tolist()
    seen = bytearray(len(y))
    rings: list[Ring] = []
    for start in range(len(y)):
        path: list[tuple[int, int]] = []
        crossed: dict[tuple[int, int], int] = {}  # corner where two set pixels touch -> its place in the path
        node = start
        while not seen[node]:
            seen[node] = 1
            corner = (y[node], x[node])
            if crossing[node]:
                if corner in crossed:  # the path closed a loop: that is a ring of its own
                    at = crossed[corner]
                    rings.append(np.array(path[at:], np.int64))
                    for left in path[at + 1 :]:
                        crossed.pop(left, None)
                    del path[at:]
                crossed[corner] = len(path)
            path.append(corner)
            node = following[node]
        if path:
            rings.append(np.array(path, np.int64))
    return rings


@dataclass(frozen=True, slots=True, eq=False)
class _Nodes:
    """Corners of the boundary in row-major order. Where two set pixels touch by a corner only, each has a node there.

    y, x       (n,) int64 corner in mask px
    following  (n,) int64 the next node along the boundary
    crossing   (n,) bool: one of two nodes at its corner
    """

    y: NDArray[np.int64]
    x: NDArray[np.int64]
    following: NDArray[np.int64]
    crossing: NDArray[np.bool_]


def _corners(padded: NDArray[np.bool_]) -> _Nodes:
    """The boundary's corners of a mask with an empty frame, and how they are linked."""
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]  # the four pixels around each corner
    y, x = np.nonzero(((a != b) | (c != d)) & ((a != c) | (b != d)))
    a, b, c, d = a[y, x], b[y, x], c[y, x], d[y, x]
    crossing = (a == d) & (b == c)
    # A node has one horizontal and one vertical edge, both of the same set pixel at a crossing: its left node comes first.
    nodes = np.repeat(np.arange(len(y)), np.where(crossing, 2, 1))
    second = np.append(False, nodes[1:] == nodes[:-1])
    y, x, crossing = y[nodes], x[nodes], crossing[nodes]
    a, b, c, d = a[nodes], b[nodes], c[nodes], d[nodes]
    right = np.where(crossing, second, b != d)
    down = np.where(crossing, a == second, c != d)
    leaves_sideways = np.where(right, d & ~b, a & ~c)
    # Along a row of corners edges join the 1st and 2nd node, the 3rd and 4th, and so on; along a column likewise.
    order = np.arange(len(y))
    sideways = order ^ 1
    columns = np.lexsort((down, y, x))
    upright = np.empty_like(order)
    upright[columns] = columns[sideways]
    return _Nodes(y, x, np.where(leaves_sideways, sideways, upright), crossing)
