"""Errors of disks and shares: those that may pass, those that tell of a share that is gone, and those of one file.

Promise: what may pass is tried again a few times and then told; a share that is gone, or a machine that has no more of
something, is never blamed on a slide.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pathology.errors import EnvironmentFault, Fault, PathologyError, Reason, SlideError

T = TypeVar("T")

# No file of its own has these: whatever it lies on has.
OF_A_SHARE = frozenset(
    (
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
        # A ticket that has expired, a server's own disk, a link to it that is cut. Not every system has all of these.
        *(getattr(errno, name) for name in ("EKEYEXPIRED", "ENOKEY", "EREMOTEIO", "ENOLINK") if hasattr(errno, name)),
    )
)
# What a process or the whole machine has no more of: by errno, and as Python says it of threads, without one.
USED_UP = {
    errno.EMFILE: (Fault.MACHINE, "allow more open files (ulimit -n), or fewer --num-workers"),
    errno.ENFILE: (Fault.MACHINE, "end what holds so many files open"),
    errno.ENOMEM: (Fault.NO_MEMORY, "free memory, or allow more (ulimit -v)"),
}
NO_THREAD = "can't start new thread"
# Another try may do: a server that starts again, a path that is looked up anew, a sector that is read at last.
TRANSIENT = OF_A_SHARE | {errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY}
# Between two tries.
WAITS_S = (0.1, 0.4, 1.6)
# Reasons that a slide seems to have when its share is gone.
AS_IF_GONE = frozenset((Reason.MISSING, Reason.PERMISSION, Reason.READ_ERROR))


def retried(call: Callable[[], T], renew: Callable[[], None] | None = None) -> T:
    """What `call` returns; tried again after each of `WAITS_S` where it raises what may pass, and then raised.

    renew  called before another try: opens anew what may have gone stale
    """
    for wait in WAITS_S:
        try:
            return call()
        except (OSError, PathologyError) as error:
            if system_error(error) not in TRANSIENT:
                raise
        time.sleep(wait)
        if renew is not None:
            try:
                renew()
            except SlideError:
                raise
            except OSError:  # `call` will meet it, too
                continue
    return call()


def system_error(error: BaseException | None) -> int | None:
    """The errno of an error of the operating system, or of the one that an error of this program was made of."""
    while isinstance(error, PathologyError):
        error = error.__cause__
    return error.errno if isinstance(error, OSError) else None


def used_up(error: BaseException | None) -> EnvironmentFault | None:
    """The machine's fault where `error` says that it has no more descriptors, threads or memory; None where it does not."""
    code = system_error(error)
    if code in USED_UP:
        fault, remedy = USED_UP[code]
        return EnvironmentFault(f"{os.strerror(code)}: {remedy}; then run the same again", fault)
    if isinstance(error, RuntimeError) and NO_THREAD in str(error):
        return EnvironmentFault(f"{NO_THREAD}: allow more processes or memory (ulimit -u, ulimit -v); then run the same again")
    return None


def probe(path: Path) -> None:
    """Raise the OSError that opening and reading `path` meets, if any, after some tries."""

    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.pread(descriptor, 1, 0)
        finally:
            os.close(descriptor)

    retried(read)


def read_fault(name: str, path: Path, error: OSError) -> SlideError | EnvironmentFault:
    """What it means that an open slide can no longer be read, after some tries: a fault of share, machine, or the one file.

    name  for the message
    """
    if (fault := used_up(error)) is not None:
        return fault
    if why := share_gone(path, path.parent, error.errno):
        return _gone(why)
    tries = f", tried {len(WAITS_S) + 1} times" if error.errno in TRANSIENT else ""
    message = f"{name} cannot be read: {error.strerror}{tries}; check the disk or share it lies on"
    return SlideError(Reason.READ_ERROR, message)


def share_fault(error: SlideError, path: Path, root: Path) -> EnvironmentFault | None:
    """The fault of the share, or machine, to which a slide's failure to open comes down; None where it is the slide's own.

    root  the folder or file through which the slide was found
    """
    if error.reason not in AS_IF_GONE:
        return None
    if (fault := used_up(error)) is not None:
        return fault
    why = share_gone(path, root, system_error(error))
    return _gone(why) if why else None


def share_gone(path: Path, root: Path, code: int | None = None) -> str:
    """Why `path` can be expected to be unreadable, whatever it is: its share is gone; "" where that is there.

    A mount point is an empty folder where nothing is mounted. A folder that is gone from below `root`, which is there with
    something else in it, was moved by a person and takes only its own slides along.

    code  the errno that `path` was met with
    """
    if code in OF_A_SHARE:
        return f"what {path.parent} lies on does not answer ({os.strerror(code or 0)})"
    folder = path.parent
    while True:
        try:
            with os.scandir(folder) as entries:
                empty = next(entries, None) is None
            break
        except (FileNotFoundError, NotADirectoryError):
            if folder == folder.parent:
                return ""
            folder = folder.parent
        except OSError as error:
            # Who may not list a folder may still read what is in it; with a ticket that has expired nothing works.
            lost = error.errno in TRANSIENT or code in (errno.EACCES, errno.EPERM, errno.EIO)
            return f"folder {folder} cannot be listed ({error.strerror})" if lost else ""
    if empty:
        return f"folder {folder} of the slides is empty"
    if folder == path.parent:
        return ""
    within = root != path and path.is_relative_to(root)
    if within and folder.is_relative_to(root):
        return ""
    return f"folder {root if within else path.parent} of the slides is gone"


def _gone(why: str) -> EnvironmentFault:
    return EnvironmentFault(f"{why}; mount it or restore access, then run the same again", Fault.SHARE_GONE)
