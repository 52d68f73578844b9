"""A worker process: what it answers, what its end means for its callers, and that it never outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from pathology.errors import Reason, SlideError
from pathology.process import WorkerDied, WorkerProcess

ROOT = Path(__file__).parent.parent


@pytest.fixture
def process() -> Iterator[WorkerProcess]:
    with closing(WorkerProcess("slides")) as started:
        yield started


def loaded(*names: str) -> list[str]:
    """Which of the modules are loaded where this is called."""
    return [name for name in names if name in sys.modules]


def refuse() -> None:
    raise SlideError(Reason.TRUNCATED, "cut short")


class Peculiar(Exception):
    """Cannot be made again from what it keeps."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def peculiar() -> None:
    raise Peculiar(1, 2)


def leave() -> None:
    sys.exit("left")


def test_calls_are_answered_by_another_process(process: WorkerProcess) -> None:
    assert process.call(os.getpid) != os.getpid()
    assert process.call(divmod, 7, 2) == (3, 1)


def test_calls_run_side_by_side(process: WorkerProcess) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(process.call, time.sleep, 30)
        assert pool.submit(process.call, int, "7").result(timeout=20) == 7
        assert not first.done()
        process.close()
        assert isinstance(first.exception(timeout=5), WorkerDied)


def test_the_process_for_slides_loads_no_torch(process: WorkerProcess) -> None:
    assert process.call(loaded, "torch", "distributed", "zarr") == ["zarr"]


def test_errors_come_back_as_they_are_with_their_traceback(process: WorkerProcess) -> None:
    with pytest.raises(SlideError, match="cut short") as caught:
        process.call(refuse)
    assert caught.value.reason is Reason.TRUNCATED
    assert "in refuse" in caught.value.__notes__[0]


def test_errors_that_cannot_be_sent_come_back_as_their_text(process: WorkerProcess) -> None:
    with pytest.raises(RuntimeError, match="Peculiar: 1 and 2"):
        process.call(peculiar)
    with pytest.raises(RuntimeError, match="SystemExit: left"):
        process.call(leave)
    with pytest.raises(TypeError, match="cannot pickle"):
        process.call(threading.Lock)
    assert process.call(int, "7") == 7


def test_a_death_ends_all_calls_and_the_next_call_finds_a_new_process(process: WorkerProcess) -> None:
    before = process.call(os.getpid)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(process.call, time.sleep, 30)
        with pytest.raises(WorkerDied, match="ended with code 134"):
            process.call(os._exit, 134)
        assert isinstance(waiting.exception(timeout=5), WorkerDied)
    after = process.call(os.getpid)
    assert after != before
    assert not psutil.pid_exists(before)


def test_signals_for_the_whole_job_are_left_to_the_caller(process: WorkerProcess) -> None:
    pid = process.call(os.getpid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert process.call(os.getpid) == pid


def test_the_environment_is_there_again_after_a_death() -> None:
    with closing(WorkerProcess("slides", {"SEEN": "yes"})) as process:
        assert process.call(os.getenv, "SEEN") == "yes"
        assert process.call(os.getenv, "OMP_NUM_THREADS") == "1"
        with pytest.raises(WorkerDied):
            process.call(os._exit, 1)
        assert process.call(os.getenv, "SEEN") == "yes"


def test_a_closed_process_takes_no_calls(process: WorkerProcess) -> None:
    pid = process.call(os.getpid)
    process.close()
    with pytest.raises(WorkerDied):
        process.call(int, "7")
    assert not psutil.pid_exists(pid)


CALLER = """
import os, threading, time
from pathology.process import WorkerProcess
process = WorkerProcess("slides")
print(process.call(os.getpid), flush=True)
threading.Thread(target=process.call, args=(time.sleep, 60)).start()
time.sleep(60)
"""


def test_it_ends_with_its_caller_however_that_ends() -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert caller.stdout is not None
    with caller.stdout:
        worker = psutil.Process(int(caller.stdout.readline()))
        caller.kill()
        caller.wait()
    worker.wait(timeout=5)
