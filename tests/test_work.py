"""A staged region counts only when marker and bytes agree; work begun otherwise is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathology.errors import UsageError
from pathology.plan import Plan
from pathology.testing import array_slide, identity
from pathology.work import Work
from tests.whole import plan_for

FIELDS = {"schema": 1, "slide": "a" * 64, "min_tissue": 0.1, "stride_px": 16}
COUNTS, ENVIRONMENT = {"tiles": 4, "seconds": 0.5}, {"device": "cpu"}


def plan(block: int = 2) -> Plan:
    return plan_for(array_slide(np.zeros((128, 96, 3), np.uint8)), identity(tile_px=32).spec, 16, block=block)


def scores(place: int) -> np.ndarray:
    return np.full((3, *plan().regions[place].box.shape), place, np.float32)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """All regions staged."""
    work = Work(tmp_path / "slide" / "model", FIELDS)
    begun = work.begin(plan(), overwrite=False)
    for region in begun.regions:
        work.put(region, scores(region.index), COUNTS, ENVIRONMENT)
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
    assert np.array_equal(found.load(3), scores(3))
    assert {name: found.marker(3)[name] for name in ("region", "counts", "environment")} == {
        "region": 3,
        "counts": COUNTS,
        "environment": ENVIRONMENT,
    }


def test_nothing_is_done_at_first(tmp_path: Path) -> None:
    work = Work(tmp_path / "slide" / "model", FIELDS)
    begun = work.begin(plan(), overwrite=False)
    assert work.todo(begun) == [r.index for r in begun.regions]
    with pytest.raises(UsageError, match="region 0 of slide slide is not done; run the same command again"):
        work.marker(0)


def cut_data(work: Work) -> None:
    path = staged(work, 1, "npy")
    path.write_bytes(path.read_bytes()[:-1])


def empty_data(work: Work) -> None:
    staged(work, 1, "npy").write_bytes(b"")


def zero_data(work: Work) -> None:
    path = staged(work, 1, "npy")
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(work: Work) -> None:
    path = staged(work, 1, "npy")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def lose_data(work: Work) -> None:
    staged(work, 1, "npy").unlink()


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
        pytest.param(edited(schema=2), id="another schema"),
        pytest.param(edited(region=2), id="another region"),
        pytest.param(edited(sha256="0" * 64), id="another hash"),
        pytest.param(edited(sha256=None), id="no hash"),
    ],
)
def test_a_damaged_region_is_to_do_again(work: Work, damage: Callable[[Work], None]) -> None:
    damage(work)
    found, begun = again(work)
    assert found.todo(begun) == [1]
    with pytest.raises((UsageError, FileNotFoundError)):
        found.load(1)
    found.put(begun.regions[1], scores(1), COUNTS, ENVIRONMENT)
    assert found.todo(begun) == []
    assert np.array_equal(found.load(1), scores(1))


def test_data_without_its_marker_does_not_count(work: Work) -> None:
    # A crash between the two writes: the data of another attempt lies under the marker of the first.
    np.save(staged(work, 0, "npy"), scores(0) + 1)
    assert work.todo(plan()) == [0]


def test_bytes_that_change_after_the_check_are_not_loaded(work: Work) -> None:
    flip_bit(work)
    with pytest.raises(UsageError, match="run the same command again"):
        work.load(1)


def test_the_plan_of_begun_work_is_kept(work: Work) -> None:
    found = Work(work.folder, FIELDS)
    begun = found.begin(plan(block=3), overwrite=False)
    assert begun.block == 2
    assert found.todo(begun) == []
    assert found.resume().to_json() == plan().to_json()


def test_other_work_is_refused_with_the_difference_named(work: Work) -> None:
    other = Work(work.folder, {**FIELDS, "min_tissue": 0.5, "slide": "b" * 64})
    message = r"slide slide was begun otherwise \(min_tissue 0.1 -> 0.5, slide aaaaaaaaaaaa... -> bbbbbbbbbbbb...\)"
    with pytest.raises(UsageError, match=message):
        other.begin(plan(), overwrite=False)
    assert work.todo(plan()) == []
    with pytest.raises(UsageError, match="is gone or was replaced"):
        other.resume()


def test_overwrite_clears_other_work(work: Work) -> None:
    other = Work(work.folder, {**FIELDS, "min_tissue": 0.5})
    begun = other.begin(plan(block=3), overwrite=True)
    assert begun.block == 3
    assert other.todo(begun) == [r.index for r in begun.regions]
    assert list((work.folder / "regions").iterdir()) == []


def test_overwrite_keeps_work_of_the_same_key(work: Work) -> None:
    found = Work(work.folder, FIELDS)
    assert found.todo(found.begin(plan(), overwrite=True)) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}'])
def test_a_torn_plan_begins_anew(work: Work, text: str) -> None:
    (work.folder / "plan.json").write_text(text)
    found, begun = again(work)
    assert found.todo(begun) == [r.index for r in begun.regions]


def test_clear_forgets_everything_and_twice_is_once(work: Work) -> None:
    work.clear()
    work.clear()
    assert not work.folder.exists()
    with pytest.raises(UsageError, match="is gone or was replaced"):
        work.resume()
