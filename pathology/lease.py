"""Which process works on a slide: one at a time, of any number on any hosts, on file systems that know no locks.

Promise: a slide's work lies in a folder named by its owner. Who takes it over renames that folder, so whatever a former owner
still does, and be it a rename that comes hours late, finds its paths gone and changes nothing.

Only two properties of the file system are needed: renaming a folder is atomic, and replaces another only if that is empty.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pathology.alive import known_dead, mark
from pathology.durable import make_folders, output_faults, sweep_temporaries
from pathology.errors import EnvironmentFault, Fault
from pathology.job import FREE

# An owner shows every BEAT_S that it lives. One that was not seen to for LEASE_S, by the clock of who waits, is taken for dead.
BEAT_S = 5.0
LEASE_S = 60.0
# In every folder of work; one without is none, but what a process wrote that was no longer its owner.
OWNER = "owner.json"
OWNER_BYTES = 512
CLAIM = ".claim-"

_claims = itertools.count()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that works on a slide. Its `token` begins with its mark, and is another for every claim."""

    token: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.host else "another process"


class Leases:
    """The slides of one run that this process owns, and a look at those that others do. Safe from many threads.

    A slide is named by its place, the folder of all its unfinished work.

    seconds  after which an owner that does not show itself is taken for dead
    """

    def __init__(self, seconds: float = LEASE_S) -> None:
        self._seconds = seconds
        self._owned: dict[Path, str] = {}  # tokens
        self._seen: dict[Path, tuple[bytes, float]] = {}  # what an owner last showed, and since when
        self._works: set[Path] = set()  # folders of places that were there
        self._claiming = threading.Lock()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self, place: Path) -> Owner | None:
        """Make this process the owner of a slide's work. None where it is now, else who is.

        Raises EnvironmentFault where the output is gone or cannot be written.
        """
        with self._claiming, output_faults(place):
            if self.owns(place):
                return None
            self._make_work(place.parent)
            token = f"{mark()}-{next(_claims)}"
            while True:
                folder = _work_of(place)
                if folder is None:
                    if _claim_new(place, token):
                        break
                    continue
                if folder.name == token:
                    break  # over a network a rename can succeed and tell of an error
                if folder.name != FREE and not self._gone(folder):
                    return _owner(folder)
                with suppress(FileNotFoundError):  # another was quicker
                    if folder.name == FREE:
                        _show(folder, token, create=True)
                    folder.rename(place / token)
                    _show(place / token, token)
                    self._seen.pop(folder, None)
                    break
                time.sleep(0.01)  # a network's folders may be shown as they were for a while
            self._own(place, token)
            return None

    def token(self, place: Path) -> str:
        """The name of the folder for this process's work on a slide that it has claimed."""
        with self._lock:
            return self._owned[place]

    def owns(self, place: Path) -> bool:
        """Whether the slide was claimed and is still this process's; nobody loses one and has it back under the same token."""
        with self._lock:
            token = self._owned.get(place)
        with output_faults(place):
            return token is not None and (place / token / OWNER).exists()

    def release(self, place: Path) -> None:
        """Let others have the slide: what is unfinished becomes free, and nothing remains of what is done."""
        with self._lock:
            token = self._owned.pop(place, None)
        if token is None:
            return
        mine = place / token
        with suppress(FileNotFoundError), output_faults(place):
            # A worker of an owner that was killed may have been at it when the slide was taken over.
            sweep_temporaries(mine)
            if any(entry.name != OWNER for entry in mine.iterdir()):
                mine.rename(place / FREE)
                return
            (mine / OWNER).unlink()
            mine.rmdir()
            with suppress(OSError):  # another may just have claimed it anew
                place.rmdir()

    def close(self) -> None:
        """Release all that is owned, and show no more. Where the output is gone, others will find out by themselves."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for place in list(self._owned):
            with suppress(OSError, EnvironmentFault):
                self.release(place)
        for work in self._works:
            with suppress(OSError):
                sweep(work)

    def _make_work(self, work: Path) -> None:
        """Make the folder of places, once: that it has vanished since is a fault, and another disk may lie beneath."""
        if work not in self._works:
            make_folders(work)
            sweep(work)
            self._works.add(work)
        elif not work.is_dir():
            raise EnvironmentFault(f"output {work.parent} is gone; mount it, then run the same again", Fault.OUTPUT)

    def _own(self, place: Path, token: str) -> None:
        with self._lock:
            self._owned[place] = token
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
                self._thread.start()

    def _gone(self, folder: Path) -> bool:
        """Whether whoever owns `folder` is dead, or has not shown itself for as long as it would have been waited for."""
        if known_dead(folder.name):
            return True
        try:
            shown = (folder / OWNER).read_bytes()
        except FileNotFoundError:
            return False
        now = time.monotonic()
        before, since = self._seen.get(folder, (None, now))
        if shown != before:
            self._seen[folder] = (shown, now)
            return False
        return now - since > self._seconds

    def _beat(self) -> None:
        while not self._ended.wait(min(BEAT_S, self._seconds / 4)):
            with self._lock:
                owned = list(self._owned.items())
            for place, token in owned:
                try:
                    _show(place / token, token)
                except OSError:  # taken over, done with, or the share is gone: whoever works there will meet it
                    continue


def sweep(work: Path) -> None:
    """Remove below `work` what dead processes made there, by its name, and places of slides that nothing is left of.

    Nothing is left either where one died that had claimed a slide and not begun with it: another may have finished that before.
    """
    sweep_temporaries(work)
    for entry in list(work.iterdir()):
        if entry.name.startswith("."):
            if known_dead(entry.name.partition("-")[2]):
                shutil.rmtree(entry, ignore_errors=True)
        elif entry.is_dir():
            with suppress(OSError):  # another was quicker
                for folder in list(entry.iterdir()):
                    if known_dead(folder.name) and [left.name for left in folder.iterdir()] == [OWNER]:
                        (folder / OWNER).unlink()
                        folder.rmdir()
            with suppress(OSError):  # not empty
                entry.rmdir()


def _work_of(place: Path) -> Path | None:
    """The folder of work in `place`; None where there is none. What is no work is removed."""
    try:
        folders = sorted(entry for entry in place.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return None
    for folder in folders:
        if folder.name == FREE or (folder / OWNER).exists():
            return folder
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if folders:
        time.sleep(0.01)  # whoever wrote it may still do
    return None


def _claim_new(place: Path, token: str) -> bool:
    """Put a folder for `token` in `place`, where there is none; whether no other was quicker."""
    drawn = place.with_name(f"{CLAIM}{token}")
    # Not made to last: a claim means nothing after the next boot. What is put into it is, with all that is above.
    (drawn / token).mkdir(parents=True)
    _show(drawn / token, token, create=True)
    try:
        drawn.rename(place)
    except OSError as error:
        shutil.rmtree(drawn, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
        return False
    return True


def _show(folder: Path, token: str, *, create: bool = False) -> None:
    """Say in `folder` who owns it and that it lives now. FileNotFoundError where it is no longer there, even if its name is."""
    owner = asdict(Owner(token, socket.gethostname(), os.getpid()))
    text = json.dumps({**owner, "time": time.time()}).ljust(OWNER_BYTES - 1) + "\n"
    fd = os.open(folder / OWNER, os.O_WRONLY | (os.O_CREAT if create else 0), 0o644)
    try:
        os.pwrite(fd, text.encode(), 0)
    finally:
        os.close(fd)


def _owner(folder: Path) -> Owner:
    """Who owns a folder of work, as far as it has said so."""
    try:
        values = json.loads((folder / OWNER).read_bytes())
        owner = Owner(*(values[name] for name in ("token", "host", "pid")))
    except (OSError, ValueError, LookupError, TypeError):
        owner = None
    # One who has just taken it over may not have shown himself yet.
    return owner if owner is not None and owner.token == folder.name else Owner(folder.name, "", 0)
