"""Whose turn it is: the groups of a run's jobs in order, each once its slide is this process's.

Promise: a slide that another process works on is put aside, and comes again until it is finished, by whomever; a slide is let
go as soon as all its jobs have ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pathology.job import Job
from pathology.lease import Leases, Owner

# Slides that others have are looked at again every so often, once nothing else is left to begin.
LOOK_S = 2.0

# Jobs that are run together, by their places in the run.
Group = tuple[int, ...]


class Turns:
    """The groups that have not begun. A slide is known by the folder of all its work, `Job.work_place`.

    waits_for  is told of a job whose slide is waited for while nothing else is to be done, and of who has it
    """

    def __init__(self, leases: Leases, jobs: Sequence[Job], waits_for: Callable[[int, Owner], None]) -> None:
        self._leases = leases
        self._waits_for = waits_for
        self._slide = [job.work_place for job in jobs]
        self._open: dict[Path, set[int]] = {}  # jobs that have not ended
        for place, slide in enumerate(self._slide):
            self._open.setdefault(slide, set()).add(place)
        self._coming: deque[Group] = deque()
        self._aside: deque[Group] = deque()
        self._begun: dict[Path, list[Group]] = {}
        self._look_at = 0.0
        self._first_round = True
        self._told: set[tuple[Path, Owner]] = set()

    def queue(self, groups: Iterable[Group]) -> None:
        """Let these come, in order."""
        self._coming.extend(groups)

    @property
    def over(self) -> bool:
        """Whether no group is left to begin, now or later."""
        return not self._coming and not self._aside

    def next(self) -> Group | None:
        """The group to be begun next; None for none now."""
        if not self._coming and self._aside and time.monotonic() >= self._look_at:
            self._coming, self._aside = self._aside, self._coming
            self._first_round = False
            self._look_at = time.monotonic() + LOOK_S
        return self._coming[0] if self._coming else None

    def begin(self, idle: bool) -> tuple[Group, str] | None:
        """The next group and the token under which its slide was claimed. None: another process has it, and it was put aside.

        idle  nothing else is to be done
        """
        group = self._coming.popleft()
        slide = self._slide[group[0]]
        owner = self._leases.claim(slide)
        if owner is None:
            self._begun.setdefault(slide, []).append(group)
            return group, self._leases.token(slide)
        self._aside.append(group)
        if idle and not self._first_round and (slide, owner) not in self._told:
            self._told.add((slide, owner))
            self._waits_for(group[0], owner)
        return None

    def claim_ahead(self, job: Job) -> bool:
        """Whether the job's slide is this process's, claimed before its turn, from whatever thread."""
        return self._leases.claim(job.work_place) is None

    def owns(self, job: Job) -> bool:
        """Whether a job's slide is still this process's, as it was when the job began: under the token that it has."""
        slide = job.work_place
        return self._leases.owns(slide) and self._leases.token(slide) == job.owner

    def beside(self, place: int) -> tuple[int, ...]:
        """The jobs of the same slide that have not ended."""
        return tuple(sorted(self._open[self._slide[place]]))

    def again(self, place: int) -> None:
        """The job's slide was lost to another process, and no task of it runs any more: what has begun of it comes again."""
        self._aside.extend(self._begun.pop(self._slide[place], []))

    def end(self, place: int) -> None:
        """A job has ended, and no task of it runs; with the last one its slide is let go."""
        slide = self._slide[place]
        self._open[slide].discard(place)
        if not self._open[slide]:
            self._leases.release(slide)
