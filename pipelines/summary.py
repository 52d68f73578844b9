"""`summary.csv` and the records of failed slides. Promise: the table is made anew from the records of all slides, so a resumed
run, and one of many that end at the same time, keeps every row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, sweep_temporaries, write_file
from pathology.errors import Reason, SlideError, UsageError
from pathology.finish import RESULT, read_record
from pathology.job import FREE, Job, key_of
from pathology.outcome import Outcome
from pathology.records import check_fields, read_object

SCHEMA = 1
# Of a job: what changes no answer.
NOT_ASKED = ("stage", "stage_bytes", "threads", "readers", "hash_input", "owner")
FAILED = "failed.json"
FIRST_COLUMNS = ("slide", "id", "model", "status", "reason", "message", "tiles", "bad_tiles", "tissue_mm2")


def write_failure(outcome: Outcome, model_name: str) -> None:
    """Keep a failure where the job's unfinished work lies; the job's success removes both."""
    job = outcome.job
    record = {
        "schema": SCHEMA,
        "slide": job.slide,
        "slide_id": job.slide_id,
        "model": model_name,
        "status": "failed",
        "reason": outcome.reason,
        "message": outcome.message,
        "asked": _asked(job),
        "columns": dict(job.columns),
    }
    folder = job.work_folder(model_name)
    with suppress(FileNotFoundError):  # the slide was taken over meanwhile: it is another's to tell how it ended
        make_folders(folder, within=None if job.owner == FREE else folder.parent)
        write_file(folder / FAILED, json.dumps(record).encode())


def read_failure(job: Job, model_name: str) -> Outcome | None:
    """The failure of any run of this very job on this very file; None if anything about it has changed."""
    path = _failure(job, model_name)
    try:
        record = {} if path is None else read_object(path)
        if record["schema"] != SCHEMA or record["asked"] != _asked(job):
            return None
        return Outcome(job, "failed", reason=Reason(record["reason"]), message=record["message"], before=True)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def known_failures(jobs: Sequence[Job], model_names: Mapping[str, str], retry: bool) -> Callable[[Job], Outcome | None]:
    """What gives the failure of a job that stands: any, or with `retry` one that another process has met since now.

    model_names  by the reference that jobs have
    """
    before = {(job.slide_id, job.model): _stamp(job, model_names[job.model]) for job in jobs if retry}

    def known(job: Job) -> Outcome | None:
        name = model_names[job.model]
        return None if retry and _stamp(job, name) == before[job.slide_id, job.model] else read_failure(job, name)

    return known


def clear_failure(job: Job, model_name: str) -> None:
    (job.work_folder(model_name) / FAILED).unlink(missing_ok=True)


def write_summary(out: Path) -> Path:
    """Write `<out>/summary.csv`: a row a slide and model, finished or failed, by id and model. Of a record that is damaged, or
    of another version, the row says so.

    Others may write it at the same time: the last one to do so has seen all that had ended before.
    """
    path = out / "summary.csv"
    sweep_temporaries(out)
    written = None
    while written != (table := _table(out)):
        write_file(path, table)
        written = path.read_bytes()
    return path


def _table(out: Path) -> bytes:
    records = sorted(_records(out), key=lambda r: (r["slide_id"], r["model"]))
    classes = list(dict.fromkeys(name for r in records for name in r.get("classes", {})))
    own = list(dict.fromkeys(name for r in records for name in r["columns"]))
    counted = any("count" in found for r in records for found in r.get("classes", {}).values())
    what = ("mean", "max", "area_mm2", *(("count",) if counted else ()))
    statistics = [f"{name}_{of_class}" for name in classes for of_class in what]
    columns = [*FIRST_COLUMNS, *statistics, "seconds"]
    columns += [name if name not in columns else f"{name}_" for name in own]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        values = [record.get(n if n != "id" else "slide_id", "") for n in FIRST_COLUMNS]
        for name in classes:
            found = record.get("classes", {}).get(name, {})
            values += [found.get(of_class) for of_class in what]
        values += [record.get("seconds"), *(record["columns"].get(name, "") for name in own)]
        writer.writerow(["" if v is None else v for v in values])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _records(out: Path) -> Iterator[dict[str, Any]]:
    done: set[tuple[str, str]] = set()
    lost: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted((out / "slides").glob(f"*/*/{RESULT}")):
        try:
            record = read_record(path.parent)
        except (SlideError, UsageError) as error:
            id_and_model = path.parent.parent.name, path.parent.name
            lost[id_and_model] = _lost_row(*id_and_model, str(error))
            continue
        if record is not None:
            done.add((record["slide_id"], record["model"]))
            yield record
    failed: set[tuple[str, str]] = set()
    for path in sorted((out / ".work").glob(f"*/*/*/{FAILED}")):
        try:
            record = read_object(path)
            check_fields(record, {"slide_id": str, "model": str, "columns": dict})
        except (FileNotFoundError, ValueError):
            continue
        if (record["slide_id"], record["model"]) not in done:
            failed.add((record["slide_id"], record["model"]))
            yield record
    yield from (row for pair, row in lost.items() if pair not in failed | done)


def _lost_row(slide_id: str, model: str, message: str) -> dict[str, Any]:
    """The row of a result whose record cannot be read: which slide it was, its folder's name alone tells."""
    row = {"slide_id": slide_id, "model": model, "status": "failed", "reason": Reason.CHANGED, "message": message}
    return {**row, "columns": {}}


def _failure(job: Job, model_name: str) -> Path | None:
    """Where a failure of the job is kept, whoever owns its slide now."""
    return next(iter(job.work_place.glob(f"*/{model_name}/{FAILED}")), None)


def _stamp(job: Job, model_name: str) -> tuple[int, int] | None:
    """What tells a record of a failure from a later one."""
    path = _failure(job, model_name)
    with suppress(FileNotFoundError):
        if path is not None:
            state = path.stat()
            return state.st_ino, state.st_mtime_ns
    return None


def _asked(job: Job) -> str:
    """A hash of all that was asked and of the file as it lay there: a failure stands only as long as neither changes.

    Where the slide is copied to for reading, and which process works on it, is not asked of the result; threads and readers are
    measured anew by every run.
    """
    asked = {name: value for name, value in asdict(job).items() if name not in NOT_ASKED}
    try:
        state = Path(job.slide).stat()
    except (OSError, ValueError):  # gone, or a path that no file can have
        return key_of({"job": asked})
    return key_of({"job": asked, "bytes": state.st_size, "modified": state.st_mtime_ns})
