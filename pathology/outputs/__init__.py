"""What a slide's end writes, by the kind of its model's answers. Promise: equal regions give equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathology.outputs import detections, features, scores
from pathology.outputs.ended import Ended

WRITERS = {
    "classes": scores.write_output,
    "map": scores.write_output,
    "detections": detections.write_output,
    "features": features.write_output,
}


def write_output(folder: Path, ended: Ended) -> dict[str, Any]:
    """Write stores, tables and picture of a slide that ended into `folder`; what its record says of them, JSON values."""
    return WRITERS[ended.spec.output](folder, ended)
