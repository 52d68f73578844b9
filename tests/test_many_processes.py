"""Several runs on one output (F13, F14, F26): each slide is done once, and no late write changes what another has done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from slides import noise_pixels, write_tiff

import pathology
from pathology import finish, slide_worker, turns, window, worker
from pathology.errors import Reason
from pathology.events import read_events
from pathology.finish import read_manifest
from pathology.job import FREE, Job
from pathology.lease import OWNER, Leases
from pathology.outcome import Interrupted, Outcome, Progress
from pathology.runner import run
from pathology.work import Work

ELSEWHERE = "000000000000-123-456-0"
MODEL = "pathology.testing:mean_colour?tile_px=32&mpp=0.5"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slides of others are looked at every moment."""
    monkeypatch.setattr(turns, "LOOK_S", 0.05)


def held_elsewhere(job: Job) -> Path:
    """Whatever work there is of the job's slide, as that of a process on another host."""
    place = job.work_place
    place.mkdir(parents=True, exist_ok=True)
    folder = place / ELSEWHERE
    for work in place.iterdir():
        work.rename(folder)
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps({"token": ELSEWHERE, "host": "node7", "pid": 123, "time": 0}))
    return folder


def jobs_of(slides: int, folder: Path) -> list[Job]:
    return [
        Job(
            slide=str(write_tiff(folder / f"s{n}.tiff", [noise_pixels(100, 90, seed=n)])),
            slide_id=f"s{n}",
            root=str(folder),
            model=MODEL,
            out=str(folder / "out"),
            block=2,
            tissue="none",
            batch_size=4,
        )
        for n in range(slides)
    ]


def done_by_slide(out: Path) -> Counter[str]:
    return Counter(event["slide"] for event in read_events(out) if event["event"] == "slide-done")


def work_left(out: Path) -> list[str]:
    """What is left of unfinished work, and what is in it."""
    work = out / ".work"
    return [str(path.relative_to(work)) for path in work.rglob("*") if path.parent != work or path.is_dir()]


@pytest.mark.fault("F13")
def test_two_runs_at_once_do_each_slide_once_and_both_have_all_outcomes(tmp_path: Path) -> None:
    jobs = jobs_of(5, tmp_path)
    outcomes: dict[int, list[Outcome]] = {}
    threads = [threading.Thread(target=lambda n=n: outcomes.update({n: list(run(jobs, "sync"))})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    slides = sorted(job.slide_id for job in jobs)
    assert [sorted(o.job.slide_id for o in outcomes[n]) for n in range(2)] == [slides, slides]
    assert {o.status for n in range(2) for o in outcomes[n]} == {"ok"}
    assert done_by_slide(tmp_path / "out") == dict.fromkeys(slides, 1)
    assert work_left(tmp_path / "out") == []


@pytest.mark.fault("F14")
def test_work_of_one_who_died_elsewhere_is_waited_for_and_gone_on_with(
    reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    job, stop, seen = replace(reference_job, out=str(tmp_path)), threading.Event(), []

    def watch(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == 5:
            stop.set()

    with pytest.raises(Interrupted):
        list(run([job], "sync", progress=watch, stop=stop))
    assert [folder.name for folder in job.work_place.iterdir()] == [FREE]
    held_elsewhere(job)
    steps: list[Progress] = []
    (outcome,) = run([job], "sync", progress=steps.append, lease_s=0.5)
    assert outcome.status == "ok"
    assert [(s.event, s.message) for s in steps if s.event == "waiting"] == [("waiting", "process 123 on node7")]
    assert [s.event for s in steps].count("region") == 7
    assert read_manifest(job.result_folder("identity")) == read_manifest(reference)
    assert work_left(tmp_path) == []


def test_slides_of_others_are_put_aside_for_the_rest(tmp_path: Path) -> None:
    jobs = jobs_of(3, tmp_path)
    held_elsewhere(jobs[0])
    order = [outcome.job.slide_id for outcome in run(jobs, "sync", lease_s=0.5)]
    assert order == ["s1", "s2", "s0"]


def test_waiting_for_others_can_be_stopped(reference_job: pathology.Job, tmp_path: Path) -> None:
    job, stop = replace(reference_job, out=str(tmp_path)), threading.Event()
    folder = held_elsewhere(job)
    with pytest.raises(Interrupted):
        list(run([job], "sync", progress=lambda _: stop.set(), stop=stop))
    assert folder.exists()


@pytest.mark.fault("F26")
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_a_slide_that_is_lost_on_the_way_is_no_failure_and_comes_again(
    scheduler: str, reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    job, seen = replace(reference_job, out=str(tmp_path)), []

    def take_over(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == 4 and "waiting" not in seen:
            held_elsewhere(job)

    (outcome,) = run([job], scheduler, progress=take_over, lease_s=0.5)
    assert (outcome.status, outcome.message) == ("ok", "")
    assert seen.count("waiting") == 1
    assert seen.count("planned") == 2
    assert read_manifest(job.result_folder("identity")) == read_manifest(reference)
    assert done_by_slide(tmp_path) == {"small": 1}
    assert work_left(tmp_path) == []


def test_what_was_begun_before_a_slide_was_lost_is_dropped_though_the_slide_is_owned_again(tmp_path: Path) -> None:
    """Two models that read otherwise: the second is begun after the slide was lost, and free again."""
    (one,) = jobs_of(1, tmp_path)
    jobs = [one, replace(one, model="pathology.testing:identity?tile_px=16&mpp=1")]
    seen: list[str] = []

    def lose(progress: Progress) -> None:
        seen.append(progress.event)
        if len(seen) == 1:
            (work,) = one.work_place.iterdir()
            work.rename(one.work_place / FREE)

    outcomes = list(run(jobs, "sync", progress=lose))
    assert [(o.status, o.message) for o in outcomes] == [("ok", "")] * 2
    assert seen.count("planned") > 2
    assert work_left(tmp_path / "out") == []


def test_a_slide_that_another_has_is_not_copied_ahead(tmp_path: Path) -> None:
    jobs = [replace(job, stage=str(tmp_path / "disk")) for job in jobs_of(2, tmp_path)]
    held_elsewhere(jobs[0])
    assert [o.status for o in run(jobs, "sync", lease_s=0.5)] == ["ok", "ok"]
    assert [e["slide"] for e in read_events(tmp_path / "out") if e["event"] == "slide-staged"] == ["s1"]


def test_owners_build_results_under_names_of_their_own(tmp_path: Path) -> None:
    """A rename that waits on its way to a server names folders by their numbers, not by the paths they had."""
    one, other = (Work(tmp_path / token / "model", {}) for token in ("one", "other"))
    one.partial.mkdir(parents=True)
    folder = os.open(one.folder, os.O_RDONLY)
    (tmp_path / "one").rename(tmp_path / "other")
    other.clear_partial()
    other.partial.mkdir()
    with pytest.raises(FileNotFoundError):
        os.rename(one.partial.name, tmp_path / "result", src_dir_fd=folder)  # by the folder that is open
    os.close(folder)


def test_what_another_has_finished_meanwhile_is_the_outcome(tmp_path: Path) -> None:
    (job,) = jobs_of(1, tmp_path)
    other = Leases()
    assert other.claim(job.work_place) is None
    theirs = replace(job, owner=other.token(job.work_place))

    def finish_it(_: Progress) -> None:
        for region in slide_worker.prepare(theirs).todo:
            worker.run_region(theirs, region)
        slide_worker.finish_slide(theirs)
        other.release(job.work_place)

    (outcome,) = run([job], "sync", progress=finish_it)
    assert (outcome.status, outcome.before) == ("ok", True)
    assert done_by_slide(tmp_path / "out") == {"s0": 1}
    other.close()


def test_what_another_has_failed_at_meanwhile_is_the_outcome(tmp_path: Path) -> None:
    (job,) = jobs_of(1, tmp_path)
    failures: list[Outcome] = []
    seen = []
    with closing(Leases()) as other:
        assert other.claim(job.work_place) is None

        def fail(progress: Progress) -> None:
            seen.append(progress.event)
            failures.append(Outcome(job, "failed", reason=Reason.TRUNCATED, before=True))
            other.release(job.work_place)

        outcomes = list(run([job], "sync", progress=fail, known=lambda _: failures[0] if failures else None))
    assert outcomes == failures
    assert seen == ["waiting"]


def after(monkeypatch: pytest.MonkeyPatch, function: str, then: Callable[[], object]) -> None:
    """Let `then` happen once, after `finish` has called one of the functions it uses, or has taken scores to be written."""
    place = Work if function == "gather" else finish
    called = getattr(place, function)
    todo = [then]

    def called_then(*arguments: object) -> object:
        value = called(*arguments)
        if todo:
            todo.pop()()
        return value

    monkeypatch.setattr(place, function, called_then)


@pytest.mark.fault("F26")
@pytest.mark.parametrize("stopped_after", ["gather", "write_output", "_manifest", "_record", "sync_tree"])
@pytest.mark.parametrize("replaces", [False, True])
def test_the_commit_of_one_who_was_taken_over_changes_nothing(
    stopped_after: str,
    replaces: bool,
    reference_job: pathology.Job,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = replace(reference_job, out=str(tmp_path), overwrite=replaces)
    old = None
    if replaces:
        list(run([replace(job, blend="constant", block=3)], "sync"))
        old = read_manifest(job.result_folder("identity"))
    with closing(Leases()) as zombie:
        assert zombie.claim(job.work_place) is None
        mine = replace(job, owner=zombie.token(job.work_place))
        for region in slide_worker.prepare(mine).todo:
            worker.run_region(mine, region)
        with monkeypatch.context() as patch:
            after(patch, stopped_after, lambda: held_elsewhere(job))
            with pytest.raises((OSError, pathology.errors.PathologyError)):
                slide_worker.finish_slide(mine)
        assert read_manifest(job.result_folder("identity")) == old
        assert not zombie.owns(job.work_place)
    assert (job.work_place / ELSEWHERE / "identity" / "plan.json").exists()
    steps: list[str] = []
    (outcome,) = run([job], "sync", progress=lambda step: steps.append(step.event), lease_s=0.2)
    assert outcome.status == "ok"
    assert steps.count("region") == 0  # what the first had staged is kept
    assert read_manifest(job.result_folder("identity")) == read_manifest(reference)


def test_one_who_lost_a_slide_cannot_begin_its_work_nor_write_its_tissue(reference_job: pathology.Job, tmp_path: Path) -> None:
    job = replace(reference_job, out=str(tmp_path), owner="000000000000-1-1-0")
    with pytest.raises(FileNotFoundError):
        slide_worker.prepare(job)
    assert not list(tmp_path.glob("slides/*/*"))
    assert not job.work_place.exists()


def test_a_run_lets_go_of_all_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(2, tmp_path)
    with closing(run(jobs, "sync")) as outcomes:
        next(outcomes)
    with closing(Leases()) as other:
        assert [other.claim(job.work_place) for job in jobs] == [None, None]
    monkeypatch.setattr(window, "SLIDES_AHEAD", 5)
    assert [o.before for o in run(jobs, "sync")] == [True, False]
    assert work_left(tmp_path / "out") == []


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "run", str(folder), "--out", str(out), "--tissue", "none", *options]
    command += ["--model", "pathology.testing:mean_colour?tile_px=16&mpp=0.5", "--batch-size", "4", "--threads", "1"]
    return subprocess.Popen([*command, "--lease", "3"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parts[-3]: path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


def wait_until(condition: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)


@pytest.mark.fault("F13", "F14", "F26")
@pytest.mark.slow
@pytest.mark.parametrize(("scheduler", "slides"), [("sync", 60), ("processes", 60)])
def test_of_three_processes_one_is_killed_and_one_stopped_past_its_lease(scheduler: str, slides: int, tmp_path: Path) -> None:
    folder, whole, out = tmp_path / "slides", tmp_path / "whole", tmp_path / "out"
    folder.mkdir()
    for n in range(slides):
        write_tiff(folder / f"s{n:02}.svs", [noise_pixels(160, 160, seed=n)])
    alone = start(folder, whole, "--scheduler", scheduler)
    said = alone.communicate()[0]
    assert alone.returncode == 0, said
    runs = [start(folder, out, "--scheduler", scheduler) for _ in range(3)]
    killed, stopped, other = runs

    def begun(process: subprocess.Popen[str]) -> list[Path]:
        """Its work on slides that nobody has finished: it may also have claimed one just after another was done with it."""
        claimed = out.glob(f".work/*/*-{process.pid}-*")
        return [path for path in claimed if not any(out.glob(f"slides/{path.parent.name}/*/manifest.json"))]

    wait_until(lambda: begun(killed), *runs)
    killed.kill()
    wait_until(lambda: begun(stopped), stopped, other)
    stopped.send_signal(signal.SIGSTOP)
    while not (held := begun(stopped)):  # it has just let one go
        stopped.send_signal(signal.SIGCONT)
        wait_until(lambda: begun(stopped), stopped, other)
        stopped.send_signal(signal.SIGSTOP)
    said = other.communicate(timeout=180)[0]
    assert other.returncode == 0, said
    assert manifests(out) == manifests(whole)
    assert not [path for path in held if path.exists()]  # taken over
    stopped.send_signal(signal.SIGCONT)
    late = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 0, late
    assert f"{slides} of {slides} done" in late
    killed.communicate()
    assert manifests(out) == manifests(whole)
    done = done_by_slide(out)
    assert max(done.values()) == 1
    assert len(done) >= slides - 1  # the killed one may have died between a result and its event
    assert work_left(out) == []


@pytest.mark.fault("F13")
@pytest.mark.slow
def test_two_commands_started_at_once_share_the_slides(tmp_path: Path) -> None:
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    for n in range(10):
        write_tiff(folder / f"s{n:02}.svs", [noise_pixels(100, 100, seed=n)])
    (folder / "bad.svs").write_bytes((folder / "s00.svs").read_bytes()[:5000])
    runs = [start(folder, out, "--scheduler", "sync") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in runs]
    assert [process.returncode for process in runs] == [1, 1], said
    assert all("10 of 11 done, 1 failed" in text for text in said)
    assert done_by_slide(out) == dict.fromkeys(manifests(out), 1)
    assert len(manifests(out)) == 10
    failures = [event for event in read_events(out) if event["event"] == "slide-failed"]
    assert len(failures) == 1
    assert len((out / "summary.csv").read_text().splitlines()) == 12
    assert len(list(out.glob("events/*"))) == 2
