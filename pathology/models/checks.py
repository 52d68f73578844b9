"""What a model answers is checked at the door. Promise: a model that breaks its own card is refused before it colours a map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pathology.errors import ModelError, PathologyError, one_line
from pathology.model import Model, ModelSpec


def check_scores(spec: ModelSpec, batch: int, scores: object) -> None:
    """Raise ModelError unless `scores` is the float32 array (batch, classes, output_px, output_px) that the card promises."""
    expected = (batch, len(spec.classes), spec.output_px, spec.output_px)
    if not isinstance(scores, np.ndarray):
        raise ModelError(
            f"model {spec.name} answered a {type(scores).__name__}; a model answers a numpy array, float32 {expected}"
        )
    if scores.shape != expected:
        raise ModelError(
            f"model {spec.name} answered shape {scores.shape}, its card says {expected}; correct the card or the model"
        )
    if scores.dtype != np.float32:
        raise ModelError(f"model {spec.name} answered {scores.dtype}; a model answers float32: convert its answer")


def warm_up(model: Model, batch_size: int) -> None:
    """Run one batch of made-up tiles and raise ModelError where the answer breaks the card.

    Looks at shape, class count, type, NaN and infinity, and for probabilities at the range 0..1. Half of the tiles are
    noise, half are plain greys, so that a division by a tile's own contrast shows as well.
    """
    spec = model.spec
    try:
        scores = model(made_up_tiles(batch_size, spec.input_px))
    except PathologyError:
        raise
    except Exception as error:  # a model's own code
        raise ModelError(f"model {spec.name} failed on made-up tiles: {type(error).__name__}: {one_line(error)}") from error
    check_scores(spec, batch_size, scores)
    if not np.isfinite(scores).all():
        raise ModelError(f"model {spec.name} answered NaN or infinity for a made-up tile; correct the model")
    if spec.scores == "probability" and (scores.min() < 0 or scores.max() > 1):
        raise ModelError(
            f"model {spec.name} answered {scores.min():g} to {scores.max():g}, but its card says probabilities; "
            'apply its activation, or state scores="value"'
        )


def made_up_tiles(count: int, side: int) -> NDArray[np.uint8]:
    """(count, side, side, 3) uint8: noise and plain greys in turn, white among them; the same every time."""
    tiles = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    tiles[1::2] = np.linspace(255, 0, max(1, count // 2)).astype(np.uint8)[:, None, None, None]
    return tiles
