"""Slides copied to a local disk ahead of use: same results, bounded, never a torn copy, nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from pathology import faults, slide_worker, staging
from pathology.errors import EnvironmentFault, UsageError
from pathology.events import read_events
from pathology.finish import read_manifest
from pathology.job import Job
from pathology.outcome import Interrupted, Progress
from pathology.runner import run
from pathology.staging import Copy, Stage, open_stage, slide_path
from pipelines.cli import main
from pipelines.slides import find_slides
from tests.dicom_slides import write_series
from tests.slides import cut, smooth_pixels, write_tiff

MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"


def told(stage: Stage, place: int) -> Job:
    """The job as a worker gets it."""
    return replace(stage._jobs[place], stage=stage.folder(place))


def command(*arguments: object) -> Result:
    fixed = ["run", "--model", MODEL, "--scheduler", "sync", "--tissue", "none", "--threads", 1]
    return CliRunner().invoke(main, [str(a) for a in (*fixed, *arguments)])


def manifests(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("slides/*/*/manifest.json"))}


def events(out: Path, kind: str) -> list[dict[str, object]]:
    return [e for e in read_events(out) if e["event"] == kind]


def rows(out: Path) -> list[str]:
    """The lines of the summary without the last column, the time that it took."""
    return [line.rpartition(",")[0] for line in (out / "summary.csv").read_text().splitlines()]


def held_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def a_job(slide: Path, stage: Path, **options: object) -> Job:
    fields = {"slide": str(slide), "slide_id": slide.stem, "root": str(slide), "model": MODEL, "out": str(stage.parent / "out")}
    return replace(Job(**fields), stage=str(stage), tissue="none", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three TIFFs, a slide of several files and a file that is cut short."""
    (tmp_path / "slides").mkdir()
    for name in "abc":
        write_tiff(tmp_path / "slides" / f"{name}.svs", [smooth_pixels(300, 400, seed=ord(name))], compression=None)
    write_series(tmp_path / "slides" / "d", "1.2.840.9", smooth_pixels(300, 200))
    cut(write_tiff(tmp_path / "slides" / "cut.svs", [smooth_pixels(300, 400)], compression=None), 0.5)
    return tmp_path / "slides"


def test_a_staged_run_leaves_the_slides_alone_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(folder, "--out", tmp_path / "plain").exit_code == 1
    prepare, read = slide_worker.prepare, []

    def prepare_without_originals(job: Job, together: tuple[Job, ...]) -> slide_worker.Prepared:
        if job.stage is None:
            assert "cut" in job.slide
            return prepare(job, together)
        # No read of the original can succeed from here on.
        for path in Path(job.slide).parent.glob("*.dcm" if "dcm" in job.slide else Path(job.slide).name):
            path.rename(path.with_suffix(".hidden"))
        read.append(job.slide_id)
        return prepare(job, together)

    monkeypatch.setattr(slide_worker, "prepare", prepare_without_originals)
    done = command(folder, "--out", tmp_path / "staged", "--stage", tmp_path / "disk")
    assert done.exit_code == 1, done.output
    assert len(read) == 4
    assert manifests(tmp_path / "staged") == manifests(tmp_path / "plain") != {}
    assert len(events(tmp_path / "staged", "slide-staged")) == 4
    assert events(tmp_path / "staged", "slide-in-place") == []
    assert list((tmp_path / "disk").iterdir()) == []
    assert rows(tmp_path / "staged") == rows(tmp_path / "plain")


def test_worker_processes_read_the_copy(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "a.svs", tmp_path / "disk", block=2)

    def hide(step: Progress) -> None:
        if step.event == "planned":
            (folder / "a.svs").rename(tmp_path / "hidden")

    (outcome,) = run([job], "processes", progress=hide)
    assert outcome.status == "ok"
    assert replace(outcome.job, owner=job.owner) == job
    shutil.move(tmp_path / "hidden", folder / "a.svs")
    (plain,) = run([replace(job, stage=None, out=str(tmp_path / "plain"))], "sync")
    folders = [o.job.result_folder("mean-colour") for o in (outcome, plain)]
    assert read_manifest(folders[0]) == read_manifest(folders[1])
    assert list((tmp_path / "disk").iterdir()) == []


def test_the_copies_never_take_more_than_the_bound(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = int(1.5 * (folder / "a.svs").stat().st_size)
    disk, seen = tmp_path / "disk", []
    copy = Stage._copy

    def watched(self: Stage, source: Path, target: Path, size: int) -> None:
        copy(self, source, target, size)
        seen.append(held_bytes(disk))

    monkeypatch.setattr(Stage, "_copy", watched)
    done = command(folder, "--out", tmp_path / "out", "--stage", disk, "--stage-size", bound / 2**30)
    assert done.exit_code == 1, done.output
    assert len(events(tmp_path / "out", "slide-staged")) == 4
    assert len(seen) == 6  # files: three TIFFs, a series of two levels and a label
    assert 0 < max(seen) <= bound


def test_a_slide_larger_than_the_bound_is_read_in_place_and_said_so(folder: Path, tmp_path: Path) -> None:
    done = command(folder / "a.svs", "--out", tmp_path / "out", "--stage", tmp_path / "disk", "--stage-size", 0.0001)
    assert done.exit_code == 0, done.output
    assert "is read where it lies" in done.output
    assert "--stage-size" in done.output
    assert len(events(tmp_path / "out", "slide-in-place")) == 1


def test_a_full_disk_is_said_and_ends_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(folder / "a.svs", "--out", tmp_path / "plain").exit_code == 0

    def full(self: Stage, source: Path, target: Path, size: int) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_copy", full)
        done = command(folder / "a.svs", "--out", tmp_path / "one", "--stage", tmp_path / "disk", "--log-format", "json")
    assert done.exit_code == 0, done.output
    assert "No space left on device" in done.output
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = command(folder / "a.svs", "--out", tmp_path / "two", "--stage", tmp_path / "disk")
    assert done.exit_code == 0, done.output
    assert "1000 that are free" in done.output
    assert manifests(tmp_path / "one") == manifests(tmp_path / "two") == manifests(tmp_path / "plain")


@pytest.mark.fault("F27")
def test_a_copy_that_fails_is_made_again_and_given_up_in_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "WAITS_S", (0.0, 0.0, 0.0))
    copy, tried = Stage._copy, []

    def fail(self: Stage, source: Path, target: Path, size: int) -> None:
        tried.append(target)
        if len(tried) < passes:
            target.write_bytes(b"half")
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        copy(self, source, target, size)

    passes = 3
    with monkeypatch.context() as patch, open_stage([a_job(folder / "a.svs", tmp_path / "disk")]) as stage:
        patch.setattr(Stage, "_copy", fail)
        wait_for(stage, 0)
        assert slide_path(told(stage, 0)).read_bytes() == (folder / "a.svs").read_bytes()
    assert len(tried) == 3
    passes = 100
    assert "Stale file handle" in one_copy(a_job(folder / "a.svs", tmp_path / "disk"), fail).why
    assert len(tried) == 3 + 4


def test_a_slide_that_changes_under_the_copy_is_read_in_place(folder: Path, tmp_path: Path) -> None:
    copy = Stage._copy

    def overtaken(self: Stage, source: Path, target: Path, size: int) -> None:
        copy(self, source, target, size)
        with target.open("r+b") as file:  # as a read of other bytes would have left it
            file.seek(size - 10)
            file.write(b"other")

    result = one_copy(a_job(folder / "a.svs", tmp_path / "disk"), overtaken)
    assert "changed while it was copied" in result.why

    def grown(self: Stage, source: Path, target: Path, size: int) -> None:
        copy(self, source, target, size - 1)

    assert "changed while it was copied" in one_copy(a_job(folder / "a.svs", tmp_path / "disk"), grown).why


def one_copy(job: Job, copy: Callable[[Stage, Path, Path, int], None]) -> Copy:
    """How the staging of one slide ends with this way of copying; no copy is left to be used."""
    with pytest.MonkeyPatch.context() as patch, open_stage([job]) as stage:
        patch.setattr(Stage, "_copy", copy)
        wait_for(stage, 0)
        assert told(stage, 0).stage is None
        assert held_bytes(Path(job.stage)) == 0
        found = stage.begun(0)
    assert found is not None
    return found


def wait_for(stage: Stage, *places: int) -> None:
    """Start the stage and wait until these jobs can begin."""
    woken = threading.Semaphore(0)
    stage.start(lambda _: True, woken.release)
    for place in places:
        while not stage.ready(place, 5):
            assert woken.acquire(timeout=20)


def test_killed_amid_a_copy_the_next_run_sweeps_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    slide, out, disk = folder / "a.svs", tmp_path / "out", tmp_path / "disk"
    code = f"""
import os, signal
from pathology.staging import Stage
from pipelines.cli import main
def killed(self, source, target, size):
    target.write_bytes(source.read_bytes()[: size // 2])
    os.kill(os.getpid(), signal.SIGKILL)
Stage._copy = killed
main(["run", {str(slide)!r}, "--model", {MODEL!r}, "--out", {str(out)!r}, "--scheduler", "sync", "--tissue", "none",
      "--threads", "1", "--stage", {str(disk)!r}])
"""
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert [p.parent.name for p in disk.rglob("*.svs")] == ["000000.part"]
    (disk / "others").mkdir()
    assert find_slides([tmp_path])[0].path == folder / "a.svs"  # leftovers are no slides
    assert command(slide, "--out", out, "--stage", disk).exit_code == 0
    assert [p.name for p in disk.iterdir()] == ["others"]
    assert command(slide, "--out", tmp_path / "plain").exit_code == 0
    assert manifests(out) == manifests(tmp_path / "plain")


def test_runs_that_share_the_folder_keep_to_their_own(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "a.svs", tmp_path / "disk")
    with open_stage([job]) as first:
        wait_for(first, 0)
        with open_stage([job]) as second:
            wait_for(second, 0)
            assert len(list((tmp_path / "disk").iterdir())) == 2
            assert slide_path(told(first, 0)) != slide_path(told(second, 0))
        assert slide_path(told(first, 0)).read_bytes() == (folder / "a.svs").read_bytes()
    assert list((tmp_path / "disk").iterdir()) == []


def test_jobs_of_one_slide_share_a_copy_and_a_slide_that_comes_again_is_copied_again(folder: Path, tmp_path: Path) -> None:
    bound = int(1.5 * (folder / "a.svs").stat().st_size)
    a, b = (a_job(folder / f"{name}.svs", tmp_path / "disk", stage_bytes=bound) for name in "ab")
    with open_stage([a, replace(a, overlap=0.5), b, a]) as stage:
        wait_for(stage, 0, 1)
        copy = slide_path(told(stage, 0))
        assert copy == slide_path(told(stage, 1)) != Path(a.slide)
        assert (stage.begun(0) is None, stage.begun(1) is None) == (False, True)
        stage.end(0)
        assert copy.exists()
        assert not stage.ready(2, 5)  # no room
        with copy.open("rb") as still_open:
            stage.end(1)
            assert not copy.exists()
            assert os.fstat(still_open.fileno()).st_blocks == 0
        for place in (2, 3):
            while not stage.ready(place, 5):
                stage._copies[place - 1].result(timeout=20)
            assert slide_path(told(stage, place)).exists()
            stage.end(place)
        assert held_bytes(tmp_path / "disk") == 0


def test_only_a_few_slides_are_copied_ahead(folder: Path, tmp_path: Path) -> None:
    jobs = [a_job(folder / f"{name}.svs", tmp_path / "disk") for name in "abc"]
    with open_stage(jobs) as stage:
        stage.start(lambda _: True, lambda: None)
        stage.ready(0, 1)
        assert [copy.result(timeout=20).bytes > 0 for copy in stage._copies[:2]] == [True, True]
        with pytest.raises(TimeoutError):
            stage._copies[2].result(timeout=0.3)
        assert len(list((tmp_path / "disk").rglob("*.svs"))) == 2


def test_finished_slides_are_not_copied_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (folder / "a.svs", "--out", out, "--stage", tmp_path / "disk")
    for _ in range(2):
        assert command(*arguments).exit_code == 0
    assert len(events(out, "slide-staged")) == 1
    assert command(*arguments, "--overlap", 0.5, "--overwrite").exit_code == 0
    assert len(events(out, "slide-staged")) == 2


def test_a_failure_stands_with_and_without(folder: Path, tmp_path: Path) -> None:
    first = command(folder / "cut.svs", "--out", tmp_path / "out")
    again = command(folder / "cut.svs", "--out", tmp_path / "out", "--stage", tmp_path / "disk")
    assert (first.exit_code, again.exit_code) == (1, 1)
    assert "failed before" in again.output


def test_a_copy_that_is_lost_is_said_and_the_slide_read_in_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = slide_worker.prepare

    def swept(job: Job, together: tuple[Job, ...]) -> slide_worker.Prepared:
        shutil.rmtree(Path(job.stage or ""))
        return prepare(job, together)

    monkeypatch.setattr(slide_worker, "prepare", swept)
    assert command(folder / "a.svs", "--out", tmp_path / "out", "--stage", tmp_path / "disk").exit_code == 0
    (event,) = events(tmp_path / "out", "slide-in-place")
    assert "is gone" in str(event["why"])


def test_slides_of_several_files_are_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "slides"
    (source / "m").mkdir(parents=True)
    (source / "m.mrxs").touch()
    (source / "m" / "Slidedat.ini").write_text("[GENERAL]\n")
    (source / "m" / "Data0001.dat").write_bytes(b"pixels")
    (source / "v.vms").write_text("[Virtual Microscope Specimen]\nImageFile=one.jpg\n")
    (source / "one.jpg").write_bytes(b"one")
    (source / "other.jpg").write_bytes(b"other")
    with open_stage([a_job(source / name, tmp_path / "disk") for name in ("m.mrxs", "v.vms")]) as stage:
        wait_for(stage, 0, 1)
        for place, names in enumerate((["m/Data0001.dat", "m/Slidedat.ini", "m.mrxs"], ["one.jpg", "v.vms"])):
            folder = slide_path(told(stage, place)).parent
            copied = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            assert copied == {name: (source / name).read_bytes() for name in names}


def test_a_run_that_is_stopped_leaves_no_copy(folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    jobs = [a_job(folder / f"{name}.svs", tmp_path / "disk") for name in "ab"]
    with pytest.raises(Interrupted):
        list(run(jobs, "sync", progress=lambda _: stop.set(), stop=stop))
    assert list((tmp_path / "disk").iterdir()) == []


def test_staging_is_refused_where_it_cannot_help(folder: Path, tmp_path: Path) -> None:
    job = a_job(folder / "a.svs", tmp_path / "disk")
    with pytest.raises(UsageError, match="tcp://"):
        list(run([job], "tcp://127.0.0.1:1"))
    with pytest.raises(UsageError, match="name one"):
        open_stage([job, replace(job, stage_bytes=1)])
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="--stage"):
        open_stage([replace(job, stage=str(tmp_path / "file"))])
    assert open_stage([replace(job, stage=None)]) is None
