"""Runs jobs again and again in forked children, each killed at its n-th file operation and then resumed. Needs the shim.

    LD_PRELOAD=shim.so python crash_runner.py SHIM SLIDES MODEL FOLDER [overwrite]

Prints one JSON line: {"operations", "killed", "wrong": [[n, what], ...]}. A slide called `bad` has to fail, all others to be
done. A fork costs far less than a start with all imports.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2  # noqa: F401  # here and below: imported once, before the forks
import openslide  # noqa: F401
import PIL.ImageFont  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401

import pathology.readers.direct
import pathology.readers.openslide_reader
import pathology.result
import pathology.testing  # noqa: F401
from pathology.events import read_events
from pathology.job import Job
from pathology.runner import run

BAD = "bad"

shim = ctypes.CDLL(sys.argv[1])


def child(jobs: Sequence[Job], kill_at: int, report: Path | None = None) -> int:
    """The wait status of a process that runs the jobs, killed at operation `kill_at` (0: not at all)."""
    pid = os.fork()
    if pid == 0:
        shim.kill_arm(jobs[0].out.encode(), kill_at)
        try:
            ended = {outcome.job.slide_id: outcome.status for outcome in run(jobs, "sync")}
        except BaseException as error:
            os.write(2, f"{kill_at}: {error!r}\n".encode())
            os._exit(2)
        if report is not None:
            report.write_text(str(shim.kill_count()))
        os._exit(0 if ended == {job.slide_id: "failed" if job.slide_id == BAD else "ok" for job in jobs} else 1)
    return os.waitpid(pid, 0)[1]


def manifests(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


def wrong(out: Path, first: dict[str, bytes]) -> str:
    """What is not as after an undisturbed run; "" if all is."""
    if manifests(out) != first:
        return "other manifests"
    if [p for p in (out / ".work").rglob("*") if p.is_file() and p.parent.parent.name != BAD]:
        return "work is left over"
    done: set[tuple[str, int]] = set()
    for event in sorted(read_events(out), key=lambda e: e["time"]):
        region = event.get("slide"), event.get("region")
        if event["event"] == "region-start" and region in done:
            return f"region {region} was done and computed again"
        if event["event"] == "region-done":
            done.add(region)
    return ""


def whole(out: Path, slide: str) -> bool:
    """Whether the slide's old result or its new one is there."""
    return any(out.glob(f"slides/{slide}/*/result.json")) or any(out.glob(f".work/{slide}/*/*/replaced/result.json"))


def main() -> None:
    slides, model, folder = Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    overwrite = len(sys.argv) > 5
    again = folder / "again"
    jobs = [
        Job(
            slide=str(path),
            slide_id=path.stem,
            root=str(slides),
            model=model,
            tissue="none",
            min_tissue=0.0,
            block=4,
            batch_size=8,
            threads=1,
            readers=1,
            out=str(again),
            overwrite=overwrite,
        )
        for path in sorted(slides.iterdir())
    ]
    before = [replace(job, blend="constant", overlap=0.25, out=str(folder / "before"), overwrite=False) for job in jobs]
    if overwrite:
        # Every try begins with older results of other parameters in place.
        assert child(before, 0) == 0

    def begin() -> None:
        shutil.rmtree(again, ignore_errors=True)
        if overwrite:
            shutil.copytree(before[0].out, again)
            shutil.rmtree(again / "events")

    begin()
    assert child(jobs, 0, folder / "count") == 0
    operations = int((folder / "count").read_text())
    first = manifests(again)
    killed, faults = 0, []
    for n in range(1, operations + 1):
        begin()
        status = child(jobs, n)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if overwrite and not all(whole(again, job.slide_id) for job in jobs if job.slide_id != BAD):
            faults.append([n, "neither the old result nor the new one is there"])
        resumed = child(jobs, 0)
        what = f"resume ended with status {resumed}" if resumed else wrong(again, first)
        if what:
            faults.append([n, what])
    print(json.dumps({"operations": operations, "killed": killed, "results": len(first), "wrong": faults}))


main()
