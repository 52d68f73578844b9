"""Thousands of damaged headers and records: a typed answer each, soon, in little memory, and never the end of who asked.

A failure names its seed: `mutate(base, np.random.default_rng((SEED, number)))` gives the same bytes again.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from mutants import MAKERS, Opened, bases, limit_memory, mutate, try_to_open, try_to_read
from slides import smooth_pixels, write_tiff

from pathology.apart import Apart
from pathology.errors import Reason, SlideError

SEED = 20_260
HEADERS = 10_000
LONGEST_S = 5
# What a damaged file may be called. A crash or a timeout of the process apart would be survived, but none is known.
TYPED = {"opens", "read", *Reason} - {Reason.CRASHED, Reason.TIMEOUT, Reason.INTERNAL}

# Files that were once answered by a traceback.
KEPT = [
    ("strips", 1, 50),
    ("ome", 1, 121),
    ("bigtiff deflate", 1, 2),
    ("ome", 3, 4999),
    ("aperio jpeg", 3, 2556),
    ("ome", 2, 940),
    ("jpeg2000", 20_260, 64),
    ("aperio jpeg", 20_260, 4374),
    ("dicom", 20_260, 881),
]

_confined = threading.local()


def confined(warm: Path, path: Path) -> Opened:
    """`try_to_open` or, of every second, `try_to_read`, with little memory."""
    if not hasattr(_confined, "limit"):
        try_to_read(warm)  # the libraries are there, and their memory
        _confined.limit = limit_memory()
    return try_to_read(path) if int(path.parent.name) % 2 == 0 else try_to_open(path)


def answers(apart: Apart, folder: Path, warm: Path, wanted: list[tuple[str, int, int]]) -> list[tuple[str, int, int, Opened]]:
    """What came of each (base, seed, number)."""
    sound = bases(folder)

    def answer(one: tuple[str, int, int]) -> tuple[str, int, int, Opened]:
        name, seed, number = one
        own = folder / str(number)  # a DICOM slide is looked for in all of its folder
        own.mkdir()
        path = own / f"s{sound[name].suffix}"
        path.write_bytes(mutate(sound[name], np.random.default_rng((seed, number))))
        try:
            found: Opened = apart.call(path.name, confined, warm, path)
        except SlideError as error:
            found = Opened(str(error.reason), 0, str(error))
        path.unlink()
        own.rmdir()
        return name, seed, number, found

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(answer, wanted))


def check(found: list[tuple[str, int, int, Opened]]) -> Counter[str]:
    assert [one for one in found if one[3].verdict not in TYPED] == []
    assert [one for one in found if one[3].seconds > LONGEST_S] == []
    assert [one for one in found if "\n" in one[3].detail] == []
    return Counter(one[3].verdict for one in found)


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "warm.svs", [smooth_pixels(256, 256)], compression="jpeg")


def test_a_few_damaged_headers_and_those_that_once_were_too_much(warm: Path, tmp_path: Path) -> None:
    names = list(MAKERS)
    wanted = [*KEPT, *((names[k % len(names)], SEED, k) for k in range(4, 220))]
    with Apart(1, 60) as apart:
        found = check(answers(apart, tmp_path, warm, wanted))
    assert found["truncated"]
    assert found["unsupported"]


@pytest.mark.slow
@pytest.mark.fault("S02", "S06", "S14", "S18")
def test_ten_thousand_damaged_headers(warm: Path, tmp_path: Path) -> None:
    names = list(MAKERS)
    with Apart(2, 60) as apart:
        found = check(answers(apart, tmp_path, warm, [(names[k % len(names)], SEED, k) for k in range(HEADERS)]))
    assert found.total() == HEADERS
    for verdict in ("opens", "read", "truncated", "unsupported", "not_a_slide", "corrupt_tiles", "read_error"):
        assert found[verdict] > HEADERS // 1000, found
