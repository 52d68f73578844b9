"""Files that cannot be read as others can, in every process that has this folder on PYTHONPATH.

UNRULY="HOW NAME PLACE": a read of a file of that name that covers the byte at PLACE does not come back ("hang"; no other thread
of the process runs meanwhile), or takes memory until there is none ("take").
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

_pread = os.pread
_how, _name, _place = os.environ.get("UNRULY", "none - 0").split(" ")


def pread(descriptor: int, count: int, place: int, /) -> bytes:
    if place <= int(_place) < place + count and Path(f"/proc/self/fd/{descriptor}").readlink().name == _name:
        if _how == "hang":
            ctypes.PyDLL(None).sleep(600)
        blocks = []
        while _how == "take":
            blocks.append(b"x" * 2**26)
            time.sleep(0.02)
    return _pread(descriptor, count, place)


os.pread = pread
