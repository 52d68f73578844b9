"""Which tiles a classifier in half precision leaves in doubt: they are computed again in float32, which decides their class.

Promise: a tile whose scores half precision moves by less than `DOUBT` is of the class that float32 gives it. What is computed
again follows from a tile's own scores, so a tile's result still depends on nothing but slide, position and model.
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

# How near to a threshold, or to another class's, a probability is in doubt. Ten times the mean by which bf16 moved those of
# EfficientNet-Lite0 on real tiles (benchmarks/agreement.py), where the tiles that changed sides lay within half of it; fp16
# rounds eight times as finely.
DOUBT: Mapping[Precision, float] = {"bf16": 0.05, "fp16": 0.01}

# Most tiles of a float32 batch: a region has a few of them, and what is missing from its last batch is computed for nothing.
BATCH = 32


def doubt(job: Job, spec: ModelSpec) -> float:
    """How near to a threshold the job's tiles are computed again; 0: none are, as where its card rules out fp32."""
    width = DOUBT.get(job.precision, 0.0) if spec.output == "classes" and spec.scores == "probability" else 0.0
    return width if width and _allows_fp32(job.model) else 0.0


def exact(job: Job) -> Job:
    """`job` as its doubtful tiles are computed."""
    return replace(job, precision="fp32", compile=False, batch_size=min(job.batch_size, BATCH))


def models(job: Job, spec: ModelSpec) -> tuple[Job, ...]:
    """The jobs that name all models which this one needs loaded."""
    return (job, exact(job)) if doubt(job, spec) else (job,)


@functools.cache
def _allows_fp32(model: str) -> bool:
    """By its card, which like the model itself is read once a process."""
    return "fp32" in precisions(model)


def doubtful(scores: NDArray[np.float32], threshold: tuple[float, ...], width: float) -> bool:
    """Whether rounding may decide the class of a tile by its (C,) probabilities: near a threshold, or the best two alike."""
    if (np.abs(scores - np.asarray(threshold, np.float32)) < width).any():
        return True
    first, *others = np.sort(scores)[::-1]
    return bool(others) and bool(first - others[0] < width)
