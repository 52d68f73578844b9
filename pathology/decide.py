"""Which tiles a classifier in half precision leaves in doubt: they are computed again in float32, which decides their class.

Promise: a tile keeps the class that float32 gives it as long as half precision moves none of its log-odds, of a class against
all others or of one class against another, by `DOUBT`. What is computed again follows from a tile's own scores, so a tile's
result still depends on nothing but slide, position and model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pathology.job import Job, Precision
from pathology.model import ModelSpec
from pathology.models import precisions

# How near log-odds are to a threshold's, or to another class's, to be in doubt: 0.2 is 0.05 about a probability of a half.
# bf16 moved EfficientNet-Lite0's by a tenth of that on the mean (benchmarks/agreement.py), and the tiles that changed sides lay
# within half of it; fp16 rounds eight times as finely.
DOUBT: Mapping[Precision, float] = {"bf16": 0.2, "fp16": 0.025}

# Most tiles of a float32 batch on a device of its own: a region has a few of them, and what is missing from its last batch is
# computed for nothing.
BATCH = 32

# Probabilities that add up to one, but for rounding, are of classes that exclude each other.
ROUNDING = 1e-3
# Nearer to 0 or 1 a probability tells no more.
LEAST = 2.0**-24


def doubt(job: Job, spec: ModelSpec) -> float:
    """How near log-odds are in doubt for the job's tiles; 0: none are computed again, as where its card rules out fp32."""
    width = DOUBT.get(job.precision, 0.0) if spec.output == "classes" and spec.scores == "probability" else 0.0
    return width if width and _allows_fp32(job.model) else 0.0


def exact(job: Job) -> Job:
    """`job` as its doubtful tiles are computed."""
    batch_size = job.batch_size if job.device == "cpu" else min(job.batch_size, BATCH)
    return replace(job, precision="fp32", compile=False, batch_size=batch_size)


def models(job: Job, spec: ModelSpec) -> tuple[Job, ...]:
    """The jobs that name all models which this one needs loaded."""
    return (job, exact(job)) if doubt(job, spec) else (job,)


@functools.cache
def _allows_fp32(model: str) -> bool:
    """By its card, which like the model itself is read once a process."""
    return "fp32" in precisions(model)


def doubtful(scores: NDArray[np.float32], threshold: tuple[float, ...], width: float) -> NDArray[np.bool_]:
    """(n,) bool: whether rounding may decide the class of a tile with these (n, C) probabilities.

    It may where log-odds are nearer than `width` to a threshold's; and, where classes exclude each other or the best of them is
    present, where the best two are. A threshold of 0 is always reached.
    """
    p = np.clip(scores.astype(np.float64), LEAST, 1 - LEAST)
    t = np.clip(np.asarray(threshold, np.float64), LEAST, 1 - LEAST)
    beyond = np.log(p / (1 - p)) - np.log(t / (1 - t))
    found: NDArray[np.bool_] = ((np.abs(beyond) < width) & (np.asarray(threshold) > 0)).any(axis=1)
    if scores.shape[1] > 1:
        second, best = np.sort(p, axis=1)[:, -2:].T
        matters = (np.abs(scores.sum(axis=1, dtype=np.float64) - 1) < ROUNDING) | (beyond >= 0).any(axis=1)
        found |= matters & (np.log(best / second) < width)
    return found
