"""Runs one job again and again in forked children, each killed at its n-th file operation and then resumed. Needs the shim.

    LD_PRELOAD=shim.so python crash_runner.py SHIM SLIDE MODEL FOLDER [overwrite]

Prints one JSON line: {"operations", "killed", "wrong": [[n, what], ...]}. A fork costs far less than a start with all imports.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import openslide  # noqa: F401  # here and below: imported once, before the forks
import PIL.ImageFont  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401

import pathology.readers.openslide_reader  # noqa: F401
from pathology.events import read_events
from pathology.job import Job
from pathology.runner import run

shim = ctypes.CDLL(sys.argv[1])


def child(job: Job, kill_at: int, report: Path | None = None) -> int:
    """The wait status of a process that runs the job, killed at operation `kill_at` (0: not at all)."""
    pid = os.fork()
    if pid == 0:
        shim.kill_arm(job.out.encode(), kill_at)
        try:
            statuses = [outcome.status for outcome in run([job], "sync")]
        except BaseException as error:
            os.write(2, f"{kill_at}: {error!r}\n".encode())
            os._exit(2)
        if report is not None:
            report.write_text(str(shim.kill_count()))
        os._exit(0 if statuses == ["ok"] else 1)
    return os.waitpid(pid, 0)[1]


def wrong(job: Job, first: bytes) -> str:
    """What is not as after an undisturbed run; "" if all is."""
    (folder,) = (p for p in job.slide_folder.iterdir() if p.is_dir())
    if (folder / "manifest.json").read_bytes() != first:
        return "another manifest"
    if [p for p in (Path(job.out) / ".work").rglob("*") if p.is_file()]:
        return "work is left over"
    done: set[int] = set()
    for event in sorted(read_events(Path(job.out)), key=lambda e: e["time"]):
        if event["event"] == "region-start" and event["region"] in done:
            return f"region {event['region']} was done and computed again"
        if event["event"] == "region-done":
            done.add(event["region"])
    return ""


def main() -> None:
    slide, model, folder = sys.argv[2], sys.argv[3], Path(sys.argv[4])
    overwrite = len(sys.argv) > 5
    settings = {"slide": slide, "slide_id": "s", "root": slide, "model": model, "tissue": "none", "min_tissue": 0.0}
    job = Job(**settings, block=4, batch_size=8, out=str(folder / "first"))
    before = replace(job, blend="constant", overlap=0.25, out=str(folder / "before"))
    if overwrite:
        # Every try begins with an older result of other parameters in place.
        assert child(before, 0) == 0
        shutil.copytree(before.out, job.out)
        job = replace(job, overwrite=True)
    assert child(job, 0, folder / "count") == 0
    operations = int((folder / "count").read_text())
    first = next(job.slide_folder.glob("*/manifest.json")).read_bytes()
    killed, faults = 0, []
    for n in range(1, operations + 1):
        job = replace(job, out=str(folder / "again"))
        if overwrite:
            shutil.copytree(before.out, job.out)
            shutil.rmtree(Path(job.out) / "events")
        status = child(job, n)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed += 1
        whole = list(job.slide_folder.glob("*/result.json")) or list(Path(job.out).glob(".work/s/*/*/replaced/result.json"))
        if overwrite and not whole:
            faults.append([n, "neither the old result nor the new one is there"])
        resumed = child(job, 0)
        what = f"resume ended with status {resumed}" if resumed else wrong(job, first)
        if what:
            faults.append([n, what])
        shutil.rmtree(job.out)
    print(json.dumps({"operations": operations, "killed": killed, "wrong": faults}))


main()
