"""What a worker does with a model: check it, divide the cores between it and reading, infer a region.

Promise: every function takes names and numbers only, opens what it needs itself, and can be called again after a crash.
A process keeps its models and predictors between calls. Slides are read by the neighbour, where there is one.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology import decide, job_slide, slide_worker
from pathology.batch_size import choose_batch
from pathology.batches import Pixels, read_tiles
from pathology.beside import asked, asker, read_beside
from pathology.calls import Death, WorkerDied, sendable
from pathology.clock import Clock, counting
from pathology.cores import core_count
from pathology.device import environment, poisoned, set_threads
from pathology.durable import make_folders, write_once
from pathology.errors import Reason, SlideError, first_line
from pathology.events import emit
from pathology.infer import Again, Tile, detect_region, infer_region
from pathology.job import Job, key_of
from pathology.model import ModelSpec
from pathology.models import load_model
from pathology.models.checks import warm_up
from pathology.models.halving import HalvingModel, QueuedHalvingModel, halving
from pathology.models.pieces import piece_tiles
from pathology.models.pool import pooled
from pathology.plan import REGIONS_AT_ONCE, Plan, Region
from pathology.predictor import Predict, Predictor, closed_at_end, predict_in_order
from pathology.threads import Split, measure_model, split_threads
from pathology.together import Handout, ReadingEnded
from pathology.work import Work


class _Kept:
    """The models and predictors of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.device_lock = threading.Lock()
        self.canvases = threading.BoundedSemaphore(REGIONS_AT_ONCE)
        self.models: dict[tuple[object, ...], HalvingModel | QueuedHalvingModel] = {}
        self.predictors: dict[tuple[object, ...], Predictor] = {}
        self.threads = 0


_kept = _Kept()


def model_of(job: Job) -> tuple[object, ...]:
    """What decides how a job's model is run: jobs for which it is equal share one check."""
    return (job.model, job.device, job.precision, job.compile, job.heatmap_mpp, job.batch_size, job.threads, job.readers)


def check_model(job: Job) -> ModelSpec:
    """Load the job's model, run it once, and return its card. Raises ModelError."""
    spec = _model(job).spec
    for needed in decide.models(job, spec):
        warm_up(_model(needed), _at_once(needed, spec))
    return spec


def find_batch_size(job: Job, processes: int = 1) -> int:
    """The batch size for a job that leaves it open, and for all that share its model, in one of `processes` of this machine.

    Kept beside unfinished work, and a resumed run goes on with it.
    """
    model = _model(job).inner

    def find() -> int:
        # Each size tried would be compiled, and torch gives up compiling after a few.
        plain = pooled(load_model(job.model, job.device, job.precision), job.heatmap_mpp) if job.compile else model
        return choose_batch(plain, job.device, job.threads or max(1, core_count() // processes), job.memory)

    return _kept_number(_kept_path(job, "batch", model.spec, [job.device, job.precision, job.compile]), find)


def divide_cores(jobs: tuple[Job, ...], processes: int = 1, read: bool = True) -> tuple[Split, ...]:
    """The threads for jobs whose models read alike: those they leave open as measured, in one of `processes` of this machine.

    Reading is measured on the first slide that opens; not `read`: taken for quick. A tile is computed by all models. How many
    threads torch has can decide last bits, so that number is kept beside unfinished work, and a resumed run goes on with it.
    """
    cores = max(1, core_count() // processes)
    first = {model_of(job): job for job in reversed(jobs)}
    if jobs[0].device != "cpu":
        return tuple(Split(job.readers or cores, job.threads or 1) for job in jobs)
    models = {name: _model(job) for name, job in first.items()}
    read_s = asked(slide_worker.seconds_to_read)(jobs) if read else 0.0
    model_s = sum(measure_model(models[name], _at_once(job, models[name].spec)) for name, job in first.items())
    kept = {name: _kept_path(job, "threads", models[name].spec, [*name, cores]) for name, job in first.items()}
    before = [int(path.read_text()) for path in kept.values() if path.exists()]
    split = split_threads(cores, read_s, model_s, jobs[0].threads or next(iter(before), 0))
    threads = {name: jobs[0].threads or _kept_number(path, lambda: split.threads) for name, path in kept.items()}
    return tuple(Split(job.readers or split.readers, threads[model_of(job)]) for job in jobs)


def _kept_path(job: Job, what: str, spec: ModelSpec, run: list[object]) -> Path:
    """Where a number lies that is kept beside unfinished work, for it can decide last bits: a file for each such run."""
    return Path(job.out) / ".work" / f"{what}-{key_of({'model': spec.sha256, 'run': run})[:16]}"


def _kept_number(path: Path, find: Callable[[], int]) -> int:
    """What `find` gave when it was first asked, by whatever process."""
    if path.exists():
        return int(path.read_text())
    number = find()
    make_folders(path.parent)
    return int(write_once(path, str(number).encode()))


def _at_once(job: Job, spec: ModelSpec) -> int:
    """Tiles that the model computes at once: the whole batch on a device, a piece on the CPU. One if it is to be found."""
    return piece_tiles(job.batch_size or 1, spec.input_px) if job.device == "cpu" else job.batch_size or 1


def run_region(job: Job, index: int, in_order: bool = False) -> int:
    """Infer and stage one region; the number of tiles. `in_order`: in this thread alone, as the reference does it."""
    if (tiles := _done_before(job, index)) is not None:
        return tiles
    begun = _begin(job, index)
    return _infer(begun, _reading(begun, begun.clock, in_order), in_order)


def run_regions(jobs: tuple[Job, ...], indices: tuple[int, ...], in_order: bool = False) -> tuple[int | Exception, ...]:
    """Infer and stage a region of each job, all tiles read once for all: the number of tiles of each, or its error.

    The jobs are of one of `together.groups`. Each takes tiles in a thread of its own and ends as it would by itself; where
    there is one only, its error is raised.
    """
    with _canvases(jobs):
        return _run_regions(jobs, indices, in_order)


def _canvases(jobs: tuple[Job, ...]) -> AbstractContextManager[object]:
    """Room for the canvases of a region of dense jobs, waited for: the plan lets each take its share of a worker's memory."""
    dense = any(job_slide.spec_of(job).output_px > 1 for job in jobs)
    return _kept.canvases if dense else nullcontext()


def _run_regions(jobs: tuple[Job, ...], indices: tuple[int, ...], in_order: bool) -> tuple[int | Exception, ...]:
    if len(jobs) == 1:
        try:
            return (run_region(jobs[0], indices[0], in_order),)
        except Exception as error:
            _raise_device_fault(error, jobs[0])
            raise
    ends: dict[int, int | Exception] = {}
    begun: dict[int, _Begun] = {}
    for place, (job, index) in enumerate(zip(jobs, indices, strict=True)):
        try:
            if (tiles := _done_before(job, index)) is not None:
                ends[place] = tiles
            else:
                begun[place] = _begin(job, index)
        except Exception as error:
            ends[place] = error
    if begun:
        ends.update(zip(begun, _infer_together(list(begun.values()), in_order), strict=True))
    for place, end in ends.items():
        if isinstance(end, WorkerDied):
            raise end
        if isinstance(end, Exception):
            _raise_device_fault(end, jobs[place])
    return tuple(sendable(end) if isinstance(end := ends[place], Exception) else end for place in range(len(jobs)))


@dataclass(frozen=True, slots=True)
class _Begun:
    """A region about to be inferred. `answered`: of each model it takes, the batches before it, by the size of their calls."""

    job: Job
    spec: ModelSpec
    work: Work
    plan: Plan
    region: Region
    clock: Clock
    began: float
    answered: dict[Job, Counter[int]]


def _done_before(job: Job, index: int) -> int | None:
    """The tiles of a region that is done, and asked for again since the process died before it could say so."""
    work, plan = slide_worker.open_work(job, asked(job_slide.key_fields_of))
    region = plan.regions[index]
    return len(region.tiles) if work.done(region, whole=job.on_bad_tile == "fail") else None


def _begin(job: Job, index: int) -> _Begun:
    spec = _model(job).spec
    answered = {needed: _model(needed).sizes.answered() for needed in decide.models(job, spec)}
    work, plan = slide_worker.open_work(job, asked(job_slide.key_fields_of))
    emit(Path(job.out), "region-start", {"slide": job.slide_id, "model": spec.name, "region": index})
    return _Begun(job, spec, work, plan, plan.regions[index], Clock(), time.time(), answered)


def _infer_together(begun: Sequence[_Begun], in_order: bool) -> Iterator[int | Exception]:
    """What each region ends with: its tiles, or the error that itself, or reading for all, has met."""
    handout = Handout([one.region.tiles for one in begun], begun[0].spec.input_px)
    clock = Clock(among=[one.clock for one in begun])
    failed: Exception | None = None
    with ThreadPoolExecutor(len(begun), thread_name_prefix="region") as takers:

        def begin(taker: int, one: _Begun) -> Future[int]:
            end = takers.submit(_infer, one, lambda _: handout.take(taker), in_order)
            end.add_done_callback(lambda _: handout.leave(taker))
            return end

        ends = [begin(taker, one) for taker, one in enumerate(begun)]
        try:
            with counting(clock), closing(_reading(begun[0], clock, in_order)(handout.tiles)) as pixels:
                handout.give(pixels)
        except Exception as raised:
            failed = raised
        finally:
            handout.end()
    for end in ends:
        error = end.exception()
        if isinstance(error, ReadingEnded) and failed is not None:
            yield failed
        else:
            yield error if isinstance(error, Exception) else end.result()


def _infer(begun: _Begun, read: Callable[[NDArray[np.int32]], Iterator[Pixels | None]], in_order: bool) -> int:
    """Infer, stage and mark a region whose tiles come from `read`; how many there were."""
    job, spec, work, plan, region, clock = begun.job, begun.spec, begun.work, begun.plan, begun.region, begun.clock
    bad_tiles: list[Tile] = []
    again, decided = _again(begun, in_order)
    on_bad = _refuse_bad if job.on_bad_tile == "fail" else bad_tiles.append
    # Closed whatever ends it: a region that is dropped half-way must not keep others waiting for its tiles.
    with closed_at_end(_predict(job, spec, in_order)) as predict, counting(clock):
        if spec.detections is not None:
            staged = work.stage_rows(region, detect_region(read, spec, spec.detections, plan, region, predict, on_bad))
        else:
            with closing(infer_region(read, spec, plan, region, predict, on_bad, again)) as bands:
                staged = work.stage(region, bands)
    # Batches are shared with other regions: a size too many is told rather than one too few.
    halved = {size for needed in begun.answered for size in _sizes(begun, needed) if size < needed.batch_size}
    sizes = sorted({*_sizes(begun, job), *halved}, reverse=True)
    counts = {
        "tiles": len(region.tiles),
        "bad_tiles": len(bad_tiles),
        "decided": sum(decided),
        "seconds": round(time.time() - begun.began, 6),
        "began": begun.began,
        "process": os.getpid(),
        "halved_to": min(halved, default=None),
        "stages": clock.seconds(),
    }
    # What was read may be of two files otherwise, and count when the first one is brought back.
    asked(slide_worker.require_unchanged)(job)
    work.mark(region, staged, counts, {**_environment(job.device, job.threads), "batch": sizes}, bad_tiles)
    what = {"slide": job.slide_id, "model": spec.name, "region": region.index}
    emit(Path(job.out), "region-done", {**what, **counts})
    return len(region.tiles)


def _sizes(begun: _Begun, needed: Job) -> list[int]:
    """Tiles of the calls by which a model answered since the region was begun; those of the next one where there were none."""
    sizes = _model(needed).sizes
    return sorted(sizes.answered() - begun.answered[needed]) or [sizes.now(needed.batch_size)]


def _again(begun: _Begun, in_order: bool) -> tuple[Again | None, list[int]]:
    """How the region's doubtful tiles are computed, None where none are; and where their number is put."""
    job, spec = begun.job, begun.spec
    decided: list[int] = []
    if not (width := decide.doubt(job, spec)):
        return None, decided

    def predict(tiles: Iterable[Pixels]) -> Generator[NDArray[np.float32], None, None]:
        with closed_at_end(_predict(decide.exact(job), spec, in_order)) as exactly:
            yield from exactly(tiles)

    return Again(_reading(begun, begun.clock, in_order), predict, width, decided.append), decided


def _raise_device_fault(error: Exception, job: Job) -> None:
    """Take this process for dead where `error` says that its device failed: that answers nothing any more."""
    if poisoned(error):
        raise WorkerDied(f"device {job.device} failed ({first_line(error)})", Death.DEVICE) from error


def _refuse_bad(tile: Tile) -> None:
    raise SlideError(
        Reason.CORRUPT_TILES,
        f"tile (row {tile[0]}, column {tile[1]}) cannot be decoded; copy the file again from its source, "
        "or leave such tiles out with --on-bad-tile mask",
    )


def _reading(
    begun: _Begun, clock: Clock, in_order: bool
) -> Callable[[NDArray[np.int32]], Generator[Pixels | None, None, None]]:
    """What reads tiles of the job's slide: the neighbour, or threads of this process, or `in_order` the very one that asks."""
    job, spec, grid = begun.job, begun.spec, begun.plan.grid
    if asker() is not None:
        return functools.partial(read_beside, job, spec, clock)
    slide_worker.require_unchanged(job)
    slide = job_slide.open_slide_of(job)
    pool = None if in_order else slide_worker.pool(job.readers)
    return lambda tiles: read_tiles(slide, spec, grid, tiles, pool, clock)


def _model(job: Job) -> HalvingModel | QueuedHalvingModel:
    with _kept.lock:
        if _kept.threads != job.threads:
            set_threads(job.threads or 1)  # one while it is measured how many there should be
            _kept.threads = job.threads
        name = (job.model, job.device, job.precision, job.compile, job.heatmap_mpp)
        if name not in _kept.models:
            model = load_model(job.model, job.device, job.precision, job.compile)
            job_slide.cards[job.model] = model.spec
            _kept.models[name] = halving(pooled(model, job.heatmap_mpp))
        return _kept.models[name]


@dataclass(frozen=True, slots=True)
class _InTurn:
    """A model that waits until no other one of this process computes, as those with a predictor do."""

    model: HalvingModel | QueuedHalvingModel

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        with _kept.device_lock:
            return self.model(tiles, stains)


@functools.cache
def _environment(device: str, threads: int) -> dict[str, str | int]:
    """`environment`, asked once for each; torch has been told of `threads` when its first model was loaded."""
    return environment(device)


def _predict(job: Job, spec: ModelSpec, in_order: bool) -> Predict:
    model = _model(job)
    stain = asked(job_slide.stain_of)(job) if spec.stain else None
    if in_order:
        return functools.partial(predict_in_order, _InTurn(model), job.batch_size, stain=stain)
    with _kept.lock:
        name = (job.model, job.device, job.precision, job.compile, job.heatmap_mpp, job.batch_size)
        if name not in _kept.predictors:
            _kept.predictors[name] = Predictor(model, job.batch_size, _kept.device_lock)
        return functools.partial(_kept.predictors[name].predict, stain=stain)
