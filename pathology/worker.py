"""What a worker does with a model: check it, divide the cores between it and reading, infer a region.

Promise: every function takes names and numbers only, opens what it needs itself, and can be called again after a crash.
A process keeps its models and predictors between calls. Slides are read by the neighbour, where there is one.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology import slide_worker
from pathology.batches import Pixels, read_tiles
from pathology.beside import asked, asker, read_beside
from pathology.clock import Clock, counting
from pathology.cores import core_count
from pathology.device import environment, set_threads
from pathology.durable import make_folders, write_file
from pathology.errors import Reason, SlideError
from pathology.events import emit
from pathology.infer import Tile, detect_region, infer_region
from pathology.job import Job, key_of
from pathology.model import Model, ModelSpec
from pathology.models import load_model
from pathology.models.checks import warm_up
from pathology.models.pieces import piece_tiles
from pathology.models.pool import pooled
from pathology.plan import Plan
from pathology.predictor import Predict, Predictor, closed_at_end, predict_in_order
from pathology.threads import Split, measure_model, split_threads


class _Kept:
    """The models and predictors of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.device_lock = threading.Lock()
        self.models: dict[tuple[object, ...], Model] = {}
        self.predictors: dict[tuple[object, ...], Predictor] = {}
        self.threads = 0


_kept = _Kept()


def model_of(job: Job) -> tuple[object, ...]:
    """What decides how a job's model is run: jobs for which it is equal share one check."""
    return (job.model, job.device, job.precision, job.compile, job.heatmap_mpp, job.batch_size, job.threads, job.readers)


def check_model(job: Job) -> ModelSpec:
    """Load the job's model, run it once, and return its card. Raises ModelError."""
    model = _model(job)
    warm_up(model, _at_once(job, model.spec))
    return model.spec


def divide_cores(jobs: tuple[Job, ...], processes: int = 1, read: bool = True) -> Split:
    """The threads for `jobs`, which share a model: those they leave open as measured, in one of `processes` of this machine.

    Reading is measured on the first slide that opens; not `read`: taken for quick. How many threads torch has can decide last
    bits, so that number is kept beside unfinished work, and a resumed run goes on with it.
    """
    job = jobs[0]
    cores = max(1, core_count() // processes)
    if job.device != "cpu":
        return Split(job.readers or cores, job.threads or 1)
    model = _model(job)
    read_s = asked(slide_worker.seconds_to_read)(jobs) if read else 0.0
    split = split_threads(cores, read_s, measure_model(model, _at_once(job, model.spec)), job.threads)
    if not job.threads:
        kept = Path(job.out) / ".work" / f"threads-{key_of({'model': model.spec.sha256, 'run': [*model_of(job), cores]})[:16]}"
        if kept.exists():
            split = split_threads(cores, read_s, 0.0, int(kept.read_text()))
        else:
            make_folders(kept.parent)
            write_file(kept, str(split.threads).encode())
    return Split(job.readers or split.readers, split.threads)


def _at_once(job: Job, spec: ModelSpec) -> int:
    """Tiles that the model computes at once: the whole batch on a device, a piece of it on the CPU."""
    return piece_tiles(job.batch_size, spec.input_px) if job.device == "cpu" else job.batch_size


def run_region(job: Job, index: int, in_order: bool = False) -> int:
    """Infer and stage one region; the number of tiles. `in_order`: in this thread alone, as the reference does it."""
    spec = _model(job).spec
    work, plan = slide_worker.open_work(job, asked(slide_worker.key_fields_of))
    region = plan.regions[index]
    what = {"slide": job.slide_id, "model": spec.name, "region": index}
    emit(Path(job.out), "region-start", what)
    began, clock = time.time(), Clock()
    read = _reading(job, spec, plan, clock, in_order)
    bad_tiles: list[Tile] = []
    on_bad = _refuse_bad if job.on_bad_tile == "fail" else bad_tiles.append
    # Closed whatever ends it: a region that is dropped half-way must not keep others waiting for its tiles.
    with closed_at_end(_predict(job, spec, in_order)) as predict, counting(clock):
        if spec.detections is not None:
            staged = work.stage_rows(region, detect_region(read, spec, spec.detections, plan, region, predict, on_bad))
        else:
            with closing(infer_region(read, spec, plan, region, predict, on_bad)) as bands:
                staged = work.stage(region, bands)
    counts = {
        "tiles": len(region.tiles),
        "bad_tiles": len(bad_tiles),
        "seconds": round(time.time() - began, 6),
        "began": began,
        "process": os.getpid(),
        "stages": clock.seconds(),
    }
    work.mark(region, staged, counts, _environment(job.device, job.threads), bad_tiles)
    emit(Path(job.out), "region-done", {**what, **counts})
    return len(region.tiles)


def _refuse_bad(tile: Tile) -> None:
    raise SlideError(
        Reason.CORRUPT_TILES,
        f"tile (row {tile[0]}, column {tile[1]}) cannot be decoded; copy the file again from its source, "
        "or leave such tiles out with --on-bad-tile mask",
    )


def _reading(
    job: Job, spec: ModelSpec, plan: Plan, clock: Clock, in_order: bool
) -> Callable[[NDArray[np.int32]], Iterator[Pixels | None]]:
    """What reads tiles of the job's slide: the neighbour, or threads of this process, or `in_order` the very one that asks."""
    if asker() is not None:
        return functools.partial(read_beside, job, spec, clock)
    slide = slide_worker.open_slide_of(job)
    pool = None if in_order else slide_worker.pool(job.readers)
    return lambda tiles: read_tiles(slide, spec, plan.grid, tiles, pool, clock)


def _model(job: Job) -> Model:
    with _kept.lock:
        if _kept.threads != job.threads:
            set_threads(job.threads or 1)  # one while it is measured how many there should be
            _kept.threads = job.threads
        name = (job.model, job.device, job.precision, job.compile, job.heatmap_mpp)
        if name not in _kept.models:
            model = load_model(job.model, job.device, job.precision, job.compile)
            slide_worker.cards[job.model] = model.spec
            _kept.models[name] = pooled(model, job.heatmap_mpp)
        return _kept.models[name]


@functools.cache
def _environment(device: str, threads: int) -> dict[str, str | int]:
    """`environment`, asked once for each; torch has been told of `threads` when its first model was loaded."""
    return environment(device)


def _predict(job: Job, spec: ModelSpec, in_order: bool) -> Predict:
    model = _model(job)
    stain = asked(slide_worker.stain_of)(job) if spec.stain else None
    if in_order:
        return functools.partial(predict_in_order, model, job.batch_size, stain=stain)
    with _kept.lock:
        name = (job.model, job.device, job.precision, job.compile, job.heatmap_mpp, job.batch_size)
        if name not in _kept.predictors:
            _kept.predictors[name] = Predictor(model, job.batch_size, _kept.device_lock)
        return functools.partial(_kept.predictors[name].predict, stain=stain)
