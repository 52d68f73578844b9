"""A run: all regions of all slides through one bounded window of tasks.

Promise: one slide's failure ends that slide alone; a fault of the machine ends the run and fails no slide; and after either,
or a crash, the same call goes on where this one stopped. Any number of processes may run the same jobs: each slide is worked on
by one, and what the others do is waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext

from pathology.errors import UsageError
from pathology.job import Job
from pathology.lease import LEASE_S, Leases
from pathology.outcome import Outcome, Progress
from pathology.schedule import open_tasks, outside
from pathology.staging import open_stage
from pathology.watch import Limits
from pathology.window import Window


def run(
    jobs: Sequence[Job],
    scheduler: str = "processes",
    *,
    devices: int = 1,
    dashboard: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    known: Callable[[Job], Outcome | None] = lambda _: None,
    lease_s: float = LEASE_S,
    limits: Limits | None = None,
    preflight: Callable[[Job], Outcome | None] = lambda _: None,
) -> Generator[Outcome, None, None]:
    """Compute all jobs; yields an outcome for each as it ends.

    scheduler  "sync" (the reference), "threads", "processes" (one that infers and readers, for each device),
               "tls://HOST:PORT", or "tcp://127.0.0.1:PORT"
    stop       set it to end early: running regions are let end, then Interrupted is raised
    known      the failure of a job that stands, if another process or run has met one; asked once the slide is this process's
    preflight  the failure that a look at a job's slide has shown; asked for all jobs before the first region
    lease_s    after so long without a sign of life from another process that has a slide, it is taken over
    limits     in time and memory, of the worker processes of "processes"

    Raises ModelError before the first slide if a model does not work, UsageError where results would be mixed,
    EnvironmentFault where output, disk, device or the slides' share fail.
    """
    if outside(scheduler) and any(job.stage for job in jobs):
        message = f"--stage copies to a disk of this machine, which workers of {scheduler} may not see; leave it out"
        raise UsageError(message)
    processes = devices if scheduler == "processes" else 1
    with closing(Leases(lease_s)) as leases, open_stage(jobs) or nullcontext() as stage:
        tasks = open_tasks(scheduler, devices, dashboard, limits)
        try:
            window = Window(
                jobs, tasks, progress or (lambda _: None), stop or threading.Event(), processes, stage, leases, known, preflight
            )
            yield from window.outcomes()
        finally:
            tasks.close()
