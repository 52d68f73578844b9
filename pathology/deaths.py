"""What becomes of a task whose worker died: it runs again, it was the slide's doing, or it was the machine's.

Promise: a slide fails only for what it did twice, the second time alone; what comes from outside fails none, and is borne so
often and no more.
"""

from __future__ import annotations

from pathology.calls import Death, WorkerDied
from pathology.errors import EnvironmentFault, Fault, Reason, one_line
from pathology.schedule import Done

# Workers ended from outside while nothing else ran, in a row, before the run stops: no slide is to blame for that.
KILLS_BORNE = 10
# Slides that hang, in a row and with no region done in between, before the run stops: then what they lie on hangs.
HANGS_BORNE = 5

# How compressors say that they found no memory.
NOT_ENOUGH = "not enough memory"

# Reason and advice for a slide whose task has died twice.
FATAL = {
    Death.CRASH: (Reason.CRASHED, "the file or the model crashes a native library: leave it out, or write the file anew"),
    Death.MEMORY: (Reason.OUT_OF_MEMORY, "give smaller --memory or --batch-size, or allow more with --memory-limit"),
    Death.READ: (Reason.TIMEOUT, "copy the file to another disk, or wait longer with --read-timeout"),
    Death.STILL: (Reason.TIMEOUT, "the model or a library hangs on it; if it is that slow, wait longer with --region-timeout"),
    Death.DEVICE: (Reason.DEVICE_ERROR, "the model's computation fails on its tiles: try --device cpu, which names the error"),
}


def death_of(done: Done) -> Death | None:
    """What ended a task without an answer or an error of its own; None where it had one. Want of memory is no answer."""
    if isinstance(done.error, WorkerDied):
        return done.error.death
    if isinstance(done.error, MemoryError) or (isinstance(done.error, RuntimeError) and NOT_ENOUGH in str(done.error)):
        return Death.MEMORY
    return Death.CRASH if done.died else None


def fatal(done: Done) -> tuple[Reason, str]:
    """Reason and message for the slide of a task that died again, and alone."""
    reason, advice = FATAL[death_of(done) or Death.CRASH]
    return reason, f"{how(done)}, and again when it was tried alone; {advice}"


def how(done: Done) -> str:
    """What is known of a death."""
    return "the worker process died" if done.error is None else one_line(done.error)


class Deaths:
    """Counts what is borne.

    apart  workers are processes that can be replaced
    """

    def __init__(self, apart: bool) -> None:
        self._apart = apart
        self._kills = 0
        self._hung: dict[str, Death | None] = {}  # what each slide hung in

    def counts(self, death: Death, alone: bool) -> bool:
        """Whether a death may be the doing of the task that died; whether it ran `alone`.

        Raises EnvironmentFault where the output hangs, a process cannot be replaced, or too many were killed.
        """
        if death is Death.WRITE and alone:
            message = "the output does not answer; see that its disk or share does, then run the same again"
            raise EnvironmentFault(message, Fault.OUTPUT)
        if death is Death.DEVICE and not self._apart:
            raise EnvironmentFault(
                "the device failed, and this process cannot use it any more; run the same again, with --scheduler processes",
                Fault.DEVICE,
            )
        if death is not Death.KILL:
            return True
        self._kills += alone
        if self._kills >= KILLS_BORNE:
            raise EnvironmentFault(
                f"worker processes were killed {KILLS_BORNE} times in a row before they had done anything; "
                "see who kills them (a limit of the job's or the system's), then run the same again"
            )
        return False

    def survived(self) -> None:
        """A task has ended by itself."""
        self._kills = 0

    def hung(self, slide_id: str, done: Done) -> None:
        """Another slide hangs. Raises EnvironmentFault where too many did in a row."""
        self._hung[slide_id] = death_of(done)
        if len(self._hung) >= HANGS_BORNE:
            raise EnvironmentFault(
                f"{len(self._hung)} slides in a row hung ({how(done)}); see that what they lie on answers, "
                f"then run the same again, or leave them out: {', '.join(self._hung)}",
                Fault.SHARE_GONE,
            )

    @property
    def reads_only(self) -> bool:
        """Whether all that hang do so in reads, so that another slide which opens shows it to be their own doing."""
        return set(self._hung.values()) == {Death.READ}

    def came_on(self) -> None:
        """A region is done: those that hang do so by themselves."""
        self._hung.clear()
