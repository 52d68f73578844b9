"""Whether results are still what was written. Promise: every file is hashed, what differs is named, down to the chunk of an
array and its place on the slide, and nothing is changed. Neither a damaged record nor a stranger's leads out of its folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pathology.errors import SlideError, UsageError
from pathology.events import read_events
from pathology.finish import MANIFEST, RESULT, read_manifest, read_record
from pathology.geometry import HeatmapFrame
from pathology.records import check_names
from pathology.seal import is_sealed, to_json
from pathology.shards import Cut, cut_of, damaged

# Made from a result at any time, by `pathology export`; not part of it.
EXPORTS = ("tiles.csv", "tiles.geojson", "detections.csv", "detections.geojson", "heatmap-*.png")
EXPORTED_FOLDERS = {"heatmap-0.4.ome.zarr"}

ZARR_JSON = "zarr.json"


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk of an array whose checksum fails, or all that a file of it holds.

    array  its folder below the result, "heatmap.ome.zarr/0"
    level  of the pyramid; None of an array without one
    chunk  index along each axis; None: all chunks of a shard
    first  index of its first element along each axis
    end    one behind its last
    box    (y, x, height, width) on the slide in level-0 px; None of an array without a place there
    """

    array: str
    level: int | None
    chunk: tuple[int, ...] | None
    first: tuple[int, ...]
    end: tuple[int, ...]
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One file that is not what it should be: "changed", "missing", "unreadable" (the disk's fault, or the right to read it is
    lacking), "unexpected" or "damaged" (no record in it).

    damage  of an array's file what in it; () of other files, and where that cannot be told
    """

    path: Path
    what: str
    damage: tuple[Damage, ...] = ()


def verify(folder: str | Path) -> Iterator[Difference]:
    """The differences between the results below `folder` and their manifests; none if all is well.

    `folder` is a run's output, a slide's folder in it, or one result. Raises UsageError where there is no result.
    """
    for result in find_results(Path(folder)):
        yield from verify_result(result)


def find_results(folder: Path) -> list[Path]:
    """The result folders in or below `folder`, with a manifest or a record, and those that are gone though the events of their
    runs say that they were finished. Raises UsageError where there are none.
    """
    records = {path.parent for name in (MANIFEST, RESULT) for path in folder.rglob(name)}
    records.update(path for path in _finished(folder) if path == folder or folder in path.parents)
    results = sorted(path for path in records if ".work" not in path.relative_to(folder).parts)
    if not results:
        raise UsageError(f"{folder} holds no finished result; give the --out folder of a run")
    return results


def _finished(folder: Path) -> Iterator[Path]:
    """The folders of all results that were ever finished in the output that `folder` is, or lies in."""
    outs = (folder, *folder.parents[:3])
    out = next((o for o in outs if (o / "events").is_dir() and folder.relative_to(o).parts[:1] in ((), ("slides",))), None)
    if out is None:
        return
    for event in read_events(out):
        names = [n for n in (event.get("slide"), event.get("model")) if isinstance(n, str)]
        inside = len(names) == 2 and all(n == Path(n).name and n not in ("", "..") for n in names)
        if event["event"] == "slide-done" and inside:
            yield out.joinpath("slides", *names)


def verify_result(folder: Path) -> Iterator[Difference]:
    """The differences of one result folder. Against a manifest that is itself not what was written, no file is held."""
    known_sha256 = None
    try:
        record = read_record(folder)
        if record is None:
            yield Difference(folder / RESULT, "missing")
        elif not is_sealed((folder / RESULT).read_bytes()):
            yield Difference(folder / RESULT, "changed")
        else:
            known_sha256 = record["manifest_sha256"]
    except (SlideError, UsageError):
        yield Difference(folder / RESULT, "damaged")
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            yield Difference(folder / MANIFEST, "missing")
            return
        files, slide_files = _entries(manifest, "files"), _entries(manifest, "slide_files")
    except (SlideError, UsageError):
        yield Difference(folder / MANIFEST, "damaged")
        return
    if _sha256(folder / MANIFEST) != (known_sha256 or hashlib.sha256(to_json(manifest)).hexdigest()):
        yield Difference(folder / MANIFEST, "changed")
        return
    wrong = dict(_wrong(folder, files))
    for name, what in wrong.items():
        yield Difference(folder / name, what, _damage(folder, name, files, wrong))
    for name, what in _wrong(folder.parent, slide_files):
        yield Difference(folder.parent / name, what)
    known = {folder / name for name in (*files, MANIFEST, RESULT)}
    for path in sorted(folder.rglob("*")):
        exported = path.relative_to(folder).parts[0] in EXPORTED_FOLDERS or any(path.match(pattern) for pattern in EXPORTS)
        if (path.is_symlink() or not path.is_dir()) and path not in known and not exported:
            yield Difference(path, "unexpected")
    yield from _strays(folder, slide_files)


def _strays(folder: Path, slide_files: Mapping[str, object]) -> Iterator[Difference]:
    """What lies in the slide's folder and is neither a result nor a file of one; told with the first of its results alone."""
    beside = sorted(folder.parent.iterdir())
    results = [path for path in beside if (path / MANIFEST).is_file() or (path / RESULT).is_file()]
    if results[:1] == [folder]:
        yield from (Difference(path, "unexpected") for path in beside if path not in results and path.name not in slide_files)


def verify_inputs(folder: str | Path) -> Iterator[Difference]:
    """The files of slides that are not what they were when the results below `folder` were made, by `--hash-input`'s hashes.

    Each slide is hashed once. A record without such hashes is "unhashed". Raises UsageError where there is no result.
    """
    seen: set[tuple[Path, str]] = set()
    for path in (result / RESULT for result in find_results(Path(folder))):
        try:
            record = read_record(path.parent) or {}
            hashes: dict[str, str] | None = record.get("input_sha256")
            check_names(hashes or {})
        except (SlideError, ValueError):
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


def _entries(manifest: Mapping[str, Any], what: str) -> dict[str, tuple[str, int]]:
    """(sha256, bytes) by name. Raises UsageError for what is no list of files below one folder."""
    try:
        entries = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest[what].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"the manifest's {what} are no list of files") from None
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UsageError(f"the manifest names {name!r}, which lies outside")
    return entries


def _wrong(folder: Path, entries: Mapping[str, tuple[str, int]]) -> Iterator[tuple[str, str]]:
    """The names of files that are not as their entries say, and how."""
    for name, (digest, size) in sorted(entries.items()):
        path = folder / name
        try:
            if not os.path.lexists(path):
                yield name, "missing"
            elif not _is_own_file(folder, name) or path.stat().st_size != size or _sha256(path) != digest:
                yield name, "changed"
        except OSError:
            yield name, "unreadable"


def _is_own_file(folder: Path, name: str) -> bool:
    """Whether it is a file, and no link on the way to it leads elsewhere."""
    path = folder / name
    return path.is_file() and not any(part.is_symlink() for part in (path, *path.parents[: len(Path(name).parts) - 1]))


def _damage(folder: Path, name: str, files: Mapping[str, object], wrong: Mapping[str, str]) -> tuple[Damage, ...]:
    """What in an array's file is damaged, as far as sound metadata tell."""
    array, _, key = name.rpartition("/c/")
    meta, store = f"{array}/{ZARR_JSON}", f"{name.partition('/')[0]}/{ZARR_JSON}"
    if not array or meta not in files or meta in wrong:
        return ()
    try:
        cut = cut_of(json.loads((folder / meta).read_bytes()))
        at = tuple(int(i) for i in key.split("/"))
        if len(at) != len(cut.shape):
            return ()
        # What stands in a file's place may be a pipe, which is not to be waited for.
        places = damaged(folder / name, cut) if _is_own_file(folder, name) else None
        level = int(array.rpartition("/")[2]) if array.rpartition("/")[2].isdecimal() else None
        frame = None if level is None or store not in files or store in wrong else _frame(folder / store)
        if places is None:
            return (_one(array, level, frame, cut, tuple(i * n for i, n in zip(at, cut.chunks, strict=True)), whole=True),)
        first = [tuple(i * n + p for i, n, p in zip(at, cut.chunks, place, strict=True)) for place in places]
        return tuple(_one(array, level, frame, cut, chunk, whole=False) for chunk in first)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return ()


def _one(array: str, level: int | None, frame: HeatmapFrame | None, cut: Cut, chunk: tuple[int, ...], *, whole: bool) -> Damage:
    size = cut.file if whole else cut.chunk
    first = tuple(i * n for i, n in zip(chunk, cut.chunk, strict=True))
    end = tuple(min(f + n, most) for f, n, most in zip(first, size, cut.shape, strict=True))
    box = None
    if frame is not None and level is not None and len(first) > 1:
        pixel = frame.l0_pixel * 2**level
        y, x = (frame.l0_origin + i * pixel for i in first[-2:])
        height, width = ((e - f) * pixel for f, e in zip(first[-2:], end[-2:], strict=True))
        box = (y, x, height, width)
    return Damage(array, level, None if whole and cut.sharded else chunk, first, end, box)


def _frame(store: Path) -> HeatmapFrame:
    frame = json.loads(store.read_bytes())["attributes"]["pathology"]["frame"]
    height, width = frame["shape"]
    found = HeatmapFrame((height, width), float(frame["l0_origin"]), float(frame["l0_pixel"]), float(frame["slide_mpp"]))
    if not math.isfinite(found.l0_origin + found.l0_pixel):
        raise ValueError(f"{frame} is no frame")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
