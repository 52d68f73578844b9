"""What a worker does with slides, and needs no model for: begin one, read from it, end it.

Promise: every function takes names and numbers only, opens what it needs itself, and can be called again after a crash.
A process keeps its slides open between calls.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.batches import ReadPool, read_chunk, read_tiles, windows
from pathology.calls import neighbour, run_by, sendable
from pathology.clock import Clock, counting
from pathology.durable import make_folders, sweep_temporaries
from pathology.encoding import stored_bytes
from pathology.errors import EnvironmentFault, PathologyError, Reason, SlideError, UsageError
from pathology.events import emit
from pathology.faults import retried, share_fault
from pathology.finish import TISSUE_FILES, finish, put_back, read_manifest, read_record, write_if_changed
from pathology.heap import give_back
from pathology.job import FREE, Job, is_of_one_slide, key_difference, key_of
from pathology.job_slide import (
    keep,
    key_fields,
    key_fields_of,
    open_slide_of,
    plan_slide,
    spec_of,
    stains_of,
    tiled,
    tissue_files,
)
from pathology.model import ModelSpec
from pathology.plan import Plan
from pathology.pulse import under_way
from pathology.readers import whole_hashes
from pathology.slide import Slide
from pathology.staging import slide_path
from pathology.threads import measure_reading
from pathology.thumbnail import LARGEST_PX, picture
from pathology.work import Work

# The size of a plan's blocks, (rows, columns) in strides, and the row and column of one.
Cell = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is left of a job.

    record   result.json of a job that was finished before, None otherwise
    todo     regions to infer; none and no record: only the end is missing
    tiles    forward passes per region of `todo`
    bytes    of the result before it is compressed, at most
    cells    where each lies: equal for regions of several models that show the same part of the slide, and need the same tiles
    """

    record: dict[str, Any] | None
    todo: tuple[int, ...] = ()
    tiles: tuple[int, ...] = ()
    cells: tuple[Cell, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Tiles that were read: which of them could be, the seconds it took by stage, and whether the storage is slow."""

    readable: tuple[bool, ...]
    seconds: dict[str, float]
    slow: bool


class _Kept:
    """The works and reading threads of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.works: OrderedDict[Job, tuple[Work, Plan]] = OrderedDict()
        self.pools: dict[int, ReadPool] = {}


_kept = _Kept()


def pool(readers: int) -> ReadPool:
    """The threads that read in this process; one pool for each number of them."""
    with _kept.lock:
        if readers not in _kept.pools:
            _kept.pools[readers] = ReadPool(readers)
        return _kept.pools[readers]


def look(job: Job) -> None:
    """Open the job's slide, find its tissue and make its picture, so that `prepare` finds them. What fails is left to it."""
    with suppress(PathologyError):
        slide = open_slide_of(job)
        tissue_files(slide, job)
        picture(slide, 1, LARGEST_PX)


def prepare_all(jobs: tuple[Job, ...], together: tuple[Job, ...]) -> tuple[Prepared | Exception, ...]:
    """`prepare` for jobs of one slide, one after the other; an error ends none but its own."""
    prepared: list[Prepared | Exception] = []
    for job in jobs:
        try:
            prepared.append(prepare(job, together))
        except Exception as error:
            prepared.append(sendable(error))
    give_back()  # pictures of the whole slide, in which tissue was found
    return tuple(prepared)


def prepare(job: Job, together: tuple[Job, ...] = ()) -> Prepared:
    """Open the slide, find tissue, make or find the plan, and say what is left to do.

    together  all jobs that will read with it, itself among them: a new plan has the same regions for all

    Raises SlideError for a slide that cannot be worked on, UsageError for a result or work made otherwise,
    EnvironmentFault where the place the slides come from is gone.
    """
    if job.stage is not None and slide_path(job) == Path(job.slide):
        emit(Path(job.out), "slide-in-place", {"slide": job.slide_id, "why": "its copy is gone from the folder of --stage"})
    spec = spec_of(job)
    what = {"slide": job.slide_id, "model": spec.name}
    emit(Path(job.out), "slide-open", what)
    slide = open_slide_of(job)
    fields = key_fields(job, slide, spec)
    work = Work(job.work_folder(spec.name), fields)
    put_back(job.result_folder(spec.name), work)
    record = _finished(job, spec, fields)
    if record is not None:
        work.clear()
        return Prepared(record)
    _, plan = plan_slide(job, slide, spec, [spec_of(other) for other in together])
    make_folders(work.folder, within=work.folder.parent if job.owner != FREE else None)
    sweep_temporaries(work.folder)
    _write_tissue(job, tissue_files(slide, job), work)
    plan = work.begin(plan, job.overwrite)
    with _kept.lock:
        keep(_kept.works, job, (work, plan))
    todo = work.todo(plan, whole=job.on_bad_tile == "fail")
    tiles = tuple(len(plan.regions[i].tiles) for i in todo)
    emit(Path(job.out), "slide-begin", {**what, "regions": len(plan.regions), "todo": len(todo), "tiles": sum(tiles)})
    cells = tuple((*plan.block, *plan.cell(plan.regions[i])) for i in todo)
    return Prepared(None, tuple(todo), tiles, cells, stored_bytes(spec, job.heatmap_dtype, plan.frame.shape, len(plan.tiles)))


def finish_slide(job: Job) -> dict[str, Any]:
    """Commit a job whose regions are all done; its record."""
    spec = spec_of(job)
    what = {"slide": job.slide_id, "model": spec.name}
    emit(Path(job.out), "slide-finish", what)
    slide = open_slide_of(job)
    try:
        work, plan = open_work(job)
    except SlideError:
        # A worker that died here may have committed it: then the work is gone because it is done.
        committed = _finished(replace(job, overwrite=False), spec, key_fields(job, slide, spec))
        if committed is None:
            raise
        record = committed
    else:
        record = _finish(job, slide, spec, work, plan)
        give_back()  # pieces of the whole heatmap
    emit(Path(job.out), "slide-done", {**what, "status": record["status"], "reason": record["reason"]})
    return record


def _finish(job: Job, slide: Slide, spec: ModelSpec, work: Work, plan: Plan) -> dict[str, Any]:
    _require_of(job, slide, work)
    if not all((job.slide_folder / name).is_file() for name in TISSUE_FILES):  # taken away since they were written
        _write_tissue(job, tissue_files(slide, job), work)
    with under_way("read"):
        hashes = _hashes(job, slide.path) if job.hash_input else None
    record = finish(job, work, plan, slide, spec, stains_of(slide, job) if spec.stain else None, hashes)
    with _kept.lock:
        _kept.works.pop(job, None)
    return record


def seconds_to_read(jobs: tuple[Job, ...]) -> float:
    """Seconds to read a tile from the middle of the first slide that opens; 0 where none does."""
    for job in jobs:
        try:
            slide, spec, grid = tiled(job)
            middle = np.array([[max(0, n // 2 - 2) for n in grid.shape]], np.int32)
            tiles = middle + np.indices((4, 4), np.int32).reshape(2, -1).T
            return measure_reading(read_tiles(slide, spec, grid, tiles[(tiles < grid.shape).all(axis=1)], None))
        except (SlideError, EnvironmentFault):
            continue  # it is named when its turn comes
    return 0.0


def begin_reading(job: Job, row: NDArray[np.int32]) -> bool:
    """Open the job's slide for reading rows of tiles (row, col) like `row`; whether it lies on slow storage."""
    require_unchanged(job)
    slide, spec, grid = tiled(job)
    slide.reserve(windows(slide, spec, grid, row))
    return slide.slow


@run_by(lambda job, tiles, threads, place: pool(threads).decode)
def read_into(job: Job, tiles: NDArray[np.int32], threads: int, place: int) -> ChunkRead:
    """Read tiles (row, col) side by side, in one of so many threads, into the block at `place` of the memory that both see."""
    slide, spec, grid = tiled(job)
    beside = neighbour()
    assert beside is not None
    shape = (len(tiles), spec.input_px, spec.input_px, 3)
    block = beside.memory.array(place, math.prod(shape)).reshape(shape)
    clock = Clock()
    with counting(clock):
        readable = tuple(tile is not None for tile in read_chunk(slide, spec, grid, tiles, block))
    return ChunkRead(readable, clock.seconds(), slide.slow)


@run_by(lambda job, tiles, threads: pool(threads).fetch)
def fetch(job: Job, tiles: NDArray[np.int32], threads: int) -> dict[str, float]:
    """Fetch the bytes under tiles (row, col), for reads that follow by `threads`; the seconds it took, by stage."""
    slide, spec, grid = tiled(job)
    clock = Clock()
    with counting(clock):
        slide.prefetch(windows(slide, spec, grid, tiles))
    return clock.seconds()


def require_unchanged(job: Job) -> None:
    """Raise SlideError where the job's slide as it is now is not the one that its work was begun with."""
    slide, _, _ = tiled(job, again=True)
    _require_of(job, slide, open_work(job)[0])


def _require_of(job: Job, slide: Slide, work: Work) -> None:
    if slide.info.fingerprint != work.fields["slide"]:
        raise SlideError(
            Reason.CHANGED,
            f"slide {job.slide_id} changed while it was worked on; bring back the file it was begun with, "
            "or drop what was done with --overwrite",
        )


def open_work(job: Job, fields: Callable[[Job], dict[str, Any]] = key_fields_of) -> tuple[Work, Plan]:
    """The job's work folder and plan, as `prepare` left them, maybe in another process. `fields` gives what it is keyed by."""
    with _kept.lock:
        if job in _kept.works:
            return _kept.works[job]
    work = Work(job.work_folder(spec_of(job).name), fields(job))
    plan = work.resume()
    with _kept.lock:
        keep(_kept.works, job, (work, plan))
    return work, plan


def _hashes(job: Job, path: Path) -> dict[str, str]:
    try:
        return retried(lambda: whole_hashes(path))
    except SlideError as error:
        raise (share_fault(error, path, Path(job.root)) or error) from error.__cause__


def _finished(job: Job, spec: ModelSpec, fields: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished result of this very key whose files are all there; None where there is none to keep."""
    folder = job.result_folder(spec.name)
    try:
        manifest, record = read_manifest(folder), read_record(folder)
    except (SlideError, UsageError):
        if job.overwrite:
            return None
        raise
    if manifest is None:
        return None
    if manifest["key"] != key_of(fields):
        if job.overwrite:
            return None
        difference = key_difference(manifest["fields"], fields)
        message = (
            f"result {job.slide_id}/{spec.name} was made otherwise ({difference}); choose another --out or pass --overwrite"
        )
        raise SlideError(Reason.CHANGED, message) if is_of_one_slide(manifest["fields"], fields) else UsageError(message)
    sizes = {folder / name: entry["bytes"] for name, entry in manifest["files"].items()}
    sizes |= {job.slide_folder / name: entry["bytes"] for name, entry in manifest["slide_files"].items()}
    broken = [path.name for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size]
    if not broken and record is not None and not (record["status"] == "partial" and job.overwrite):
        return record
    if job.overwrite:
        return None
    name = broken[0] if broken else "result.json"
    raise SlideError(
        Reason.CHANGED,
        f"result {job.slide_id}/{spec.name} is damaged: {name} is gone or has another size; pathology verify --repair, "
        "or --overwrite, makes it again",
    )


def _write_tissue(job: Job, contents: tuple[bytes, bytes], work: Work) -> None:
    for name, data in zip(TISSUE_FILES, contents, strict=True):
        path = job.slide_folder / name
        others = list(job.slide_folder.glob("*/manifest.json")) if path.exists() else []
        if others and not job.overwrite and path.read_bytes() != data:
            message = f"slide {job.slide_id} has results for tissue found otherwise; choose another --out, or pass --overwrite"
            area = _of_tissue(work.fields)
            found = [_of_tissue(manifest["fields"]) for other in others if (manifest := read_manifest(other.parent))]
            raise SlideError(Reason.CHANGED, message) if all(is_of_one_slide(f, area) for f in found) else UsageError(message)
        write_if_changed(path, data, work.folder)


def _of_tissue(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of a key decides the tissue that is found."""
    return {name: fields[name] for name in ("slide", "slide_mpp", "reader", "tissue", "roi") if name in fields}
