"""Copies of slides on a local disk, made ahead of use by one thread of the driver.

Promise: a copy is used only when it is whole, has the slide's own fingerprint, and belongs to this run; what is computed, and
what is recorded, is the same with and without.

A run owns one folder below the one that was named, for as long as it holds the folder's lock. The kernel lets go of the lock
when the run dies, however it dies, and the next run to come removes the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pathology.errors import EnvironmentFault, SlideError, UsageError
from pathology.faults import retried
from pathology.job import Job
from pathology.readers.fingerprint import fingerprint_file
from pathology.readers.inspect import SlideFile, inspect_file

PREFIX = ".pathology-stage-"  # hidden, so that no search for slides finds the copies
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Copy:
    """How the staging of a slide ended.

    bytes    that were copied; 0 where the slide is read in place
    seconds  that the copy took
    why      the slide is read in place although it should not be; "": it was copied, or there was no need to
    """

    bytes: int = 0
    seconds: float = 0.0
    why: str = ""


class Stage:
    """The copies of one run. `jobs` are taken in order; neighbours of one slide share its copy. A context manager."""

    def __init__(self, jobs: Sequence[Job], folder: Path, most_bytes: int) -> None:
        self._jobs = list(jobs)
        self._most_bytes = most_bytes
        groups = [list(places) for _, places in itertools.groupby(range(len(jobs)), lambda place: jobs[place].slide)]
        self._group = {place: number for number, places in enumerate(groups) for place in places}
        self._open = [set(places) for places in groups]  # jobs that have not ended
        self._folder, self._lock = _claim(folder)
        self._changed = threading.Condition()
        self._used: dict[int, int] = {}  # bytes a group occupies
        self._ahead = 0  # groups before this one may be copied
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._copies: list[Future[Copy]] = []

    def start(self, needed: Callable[[Job], bool], wake: Callable[[], None]) -> None:
        """Begin to copy. `needed` says of a job whether its slide will be read; `wake` is called after each slide."""
        for number in range(len(self._open)):
            self._copies.append(self._pool.submit(self._stage, number, needed))
            self._copies[-1].add_done_callback(lambda _: wake())

    def ready(self, place: int, ahead: int) -> bool:
        """Whether the job at `place` can begin. `ahead` slides after its own may be copied meanwhile."""
        with self._changed:
            if self._ahead < (limit := self._group[place] + ahead + 1):
                self._ahead = limit
                self._changed.notify_all()
        return self._copies[self._group[place]].done()

    def begun(self, place: int) -> Copy | None:
        """How the staging of the slide ended, for its first job; None for others. Raises what the copy raised."""
        group = self._group[place]
        if place and self._group[place - 1] == group:
            return None
        return self._copies[group].result() if self._copies[group].done() else Copy()

    def folder(self, place: int) -> str | None:
        """The folder that holds the copy of the job's slide, as a worker is to be told; None where there is none."""
        group = self._group[place]
        copied = self._copies[group].done() and self._copies[group].result().bytes
        return str(self._place(group)) if copied else None

    def end(self, place: int) -> None:
        """The job at `place` has ended and no task of it runs; the last one of a slide takes its copy along."""
        group = self._group[place]
        self._open[group].discard(place)
        if self._open[group]:
            return
        _remove(self._place(group))
        with self._changed:
            self._used.pop(group, None)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _place(self, group: int) -> Path:
        """The folder for a slide's copy, whose files keep their names: messages and slides of several files need them."""
        return self._folder / f"{group:06d}"

    def _stage(self, number: int, needed: Callable[[Job], bool]) -> Copy:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number < self._ahead or not self._open[number])
        waiting = sorted(self._open[number])
        if self._closed or not any(needed(self._jobs[place]) for place in waiting):
            return Copy()
        job = self._jobs[waiting[0]]
        try:
            file, sizes, before = retried(lambda: _seen(Path(job.slide)))
        except (SlideError, OSError):
            return Copy()  # to be refused, with its reason, where it lies
        total = sum(sizes.values())
        if total > self._most_bytes:
            return Copy(why=f"its {total} bytes are more than --stage-size {self._most_bytes}")
        why = self._reserve(number, total)
        if why or self._closed:
            return Copy(why=why)
        began = time.perf_counter()
        whole = self._place(number)
        part = whole.with_name(whole.name + ".part")
        try:
            for source, size in sizes.items():
                target = part / source.relative_to(file.path.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                retried(functools.partial(self._copy, source, target, size))
            copied = inspect_file(part / file.path.name)
            if fingerprint_file(copied) != before or len(copied.parts) != len(sizes):
                raise OSError(None, "the slide changed while it was copied")
            part.rename(whole)
        except (SlideError, OSError) as error:
            _remove(part)
            with self._changed:
                self._used.pop(number)
            return Copy() if self._closed else Copy(why=f"it could not be copied: {_words(error)}")
        return Copy(total, time.perf_counter() - began)

    def _reserve(self, number: int, total: int) -> str:
        """Wait until there is room, and take it; why there will be none, otherwise ""."""
        with self._changed:
            while not self._closed:
                free = shutil.disk_usage(self._folder).free
                if sum(self._used.values()) + total <= self._most_bytes and total <= free:
                    self._used[number] = total
                    break
                if not self._used:
                    return f"its {total} bytes do not fit into the {free} that are free in the folder of --stage"
                self._changed.wait()
        return ""

    def _copy(self, source: Path, target: Path, size: int) -> None:
        """Copy one file of `size` bytes. Raises OSError where it has another size by now, or the run ends."""
        copied = 0
        with source.open("rb", buffering=0) as original, target.open("wb", buffering=0) as copy:
            while not self._closed and (data := original.read(CHUNK_BYTES)):
                copied += len(data)
                while data:
                    data = data[copy.write(data) :]
        if copied != size:
            raise OSError(None, "the slide changed while it was copied")


def open_stage(jobs: Sequence[Job]) -> Stage | None:
    """The stage that the jobs ask for; None where they ask for none.

    Raises UsageError where jobs ask for different ones, EnvironmentFault where the folder cannot be used.
    """
    asked = {(job.stage, job.stage_bytes) for job in jobs}
    if all(stage is None for stage, _ in asked):
        return None
    if len(asked) > 1:
        raise UsageError(f"the jobs of one run name {len(asked)} folders or sizes for staging; name one")
    ((folder, most_bytes),) = asked
    assert folder is not None
    return Stage(jobs, Path(folder), most_bytes)


def slide_path(job: Job) -> Path:
    """Where a worker opens the job's slide: the copy if its `stage` holds one, else where it lies."""
    copy = None if job.stage is None else Path(job.stage) / Path(job.slide).name
    return copy if copy is not None and copy.exists() else Path(job.slide)


def _claim(folder: Path) -> tuple[Path, int]:
    """A new folder of this run's own below `folder`, and its lock; those of runs that died are removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gate = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # While the gate is held no folder is new and not yet locked.
            fcntl.flock(gate, fcntl.LOCK_EX)
            _sweep(folder)
            own = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{socket.gethostname()}-{os.getpid()}-", dir=folder))
            lock = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return own, lock
        finally:
            os.close(gate)
    except OSError as error:
        message = f"--stage {folder} cannot be used: {error.strerror}; name a folder on a local disk"
        raise EnvironmentFault(message) from error


def _sweep(folder: Path) -> None:
    """Remove what runs left that are dead: folders with our name whose lock nobody holds. Others' may not be ours to see."""
    for left in sorted(folder.glob(f"{PREFIX}*")):
        try:
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a copy that nobody reads. Emptied first: a process that still holds a file open would keep its space."""
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                os.truncate(Path(at, name), 0)
    shutil.rmtree(folder, ignore_errors=True)


def _seen(path: Path) -> tuple[SlideFile, dict[Path, int], str]:
    """A slide, the sizes of its files, and its fingerprint."""
    file = inspect_file(path)
    return file, {part: part.stat().st_size for part in file.parts}, fingerprint_file(file)


def _words(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) and not isinstance(error, SlideError) else str(error)
