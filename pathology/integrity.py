"""Whether results are still what was written. Promise: every file is hashed, what differs is named, nothing is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathology.errors import UsageError
from pathology.finish import MANIFEST, RESULT, read_manifest, read_record
from pathology.records import check_names

# Made from a result at any time, by `pathology export`; not part of it.
EXPORTS = ("tiles.csv", "tiles.geojson", "detections.csv", "detections.geojson", "heatmap-*.png")
EXPORTED_FOLDERS = {"heatmap-0.4.ome.zarr"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One file that is not what it should be: "changed", "missing", "unexpected" or "damaged" (no record in it)."""

    path: Path
    what: str


def verify(folder: str | Path) -> Iterator[Difference]:
    """The differences between the results below `folder` and their manifests; none if all is well.

    `folder` is a run's output, a slide's folder in it, or one result. Raises UsageError where there is no result.
    """
    manifests = sorted(Path(folder).rglob(MANIFEST))
    manifests = [path for path in manifests if ".work" not in path.relative_to(folder).parts]
    if not manifests:
        raise UsageError(f"{folder} holds no finished result; give the --out folder of a run")
    for path in manifests:
        yield from verify_result(path.parent)


def verify_result(folder: Path) -> Iterator[Difference]:
    """The differences of one result folder."""
    try:
        record, manifest = read_record(folder), read_manifest(folder)
    except UsageError:
        yield Difference(folder / MANIFEST, "damaged")
        return
    if manifest is None:
        yield Difference(folder / MANIFEST, "missing")
        return
    if record is None:
        yield Difference(folder / RESULT, "missing")
    elif record["manifest_sha256"] != _sha256(folder / MANIFEST):
        yield Difference(folder / MANIFEST, "changed")
    yield from _files(folder, manifest["files"])
    yield from _files(folder.parent, manifest["slide_files"])
    known = {folder / name for name in (*manifest["files"], MANIFEST, RESULT)}
    for path in sorted(folder.rglob("*")):
        exported = path.relative_to(folder).parts[0] in EXPORTED_FOLDERS or any(path.match(pattern) for pattern in EXPORTS)
        if path.is_file() and path not in known and not exported:
            yield Difference(path, "unexpected")


def verify_inputs(folder: str | Path) -> Iterator[Difference]:
    """The files of slides that are not what they were when the results below `folder` were made, by `--hash-input`'s hashes.

    Each slide is hashed once. A record without such hashes is "unhashed". Raises UsageError where there is no result.
    """
    seen: set[tuple[Path, str]] = set()
    records = [path for path in sorted(Path(folder).rglob(RESULT)) if ".work" not in path.relative_to(folder).parts]
    if not records:
        raise UsageError(f"{folder} holds no finished result; give the --out folder of a run")
    for path in records:
        try:
            record = read_record(path.parent) or {}
            hashes: dict[str, str] | None = record.get("input_sha256")
            check_names(hashes or {})
        except (UsageError, ValueError):
            yield Difference(path, "damaged")
            continue
        if hashes is None:
            yield Difference(path, "unhashed")
            continue
        for name, expected in sorted(hashes.items()):
            file = Path(record["slide"]).parent / name
            if (file, expected) in seen:
                continue
            seen.add((file, expected))
            if not file.is_file():
                yield Difference(file, "missing")
            elif _sha256(file) != expected:
                yield Difference(file, "changed")


def _files(folder: Path, entries: dict[str, Any]) -> Iterator[Difference]:
    for name, entry in sorted(entries.items()):
        path = folder / name
        if not path.is_file():
            yield Difference(path, "missing")
        elif path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            yield Difference(path, "changed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
