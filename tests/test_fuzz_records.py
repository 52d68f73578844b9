"""Thousands of damaged records of results and unfinished work: refused in a line or read, soon, and in little memory."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutants import Opened, limit_memory

from pathology import Job, open_features, open_heatmap
from pathology.apart import Apart
from pathology.errors import PathologyError
from pathology.features import write_features
from pathology.finish import read_manifest, read_record
from pathology.geometry import Box
from pathology.integrity import verify
from pathology.job_slide import plan_slide
from pathology.models import load_spec
from pathology.plan import Plan
from pathology.readers import open_slide
from pathology.store import HeatmapMeta
from pathology.testing import thumbnail
from pathology.work import Work

SEED, RECORDS, LONGEST_S = 20_261, 2_000, 5
DEEP = 100_000
FIELDS = {"slide": "a fingerprint", "tile_px": 32}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "uint8", "../../../../etc/passwd", "/dev/zero", "\0", "\ud800", "a" * 5000, [], {}, [[]], [0, 0, 0], {"": None}),
]

_confined = threading.local()


def mutate(text: bytes, rng: np.random.Generator) -> bytes:
    """JSON with a value, a key or a few bytes of it changed."""
    kind = int(rng.integers(10))
    if kind < 6:
        value = json.loads(text)
        for _ in range(int(rng.integers(1, 4))):
            holder, key = _place(value, rng)
            if holder is None:
                break
            if kind == 0 and isinstance(holder, dict):
                del holder[key]
            elif kind == 1 and isinstance(holder, list):
                holder.extend([holder[key]] * int(rng.integers(1, 3)))
            else:
                holder[key] = VALUES[int(rng.integers(len(VALUES)))]
        return json.dumps(value).encode("utf-8", "surrogatepass")
    data = bytearray(text)
    if kind == 6:
        return bytes(data[: int(rng.integers(len(data)))])
    if kind == 7 and rng.random() < 0.1:
        return b"[" * DEEP if rng.random() < 0.5 else b'{"a":' * DEEP
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(data)))
        if kind == 8:
            data[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(0, 9)))
        else:
            data[at] = b'0123456789-+.eE"[]{},:\\ntfu\xff\0'[int(rng.integers(29))]
    return bytes(data)


def _place(value: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A container anywhere in `value`, and one of its keys or indices; (None, None) where there is none."""
    places = list(_places(value))
    return places[int(rng.integers(len(places)))] if places else (None, None)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def read_heatmap(folder: Path) -> None:
    heatmap = open_heatmap(folder)
    height, width = heatmap.level_shape(0)
    heatmap.read(0, Box(0, 0, min(height, 9), min(width, 9)))
    for level in range(len(heatmap.arrays)):
        heatmap.level_frame(level)


def read_features(folder: Path) -> None:
    open_features(folder)


def read_records(folder: Path) -> None:
    list(verify(folder))
    read_manifest(folder)
    read_record(folder)


def read_work(folder: Path) -> None:
    work = Work(folder, FIELDS)
    plan = work.resume()
    for index in {r.index for r in plan.regions} - set(work.todo(plan)):
        marker = work.marker(index)
        assert isinstance(marker["sha256"], list)
        assert isinstance(marker["bad_tiles"], list)
    work.begin(plan, overwrite=False)


READ: dict[str, Callable[[Path], None]] = {
    "result/heatmap.ome.zarr/zarr.json": read_heatmap,
    "result/heatmap.ome.zarr/0/zarr.json": read_heatmap,
    "features/features.zarr/zarr.json": read_features,
    "features/features.zarr/vectors/zarr.json": read_features,
    "features/features.zarr/origins/zarr.json": read_features,
    "result/manifest.json": read_records,
    "result/result.json": read_records,
    "work/plan.json": read_work,
    "work/regions/000000.json": read_work,
}


def confined(folder: Path, name: str) -> Opened:
    """What comes of reading the records in `folder` of which `name` is damaged."""
    read, place = READ[name], folder / name.partition("/")[0]
    if not hasattr(_confined, "limit"):
        for every in {*READ.values()}:
            every(folder.parent / "sound" / next(n for n, r in READ.items() if r is every).partition("/")[0])
        _confined.limit = limit_memory()
    began = time.perf_counter()
    try:
        read(place)
        verdict, detail = "read", ""
    except PathologyError as error:
        verdict, detail = type(error).__name__, str(error)
    except Exception as error:
        verdict, detail = "raises", repr(error)
    return Opened(verdict, time.perf_counter() - began, detail)


@pytest.fixture
def records(reference: Path, reference_job: Job, tmp_path: Path) -> Path:
    """A folder that holds `sound`: a result, features, and unfinished work of which two regions are done."""
    sound = tmp_path / "sound"
    shutil.copytree(reference, sound / "result")
    for name in json.loads((reference / "manifest.json").read_bytes())["slide_files"]:
        shutil.copy(reference.parent / name, sound / name)
    meta = open_heatmap(reference).meta
    _write_features(sound / "features" / "features.zarr", meta)
    _write_work(sound / "work", reference_job)
    return tmp_path


def _write_features(path: Path, meta: HeatmapMeta) -> None:
    spec = thumbnail(tile_px=32).spec
    rng = np.random.default_rng(0)
    vectors = rng.random((20, spec.features), np.float32)
    path.parent.mkdir(parents=True)
    write_features(path, replace(meta, spec=spec), rng.random((20, 2)), iter([vectors]))


def _write_work(folder: Path, job: Job) -> None:
    with open_slide(job.slide) as slide:
        plan: Plan = plan_slide(job, slide, load_spec(job.model))[1]
    work = Work(folder, FIELDS)
    plan = work.begin(plan, overwrite=False)
    for region in plan.regions[:2]:
        work.mark(region, work.stage_rows(region, np.zeros((2, 3))), {"tiles": 1}, {"host": "h"}, [(1, 2)])


def check(records: Path, numbers: range) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    names = list(READ)
    with Apart(1, 60) as apart:
        for number in numbers:
            name = names[number % len(names)]
            damaged = records / "damaged"
            if not damaged.exists():
                shutil.copytree(records / "sound", damaged)
            sound = (records / "sound" / name).read_bytes()
            (damaged / name).write_bytes(mutate(sound, np.random.default_rng((SEED, number))))
            one = apart.call(name, confined, damaged, name)
            assert one.verdict in ("read", "UsageError", "SlideError", "EnvironmentFault"), (number, name, one)
            assert one.seconds < LONGEST_S, (number, name, one)
            assert "\n" not in one.detail, (number, name, one)
            found[name, one.verdict] += 1
            (damaged / name).write_bytes(sound)
    return found


def test_a_few_damaged_records(records: Path) -> None:
    found = check(records, range(180))
    assert all(
        found[name, "UsageError"] + found[name, "SlideError"]
        for name in READ
        if not name.startswith("result/m") and not name.startswith("work/r")
    )


@pytest.mark.slow
def test_two_thousand_damaged_records(records: Path) -> None:
    assert check(records, range(180, 180 + RECORDS)).total() == RECORDS
