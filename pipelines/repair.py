"""Make damaged results whole again. Promise: a file is replaced only by what has the hash that its manifest states, once the
whole result, computed anew beside it, has come out with that very manifest; otherwise nothing is changed.

Scores in sound chunks of a float32 heatmap are taken over, so that only regions under damaged ones are inferred; results of all
other kinds are inferred whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, new_file, output_faults, write_file
from pathology.errors import EnvironmentFault, UsageError
from pathology.finish import BAD_TILES, MANIFEST, RESULT, read_manifest, read_record
from pathology.geometry import Box
from pathology.integrity import ZARR_JSON, Difference, verify_result
from pathology.job import Job, key_difference
from pathology.lease import BEAT_S, LEASE_S, Leases
from pathology.outcome import Progress
from pathology.plan import Plan
from pathology.runner import run
from pathology.seal import is_sealed, mended
from pathology.work import Work

# Below `.work`, with the token of who repairs; hidden, so that no slide's id is the same.
SCRATCH = ".repair-"
COPY_BYTES = 8 * 2**20


class _Planned(Exception):
    """The plan is made: nothing is inferred yet."""


def repair(folder: Path, scheduler: str = "processes") -> Iterator[Path]:
    """Repair the result in `folder`; gives the files that were replaced, none where there was nothing to do.

    A bit that flipped in `result.json` or `manifest.json` is turned back. Files that are none of the result's are left.
    Raises UsageError, and changes nothing more, where the record is lost, where slide, model or parameters are no longer what
    they were, and where the result comes out otherwise, as it may on another machine.
    """
    folder = folder.absolute()
    out = folder.parents[2]
    if folder.parent.parent.name != "slides":
        raise UsageError(f"{folder} does not lie in an output folder; give the --out folder of a run")
    with _owned(out / ".work" / folder.parent.name) as token:
        record = yield from _records(folder)
        wrong = _wrong(folder)
        if not wrong:
            return
        scratch = out / ".work" / f"{SCRATCH}{token}"
        job = Job.again(record["job"], record["columns"], str(scratch))
        if (job.slide_id, record["model"]) != (folder.parent.name, folder.name):
            raise UsageError(f"{folder} was moved: its record is of {job.slide_id}/{record['model']}; run the same again")
        with output_faults(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                made = _made_anew(job, record, folder, wrong, scheduler)
                for _ in range(2):  # what is wrong beside a manifest shows only once that is right
                    yield from _replace(folder, made, _wrong(folder))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        if left := _wrong(folder):
            raise EnvironmentFault(f"{left[0].path} is {left[0].what} again after its repair; look after the disk")


@contextmanager
def _owned(place: Path) -> Iterator[str]:
    """Hold a slide, so that no run works on it; gives the token. Waits for as long as a dead owner may seem alive."""
    with closing(Leases()) as leases:
        end = time.monotonic() + LEASE_S + 2 * BEAT_S
        while (owner := leases.claim(place)) is not None:
            if time.monotonic() > end:
                raise UsageError(f"{owner} works on slide {place.name}; repair it when that has ended")
            time.sleep(0.5)
        yield leases.token(place)


def _wrong(folder: Path) -> list[Difference]:
    return [difference for difference in verify_result(folder) if difference.what != "unexpected"]


def _records(folder: Path) -> Generator[Path, None, dict[str, Any]]:
    """Mend the record and, if that can be, the manifest; returns the record."""
    path, manifest = folder / RESULT, folder / MANIFEST
    data = path.read_bytes() if path.is_file() else b""
    whole = mended(data, is_sealed)
    if whole is None:
        raise UsageError(f"{path} is lost, and with it what was asked for; run the same command again with --overwrite")
    if whole != data:
        write_file(path, whole)
        yield path
    record = read_record(folder)
    assert record is not None
    data = manifest.read_bytes() if manifest.is_file() else b""
    whole = mended(data, lambda tried: hashlib.sha256(tried).hexdigest() == record["manifest_sha256"])
    if whole is not None and whole != data:
        write_file(manifest, whole)
        yield manifest
    return record


def _made_anew(job: Job, record: dict[str, Any], folder: Path, wrong: Sequence[Difference], scheduler: str) -> Path:
    """The result folder of `job`, which comes out as the record says the old one did."""
    name = f"{job.slide_id}/{record['model']}"

    def planned(step: Progress) -> None:
        if step.event == "planned":
            raise _Planned

    try:
        _run(job, name, scheduler, planned)
    except _Planned:
        work, plan = _begun(job, record, folder)
        _take_over(work, plan, record, folder, wrong)
    _run(job, name, scheduler, lambda _: None)
    made = job.result_folder(record["model"])
    if hashlib.sha256((made / MANIFEST).read_bytes()).hexdigest() != record["manifest_sha256"]:
        again = read_record(made)
        environments = "" if again is None or again["environments"] == record["environments"] else ", in another environment"
        raise UsageError(
            f"result {name} came out otherwise than it was{environments}, and stays as it is; repair it where it was computed, "
            "or run the same command again with --overwrite"
        )
    return made


def _run(job: Job, name: str, scheduler: str, progress: Any) -> None:
    for outcome in run([job], scheduler, progress=progress):
        if outcome.record is None:
            raise UsageError(f"result {name} cannot be computed again ({outcome.reason}): {outcome.message}")


def _begun(job: Job, record: dict[str, Any], folder: Path) -> tuple[Work, Plan]:
    """The work and plan as they were begun. Raises UsageError where they are for other values than the old result's."""
    at = job.work_folder(record["model"])
    fields = json.loads((at / "plan.json").read_bytes())["fields"]
    work = Work(at, fields)
    if work.key != record["key"]:
        difference = "more than one can tell"
        if not any(d.path == folder / MANIFEST for d in verify_result(folder)):
            manifest = read_manifest(folder)
            difference = "" if manifest is None else key_difference(manifest["fields"], fields)
        raise UsageError(
            f"result {job.slide_id}/{record['model']} would be made otherwise ({difference}), and stays as it is; "
            "bring back what it was made from, or run with --overwrite"
        )
    return work, work.resume()


def _take_over(work: Work, plan: Plan, record: dict[str, Any], folder: Path, wrong: Sequence[Difference]) -> None:
    """Stage the regions whose scores the old heatmap still holds. Scores are stored unrounded in float32 only."""
    from pathology.result import open_heatmap
    from pathology.stitch import bands
    from pathology.store import STORE_NAME

    store = folder / STORE_NAME
    lost: list[Box] = []
    for difference in wrong:
        if difference.path.name in (MANIFEST, BAD_TILES, ZARR_JSON):
            return
        if (store / "0") in difference.path.parents:
            if not difference.damage:
                return
            corners = [(*d.first[-2:], *d.end[-2:]) for d in difference.damage]
            lost += [Box(y, x, y1 - y, x1 - x) for y, x, y1, x1 in corners]
    if record["output"] not in ("classes", "map") or record["bad_tiles"]:
        return
    heatmap = open_heatmap(folder)
    if heatmap.meta.encoding.dtype != "float32":
        return
    counts: dict[str, Any] = {
        "bad_tiles": 0,
        "decided": 0,
        "seconds": 0.0,
        "began": 0.0,
        "process": 0,
        "halved_to": None,
        "stages": {},
    }
    found = record["environments"][0]
    environment = {**found, "batch": [found["batch"]]}
    for region in plan.regions:
        if all(region.box.intersect(box).empty for box in lost):
            staged = work.stage(region, (heatmap.read(0, band) for band in bands(region.box)))
            work.mark(region, staged, {**counts, "tiles": len(region.tiles)}, environment)


def _replace(folder: Path, made: Path, wrong: Sequence[Difference]) -> Iterator[Path]:
    for difference in wrong:
        inside = difference.path.is_relative_to(folder)
        source = made / difference.path.relative_to(folder) if inside else made.parent / difference.path.name
        make_folders(difference.path.parent)
        with source.open("rb") as file, new_file(difference.path) as write:
            while data := file.read(COPY_BYTES):
                write(data)
        yield difference.path
