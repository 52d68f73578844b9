"""Results in the forms that people and other tools open. Promise: equal results give equal bytes."""

from __future__ import annotations

from pathology.model import Output

KINDS = ("csv", "qupath", "png", "ngff-0.4")


def can_export(output: Output, kind: str) -> bool:
    """Whether results of a model with such an `output` can be written as `kind`."""
    return kind in {"map": ("png", "ngff-0.4"), "features": ("csv",)}.get(output, KINDS)
