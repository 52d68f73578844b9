"""Lines for people. Promise: any name can be printed, and no run ends because its lines cannot be."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path


def printable(value: object) -> str:
    """Text that any terminal takes: a file's name may hold bytes that are no text."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def say(text: str) -> None:
    """Print a line of a run; where it cannot be printed it is left out: what counts is on record."""
    with suppress(OSError):
        print(printable(text), flush=True)


def open_closed_streams() -> None:
    """Open what a shell has closed (`>&-`): else the next file that is opened gets its number, and what others print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
