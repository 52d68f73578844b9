"""What `pathology verify` says of a file that differs. Promise: the same in words and in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from pathology.integrity import Damage, Difference


def line(difference: Difference) -> str:
    """One JSON object."""
    damage = [asdict(one) for one in difference.damage]
    return json.dumps({"path": str(difference.path), "what": difference.what, "damage": damage})


def lines(difference: Difference) -> Iterator[str]:
    """A line for the file and one for each of its chunks that is damaged."""
    yield f"{difference.what:<11} {difference.path}"
    for damage in difference.damage:
        yield f"{'':<11} {words(damage)}"


def words(damage: Damage) -> str:
    """ "level 0, chunk (0, 1, 2): slide x 512 to 1024, y 0 to 512 px"."""
    what = damage.array if damage.level is None else f"level {damage.level} of {damage.array.rpartition('/')[0]}"
    chunk = "all chunks of the shard" if damage.chunk is None else f"chunk {damage.chunk}"
    if damage.box is None:
        return f"{what}, {chunk}: rows {damage.first[0]} to {damage.end[0]}"
    y, x, height, width = damage.box
    return f"{what}, {chunk}: slide x {x:.6g} to {x + width:.6g}, y {y:.6g} to {y + height:.6g} px"
