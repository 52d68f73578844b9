"""`summary.csv` and the records of failed slides. Promise: the table is made anew from the records of all slides, so a resumed
run keeps every row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, write_file
from pathology.errors import Reason
from pathology.finish import RESULT, read_record
from pathology.job import Job, key_of
from pathology.records import check_fields, read_object
from pathology.runner import Outcome

SCHEMA = 1
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
    make_folders(folder)
    write_file(folder / FAILED, json.dumps(record).encode())


def read_failure(job: Job, model_name: str) -> Outcome | None:
    """The failure of an earlier run of this very job on this very file; None if anything about it has changed."""
    try:
        record = read_object(job.work_folder(model_name) / FAILED)
        if record["schema"] != SCHEMA or record["asked"] != _asked(job):
            return None
        return Outcome(job, "failed", reason=Reason(record["reason"]), message=record["message"], before=True)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def clear_failure(job: Job, model_name: str) -> None:
    (job.work_folder(model_name) / FAILED).unlink(missing_ok=True)


def write_summary(out: Path) -> Path:
    """Write `<out>/summary.csv`: a row a slide and model, finished or failed, by id and model."""
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
    path = out / "summary.csv"
    write_file(path, text.getvalue().encode("utf-8", "backslashreplace"))
    return path


def _records(out: Path) -> Iterator[dict[str, Any]]:
    done: set[tuple[str, str]] = set()
    for path in sorted((out / "slides").glob(f"*/*/{RESULT}")):
        record = read_record(path.parent)
        if record is not None:
            done.add((record["slide_id"], record["model"]))
            yield record
    for path in sorted((out / ".work").glob(f"*/*/{FAILED}")):
        try:
            record = read_object(path)
            check_fields(record, {"slide_id": str, "model": str, "columns": dict})
        except (FileNotFoundError, ValueError):
            continue
        if (record["slide_id"], record["model"]) not in done:
            yield record


def _asked(job: Job) -> str:
    """A hash of all that was asked and of the file as it lay there: a failure stands only as long as neither changes.

    Where the slide is copied to for reading is not asked of the result, and threads and readers are measured anew by every run.
    """
    asked = {name: value for name, value in asdict(job).items() if name not in ("stage", "stage_bytes", "threads", "readers")}
    try:
        state = Path(job.slide).stat()
    except OSError:
        return key_of({"job": asked})
    return key_of({"job": asked, "bytes": state.st_size, "modified": state.st_mtime_ns})
