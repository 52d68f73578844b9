"""Two processes for each device, whatever schedules their work: one infers, one reads slides.

Promise: what crashes there ends those two alone. They start to load their libraries, torch among them, before their first call
comes and while the command that started them is still reading its options; and they end with whoever started them.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal

from pathology.calls import Calls, Neighbour, SharedMemory, WorkerDied, answer_calls, set_neighbour, shared_file

# What a worker begins with. Torch alone has threads of its own, by `set_threads`. Freed memory of tiles, and of what networks
# answer layer by layer, is kept: given back to the kernel each time, as glibc would have it, it comes back as pages to be
# cleared again. What is larger than 32 MiB, the most that glibc keeps, is given back.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
}
# What a worker loads before it is asked, the first in a thread beside the others. For a device: torch, which takes longest. For
# slides: what opens and reads one, and writes results.
Kind = Literal["device", "slides"]
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
_START = "import sys; sys.path[:] = sys.argv[5:]; from pathology.process import serve; serve(*sys.argv[1:5])"


class WorkerPair:
    """The processes of one device. When one ends the other is ended too, and the next call finds two new ones.

    environment  variables set there beside ENVIRONMENT, before a device is touched
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._lock = threading.Lock()
        self._closed = False
        self._started = _prestarted.pop() if _prestarted else _Started()
        self._started.greet(self._environment)

    def call(self, kind: Kind, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns or raises in that process. Raises WorkerDied where it ends before it has."""
        with self._lock:
            if self._closed:
                raise WorkerDied("the worker processes were closed")
            if self._started.gone:
                self._started.kill()  # one of the two may still live
                self._started = _Started()
                self._started.greet(self._environment)
            started = self._started
            asked = started.ask(kind, function, *arguments)
        try:
            return asked.result()
        except WorkerDied:  # of the one that was asked, or of its neighbour as it tells
            started.kill()
            raise

    def close(self) -> None:
        """Kill both: what they still do is abandoned, and its callers get WorkerDied."""
        with self._lock:
            self._closed = True
            self._started.kill()


class _Started:
    """Two running processes and the sockets to them."""

    def __init__(self) -> None:
        memory, ends = shared_file(), Pipe()
        self._killed = False
        self._processes: dict[Kind, subprocess.Popen[bytes]] = {}
        self._calls: dict[Kind, Calls] = {}
        for kind, link in zip(MODULES, ends, strict=True):
            ours, theirs = Pipe()
            handed = [theirs.fileno(), link.fileno(), memory]
            self._processes[kind] = subprocess.Popen(
                [sys.executable, "-c", _START, kind, *map(str, handed), *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=handed,
                env={**os.environ, **ENVIRONMENT},
            )
            theirs.close()
            self._calls[kind] = Calls(ours, functools.partial(_end_of, kind, self._processes[kind]))
        for end in ends:
            end.close()
        os.close(memory)

    @property
    def gone(self) -> bool:
        return self._killed or any(calls.gone for calls in self._calls.values())

    def greet(self, environment: Mapping[str, str]) -> None:
        for kind in MODULES if environment else ():
            self.ask(kind, _set_variables, environment)

    def ask(self, kind: Kind, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._calls[kind].ask(function, *arguments)

    def kill(self) -> None:
        self._killed = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()


def _end_of(kind: Kind, process: subprocess.Popen[bytes]) -> str:
    return f"the worker process for {'a device' if kind == 'device' else 'slides'} ended with code {process.wait()}"


def _set_variables(variables: Mapping[str, str]) -> None:
    os.environ.update(variables)


_prestarted: list[_Started] = []


def prestart() -> None:
    """Start two processes now, which the first `WorkerPair` takes."""
    _prestarted.append(_Started())


def serve(kind: Kind, socket: str, link: str, memory: str) -> None:
    """Work on the calls that come over `socket`, until its other end is closed or its holder is dead.

    link    to the neighbour: the one for slides answers on it what the one for a device asks
    memory  descriptor of what both share
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the caller decides when to stop, and takes this process along
    first, *others = MODULES[kind]
    threading.Thread(target=importlib.import_module, args=(first,), daemon=True).start()
    for module in others:
        importlib.import_module(module)
    threads = ThreadPoolExecutor()
    beside, shared = Connection(int(link)), SharedMemory(int(memory))
    if kind == "device":
        set_neighbour(Neighbour(Calls(beside), shared))
    else:
        set_neighbour(Neighbour(None, shared))
        threading.Thread(target=answer_calls, args=(beside, threads), daemon=True).start()
    answer_calls(Connection(int(socket)), threads)
    os._exit(0)  # nobody waits for what still runs
