"""What is looked at before the first region: all slides' headers, the room for results; and what that may cost."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from slides import cut, noise_pixels, smooth_pixels, write_tiff

import pipelines.preflight as preflight
from pathology import job_slide
from pathology.apart import Apart
from pathology.errors import EnvironmentFault, Reason, SlideError
from pathology.events import read_events
from pathology.readers import open_slide
from pipelines import room
from pipelines.cli import main
from pipelines.config import Settings
from pipelines.preflight import Preflight
from pipelines.room import Room
from pipelines.slides import find_slides
from pipelines.summary import FAILED

MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"
DENSE = "pathology.testing:identity?tile_px=64&mpp=0.5"
GIB = 2**30
# Of a slide of 300 x 400 px with that model, four bytes a value and a pyramid on top.
RESULT_BYTES = int(300 * 400 * 3 * 4 * 4 / 3)


def command(*arguments: object, model: str = MODEL) -> Result:
    fixed = ("run", "--model", model, "--scheduler", "sync", "--tissue", "none", "--threads", 1)
    return CliRunner().invoke(main, [str(a) for a in (*fixed, *arguments)])


def started(out: Path) -> int:
    return sum(event["event"] == "region-start" for event in read_events(out))


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good slides, and between and behind them three that are not."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a", "c"):
        write_tiff(slides / f"{name}.svs", [smooth_pixels(300, 400, seed=ord(name))])
    (slides / "b.svs").touch()
    cut(write_tiff(slides / "d.tif", [noise_pixels(300, 400)], resolution=(20000, 20000, "CENTIMETER")), 0.5)
    write_tiff(slides / "e.svs", [noise_pixels(300, 400)], mpp=None)
    return slides


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the slides that are opened in this process, where the sequential loop does what a worker does elsewhere."""
    names: list[str] = []

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        names.append(path.name)
        return open_slide(path, *arguments, **options)

    monkeypatch.setattr(job_slide, "open_slide", counted)
    return names


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the slides that processes apart are asked for."""
    names: list[str] = []
    results = Apart.results

    def counted(self: Apart, function: Any, calls: Any) -> Iterator[Any]:
        asked = list(calls)
        names.extend(name for name, _ in asked)
        return results(self, function, asked)

    monkeypatch.setattr(Apart, "results", counted)
    return names


def test_bad_slides_are_rows_before_anything_is_computed(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    done = command(folder, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    head, *lines = done.output.splitlines()
    assert head.startswith("preflight: 5 slides in ")
    assert "s: 2 can be read, 1 empty_file, 1 truncated, 1 no_mpp; results take " in head
    assert [line.split()[:2] for line in lines[:5]] == [
        [status, entry.slide_id]
        for status, places in (("failed", (1, 3, 4)), ("ok", (0, 2)))
        for entry in (find_slides([folder])[place] for place in places)
    ]
    assert set(opened) == {"a.svs", "c.svs"}  # the others were not opened a second time
    again = command(folder, "--out", tmp_path / "out")
    assert again.exit_code == 1
    assert "preflight" not in again.output


def test_a_preflight_in_json(folder: Path, tmp_path: Path) -> None:
    done = command(folder, "--out", tmp_path / "out", "--log-format", "json")
    said = json.loads(done.output.splitlines()[0])
    assert said.pop("seconds") > 0
    # 5 x 7 tiles, three classes of float32, of each of the two that can be read
    assert said == {
        "event": "preflight",
        "slides": 5,
        "looked_at": 5,
        "reasons": {"empty_file": 1, "truncated": 1, "no_mpp": 1},
        "most_bytes": 2 * 5 * 7 * 3 * 4,
        "fits": True,
    }


def test_with_few_slides_no_process_is_started_and_each_is_opened_once(
    folder: Path, tmp_path: Path, opened: list[str], looked_at: list[str]
) -> None:
    done = command(folder / "a.svs", folder / "c.svs", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "preflight" not in done.output
    assert (opened, looked_at) == (["a.svs", "c.svs"], [])


def test_what_is_done_is_not_looked_at(folder: Path, tmp_path: Path, looked_at: list[str]) -> None:
    out = tmp_path / "out"
    assert command(folder / "a.svs", folder / "c.svs", "--out", out).exit_code == 0
    write_tiff(folder / "f.svs", [smooth_pixels(100, 100)])
    assert command(folder, "--out", out).exit_code == 1
    assert sorted(looked_at) == ["'b.svs'", "'d.tif'", "'e.svs'", "'f.svs'"]
    looked_at.clear()
    assert command(folder, "--out", out).exit_code == 1
    assert looked_at == []


def test_slides_are_looked_at_once_though_a_model_finds_their_tissue(
    folder: Path, tmp_path: Path, looked_at: list[str]
) -> None:
    finder = "pathology.testing:constant?tile_px=64&output_px=8"
    done = command(folder, "--out", tmp_path / "out", "--tissue", f"model:{finder}")
    assert done.exit_code == 1, done.output
    assert len(looked_at) == 5
    assert done.output.count("preflight") == 1


def test_results_of_the_good_are_those_without_the_bad(folder: Path, tmp_path: Path) -> None:
    assert command(folder, "--out", tmp_path / "out").exit_code == 1
    assert command(folder / "a.svs", folder / "c.svs", "--out", tmp_path / "alone").exit_code == 0
    alone = {name.rpartition("-")[0]: data for name, data in manifests(tmp_path / "alone").items()}
    assert {name.rpartition("-")[0]: data for name, data in manifests(tmp_path / "out").items()} == alone


def test_bad_slides_need_no_copy(folder: Path, tmp_path: Path) -> None:
    (folder / "a.svs").rename(folder / "z.svs")
    done = command(folder, "--out", tmp_path / "out", "--stage", tmp_path / "disk")
    assert done.exit_code == 1, done.output
    staged = [event["slide"] for event in read_events(tmp_path / "out") if event["event"] == "slide-staged"]
    assert [name.rpartition("-")[0] for name in staged] == ["c", "z"]


def test_what_takes_too_long_is_looked_at_when_its_turn_comes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = threading.Event()
    real = preflight.headers

    def slow(*arguments: Any) -> Iterator[Any]:
        headers = real(*arguments)
        yield next(headers)
        yield next(headers)
        preflight.LONGEST_S = 0.0  # type: ignore[misc]
        asleep.wait(60)

    monkeypatch.setattr(preflight, "LONGEST_S", 60.0)
    monkeypatch.setattr(preflight, "headers", slow)
    done = command(folder, "--out", tmp_path / "out")
    asleep.set()
    assert "preflight: 2 slides" in done.output
    assert "1 can be read, 1 empty_file; the other 3 when their turn comes" in done.output
    assert done.output.count("failed  ") == 3
    assert len(manifests(tmp_path / "out")) == 2


def test_a_run_that_is_stopped_does_not_wait_for_the_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep, stop = threading.Event(), threading.Event()

    def slow(*_: object) -> Iterator[Any]:
        asleep.wait(60)
        yield from ()

    monkeypatch.setattr(preflight, "headers", slow)
    stop.set()
    began = time.monotonic()
    with Preflight(find_slides([folder]), Settings(out=folder), {}) as look:
        look.wait(stop)
        assert look.looked_at == 0
    asleep.set()
    assert time.monotonic() - began < 30


def test_a_share_that_does_not_answer_stops_the_run_before_it_begins(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Iterator[Any]:
        yield SlideError(Reason.EMPTY, "'a.svs' has 0 bytes")
        raise EnvironmentFault("what it lies on does not answer; mount it")

    monkeypatch.setattr(preflight, "headers", gone)
    done = command(folder, "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert done.output.splitlines() == ["pathology: what it lies on does not answer; mount it"]
    assert not list((tmp_path / "out").rglob(FAILED))


@pytest.mark.fault("S05")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_path_that_leads_nowhere_is_a_row_but_not_where_all_do(count: int, folder: Path, tmp_path: Path) -> None:
    nowhere = [tmp_path / "nowhere" / f"{n}.svs" for n in range(count)]
    done = command(*nowhere, folder / "a.svs", "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert [line.startswith("failed ") for line in done.output.splitlines() if " missing: '" in line] == [True] * count
    assert len(manifests(tmp_path / "out")) == 1
    done = command(*nowhere, "--out", tmp_path / "none")
    assert done.exit_code == (1 if count == 1 else 3), done.output
    if count > 1:
        folder_of = tmp_path / "nowhere"
        assert done.output.splitlines() == [
            f"pathology: none of the {count} slides is there: folder {folder_of} of the slides is gone; mount it or correct "
            "their paths"
        ]
        assert not list((tmp_path / "none").rglob(FAILED))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a disk says is free, asked for time after time; the last number stays."""
    free = [GIB]
    monkeypatch.setattr(room, "free_bytes", lambda _: free.pop(0) if len(free) > 1 else free[0])
    return free


@pytest.mark.fault("F09")
def test_with_less_free_than_is_to_be_left_nothing_begins(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    done = command(folder / "a.svs", "--out", tmp_path / "out", "--min-free", "900000T")
    assert done.exit_code == 3
    (line,) = done.output.splitlines()
    assert f"are free at {tmp_path / 'out'}, and --min-free keeps 9.9e+05 TB: make room, then run the same again" in line
    assert opened == []
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("F09")
def test_a_result_that_may_not_fit_is_not_begun(folder: Path, tmp_path: Path, disk: list[int]) -> None:
    slides, out = [folder / "a.svs", folder / "c.svs"], tmp_path / "out"
    disk[:] = [2**20 + RESULT_BYTES - 1]
    done = command(*slides, "--out", out, "--min-free", "1M", model=DENSE)
    assert done.exit_code == 3, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("pathology: ")]
    assert f"may take {room.size(RESULT_BYTES)} at {out}" in line
    assert "1 more" in line
    assert f"{room.size(disk[0])} are free, and --min-free keeps 1.05 MB: make room" in line
    assert started(out) == 0
    assert not list(out.rglob(FAILED))
    disk[:] = [2**20 + RESULT_BYTES]
    assert command(*slides, "--out", out, "--min-free", "1M", model=DENSE).exit_code == 0
    disk[:] = [2**20]
    done = command(*slides, "--out", out, "--min-free", "1M", model=DENSE)
    assert done.exit_code == 0, done.output  # what is there already takes no more
    assert done.output.count("done before") == len(slides)


@pytest.mark.fault("F09")
def test_a_result_that_may_not_fit_lets_others_go_first(folder: Path, tmp_path: Path, disk: list[int]) -> None:
    write_tiff(folder / "a.svs", [smooth_pixels(600, 800)])
    out = tmp_path / "out"
    disk[:] = [2**20 + 2 * RESULT_BYTES]
    done = command(folder / "a.svs", folder / "c.svs", "--out", out, "--min-free", "1M", model=DENSE)
    assert done.exit_code == 3, done.output
    assert "result of a-" in done.output.splitlines()[-1]
    assert [name.partition("-")[0] for name in manifests(out)] == ["c"]
    assert not list(out.rglob(FAILED))
    disk[:] = [GIB]
    done = command(folder / "a.svs", folder / "c.svs", "--out", out, "--min-free", "1M", model=DENSE)
    assert (done.exit_code, len(manifests(out))) == (0, 2)


@pytest.mark.fault("F09")
def test_glass_takes_no_room(folder: Path, tmp_path: Path, disk: list[int]) -> None:
    pixels = smooth_pixels(1024, 1024) // 4
    pixels[:, 64:] = pixels[64:] = 255
    write_tiff(folder / "a.svs", [pixels])
    disk[:] = [2**20 + 9 * 64 * 64 * 3 * 4 * 4 // 3]  # the tile of tissue, and those that may touch it
    done = command(folder / "a.svs", "--out", tmp_path / "out", "--min-free", "1M", "--tissue", "otsu", model=DENSE)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("missing", [1, 0])
def test_results_that_may_not_fit_together_are_said_so_and_begun(
    missing: int, folder: Path, tmp_path: Path, disk: list[int]
) -> None:
    write_tiff(folder / "f.svs", [smooth_pixels(300, 400)])
    disk[:] = [2**20 + 3 * RESULT_BYTES - missing]
    slides = [folder / name for name in ("a.svs", "c.svs", "f.svs")]
    done = command(*slides, "--out", tmp_path / "out", "--min-free", "1M", model=DENSE)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("preflight: ")]
    assert f"results take {room.size(3 * RESULT_BYTES)} at most" in line
    told = line.endswith(f"{room.size(disk[0])} are free: should less than 1.05 MB be left, the run stops, to be gone on with")
    assert told == bool(missing)


@pytest.mark.fault("F09")
def test_without_a_limit_nothing_is_refused(folder: Path, tmp_path: Path, disk: list[int]) -> None:
    disk[:] = [0]
    assert command(folder / "a.svs", "--out", tmp_path / "out", "--min-free", 0).exit_code == 0


@pytest.mark.fault("F07")
def test_a_disk_that_fills_up_stops_the_run_before_it_is_full(folder: Path, tmp_path: Path, disk: list[int]) -> None:
    slides, out = (folder / "a.svs", folder / "c.svs"), tmp_path / "out"
    assert command(*slides, "--out", tmp_path / "whole").exit_code == 0
    disk[:] = [GIB, GIB, GIB, GIB, 50 * 2**20]  # before all else, after the look, as both are planned, as a region is done
    done = command(*slides, "--out", out)
    assert done.exit_code == 3
    assert "52.4 MB are free" in done.output.splitlines()[-1]
    assert (started(out), len(manifests(out))) == (1, 0)
    assert not list(out.rglob(FAILED))
    disk[:] = [GIB]
    assert command(*slides, "--out", out).exit_code == 0
    assert manifests(out) == manifests(tmp_path / "whole")
    regions = [(e["slide"], e["region"]) for e in read_events(out) if e["event"] == "region-done"]
    assert len(set(regions)) == len(regions)  # the one that was done counted


def test_room_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    assert Room(tmp_path / "not" / "there", 1).lack(free.f_bavail * free.f_frsize // 2) == ""
    with pytest.raises(EnvironmentFault, match="make room, then run the same again"):
        Room(tmp_path / "not" / "there", free.f_bavail * free.f_frsize * 2).require()
    assert Room(tmp_path / "not" / "there", 1).lack(free.f_bavail * free.f_frsize * 2)


@pytest.mark.parametrize("text", ["lots", "-1", "1X"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    done = command(folder, "--out", tmp_path / "out", "--min-free", text)
    assert done.exit_code == 2
    assert "is no number of bytes; write 512M or 2G" in done.output


@pytest.mark.slow
def test_a_thousand_slides_take_less_than_twenty_seconds_of_a_core(tmp_path: Path) -> None:
    first = write_tiff(tmp_path / "first.svs", [noise_pixels(700, 700)], tile_px=64)
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(1000):
        os.link(first, folder / f"{number:04}.svs")
    (folder / "0500.svs").unlink()
    (folder / "0500.svs").touch()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Preflight(find_slides([folder]), Settings(out=tmp_path / "out"), found := {}) as look:
        look.wait(threading.Event())
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    core_s = spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime
    print(f"{look.seconds:.1f} s, {core_s:.1f} s of a core")
    assert 0.1 < core_s < 20
    assert look.failures() == {Reason.EMPTY: 1}
    assert len(found) == 1000
