"""Which process wrote a file, and whether it still lives: told from the name of the file.

Promise: a mark is unlike that of any other process, on any host, at any time; and one that is called dead is dead.
"""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from pathlib import Path


def mark() -> str:
    """What stands for this process in names of files: "<system>-<pid>-<when it began>", without dots."""
    return _mark(os.getpid())


def known_dead(mark: str) -> bool:
    """Whether the process of a mark, or of a name that begins with one, ran on this system and does no more.

    Of a process elsewhere nothing can be known: False.
    """
    system, pid, began = (*mark.split("-"), "", "", "")[:3]
    return system == _system() and pid.isdigit() and _began(int(pid)) != began


@functools.cache
def _mark(pid: int) -> str:  # by pid: a forked process is another
    return f"{_system()}-{pid}-{_began(pid)}" if _system() else f"x{uuid.uuid4().hex[:16]}-{pid}-0"


@functools.cache
def _system() -> str:
    """12 hex digits for where process numbers mean something: this boot, and in it this container; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return hashlib.sha256(f"{boot} {Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process of this system began, in its ticks, which tells it from others of its number; "" for none."""
    try:
        # The second field is the program's name in parentheses, in which anything may stand.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
