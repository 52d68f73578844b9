"""What a run tells whoever started it: how each job ended, what happens meanwhile, and that it was asked to stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pathology.errors import PathologyError, Reason
from pathology.job import Job


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: `record` (its result.json), or a reason and what to do about it.

    before   it was finished by an earlier run, or by another that works on the same jobs
    """

    job: Job
    status: Literal["ok", "ok_empty", "partial", "failed"]
    record: dict[str, Any] | None = None
    reason: Reason | None = None
    message: str = ""
    before: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Something happened to a job.

    "planned"   `tiles` forward passes are to come, and the result may take `bytes`; Postponed may be raised
    "region"    `tiles` forward passes are done
    "in-place"  the slide is read where it lies although it was to be staged; `message` says why
    "waiting"   nothing is left but slides that other processes work on; `message` says which has this one
    """

    event: Literal["planned", "region", "in-place", "waiting"]
    job: Job
    tiles: int
    message: str = ""
    bytes: int = 0


class Postponed(Exception):
    """Raised by whoever is told that a job is "planned": it is not begun in this run, has no outcome, and others go on."""


class Interrupted(PathologyError):
    """The run was asked to stop; the same call goes on from here (exit code 75)."""
