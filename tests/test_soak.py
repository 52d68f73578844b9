"""A weekend's batch in small: a thousand slides, some bad in every way, the run killed twice, and nothing grows."""

from __future__ import annotations

import csv
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
from processes import Command, command
from slides import corrupt_tile, cut, patch_tag, smooth_pixels, write_tiff

from pathology.events import read_events
from pathology.integrity import verify

SLIDES = 1000
BAD_EVERY = 20
KILLED_AT = (SLIDES // 16, SLIDES // 8)  # slides begun: early, so that the last run is long
SLOPE_BYTES = 20_000  # of resident memory a slide


def lying(path: Path) -> Path:
    for tag in ("TileWidth", "TileLength"):
        patch_tag(path, tifffile.TIFF.TAGS[tag], 65520)
    return path


def corrupt(path: Path) -> Path:
    corrupt_tile(path, 0)  # it has one
    return path


def junk(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(1).bytes(3000))
    return path


def write(path: Path, kind: int = 0, mpp: float | str | None = 0.5) -> Path:
    """A slide of one file tile; eight kinds differ in size and compression."""
    pixels = smooth_pixels(60 + 8 * kind, 110 - 6 * kind, seed=kind)
    return write_tiff(path, [pixels], mpp=mpp, compression="jpeg" if kind % 2 else "deflate")


# How a slide is bad: the reason that is expected, and what makes it.
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no-mpp": ("no_mpp", lambda path: write(path, mpp=None)),
    "bad-mpp": ("bad_mpp", lambda path: write(path, mpp="1e6")),
    "empty": ("empty_file", Path.touch),
    "junk": ("not_a_slide", junk),
    "text": ("not_a_slide", lambda path: path.write_text("no slide\n" * 100)),
    "truncated": ("truncated", lambda path: cut(write(path), 0.5)),
    "lying": ("unsupported", lambda path: lying(write(path))),
    "corrupt": ("corrupt_tiles", lambda path: corrupt(write(path))),
    "fifo": ("not_a_file", os.mkfifo),
    "folder": ("not_a_file", Path.mkdir),
    "missing": ("missing", lambda _: None),
}
if os.geteuid():
    BAD["forbidden"] = ("permission", lambda path: write(path).chmod(0))


@pytest.fixture
def batch(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A slide list, and the reasons of the slides that are bad, by their ids."""
    folder = tmp_path / "slides"
    folder.mkdir()
    kinds = [write(folder / f"kind{kind}.svs", kind).read_bytes() for kind in range(8)]
    bad: dict[str, str] = {}
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("slide", "id"))
        for number in range(SLIDES):
            name = f"s{number:04}"
            path = folder / f"{name}.svs"
            if number % BAD_EVERY == BAD_EVERY // 2:
                way = list(BAD)[number // BAD_EVERY % len(BAD)]
                bad[name], make = BAD[way]
                make(path)
            else:
                path.write_bytes(kinds[number % len(kinds)] + name.encode())
            rows.writerow((path, name))
    return tmp_path / "list.csv", bad


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process holds when so many slides were begun."""

    begun: int
    rss_bytes: int
    descriptors: int
    threads: int


def sample(pid: int, begun: int) -> Sample:
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    threads = len(list((process / "task").iterdir()))
    return Sample(begun, pages * os.sysconf("SC_PAGE_SIZE"), len(list((process / "fd").iterdir())), threads)


@contextmanager
def sampled(running: Command, begun: Callable[[], int]) -> Iterator[dict[int, list[Sample]]]:
    """What the command's processes hold, by their numbers, as time goes by."""
    samples: dict[int, list[Sample]] = defaultdict(list)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            for pid in running.living():
                with suppress(OSError):
                    samples[pid].append(sample(pid, begun()))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def slope(samples: list[Sample], what: str) -> float:
    """Growth a slide, over the last 80 % of a process's slides: the median of that from a tenth's least to the next one's.

    The least, since what is held while work is under way comes and goes by megabytes. The median, so that a single step, as
    when two slides end at once for the first time and a further thread gets memory of its own, is none.
    """
    edges = np.linspace(samples[0].begun, samples[-1].begun, 11)[2:]
    parts = [[one for one in samples if low <= one.begun <= high] for low, high in pairwise(edges)]
    return float(np.median(np.diff([min(getattr(one, what) for one in part) for part in parts])) / (edges[1] - edges[0]))


def more(samples: list[Sample], what: str) -> float:
    """Growth a slide of what is few: from the least of the second fifth of a process's slides to that of the last one.

    A step of one from a tenth to the next, as `slope` would take it, is more than a leak's.
    """
    edges = np.linspace(samples[0].begun, samples[-1].begun, 6)
    fifths = [[getattr(one, what) for one in samples if low <= one.begun <= high] for low, high in pairwise(edges)]
    return float((min(fifths[-1]) - min(fifths[1])) / (edges[-2] - edges[1]))


def test_what_grows_with_every_slide_is_growth_and_what_comes_and_goes_is_none() -> None:
    def samples(held: Callable[[int], int]) -> list[Sample]:
        return [Sample(begun, held(begun), 9, 5) for begun in range(100, SLIDES, 3)]

    under_way = np.random.default_rng(3).integers(0, 2**24, SLIDES)
    assert slope(samples(lambda begun: 25_000 * begun), "rss_bytes") == pytest.approx(25_000, rel=0.04)
    assert slope(samples(lambda begun: 25_000 * begun + int(under_way[begun])), "rss_bytes") > SLOPE_BYTES
    assert slope(samples(lambda begun: 30_000 * (begun // 20 * 20)), "rss_bytes") > SLOPE_BYTES
    assert slope(samples(lambda begun: 2**28 + 2**25 * (begun > SLIDES / 2)), "rss_bytes") == pytest.approx(0, abs=1)
    assert abs(slope(samples(lambda begun: 2**28 + int(under_way[begun])), "rss_bytes")) < SLOPE_BYTES / 4

    few = under_way % 8
    assert more(samples(lambda begun: 20 + begun // BAD_EVERY + int(few[begun])), "rss_bytes") > 0.8 / BAD_EVERY
    assert abs(more(samples(lambda begun: 20 + int(few[begun])), "rss_bytes")) < 0.1 / BAD_EVERY
    assert abs(more(samples(lambda begun: 20 + (begun > SLIDES / 2)), "rss_bytes")) < 0.1 / BAD_EVERY


@pytest.mark.slow
@pytest.mark.fault("F30", "F01")
def test_a_thousand_slides_with_bad_ones_and_kills(batch: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    slides, bad = batch
    assert 0.04 * SLIDES < len(bad) < 0.06 * SLIDES
    assert set(Counter(bad.values())) == {reason for reason, _ in BAD.values()}
    out = tmp_path / "out"
    arguments: list[object] = ["run", slides, "--out", out, "--tissue", "none", "--threads", "1", "--num-workers", "1"]
    arguments += ["--batch-size", "8", "--model", "pathology.testing:mean_colour?tile_px=16&mpp=0.5"]

    def begun() -> int:
        with suppress(FileNotFoundError):
            return len(os.listdir(out / "slides"))  # noqa: PTH208  # thousands of names, twice a second
        return 0

    for at in KILLED_AT:
        with command(*arguments) as running:
            running.wait(lambda at=at: begun() >= at)
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.communicate()
            assert running.all_gone()
    with command(*arguments) as running, sampled(running, begun) as samples:
        said = running.process.communicate()[0]
        assert running.process.returncode == 1, said[-2000:]
        assert running.all_gone()
    good = SLIDES - len(bad)
    assert f"{good} of {SLIDES} done, {len(bad)} failed or partial" in said
    with (out / "summary.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert len(rows) == SLIDES
    assert {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"} == bad
    # Each slide's result was committed once; the event of one may have been lost with its process.
    done = Counter(event["slide"] for event in read_events(out) if event["event"] == "slide-done")
    assert max(done.values()) == 1
    assert good - len(KILLED_AT) * 4 <= len(done) <= good
    assert list(verify(out)) == []

    long = {pid: taken for pid, taken in samples.items() if taken[-1].begun - taken[0].begun > SLIDES / 2}
    for taken in long.values():
        print({what: (round(slope(taken, what), 3), getattr(taken[-1], what)) for what in Sample.__slots__})
    assert len(long) == 3  # the driver and its two workers
    for taken in long.values():
        assert slope(taken, "rss_bytes") < SLOPE_BYTES
        # One that is left at each bad slide would be 1 in BAD_EVERY. Pools of threads grow for a while, up to their size.
        assert more(taken, "descriptors") < 0.2 / BAD_EVERY
        assert more(taken, "threads") < 0.4 / BAD_EVERY
        assert max(one.descriptors for one in taken) < 100
        assert max(one.threads for one in taken) < 100
