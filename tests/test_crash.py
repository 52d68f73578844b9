"""Killed at any moment, the same command ends with the same bytes and computes nothing twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pathology.errors import EnvironmentFault
from pathology.events import emit, read_events
from pathology.job import Job
from pathology.runner import run
from pathology.worker import prepare
from tests.crash_runner import computed_again
from tests.slides import smooth_pixels, write_tiff

TESTS = Path(__file__).parent
IDENTITY = "pathology.testing:identity?tile_px=32&mpp=0.5"
MEAN = "pathology.testing:mean_colour?tile_px=16&mpp=0.5"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    library = tmp_path_factory.mktemp("shim") / "kill_shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, TESTS / "kill_shim.c", "-ldl"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mode"), [(IDENTITY, []), (MEAN, []), (IDENTITY, ["overwrite"])], ids=["dense", "classes", "overwrite"]
)
def test_killed_at_every_file_operation_in_turn(shim: Path, model: str, mode: list[str], tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(170, 180)])
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "crash_runner.py"), str(shim), str(slide), model, str(tmp_path), *mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == []
    assert found["operations"] > 60
    # zarr writes from threads, so the number of operations may differ by a few from run to run.
    assert found["killed"] >= found["operations"] - 3


def children(marker: str) -> list[int]:
    """Processes whose environment holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_killed_at_thirty_random_moments(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(1600, 1600)])
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        str(slide),
        "--model",
        MEAN,
        "--tissue",
        "none",
        "--batch-size",
        "4",
    ]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    first = next((tmp_path / "whole").glob("slides/*/*/manifest.json")).read_bytes()
    chance, kills, moments = random.Random(1), 0, 0
    while kills < 30:
        out = tmp_path / f"out{moments}"
        moments += 1
        for _ in range(40):
            marker = f"CRASH_TEST={tmp_path.name}-{time.monotonic_ns()}"
            name, _, value = marker.partition("=")
            process = subprocess.Popen(
                [*command, "--out", str(out)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, name: value},
            )
            before = sum(e["event"] == "region-done" for e in read_events(out))
            while process.poll() is None and sum(e["event"] == "region-done" for e in read_events(out)) <= before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.6))
            if process.poll() is None and kills < 30:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            assert process.returncode in (0, -signal.SIGKILL)
            end = time.monotonic() + 5
            while children(marker) and time.monotonic() < end:
                time.sleep(0.05)
            assert not children(marker)
            if process.returncode == 0:
                break
        assert next(out.glob("slides/*/*/manifest.json")).read_bytes() == first
        done = Counter(e["region"] for e in read_events(out) if e["event"] == "region-done")
        assert max(done.values()) == 1


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What this process does to names from here on, in order: ("fsync" | "rename" | "unlink", path; the new one of a rename)."""
    log: list[tuple[str, Path]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def logged_fsync(fd: int) -> None:
        log.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", Path(target)))
        rename(source, target)

    def logged_unlink(path: Path, **place: int) -> None:
        log.append(("unlink", Path(path)))
        unlink(path, **place)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    monkeypatch.setattr(os, "unlink", logged_unlink)
    return log


@pytest.fixture
def job(reference_job: Job, tmp_path: Path) -> Job:
    return replace(reference_job, out=str(tmp_path))


def test_work_is_dropped_only_when_the_result_lasts(job: Job, operations: list[tuple[str, Path]]) -> None:
    """A loss of power keeps names only of folders that were synced, all the way up, whoever made them."""
    job.slide_folder.mkdir(parents=True)  # as by a process that was killed before it synced the parents
    list(run([job], "sync"))
    renamed = operations.index(("rename", job.result_folder("identity")))
    dropped = operations.index(("unlink", job.work_folder("identity") / "plan.json"))
    synced = [path for what, path in operations[renamed:dropped] if what == "fsync"]
    assert {job.slide_folder, job.slide_folder.parent, Path(job.out)} <= set(synced)
    before = [path for what, path in operations[:renamed] if what == "fsync"]
    partial = job.work_folder("identity") / "partial"
    assert {partial, partial / "manifest.json", partial / "result.json"} <= set(before)


def test_an_old_result_lasts_aside_before_the_new_one_takes_its_name(job: Job, operations: list[tuple[str, Path]]) -> None:
    list(run([job], "sync"))
    operations.clear()
    list(run([replace(job, blend="constant", overwrite=True)], "sync"))
    aside = operations.index(("rename", job.work_folder("identity") / "replaced"))
    assert operations[aside + 1 : aside + 3] == [
        ("fsync", job.work_folder("identity")),
        ("rename", job.result_folder("identity")),
    ]


def test_an_old_result_left_aside_is_put_back_whatever_is_asked_next(job: Job) -> None:
    list(run([job], "sync"))
    final, work = job.result_folder("identity"), job.work_folder("identity")
    old = (final / "manifest.json").read_bytes()
    other = replace(job, blend="constant", overwrite=True)
    prepare(other)
    final.rename(work / "replaced")  # as a run killed in the midst of its commit leaves it
    prepare(replace(other, min_tissue=0.5))
    assert (final / "manifest.json").read_bytes() == old


def test_an_old_result_whose_successor_was_removed_is_not_put_back(job: Job) -> None:
    list(run([job], "sync"))
    final, work = job.result_folder("identity"), job.work_folder("identity")
    work.mkdir(parents=True)
    final.rename(work / "replaced")  # no plan beside it: the commit had come to its end
    assert prepare(job).todo
    assert not final.exists()


def events_file(out: Path) -> Path:
    (path,) = (out / "events").iterdir()
    return path


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    """Process numbers come again, in containers above all: a later process may go on in a dead one's file."""
    emit(tmp_path, "first", {})
    whole = events_file(tmp_path).read_bytes()
    events_file(tmp_path).write_bytes(whole + whole[:20])
    emit(tmp_path, "second", {})
    emit(tmp_path, "third", {})
    assert [e["event"] for e in read_events(tmp_path)] == ["first", "second", "third"]


def test_an_event_lasts_with_the_name_of_its_file(tmp_path: Path, operations: list[tuple[str, Path]]) -> None:
    (tmp_path / "events").mkdir()
    emit(tmp_path, "first", {})
    assert operations == [("fsync", events_file(tmp_path)), ("fsync", tmp_path / "events")]
    operations.clear()
    emit(tmp_path, "second", {})
    assert operations == [("fsync", events_file(tmp_path))]


def test_half_an_event_is_the_disks_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        emit(tmp_path, "first", {})


def test_a_region_computed_again_is_found(tmp_path: Path) -> None:
    for event, region in (("start", 0), ("start", 0), ("done", 0), ("start", 1), ("done", 1)):
        emit(tmp_path, f"region-{event}", {"slide": "s", "region": region})
    assert computed_again(tmp_path) == []
    emit(tmp_path, "region-start", {"slide": "s", "region": 0})
    assert computed_again(tmp_path) == [("s", 0)]
