"""Writes that survive a crash. Promise: a path either holds the whole of what was written, on disk, or what it held before.

Temporary names end in `.tmp` and carry no random part, so that what a crash leaves behind is overwritten, not collected.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pathology.errors import EnvironmentFault

# Errors of a disk or share, not of a slide.
DISK_ERRORS = {
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTCONN,
}


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename, fsync of the folder."""
    with new_file(path) as write:
        write(data)


@contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Replace `path` by all that is written inside: gives a function that appends. Where the inside raises, nothing changes."""
    temporary = path.with_name(path.name + ".tmp")
    with output_faults(path):
        file = temporary.open("wb", buffering=0)

    def write(data: bytes) -> None:
        left = memoryview(data)
        with output_faults(path):
            while left:
                left = left[file.write(left) :]

    try:
        # Only what is done to this file is under `output_faults`: what raises between writes may be a slide's fault.
        with file:
            yield write
            with output_faults(path):
                os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with output_faults(path):
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in `folder` last."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself, children first."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        else:
            fd = os.open(entry.path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    sync_folder(folder)


def make_folders(folder: Path) -> None:
    """Create `folder` and its parents, each made to last."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    with output_faults(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextmanager
def output_faults(path: Path) -> Iterator[None]:
    """Turn a full, read-only or vanished disk under `path` into an EnvironmentFault, which fails no slide."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise EnvironmentFault(
            f"output {path.parent} cannot be written: {error.strerror}; make room or restore access, then run the same again"
        ) from error
