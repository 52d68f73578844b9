"""The division of cores is a function of measured seconds, and measuring takes few calls and tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology import Job, slide_worker, worker
from pathology.finish import read_record
from pathology.lease import Leases
from pathology.process import Kind
from pathology.runner import run
from pathology.schedule import Done, InOrder
from pathology.testing import constant
from pathology.threads import TILES, Split, measure_model, measure_reading, split_threads
from pathology.window import Window

SECONDS = st.floats(1e-6, 10)


@pytest.mark.parametrize(
    ("cores", "read_s", "model_s", "split"),
    [
        (1, 1.0, 1.0, Split(readers=1, threads=1)),
        (2, 0.43, 0.40, Split(readers=2, threads=1)),  # a tiny network: reading needs a core of its own
        (2, 0.43, 36.8, Split(readers=1, threads=2)),  # ResNet-18: reading is nothing beside it
        (2, 1.30, 0.40, Split(readers=2, threads=1)),
        (16, 0.43, 36.8, Split(readers=1, threads=15)),
        (16, 0.5, 0.5, Split(readers=8, threads=8)),
        (16, 1.5, 0.5, Split(readers=12, threads=4)),
        (16, 1.0, 1e-6, Split(readers=16, threads=1)),
        (2, float("inf"), 1.0, Split(readers=2, threads=1)),
    ],
)
def test_the_slower_side_is_as_quick_as_can_be(cores: int, read_s: float, model_s: float, split: Split) -> None:
    assert split_threads(cores, read_s, model_s) == split


@given(cores=st.integers(1, 128), read_s=SECONDS, model_s=SECONDS)
def test_no_more_threads_than_cores_but_for_one_reader(cores: int, read_s: float, model_s: float) -> None:
    split = split_threads(cores, read_s, model_s)
    assert split.readers >= 1
    assert 1 <= split.threads <= cores
    assert split.threads == 1 or split.readers + split.threads <= cores + 1
    assert split.readers <= cores


@given(cores=st.integers(1, 64), read_s=SECONDS, model_s=SECONDS, factor=st.floats(1, 100))
def test_a_heavier_model_is_never_given_fewer_threads(cores: int, read_s: float, model_s: float, factor: float) -> None:
    assert split_threads(cores, read_s, model_s * factor).threads >= split_threads(cores, read_s, model_s).threads


def test_given_torch_threads_are_kept() -> None:
    assert split_threads(8, 1.0, 1e-6, threads=6) == Split(readers=2, threads=6)
    assert split_threads(2, 1.0, 1.0, threads=5) == Split(readers=1, threads=5)
    assert split_threads(4, 1.0, 1e3, threads=1) == Split(readers=4, threads=1)


def test_no_cores_are_refused() -> None:
    with pytest.raises(ValueError, match="0 cores"):
        split_threads(0, 1.0, 1.0)


class Clock:
    """Stands still until told how long something took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A model whose calls take what the list says."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.spec = constant(tile_px=8).spec
        self.clock, self.seconds, self.calls = clock, list(seconds), 0

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.clock.now += self.seconds[self.calls]
        self.calls += 1
        return np.zeros((len(tiles), 1, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("seconds", "calls", "a_tile"), [((0.08, 0.04), 2, 0.01), ((0.04, 0.08), 2, 0.01), ((2.0, 1.0), 1, 0.5)]
)
def test_a_model_is_measured_in_two_calls_a_slow_one_in_one(seconds: tuple[float, ...], calls: int, a_tile: float) -> None:
    clock = Clock()
    model = Timed(clock, *seconds)
    assert measure_model(model, 4, clock) == pytest.approx(a_tile)
    assert model.calls == calls


@pytest.mark.parametrize(
    ("seconds", "read", "a_tile"),
    [
        ([], 0, float("inf")),
        ([0.3], 1, 0.3),
        ([0.5, *[0.001] * 50], 2, 0.001),  # opening is not reading
        ([0.01] * 100, TILES, 0.01),
        ([0.1] * 100, 3, 0.1),
    ],
)
def test_reading_is_measured_on_few_tiles(seconds: list[float], read: int, a_tile: float) -> None:
    clock, taken = Clock(), []

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for second in seconds:
            clock.now += second
            taken.append(second)
            yield np.zeros((8, 8, 3), np.uint8)

    assert measure_reading(tiles(), clock) == pytest.approx(a_tile)
    assert len(taken) == read


def test_a_run_measures_once_and_a_resumed_one_keeps_the_torch_threads(
    reference_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(reference_job, out=str(tmp_path), threads=0, readers=0)
    costs = iter([0.0, 1e6])  # a light model; then, as if the machine were busy, one far slower than reading
    measured: list[float] = []

    def made_up(*_: object) -> float:
        measured.append(next(costs))
        return measured[-1]

    monkeypatch.setattr(worker, "measure_model", made_up)
    monkeypatch.setattr(worker, "core_count", lambda: 2)
    first = worker.divide_cores((job,))
    assert first == (Split(readers=2, threads=1),)
    assert worker.divide_cores((job,)) == first
    assert measured == [0.0, 1e6]


def test_models_that_read_alike_divide_the_cores_together(
    reference_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(reference_job, out=str(tmp_path), threads=0, readers=0)
    other = replace(job, model="pathology.testing:constant?tile_px=32&mpp=0.5")
    third = replace(job, model="pathology.testing:mean_colour?tile_px=32&mpp=0.5")
    monkeypatch.setattr(worker, "measure_model", lambda *_: 1.5)
    monkeypatch.setattr(worker, "core_count", lambda: 16)
    monkeypatch.setattr(slide_worker, "seconds_to_read", lambda jobs: 1.0)
    assert split_threads(16, 1.0, 3.0) == Split(readers=4, threads=12)
    assert worker.divide_cores((job, other, job)) == (Split(readers=4, threads=12),) * 3
    assert worker.divide_cores((job,)) == (Split(readers=4, threads=12),), "a resumed model keeps its own"
    assert worker.divide_cores((third, job)) == (Split(readers=4, threads=12),) * 2, "a new one takes those of the others"
    assert worker.divide_cores((replace(third, out=str(tmp_path / "else")),)) == (split_threads(16, 1.0, 1.5),)


def test_models_that_kept_different_threads_go_on_with_them(
    reference_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "core_count", lambda: 4)
    job = replace(reference_job, out=str(tmp_path), threads=0, readers=0)
    other = replace(job, model="pathology.testing:constant?tile_px=32&mpp=0.5")
    monkeypatch.setattr(worker, "measure_model", lambda *_: 0.0)
    worker.divide_cores((job,))
    monkeypatch.setattr(worker, "measure_model", lambda *_: 1e6)
    worker.divide_cores((other,))
    outcomes = list(run([job, other], "sync"))
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert {outcome.job.model: outcome.job.threads for outcome in outcomes} == {job.model: 1, other.model: 4}


def test_jobs_are_run_with_the_threads_that_were_measured(
    reference_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "core_count", lambda: 4)
    broken = replace(reference_job, slide=str(tmp_path / "none.svs"), slide_id="none", root=str(tmp_path / "none.svs"))
    jobs = [replace(job, out=str(tmp_path), threads=2, readers=0) for job in (broken, reference_job)]
    outcomes = {outcome.job.slide_id: outcome for outcome in run(jobs, "sync")}
    assert outcomes["none"].status == "failed"  # and did not keep the other from being measured
    done = outcomes["small"].job
    assert (done.readers, done.threads) == (2, 2)
    assert read_record(done.result_folder("identity")) == outcomes["small"].record


def test_a_slide_that_kills_the_measuring_worker_is_no_fault_of_the_model(reference_job: Job, tmp_path: Path) -> None:
    class Mortal(InOrder):
        """Reports the death of a worker that measures how quick reading is."""

        asked: ClassVar[list[tuple[object, ...]]] = []

        def submit(self, token: object, function: Callable[..., Any], *arguments: Any, kind: Kind = "device") -> None:
            if function is worker.divide_cores:
                self.asked.append(arguments[1:])
                if len(self.asked) == 1:
                    self.done.put(Done(token, error=RuntimeError("killed"), died=True))
                    return
            super().submit(token, function, *arguments, kind=kind)

    job = replace(reference_job, out=str(tmp_path), threads=1, readers=0)
    with closing(Leases()) as leases:
        window = Window([job], Mortal(), lambda _: None, threading.Event(), 1, None, leases, lambda _: None, lambda _: None)
        (outcome,) = window.outcomes()
    assert outcome.status == "ok"
    assert outcome.job.readers >= 1
    assert Mortal.asked == [(1,), (1, False)]
