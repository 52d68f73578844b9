"""A process for the work of one device, whatever schedules it. Promise: what crashes there ends that process alone.

Both ends stand here: `WorkerProcess` in the process that asks, `serve` in the one that works. Calls go over a socket pair, run
in threads there, and end in any order. The worker loads its libraries, torch among them, as soon as it is started: before its
first call comes, and while the command that started it is still reading its options.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Literal, cast

from pathology.errors import PathologyError

# What a worker begins with. Torch alone has threads of its own, by `set_threads`. Freed memory is kept: given back to the
# kernel at every tile, as glibc would have it, it comes back as pages to be cleared again.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
}
# What a worker loads before it is asked, the first in a thread beside the others. For a device: torch, which takes longest, and
# what reads tiles. For slides: what opens one, and writes results.
Kind = Literal["device", "slides"]
READING = ("pathology.worker", "pathology.readers.direct", "pathology.readers.openslide_reader")
MODULES: dict[Kind, tuple[str, ...]] = {
    "device": ("torch", *READING),
    "slides": (*READING, "pathology.result", "pathology.store", "pyarrow.parquet", "numpy.ma"),
}

# What begins and ends slides yields to what infers, which the run waits for.
NICE = 5

_START = "import sys; sys.path[:] = sys.argv[3:]; from pathology.process import serve; serve(int(sys.argv[1]), sys.argv[2])"


class WorkerDied(PathologyError):
    """The process ended while it worked on the call."""


class WorkerProcess:
    """A process that runs functions for this one. One that ended is replaced at the next call.

    kind         what it is for, and so what it loads
    environment  variables set there beside ENVIRONMENT, before a device is touched
    """

    def __init__(self, kind: Kind, environment: Mapping[str, str] | None = None) -> None:
        self._kind: Kind = kind
        self._environment = dict(environment or {})
        self._lock = threading.Lock()
        self._closed = False
        self._end: _End | None = _prestarted.pop(kind, None) or _End(kind)
        self._greet(self._end)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns or raises there. Raises WorkerDied where the process ends before it has."""
        with self._lock:
            if self._closed:
                raise WorkerDied("the worker process was closed")
            if self._end is None or self._end.gone:
                self._end = _End(self._kind)
                self._greet(self._end)
            asked = self._end.ask(function, arguments)
        return asked.result()

    def close(self) -> None:
        """Kill the process: what it still does is abandoned, and its callers get WorkerDied."""
        with self._lock:
            self._closed = True
            if self._end is not None:
                self._end.kill()

    def _greet(self, end: _End) -> None:
        if self._environment:
            end.ask(_set_variables, (self._environment,))


class _End:
    """A started process, and the calls it has not answered."""

    def __init__(self, kind: Kind) -> None:
        self._socket, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), kind, *sys.path],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ENVIRONMENT},
            )
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self.gone = False
        threading.Thread(target=self._receive, name="worker-answers", daemon=True).start()

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
        number, answer = next(self._numbers), Future[Any]()
        with self._lock:
            self._asked[number] = answer
        with suppress(OSError):  # it has just died, and `_receive` tells so
            self._socket.send((number, function, arguments))
        with self._lock:
            if self.gone and self._asked.pop(number, None) is not None:
                answer.set_exception(WorkerDied("the worker process ended"))
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self) -> None:
        try:
            while True:
                number, value, error = self._socket.recv()
                with self._lock:
                    answer = self._asked.pop(number)
                if error is None:
                    answer.set_result(value)
                else:
                    answer.set_exception(error)
        except (EOFError, OSError):
            pass
        code = self._process.wait()
        with self._lock:
            self.gone = True
            unanswered = list(self._asked.values())
            self._asked.clear()
        for answer in unanswered:
            answer.set_exception(WorkerDied(f"the worker process ended with code {code}"))
        self._socket.close()


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


_prestarted: dict[Kind, _End] = {}


def prestart() -> None:
    """Start a worker process of each kind now; the first `WorkerProcess` of that kind takes it."""
    for kind in MODULES:
        _prestarted[kind] = _End(kind)


def serve(socket: int, kind: Kind) -> None:
    """Work on the calls that come over `socket`, until its other end is closed or its holder is dead."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the caller decides when to stop, and takes this process along
    if kind == "slides":
        os.nice(NICE)
    slow, *others = MODULES[kind]
    threading.Thread(target=importlib.import_module, args=(slow,), daemon=True).start()
    for module in others:
        importlib.import_module(module)
    connection, lock = Connection(socket), threading.Lock()
    threads = ThreadPoolExecutor()

    def work(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            answer = pickle.dumps((number, function(*arguments), None))
        except BaseException as error:
            answer = pickle.dumps((number, None, _sendable(error)))
        with lock:
            connection.send_bytes(answer)

    try:
        while True:
            threads.submit(work, *connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # nobody waits for what still runs


def _sendable(error: BaseException) -> Exception:
    """`error` as it can be pickled, and raised elsewhere without ending a thread or process there."""
    error.add_note("in the worker process:\n" + traceback.format_exc())
    try:
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return cast(Exception, error)
    except Exception:  # a class that takes other arguments than it keeps, say
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
