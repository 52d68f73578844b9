"""Several models at one slide: its tiles are read once for all that read alike, and each result is as if it were alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology import job_slide, slide_worker, worker
from pathology.batches import chunk_tiles
from pathology.calls import neighbour
from pathology.clock import STAGES, Clock
from pathology.errors import EnvironmentFault, Reason, SlideError
from pathology.events import read_events
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.integrity import verify
from pathology.job import Job
from pathology.memory import memory_bound
from pathology.model import ReadRule
from pathology.models import load_spec
from pathology.outcome import Interrupted, Progress
from pathology.plan import CANVAS_SHARE, choose_block, cut
from pathology.process import WorkerProcesses
from pathology.readers.direct import DirectReader
from pathology.runner import run
from pathology.slide import Slide
from pathology.stitch import canvas_bytes
from pathology.testing import constant, mean_colour
from pathology.together import Handout, ReadingEnded, groups, tiles_handed
from pipelines.cli import main
from tests.crashing import POISON
from tests.slides import noise_pixels, smooth_pixels, write_tiff
from tests.whole import all_tiles

TILE = 32
MEAN = f"pathology.testing:mean_colour?tile_px={TILE}&mpp=0.5"
SAME = f"pathology.testing:constant?tile_px={TILE}&mpp=0.5"
DENSE = f"pathology.testing:identity?tile_px={TILE}&mpp=0.5"
VECTOR = f"pathology.testing:thumbnail?tile_px={TILE}&mpp=0.5"
MARKS = f"pathology.testing:marks?tile_px={TILE}&mpp=0.5"
COARSE = f"pathology.testing:constant?tile_px={TILE}&mpp=1.0"
UNSURE = "tests.crashing:unsure"
FRAGILE = "tests.crashing:fragile"
EACH_KIND = (MEAN, DENSE, VECTOR, MARKS)
# Source tiles as large as a region: whoever reads a region decodes four of them, and a cache of two rows keeps none for others.
SOURCE = 64


def job_of(slide: Path, out: Path, model: str, **more: Any) -> Job:
    options = {"tissue": "none", "block": 4, "batch_size": 4, "memory": 2**20, **more}
    return Job(slide=str(slide), slide_id=slide.stem, root=str(slide.parent), model=model, out=str(out), **options)


def jobs_of(slide: Path, out: Path, *models: str, **more: Any) -> list[Job]:
    return [job_of(slide, out, model, **more) for model in models]


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


def ended(jobs: Sequence[Job], scheduler: str = "sync") -> dict[str, tuple[str, str | None]]:
    return {load_spec(o.job.model).name: (o.status, o.reason) for o in run(jobs, scheduler)}


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """512 x 640 px: 16 x 20 tiles of 32 px, 20 regions of 4 x 4, each over 4 source tiles."""
    return write_tiff(tmp_path / "slide.svs", [smooth_pixels(512, 640)], compression="jpeg", tile_px=SOURCE)


def test_check_states_the_memory_of_all_that_read_together(slide: Path, tmp_path: Path) -> None:
    def checked(*models: str) -> dict[str, tuple[list[str], int]]:
        named = [argument for model in models for argument in ("--model", model)]
        done = CliRunner().invoke(main, ["check", str(slide), "--tissue", "none", "--num-workers", "1", "--json", *named])
        assert done.exit_code == 0, done.output
        lines = [json.loads(line) for line in done.output.splitlines()]
        return {line["model"]: (line["read_with"], line["memory_bytes"]) for line in lines}

    together = checked(DENSE, SAME, COARSE.replace("constant", "mean_colour"))
    assert {model: others for model, (others, _) in together.items()} == {
        "identity": ["constant"],
        "constant": ["identity"],
        "mean-colour": [],
    }
    assert together["identity"][1] == together["constant"][1] > together["mean-colour"][1]


class Counted:
    """What regions read: tiles of models, and source tiles decoded. What slides' beginnings and ends read does not count."""

    def __init__(self) -> None:
        self.tiles = self.decodes = 0
        self.regions = threading.local()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    count, lock = Counted(), threading.Lock()
    read_strip, decode, begin = Slide.read_strip, DirectReader._decode, slide_worker.prepare_all

    def reading(self: Slide, windows: Any, *into: Any) -> Any:
        with lock:
            count.tiles += len(windows)
        count.regions.reading = True
        try:
            return read_strip(self, windows, *into)
        finally:
            count.regions.reading = False

    def decoding(self: DirectReader, file: Any, names: Any) -> Any:
        with lock:
            count.decodes += len(names) * getattr(count.regions, "reading", False)
        return decode(self, file, names)

    def beginning(jobs: Any, together: Any) -> Any:
        job_slide._kept.slides.clear()  # with what is decoded
        return begin(jobs, together)

    monkeypatch.setattr(Slide, "read_strip", reading)
    monkeypatch.setattr(DirectReader, "_decode", decoding)
    monkeypatch.setattr(slide_worker, "prepare_all", beginning)
    return count


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.parametrize("models", [(MEAN,), (MEAN, SAME), (MEAN, SAME, DENSE)])
def test_a_slide_is_decoded_once_for_all_models(
    scheduler: str, models: tuple[str, ...], slide: Path, tmp_path: Path, counted: Counted
) -> None:
    found = ended(jobs_of(slide, tmp_path / "out", *models), scheduler)
    assert set(found.values()) == {("ok", None)}
    assert len(found) == len(models)
    assert (counted.tiles, counted.decodes) == (16 * 20, 8 * 10)


def test_run_one_after_the_other_each_model_decodes_for_itself(slide: Path, tmp_path: Path, counted: Counted) -> None:
    for model in (MEAN, SAME):
        ended(jobs_of(slide, tmp_path / "out", model))
    assert (counted.tiles, counted.decodes) == (2 * 16 * 20, 2 * 8 * 10)


def test_models_of_another_resolution_run_apart(slide: Path, tmp_path: Path, counted: Counted) -> None:
    jobs = jobs_of(slide, tmp_path / "out", MEAN, SAME.replace("constant", "identity"), COARSE)
    assert groups(jobs, [load_spec(job.model) for job in jobs]) == [(0, 1), (2,)]
    assert set(ended(jobs).values()) == {("ok", None)}
    assert counted.tiles == 16 * 20 + 8 * 10


def test_dense_tiles_beyond_a_region_are_read_with_a_classifiers(slide: Path, tmp_path: Path, counted: Counted) -> None:
    dense, both = tmp_path / "dense", tmp_path / "both"
    ended(jobs_of(slide, dense, DENSE, overlap=0.5))
    alone = counted.tiles
    counted.tiles = 0
    ended(jobs_of(slide, both, MEAN, DENSE, overlap=0.5))
    assert counted.tiles == alone > 31 * 39
    assert manifests(both)["identity"] == manifests(dense)["identity"]


SCHEDULERS = ["sync", "threads", pytest.param("processes", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 x 256 px."""
    path = tmp_path_factory.mktemp("small") / "small.svs"
    return write_tiff(path, [smooth_pixels(200, 256)], compression="jpeg", tile_px=SOURCE)


@pytest.fixture(scope="module", params=[0.0, 0.5])
def apart(
    request: pytest.FixtureRequest, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, dict[str, bytes]]:
    """An overlap, and the manifests of runs of one model each."""
    out = tmp_path_factory.mktemp("apart")
    for model in EACH_KIND:
        ended(jobs_of(small, out, model, overlap=request.param))
    return request.param, manifests(out)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_results_are_those_of_separate_runs(
    scheduler: str, apart: tuple[float, dict[str, bytes]], small: Path, tmp_path: Path
) -> None:
    (overlap, expected), both = apart, tmp_path / "both"
    seen: list[Progress] = []
    jobs = jobs_of(small, both, *EACH_KIND, overlap=overlap)
    assert [o.status for o in run(jobs, scheduler, progress=seen.append)] == ["ok"] * 4
    assert manifests(both) == expected
    assert len(expected) == 4
    assert list(verify(both)) == []
    planned = {p.job.model: p.tiles for p in seen if p.event == "planned"}
    done = {model: sum(p.tiles for p in seen if p.event == "region" and p.job.model == model) for model in planned}
    assert planned == done
    assert not list((both / ".work").glob("*/*/*/plan.json"))


def test_a_region_that_is_done_is_not_computed_again(slide: Path, tmp_path: Path) -> None:
    """As it is asked for where its worker died before it could answer."""
    jobs = tuple(jobs_of(slide, tmp_path, MEAN, SAME))
    assert [len(p.todo) for p in slide_worker.prepare_all(jobs, jobs) if isinstance(p, slide_worker.Prepared)] == [20, 20]
    assert worker.run_regions(jobs[:1], (3,)) == worker.run_regions(jobs[:1], (3,)) == (16,)
    assert worker.run_regions(jobs, (3, 3)) == worker.run_regions(jobs, (3, 3)) == (16, 16)
    done = [(e["model"], e["region"]) for e in read_events(tmp_path) if e["event"] == "region-done"]
    assert sorted(done) == [("constant", 3), ("mean-colour", 3)]


def decodes() -> int:
    """Source tiles that this process decoded so far, of the slides that are open."""
    return sum(slide._reader.decodes for slide in job_slide._kept.slides.values())  # type: ignore[attr-defined]


def test_the_neighbour_reads_once_for_all(slide: Path, tmp_path: Path) -> None:
    jobs = tuple(jobs_of(slide, tmp_path / "out", MEAN, SAME, DENSE))
    with closing(WorkerProcesses()) as own:
        assert [len(p.todo) for p in own.call("slides", slide_worker.prepare_all, jobs, jobs)] == [20] * 3
        before = own.call("slides", decodes)
        for index in range(20):
            assert own.call("device", worker.run_regions, jobs, (index,) * 3) == (16, 16, 16)
        read = own.call("slides", decodes) - before
        assert read == 8 * 10
        assert all(p.todo == () for p in own.call("slides", slide_worker.prepare_all, jobs, jobs))


def decodes_of_each_reader() -> list[int]:
    """In the process for a device: `decodes` of those that read for it."""
    beside = neighbour()
    assert beside is not None
    return [reader.ask(decodes).result() for reader in beside.readers]


def test_a_region_is_read_by_one_process_and_regions_by_all(slide: Path, tmp_path: Path) -> None:
    (job,) = jobs = tuple(jobs_of(slide, tmp_path / "out", MEAN, readers=4))
    with closing(WorkerProcesses(readers=2)) as own, ThreadPoolExecutor(2) as pool:
        assert [len(p.todo) for p in own.call("slides", slide_worker.prepare_all, jobs, jobs)] == [20]
        first = own.call("device", decodes_of_each_reader)
        assert list(pool.map(lambda index: own.call("device", worker.run_regions, jobs, (index,)), range(20))) == [(16,)] * 20
        read = np.subtract(own.call("device", decodes_of_each_reader), first).tolist()
        assert sum(read) == 20 * 4
        assert min(read) > 0
        own.call("slides", slide_worker.finish_slide, job)
    (expected,) = jobs_of(slide, tmp_path / "expected", MEAN, readers=4)
    assert ended([expected]) == {"mean-colour": ("ok", None)}
    assert manifests(tmp_path / "out") == manifests(tmp_path / "expected")


def stopped(jobs: Sequence[Job], regions: int) -> None:
    """Run until so many regions are done."""
    stop, seen = threading.Event(), []

    def watch(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == regions:
            stop.set()

    with pytest.raises(Interrupted):
        list(run(jobs, "sync", progress=watch, stop=stop))


def regions_done(out: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in read_events(out):
        if event["event"] == "region-done":
            found.setdefault(event["model"], []).append(event["region"])
    return found


def test_a_killed_run_goes_on_with_any_of_its_models(slide: Path, tmp_path: Path, counted: Counted) -> None:
    apart, out = tmp_path / "apart", tmp_path / "out"
    for model in (MEAN, SAME):
        ended(jobs_of(slide, apart, model))
    both = jobs_of(slide, out, MEAN, SAME)
    counted.tiles = 0
    stopped(both, 6)
    assert [len(regions) for regions in regions_done(out).values()] == [3, 3]
    stopped(both[:1], 8)  # eight more of the first model alone
    assert counted.tiles == 3 * 16 + 8 * 16
    counted.tiles = 0
    assert ended(both) == {"mean-colour": ("ok", None), "constant": ("ok", None)}
    assert counted.tiles == 17 * 16, "nine regions for both, eight for the second alone"
    assert {model: sorted(regions) for model, regions in regions_done(out).items()} == {
        "mean-colour": [*range(20)],
        "constant": [*range(20)],
    }
    assert manifests(out) == manifests(apart)


def test_a_model_added_later_is_run_alone(slide: Path, tmp_path: Path, counted: Counted) -> None:
    ended(jobs_of(slide, tmp_path, MEAN))
    before = counted.tiles
    outcomes = {o.job.model: (o.status, o.before) for o in run(jobs_of(slide, tmp_path, MEAN, DENSE), "sync")}
    assert outcomes == {MEAN: ("ok", True), DENSE: ("ok", False)}
    assert counted.tiles == 2 * before


def test_regions_cut_otherwise_before_are_read_apart(slide: Path, tmp_path: Path, counted: Counted) -> None:
    apart, out = tmp_path / "apart", tmp_path / "out"
    ended(jobs_of(slide, apart, DENSE))
    stopped(jobs_of(slide, out, DENSE), 3)
    counted.tiles = 0
    jobs = jobs_of(slide, out, MEAN, DENSE, block=5)
    assert set(ended(jobs).values()) == {("ok", None)}
    assert counted.tiles == 16 * 20 + 17 * 16
    assert manifests(out)["identity"] == manifests(apart)["identity"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_model_that_fails_fails_alone(scheduler: str, slide: Path, tmp_path: Path) -> None:
    ended(jobs_of(slide, tmp_path / "apart", MEAN))
    found = ended(jobs_of(slide, tmp_path / "out", MEAN, UNSURE, SAME), scheduler)
    assert found == {"mean-colour": ("ok", None), "unsure": ("failed", Reason.BAD_SCORES), "constant": ("ok", None)}
    assert manifests(tmp_path / "out")["mean-colour"] == manifests(tmp_path / "apart")["mean-colour"]


@pytest.mark.slow
def test_a_model_that_kills_its_worker_fails_alone(tmp_path: Path) -> None:
    pixels = noise_pixels(256, 320)
    pixels[128, 96] = POISON
    slide = write_tiff(tmp_path / "s.svs", [pixels])
    found = ended(jobs_of(slide, tmp_path / "out", SAME, FRAGILE), "processes")
    assert found == {"constant": ("ok", None), "mean-colour": ("failed", Reason.CRASHED)}


def test_bad_tiles_are_bad_for_all(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_strip = Slide.read_strip

    def damaged(self: Slide, windows: Any, *into: Any) -> Any:
        if any(not window.box.intersect(Box(70, 70, 8, 8)).empty for window in windows):
            raise SlideError(Reason.CORRUPT_TILES, "cannot be decoded")
        return read_strip(self, windows, *into)

    monkeypatch.setattr(Slide, "read_strip", damaged)
    for out, chosen in (("apart", [(MEAN,), (DENSE,)]), ("both", [(MEAN, DENSE)])):
        for models in chosen:
            assert set(ended(jobs_of(slide, tmp_path / out, *models)).values()) == {("partial", None)}
    assert manifests(tmp_path / "both") == manifests(tmp_path / "apart")


@pytest.mark.parametrize("error", [SlideError(Reason.READ_ERROR, "the share is gone"), ValueError("a bug")])
def test_what_ends_reading_ends_all(error: Exception, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Slide, windows: Any, *into: Any) -> Any:
        raise error

    monkeypatch.setattr(Slide, "read_strip", gone)
    reason = error.reason if isinstance(error, SlideError) else Reason.INTERNAL
    assert set(ended(jobs_of(slide, tmp_path, MEAN, SAME)).values()) == {("failed", reason)}


def test_a_fault_of_the_machine_ends_the_run(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise EnvironmentFault("no room")

    monkeypatch.setattr("pathology.work.Work.mark", full)
    with pytest.raises(EnvironmentFault, match="no room"):
        list(run(jobs_of(slide, tmp_path, MEAN, SAME), "sync"))


def test_jobs_that_differ_in_what_is_read_are_no_group(tmp_path: Path) -> None:
    first = job_of(tmp_path / "a.svs", tmp_path, MEAN)
    spec = mean_colour(TILE).spec
    others = [
        (
            replace(first, model=SAME, precision="bf16", batch_size=8, blend="constant", heatmap_dtype="uint8"),
            constant(TILE).spec,
        ),
        (replace(first, fast_decode=True), spec),
        (replace(first, overlap=0.5), spec),
        (replace(first, min_tissue=0.5), spec),
        (replace(first, threads=2), spec),
        (first, replace(spec, mpp=0.25)),
        (first, replace(spec, input_px=64)),
        (first, replace(spec, read=ReadRule(level="0"))),
        (replace(first, slide="b.svs"), spec),
        (first, spec),  # another slide lies between
    ]
    jobs, specs = zip((first, spec), *others, strict=True)
    assert groups(jobs, specs) == [(0, 1), *((place,) for place in range(2, 11))]


@settings(max_examples=20)
@given(st.lists(st.sampled_from([(1, 3), (TILE, 1), (TILE, 4), (TILE // 2, 2)]), min_size=1, max_size=4), st.data())
def test_models_together_have_the_same_regions_in_the_memory_of_one(kinds: list[tuple[int, int]], data: st.DataObject) -> None:
    stride, memory = data.draw(st.sampled_from([8, 16, 32])), data.draw(st.sampled_from([2**20, 2**24, 2**30]))
    grid = TileGrid((2500, 1300), 0.5, 0.5, TILE, stride)
    base = constant(TILE).spec
    specs = [
        replace(base, output_px=output, classes=tuple(map(str, range(classes))), threshold=()) for output, classes in kinds
    ]
    block = choose_block(grid, specs, memory)
    tiles = all_tiles(grid)
    plans = [cut(grid, s.output_px, "hann", block, tiles, np.ones(len(tiles), np.float32), 0.0) for s in specs]
    wanted: dict[tuple[int, int], set[int]] = {}
    for plan in plans:
        cells = [plan.cell(region) for region in plan.regions]
        assert len(set(cells)) == len(cells)
        for region, cell in zip(plan.regions, cells, strict=True):
            wanted.setdefault(cell, set()).add(len(region.tiles))
    if len({s.output_px > 1 for s in specs}) == 1:
        assert all(len(counts) == 1 for counts in wanted.values()), "regions of one place need other tiles"
    strides = [grid.heatmap_pixels_per_stride(s.output_px) for s in specs]
    canvases = sum(canvas_bytes(len(s.classes), s.output_px, h, block[1] * h) for s, h in zip(specs, strides, strict=True))
    dense = any(s.output_px > 1 for s in specs)
    assert not dense or block[1] == 1 or canvases <= memory * CANVAS_SHARE
    bound = memory_bound([(plan, s, 1) for plan, s in zip(plans, specs, strict=True)], readers=1)
    alone = [memory_bound([(plan, s, 1)], readers=1) for plan, s in zip(plans, specs, strict=True)]
    assert max(alone) <= bound <= sum(alone) + 2 * tiles_handed(TILE) * TILE**2 * 3


def numbered(tiles: NDArray[np.int32], read: list[int] | None = None) -> Iterator[NDArray[np.uint8] | None]:
    """A pixel for each tile that says which it is, in memory that is written over; None for each seventh."""
    pixels = np.zeros((1, 1, 3), np.uint8)
    for row, col in tiles.tolist():
        pixels[...] = (row, col, 7)
        if read is not None:
            read.append(1)
        yield None if (row * col) % 7 == 3 else pixels


def named(taken: Iterator[NDArray[np.uint8] | None]) -> list[tuple[int, int] | None]:
    return [None if tile is None else (int(tile[0, 0, 0]), int(tile[0, 0, 1])) for tile in taken]


TILES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), unique=True, max_size=80).map(sorted)


@given(st.lists(TILES, min_size=1, max_size=3))
def test_each_taker_gets_its_tiles_in_order(lists: list[list[tuple[int, int]]]) -> None:
    wanted = [np.array(tiles, np.int32).reshape(-1, 2) for tiles in lists]
    handout = Handout(wanted, 1)
    assert handout.tiles.tolist() == [list(tile) for tile in sorted({tile for tiles in lists for tile in tiles})]
    with ThreadPoolExecutor(len(lists)) as pool:
        taken = [pool.submit(lambda n: named(handout.take(n)), n) for n in range(len(lists))]
        handout.give(numbered(handout.tiles))
        handout.end()
    expected = [[None if (row * col) % 7 == 3 else (row, col) for row, col in tiles] for tiles in lists]
    assert [ended.result() for ended in taken] == expected


GRID = np.stack(np.meshgrid(np.arange(60), np.arange(60), indexing="ij"), -1).reshape(-1, 2).astype(np.int32)


def test_the_slowest_taker_holds_the_reader_up() -> None:
    handout, read = Handout([GRID, GRID], 1), list[int]()
    reader = threading.Thread(target=handout.give, args=(numbered(GRID, read),), daemon=True)
    quick = threading.Thread(target=lambda: named(handout.take(0)), daemon=True)
    reader.start()
    quick.start()
    for taken, _ in enumerate(handout.take(1), 1):
        assert len(read) <= taken + tiles_handed(1)
    reader.join(10)
    quick.join(10)
    assert len(read) == taken == len(GRID)
    assert not reader.is_alive()
    assert tiles_handed(1) == 3 * chunk_tiles(1)


def test_a_taker_that_leaves_holds_nobody_up() -> None:
    handout = Handout([GRID, GRID], 1)
    reader = threading.Thread(target=handout.give, args=(numbered(GRID),), daemon=True)
    reader.start()
    next(handout.take(0))
    handout.leave(0)
    assert len(named(handout.take(1))) == len(GRID)
    reader.join(10)
    assert not reader.is_alive()


def test_nothing_is_read_for_nobody() -> None:
    handout, read = Handout([GRID, GRID], 1), list[int]()
    handout.leave(0)
    handout.leave(1)
    handout.give(numbered(GRID, read))
    assert len(read) == chunk_tiles(1)


def test_takers_are_told_of_an_early_end() -> None:
    handout = Handout([GRID], 1)

    def broken() -> Iterator[NDArray[np.uint8] | None]:
        yield from numbered(GRID[:20])
        raise OSError("gone")

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: named(handout.take(0)))
        with pytest.raises(OSError, match="gone"):
            handout.give(broken())
        handout.end()
        assert isinstance(taken.exception(10), ReadingEnded)


def test_time_is_shared_among_those_it_was_spent_for() -> None:
    first, second = Clock(), Clock()
    shared = Clock(among=[first, second])
    shared.add("read", 3.0)
    shared.merge({"decode": 1.0})
    first.add("model", 5.0)
    nothing = dict.fromkeys(STAGES, 0.0)
    assert first.seconds() == {**nothing, "read": 1.5, "decode": 0.5, "model": 5.0}
    assert second.seconds() == {**nothing, "read": 1.5, "decode": 0.5}
