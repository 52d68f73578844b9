"""What becomes of a task whose worker died: as decided, and as a run acts on it. No process dies here."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pathology
from pathology import deaths, slide_worker, worker
from pathology.calls import Death, WorkerDied
from pathology.deaths import HANGS_BORNE, KILLS_BORNE, Deaths
from pathology.errors import EnvironmentFault, Fault, ModelError, Reason
from pathology.finish import read_manifest
from pathology.lease import Leases
from pathology.outcome import Outcome
from pathology.process import Kind
from pathology.schedule import Done, InOrder
from pathology.window import LOOK, Window
from tests.slides import noise_pixels, write_tiff

Dies = Callable[[Callable[..., Any], tuple[Any, ...]], BaseException | None]


class Mortal(InOrder):
    """Runs tasks in order, but for those whose worker `dies` of something, which it is asked each time."""

    def __init__(self, dies: Dies, apart: bool = True) -> None:
        super().__init__()
        self.apart = apart  # type: ignore[misc]  # what it runs could be elsewhere
        self._dies = dies
        self.submitted: list[Callable[..., Any]] = []

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
        self.submitted.append(function)
        if (error := self._dies(function, arguments)) is None:
            super().submit(token, function, *arguments, kind=kind)
        else:
            self.done.put(Done(token, error=error, died=isinstance(error, WorkerDied)))


@pytest.fixture
def jobs(tmp_path: Path) -> list[pathology.Job]:
    """Of seven slides of four regions each."""
    made = []
    for number in range(7):
        path = write_tiff(tmp_path / f"s{number}.tiff", [noise_pixels(64, 64, seed=number)])
        model = "pathology.testing:mean_colour?tile_px=16&mpp=0.5"
        fields = {"slide": str(path), "slide_id": path.stem, "root": str(tmp_path), "model": model, "tissue": "none"}
        made.append(pathology.Job(**fields, out=str(tmp_path / "out"), block=2, batch_size=4))  # type: ignore[arg-type]
    return made


def ends(jobs: list[pathology.Job], tasks: Mortal) -> dict[str, Outcome]:
    with closing(Leases()) as leases:
        window = Window(jobs, tasks, lambda _: None, threading.Event(), 1, None, leases, lambda _: None, lambda _: None)
        return {outcome.job.slide_id: outcome for outcome in window.outcomes()}


def of(function: Callable[..., Any], arguments: tuple[Any, ...], *slides: str) -> bool:
    """Whether a task is a region of one of these slides."""
    return function is worker.run_regions and arguments[0][0].slide_id in slides


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        (Death.CRASH, Reason.CRASHED),
        (Death.MEMORY, Reason.OUT_OF_MEMORY),
        (Death.READ, Reason.TIMEOUT),
        (Death.STILL, Reason.TIMEOUT),
        (Death.DEVICE, Reason.DEVICE_ERROR),
    ],
)
def test_a_second_death_fails_the_slide_for_its_reason(jobs: list[pathology.Job], death: Death, reason: Reason) -> None:
    found = ends(jobs[:3], Mortal(lambda *task: WorkerDied("so it ended", death) if of(*task, "s1") else None))
    assert {name: outcome.status for name, outcome in found.items()} == {"s0": "ok", "s1": "failed", "s2": "ok"}
    assert found["s1"].reason is reason
    assert found["s1"].message.startswith("so it ended, and again when it was tried alone; ")


@pytest.mark.parametrize("death", list(Death))
def test_a_first_death_costs_nothing(jobs: list[pathology.Job], death: Death) -> None:
    died: set[object] = set()

    def dies(function: Callable[..., Any], arguments: tuple[Any, ...]) -> WorkerDied | None:
        name = (function, arguments[0][0].slide_id if isinstance(arguments[0], tuple) else None, *arguments[1:2])
        if function not in (worker.run_regions, slide_worker.prepare_all) or str(name) in died:
            return None
        died.add(str(name))
        return WorkerDied("once", death)

    assert {outcome.status for outcome in ends(jobs[:2], Mortal(dies)).values()} == {"ok"}
    assert len(died) == 2 + 8


@pytest.mark.fault("F03")
def test_kills_from_outside_fail_no_slide_and_end_the_run_after_so_many_in_a_row(jobs: list[pathology.Job]) -> None:
    left = KILLS_BORNE - 1
    kills = 0

    def dies(function: Callable[..., Any], arguments: tuple[Any, ...]) -> WorkerDied | None:
        nonlocal kills
        if function is worker.run_regions and arguments[1][0] == 2 and kills < left:
            kills += 1
            return WorkerDied("killed", Death.KILL)
        return None

    assert {outcome.status for outcome in ends(jobs[:1], Mortal(dies)).values()} == {"ok"}
    assert kills == left
    kills, left = 0, 1000
    with pytest.raises(EnvironmentFault, match=f"were killed {KILLS_BORNE} times in a row"):
        ends(jobs[1:3], Mortal(dies))
    assert kills == KILLS_BORNE + 1  # the first was not alone
    left = 0
    assert {outcome.status for outcome in ends(jobs[1:3], Mortal(dies)).values()} == {"ok"}  # nothing was marked


@pytest.mark.fault("F03")
def test_kills_with_work_done_in_between_are_borne_for_ever(jobs: list[pathology.Job]) -> None:
    count = 0

    def dies(function: Callable[..., Any], arguments: tuple[Any, ...]) -> WorkerDied | None:
        nonlocal count
        count += 1
        return WorkerDied("killed", Death.KILL) if count % 3 else None

    assert {outcome.status for outcome in ends(jobs[:2], Mortal(dies)).values()} == {"ok"}
    assert count > 3 * KILLS_BORNE


def test_a_kill_then_a_crash_of_its_own_is_one_death(jobs: list[pathology.Job]) -> None:
    script = [WorkerDied("killed", Death.KILL), WorkerDied("crashed"), WorkerDied("killed", Death.KILL)]
    tasks = Mortal(lambda *task: script.pop(0) if of(*task, "s0") and script else None)
    assert ends(jobs[:1], tasks)["s0"].status == "ok"
    assert script == []


def test_kills_while_the_model_is_tried_are_no_fault_of_the_model(jobs: list[pathology.Job]) -> None:
    script = [WorkerDied("killed", Death.KILL), WorkerDied("killed", Death.KILL)]
    tasks = Mortal(lambda function, _: script.pop() if function is worker.check_model and script else None)
    assert ends(jobs[:1], tasks)["s0"].status == "ok"
    with pytest.raises(EnvironmentFault, match="were killed"):
        ends(jobs[:1], Mortal(lambda function, _: WorkerDied("", Death.KILL) if function is worker.check_model else None))


class MortalLook(Mortal):
    """One whose first look dies, and with it what is tried beside."""

    def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
        if token == LOOK:
            self.submitted.append(function)
        elif function is worker.check_model and worker.check_model not in self.submitted:
            self.submitted.append(function)
            self.done.put(Done(token, error=WorkerDied("crashed"), died=True))
            self.done.put(Done(LOOK, error=WorkerDied("crashed"), died=True))
        else:
            super().submit(token, function, *arguments, kind=kind)


def test_a_slide_that_crashes_the_first_look_is_no_fault_of_the_model(jobs: list[pathology.Job]) -> None:
    assert ends(jobs[:1], MortalLook(lambda *_: None))["s0"].status == "ok"
    with pytest.raises(ModelError, match=r"ended its worker process when it was tried \(crashed\)"):
        ends(jobs[:1], Mortal(lambda function, _: WorkerDied("crashed") if function is worker.check_model else None))


def test_slides_that_hang_one_after_the_other_are_the_shares_fault(jobs: list[pathology.Job]) -> None:
    def hangs(function: Callable[..., Any], arguments: tuple[Any, ...]) -> WorkerDied | None:
        return WorkerDied("a read hung", Death.READ) if function is slide_worker.prepare_all else None

    with pytest.raises(EnvironmentFault, match=f"{HANGS_BORNE} slides in a row hung .a read hung.;.*: s0, s1, s2, s3, s4$"):
        ends(jobs, Mortal(hangs))
    found = ends(jobs[: HANGS_BORNE - 1], Mortal(hangs))  # too few to tell
    assert {outcome.reason for outcome in found.values()} == {Reason.TIMEOUT}


def test_slides_that_hang_fail_as_soon_as_another_does_not(jobs: list[pathology.Job]) -> None:
    bad = {"s0", "s1", "s2", "s3", "s5", "s6"}

    def hangs(function: Callable[..., Any], arguments: tuple[Any, ...]) -> WorkerDied | None:
        hung = function is slide_worker.prepare_all and arguments[0][0].slide_id in bad
        return WorkerDied("a read hung", Death.READ) if hung else None

    found = ends(jobs, Mortal(hangs))
    assert {name for name, outcome in found.items() if outcome.reason is Reason.TIMEOUT} == bad
    assert found["s4"].status == "ok"
    assert len(found) == 7


@pytest.mark.fault("F23")
def test_a_device_that_fails_on_made_up_tiles_as_well_is_lost(jobs: list[pathology.Job]) -> None:
    lost = False

    def dies(function: Callable[..., Any], arguments: tuple[Any, ...]) -> BaseException | None:
        nonlocal lost
        lost |= function is worker.run_regions
        if lost and function is worker.check_model:
            return ModelError("CUDA error: no CUDA-capable device is detected")
        return WorkerDied("device cuda failed", Death.DEVICE) if function is worker.run_regions else None

    with pytest.raises(EnvironmentFault, match="device cuda failed, and in a new process again"):
        ends(jobs, Mortal(dies))


@pytest.mark.fault("F23")
def test_where_no_process_can_be_replaced_a_poisoned_device_ends_the_run(jobs: list[pathology.Job]) -> None:
    job = replace(jobs[0], model="tests.crashing:fragile?how=device&flag=/nonexistent/flag&lasting=1")
    tasks = Mortal(lambda *task: WorkerDied("device failed", Death.DEVICE) if of(*task, "s0") else None, apart=False)
    with pytest.raises(EnvironmentFault, match="run the same again, with --scheduler processes"):
        ends([job], tasks)


@pytest.mark.fault("F21")
def test_want_of_memory_gets_a_second_try_alone(jobs: list[pathology.Job]) -> None:
    tasks = Mortal(lambda *task: MemoryError("Unable to allocate 9 TiB") if of(*task, "s1") else None)
    found = ends(jobs[:3], tasks)
    assert [found[f"s{k}"].reason for k in range(3)] == [None, Reason.OUT_OF_MEMORY, None]
    assert "Unable to allocate 9 TiB" in found["s1"].message
    script = [MemoryError()]
    again = Mortal(lambda *task: script.pop() if of(*task, "s3") and script else None)
    assert ends(jobs[3:4], again)["s3"].status == "ok"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(errno.EMFILE, "Too many open files"), Fault.MACHINE),
        (OSError(errno.ENFILE, "Too many open files in system"), Fault.MACHINE),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Fault.NO_MEMORY),
        (RuntimeError("can't start new thread"), Fault.MACHINE),
    ],
)
def test_what_the_machine_has_no_more_of_fails_no_slide(jobs: list[pathology.Job], error: Exception, fault: Fault) -> None:
    for function in (worker.run_regions, worker.check_model):
        with pytest.raises(EnvironmentFault, match=str(error.args[-1])) as caught:
            ends(jobs[:2], Mortal(lambda task, _, function=function: error if task is function else None))  # type: ignore[misc]
        assert caught.value.fault is fault


def test_a_library_without_memory_gets_a_second_try_alone(jobs: list[pathology.Job]) -> None:
    script = [RuntimeError("Zstd compression error: Allocation error : not enough memory")]
    tasks = Mortal(lambda *task: script.pop() if script and of(*task, "s1") else None)
    assert {outcome.status for outcome in ends(jobs[:2], tasks).values()} == {"ok"}


def test_an_output_that_hangs_fails_no_slide(jobs: list[pathology.Job]) -> None:
    with pytest.raises(EnvironmentFault, match="output does not answer"):
        ends(jobs, Mortal(lambda *task: WorkerDied("stuck", Death.WRITE) if of(*task, "s0") else None))
    found = ends(jobs[:1], Mortal(lambda *_: None))
    assert read_manifest(found["s0"].job.result_folder("mean-colour")) is not None


def test_every_death_has_its_end() -> None:
    assert set(deaths.FATAL) == set(Death) - {Death.KILL, Death.WRITE}
    borne = Deaths(apart=True)
    assert borne.counts(Death.WRITE, alone=False)
    assert not borne.counts(Death.KILL, alone=True)
    assert all(borne.counts(death, alone=True) for death in deaths.FATAL)
