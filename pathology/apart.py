"""Calls that may end their process: opening files that nobody has looked at yet.

Promise: a crash in a native library, or a call that does not come back, is the error of that one call; whoever asked goes on.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from pathology.calls import Calls, WorkerDied, answer_calls, leave_stopping_to_the_caller
from pathology.errors import PathologyError, Reason, SlideError

# A file system that is asleep may take long to answer; a reader that hangs takes for ever.
DEADLINE_S = 120.0
# One that died is tried again, since it may have been ended for another's sake.
TRIES = 2
_START = "import sys; sys.path[:] = sys.argv[2:]; from pathology.apart import serve; serve(sys.argv[1])"


class Apart:
    """`count` processes, each at work on one call at a time, and made anew when it dies or takes too long. A context manager.

    deadline_s  the longest that one call may take
    """

    def __init__(self, count: int = 1, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._count = count
        self._made: list[_Process] = []
        self._stopped = False
        for _ in range(count):
            self._idle.put(None)  # started by the first call that needs it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill all: what they still do is abandoned."""
        self._stopped = True
        for process in self._made:
            process.kill()

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` returns or raises there. `name` is that of the file it is about, for messages.

        Raises SlideError: CRASHED where the process died of it twice, TIMEOUT where it took longer than the deadline.
        """
        for tried in range(1, TRIES + 1):
            with self._process() as process:
                try:
                    return process.calls.ask(function, *arguments).result(self._deadline_s)
                except WorkerDied as error:
                    if tried == TRIES or self._stopped:
                        message = f"{name} ended the process that opened it ({error}); leave it out, or write it anew"
                        raise SlideError(Reason.CRASHED, message) from error
                except TimeoutError as error:
                    process.kill()
                    message = f"{name} took longer than {self._deadline_s:g} s to open; check the disk or share it lies on"
                    raise SlideError(Reason.TIMEOUT, message) from error
        raise AssertionError

    def results(self, function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
        """What each of `calls` (name, arguments) returns, or the PathologyError that it raises: in order, side by side."""
        with ThreadPoolExecutor(self._count) as threads:
            asked: list[Future[Any]] = [threads.submit(self._result, name, function, given) for name, given in calls]
            try:
                for answer in asked:
                    yield answer.result()
            finally:
                if [answer for answer in asked if not answer.cancel() and not answer.done()]:
                    self.stop()  # nobody waits for what is under way

    def _result(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return self.call(name, function, *arguments)
        except PathologyError as error:
            return error

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        """One that nobody else asks meanwhile, alive."""
        process = self._idle.get()
        try:
            if self._stopped:
                raise WorkerDied("nobody waits for it")
            if process is None or process.gone:
                process = _Process()
                self._made.append(process)
            yield process
        finally:
            self._idle.put(process)


class _Process:
    """A running process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what libraries say of damaged files, line by line
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._killed = False
        self.calls = Calls(ours, self._end)

    @property
    def gone(self) -> bool:
        return self._killed or self.calls.gone

    def kill(self) -> None:
        self._killed = True
        self._process.kill()
        self._process.wait()

    def _end(self) -> WorkerDied:
        code = self._process.wait()
        return WorkerDied(f"code {code}" if code >= 0 else signal.Signals(-code).name)


def serve(socket: str) -> None:
    """Work on the calls that come over `socket`, one at a time, until its other end is closed or its holder is dead."""
    leave_stopping_to_the_caller()
    answer_calls(Connection(int(socket)), ThreadPoolExecutor(1))
    os._exit(0)  # nobody waits for what still runs
