"""Whole-slide inference: slides in, exact whole-slide heatmaps out.

    import pathology

    with pathology.open_slide("slide.svs") as slide:
        tile = slide.read_mpp(pathology.Box(y=0, x=0, height=224, width=224), mpp=0.5)

Promise: importing this package imports none of the heavy libraries; each comes with the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pathology.errors import EnvironmentFault, ModelError, PathologyError, Reason, SlideError, UsageError

if TYPE_CHECKING:
    from pathology.features import open_features as open_features
    from pathology.geometry import Box as Box
    from pathology.integrity import verify as verify
    from pathology.job import Job as Job
    from pathology.models import load_model as load_model
    from pathology.plan import make_plan as make_plan
    from pathology.readers import open_slide as open_slide
    from pathology.result import open_heatmap as open_heatmap
    from pathology.runner import run as run

_WHERE = {
    "Box": "geometry",
    "Job": "job",
    "load_model": "models",
    "make_plan": "plan",
    "open_features": "features",
    "open_heatmap": "result",
    "open_slide": "readers",
    "run": "runner",
    "verify": "integrity",
}

__all__ = [  # noqa: RUF022  # what a user calls first, then what may go wrong
    "Box",
    "Job",
    "load_model",
    "make_plan",
    "open_features",
    "open_heatmap",
    "open_slide",
    "run",
    "verify",
    "EnvironmentFault",
    "ModelError",
    "PathologyError",
    "Reason",
    "SlideError",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'pathology' has no attribute {name!r}")
    value = getattr(import_module(f"pathology.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
