"""The processes of each device, whatever schedules their work: one infers, one or more read slides.

Promise: what crashes there ends those of its device alone. They start to load their libraries, torch among them, before their
first call comes and while the command that started them is still reading its options; and they end with whoever started them.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pathology.calls import (
    Calls,
    Death,
    Neighbour,
    SharedMemory,
    WorkerDied,
    answer_calls,
    leave_stopping_to_the_caller,
    set_neighbour,
    shared_file,
)
from pathology.errors import first_line
from pathology.heap import give_back
from pathology.pulse import beat, show_in
from pathology.watch import Limits, Pulses, death_by, killed_for_memory, overweight

Kind = Literal["device", "slides"]
# What a worker begins with. Torch alone has threads of its own, by `set_threads`. Freed memory of tiles, and of what networks
# answer layer by layer, is kept: given back to the kernel each time, as glibc would have it, it comes back as pages to be
# cleared again. What is larger than 32 MiB, the most that glibc keeps, is given back. Threads of a process that infers share a
# single store of it: large arrays fit into it better than into one for each, and are too few to be waited for.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
}
VARIABLES: dict[Kind, dict[str, str]] = {"device": {**ENVIRONMENT, "MALLOC_ARENA_MAX": "1"}, "slides": ENVIRONMENT}
# What a worker loads before it is asked, the first in a thread beside the others. For a device: torch, which takes longest. For
# slides: what opens and reads one, and writes results.
MODULES: dict[Kind, tuple[str, ...]] = {
    "device": ("torch", "pathology.worker"),
    "slides": (
        "pathology.slide_worker",
        "pathology.readers.direct",
        "pathology.readers.openslide_reader",
        "pathology.result",
        "pathology.store",
        "pyarrow.parquet",
        "numpy.ma",
    ),
}
# Steps by which what is loaded behind torch has less claim on a core that both want: a quarter of it (sched(7)). They are few,
# since on a busy machine it gets no more beside what others run there.
BEHIND = 5
# Loading makes objects by the hundred thousand and hardly any garbage: to look for it meanwhile takes a tenth of the time.
_START = "import gc, sys; gc.disable(); sys.path[:] = sys.argv[7:]; from pathology.process import serve; serve(*sys.argv[1:7])"
# How often what they take is looked at.
LOOK_S = 0.25
# One that was killed ends at once, unless it is in the middle of a call to a file system that does not answer: then it is left.
END_S = 2.0
# A process that infers and was asked nothing for so long gives freed memory back: a slide's end takes some in the other one.
REST_S = 0.1
# When memory runs out the system ends the process with the highest number: one of these, not the command that started them.
OOM_SCORE = "500"


class WorkerProcesses:
    """The processes of one device, one that infers and `readers` for slides, of which all but the first do nothing but read.
    When one ends the others are ended too, and the next call finds new ones.

    environment  variables set there beside VARIABLES, before a device is touched
    limits       all are ended when they take more
    """

    def __init__(self, environment: Mapping[str, str] | None = None, limits: Limits | None = None, readers: int = 1) -> None:
        self._environment = dict(environment or {})
        self._limits = limits or Limits()
        self._readers = readers
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._started = _prestarted.pop() if _prestarted else _Started(readers)
        self._started.greet(self._environment)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def call(self, kind: Kind, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns or raises in the first process of that kind.

        Raises WorkerDied where it ends, or is ended, before it has: all calls that are under way then are told the same.
        """
        with self._lock:
            if self._closed.is_set():
                raise WorkerDied("the worker processes were closed")
            if self._started.gone:
                self._started.kill(self._started.why())  # another of them may still live
                self._started = _Started(self._readers)
                self._started.greet(self._environment)
            started = self._started
            asked = started.ask(kind, function, *arguments)
        try:
            return asked.result()
        except WorkerDied as told:  # of the one that was asked, or of its neighbour as it tells
            why = started.why(told)
            started.kill(why)
            raise why.again() from told

    @property
    def busy(self) -> bool:
        """Whether any call is not yet answered."""
        return self._started.busy

    def close(self) -> None:
        """Kill all: what they still do is abandoned, and its callers get WorkerDied."""
        with self._lock:
            self._closed.set()
            self._started.kill(WorkerDied("the worker processes were closed", Death.KILL))

    def _watch(self) -> None:
        """End the processes when they take more than they may, until they are closed."""
        last = time.monotonic()
        while not self._closed.wait(LOOK_S):
            # Of a time in which this process itself stood still nothing counts.
            last, passed = (now := time.monotonic()), min(now - last, 2 * LOOK_S)
            started = self._started
            if not started.gone and (why := started.too_much(passed, self._limits)) is not None:
                started.kill(why)


@dataclass(frozen=True, slots=True)
class _Running:
    """A process, and the socket to it."""

    kind: Kind
    process: subprocess.Popen[bytes]
    calls: Calls


class _Started:
    """The running processes of a device: the one that infers, and so many for slides."""

    def __init__(self, readers: int) -> None:
        memory, links = shared_file(), [Pipe() for _ in range(readers)]
        self._killed = False
        self._why: WorkerDied | None = None
        self._telling = threading.Lock()
        self._pulses = Pulses(1 + readers)
        self._killed_before = killed_for_memory()
        self._running: list[_Running] = []
        self._start("device", [asks for asks, _ in links], memory)
        for _, answers in links:
            self._start("slides", [answers], memory)
        for end in itertools.chain(*links):
            end.close()
        os.close(memory)
        os.close(self._pulses.descriptor)

    def _start(self, kind: Kind, links: Sequence[Connection], memory: int) -> None:
        ours, theirs = Pipe()
        to_neighbours = [link.fileno() for link in links]
        handed = [str(theirs.fileno()), ",".join(map(str, to_neighbours)), str(memory), str(self._pulses.descriptor)]
        process = subprocess.Popen(
            [sys.executable, "-c", _START, kind, *handed, str(len(self._running)), *sys.path],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *to_neighbours, memory, self._pulses.descriptor],
            env={**os.environ, **VARIABLES[kind]},
        )
        theirs.close()
        self._running.append(_Running(kind, process, Calls(ours, functools.partial(self._end_of, process))))

    @property
    def gone(self) -> bool:
        return self._killed or any(one.calls.gone for one in self._running)

    @property
    def busy(self) -> bool:
        return any(one.calls.busy for one in self._running)

    def greet(self, environment: Mapping[str, str]) -> None:
        for one in self._running if environment else ():
            one.calls.ask(_set_variables, environment)

    def ask(self, kind: Kind, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return next(one for one in self._running if one.kind == kind).calls.ask(function, *arguments)

    def kill(self, why: WorkerDied) -> None:
        """End all; unless something has been told before, callers are told why."""
        with self._telling:
            self._why = self._why or why
        self._killed = True
        for one in self._running:
            one.process.kill()
        until = time.monotonic() + END_S
        for one in self._running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, until - time.monotonic()))
            one.calls.cut()

    def too_much(self, passed: float, limits: Limits) -> WorkerDied | None:
        """Which of its limits they have passed, None for none; to be asked every `passed` seconds."""
        overdue = self._pulses.overdue(passed, self.busy, limits)
        return overdue or overweight((one.process.pid for one in self._running), limits)

    def why(self, told: WorkerDied | None = None) -> WorkerDied:
        """What ended them: the same for all who ask. `told`: what one of them says, which knows no more than that."""
        with self._telling:
            if self._why is None and told is not None and told.death is Death.DEVICE:
                self._why = told
            self._why = self._why or self._own_end() or told or WorkerDied("the worker processes ended")
            return self._why

    def _own_end(self) -> WorkerDied | None:
        """How the first of them that has ended did so. Its sockets close a moment before it has."""
        until = time.monotonic() + END_S
        while time.monotonic() < until:
            for one in self._running:
                if (code := one.process.poll()) is not None:
                    what = f"the worker process for {'a device' if one.kind == 'device' else 'slides'}"
                    return death_by(what, code, self._killed_before)
            time.sleep(0.01)
        return None

    def _end_of(self, process: subprocess.Popen[bytes]) -> WorkerDied:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        return self.why()


def _set_variables(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


_prestarted: list[_Started] = []


def prestart(readers: int = 1) -> None:
    """Start processes now, `readers` of them for slides, which the first `WorkerProcesses` takes."""
    _prestarted.append(_Started(readers))


def load_behind(*modules: str) -> None:
    """Import modules, and leave the cores to who loads torch meanwhile: no region begins before that is there."""
    collecting = gc.isenabled()
    gc.disable()  # as for `_START`
    try:
        with ThreadPoolExecutor(1, initializer=_step_back) as loader:
            for module in modules:
                loader.submit(importlib.import_module, module).result()
    finally:
        if collecting:
            gc.enable()


def _step_back() -> None:
    """Lower this thread's priority, for its life: who is not root cannot raise it again. Nothing depends on it."""
    if sys.platform == "linux":  # elsewhere it belongs to the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + BEHIND))


def _load(module: str, others: threading.Event, behind: bool) -> None:
    """Import what takes longest. What is there then stays, and is left out whenever garbage is looked for from now on.

    A process that cannot load what it needs ends, so that its holder is told.

    others  all else is loaded
    behind  leave the cores to who loads torch
    """
    try:
        if behind:
            _step_back()
        importlib.import_module(module)
    except BaseException as error:
        sys.stderr.write(f"{module} cannot be loaded: {first_line(error)}\n")
        os._exit(1)
    gc.freeze()
    gc.enable()
    others.wait()
    beat()


class _Resting(ThreadPoolExecutor):
    """Threads after whose work, once it has rested for a moment, freed memory is given back."""

    def __init__(self) -> None:
        super().__init__()
        self._under_way = 0
        self._counting = threading.Lock()
        self._worked = threading.Event()
        threading.Thread(target=self._watch, name="rest", daemon=True).start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        self._count(1)
        done = super().submit(function, *arguments, **named)
        done.add_done_callback(lambda _: self._count(-1))
        return done

    def _count(self, more: int) -> None:
        with self._counting:
            self._under_way += more
        self._worked.set()

    def _watch(self) -> None:
        while self._worked.wait():
            while self._worked.is_set() or self._under_way:
                self._worked.clear()
                time.sleep(REST_S)
            give_back()


def serve(kind: Kind, socket: str, links: str, memory: str, pulse: str, page: str) -> None:
    """Work on the calls that come over `socket`, until its other end is closed or its holder is dead.

    links   to the neighbours, separated by commas: those for slides answer on theirs what the one for a device asks
    memory  descriptor of what all share
    pulse   descriptor of where the holder sees what they are at, in a page for each
    """
    show_in(int(pulse), int(page))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    leave_stopping_to_the_caller()
    first, *others = MODULES[kind]
    loaded, behind = threading.Event(), kind == "slides"
    threading.Thread(target=_load, args=(first, loaded, behind), daemon=True).start()
    if behind:
        load_behind(*others)
    else:  # in one interpreter with torch, which would wait for a thread that holds it and gets no core
        for module in others:
            importlib.import_module(module)
    loaded.set()
    threads = _Resting() if kind == "device" else ThreadPoolExecutor()
    beside, shared = [Connection(int(link)) for link in links.split(",")], SharedMemory(int(memory))
    if kind == "device":
        set_neighbour(Neighbour(tuple(map(Calls, beside)), shared))
    else:
        set_neighbour(Neighbour((), shared))
        threading.Thread(target=answer_calls, args=(beside[0], threads), daemon=True).start()
    answer_calls(Connection(int(socket)), threads)
    os._exit(0)  # nobody waits for what still runs
