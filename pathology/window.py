"""The bounded window of tasks: which one runs next, and what the end of each means for its slide and for the run.

Promise: each region of each job is handed out once, or again alone if its worker died; every job ends with one outcome,
unless it is postponed; and no more slides are begun than keep the devices busy.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pathology import slide_worker, worker
from pathology.calls import Death
from pathology.deaths import Deaths, death_of, fatal, how
from pathology.durable import DISK_ERRORS
from pathology.errors import EnvironmentFault, Fault, ModelError, Reason, SlideError, UsageError, first_line
from pathology.events import emit
from pathology.faults import used_up
from pathology.job import Job
from pathology.lease import Leases, Owner
from pathology.outcome import Interrupted, Outcome, Postponed, Progress
from pathology.pending import Group, State, Task
from pathology.schedule import Done, Tasks
from pathology.staging import Stage
from pathology.trials import needed, try_models
from pathology.turns import Turns

# Slides whose plan is made ahead of their regions' turn.
SLIDES_AHEAD = 2
# Token of the task that looks at the first slide while the model is loaded.
LOOK = "look"
# Tasks in the window that begin or end slides, beside twice the regions that run.
BESIDE = 2
# After a stop, this long for tasks that run to end by themselves.
DRAIN_S = 7.0

# On the tasks' queue: no task has ended, but something else has changed.
_WAKE = object()


class Window:
    """The bounded window of tasks over all jobs, in order; later jobs begin while earlier ones end."""

    def __init__(
        self,
        jobs: Sequence[Job],
        tasks: Tasks,
        progress: Callable[[Progress], None],
        stop: threading.Event,
        processes: int,  # that share a machine's cores
        stage: Stage | None,
        leases: Leases,
        known: Callable[[Job], Outcome | None],
        preflight: Callable[[Job], Outcome | None],
    ) -> None:
        self._processes = processes
        self._states = [State(job) for job in jobs]
        self._turns = Turns(leases, jobs, self._waits_for)
        self._known = known
        self._preflight = preflight
        self._refused: dict[int, Outcome] = {}  # by the place of their job
        self._found: deque[tuple[int, Outcome]] = deque()  # failures that stand, by the place of their job
        self._group: dict[int, Group] = {}  # by the place of a job
        self._tasks = tasks
        self._progress = progress
        self._stop = stop
        self._stage = stage
        self._running: set[Task] = set()
        self._active: deque[Group] = deque()  # groups with regions to hand out, in order
        self._first: deque[Task] = deque()  # ends of slides, before anything else
        self._suspects: deque[Task] = deque()  # tasks whose worker died: each runs alone
        self._looking = False  # the first look is under way
        self._deaths = Deaths(tasks.apart)
        self._hung: list[tuple[int, Outcome]] = []  # failures of slides that hang, until it is clear that others do not

    def outcomes(self) -> Iterator[Outcome]:
        self._check_models()
        if self._stage is not None:
            self._stage.start(
                lambda job: needed(job) and self._turns.claim_ahead(job), lambda: self._tasks.done.put(Done(_WAKE))
            )
        room = 1 if self._tasks.in_order else 2 * self._tasks.slots() + BESIDE
        while True:
            if self._stop.is_set():
                self._drain()
                raise Interrupted("the run was stopped; finished regions are kept: run the same command again to go on")
            while (task := self._choose(room)) is not None:
                self._submit(task)
            while self._found:
                place, outcome = self._found.popleft()
                yield outcome
                self._let_go(place)
            if not self._running and self._turns.over:
                if not self._hung:
                    return
                self._tell_hung()
                continue
            try:
                done = self._tasks.done.get(timeout=0.2)
            except queue.Empty:
                continue
            if done.token is _WAKE or done.token == LOOK:
                continue
            yield from self._handle(done)

    def _check_models(self) -> None:
        """Try each model once, and queue the jobs as they are run together."""
        if self._states and self._tasks.apart:
            # While one process loads torch for the first model, another can look at the first slide.
            self._tasks.submit(LOOK, slide_worker.look, replace(self._states[0].job, stage=None), kind="slides")
            self._looking = True
        jobs, together = try_models([state.job for state in self._states], self._alone, self._processes)
        for state, job in zip(self._states, jobs, strict=True):
            state.job = job
        refused = ((place, self._preflight(job)) for place, job in enumerate(jobs))
        self._refused = {place: outcome for place, outcome in refused if outcome is not None}
        self._turns.queue(sorted(together, key=lambda places: not all(place in self._refused for place in places)))

    def _alone(self, function: Callable[..., object], *arguments: object) -> Done:
        """Run `function` as a task while nothing else runs but a first look, and wait for its end.

        A death that may be the look's doing, or that came from outside, does not count.
        """
        while True:
            beside = self._looking
            done = self._once(function, *arguments)
            if not done.died or (self._deaths.counts(death_of(done) or Death.CRASH, alone=not beside) and not beside):
                return done

    def _once(self, function: Callable[..., object], *arguments: object) -> Done:
        self._tasks.submit(None, function, *arguments)
        while True:
            try:
                done = self._tasks.done.get(timeout=0.2)
            except queue.Empty:
                if self._stop.is_set():
                    raise Interrupted("the run was stopped before it began") from None
                continue
            if done.token is None:
                return done
            self._looking &= done.token != LOOK

    def _choose(self, room: int) -> Task | None:
        """The next task to submit, None for none now."""
        if self._suspects:
            return self._suspects.popleft() if not self._running else None
        if any(task.alone for task in self._running) or len(self._running) >= room:
            return None
        if self._first:
            return self._first.popleft()
        preparing = sum(task.kind == "prepare" for task in self._running)
        if len(self._active) + preparing < SLIDES_AHEAD and (task := self._begin_next()) is not None:
            return task
        while self._active:
            group = self._active[0]
            while group.reads:
                parts = tuple(part for part in group.reads.popleft() if not self._states[part[0]].ended)
                for place, region in parts:
                    self._states[place].todo.remove(region)
                if parts:
                    return Task("region", parts)
            self._active.popleft()
        return self._begin_next() if preparing < SLIDES_AHEAD else None

    def _begin_next(self) -> Task | None:
        """Begin the next group whose slide can be had and that is not known to fail; None where there is none now."""
        while self._next_is_ready():
            turn = self._turns.begin(idle=not self._running)
            if turn is None:
                continue
            places, token = turn
            begun: list[int] = []
            for place in places:
                state = self._states[place]
                state.job = replace(state.job, owner=token)
                if state.ended:
                    continue
                if (outcome := self._known(state.job) or self._refusal(place)) is None:
                    begun.append(place)
                else:
                    state.ended = True
                    self._found.append((place, outcome))
            if begun:
                self._group.update(dict.fromkeys(places, Group(places, len(begun))))
                return Task("prepare", tuple((place, -1) for place in begun))
        return None

    def _next_is_ready(self) -> bool:
        """Whether there is a group to begin and its slide lies where it will be read."""
        group = self._turns.next()
        if group is None or self._stage is None or all(place in self._refused for place in group):
            return group is not None
        return self._stage.ready(group[0], SLIDES_AHEAD)

    def _refusal(self, place: int) -> Outcome | None:
        """The failure that the look at a job's slide has shown, unless another process has finished it nevertheless."""
        refused, job = self._refused.get(place), self._states[place].job
        return None if refused is None or not needed(job) else replace(refused, job=job)

    def _waits_for(self, place: int, owner: Owner) -> None:
        self._progress(Progress("waiting", self._states[place].job, 0, str(owner)))

    def _submit(self, task: Task) -> None:
        self._running.add(task)
        for place, _ in task.parts:
            self._states[place].running += 1
        places, regions = zip(*task.parts, strict=True)
        jobs = self._jobs(places)
        if task.kind == "prepare":
            for place in places:
                self._report_staging(place)
            together = self._jobs(self._group[places[0]].places)
            self._tasks.submit(task, slide_worker.prepare_all, jobs, together, kind="slides")
        elif task.kind == "region":
            self._tasks.submit(task, worker.run_regions, jobs, regions, self._tasks.in_order)
        else:
            self._tasks.submit(task, slide_worker.finish_slide, *jobs, kind="slides")

    def _jobs(self, places: Iterable[int]) -> tuple[Job, ...]:
        """Jobs as a task is told of them: with the place of their slide's copy, once there is one."""
        stage = self._stage
        return tuple(replace(self._states[p].job, stage=None if stage is None else stage.folder(p)) for p in places)

    def _report_staging(self, place: int) -> None:
        copy = None if self._stage is None else self._stage.begun(place)
        if copy is None:
            return
        job = self._states[place].job
        if copy.bytes:
            fields = {"slide": job.slide_id, "bytes": copy.bytes, "seconds": round(copy.seconds, 6)}
            emit(Path(job.out), "slide-staged", fields)
        elif copy.why:
            emit(Path(job.out), "slide-in-place", {"slide": job.slide_id, "why": copy.why})
            self._progress(Progress("in-place", job, 0, copy.why))

    def _handle(self, done: Done) -> Iterator[Outcome]:
        task = done.token
        assert isinstance(task, Task)
        self._running.discard(task)
        for place, _ in task.parts:
            self._states[place].running -= 1
        for number, (place, region) in enumerate(task.parts):
            state = self._states[place]
            end = done
            if done.error is None and task.kind != "finish":
                value = done.value[number]
                end = Done(task, error=value) if isinstance(value, Exception) else Done(task, value=value)
            outcome = self._consider(replace(task, parts=((place, region),)), state, end)
            if outcome is not None:
                state.ended = True
                yield outcome
            self._let_go(place)
        self._come_again(task.parts[0][0])

    def _let_go(self, place: int) -> None:
        """Free what a job held, if it has ended: after its outcome is on record, and when no task of it runs."""
        state = self._states[place]
        if not state.ended or state.running or any(place == hung for hung, _ in self._hung):
            return
        if self._stage is not None:
            self._stage.end(place)
        self._turns.end(place)

    def _consider(self, task: Task, state: State, done: Done) -> Outcome | None:
        """What a task's end means for one job; the outcome if the job has ended with it."""
        ((place, region),) = task.parts
        failed = done.died or done.error is not None
        if state.ended or (state.lost and (failed or task.kind != "finish")):
            return None
        if not done.died:
            self._deaths.survived()
        if (death := death_of(done)) is not None and self._comes_again(task, death):
            return None
        if failed and not self._turns.owns(state.job):
            self._lose(place)
            return None
        if task.kind == "prepare":
            return self._prepared(place, state, done)
        if failed:
            return self._failed(place, state, done)
        self._tell_hung()
        if task.kind == "finish":
            return Outcome(state.job, done.value["status"], done.value)
        self._progress(Progress("region", state.job, state.tiles[region]))
        waiting = any(place == other for task in self._suspects for other, _ in task.parts)
        if not state.todo and not state.running and not waiting:
            self._first.append(Task("finish", task.parts))
        return None

    def _comes_again(self, task: Task, death: Death) -> bool:
        """Whether a task whose worker died runs again, alone: any of those on that worker may be the culprit, so only a second
        death counts. EnvironmentFault where that is of no use."""
        counts = self._deaths.counts(death, task.alone)
        if counts and task.deaths:
            return False
        self._suspects.append(replace(task, alone=True, deaths=task.deaths + counts))
        return True

    def _tell_hung(self) -> None:
        """Let slides that hang have failed: others do not."""
        self._deaths.came_on()
        self._found.extend(self._hung)
        self._hung.clear()

    def _lose(self, place: int) -> None:
        """Drop what is under way of a slide that another process has taken over: its errors are no fault of the slide."""
        for other in self._turns.beside(place):
            self._states[other].lost = True
            self._states[other].todo.clear()
        self._first = deque(task for task in self._first if not self._is_lost(task.parts))
        self._suspects = deque(task for task in self._suspects if not self._is_lost(task.parts))
        self._active = deque(group for group in self._active if not any(self._states[p].lost for p in group.places))

    def _is_lost(self, parts: Iterable[tuple[int, int]]) -> bool:
        return any(self._states[place].lost for place, _ in parts)

    def _come_again(self, place: int) -> None:
        """Let a lost slide come again, once no task of it runs."""
        jobs = [self._states[other] for other in self._turns.beside(place)]
        if any(state.lost for state in jobs) and not any(state.running for state in jobs):
            for state in jobs:
                state.lost = False
            self._turns.again(place)

    def _prepared(self, place: int, state: State, done: Done) -> Outcome | None:
        group = self._group[place]
        group.left -= 1
        outcome = None
        if done.error is not None:
            outcome = self._failed(place, state, done)
        elif done.value.record is not None:
            outcome = Outcome(state.job, done.value.record["status"], done.value.record, before=True)
        else:
            self._begun(place, state, done.value)
        if not group.left and group.begun:
            group.reads.extend(_reads(group.begun))
            self._active.append(group)
        return outcome

    def _begun(self, place: int, state: State, prepared: slide_worker.Prepared) -> None:
        if self._deaths.reads_only:
            self._tell_hung()
        try:
            self._progress(Progress("planned", state.job, sum(prepared.tiles), bytes=prepared.bytes))
        except Postponed:
            state.ended = True
            return
        state.todo = set(prepared.todo)
        state.tiles = dict(zip(prepared.todo, prepared.tiles, strict=True))
        if state.todo:
            self._group[place].begun[place] = prepared
        else:
            self._first.append(Task("finish", ((place, -1),)))

    def _failed(self, place: int, state: State, done: Done) -> Outcome | None:
        error = done.error
        if isinstance(error, (EnvironmentFault, UsageError)):
            raise error
        if (fault := used_up(error)) is not None:
            raise fault from error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            what = "a disk or share" if error.filename is None else f"the disk or share of {error.filename}"
            raise EnvironmentFault(f"{what} does not answer: {error.strerror}; see to it, then run the same again") from error
        if death_of(done) is not None:
            return self._died(place, state, done)
        if isinstance(error, SlideError):
            return Outcome(state.job, "failed", reason=error.reason, message=str(error))
        reason = Reason.MODEL_ERROR if isinstance(error, ModelError) else Reason.INTERNAL
        assert error is not None
        return Outcome(state.job, "failed", reason=reason, message=first_line(error))

    def _died(self, place: int, state: State, done: Done) -> Outcome | None:
        """The outcome of a job whose worker died again, and alone; None where it is not yet known whether that was its doing.

        Raises EnvironmentFault where others would do no better.
        """
        if death_of(done) is Death.DEVICE:
            probe = self._alone(worker.check_model, replace(state.job, stage=None))
            if probe.died or probe.error is not None:
                message = f"{how(done)}, and in a new process again; see that it works, then run the same again"
                raise EnvironmentFault(message, Fault.DEVICE)
        reason, message = fatal(done)
        outcome = Outcome(state.job, "failed", reason=reason, message=message)
        if reason is not Reason.TIMEOUT:
            return outcome
        self._deaths.hung(state.job.slide_id, done)
        state.ended = True
        self._hung.append((place, outcome))
        return None

    def _drain(self) -> None:
        """Let running tasks end, for a while; what they stage is kept."""
        end = time.monotonic() + DRAIN_S
        while self._running and (left := end - time.monotonic()) > 0:
            try:
                done = self._tasks.done.get(timeout=left)
            except queue.Empty:
                return
            if isinstance(done.token, Task):
                self._running.discard(done.token)


def _reads(begun: dict[int, slide_worker.Prepared]) -> list[tuple[tuple[int, int], ...]]:
    """The regions of jobs by their place in the run, those that lie in one place of the slide together, in order."""
    together: dict[slide_worker.Cell, list[tuple[int, int]]] = {}
    for place, prepared in begun.items():
        for region, cell in zip(prepared.todo, prepared.cells, strict=True):
            together.setdefault(cell, []).append((place, region))
    return [tuple(together[cell]) for cell in sorted(together)]
