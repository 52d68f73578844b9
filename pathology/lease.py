"""Which process works on a slide: one at a time, of any number on any hosts, on file systems that know no locks.

Promise: a slide's work lies in a folder named by its owner. Who takes it over renames that folder, so whatever a former owner
still does, and be it a rename that comes hours late, finds its paths gone and changes nothing.

Only two properties of the file system are needed: renaming a folder is atomic, and replaces another only if that is empty.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pathology.durable import make_folders, output_faults

# An owner shows every BEAT_S that it lives. One that was not seen to for LEASE_S, by the clock of who waits, is taken for dead.
BEAT_S = 5.0
LEASE_S = 60.0
# Name of the folder of work that nobody owns.
FREE = "free"
OWNER = "owner.json"
CLAIM = ".claim-"


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that works on slides. `token` is unlike any other's; the rest tells on its own host whether it still lives."""

    token: str
    host: str
    pid: int
    boot: str
    started: str

    @staticmethod
    def here() -> Owner:
        """This process, under a new token."""
        return Owner(uuid.uuid4().hex[:16], socket.gethostname(), os.getpid(), _boot(), _started(os.getpid()))

    def known_dead(self) -> bool:
        """Whether it is certain that it has ended: it ran on this host, and does no more."""
        here = self.host == socket.gethostname() and self.boot != "" and self.boot == _boot()
        return here and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Leases:
    """The slides of one run that this process owns, and a look at those that others do.

    seconds  after which an owner that does not show itself is taken for dead
    """

    def __init__(self, seconds: float = LEASE_S) -> None:
        self.owner = Owner.here()
        self._seconds = seconds
        self._owned: set[Path] = set()
        self._seen: dict[Path, tuple[bytes, float]] = {}  # what an owner last showed, and since when
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._thread: threading.Thread | None = None

    def claim(self, work: Path, slide_id: str) -> Owner | None:
        """Make this process the owner of a slide's work below `work`. None where it is now, else who is."""
        place, mine = work / slide_id, self.owner.token
        while True:
            with output_faults(place):
                holder = self._holder(place)
                if holder is None:
                    if self._claim_new(work, place):
                        self._own(place)
                        return None
                    continue
                folder, owner = holder
                if folder.name == mine:
                    return None
                if folder.name != FREE and not self._gone(folder, owner):
                    return owner
                try:
                    folder.rename(place / mine)
                except FileNotFoundError:
                    continue  # another was quicker
                self._show(place / mine)
                self._own(place)
                return None

    def owns(self, work: Path, slide_id: str) -> bool:
        """Whether the slide's work is still this process's."""
        return (work / slide_id / self.owner.token).is_dir()

    def release(self, work: Path, slide_id: str) -> None:
        """Let others have the slide: what is unfinished becomes free, and nothing remains of what is done."""
        place = work / slide_id
        with self._lock:
            self._owned.discard(place)
        mine = place / self.owner.token
        with suppress(FileNotFoundError), output_faults(place):
            (mine / OWNER).unlink(missing_ok=True)
            if any(mine.iterdir()):
                mine.rename(place / FREE)
            else:
                mine.rmdir()
                with suppress(OSError):  # another may just have claimed it anew
                    place.rmdir()

    def close(self) -> None:
        """Release all that is owned, and show no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for place in list(self._owned):
            self.release(place.parent, place.name)

    def _holder(self, place: Path) -> tuple[Path, Owner | None] | None:
        """The folder in `place` and who owns it, if that is known; None where there is none."""
        try:
            folders = sorted(entry for entry in place.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return None
        if not folders:
            return None
        owner = _read(folders[0] / OWNER)
        # One who has just taken it over may not have shown himself yet.
        return folders[0], owner if owner is not None and owner.token == folders[0].name else None

    def _claim_new(self, work: Path, place: Path) -> bool:
        """Put a folder of this process's own in `place`, where there is none; whether no other was quicker."""
        drawn = work / f"{CLAIM}{self.owner.token}"
        shutil.rmtree(drawn, ignore_errors=True)
        make_folders(drawn / self.owner.token)
        self._show(drawn / self.owner.token)
        try:
            drawn.rename(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(drawn, ignore_errors=True)
            return False
        return True

    def _own(self, place: Path) -> None:
        with self._lock:
            self._owned.add(place)
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
                self._thread.start()

    def _gone(self, folder: Path, owner: Owner | None) -> bool:
        """Whether whoever owns `folder` is dead, or has not shown itself for as long as it would have been waited for."""
        if owner is not None and owner.known_dead():
            return True
        try:
            shown = (folder / OWNER).read_bytes()
        except FileNotFoundError:
            shown = b""
        now = time.monotonic()
        before, since = self._seen.get(folder, (None, now))
        if shown != before:
            self._seen[folder] = (shown, now)
            return False
        return now - since > self._seconds

    def _beat(self) -> None:
        while not self._ended.wait(min(BEAT_S, self._seconds / 4)):
            with self._lock:
                owned = list(self._owned)
            self._beats += 1
            for place in owned:
                try:
                    self._show(place / self.owner.token)
                except OSError:  # taken over, done with, or the share is gone: whoever works there will meet it
                    continue

    def _show(self, folder: Path) -> None:
        temporary = folder / f"{OWNER}.tmp"
        temporary.write_text(json.dumps({**asdict(self.owner), "beat": self._beats}))
        temporary.replace(folder / OWNER)


def sweep(work: Path) -> None:
    """Remove below `work` what dead processes drew up and never claimed, and places of slides that nothing is left of."""
    for entry in list(work.iterdir()):
        if not entry.is_dir():
            continue
        if entry.name.startswith(CLAIM):
            owner = _read(entry / entry.name.removeprefix(CLAIM) / OWNER)
            if owner is not None and owner.known_dead():
                shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):  # not empty
                entry.rmdir()


def _read(path: Path) -> Owner | None:
    try:
        values = json.loads(path.read_bytes())
        return Owner(*(values[name] for name in ("token", "host", "pid", "boot", "started")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _boot() -> str:
    """What tells the system on which process numbers mean something from all others, containers included; "" where unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this host began, in the system's ticks, which tells it from others of its number; "" for none."""
    try:
        # The second field is the program's name in parentheses, in which anything may stand.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
