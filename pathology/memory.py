"""How much memory a run takes for a plan, for `check` to print.

Promise: what the code holds is arithmetic; what libraries and the model take is measured, not guessed.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from pathology import decide
from pathology.batches import STRIP_PX, chunk_tiles, tiles_ahead
from pathology.cores import reading_processes
from pathology.device import set_threads
from pathology.errors import ModelError
from pathology.job import Job
from pathology.model import ModelSpec
from pathology.models import load_model, load_spec
from pathology.models.checks import warm_up
from pathology.models.pool import pooled
from pathology.plan import REGIONS_AT_ONCE, Plan, region_bytes, regions_at_once
from pathology.predictor import IN_FLIGHT
from pathology.readers.opened import CACHE_BYTES
from pathology.together import tiles_handed

# Of a job's memory, for decoded tiles of the slides that are open: 1 / CACHE_SHARE.
CACHE_SHARE = 8

# The command itself and the process for slides while it waits, as measured (PSS): mostly Python, Dask, numpy and zarr.
OTHER_PROCESSES_BYTES = 125 * 10**6
# What that process takes for a slide's beginning and end, and freed memory that it keeps, as measured.
SLIDE_BYTES = 150 * 10**6
# A further process for slides, beside the tiles that it keeps, as measured.
READING_PROCESS_BYTES = 100 * 10**6


def model_peak(jobs: Sequence[Job], modules: Sequence[str], variables: Mapping[str, str]) -> int:
    """Most bytes of a process that imports `modules`, loads the models of all jobs and runs one batch of made-up tiles of each.

    Measured in a process of its own that begins with `variables` (Linux). Raises ModelError for a model that does not load or
    breaks its card.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            with _set(variables):
                peak = pool.submit(_own_peak, tuple(jobs), tuple(modules))
            return peak.result()
        except BrokenProcessPool as error:
            named = ", ".join(job.model for job in jobs)
            raise ModelError(f"model {named} ended the process that tried it; try it on its own first") from error


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """For processes started meanwhile: a spawned one cannot be given any."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _own_peak(jobs: Sequence[Job], modules: Sequence[str]) -> int:
    for module in modules:
        importlib.import_module(module)
    models = []
    for job in jobs:
        if job.threads:
            set_threads(job.threads)
        for needed in decide.models(job, load_spec(job.model)):
            models.append(pooled(load_model(job.model, job.device, needed.precision, needed.compile), job.heatmap_mpp))
            warm_up(models[-1], needed.batch_size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_bound(planned: Sequence[tuple[Plan, ModelSpec, Job]], model_peak: int, cores: int) -> int:
    """Memory of the whole command on one device and so many cores: all its processes, shared pages counted once.

    planned  what is run together at one slide: plan, card and job of each model
    """
    job = planned[0][2]
    readers, processes = job.readers or cores, reading_processes(cores)
    plans = [(plan, spec, job.batch_size) for plan, spec, job in planned]
    at_once = REGIONS_AT_ONCE if any(plan.output_px > 1 for plan, _, _ in plans) else regions_at_once(cores)
    regions = min(at_once, max(len(plan.regions) for plan, _, _ in plans))
    buffers = memory_bound(plans, readers=readers, regions=regions, processes=processes)
    buffers += sum(decide.exact(j).batch_size * slot_bytes(spec, regions) for _, spec, j in planned if decide.doubt(j, spec))
    # A batch of `model_peak` is among those in `buffers`; of which model it is, is not known.
    tried = min(batch_size * (_tile_bytes(spec) + _answer_bytes(spec)) for _, spec, batch_size in plans)
    cache = min(CACHE_BYTES, job.memory // CACHE_SHARE)
    slides = SLIDE_BYTES + processes * cache + (processes - 1) * READING_PROCESS_BYTES
    return OTHER_PROCESSES_BYTES + slides + max(0, model_peak - tried) + buffers


def memory_bound(
    plans: Sequence[tuple[Plan, ModelSpec, int]], *, readers: int, regions: int = REGIONS_AT_ONCE, processes: int = 1
) -> int:
    """Most bytes that one worker holds for `regions` regions at once, beyond libraries, the models and decoded tiles.

    plans      of models whose regions are read together, each with its card and batch size
    readers    threads that read; `processes`: that they are divided among

    Canvases, each with the bands on their way to disk; the batches being filled and computed; answers to as many tiles as a
    region hands in before it takes them (two batches); tiles read ahead, and those on their way to several models; and for each
    reader a source window, or a strip of several, as RGB with mask, and as Pillow's four bytes a pixel.
    """
    first, spec, _ = plans[0]
    window = (first.grid.l0_tile + 8) ** 2
    read = max(window, min(STRIP_PX, chunk_tiles(spec.input_px) * window)) * (3 + 1 + 4)
    ahead = tiles_ahead(spec.input_px, math.ceil(readers / processes))
    handed = tiles_handed(spec.input_px) if len(plans) > 1 else 0
    bound = regions * (ahead + handed) * _tile_bytes(spec) + readers * read
    for plan, spec, batch_size in plans:
        bound += regions * region_bytes(plan, spec.channels) + batch_size * slot_bytes(spec, regions)
    return int(bound)


def slot_bytes(spec: ModelSpec, regions: int = REGIONS_AT_ONCE) -> int:
    """What each tile of a batch takes: in the batches being filled and computed, and in answers not yet taken."""
    return (1 + IN_FLIGHT) * _tile_bytes(spec) + 2 * regions * _answer_bytes(spec)


def _tile_bytes(spec: ModelSpec) -> int:
    return spec.input_px**2 * 3


def _answer_bytes(spec: ModelSpec) -> int:
    return math.prod(spec.answer_shape(1)) * 4
