"""Memory that was freed and is kept by the C library for what comes next (see `process.VARIABLES`)."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Give it back to the system, where much was freed that will not be needed soon. Only glibc keeps any."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
