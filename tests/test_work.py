"""A staged region counts only when marker and bytes agree; work begun otherwise is refused by name."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathology.errors import EnvironmentFault, Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.job import FREE
from pathology.plan import Plan, Region
from pathology.stitch import BAND_PX, bands
from pathology.testing import array_slide, identity
from pathology.work import Work, blocks
from tests.whole import plan_for

FIELDS = {"schema": 1, "slide": "a" * 64, "min_tissue": 0.1, "stride_px": 16}
COUNTS, ENVIRONMENT = {"tiles": 4, "seconds": 0.5}, {"device": "cpu"}


def plan(block: int = 2) -> Plan:
    return plan_for(array_slide(np.zeros((128, 96, 3), np.uint8)), identity(tile_px=32).spec, 16, block=block)


def scores(region: Region) -> np.ndarray:
    """(3, H, W): every pixel another number."""
    height, width = region.box.shape
    return np.arange(3 * height * width, dtype=np.float32).reshape(3, height, width) + region.index


def put(work: Work, region: Region, array: np.ndarray | None = None, bad_tiles: Sequence[tuple[int, int]] = ()) -> None:
    """Stage a region band by band and mark it."""
    array = scores(region) if array is None else array
    rows = (array[:, band.slices(region.box)[0]] for band in bands(region.box))
    work.mark(region, work.stage(region, rows), COUNTS, ENVIRONMENT, bad_tiles)


def whole(work: Work, region: Region) -> np.ndarray:
    """A staged region put together again."""
    array = np.full((3, *region.box.shape), np.nan, np.float32)
    for block, loaded in work.load(region, region.box):
        array[:, *block.slices(region.box)] = loaded
    return array


def begin_folder(tmp_path: Path) -> Work:
    (tmp_path / "slide" / FREE).mkdir(parents=True)
    return Work(tmp_path / "slide" / FREE / "model", FIELDS)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """All regions staged."""
    work = begin_folder(tmp_path)
    begun = work.begin(plan(), overwrite=False)
    for region in begun.regions:
        put(work, region)
    return work


def staged(work: Work, index: int, suffix: str) -> Path:
    return work.folder / "regions" / f"{index:06d}.{suffix}"


def again(work: Work) -> tuple[Work, Plan]:
    """The work folder as another process finds it."""
    found = Work(work.folder, FIELDS)
    return found, found.begin(plan(), overwrite=False)


def test_what_is_put_is_done_and_loads(work: Work) -> None:
    found, begun = again(work)
    assert found.todo(begun) == []
    assert np.array_equal(whole(found, begun.regions[3]), scores(begun.regions[3]))
    assert {name: found.marker(3)[name] for name in ("region", "counts", "environment", "bad_tiles")} == {
        "region": 3,
        "counts": COUNTS,
        "environment": ENVIRONMENT,
        "bad_tiles": [],
    }


def test_nothing_is_done_at_first(tmp_path: Path) -> None:
    work = begin_folder(tmp_path)
    begun = work.begin(plan(), overwrite=False)
    assert work.todo(begun) == [r.index for r in begun.regions]
    with pytest.raises(UsageError, match="region 0 of slide slide is not done; run the same command again"):
        work.marker(0)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 200), st.integers(1, 200))
def test_blocks_cut_a_region_at_the_heatmaps_multiples(y: int, x: int, height: int, width: int) -> None:
    box = Box(y, x, height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathology.work.BLOCK_PX", 48)
        cut = [block for band in bands(box) for block in blocks(band)]
    seen = np.zeros(box.shape, int)
    for block in cut:
        seen[block.slices(box)] += 1
        assert block.y // BAND_PX == (block.y1 - 1) // BAND_PX
        assert block.x // 48 == (block.x1 - 1) // 48
    assert (seen == 1).all()
    assert cut == sorted(cut, key=lambda block: (block.y, block.x))


@settings(max_examples=30)
@given(st.integers(0, 149), st.integers(0, 199), st.integers(1, 150), st.integers(1, 200))
def test_only_the_blocks_under_a_box_are_read(y: int, x: int, height: int, width: int) -> None:
    region = Region(0, Box(30, 40, 150, 200), np.zeros((1, 2), np.int32))
    box = Box(30 + y, 40 + x, height, width).intersect(region.box)
    array = np.random.default_rng(0).random((2, 150, 200), np.float32)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathology.work.BLOCK_PX", 64)
        work = Work(Path(folder), FIELDS)
        (work.folder / "regions").mkdir()
        put(work, region, array)
        found = dict(work.load(region, box))
        others = [b for band in bands(region.box) for b in blocks(band) if b.intersect(box).empty]
    assert not found.keys() & set(others)
    assert sum(math.prod(block.intersect(box).shape) for block in found) == math.prod(box.shape)
    for block, loaded in found.items():
        assert np.array_equal(loaded, array[:, *block.slices(region.box)])


def test_a_region_is_staged_in_the_memory_of_its_bands(tmp_path: Path) -> None:
    def peak(height: int) -> int:
        region = Region(0, Box(0, 0, height, 2048), np.zeros((1, 2), np.int32))
        work = Work(tmp_path / str(height), FIELDS)
        (work.folder / "regions").mkdir(parents=True)
        tracemalloc.start()
        try:
            put_rows = (np.zeros((2, *band.shape), np.float32) for band in bands(region.box))
            work.mark(region, work.stage(region, put_rows), COUNTS, ENVIRONMENT)
            for _ in work.load(region, Box(0, 0, 100, 2048)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    band = 2 * BAND_PX * 2048 * 4
    assert peak(1024) < 4 * band
    assert peak(4096) < 4 * band


def test_rows_that_do_not_fit_the_region_are_refused(work: Work) -> None:
    region = plan().regions[0]
    with pytest.raises(ValueError, match="rows 0 to 32 of region 0 came as"):
        work.stage(region, [np.zeros((3, 31, 32), np.float32)])
    with pytest.raises(ValueError, match="shorter"):
        work.stage(region, [])
    assert work.todo(plan()) == [], "a failed attempt took the place of a region that was done"
    assert not list((work.folder / "regions").glob("*.tmp"))


def test_an_error_of_the_slide_is_not_taken_for_one_of_the_output(work: Work) -> None:
    def rows() -> Iterator[np.ndarray]:
        raise OSError(errno.EIO, "the slide's disk")
        yield

    with pytest.raises(OSError, match="the slide's disk") as caught:
        work.stage(plan().regions[0], rows())
    assert not isinstance(caught.value, EnvironmentFault)


@pytest.mark.fault("F07", "F08")
def test_a_full_disk_is_the_outputs_fault_and_leaves_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; make room"):
        put(work, plan().regions[0])
    assert not list((work.folder / "regions").glob("*.tmp"))
    assert work.todo(plan()) == []


def test_regions_with_bad_tiles_are_done_unless_they_must_be_whole(work: Work) -> None:
    begun = plan()
    put(work, begun.regions[2], bad_tiles=[(3, 1), (3, 2)])
    assert work.marker(2)["bad_tiles"] == [[3, 1], [3, 2]]
    assert work.todo(begun) == []
    assert work.todo(begun, whole=True) == [2]


def cut_data(work: Work) -> None:
    path = staged(work, 1, "scores")
    path.write_bytes(path.read_bytes()[:-1])


def empty_data(work: Work) -> None:
    staged(work, 1, "scores").write_bytes(b"")


def zero_data(work: Work) -> None:
    path = staged(work, 1, "scores")
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(work: Work) -> None:
    path = staged(work, 1, "scores")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def lose_data(work: Work) -> None:
    staged(work, 1, "scores").unlink()


def lose_marker(work: Work) -> None:
    staged(work, 1, "json").unlink()


def tear_marker(work: Work) -> None:
    path = staged(work, 1, "json")
    path.write_bytes(path.read_bytes()[:40])


def zero_marker(work: Work) -> None:
    path = staged(work, 1, "json")
    path.write_bytes(bytes(path.stat().st_size))


def junk_marker(work: Work) -> None:
    staged(work, 1, "json").write_bytes(b"\xff\xfe[]")


def list_marker(work: Work) -> None:
    staged(work, 1, "json").write_bytes(b"[1, 2]")


def edited(**changes: Any) -> Callable[[Work], None]:
    def damage(work: Work) -> None:
        path = staged(work, 1, "json")
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut_data,
        empty_data,
        zero_data,
        flip_bit,
        lose_data,
        lose_marker,
        tear_marker,
        zero_marker,
        junk_marker,
        list_marker,
        pytest.param(edited(key="0" * 64), id="another key"),
        pytest.param(edited(plan="0" * 64), id="another plan"),
        pytest.param(edited(schema=1), id="another schema"),
        pytest.param(edited(region=2), id="another region"),
        pytest.param(edited(sha256=["0" * 64]), id="another hash"),
        pytest.param(edited(sha256=["0" * 64] * 2), id="too many hashes"),
        pytest.param(edited(sha256="0"), id="a hash that is no list"),
        pytest.param(edited(sha256=None), id="no hash"),
    ],
)
@pytest.mark.fault("F17", "F18")
def test_a_damaged_region_is_to_do_again(work: Work, damage: Callable[[Work], None]) -> None:
    damage(work)
    found, begun = again(work)
    assert found.todo(begun) == [1]
    with pytest.raises(UsageError):
        whole(found, begun.regions[1])
    put(found, begun.regions[1])
    assert found.todo(begun) == []
    assert np.array_equal(whole(found, begun.regions[1]), scores(begun.regions[1]))


def test_data_without_its_marker_does_not_count(work: Work) -> None:
    # A crash between the two writes: the data of another attempt lies under the marker of the first.
    region = plan().regions[0]
    work.stage(region, [scores(region) + 1])
    assert work.todo(plan()) == [0]


def test_bytes_that_change_after_the_check_are_not_loaded(work: Work) -> None:
    flip_bit(work)
    with pytest.raises(UsageError, match="run the same command again"):
        whole(work, plan().regions[1])


def test_the_plan_of_begun_work_is_kept(work: Work) -> None:
    found = Work(work.folder, FIELDS)
    begun = found.begin(plan(block=3), overwrite=False)
    assert begun.block == (2, 2)
    assert found.todo(begun) == []
    assert found.resume().to_json() == plan().to_json()


def test_other_work_is_refused_with_the_difference_named(work: Work) -> None:
    other = Work(work.folder, {**FIELDS, "min_tissue": 0.5, "slide": "b" * 64})
    message = r"slide slide was begun otherwise \(min_tissue 0.1 -> 0.5, slide aaaaaaaaaaaa... -> bbbbbbbbbbbb...\)"
    with pytest.raises(UsageError, match=message):
        other.begin(plan(), overwrite=False)
    assert work.todo(plan()) == []
    with pytest.raises(SlideError, match="is gone, or another plan's"):
        other.resume()


def test_a_slides_own_files_that_changed_are_a_fault_of_that_slide(tmp_path: Path) -> None:
    of_file = {**FIELDS, "tissue": "file 1", "roi": "1", "slide_mpp": 0.5, "reader": "direct"}
    first = Work(begin_folder(tmp_path).folder, of_file)
    first.begin(plan(), overwrite=True)
    own: list[dict[str, Any]] = [
        {"slide": "b" * 64},
        {"tissue": "file 2"},
        {"roi": "2"},
        {"slide": "b" * 64, "slide_mpp": 0.25, "reader": "openslide", "tissue": "file 2"},
    ]
    for change in own:
        other = Work(first.folder, of_file | change)
        with pytest.raises(SlideError, match=r"was begun otherwise .*--overwrite") as begun:
            other.begin(plan(), overwrite=False)
        with pytest.raises(SlideError, match="changed while it was worked on") as resumed:
            other.resume()
        assert begun.value.reason == resumed.value.reason == Reason.CHANGED
    options: list[dict[str, Any]] = [
        {"slide_mpp": 0.25},
        {"reader": "openslide"},
        {"tissue": "otsu"},
        {"roi": None},
        {"slide": "b" * 64, "min_tissue": 0.5},
    ]
    for change in options:
        other = Work(first.folder, of_file | change)
        with pytest.raises(UsageError, match="was begun otherwise"):
            other.begin(plan(), overwrite=False)
        with pytest.raises(SlideError, match="is gone, or another plan's"):
            other.resume()
    assert first.begin(plan(), overwrite=False).to_json() == plan().to_json()


def test_overwrite_clears_other_work(work: Work) -> None:
    other = Work(work.folder, {**FIELDS, "min_tissue": 0.5})
    begun = other.begin(plan(block=3), overwrite=True)
    assert begun.block == (3, 3)
    assert other.todo(begun) == [r.index for r in begun.regions]
    assert list((work.folder / "regions").iterdir()) == []


def test_overwrite_keeps_work_of_the_same_key(work: Work) -> None:
    found = Work(work.folder, FIELDS)
    assert found.todo(found.begin(plan(), overwrite=True)) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_a_torn_plan_begins_anew(work: Work, text: str) -> None:
    (work.folder / "plan.json").write_text(text)
    found, begun = again(work)
    assert found.todo(begun) == [r.index for r in begun.regions]


def test_clear_forgets_everything_and_twice_is_once(work: Work) -> None:
    work.clear()
    work.clear()
    assert not work.folder.exists()
    with pytest.raises(SlideError, match="is gone, or another plan's"):
        work.resume()
