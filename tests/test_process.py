"""The worker processes of a device: what they answer, what the end of one means for callers, and that none outlives them."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pathology import pulse
from pathology.calls import STOP_SIGNALS, Calls, Death, SharedMemory, WorkerDied, neighbour, shared_file
from pathology.errors import Reason, SlideError
from pathology.process import BEHIND, MODULES, Kind, WorkerProcesses, load_behind
from pathology.pulse import beat, under_way
from pathology.watch import Limits

Call = Callable[..., Any]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def own() -> Iterator[WorkerProcesses]:
    with closing(WorkerProcesses()) as started:
        yield started


@pytest.fixture
def call(own: WorkerProcesses) -> Call:
    """Call in the process for slides."""
    return partial(own.call, "slides")


def loaded(*names: str) -> list[str]:
    """Which of the modules are loaded where this is called."""
    return [name for name in names if name in sys.modules]


def garbage_is_looked_for(module: str) -> tuple[bool, bool]:
    """Whether it is once `module` is loaded, and whether what was loaded is left out."""
    importlib.import_module(module)
    until = time.monotonic() + 30
    while not gc.isenabled() and time.monotonic() < until:
        time.sleep(0.01)
    return gc.isenabled(), gc.get_freeze_count() > 10_000


def priorities(module: str) -> set[int]:
    """Those of this process's threads (proc_pid_stat(5)) once `module` is loaded and the thread that did so has ended.

    Without that of pyarrow's allocator, which only gives memory back.
    """
    garbage_is_looked_for(module)
    until = time.monotonic() + 30
    while True:
        stats = [stat.read_text() for stat in Path("/proc/self/task").glob("*/stat")]
        found = {int(stat.rpartition(")")[2].split()[16]) for stat in stats if "(jemalloc" not in stat}
        if len(found) == 1 or time.monotonic() > until:
            return found
        time.sleep(0.01)


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


def test_calls_are_answered_by_another_process(call: Call) -> None:
    assert call(os.getpid) != os.getpid()
    assert call(divmod, 7, 2) == (3, 1)


def test_calls_run_side_by_side(own: WorkerProcesses, call: Call) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(call, time.sleep, 30)
        assert pool.submit(call, int, "7").result(timeout=20) == 7
        assert not first.done()
        own.close()
        assert isinstance(first.exception(timeout=5), WorkerDied)


def test_the_process_for_slides_loads_no_torch(call: Call) -> None:
    assert call(loaded, "torch", "distributed", "zarr") == ["zarr"]


@pytest.mark.parametrize("kind", MODULES)
def test_garbage_is_looked_for_once_all_is_loaded(own: WorkerProcesses, kind: Kind) -> None:
    assert own.call(kind, garbage_is_looked_for, MODULES[kind][0]) == (True, True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
class TestLoadedBehind:
    """What is loaded while torch is on its way leaves it the cores, and nothing that works later is held back."""

    @pytest.mark.parametrize("kind", MODULES)
    def test_once_all_is_loaded_every_thread_is_as_before(self, own: WorkerProcesses, kind: Kind) -> None:
        assert own.call(kind, priorities, MODULES[kind][0]) == {os.getpriority(os.PRIO_PROCESS, 0)}

    def test_a_module_is_loaded_with_less_claim(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "loaded_behind.py").write_text("import os\nfound = os.getpriority(os.PRIO_PROCESS, 0)\n")
        monkeypatch.syspath_prepend(tmp_path)
        before = os.getpriority(os.PRIO_PROCESS, 0)
        load_behind("loaded_behind")
        assert sys.modules.pop("loaded_behind").found == min(19, before + BEHIND)
        assert os.getpriority(os.PRIO_PROCESS, 0) == before

    def test_where_priorities_may_not_be_set_it_is_loaded_as_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "setpriority", refused)
        load_behind("colorsys")
        assert "colorsys" in sys.modules

    def test_what_cannot_be_loaded_is_told(self) -> None:
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            load_behind("no_such_module")


def test_errors_come_back_as_they_are_with_their_traceback(call: Call) -> None:
    with pytest.raises(SlideError, match="cut short") as caught:
        call(refuse)
    assert caught.value.reason is Reason.TRUNCATED
    assert "in refuse" in caught.value.__notes__[0]


def test_errors_that_cannot_be_sent_come_back_as_their_text(call: Call) -> None:
    with pytest.raises(RuntimeError, match="Peculiar: 1 and 2"):
        call(peculiar)
    with pytest.raises(RuntimeError, match="SystemExit: left"):
        call(leave)
    with pytest.raises(TypeError, match="cannot pickle"):
        call(threading.Lock)
    assert call(int, "7") == 7


def test_a_death_ends_all_calls_and_the_next_call_finds_a_new_process(call: Call) -> None:
    before = call(os.getpid)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(call, time.sleep, 30)
        with pytest.raises(WorkerDied, match="ended with code 134"):
            call(os._exit, 134)
        assert isinstance(waiting.exception(timeout=5), WorkerDied)
    after = call(os.getpid)
    assert after != before
    assert not psutil.pid_exists(before)


def test_signals_for_the_whole_job_are_left_to_the_caller(call: Call) -> None:
    pid = call(os.getpid)
    for number in STOP_SIGNALS:
        os.kill(pid, number)
    assert call(os.getpid) == pid


def test_the_environment_is_there_again_after_a_death() -> None:
    with closing(WorkerProcesses({"SEEN": "yes"})) as own:
        call = partial(own.call, "slides")
        assert call(os.getenv, "SEEN") == "yes"
        assert call(os.getenv, "OMP_NUM_THREADS") == "1"
        with pytest.raises(WorkerDied):
            call(os._exit, 1)
        assert call(os.getenv, "SEEN") == "yes"


def test_one_that_cannot_load_its_libraries_ends_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('failed to map segment from shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    with closing(WorkerProcesses()) as own, pytest.raises(WorkerDied, match="for a device ended with code 1"):
        own.call("device", time.sleep, 60)


def test_closed_ones_take_no_calls(own: WorkerProcesses, call: Call) -> None:
    pid = call(os.getpid)
    own.close()
    with pytest.raises(WorkerDied):
        call(int, "7")
    assert not psutil.pid_exists(pid)


CALLER = """
import os, threading, time
from pathology.process import WorkerProcesses
own = WorkerProcesses()
print(own.call("slides", os.getpid), own.call("device", os.getpid), flush=True)
threading.Thread(target=own.call, args=("device", time.sleep, 60)).start()
time.sleep(60)
"""


def test_both_end_with_their_caller_however_that_ends() -> None:
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert caller.stdout is not None
    with caller.stdout:
        workers = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
        caller.kill()
        caller.wait()
    for worker in workers:
        worker.wait(timeout=5)


def fill(place: int, count: int, value: int) -> int:
    """In the process for slides: write to the block that its neighbour took."""
    beside = neighbour()
    assert beside is not None
    beside.memory.array(place, count)[...] = value
    return os.getpid()


def filled(values: list[int]) -> list[int]:
    """In the process for a device: what its neighbour wrote, one block after the other, each given back."""
    beside = neighbour()
    assert beside is not None
    assert beside.calls is not None
    seen = []
    for value in values:
        place = beside.memory.take(10_000)
        beside.calls.ask(fill, place, 10_000, value).result()
        seen.extend(np.unique(beside.memory.array(place, 10_000)).tolist())
        beside.memory.give(place, 10_000)
    return seen


def end_of_the_neighbour() -> None:
    """In the process for a device: ask its neighbour to end, and tell how that came out."""
    beside = neighbour()
    assert beside is not None
    assert beside.calls is not None
    beside.calls.ask(os._exit, 134).result()


def test_they_share_memory(own: WorkerProcesses) -> None:
    assert own.call("device", filled, [7, 0, 255]) == [7, 0, 255]


def test_when_one_dies_the_other_is_replaced_as_well(own: WorkerProcesses) -> None:
    before = {kind: own.call(kind, os.getpid) for kind in MODULES}
    with pytest.raises(WorkerDied):
        own.call("slides", os._exit, 134)
    middle = {kind: own.call(kind, os.getpid) for kind in MODULES}
    assert not set(before.values()) & set(middle.values())
    # Here it is the neighbour that tells, and the caller may not have heard of it otherwise.
    with pytest.raises(WorkerDied):
        own.call("device", end_of_the_neighbour)
    after = {kind: own.call(kind, os.getpid) for kind in MODULES}
    assert not set(middle.values()) & set(after.values())
    assert own.call("device", filled, [1]) == [1]


def readers() -> list[int]:
    """In the process for a device: the processes that read for it."""
    beside = neighbour()
    assert beside is not None
    return [reader.ask(os.getpid).result() for reader in beside.readers]


def ask_the_last_reader(function: Call, *arguments: Any) -> Any:
    """In the process for a device."""
    beside = neighbour()
    assert beside is not None
    return beside.readers[-1].ask(function, *arguments).result()


def test_further_processes_read_and_end_with_the_others() -> None:
    with closing(WorkerProcesses({"SEEN": "yes"}, readers=3)) as own:
        before = own.call("device", readers)
        assert len(set(before)) == 3
        assert before[0] == own.call("slides", os.getpid)
        assert own.call("device", ask_the_last_reader, os.getenv, "SEEN") == "yes"
        with pytest.raises(WorkerDied, match="for slides ended with code 134"):
            own.call("device", ask_the_last_reader, os._exit, 134)
        after = own.call("device", readers)
        assert len(set(after) - set(before)) == 3
        assert not any(map(psutil.pid_exists, before))
    assert not any(map(psutil.pid_exists, after))


@pytest.mark.fault("F25")
def test_a_further_process_that_hangs_is_seen() -> None:
    with closing(WorkerProcesses(readers=2)) as own:
        before = own.call("device", readers)
        assert own.call("device", ask_the_last_reader, come_on, 0) == 0
        own._limits = Limits(read_s=1)  # from now on: they may load their libraries for as long as they like
        with pytest.raises(WorkerDied) as caught:
            own.call("device", ask_the_last_reader, hang, "read")
        assert caught.value.death is Death.READ
        own._limits = Limits()
        assert not set(before) & set(own.call("device", readers))


def test_shared_blocks_are_taken_again_only_when_they_were_given_back() -> None:
    descriptor = shared_file()
    try:
        memory = SharedMemory(descriptor)
        first, second = memory.take(100), memory.take(100)
        assert first != second
        memory.array(second, 100)[...] = 3
        memory.give(first, 100)
        assert memory.take(100) == first
        assert memory.take(100) not in (first, second)
        assert (memory.array(second, 100) == 3).all()
    finally:
        os.close(descriptor)


def cancelled_and_asked_again() -> int:
    """In the process for a device: give up a call before it is answered, as a region that fails does, then make another."""
    beside = neighbour()
    assert beside is not None
    assert beside.calls is not None
    beside.calls.ask(time.sleep, 0.3).cancel()
    time.sleep(0.6)
    number: int = beside.calls.ask(int, "7").result(timeout=10)
    return number


def test_a_call_that_was_given_up_keeps_no_other_waiting(own: WorkerProcesses) -> None:
    assert own.call("device", cancelled_and_asked_again) == 7


def hang(kind: pulse.Kind) -> None:
    """In a read as a native library may: without letting any other thread of the process run."""
    with under_way(kind):
        (ctypes.PyDLL if kind == "read" else ctypes.CDLL)(None).sleep(600)


def sit() -> None:
    ctypes.PyDLL(None).sleep(600)


def come_on(times: int) -> int:
    """Comes on so often, and never finishes a read."""
    with under_way("read"):
        for _ in range(times):
            time.sleep(0.1)
            beat()
    return times


def take(count: int) -> None:
    blocks = []
    for _ in range(count // 2**26):
        blocks.append(np.ones(2**26, np.uint8))
        time.sleep(0.02)
    time.sleep(600)


def pid_of(own: WorkerProcesses) -> int:
    number: int = own.call("slides", os.getpid)
    return number


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    ("kind", "call", "limits", "death"),
    [
        ("slides", (hang, "read"), Limits(read_s=1), Death.READ),
        ("device", (hang, "write"), Limits(region_s=2), Death.WRITE),
        ("device", (sit,), Limits(region_s=2), Death.STILL),
    ],
    ids=["read", "write", "still"],
)
def test_a_process_that_hangs_is_ended_and_replaced(
    own: WorkerProcesses, kind: Kind, call: tuple[Any, ...], limits: Limits, death: Death
) -> None:
    before = {kind: own.call(kind, os.getpid) for kind in MODULES}
    assert own.call(kind, come_on, 0) == 0
    own._limits = limits  # from now on: they may load their libraries, and this file, for as long as they like
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(own.call, "slides" if kind == "device" else "device", time.sleep, 600)
        with pytest.raises(WorkerDied) as caught:
            own.call(kind, *call)
        told = beside.exception(timeout=20)
    assert caught.value.death is death
    assert isinstance(told, WorkerDied)
    assert (told.death, str(told)) == (death, str(caught.value))
    own._limits = Limits()
    assert own.call(kind, os.getpid) not in before.values()


def test_what_comes_on_is_not_ended_however_long_it_takes(own: WorkerProcesses) -> None:
    pid = pid_of(own)
    assert own.call("slides", come_on, 0) == 0
    own._limits = Limits(read_s=3, region_s=3)
    assert own.call("slides", come_on, 60) == 60
    own._limits = Limits()
    assert pid_of(own) == pid


@pytest.mark.fault("F21")
def test_a_process_that_takes_too_much_memory_is_ended(own: WorkerProcesses) -> None:
    pid_of(own)
    own._limits = Limits(memory_bytes=2**30)
    with pytest.raises(WorkerDied, match=r"held 1\.\d GB of memory, more than the 1\.1 GB that it may") as caught:
        own.call("slides", take, 2**32)
    assert caught.value.death is Death.MEMORY


@pytest.mark.parametrize(("number", "death"), [(signal.SIGKILL, Death.KILL), (signal.SIGSEGV, Death.CRASH)])
def test_a_killed_process_is_told_from_one_that_crashed(own: WorkerProcesses, number: int, death: Death) -> None:
    pids = {kind: own.call(kind, os.getpid) for kind in MODULES}
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(own.call, kind, time.sleep, 600) for kind in MODULES]
        time.sleep(0.2)
        os.kill(pids["slides"], number)
        told = [call.exception(timeout=20) for call in waiting]
    assert [t.death for t in told if isinstance(t, WorkerDied)] == [death, death]


def test_one_that_cannot_be_ended_is_left_and_its_callers_are_told() -> None:
    ours, theirs = Pipe()
    calls = Calls(ours, lambda: WorkerDied("left", Death.READ))
    waiting = calls.ask(int, "7")
    assert calls.busy
    calls.cut()
    told = waiting.exception(timeout=20)
    assert isinstance(told, WorkerDied)
    assert told.death is Death.READ
    assert calls.gone
    theirs.close()


def taken_and_let_go(count: int) -> tuple[int, int]:
    """(process, bytes that it holds of memory of its own) after arrays of 16 MiB, `count` in all, of which a last one stays."""
    arrays = [np.ones(2**24, np.uint8) for _ in range(count)]
    kept_above_them.append(arrays[-1])
    del arrays
    return os.getpid(), own_bytes(os.getpid())


kept_above_them: list[object] = []


def own_bytes(process: int) -> int:
    return int(psutil.Process(process).memory_full_info().uss)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's store of freed memory")
def test_a_process_that_infers_gives_freed_memory_back_while_nothing_is_asked(own: WorkerProcesses) -> None:
    process, held = own.call("device", taken_and_let_go, 16)
    until = time.monotonic() + 30
    while own_bytes(process) > held - 10 * 2**24 and time.monotonic() < until:
        time.sleep(0.05)
    assert own_bytes(process) <= held - 10 * 2**24
