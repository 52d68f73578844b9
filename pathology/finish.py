"""A slide's end: staged regions become the store, tables, picture and manifest, and one rename makes them the result.

Promise: a result folder is there whole or not at all, and `manifest.json` is the same to the byte however often the work was
interrupted: it holds hashes and what decided the values, never a time, host, path or attempt. `result.json` holds those.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pathology.clock import covered, total
from pathology.decide import doubt
from pathology.durable import make_folders, output_faults, sync_folder, sync_tree, write_file
from pathology.errors import Reason, SlideError, UsageError, one_line
from pathology.job import Job
from pathology.model import ModelSpec
from pathology.outputs import write_output
from pathology.outputs.ended import Ended
from pathology.plan import Plan
from pathology.records import check_fields, check_files, read_object
from pathology.seal import sealed, to_json
from pathology.slide import Slide
from pathology.stain import Stains
from pathology.work import Work

MANIFEST, RESULT = "manifest.json", "result.json"
BAD_TILES = "bad_tiles.csv"
TISSUE_FILES = ("tissue.geojson", "tissue.png")

SCHEMAS = {MANIFEST: 1, RESULT: 5}
# What is relied on where they are read back.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    MANIFEST: {"key": str, "fields": dict, "files": dict, "slide_files": dict},
    RESULT: {
        **dict.fromkeys(("status", "slide_id", "model", "output", "key", "manifest_sha256", "message"), str),
        **dict.fromkeys(("seconds", "tissue_mm2"), (int, float)),
        "tiles": int,
        "reason": (str, NoneType),
        "bounds": (list, NoneType),
        "time": dict,
        "columns": dict,
        "slide": str,
        "input_sha256": (dict, NoneType),
    },
}


def finish(
    job: Job,
    work: Work,
    plan: Plan,
    slide: Slide,
    spec: ModelSpec,
    stains: Stains | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Build, commit and return the record of a slide all of whose regions are done; `stains` for a model that took them,
    `hashes` of the slide's whole files where they are wanted.

    Raises UsageError where `job.strict` and regions were computed in different environments, SlideError(CORRUPT_TILES)
    where no tile at all could be read.
    """
    environments = _environments(work, plan, job)
    bad_tiles = sorted({(row, col) for region in plan.regions for row, col in work.marker(region.index)["bad_tiles"]})
    if bad_tiles and len(bad_tiles) == len(plan.tiles):
        work.clear()  # nothing in it is worth keeping, and a repaired file must not meet it
        raise SlideError(
            Reason.CORRUPT_TILES,
            f"none of the {len(bad_tiles)} tiles of slide {job.slide_id} can be decoded; copy the file again from its source",
        )
    partial = work.partial
    with output_faults(partial):
        work.clear_partial()
        partial.mkdir()  # its parent is gone where the slide has another owner by now
        bad = np.array(bad_tiles, np.int32).reshape(-1, 2)
        written = write_output(partial, Ended(work, plan, slide, spec, bad, job.heatmap_dtype, stains))
        if bad_tiles:
            (partial / BAD_TILES).write_text(_bad_tiles_csv(plan, bad_tiles))
        manifest = _manifest(partial, job.slide_folder, work)
        (partial / MANIFEST).write_bytes(manifest)
        record = _record(job, work, plan, slide, spec, written, manifest, environments, len(bad_tiles), stains)
        record["input_sha256"] = None if hashes is None else dict(hashes)
        (partial / RESULT).write_bytes(sealed(record))
        sync_tree(partial)
        _commit(partial, job.result_folder(spec.name), work)
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """`result.json` of a result folder, without its seal; None where there is none. Raises SlideError where it is damaged,
    UsageError where it is of another schema version."""
    record = _read(folder / RESULT)
    return None if record is None else {name: value for name, value in record.items() if name != "seal"}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """`manifest.json` of a result folder; None where there is none. Raises SlideError where it is damaged, UsageError where
    it is of another schema version. The files it names lie below their folders."""
    return _read(folder / MANIFEST)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = read_object(path)
        check_fields(value, {"schema": int})
        if value["schema"] == SCHEMAS[path.name]:
            check_fields(value, FIELDS[path.name])
            for name in ("files", "slide_files"):
                check_files(value.get(name, {}))
            bounds = value.get("bounds") or [0] * 4
            if len(bounds) != 4 or not all(isinstance(side, int) for side in bounds):
                raise ValueError("its bounds are no box")
    except FileNotFoundError:
        return None
    except ValueError as error:
        message = f"{path} is damaged ({one_line(error)}); pathology verify --repair, or --overwrite, makes it again"
        raise SlideError(Reason.CHANGED, message) from None
    if value["schema"] != SCHEMAS[path.name]:
        found, known = value["schema"], SCHEMAS[path.name]
        raise UsageError(f"{path} has schema {found!r}, this version reads {known}; use the version that wrote it")
    return value


def _bad_tiles_csv(plan: Plan, tiles: Sequence[tuple[int, int]]) -> str:
    """Their place in the grid, and their corner in continuous level-0 px, in which another program can look for the damage."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "col", "l0_y", "l0_x", "reason"))
    for (row, col), (y, x) in zip(tiles, plan.grid.l0_origins(np.array(tiles)).tolist(), strict=True):
        writer.writerow((row, col, y, x, Reason.CORRUPT_TILES))
    return text.getvalue()


def _environments(work: Work, plan: Plan, job: Job) -> list[dict[str, Any]]:
    """The different environments of the regions, each once, in a fixed order."""
    found = [work.marker(r.index)["environment"] for r in plan.regions]
    # A region whose batch was halved on the way has more than one.
    each = ({**e, "batch": size} for e in found for size in e["batch"])
    texts = {json.dumps(e, sort_keys=True) for e in each}
    if len(texts) > 1 and job.strict:
        raise UsageError(
            f"slide {job.slide_id} has regions from {len(texts)} different environments; run without --strict to allow it, "
            "or with --overwrite to compute it anew"
        )
    return [json.loads(text) for text in sorted(texts)]


def _manifest(partial: Path, slide_folder: Path, work: Work) -> bytes:
    files = {str(path.relative_to(partial)): _file_entry(path) for path in partial.rglob("*") if path.is_file()}
    tissue = {name: _file_entry(slide_folder / name) for name in TISSUE_FILES}
    return to_json({"schema": SCHEMAS[MANIFEST], "key": work.key, "fields": work.fields, "files": files, "slide_files": tissue})


def _file_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _record(
    job: Job,
    work: Work,
    plan: Plan,
    slide: Slide,
    spec: ModelSpec,
    written: Mapping[str, Any],
    manifest: bytes,
    environments: list[dict[str, Any]],
    bad_tiles: int,
    stains: Stains | None,
) -> dict[str, Any]:
    counts = [work.marker(r.index)["counts"] for r in plan.regions]
    spent = time_spent(counts)
    return {
        "schema": SCHEMAS[RESULT],
        "research_use_only": True,
        "status": "partial" if bad_tiles else "ok" if len(plan.tiles) else "ok_empty",
        "reason": Reason.CORRUPT_TILES if bad_tiles else None,
        "message": "; ".join(filter(None, (_bad_message(bad_tiles, len(plan.tiles)), _stain_message(plan, stains)))),
        "slide": job.slide,
        "slide_id": job.slide_id,
        "model": spec.name,
        "key": work.key,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        "shape": list(slide.info.shape),
        "slide_mpp": slide.info.mpp,
        "mpp_source": slide.info.mpp_source,
        "reader": slide.info.reader,
        "vendor": slide.info.vendor,
        "bounds": None if slide.info.bounds is None else list(asdict(slide.info.bounds).values()),
        "tiles": len(plan.tiles),
        "bad_tiles": bad_tiles,
        "regions": len(plan.regions),
        "forward_passes": plan.forward_passes,
        "tissue_mm2": plan.tissue_mm2,
        "output": spec.output,
        **written,
        "seconds": round(spent["wall_s"], 3),
        "time": spent,
        "environments": environments,
        "batch_size": job.batch_size,
        "halved_to": min((c["halved_to"] for c in counts if c["halved_to"]), default=None),
        "decided": sum(c["decided"] for c in counts) if doubt(job, spec) else None,
        "columns": dict(job.columns),
        "job": job.asked(),
        "finished": time.time(),
        "host": socket.gethostname(),
        "version": _version(),
        **({} if stains is None else {"stain": stains.record()}),
    }


def _bad_message(bad_tiles: int, tiles: int) -> str:
    return f"{bad_tiles} of {tiles} tiles cannot be decoded; {BAD_TILES} lists them" if bad_tiles else ""


def _stain_message(plan: Plan, stains: Stains | None) -> str:
    if stains is None or not stains.reference or not len(plan.tiles):
        return ""
    return f"a reference slide's stains were used, for want of its own: {stains.reference}"


def time_spent(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the time went: seconds by stage over all threads, and how much of the time the devices computed.

    wall_s     while regions of this slide were worked on, summed over the processes that did
    waiting_s  of it, while no tile of this slide was with the model
    """
    processes: dict[int, list[tuple[float, float]]] = {}
    for c in counts:
        processes.setdefault(c["process"], []).append((c["began"], c["began"] + c["seconds"]))
    stages = total(c["stages"] for c in counts)
    wall = sum(covered(spans) for spans in processes.values())
    return {
        "stages": stages,
        "wall_s": round(wall, 6),
        "waiting_s": round(max(0.0, wall - stages["model"]), 6),
        "device_busy": round(min(1.0, stages["model"] / wall), 4) if wall else 0.0,
    }


def put_back(final: Path, work: Work) -> None:
    """Make an older result that a crash left aside the result again: it is, until the new one has its name.

    Without a plan the commit had come to its end, and what lies aside waits for removal only.
    """
    if work.replaced.exists() and not final.exists() and work.begun:
        with output_faults(final):
            work.replaced.rename(final)
            sync_folder(final.parent)
            sync_folder(work.folder)


def _commit(partial: Path, final: Path, work: Work) -> None:
    """Make `partial` the result by one rename. An older result is moved aside first and removed last."""
    make_folders(final.parent)
    if final.exists():
        shutil.rmtree(work.replaced, ignore_errors=True)
        final.rename(work.replaced)
        sync_folder(work.folder)
    partial.rename(final)
    # Up to `out`: whoever made these folders may have been killed before it synced their names.
    for folder in final.parents[:3]:
        sync_folder(folder)
    sync_folder(work.folder)
    work.clear()


def _version() -> str:
    try:
        return version("pathology-pipeline")
    except PackageNotFoundError:
        return "source"


def write_if_changed(path: Path, data: bytes, beside: Path) -> None:
    """Replace `path` durably unless it holds `data` already. `beside`: a folder of the owner; once it is gone, nothing is."""
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        make_folders(path.parent)
    write_file(path, data, beside)
