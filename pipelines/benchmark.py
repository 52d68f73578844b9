"""How quick a model is on this machine: reading alone, the model alone, and both together as a run does them.

Promise: nothing is written; the three are measured on the same tiles in one process, without start-up. Where a run would read
with several processes, that is said.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from pathology import decide
from pathology.batch_size import choose_batch
from pathology.batches import ReadPool, read_tiles
from pathology.clock import Clock, counting
from pathology.cores import core_count, reading_processes
from pathology.errors import UsageError
from pathology.infer import Again, infer_region
from pathology.job import Job
from pathology.job_slide import plan_slide, stain_of
from pathology.model import Model, ModelSpec, answer
from pathology.models import load_model
from pathology.models.checks import made_up_batch, warm_up
from pathology.plan import Plan, cut
from pathology.predictor import Predict, Predictor
from pathology.readers import open_slide
from pathology.slide import Slide
from pathology.threads import split_threads
from pipelines.bottleneck import bottleneck

READ_TILES = 128  # read alone, by one thread
MODEL_S = 1.0  # the model is called alone for about so long


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds a tile of reading and of the model, each alone on one thread; and of the pipeline on all cores.

    roof_ms     what both alone, divided over the cores, come to; of a device of its own, the slower of the two
    tile_mm2    unique area per tile: by it overlapping tiles are no gain
    bottleneck  in words
    """

    tiles: int
    read_ms: float
    model_ms: float
    pipeline_ms: float
    roof_ms: float
    readers: int
    threads: int
    tile_mm2: float
    bottleneck: str


def benchmark(job: Job, most_tiles: int) -> Measured:
    """Measure `job`'s model on its slide, on at most `most_tiles` of its tiles."""
    from pathology.device import set_threads

    cores = core_count()
    with open_slide(job.slide, job.slide_mpp, force=job.force, reader=job.reader, fast_decode=job.fast_decode) as slide:
        set_threads(1)
        model = load_model(job.model, job.device, job.precision, job.compile)
        batch_size = job.batch_size or choose_batch(model, job.device, job.threads or cores, job.memory)
        warm_up(model, batch_size)
        _, plan = plan_slide(job, slide, model.spec)
        if not len(plan.tiles):
            raise UsageError("the slide has no tissue to measure on; give another --slide, or --tissue none")
        plan = _first(plan, most_tiles)
        read_s = _reading(slide, job, model.spec, plan)
        model_s = _seconds_each(model, batch_size)
        split = split_threads(cores, read_s, model_s, job.threads)
        on_cpu = job.device == "cpu"
        set_threads(split.threads if on_cpu else 1)
        readers = job.readers or (split.readers if on_cpu else cores)
        predictor, clock = Predictor(model, batch_size), Clock()
        predict = functools.partial(predictor.predict, stain=stain_of(job))
        with (
            closing(predictor),
            closing(ReadPool(readers)) as pool,
            counting(clock),
            _exactly(replace(job, batch_size=batch_size), model.spec) as exactly,
        ):
            began = time.perf_counter()
            read = functools.partial(read_tiles, slide, model.spec, plan.grid, pool=pool, clock=clock)
            again = None if exactly is None else Again(read, exactly, decide.doubt(job, model.spec), lambda _: None)
            for region in plan.regions:
                for _ in infer_region(read, model.spec, plan, region, predict, lambda _: None, again):
                    pass
            seconds = time.perf_counter() - began
    tiles = plan.forward_passes
    roof_s = (read_s + model_s) / cores if on_cpu else max(read_s / cores, model_s)
    return Measured(
        tiles=tiles,
        read_ms=1e3 * read_s,
        model_ms=1e3 * model_s,
        pipeline_ms=1e3 * seconds / tiles,
        roof_ms=1e3 * roof_s,
        readers=readers,
        threads=split.threads if on_cpu else 1,
        tile_mm2=len(plan.tiles) / tiles * (plan.grid.stride_px * plan.grid.mpp / 1000) ** 2,
        bottleneck=bottleneck(clock.seconds(), seconds, seconds, job.fast_decode),
    )


@contextmanager
def _exactly(job: Job, spec: ModelSpec) -> Iterator[Predict | None]:
    """By which tiles are computed that half precision leaves in doubt; None where it leaves none."""
    if not decide.doubt(job, spec):
        yield None
        return
    exact = decide.exact(job)
    with closing(Predictor(load_model(exact.model, exact.device, exact.precision), exact.batch_size)) as predictor:
        yield functools.partial(predictor.predict, stain=stain_of(job))


def lines(measured: Measured) -> Iterator[str]:
    """The measurement as a table for people."""
    yield f"{measured.tiles} tiles, {measured.readers} reader threads, {measured.threads} torch threads"
    if (processes := reading_processes(core_count())) > 1:
        yield f"in one process; a run reads with {processes} on these cores, and waits less"
    yield ""
    yield f"{'':<34}{'ms/tile':>10}{'tiles/s':>10}{'mm2/s':>10}"
    for name, each in (
        ("reading alone, one thread", measured.read_ms),
        ("model alone, one thread or device", measured.model_ms),
        ("roof: both, divided over the cores", measured.roof_ms),
        ("pipeline, after start-up", measured.pipeline_ms),
    ):
        yield f"{name:<34}{each:>10.3f}{1e3 / each:>10.1f}{1e3 / each * measured.tile_mm2:>10.3f}"
    yield ""
    yield f"the pipeline runs at {measured.roof_ms / measured.pipeline_ms:.0%} of the roof; {measured.bottleneck}"


def _first(plan: Plan, most: int) -> Plan:
    """The plan cut down to its first tiles."""
    tiles, coverage = plan.tiles[:most], plan.coverage[:most]
    return cut(plan.grid, plan.output_px, plan.blend, plan.block, tiles, coverage, plan.tissue_mm2)


def _reading(slide: Slide, job: Job, spec: ModelSpec, plan: Plan) -> float:
    """Seconds a tile of reading alone, by one thread, from a slide whose tiles are decoded anew."""
    with open_slide(job.slide, slide.info.mpp, force=True, reader=job.reader, fast_decode=job.fast_decode) as fresh:
        tiles = read_tiles(fresh, spec, plan.grid, plan.tiles, None)
        next(tiles)
        began = time.perf_counter()
        count = sum(1 for _ in islice(tiles, READ_TILES))
        seconds = time.perf_counter() - began
    if not count:
        raise UsageError("the slide has a single tile of tissue; give a larger --slide")
    return seconds / count


def _seconds_each(model: Model, batch_size: int) -> float:
    """Seconds a tile of the model alone: the best of several calls, as many as fit."""
    batch = made_up_batch(model.spec, batch_size)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MODEL_S or best == float("inf"):
        start = time.perf_counter()
        answer(model, *batch)
        best = min(best, time.perf_counter() - start)
    return best / batch_size
