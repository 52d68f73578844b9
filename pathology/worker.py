"""What a worker does for a run: check a model, prepare a slide, infer a region, finish a slide.

Promise: every function takes names and numbers only, opens what it needs itself, and can be called again after a crash.
A process keeps its slides and its predictor open between calls.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import OrderedDict
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from pathology.batches import ReadPool, read_tiles
from pathology.clock import Clock, counting
from pathology.cores import core_count
from pathology.device import environment, set_threads
from pathology.durable import make_folders, write_file
from pathology.errors import EnvironmentFault, PathologyError, Reason, SlideError, UsageError
from pathology.events import emit
from pathology.finish import TISSUE_FILES, finish, put_back, read_manifest, read_record, write_if_changed
from pathology.grid import TileGrid
from pathology.infer import Tile, infer_region
from pathology.job import Job, key_difference, key_of
from pathology.memory import CACHE_SHARE
from pathology.model import Model, ModelSpec
from pathology.models import load_model, load_spec
from pathology.models.checks import warm_up
from pathology.plan import Plan, make_plan
from pathology.predictor import Predict, Predictor, closed_at_end, predict_in_order
from pathology.readers import open_slide
from pathology.slide import Slide
from pathology.staging import slide_path
from pathology.threads import Split, measure_model, measure_reading, split_threads
from pathology.thumbnail import LARGEST_PX, picture
from pathology.tissue import TissueMask, find_tissue, tissue_geojson, tissue_png
from pathology.work import Work

KEPT_SLIDES = 4

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is left of a job.

    record   result.json of a job that was finished before, None otherwise
    todo     regions to infer; none and no record: only the end is missing
    tiles    forward passes per region of `todo`
    """

    record: dict[str, Any] | None
    todo: tuple[int, ...] = ()
    tiles: tuple[int, ...] = ()


class _Kept:
    """The open slides, works and predictors of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.model_lock = threading.RLock()  # of its own: loading torch takes seconds, in which slides can be opened
        self.device_lock = threading.Lock()
        self.slides: OrderedDict[tuple[object, ...], Slide] = OrderedDict()
        self.tissue: WeakKeyDictionary[Slide, dict[str, TissueMask]] = WeakKeyDictionary()
        self.tissue_files: WeakKeyDictionary[Slide, dict[str, tuple[bytes, bytes]]] = WeakKeyDictionary()
        self.works: OrderedDict[Job, tuple[Work, Plan]] = OrderedDict()
        self.models: dict[tuple[object, ...], Model] = {}
        self.predictors: dict[tuple[object, ...], Predictor] = {}
        self.pools: dict[int, ReadPool] = {}
        self.threads = 0


_kept = _Kept()


def model_of(job: Job) -> tuple[object, ...]:
    """What decides how a job's model is run: jobs for which it is equal share one check."""
    return (job.model, job.device, job.precision, job.compile, job.batch_size, job.threads, job.readers)


def check_model(job: Job) -> ModelSpec:
    """Load the job's model, run it once, and return its card. Raises ModelError."""
    model = _model(job)
    warm_up(model, job.batch_size)
    return model.spec


def look(job: Job) -> None:
    """Open the job's slide, find its tissue and make its picture, so that `prepare` finds them. What fails is left to it."""
    with suppress(PathologyError):
        slide = _slide(job)
        _tissue_files(slide, job.tissue)
        picture(slide, 1, LARGEST_PX)


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
    read_s = _reading(jobs, model.spec) if read else 0.0
    split = split_threads(cores, read_s, measure_model(model, job.batch_size), job.threads)
    if not job.threads:
        kept = Path(job.out) / ".work" / f"threads-{key_of({'model': model.spec.sha256, 'run': [*model_of(job), cores]})[:16]}"
        if kept.exists():
            split = split_threads(cores, read_s, 0.0, int(kept.read_text()))
        else:
            make_folders(kept.parent)
            write_file(kept, str(split.threads).encode())
    return Split(job.readers or split.readers, split.threads)


def _reading(jobs: tuple[Job, ...], spec: ModelSpec) -> float:
    """Seconds to read a tile from the middle of the first slide that opens; 0 where none does."""
    for job in jobs:
        try:
            slide = _slide(job)
            grid = TileGrid(slide.info.shape, slide.info.mpp, spec.mpp, spec.tile_px, job.stride_px(spec.tile_px))
            middle = np.array([[max(0, n // 2 - 2) for n in grid.shape]], np.int32)
            tiles = middle + np.indices((4, 4), np.int32).reshape(2, -1).T
            return measure_reading(read_tiles(slide, spec, grid, tiles[(tiles < grid.shape).all(axis=1)], None))
        except SlideError:
            continue  # it is named when its turn comes
    return 0.0


def prepare(job: Job) -> Prepared:
    """Open the slide, find tissue, make or find the plan, and say what is left to do.

    Raises SlideError for a slide that cannot be worked on, UsageError for a result or work made otherwise,
    EnvironmentFault where the place the slides come from is gone.
    """
    if job.stage is not None and slide_path(job) == Path(job.slide):
        emit(Path(job.out), "slide-in-place", {"slide": job.slide_id, "why": "its copy is gone from the folder of --stage"})
    slide, spec = _slide(job), _spec(job)
    fields = key_fields(job, slide, spec)
    work = Work(job.work_folder(spec.name), fields)
    put_back(job.result_folder(spec.name), work)
    record = _finished(job, spec, fields)
    if record is not None:
        work.clear()
        return Prepared(record)
    _, plan = plan_slide(job, slide, spec)
    _write_tissue(job, _tissue_files(slide, job.tissue))
    plan = work.begin(plan, job.overwrite)
    with _kept.lock:
        _keep(_kept.works, job, (work, plan))
    todo = work.todo(plan, whole=job.on_bad_tile == "fail")
    emit(
        Path(job.out),
        "slide-begin",
        {"slide": job.slide_id, "model": spec.name, "regions": len(plan.regions), "todo": len(todo)},
    )
    return Prepared(None, tuple(todo), tuple(len(plan.regions[i].tiles) for i in todo))


def run_region(job: Job, index: int, in_order: bool = False) -> int:
    """Infer and stage one region; the number of tiles. `in_order`: in this thread alone, as the reference does it."""
    slide, spec = _slide(job), _model(job).spec
    work, plan = _work(job, slide, spec)
    region = plan.regions[index]
    what = {"slide": job.slide_id, "model": spec.name, "region": index}
    emit(Path(job.out), "region-start", what)
    began, clock = time.time(), Clock()
    pool = None if in_order else _pool(job.readers)
    bad_tiles: list[Tile] = []
    on_bad = _refuse_bad if job.on_bad_tile == "fail" else bad_tiles.append
    # Closed whatever ends it: a region that is dropped half-way must not keep others waiting for its tiles.
    with (
        closed_at_end(_predict(job, in_order)) as predict,
        closing(infer_region(slide, spec, plan, region, predict, on_bad, pool, clock)) as rows,
        counting(clock),
    ):
        hashes = work.stage(region, rows)
    counts = {
        "tiles": len(region.tiles),
        "bad_tiles": len(bad_tiles),
        "seconds": round(time.time() - began, 6),
        "began": began,
        "process": os.getpid(),
        "stages": clock.seconds(),
    }
    work.mark(region, hashes, counts, _environment(job.device, job.threads), bad_tiles)
    emit(Path(job.out), "region-done", {**what, **counts})
    return len(region.tiles)


def _refuse_bad(tile: Tile) -> None:
    raise SlideError(
        Reason.CORRUPT_TILES,
        f"tile (row {tile[0]}, column {tile[1]}) cannot be decoded; copy the file again from its source, "
        "or leave such tiles out with --on-bad-tile mask",
    )


def finish_slide(job: Job) -> dict[str, Any]:
    """Commit a job whose regions are all done; its record."""
    slide, spec = _slide(job), _spec(job)
    work, plan = _work(job, slide, spec)
    record = finish(job, work, plan, slide, spec)
    with _kept.lock:
        _kept.works.pop(job, None)
    emit(Path(job.out), "slide-done", {"slide": job.slide_id, "model": spec.name, "status": record["status"]})
    return record


def plan_slide(job: Job, slide: Slide, spec: ModelSpec) -> tuple[TissueMask, Plan]:
    """Tissue and plan of a job, as any run of it would make them."""
    tissue = _tissue(slide, job.tissue)
    grid = TileGrid(slide.info.shape, slide.info.mpp, spec.mpp, spec.tile_px, job.stride_px(spec.tile_px))
    return tissue, make_plan(grid, spec, tissue, min_tissue=job.min_tissue, blend=job.blend, block=job.block, memory=job.memory)


def _tissue(slide: Slide, method: Literal["otsu", "none"]) -> TissueMask:
    """The slide's tissue, found once as long as it is open."""
    found = _kept.tissue.setdefault(slide, {})
    if method not in found:
        found[method] = find_tissue(slide, method)
    return found[method]


def _tissue_files(slide: Slide, method: Literal["otsu", "none"]) -> tuple[bytes, bytes]:
    """What TISSUE_FILES hold, made once as long as the slide is open."""
    made = _kept.tissue_files.setdefault(slide, {})
    if method not in made:
        tissue = _tissue(slide, method)
        made[method] = tissue_geojson(tissue, slide.info.fingerprint), tissue_png(slide, tissue)
    return made[method]


def key_fields(job: Job, slide: Slide, spec: ModelSpec) -> dict[str, Any]:
    """What decides a result's values, and nothing else: JSON values under their option's name where there is one."""
    return {
        "schema": 1,
        "slide": slide.info.fingerprint,
        "slide_mpp": slide.info.mpp,
        "fast_decode": job.fast_decode,
        "reader": slide.info.reader.split()[0],
        "model": spec.sha256,
        "card": key_of(asdict(spec)),
        "tile_px": spec.tile_px,
        "stride_px": job.stride_px(spec.tile_px),
        "tissue": job.tissue,
        "min_tissue": job.min_tissue,
        "blend": job.blend if spec.output_px > 1 else "none",
        "precision": job.precision,
        "compile": job.compile,
    }


def _finished(job: Job, spec: ModelSpec, fields: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished result of this very key whose files are all there; None where there is none to keep."""
    folder = job.result_folder(spec.name)
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if manifest["key"] != key_of(fields):
        if job.overwrite:
            return None
        difference = key_difference(manifest["fields"], fields)
        message = (
            f"result {job.slide_id}/{spec.name} was made otherwise ({difference}); choose another --out or pass --overwrite"
        )
        only_slide = {name for name in fields if manifest["fields"].get(name) != fields[name]} == {"slide"}
        raise SlideError(Reason.CHANGED, message) if only_slide else UsageError(message)
    sizes = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    sizes |= {job.slide_folder / name: entry["bytes"] for name, entry in manifest["slide_files"].items()}
    broken = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
    record = read_record(folder)
    if not broken and record is not None and not (record["status"] == "partial" and job.overwrite):
        return record
    if job.overwrite:
        return None
    name = broken[0] if broken else "result.json"
    raise SlideError(
        Reason.CHANGED, f"result {job.slide_id}/{spec.name} is damaged: {name} is gone or has another size; pass --overwrite"
    )


def _write_tissue(job: Job, contents: tuple[bytes, bytes]) -> None:
    for name, data in zip(TISSUE_FILES, contents, strict=True):
        path = job.slide_folder / name
        others = list(job.slide_folder.glob("*/manifest.json")) if path.exists() else []
        if others and not job.overwrite and path.read_bytes() != data:
            raise UsageError(
                f"slide {job.slide_id} has results for tissue found otherwise; choose another --out, or pass --overwrite"
            )
        write_if_changed(path, data)


def _work(job: Job, slide: Slide, spec: ModelSpec) -> tuple[Work, Plan]:
    """The job's work folder and plan, as `prepare` left them, maybe in another process."""
    with _kept.lock:
        if job in _kept.works:
            return _kept.works[job]
    work = Work(job.work_folder(spec.name), key_fields(job, slide, spec))
    plan = work.resume()
    with _kept.lock:
        _keep(_kept.works, job, (work, plan))
    return work, plan


def _slide(job: Job) -> Slide:
    """The job's slide, opened once per process as long as the file stays the same."""
    path = slide_path(job)
    try:
        state = path.stat()
    except OSError:
        stamp: tuple[int, ...] = ()
    else:
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
    name = (path, job.slide_mpp, job.force, job.reader, job.fast_decode, *stamp)
    with _kept.lock:
        if name in _kept.slides:
            _kept.slides.move_to_end(name)
            return _kept.slides[name]
    try:
        slide = open_slide(
            path,
            job.slide_mpp,
            force=job.force,
            reader=job.reader,
            fast_decode=job.fast_decode,
            cache_bytes=job.memory // CACHE_SHARE,
        )
    except SlideError as error:
        root = Path(job.root)
        if error.reason is Reason.MISSING and job.root != job.slide and not (root.exists() and any(root.iterdir())):
            raise EnvironmentFault(
                f"folder {root} of the slides is gone or empty; mount it, then run the same again"
            ) from error
        raise
    with _kept.lock:
        # Closed when the last region that uses it lets go, not here.
        _keep(_kept.slides, name, slide)
    return slide


def _keep(kept: OrderedDict[K, V], name: K, value: V) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > KEPT_SLIDES:
        kept.popitem(last=False)


def _model(job: Job) -> Model:
    with _kept.model_lock:
        if _kept.threads != job.threads:
            set_threads(job.threads or 1)  # one while it is measured how many there should be
            _kept.threads = job.threads
        name = (job.model, job.device, job.precision, job.compile)
        if name not in _kept.models:
            _kept.models[name] = load_model(job.model, job.device, job.precision, job.compile)
        return _kept.models[name]


def _spec(job: Job) -> ModelSpec:
    """The card of the job's model, which is loaded for it only where there is no other way."""
    model = _kept.models.get((job.model, job.device, job.precision, job.compile))
    return _card(job.model) if model is None else model.spec


_card = functools.cache(load_spec)


@functools.cache
def _environment(device: str, threads: int) -> dict[str, str | int]:
    """`environment`, asked once for each; torch has been told of `threads` when its first model was loaded."""
    return environment(device)


def _predict(job: Job, in_order: bool) -> Predict:
    model = _model(job)
    if in_order:
        return functools.partial(predict_in_order, model, job.batch_size)
    with _kept.lock:
        name = (job.model, job.device, job.precision, job.compile, job.batch_size)
        if name not in _kept.predictors:
            _kept.predictors[name] = Predictor(model, job.batch_size, _kept.device_lock)
        return _kept.predictors[name].predict


def _pool(threads: int) -> ReadPool:
    with _kept.lock:
        if threads not in _kept.pools:
            _kept.pools[threads] = ReadPool(threads)
        return _kept.pools[threads]
