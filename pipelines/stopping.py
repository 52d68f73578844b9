"""Signals that ask a command to stop.

Promise: it ends within END_S of the first, whatever it is doing, and loses no more than by a crash at that moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pathology.calls import STOP_SIGNALS

INTERRUPTED = 75

# Schedulers of clusters kill 30 s after they have asked, some sooner; people lose patience at 10.
END_S = 9.0
DROPPED = "pathology: the run was stopped, and what did not end by itself was dropped: run the same command again to go on"


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event set by the first of STOP_SIGNALS; a second SIGINT ends the process at once, and so does time, with exit code 75.

    Not by a SIGHUP that is ignored already: who starts a command by `nohup` wants it to outlive the terminal.
    """
    stop, left = threading.Event(), threading.Event()
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)  # not the event is asked: this may interrupt the very call that sets it
        if len(asked) == 1:
            stop.set()
        elif number == signal.SIGINT:
            os._exit(INTERRUPTED)

    def end() -> None:
        stop.wait()
        if not left.wait(END_S):
            # A region may run in this very process, in a call that nothing interrupts.
            with suppress(OSError):  # the terminal may be gone
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{DROPPED}\n".encode())
            os._exit(INTERRUPTED)

    old: dict[signal.Signals, Callable[..., object] | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        by_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        old = {number: signal.signal(number, ask) for number in STOP_SIGNALS if not (number == signal.SIGHUP and by_nohup)}
        threading.Thread(target=end, name="stop", daemon=True).start()
    try:
        yield stop
    finally:
        left.set()
        stop.set()  # nobody is left who would take it for a signal: it lets the thread go
        for number, handler in old.items():
            signal.signal(number, handler)
