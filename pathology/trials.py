"""What a run tries before its first slide: each model once, its batch size, and how the cores are best divided.

Promise: a model that does not work ends the run here, with its name; after this, jobs leave nothing open that decides values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pathology import worker
from pathology.errors import ModelError, PathologyError, first_line, one_line
from pathology.faults import used_up
from pathology.finish import MANIFEST
from pathology.job import Job
from pathology.model import ModelSpec
from pathology.models import load_spec
from pathology.schedule import Done
from pathology.together import groups, pixels_of

# Slides of which the first that opens is read from to measure how quick reading is.
SLIDES_TRIED = 4

# Runs a function as a task by itself and waits for its end.
Alone = Callable[..., Done]


def try_models(jobs: Sequence[Job], alone: Alone, processes: int) -> tuple[list[Job], list[tuple[int, ...]]]:
    """The jobs with batch sizes and threads as found, and the places of those that are run together, in order.

    processes  that share the machine's cores

    Raises ModelError where a model fails or ends its process.
    """
    jobs = list(jobs)
    shared: dict[tuple[object, ...], list[int]] = {}
    for place, job in enumerate(jobs):
        shared.setdefault(worker.model_of(job), []).append(place)
    alike: dict[tuple[object, ...], list[list[int]]] = {}
    specs: dict[tuple[object, ...], ModelSpec] = {}
    for places in shared.values():
        first = jobs[places[0]]
        spec: ModelSpec = _of_model(first, alone, worker.check_model)
        if not first.batch_size:
            size: int = _of_model(first, alone, worker.find_batch_size, processes)
            for place in places:
                jobs[place] = replace(jobs[place], batch_size=size)
        specs[worker.model_of(jobs[places[0]])] = spec
        alike.setdefault((first.device, first.threads, first.readers, pixels_of(spec)), []).append(places)
    spec_of = [specs[worker.model_of(job)] for job in jobs]
    for models in alike.values():
        first = jobs[models[0][0]]
        if not (first.threads and first.readers):
            _divide_cores(jobs, models, alone, processes)
    return jobs, groups(jobs, spec_of)


def needed(job: Job) -> bool:
    """Whether a job will read its slide. Where a result stands, `prepare` looks at it with a few reads in place."""
    return job.overwrite or not (job.result_folder(load_spec(job.model).name) / MANIFEST).exists()


def _of_model(job: Job, alone: Alone, function: Callable[..., object], *arguments: object) -> Any:
    """What `function` says of the job's model. ModelError where it ends its process or fails."""
    done = alone(function, replace(job, stage=None), *arguments)
    if done.died:
        why = one_line(done.error) if done.error is not None else "no more is known"
        raise ModelError(f"model {job.model} ended its worker process when it was tried ({why}); try it on its own first")
    _raise_model_error(job, done)
    return done.value


def _divide_cores(jobs: list[Job], models: list[list[int]], alone: Alone, processes: int) -> None:
    """Give the jobs of each of `models`, which read alike, their threads. Models whose results all stand do not count."""
    computed = [places for places in models if len(models) == 1 or any(needed(jobs[place]) for place in places)] or models
    first = [replace(jobs[places[0]], stage=None) for places in computed]
    tried = [replace(jobs[place], stage=None) for place in computed[0][1:SLIDES_TRIED]]
    done = alone(worker.divide_cores, (*first, *tried), processes)
    if done.died:  # a slide's fault; whose, will be seen when its turn comes
        done = alone(worker.divide_cores, tuple(first), processes, False)
    _raise_model_error(first[0], done)
    splits = dict(zip(map(worker.model_of, first), done.value, strict=False))
    for places in models:
        split = splits.get(worker.model_of(jobs[places[0]]), done.value[0])
        for place in places:
            jobs[place] = replace(jobs[place], readers=split.readers, threads=split.threads)


def _raise_model_error(job: Job, done: Done) -> None:
    """Raise what a trial of the job's model ended with, if it is an error."""
    if isinstance(done.error, PathologyError):
        raise done.error
    if (fault := used_up(done.error)) is not None:
        raise fault from done.error
    if done.error is not None:
        raise ModelError(f"model {job.model} failed on made-up tiles: {first_line(done.error)}") from done.error
