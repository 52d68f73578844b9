"""Writes that survive a crash. Promise: a path either holds the whole of what was written, on disk, or what it held before.

Many processes may write one path: each writes a temporary file of its own, `<name>.<its mark>-<number>.tmp`, and the last
rename stands. What a dead one leaves behind is removed by `sweep_temporaries`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from pathology.alive import known_dead, mark
from pathology.errors import EnvironmentFault, Fault
from pathology.faults import TRANSIENT, retried, used_up
from pathology.pulse import under_way

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
# Errors of a disk or share, not of a slide.
DISK_ERRORS = TRANSIENT | FULL | {errno.EEXIST, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK}

# Temporary files of processes elsewhere, of which nothing can be known, are taken for litter after this long.
LITTER_S = 24 * 3600.0

_temporaries = itertools.count()


def write_file(path: Path, data: bytes, beside: Path | None = None) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename, fsync of the folder. What may pass is tried again.

    beside  folder for the temporary file, on the same file system: where that is gone, `path` stays as it is
    """
    temporary = _temporary(path, beside or path.parent)

    def write() -> None:
        # From its first byte at every try: once an fsync has failed, nobody knows which bytes have arrived.
        with temporary.open("wb", buffering=0) as file:
            _write_all(file, data)
            os.fsync(file.fileno())

    with _writing(path):
        try:
            retried(write)
            _take_name(temporary, path)
        except BaseException:
            _drop(temporary)
            raise


def write_once(path: Path, data: bytes) -> bytes:
    """Write `data` to `path` unless another did before, maybe at this very moment; what stands there, for all alike."""
    temporary = _temporary(path, path.parent)
    write_file(temporary, data)
    with _writing(path):
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # no hard links here: the last one wins
            temporary.replace(path)
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return path.read_bytes()


@contextmanager
def new_file(path: Path, beside: Path | None = None) -> Iterator[Callable[[bytes], None]]:
    """Replace `path` by all that is written inside: gives a function that appends. Where the inside raises, nothing changes.

    What may pass is tried again, but for the fsync: what was written before it is no longer at hand.
    """
    temporary = _temporary(path, beside or path.parent)
    with _writing(path):
        file = retried(lambda: temporary.open("wb", buffering=0))

    def write(data: bytes) -> None:
        with _writing(path):
            _write_all(file, data)

    try:
        # Only what is done to this file is under `output_faults`: what raises between writes may be a slide's fault.
        with file:
            yield write
            with _writing(path):
                os.fsync(file.fileno())
        with _writing(path):
            _take_name(temporary, path)
    except BaseException:
        _drop(temporary)
        raise


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[retried(functools.partial(file.write, left)) :]


def _take_name(temporary: Path, path: Path) -> None:
    """Rename a file to `path`, to last."""

    def rename() -> None:
        try:
            temporary.replace(path)
        except FileNotFoundError:
            # A server may have done it at the try before and told of an error. Nobody else has a file of this name.
            if not tried or not path.exists():
                raise
        finally:
            tried.append(True)

    tried: list[bool] = []
    retried(rename)
    retried(lambda: sync_folder(path.parent))


def _drop(temporary: Path) -> None:
    with suppress(OSError):  # where the disk is gone, so is this
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in `folder` last."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and itself, children first."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path))
        else:
            _sync(Path(entry.path), os.O_RDONLY)
    sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    with under_way("write"):
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sweep_temporaries(folder: Path) -> None:
    """Remove what dead processes were writing in `folder`, and what is a day old."""
    for path in list(folder.glob("*.tmp")):
        writer = path.name.removesuffix(".tmp").rpartition(".")[2]
        with suppress(OSError):  # another sweeps as well
            if known_dead(writer) or time.time() - path.stat().st_mtime > LITTER_S:
                path.unlink()


def _temporary(path: Path, folder: Path) -> Path:
    return folder / f"{path.name}.{mark()}-{next(_temporaries)}.tmp"


def make_folders(folder: Path, within: Path | None = None) -> None:
    """Create `folder` and its parents, each made to last. `within`: one of them that must be there, else FileNotFoundError."""
    if folder.is_dir():
        return
    if folder == within:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if folder.exists() and not folder.is_dir():
        raise EnvironmentFault(f"output {folder} is no folder; choose another --out", Fault.OUTPUT)
    make_folders(folder.parent, within)
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A single operation on the output, under `output_faults`; whoever holds this process sees how long it takes."""
    with output_faults(path), under_way("write"):
        yield


@contextmanager
def output_faults(path: Path) -> Iterator[None]:
    """Turn a full, read-only or vanished disk under `path`, or want of memory, into an EnvironmentFault: it fails no slide."""
    try:
        yield
    except OSError as error:
        if (lack := used_up(error)) is not None:
            raise lack from error
        if error.errno not in DISK_ERRORS:
            raise
        free = free_bytes(path.parent) if error.errno in FULL else None
        room = "" if free is None else f" ({free} bytes are free)"
        remedy = f"make room{room} or restore access, then run the same again"
        fault = Fault.DISK_FULL if error.errno in FULL else Fault.OUTPUT
        raise EnvironmentFault(f"output {path.parent} cannot be written: {error.strerror}; {remedy}", fault) from error


def free_bytes(folder: Path) -> int | None:
    """Bytes that this user may still write where `folder` lies, or will be made; None where that cannot be told."""
    for place in (folder, *folder.parents):
        try:
            state = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return state.f_bavail * state.f_frsize if state.f_blocks else None
    return None
