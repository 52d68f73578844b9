"""Every scheduler gives the bytes of the sequential loop, and a dying worker costs at most its own slide."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import pathology
from pathology import schedule, slide_worker, worker
from pathology.errors import EnvironmentFault, ModelError, Reason, SlideError, UsageError
from pathology.finish import read_manifest
from pathology.integrity import verify
from pathology.outcome import Interrupted, Progress
from pathology.plan import REGIONS_AT_ONCE, Region
from pathology.result import open_heatmap
from pathology.runner import run
from pathology.schedule import open_tasks
from pathology.store import STORE_NAME
from pathology.work import Work
from tests.crashing import POISON
from tests.slides import noise_pixels, write_tiff


def test_the_reference_is_the_slide_itself(reference: Path) -> None:
    heatmap = open_heatmap(reference / STORE_NAME)
    scores = heatmap.read(0, pathology.Box(0, 0, 200, 170))
    assert np.array_equal(scores, noise_pixels(200, 170).transpose(2, 0, 1).astype(np.float32))


def test_the_record_names_its_manifest(reference: Path) -> None:
    record = json.loads((reference / "result.json").read_bytes())
    assert record["manifest_sha256"] == hashlib.sha256((reference / "manifest.json").read_bytes()).hexdigest()
    assert (record["status"], record["tiles"], record["regions"]) == ("ok", 120, 12)


def test_the_manifest_holds_no_time_host_or_path(reference: Path, reference_job: pathology.Job) -> None:
    record = json.loads((reference / "result.json").read_bytes())
    text = (reference / "manifest.json").read_text()
    for private in (record["host"], Path(reference_job.slide).name, reference_job.out, str(int(record["finished"]))):
        assert private not in text


@pytest.fixture(scope="module")
def outside() -> Iterator[str]:
    """The address of a scheduler with two worker processes that runs before and after."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        silence_logs=50,
    ) as cluster:
        yield cluster.scheduler_address


def same_bytes(job: pathology.Job, scheduler: str, reference: Path) -> None:
    seen: list[Progress] = []
    (outcome,) = run([job], scheduler, progress=seen.append)
    assert (outcome.status, outcome.reason, outcome.before) == ("ok", None, False)
    folder = job.result_folder("identity")
    assert (folder / "manifest.json").read_bytes() == (reference / "manifest.json").read_bytes()
    assert list(verify(job.out)) == []
    assert not job.work_folder("identity").exists()
    planned = [p.tiles for p in seen if p.event == "planned"]
    regions = [p.tiles for p in seen if p.event == "region"]
    assert len(regions) == 12
    assert planned == [sum(regions)]


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_local_schedulers_equal_the_reference(
    scheduler: str, reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    same_bytes(replace(reference_job, out=str(tmp_path)), scheduler, reference)


def test_an_outside_scheduler_equals_the_reference(
    outside: str, reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    same_bytes(replace(reference_job, out=str(tmp_path)), outside, reference)


@pytest.mark.parametrize("change", [{"block": 7}, {"block": 100}, {"batch_size": 3}, {"readers": 1}])
def test_how_the_work_is_cut_changes_no_byte(
    change: dict[str, int], reference: Path, reference_job: pathology.Job, tmp_path: Path
) -> None:
    job = replace(reference_job, out=str(tmp_path), **change)
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok"
    manifest, expected = read_manifest(job.result_folder("identity")), read_manifest(reference)
    assert manifest == expected


def test_finished_work_is_not_done_again(reference: Path, reference_job: pathology.Job) -> None:
    before = (reference / "result.json").stat()
    seen: list[Progress] = []
    (outcome,) = run([reference_job], "sync", progress=seen.append)
    assert (outcome.status, outcome.before, seen) == ("ok", True, [])
    assert (reference / "result.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_stopped_run_goes_on_where_it_stopped(reference: Path, reference_job: pathology.Job, tmp_path: Path) -> None:
    job, stop, seen = replace(reference_job, out=str(tmp_path)), threading.Event(), []

    def watch(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == 5:
            stop.set()

    with pytest.raises(Interrupted, match="run the same command again"):
        list(run([job], "sync", progress=watch, stop=stop))
    left: list[Progress] = []
    (outcome,) = run([job], "sync", progress=left.append)
    assert outcome.status == "ok"
    assert [p.event for p in left].count("region") == 7
    assert read_manifest(job.result_folder("identity")) == read_manifest(reference)


def test_a_region_that_cannot_be_written_keeps_no_other_waiting(
    reference_job: pathology.Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(reference_job, out=str(tmp_path), block=10)
    left = slide_worker.prepare(job).todo

    def full(work: Work, region: Region, rows: Iterator[np.ndarray]) -> list[str]:
        next(rows)
        raise EnvironmentFault("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Work, "stage", full)
        with pytest.raises(EnvironmentFault, match="no room") as kept:
            worker.run_region(job, left[0])
    others = threading.Thread(target=lambda: [worker.run_region(job, index) for index in left], daemon=True)
    others.start()
    others.join(60)
    assert not others.is_alive(), "tiles of the failed region are waited for"
    assert slide_worker.prepare(job).todo == ()
    assert kept.traceback  # which holds the frames of the failed region, as a scheduler does


def test_another_parameter_is_refused_with_the_difference(reference: Path, reference_job: pathology.Job) -> None:
    with pytest.raises(
        UsageError, match=r"was made otherwise \(stride_px 16 -> 32\); choose another --out or pass --overwrite"
    ):
        list(run([replace(reference_job, overlap=0)], "sync"))
    assert list(verify(reference)) == []


def test_on_many_cores_several_processes_read_for_a_device(
    reference_job: pathology.Job, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "core_count", lambda: 16)
    others = set(psutil.Process().children())
    with closing(open_tasks("processes")) as tasks:
        assert tasks.slots() == 4
        assert len(set(psutil.Process().children()) - others) == 1 + 4
    job = replace(reference_job, out=str(tmp_path), model="pathology.testing:mean_colour?tile_px=32&mpp=0.5", readers=16)
    (outcome,) = run([job], "processes")
    (expected,) = run([replace(job, out=str(tmp_path / "in-order"))], "sync")
    assert (outcome.status, expected.status) == ("ok", "ok")
    manifests = [Path(o.job.result_folder("mean-colour"), "manifest.json").read_bytes() for o in (outcome, expected)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(("model", "at_once"), [("identity", REGIONS_AT_ONCE), ("mean_colour", 4)])
def test_of_dense_regions_as_many_are_at_work_as_there_is_memory_for(
    model: str, at_once: int, reference_job: pathology.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(reference_job, model=f"pathology.testing:{model}?tile_px=32&mpp=0.5")
    at_work, most, lock, all_in = 0, 0, threading.Lock(), threading.Event()

    def region(*_: object) -> tuple[int, ...]:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
            if at_work == at_once:
                all_in.set()
        assert all_in.wait(20)
        time.sleep(0.1)  # for one too many to come in
        with lock:
            at_work -= 1
        return (0,)

    monkeypatch.setattr(worker, "_run_regions", region)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda index: worker.run_regions((job,), (index,)), range(4))) == [(0,)] * 4
    assert most == at_once


@pytest.mark.parametrize("scheduler", ["thread", "", "http://127.0.0.1:1"])
def test_an_unknown_scheduler_is_refused(scheduler: str) -> None:
    with pytest.raises(UsageError, match="is unknown; use sync, threads, processes, tls:"):
        open_tasks(scheduler)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_nothing_listens_beyond_loopback(scheduler: str) -> None:
    with closing(open_tasks(scheduler)) as tasks:
        tasks.submit("seven", int, "7")
        assert tasks.done.get(timeout=60).value == 7
        me = psutil.Process()
        listening = {
            c.laddr.ip
            for process in (me, *me.children(recursive=True))
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        }
    assert listening == {"127.0.0.1"}


@pytest.fixture
def poisoned(tmp_path: Path) -> list[pathology.Job]:
    """Jobs of a good slide, one with a tile that ends the process, and another good one."""
    jobs = []
    for name in ("good", "poisoned", "other"):
        pixels = noise_pixels(128, 160, seed=len(jobs))
        if name == "poisoned":
            pixels[64, 96] = POISON
        path = write_tiff(tmp_path / f"{name}.tiff", [pixels])
        jobs.append(
            pathology.Job(
                slide=str(path),
                slide_id=name,
                root=str(tmp_path),
                model="tests.crashing:fragile",
                out=str(tmp_path / "out"),
                block=2,
                tissue="none",
                batch_size=4,
            )
        )
    return jobs


@pytest.mark.slow
@pytest.mark.fault("F02")
def test_a_worker_that_dies_once_costs_nothing(poisoned: list[pathology.Job], tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    jobs = [replace(job, model=f"tests.crashing:fragile?flag={flag}") for job in poisoned]
    outcomes = {o.job.slide_id: (o.status, o.message) for o in run(jobs, "processes")}
    assert flag.exists(), "no worker died"
    assert outcomes == dict.fromkeys(("good", "poisoned", "other"), ("ok", ""))
    assert list(verify(tmp_path / "out")) == []


@pytest.mark.slow
@pytest.mark.fault("F24")
def test_a_slide_that_kills_its_worker_twice_fails_alone(poisoned: list[pathology.Job], tmp_path: Path) -> None:
    outcomes = {o.job.slide_id: (o.status, o.reason) for o in run(poisoned, "processes")}
    assert outcomes == {"good": ("ok", None), "poisoned": ("failed", Reason.CRASHED), "other": ("ok", None)}
    assert list(verify(tmp_path / "out")) == []


class GoneResult:
    """A future whose worker died after the task's end and before its value was fetched."""

    def __init__(self, then: object) -> None:
        self.status = "lost"
        self._then = then

    def exception(self) -> None:
        return None

    def result(self) -> object:
        """What the scheduler's repetition ends with."""
        if isinstance(self._then, BaseException):
            raise self._then
        return self._then


def test_a_value_lost_with_its_worker_is_waited_for_again_and_a_death_is_a_death() -> None:
    from distributed import KilledWorker

    with closing(open_tasks("threads")) as tasks:
        ends: list[object] = ["value", KilledWorker("task", None, 0), SlideError(Reason.TRUNCATED, "cut"), CancelledError()]
        for then in ends:
            tasks._end("token", GoneResult(then))  # type: ignore[attr-defined]
        value, killed, raised, cancelled = (tasks.done.get(timeout=5) for _ in ends)
    assert (value.value, value.error, value.died) == ("value", None, False)
    assert killed.died
    assert (raised.error, raised.died) == (ends[2], False)
    assert (type(cancelled.error), cancelled.died) == (EnvironmentFault, False)


class Idle:
    """Processes that nothing ever reaches."""

    busy = False

    def close(self) -> None:
        """There is nothing to end."""


class Deaf:
    """A client whose tasks stay where they are."""

    def submit(self, *_: Any, **__: Any) -> Deaf:
        return self

    def add_done_callback(self, _: Any) -> None:
        """It never ends."""

    def close(self, timeout: float) -> None:
        """There is nothing to close."""


def test_tasks_that_reach_no_process_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LOST_S", 0.5)
    tasks = schedule.OnDask(Deaf(), own=[Idle()])  # type: ignore[list-item]
    tasks.submit("first", len)
    tasks.submit("second", len)
    told = [tasks.done.get(timeout=20) for _ in range(2)]
    tasks.close()
    assert {done.token for done in told} == {"first", "second"}
    assert all(isinstance(done.error, EnvironmentFault) for done in told)


def test_a_model_that_does_not_load_ends_the_run_before_the_first_slide(reference_job: pathology.Job, tmp_path: Path) -> None:
    job = replace(reference_job, model="tests.crashing:nothing", out=str(tmp_path))
    with pytest.raises(ModelError, match="has no callable nothing"):
        list(run([job], "sync"))
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_does_not_answer_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    def refuse(*_: object, **__: object) -> None:
        raise OSError("timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    with pytest.raises(EnvironmentFault, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 \(timed out\)"):
        open_tasks("tcp://127.0.0.1:1")
