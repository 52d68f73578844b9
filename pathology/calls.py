"""Function calls from one process to another over a socket, and memory that both see.

Promise: every call is answered once: by what the function returned or raised, or by WorkerDied where the other side is gone.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pathology.errors import PathologyError

if TYPE_CHECKING:  # processes are started with this, and load it while they run
    import numpy as np
    from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])

# What asks a command to stop: people, schedulers of clusters, and a terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Death(Enum):
    """What ended a worker, which decides what becomes of its tasks."""

    CRASH = auto()  # by itself: native code, or an exit
    KILL = auto()  # a signal from outside
    MEMORY = auto()  # it took too much
    READ = auto()  # a read of a slide hung
    WRITE = auto()  # a write to the output hung
    STILL = auto()  # nothing came on
    DEVICE = auto()  # its device refuses all further work


class WorkerDied(PathologyError):
    """The process ended while it worked on the call, or had to be ended. The arguments are (message, death), for pickling."""

    def __init__(self, message: str, death: Death = Death.CRASH) -> None:
        super().__init__(message, death)
        self.message = message
        self.death = death

    def __str__(self) -> str:
        return self.message

    def again(self) -> WorkerDied:
        """The same for another caller: each raises its own."""
        return WorkerDied(self.message, self.death)


class Calls:
    """The asking end of a socket. Calls run side by side there, and end in any order.

    ended  called once the other side is gone, before callers are told; gives what they are told
    """

    def __init__(
        self, connection: Connection, ended: Callable[[], WorkerDied] = lambda: WorkerDied("the other process ended")
    ) -> None:
        self._connection = connection
        self._ended = ended
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()  # of the calls; another for the socket, since an answer must not wait for a question
        self._sending = threading.Lock()
        self._why: WorkerDied | None = None
        threading.Thread(target=self._receive, name="answers", daemon=True).start()

    @property
    def gone(self) -> bool:
        """Whether the other side has ended."""
        return self._why is not None

    @property
    def busy(self) -> bool:
        """Whether any call is not yet answered."""
        return bool(self._asked)

    def cut(self) -> None:
        """Take the other side for gone, whether it is or cannot be ended: callers are told now."""
        with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """What `function(*arguments)` returns or raises there, some time; WorkerDied where that side ends before it has."""
        number, answer = next(self._numbers), Future[Any]()
        answer.set_running_or_notify_cancel()  # nobody can take it back: it will be answered, and that must find it open
        question = pickle.dumps((number, function, arguments))
        with self._lock:
            self._asked[number] = answer
        with suppress(OSError), self._sending:  # it may have ended just now, which `_receive` tells
            self._connection.send_bytes(question)
        with self._lock:
            if self._why is not None and self._asked.pop(number, None) is not None:
                answer.set_exception(self._why.again())
        return answer

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, value, error = self._connection.recv()
                with self._lock:
                    answer = self._asked.pop(number)
                if error is None:
                    answer.set_result(value)
                else:
                    answer.set_exception(error)
        why = self._ended()
        with self._lock:
            self._why = why
            unanswered = list(self._asked.values())
            self._asked.clear()
        for answer in unanswered:
            answer.set_exception(why.again())


def answer_calls(connection: Connection, threads: Executor) -> None:
    """Answer what the other end asks until it is closed, by `threads`, or by those that belong to the function (`run_by`)."""
    lock = threading.Lock()

    def work(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            answer = pickle.dumps((number, function(*arguments), None))
        except BaseException as error:
            answer = pickle.dumps((number, None, sendable(error)))
        with suppress(OSError), lock:
            connection.send_bytes(answer)

    with suppress(EOFError, OSError):
        while True:
            number, function, arguments = connection.recv()
            chosen = getattr(function, "threads", None)
            (chosen(*arguments) if chosen else threads).submit(work, number, function, arguments)


def leave_stopping_to_the_caller() -> None:
    """Ignore STOP_SIGNALS, which may be sent to all processes of a command: its first one decides, and takes this one along."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_by(threads: Callable[..., Executor]) -> Callable[[F], F]:
    """Let calls of a function be answered by threads of its own: those that `threads` gives for its arguments."""

    def mark(function: F) -> F:
        function.threads = threads  # type: ignore[attr-defined]
        return function

    return mark


def sendable(error: BaseException) -> Exception:
    """`error` as it can be pickled, and raised elsewhere without ending a thread or process there."""
    error.add_note("in the worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return cast(Exception, error)
    except Exception:  # a class that takes other arguments than it keeps, say
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def shared_file() -> int:
    """A descriptor of memory that processes which inherit it can map; it is gone with the last of them."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pathology")  # close-on-exec: only who is handed it has it
    import tempfile  # Linux has no need of it

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedMemory:
    """Blocks of a file that processes map: one of them takes and gives them back, the others find them by their place."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._mapped: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """The place of a block of `count` bytes that nobody else holds."""
        size = _pages(count)
        with self._lock:
            if free := self._free.get(size):
                return free.pop()
            place, self._end = self._end, self._end + size
            os.ftruncate(self._descriptor, self._end)
        return place

    def give(self, place: int, count: int) -> None:
        """Let the block be taken again."""
        with self._lock:
            self._free.setdefault(_pages(count), []).append(place)

    def array(self, place: int, count: int) -> NDArray[np.uint8]:
        """(count,) uint8: the block itself."""
        import numpy as np

        with self._lock:
            if place not in self._mapped:
                mapped = mmap.mmap(self._descriptor, _pages(count), offset=place)
                self._mapped[place] = np.frombuffer(mapped, np.uint8)
        return self._mapped[place][:count]


def _pages(count: int) -> int:
    return -(-count // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The processes beside this one.

    readers  by which those for slides can be asked, the first of them for all but reading; none where they are those that ask
    memory   that all see
    """

    readers: tuple[Calls, ...]
    memory: SharedMemory

    @property
    def calls(self) -> Calls | None:
        return self.readers[0] if self.readers else None


_neighbours: list[Neighbour] = []


def set_neighbour(neighbour: Neighbour) -> None:
    """Make `neighbour` known to all in this process."""
    _neighbours[:] = [neighbour]


def neighbour() -> Neighbour | None:
    """This process's neighbours, None where it works alone."""
    return _neighbours[0] if _neighbours else None
