"""Unfinished work of one slide and model: staged regions under `<out>/.work/<slide>/<owner>/<model>/`.

Promise: a region counts as done only when its marker parses, names this key and this plan, and the hashes of the staged
bytes are the marker's. That a file exists is never the test. Regions go to disk and back block by block, never whole.

A staged region of scores is its blocks in row-major order (see `blocks`), each (C, h, w) little-endian float32 without a
header; of objects, its rows, little-endian float64.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathology.clock import timed
from pathology.durable import make_folders, new_file, output_faults, sweep_temporaries, sync_folder, write_file
from pathology.errors import Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.job import is_of_one_slide, key_difference, key_of
from pathology.plan import Plan, Region
from pathology.records import MOST_BYTES, MOST_WORK_BYTES, check_fields, read_object
from pathology.stitch import bands

SCHEMA = 4
PARTIAL = "partial-"

# Columns of a block: what is read and hashed at once. Blocks end at multiples of it, as shards of a heatmap do.
BLOCK_PX = 1024


def blocks(band: Box) -> Iterator[Box]:
    """A band of a region's rows from left to right, cut at the heatmap's multiples of `BLOCK_PX` columns."""
    x = band.x
    while x < band.x1:
        x1 = min(x // BLOCK_PX * BLOCK_PX + BLOCK_PX, band.x1)
        yield Box(band.y, x, band.height, x1 - x)
        x = x1


@dataclass(frozen=True, slots=True)
class Staged:
    """What was written of a region: scores or rows, and the sha256 of its blocks; rows are one block."""

    kind: Literal["scores", "rows"]
    sha256: tuple[str, ...]


class Work:
    """The work folder of one slide and model, for results of one key."""

    def __init__(self, folder: Path, fields: Mapping[str, Any]) -> None:
        self.folder = folder
        self._slide = folder.parent.parent.name
        self.fields = dict(fields)
        self.key = key_of(fields)
        self._plan_sha256 = ""

    @property
    def partial(self) -> Path:
        """Where the finished result is built before its one rename. Named by the owner, so that a rename that a former one has
        asked a server for, and that comes there after all, cannot take another's unfinished result."""
        return self.folder / f"{PARTIAL}{self.folder.parent.name}"

    @property
    def replaced(self) -> Path:
        """Where an older result lies while the new one takes its name."""
        return self.folder / "replaced"

    @property
    def begun(self) -> bool:
        """Whether any work, of this key or another, was begun here and not ended."""
        return (self.folder / "plan.json").exists()

    def begin(self, plan: Plan, overwrite: bool) -> Plan:
        """The plan to work by: the one already begun with if the key is the same, else `plan`, now on record.

        The owner's folder must be there: who has lost it begins nothing.

        Where unfinished work of another key lies here and `overwrite` is off, raises SlideError if only this slide's own files
        are others, else UsageError; the difference is named.
        """
        record = self._record()
        if record is not None:
            if record["fields"] == self.fields:
                self._plan_sha256 = _sha256(record["plan"].encode())
                sweep_temporaries(self.folder / "regions")
                return Plan.from_json(record["plan"])
            if not overwrite:
                difference = key_difference(record["fields"], self.fields)
                begun = f"unfinished work of slide {self._slide} was begun otherwise ({difference})"
                if is_of_one_slide(record["fields"], self.fields):
                    raise SlideError(
                        Reason.CHANGED, f"{begun}; bring back the file it was begun with, or drop it with --overwrite"
                    )
                raise UsageError(
                    f"{begun}; finish it with the options it was begun with, choose another --out, or drop it with --overwrite"
                )
        self.clear()
        text = plan.to_json()
        make_folders(self.folder / "regions", within=self.folder.parent)
        for folder in self.folder.parents[:3]:  # which a claim has not made to last
            sync_folder(folder)
        record = {"schema": SCHEMA, "fields": self.fields, "plan": text}
        write_file(self.folder / "plan.json", _json({**record, "sha256": _sha256(_json(record))}))
        self._plan_sha256 = _sha256(text.encode())
        return Plan.from_json(text)

    def resume(self) -> Plan:
        """The plan that work of this key was begun by. Raises SlideError where the slide's own files have changed since, and
        where no such work is there.
        """
        record = self._record()
        if record is not None and is_of_one_slide(record["fields"], self.fields) and record["fields"] != self.fields:
            raise SlideError(
                Reason.CHANGED,
                f"slide {self._slide} changed while it was worked on ({key_difference(record['fields'], self.fields)}); "
                "bring back the file it was begun with, or drop what was done with --overwrite",
            )
        if record is None or record["fields"] != self.fields:
            message = f"unfinished work of slide {self._slide} is gone, or another plan's; run it again with --retry-failed"
            raise SlideError(Reason.CHANGED, message)
        self._plan_sha256 = _sha256(record["plan"].encode())
        return Plan.from_json(record["plan"])

    def todo(self, plan: Plan, whole: bool = False) -> list[int]:
        """Indices of the regions that are not done, in order. `whole`: those with tiles that could not be read are not."""
        return [r.index for r in plan.regions if not self.done(r, whole)]

    def done(self, region: Region, whole: bool = False) -> bool:
        """Whether a region is done, as `todo` sees it."""
        return self._done(region) and not (whole and self.marker(region.index)["bad_tiles"])

    def stage(self, region: Region, rows: Iterable[NDArray[np.float32]]) -> Staged:
        """Write a region's bands, (C, h, W) float32 each, as they come."""
        hashes: list[str] = []
        with new_file(self._path(region.index, "scores")) as write:
            for band, scores in zip(bands(region.box), rows, strict=True):
                if scores.shape[1:] != band.shape:
                    raise ValueError(f"rows {band.y} to {band.y1} of region {region.index} came as {scores.shape}")
                for block in blocks(band):
                    with timed("write"):
                        data = scores[:, *block.slices(band)].astype("<f4", copy=False).tobytes()
                        hashes.append(_sha256(data))
                        write(data)
        return Staged("scores", tuple(hashes))

    def stage_rows(self, region: Region, rows: NDArray[np.float64]) -> Staged:
        """Write a region's rows, (n, columns) float64."""
        with timed("write"):
            data = rows.astype("<f8", copy=False).tobytes()
            with new_file(self._path(region.index, "rows")) as write:
                write(data)
        return Staged("rows", (_sha256(data),))

    def mark(
        self,
        region: Region,
        staged: Staged,
        counts: Mapping[str, Any],
        environment: Mapping[str, Any],
        bad_tiles: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Make a staged region count. `bad_tiles`: (row, col) of those that could not be read."""
        marker = {
            "schema": SCHEMA,
            "key": self.key,
            "plan": self._plan_sha256,
            "region": region.index,
            "kind": staged.kind,
            "sha256": list(staged.sha256),
            "counts": dict(counts),
            "environment": dict(environment),
            "bad_tiles": [list(tile) for tile in bad_tiles],
        }
        write_file(self._path(region.index, "json"), _json(marker))

    def marker(self, index: int) -> dict[str, Any]:
        """The marker of a region: {sha256, counts, environment, bad_tiles, ...}. Raises UsageError if this work has none."""
        marker = self._marker(index)
        if marker is None:
            raise UsageError(f"region {index} of slide {self._slide} is not done; run the same command again to compute it")
        return marker

    def load(self, region: Region, box: Box) -> Iterator[tuple[Box, NDArray[np.float32]]]:
        """The (C, h, w) float32 blocks of a region that is done that share pixels with `box`, and where each lies.

        Hashes are checked on the bytes that are returned. Raises UsageError where they differ.
        """
        marker = self.marker(region.index)
        for block, data in self._blocks(region, marker, box):
            if data is None:
                raise self._changed(region)
            yield block, np.frombuffer(data, "<f4").reshape(-1, *block.shape).astype(np.float32, copy=False)

    def load_rows(self, region: Region, columns: int) -> NDArray[np.float64]:
        """The (n, columns) rows of a region that is done. Raises UsageError where they changed on disk."""
        data = self._rows(region, self.marker(region.index))
        if data is None:
            raise self._changed(region)
        return np.frombuffer(data, "<f8").reshape(-1, columns).astype(np.float64, copy=False)

    def gather(self, plan: Plan, channels: int, box: Box) -> NDArray[np.float32]:
        """(C, h, w) float32 scores of any box of the heatmap, NaN where not predicted, from the regions that lie in it."""
        scores = np.full((channels, *box.shape), np.nan, np.float32)
        for region in plan.regions:
            if box.intersect(region.box).empty:
                continue
            for block, staged in self.load(region, box):
                common = box.intersect(block)
                scores[:, *common.slices(box)] = staged[:, *common.slices(block)]
        return scores

    def clear_partial(self) -> None:
        """Remove what crashes have left half-built, this owner's and others'."""
        for left in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)

    def clear(self) -> None:
        """Forget everything staged here. The plan goes first: without it nothing here counts as begun."""
        with output_faults(self.folder):
            if not self.folder.exists():
                return
            (self.folder / "plan.json").unlink(missing_ok=True)
            sync_folder(self.folder)
            shutil.rmtree(self.folder)

    def _record(self) -> dict[str, Any] | None:
        """What work was begun by: {fields, plan}; None where none was, or it is not what was written: a plan is not guessed."""
        record = self._read(self.folder / "plan.json", MOST_WORK_BYTES)
        if record is None or record.get("schema") != SCHEMA:
            return None
        expected = record.pop("sha256", None)
        return record if expected == _sha256(_json(record)) else None

    def _marker(self, index: int) -> dict[str, Any] | None:
        """The marker that names this key and plan; None where there is none. Says nothing of the staged bytes."""
        marker = self._read(self._path(index, "json"))
        expected = {"schema": SCHEMA, "key": self.key, "plan": self._plan_sha256, "region": index}
        if marker is None or any(marker.get(k) != v for k, v in expected.items()):
            return None
        try:
            check_fields(marker, {"sha256": list, "counts": dict, "environment": dict, "bad_tiles": list})
        except ValueError:
            return None
        tiles = marker["bad_tiles"]
        return marker if all(isinstance(t, list) and len(t) == 2 and all(type(n) is int for n in t) for t in tiles) else None

    def _done(self, region: Region) -> bool:
        """Whether the staged bytes are the ones that the marker names."""
        marker = self._marker(region.index)
        if marker is not None and marker.get("kind") == "rows":
            return self._rows(region, marker) is not None
        return marker is not None and all(data is not None for _, data in self._blocks(region, marker, region.box))

    def _rows(self, region: Region, marker: Mapping[str, Any]) -> bytes | None:
        """A region's rows; None for bytes that are not what the marker names."""
        path = self._path(region.index, "rows")
        data = path.read_bytes() if path.exists() else None
        return data if data is not None and marker.get("sha256") == [_sha256(data)] else None

    def _changed(self, region: Region) -> UsageError:
        return UsageError(f"region {region.index} of slide {self._slide} has changed on disk; run the same command again")

    def _blocks(self, region: Region, marker: Mapping[str, Any], box: Box) -> Iterator[tuple[Box, bytes | None]]:
        """The blocks that share pixels with `box`, with their bytes; None for bytes that are not what the marker names."""
        places = [block for band in bands(region.box) for block in blocks(band)]
        hashes, path = marker.get("sha256"), self._path(region.index, "scores")
        size = path.stat().st_size if path.exists() else 0
        classes, rest = divmod(size, 4 * math.prod(region.box.shape))
        if not isinstance(hashes, list) or len(hashes) != len(places) or not classes or rest:
            yield region.box, None
            return
        with path.open("rb") as file:
            at = 0
            for block, expected in zip(places, hashes, strict=True):
                length = classes * math.prod(block.shape) * 4
                if not block.intersect(box).empty:
                    file.seek(at)
                    data = file.read(length)
                    yield block, data if _sha256(data) == expected else None
                at += length

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / "regions" / f"{index:06d}.{suffix}"

    @staticmethod
    def _read(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any] | None:
        """A JSON object, or None where there is none that parses."""
        try:
            return read_object(path, most_bytes)
        except (FileNotFoundError, ValueError):
            return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()
