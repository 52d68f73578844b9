"""What a run still has to do: its jobs on their way, those of them that read together, and the tasks that are handed out."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from pathology.job import Job
from pathology.slide_worker import Prepared


@dataclass(slots=True)
class State:
    """One job on its way.

    todo   regions not yet handed out
    tiles  forward passes per region
    ended  it has an outcome
    lost   another process has taken its slide over: what is still under way here is for nothing
    """

    job: Job
    todo: set[int] = field(default_factory=set)
    tiles: dict[int, int] = field(default_factory=dict)
    running: int = 0
    ended: bool = False
    lost: bool = False


@dataclass(slots=True)
class Group:
    """Jobs that read alike, so that their regions are read together: those that lie in one place.

    places  of the jobs in the run
    begun   what each was prepared as, by its place; without those that failed or were finished before
    left    how many are not yet prepared
    reads   regions to hand out, each as (place of the job, region) of all that are read together
    """

    places: tuple[int, ...]
    left: int
    begun: dict[int, Prepared] = field(default_factory=dict)
    reads: deque[tuple[tuple[int, int], ...]] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Task:
    """parts: (place of the job in the run, region); several where slides are begun, or regions read, for several models.

    alone   its worker died, so it runs while nothing else does
    deaths  how often it died in a way that may be the slide's doing
    """

    kind: Literal["prepare", "region", "finish"]
    parts: tuple[tuple[int, int], ...]
    alone: bool = False
    deaths: int = 0
