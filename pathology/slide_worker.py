"""What a worker does with slides, and needs no model for: begin one, read from it, end it.

Promise: every function takes names and numbers only, opens what it needs itself, and can be called again after a crash.
A process keeps its slides open between calls.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pathology.areas import file_sha256, read_tissue, within
from pathology.batches import ReadPool, read_chunk, read_tiles, windows
from pathology.calls import neighbour, run_by, sendable
from pathology.clock import Clock, counting
from pathology.durable import make_folders, sweep_temporaries
from pathology.encoding import choose_encoding, stored_bytes
from pathology.errors import EnvironmentFault, PathologyError, Reason, SlideError, UsageError
from pathology.events import emit
from pathology.faults import retried, share_fault
from pathology.finish import TISSUE_FILES, finish, put_back, read_manifest, read_record, write_if_changed
from pathology.grid import TileGrid
from pathology.job import FREE, OF_A_FILE, Job, is_of_one_slide, key_difference, key_of
from pathology.memory import CACHE_SHARE
from pathology.model import ModelSpec
from pathology.models import load_spec
from pathology.models.pool import pooled_spec
from pathology.plan import Plan, make_plan
from pathology.pulse import under_way
from pathology.readers import open_slide, whole_hashes
from pathology.slide import Slide
from pathology.staging import slide_path
from pathology.stain import VERSION as STAIN_VERSION
from pathology.stain import Stains, fit_stains, parameters
from pathology.threads import measure_reading
from pathology.thumbnail import LARGEST_PX, picture
from pathology.tissue import METHODS, TissueMask, find_tissue, tissue_geojson, tissue_png
from pathology.work import Work

KEPT_SLIDES = 4
# Of a card's fields those that came later: where they say nothing, results have the keys that they had without them.
LATER = ("margin_px", "features", "detections", "stain")

# The size of a plan's blocks, (rows, columns) in strides, and the row and column of one.
Cell = tuple[int, int, int, int]

K = TypeVar("K")
V = TypeVar("V")


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


@dataclass(frozen=True, slots=True)
class Area:
    """Where a job looks: how tissue is found, or the sha256 of its file, and that of the region of interest ("": none)."""

    tissue: str
    roi: str

    def fields(self) -> dict[str, str]:
        """Its part of a result's key."""
        return {"tissue": self.tissue} | ({"roi": self.roi} if self.roi else {})


class _Kept:
    """The open slides and works of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.slides: OrderedDict[tuple[object, ...], Slide] = OrderedDict()
        self.tissue: WeakKeyDictionary[Slide, dict[Area, TissueMask]] = WeakKeyDictionary()
        self.stains: WeakKeyDictionary[Slide, dict[Area, Stains]] = WeakKeyDictionary()
        self.tissue_files: WeakKeyDictionary[Slide, dict[Area, tuple[bytes, bytes]]] = WeakKeyDictionary()
        self.works: OrderedDict[Job, tuple[Work, Plan]] = OrderedDict()
        self.pools: dict[int, ReadPool] = {}
        self.grids: OrderedDict[Job, tuple[Slide, ModelSpec, TileGrid]] = OrderedDict()


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
        _tissue_files(slide, job)
        picture(slide, 1, LARGEST_PX)


def prepare_all(jobs: tuple[Job, ...], together: tuple[Job, ...]) -> tuple[Prepared | Exception, ...]:
    """`prepare` for jobs of one slide, one after the other; an error ends none but its own."""
    prepared: list[Prepared | Exception] = []
    for job in jobs:
        try:
            prepared.append(prepare(job, together))
        except Exception as error:
            prepared.append(sendable(error))
    return tuple(prepared)


def prepare(job: Job, together: tuple[Job, ...] = ()) -> Prepared:
    """Open the slide, find tissue, make or find the plan, and say what is left to do.

    together  all jobs that will read with it, itself among them: a new plan has the same regions for all

    Raises SlideError for a slide that cannot be worked on, UsageError for a result or work made otherwise,
    EnvironmentFault where the place the slides come from is gone.
    """
    if job.stage is not None and slide_path(job) == Path(job.slide):
        emit(Path(job.out), "slide-in-place", {"slide": job.slide_id, "why": "its copy is gone from the folder of --stage"})
    spec = _spec(job)
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
    _, plan = plan_slide(job, slide, spec, [_spec(other) for other in together])
    make_folders(work.folder, within=work.folder.parent if job.owner != FREE else None)
    sweep_temporaries(work.folder)
    _write_tissue(job, _tissue_files(slide, job), work)
    plan = work.begin(plan, job.overwrite)
    with _kept.lock:
        _keep(_kept.works, job, (work, plan))
    todo = work.todo(plan, whole=job.on_bad_tile == "fail")
    tiles = tuple(len(plan.regions[i].tiles) for i in todo)
    emit(Path(job.out), "slide-begin", {**what, "regions": len(plan.regions), "todo": len(todo), "tiles": sum(tiles)})
    cells = tuple((*plan.block, *plan.cell(plan.regions[i])) for i in todo)
    return Prepared(None, tuple(todo), tiles, cells, stored_bytes(spec, job.heatmap_dtype, plan.frame.shape, len(plan.tiles)))


def finish_slide(job: Job) -> dict[str, Any]:
    """Commit a job whose regions are all done; its record."""
    spec = _spec(job)
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
    emit(Path(job.out), "slide-done", {**what, "status": record["status"], "reason": record["reason"]})
    return record


def _finish(job: Job, slide: Slide, spec: ModelSpec, work: Work, plan: Plan) -> dict[str, Any]:
    require_unchanged(job, slide, work)
    if not all((job.slide_folder / name).is_file() for name in TISSUE_FILES):  # taken away since they were written
        _write_tissue(job, _tissue_files(slide, job), work)
    with under_way("read"):
        hashes = _hashes(job, slide.path) if job.hash_input else None
    record = finish(job, work, plan, slide, spec, _stains(slide, job) if spec.stain else None, hashes)
    with _kept.lock:
        _kept.works.pop(job, None)
    return record


def plan_slide(job: Job, slide: Slide, spec: ModelSpec, together: Sequence[ModelSpec] = ()) -> tuple[TissueMask, Plan]:
    """Tissue and plan of a job, as any run of it would make them. `together`: the cards of all models that it reads for."""
    tissue = _tissue(slide, job)
    plan = make_plan(
        _grid(job, slide, spec),
        spec,
        tissue,
        min_tissue=job.min_tissue,
        blend=job.blend,
        block=job.block,
        memory=job.memory,
        together=together,
    )
    return tissue, plan


def stain_of(job: Job) -> NDArray[np.float32] | None:
    """The parameters of the slide's stains as the job's model takes them; None where it takes none."""
    spec = _spec(job)
    return parameters(spec.stain, _stains(open_slide_of(job), job)) if spec.stain else None


def seconds_to_read(jobs: tuple[Job, ...]) -> float:
    """Seconds to read a tile from the middle of the first slide that opens; 0 where none does."""
    for job in jobs:
        try:
            slide, spec, grid = _tiled(job)
            middle = np.array([[max(0, n // 2 - 2) for n in grid.shape]], np.int32)
            tiles = middle + np.indices((4, 4), np.int32).reshape(2, -1).T
            return measure_reading(read_tiles(slide, spec, grid, tiles[(tiles < grid.shape).all(axis=1)], None))
        except (SlideError, EnvironmentFault):
            continue  # it is named when its turn comes
    return 0.0


def begin_reading(job: Job, row: NDArray[np.int32]) -> bool:
    """Open the job's slide for reading rows of tiles (row, col) like `row`; whether it lies on slow storage."""
    slide, spec, grid = _tiled(job, again=True)
    with _kept.lock:
        begun = _kept.works.get(job)
    if begun is not None:
        require_unchanged(job, slide, begun[0])
    slide.reserve(windows(slide, spec, grid, row))
    return slide.slow


@run_by(lambda job, *_: pool(job.readers).decode)
def read_into(job: Job, tiles: NDArray[np.int32], place: int) -> ChunkRead:
    """Read tiles (row, col) side by side into the block at `place` of the memory that the neighbour sees."""
    slide, spec, grid = _tiled(job)
    beside = neighbour()
    assert beside is not None
    shape = (len(tiles), spec.input_px, spec.input_px, 3)
    block = beside.memory.array(place, math.prod(shape)).reshape(shape)
    clock, readable = Clock(), []
    with counting(clock):
        for slot, tile in zip(block, read_chunk(slide, spec, grid, tiles), strict=True):
            readable.append(tile is not None)
            if tile is not None:
                slot[...] = tile
    return ChunkRead(tuple(readable), clock.seconds(), slide.slow)


@run_by(lambda job, *_: pool(job.readers).fetch)
def fetch(job: Job, tiles: NDArray[np.int32]) -> dict[str, float]:
    """Fetch the bytes under tiles (row, col), for reads that follow; the seconds it took, by stage."""
    slide, spec, grid = _tiled(job)
    clock = Clock()
    with counting(clock):
        slide.prefetch(windows(slide, spec, grid, tiles))
    return clock.seconds()


def require_unchanged(job: Job, slide: Slide, work: Work) -> None:
    """Raise SlideError where the slide as it is now is not the one that `work` was begun with."""
    if slide.info.fingerprint != work.fields["slide"]:
        raise SlideError(
            Reason.CHANGED,
            f"slide {job.slide_id} changed while it was worked on; bring back the file it was begun with, "
            "or drop what was done with --overwrite",
        )


def _grid(job: Job, slide: Slide, spec: ModelSpec) -> TileGrid:
    return TileGrid(slide.info.shape, slide.info.mpp, spec.mpp, spec.tile_px, job.stride_px(spec))


def _tiled(job: Job, again: bool = False) -> tuple[Slide, ModelSpec, TileGrid]:
    """The job's slide, card and grid. `again`: after a look whether the file is still the same."""
    with _kept.lock:
        if not again and job in _kept.grids:
            return _kept.grids[job]
    slide, spec = open_slide_of(job), _spec(job)
    grid = _grid(job, slide, spec)
    with _kept.lock:
        _keep(_kept.grids, job, (slide, spec, grid))
    return slide, spec, grid


def _area(job: Job) -> Area:
    return Area(
        job.tissue if job.tissue in METHODS else f"{OF_A_FILE}{file_sha256(Path(job.tissue))}",
        "" if job.roi is None else file_sha256(Path(job.roi)),
    )


def _tissue(slide: Slide, job: Job) -> TissueMask:
    """The slide's tissue as the job wants it, found once as long as it is open."""
    area, found = _area(job), _kept.tissue.setdefault(slide, {})
    if area not in found:
        method = job.tissue
        tissue = find_tissue(slide, method) if method in METHODS else read_tissue(Path(method), slide.info)
        found[area] = tissue if job.roi is None else within(tissue, Path(job.roi), slide.info)
    return found[area]


def _stains(slide: Slide, job: Job) -> Stains:
    """The slide's stains, fitted once as long as it is open; to all of its tissue, whatever part a job looks at."""
    whole = replace(job, roi=None)
    area, fitted = _area(whole), _kept.stains.setdefault(slide, {})
    if area not in fitted:
        fitted[area] = fit_stains(slide, _tissue(slide, whole))
    return fitted[area]


def _tissue_files(slide: Slide, job: Job) -> tuple[bytes, bytes]:
    """The contents of `TISSUE_FILES`, made once as long as the slide is open."""
    area, made = _area(job), _kept.tissue_files.setdefault(slide, {})
    if area not in made:
        tissue = _tissue(slide, job)
        made[area] = tissue_geojson(tissue, slide.info.fingerprint), tissue_png(slide, tissue)
    return made[area]


def key_fields(job: Job, slide: Slide, spec: ModelSpec) -> dict[str, Any]:
    """What decides a result's values, and nothing else: JSON values under their option's name where there is one."""
    dtype = choose_encoding(spec, job.heatmap_dtype).dtype
    return {
        "schema": 1,
        "slide": slide.info.fingerprint,
        "slide_mpp": slide.info.mpp,
        "fast_decode": job.fast_decode,
        "reader": slide.info.reader.split()[0],
        "model": spec.sha256,
        "card": key_of({name: value for name, value in asdict(spec).items() if name not in LATER or value}),
        "tile_px": spec.tile_px,
        "stride_px": job.stride_px(spec),
        **_area(job).fields(),
        "min_tissue": job.min_tissue,
        "blend": job.blend if spec.output == "map" else "none",
        "precision": job.precision,
        "compile": job.compile,
        **({} if dtype == "float32" else {"heatmap_dtype": dtype}),
        # The stains themselves follow from what is above and from how they are fitted.
        **({"stain": f"{spec.stain} {STAIN_VERSION}"} if spec.stain else {}),
    }


def key_fields_of(job: Job) -> dict[str, Any]:
    """`key_fields` of a job's slide and model."""
    return key_fields(job, open_slide_of(job), _spec(job))


def open_work(job: Job, fields: Callable[[Job], dict[str, Any]] = key_fields_of) -> tuple[Work, Plan]:
    """The job's work folder and plan, as `prepare` left them, maybe in another process. `fields` gives what it is keyed by."""
    with _kept.lock:
        if job in _kept.works:
            return _kept.works[job]
    work = Work(job.work_folder(_spec(job).name), fields(job))
    plan = work.resume()
    with _kept.lock:
        _keep(_kept.works, job, (work, plan))
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


def open_slide_of(job: Job) -> Slide:
    """The job's slide, opened once per process as long as the file stays the same."""
    path = slide_path(job)
    stamp: tuple[int, ...] = ()
    with suppress(OSError), under_way("read"):
        state = path.stat()
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
    name = (path, job.slide_mpp, job.force, job.reader, job.fast_decode, *stamp)
    with _kept.lock:
        if name in _kept.slides:
            _kept.slides.move_to_end(name)
            return _kept.slides[name]
    try:
        with under_way("read"):
            slide = open_slide(
                path,
                job.slide_mpp,
                force=job.force,
                reader=job.reader,
                fast_decode=job.fast_decode,
                cache_bytes=job.memory // CACHE_SHARE,
            )
    except SlideError as error:
        fault = share_fault(error, path, Path(job.root))
        raise (fault or error) from error.__cause__
    with _kept.lock:
        # Closed when the last region that uses it lets go, not here.
        _keep(_kept.slides, name, slide)
    return slide


def _keep(kept: OrderedDict[K, V], name: K, value: V) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > KEPT_SLIDES:
        kept.popitem(last=False)


def _spec(job: Job) -> ModelSpec:
    """The card of the job's model, which is loaded for it only where there is no other way."""
    if job.model not in cards:
        cards[job.model] = load_spec(job.model)
    return pooled_spec(cards[job.model], job.heatmap_mpp)


# Of models whose card was read, or that were loaded in this process; before their maps are pooled.
cards: dict[str, ModelSpec] = {}
