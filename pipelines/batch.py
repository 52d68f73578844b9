"""A run's life: jobs, outcomes, records, exit code. Promise: whatever ends it, the records say how far it came."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from pathology.clock import total
from pathology.durable import make_folders, output_faults
from pathology.errors import EnvironmentFault, Fault, PathologyError, Reason, SlideError, UsageError, one_line
from pathology.events import emit
from pathology.export import can_export
from pathology.job import Job
from pathology.lease import LEASE_S
from pathology.model import ModelSpec
from pathology.outcome import Interrupted, Outcome, Postponed, Progress
from pathology.together import pixels_of
from pathology.trials import needed
from pathology.watch import Limits
from pipelines.bottleneck import bottleneck
from pipelines.config import Settings, cards, make_jobs, tissue_model, tissue_settings
from pipelines.preflight import Found, Preflight
from pipelines.printing import say
from pipelines.room import MIN_FREE_BYTES, Room, size
from pipelines.slides import SlideEntry
from pipelines.stopping import INTERRUPTED
from pipelines.summary import clear_failure, known_failures, write_failure, write_summary

OK, SOME_FAILED, USAGE, ENVIRONMENT = 0, 1, 2, 3

NOTICE = "Research use only: not for diagnosis."


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a run behaves, beside what it computes."""

    scheduler: str = "processes"
    dashboard: str | None = None
    exports: tuple[str, ...] = ()
    retry_failed: bool = False
    max_failures: int | None = None
    allow_failures: int = 0
    log_format: Literal["text", "json"] = "text"
    lease_s: float = LEASE_S
    min_free: int = MIN_FREE_BYTES
    limits: Limits = field(default_factory=Limits)


def exit_code(error: PathologyError) -> int:
    """The exit code for an error that ended a command."""
    if isinstance(error, Interrupted):
        return INTERRUPTED
    if isinstance(error, EnvironmentFault):
        return ENVIRONMENT
    return SOME_FAILED if isinstance(error, SlideError) else USAGE


def run_batch(
    slides: Sequence[SlideEntry],
    models: Sequence[str],
    settings: Settings,
    conduct: Conduct,
    stop: threading.Event,
    seen: Found | None = None,
) -> int:
    """Run all models on all slides and return the exit code; PathologyError where the run as a whole cannot go on, Interrupted
    once `stop` is set.

    seen  what another run has just seen of the slides' headers
    """
    from pathology.device import choose_device, device_count
    from pathology.runner import run

    began = time.monotonic()
    seen = {} if seen is None else seen
    if (finder := tissue_model(settings)) is not None:
        _find_tissue(slides, finder, settings, conduct, stop, seen)
    specs = cards(models, settings)
    if len({s.name for s in specs.values()}) < len(specs):
        raise UsageError(f"two of the models {', '.join(models)} are called the same; give one another name")
    for kind in conduct.exports:
        if not any(can_export(spec.output, kind) for spec in specs.values()):
            outputs = ", ".join(sorted({spec.output for spec in specs.values()}))
            raise UsageError(
                f"results of {', '.join(models)} ({outputs}) cannot be written as {kind}; leave out --export {kind}"
            )
    device = choose_device(settings.device)
    devices = device_count(device) if device == "cuda" else 1
    jobs = make_jobs(slides, specs, settings, device)
    for job in jobs:
        job.stride_px(specs[job.model])
    out = settings.out
    room = Room(out, conduct.min_free)
    room.require()
    make_folders(out / ".work")
    with closing(_Report(len(jobs), conduct.log_format, settings.fast_decode)) as report:
        ids = list(dict.fromkeys(job.slide_id for job in jobs))
        names = [specs[ref].name for ref in models]
        emit(out, "run-begin", {"jobs": len(jobs), "slides": ids, "models": names, "device": device})
        failed, why, fault = 0, "", ""
        try:
            known = known_failures(jobs, {ref: spec.name for ref, spec in specs.items()}, conduct.retry_failed)
            todo = []
            for job in jobs:
                before = known(job)
                if before is None:
                    todo.append(job)
                else:
                    failed += 1
                    _emit_kept(before, specs[job.model].name)
                    report.outcome(before, specs[job.model])
            too_large: list[str] = []  # what to say of results that may not fit
            to_read = {job.slide_id for job in todo if needed(job)}
            preflight = Preflight([slide for slide in slides if slide.slide_id in to_read], settings, seen)

            def progress(step: Progress) -> None:
                if step.event in ("planned", "region") and (lack := room.lack(step.bytes)):
                    too_large.append(f"the result of {step.job.slide_id} {lack}")
                    raise Postponed
                report.progress(step)

            @functools.cache
            def looked_at() -> None:
                preflight.wait(stop)
                most = sum(preflight.most_bytes(job, specs[job.model]) for job in todo if needed(job))
                report.preflight(preflight, most, room.shortage(most))

            def refused(job: Job) -> Outcome | None:
                looked_at()
                error = preflight.failure(job.slide_id)
                return None if error is None else Outcome(job, "failed", reason=error.reason, message=str(error))

            outcomes = run(
                todo,
                conduct.scheduler,
                devices=devices,
                dashboard=conduct.dashboard,
                progress=progress,
                stop=stop,
                known=known,
                lease_s=conduct.lease_s,
                preflight=refused,
                limits=conduct.limits,
            )
            # Closed before the table is made: by then no slide is this process's any more.
            with closing(outcomes), preflight:
                for outcome in outcomes if todo else ():
                    spec = specs[outcome.job.model]
                    _keep(outcome, spec.name, [kind for kind in conduct.exports if can_export(spec.output, kind)])
                    report.outcome(outcome, spec)
                    failed += outcome.status in ("failed", "partial")
                    if conduct.max_failures is not None and failed > conduct.max_failures:
                        why = f"{failed} slides failed or partial, more than --max-failures {conduct.max_failures}"
                        report.line(f"stopped: {why}")
                        break
            if too_large and not why:
                more = f" ({len(too_large) - 1} more may not fit)" if too_large[1:] else ""
                raise EnvironmentFault(too_large[0] + more, Fault.DISK_FULL)
        except BaseException as error:
            why = one_line(error)
            fault = str(error.fault) if isinstance(error, EnvironmentFault) else ""
            raise
        finally:
            if (out / ".work").is_dir():  # else what lay there is gone, maybe unmounted: no second one is begun in its place
                with suppress(EnvironmentFault):  # told below, where it matters more than its event
                    emit(out, "run-end", {"failed": failed, "why": why, "fault": fault})
                write_summary(out)
    report.end(out, failed, time.monotonic() - began, devices)
    return OK if failed <= conduct.allow_failures else SOME_FAILED


def _find_tissue(
    slides: Sequence[SlideEntry], model: str, settings: Settings, conduct: Conduct, stop: threading.Event, seen: Found
) -> None:
    """Let `model` find the tissue of all slides that have no mask of their own, as a run of its own."""
    from pathology.areas import tissue_class
    from pathology.models import load_spec

    spec = load_spec(model)
    tissue_class(spec)
    looked_at = [slide for slide in slides if slide.mask is None]
    if looked_at:
        say(f"tissue by {spec.name}:")
        run_batch(looked_at, [model], tissue_settings(settings, spec), replace(conduct, exports=()), stop, seen)


def _keep(outcome: Outcome, model_name: str, exports: Sequence[str]) -> None:
    """Put an outcome on record, and make the exports that were asked for."""
    job = outcome.job
    if outcome.before:
        _emit_kept(outcome, model_name)
    elif outcome.record is None:
        emit(Path(job.out), "slide-failed", {"slide": job.slide_id, "model": model_name, "reason": outcome.reason})
        write_failure(outcome, model_name)
    if outcome.record is None:
        return
    clear_failure(job, model_name)
    for kind in exports:
        from pathology.export.result import export_result  # brings zarr, which takes as long as all the rest of a run's end

        with output_faults(job.result_folder(model_name)):
            export_result(job.result_folder(model_name), kind)


def _emit_kept(outcome: Outcome, model_name: str) -> None:
    reason = outcome.reason if outcome.record is None else outcome.record["reason"]
    what = {"slide": outcome.job.slide_id, "model": model_name}
    emit(Path(outcome.job.out), "slide-kept", {**what, "status": outcome.status, "reason": reason})


class _Report:
    """What a person, or a log, sees of a run: a bar on a terminal, a line a slide, a line at the end."""

    def __init__(self, jobs: int, log_format: Literal["text", "json"], fast_decode: bool) -> None:
        self._jobs = jobs
        self._fast_decode = fast_decode
        self._ended = 0
        self._reasons: Counter[str] = Counter()
        self._times: dict[object, list[dict[str, Any]]] = {}  # of what was computed in this run, by what was read for it
        self._json = log_format == "json"
        self._bar = tqdm(total=0, unit="tile", disable=None if not self._json else True, smoothing=0.05, file=sys.stderr)
        self._describe()

    def progress(self, step: Progress) -> None:
        if step.event == "in-place":
            self._in_place(step)
        elif step.event == "waiting":
            self._waiting(step)
        elif step.event == "planned":
            self._bar.total += step.tiles
            self._bar.refresh()
        else:
            self._bar.update(step.tiles)

    def preflight(self, found: Preflight, most_bytes: int, shortage: str) -> None:
        """A line for what the look at many slides has shown; none for few, of which each says so itself."""
        if not found.many:
            return
        failures = found.failures()
        if self._json:
            facts = {"event": "preflight", "slides": found.slides, "looked_at": found.looked_at, "reasons": failures}
            self.line(json.dumps({**facts, "most_bytes": most_bytes, "fits": not shortage, "seconds": round(found.seconds, 3)}))
            return
        good = found.looked_at - sum(failures.values())
        told = ", ".join([f"{good} can be read", *(f"{count} {reason}" for reason, count in failures.items())])
        rest = f"; the other {left} when their turn comes" if (left := found.slides - found.looked_at) else ""
        self.line(
            f"preflight: {found.looked_at} slides in {found.seconds:.1f} s: {told}{rest}; "
            f"results take {size(most_bytes)} at most{shortage}"
        )

    def _in_place(self, step: Progress) -> None:
        if self._json:
            self.line(json.dumps({"event": "in-place", "slide": step.job.slide, "id": step.job.slide_id, "why": step.message}))
        else:
            self.line(f"in place  {step.job.slide_id}  is read where it lies: {step.message}")

    def _waiting(self, step: Progress) -> None:
        if self._json:
            self.line(json.dumps({"event": "waiting", "slide": step.job.slide, "id": step.job.slide_id, "for": step.message}))
        else:
            self.line(f"waits for {step.message}: slide {step.job.slide_id}")

    def outcome(self, outcome: Outcome, spec: ModelSpec) -> None:
        model_name = spec.name
        self._ended += 1
        self._describe()
        job, record = outcome.job, outcome.record
        if reason := (outcome.reason if record is None else record["reason"]):
            self._reasons[reason] += 1
        if record is not None and not outcome.before and "time" in record:
            self._times.setdefault((job.slide_id, *pixels_of(spec)), []).append(record["time"])
        if self._json:
            facts: dict[str, Any] = {
                "event": "slide",
                "slide": job.slide,
                "id": job.slide_id,
                "model": model_name,
                "status": outcome.status,
            }
            facts |= {"reason": outcome.reason or "", "message": outcome.message, "before": outcome.before}
            if record is not None:
                facts |= {"reason": record["reason"] or "", "message": record["message"]}
                facts |= {name: record[name] for name in ("tiles", "bad_tiles", "tissue_mm2", "seconds")}
                facts |= {"halved_to": record.get("halved_to")}
            self.line(json.dumps(facts))
        elif record is not None:
            before = "   done before" if outcome.before else ""
            found = f"   {record['detections']} found" if "detections" in record else ""
            tissue = f"{record['tiles']} tiles   {record['tissue_mm2']:.2f} mm2{found}"
            damage = f"   {record['reason']}: {record['message']}" if record["reason"] else ""
            halved = f"   memory ran out: batches of {n} tiles" if (n := record.get("halved_to")) else ""
            spent = f"{record['seconds']:.1f} s"
            self.line(f"{outcome.status:<8}  {job.slide_id}  {model_name}   {tissue}   {spent}{halved}{damage}{before}")
        else:
            again = "   (failed before; --retry-failed tries again)" if outcome.before else ""
            self.line(f"failed    {job.slide_id}  {model_name}   {outcome.reason}: {outcome.message}{again}")

    def line(self, text: str) -> None:
        with self._bar.external_write_mode(file=sys.stdout):
            say(text)

    def close(self) -> None:
        self._bar.close()

    def end(self, out: Path, failed: int, seconds: float, devices: int) -> None:
        stages = total(spent["stages"] for together in self._times.values() for spent in together)
        working_s = sum(max(spent["wall_s"] for spent in together) for together in self._times.values())
        if self._json:
            facts = {
                "event": "end",
                "jobs": self._jobs,
                "failed": failed,
                "reasons": self._reasons,
                "seconds": round(seconds, 3),
            }
            say(json.dumps({**facts, "stages": stages, "working_s": round(working_s, 3), "devices": devices}))
            return
        done = self._ended - failed
        say(f"{done} of {self._jobs} done, {failed} failed or partial, in {seconds:.1f} s: {out / 'summary.csv'}")
        for reason, count in self._reasons.most_common():
            say(f"{count} {reason}: {Reason(reason).meaning}; {Reason(reason).remedy}".replace("`", ""))
        if line := bottleneck(stages, working_s, seconds * devices, self._fast_decode):
            say(line)
        say(NOTICE)

    def _describe(self) -> None:
        self._bar.set_description(f"{self._ended}/{self._jobs} slides", refresh=False)
