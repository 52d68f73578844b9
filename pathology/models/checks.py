"""What a model answers is checked at the door. Promise: a model that breaks its own card is refused before it colours a map."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pathology.device import poisoned
from pathology.durable import DISK_ERRORS
from pathology.errors import ModelError, PathologyError, one_line
from pathology.faults import used_up
from pathology.model import Model, ModelSpec, answer
from pathology.stain import made_up_stains


@contextmanager
def raised_by_model(spec: ModelSpec) -> Iterator[None]:
    """Turn whatever a model's own code raises inside into a ModelError; what the machine does to it stays as it is.

    Not only Exception: a native library's panic or a call of `sys.exit` would end the thread it is in, unheard. In the main
    thread these two are the caller's, who was interrupted.
    """
    try:
        yield
    except (PathologyError, MemoryError):
        raise
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        if interrupted and threading.current_thread() is threading.main_thread():
            raise
        if (isinstance(error, OSError) and error.errno in DISK_ERRORS) or used_up(error) is not None or poisoned(error):
            raise
        raise ModelError(f"model {spec.name} raised {type(error).__name__}: {one_line(error)}") from error


def check_scores(spec: ModelSpec, batch: int, scores: object) -> None:
    """Raise ModelError unless `scores` is the float32 array that the card promises: `spec.answer_shape(batch)`."""
    expected = spec.answer_shape(batch)
    if not isinstance(scores, np.ndarray):
        raise ModelError(
            f"model {spec.name} answered a {type(scores).__name__}; a model answers a numpy array, float32 {expected}"
        )
    fewer = spec.detections is not None and scores.ndim == 3 and scores.shape[1] < expected[1]
    if scores.shape != ((batch, scores.shape[1], *expected[2:]) if fewer else expected):
        raise ModelError(
            f"model {spec.name} answered shape {scores.shape}, its card says {expected}; correct the card or the model"
        )
    if scores.dtype != np.float32:
        raise ModelError(f"model {spec.name} answered {scores.dtype}; a model answers float32: convert its answer")


def unsound(spec: ModelSpec, answer: NDArray[np.float32]) -> str:
    """What in answers must not reach a result, "" if nothing: NaN, infinity, and of a detector unknown classes.

    Rows of NaN are no objects.
    """
    if spec.detections is None:
        return "" if np.isfinite(answer).all() else "NaN or infinity"
    rows = answer[~np.isnan(answer).all(axis=-1)]
    if not np.isfinite(rows).all():
        return "NaN or infinity"
    if not np.isin(rows[:, 2], np.arange(len(spec.classes))).all():
        return f"a class that is none of 0 to {len(spec.classes) - 1}"
    if (np.abs(rows[:, 4:] - spec.input_px / 2) > 1.5 * spec.input_px).any():
        return "an outline that reaches more than a tile beyond its tile"
    return ""


def crowded(spec: ModelSpec, answer: NDArray[np.float32]) -> str:
    """Whether a detector's answer for one tile is as full as its card allows, so that objects may be missing; "" if not."""
    most = 0 if spec.detections is None else spec.detections.most
    full = most and int((~np.isnan(answer).all(axis=1)).sum()) >= most
    return f"{most} objects, as many as its card allows (`most`)," if full else ""


def warm_up(model: Model, batch_size: int) -> None:
    """Run one batch of made-up tiles and raise ModelError where the answer breaks the card.

    Looks at shape, class count, type, NaN and infinity, and for probabilities at the range 0..1. Half of the tiles are
    noise, half are plain greys, so that a division by a tile's own contrast shows as well.
    """
    spec = model.spec
    try:
        scores = answer(model, *made_up_batch(spec, batch_size))
    except PathologyError:
        raise
    except Exception as error:  # a model's own code
        if (fault := used_up(error)) is not None:
            raise fault from error
        raise ModelError(f"model {spec.name} failed on made-up tiles: {type(error).__name__}: {one_line(error)}") from error
    check_scores(spec, batch_size, scores)
    if what := unsound(spec, scores):
        raise ModelError(f"model {spec.name} answered {what} for a made-up tile; correct the model")
    if spec.detections is None and spec.scores == "probability" and (scores.min() < 0 or scores.max() > 1):
        raise ModelError(
            f"model {spec.name} answered {scores.min():g} to {scores.max():g}, but its card says probabilities; "
            'apply its activation, or state scores="value"'
        )


def made_up_batch(spec: ModelSpec, count: int) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Made-up tiles for a model, and the stains of a reference slide where it takes such."""
    return made_up_tiles(count, spec.input_px), made_up_stains(spec.stain, count) if spec.stain else None


def made_up_tiles(count: int, side: int) -> NDArray[np.uint8]:
    """(count, side, side, 3) uint8: noise and plain greys in turn, white among them; the same every time."""
    tiles = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    tiles[1::2] = np.linspace(255, 0, max(1, count // 2)).astype(np.uint8)[:, None, None, None]
    return tiles
