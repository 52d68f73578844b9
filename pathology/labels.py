"""The label image of a dense map: for every pixel the number of the likeliest class. No files.

Promise: the label of a pixel, on every level of the pyramid, is that of the level's scores before they were rounded to a dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathology.encoding import AT_ONCE
from pathology.export.colormap import class_colors
from pathology.geometry import HeatmapFrame
from pathology.model import ModelSpec
from pathology.pyramid import NGFF_VERSION, Level, transforms

# Its name in the store's folder `labels`.
LABELS_NAME = "classes"


def has_labels(spec: ModelSpec) -> bool:
    """Whether a model's map says which class a pixel is: probabilities do, values in any unit don't."""
    return spec.output == "map" and spec.scores == "probability"


def label_dtype(spec: ModelSpec) -> Literal["uint8", "uint16"]:
    return "uint8" if len(spec.classes) < 2**8 else "uint16"


def label_block(scores: NDArray[np.float32], spec: ModelSpec) -> NDArray[Any]:
    """(C, h, w) scores -> (h, w): 1 + the number of the likeliest class, the first of equals; 0 where nothing was predicted.

    Of a single class: 1 where it reaches its threshold, 0 elsewhere.
    """
    labels: NDArray[Any] = np.empty(scores.shape[1:], label_dtype(spec))
    rows = max(1, AT_ONCE // max(1, scores[:, :1].size))
    for y in range(0, scores.shape[1], rows):
        labels[y : y + rows] = _labels(scores[:, y : y + rows], spec)
    return labels


def _labels(scores: NDArray[np.float32], spec: ModelSpec) -> NDArray[Any]:
    if len(spec.classes) == 1:
        present: NDArray[Any] = (scores[0] >= np.float32(spec.threshold[0])).astype(label_dtype(spec))
        return present
    missing = np.isnan(scores[0])
    likeliest: NDArray[Any] = (np.argmax(np.where(missing, np.float32(0), scores), axis=0) + 1).astype(label_dtype(spec))
    likeliest[missing] = 0
    return likeliest


def label_attributes(frame: HeatmapFrame, spec: ModelSpec, levels: Sequence[Level]) -> dict[str, Any]:
    """The `ome` attributes of the label image, in the places of the heatmap's levels, with names and colours of the classes."""
    colors = class_colors(spec.colors, len(spec.classes))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")]
    return {
        "version": NGFF_VERSION,
        "multiscales": [{"name": LABELS_NAME, "axes": axes, "datasets": transforms(frame, len(levels), 0)}],
        "image-label": {
            "colors": [{"label-value": i + 1, "rgba": [*color, 255]} for i, color in enumerate(colors)],
            "properties": [{"label-value": i + 1, "class": name} for i, name in enumerate(spec.classes)],
            "source": {"image": "../../"},
        },
    }
