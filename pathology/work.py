"""Unfinished work of one slide and model: staged regions under `<out>/.work/<slide>/<model>/`.

Promise: a region counts as done only when its marker parses, names this key and this plan, and the hash of the staged
bytes is the marker's. That a file exists is never the test.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathology.durable import make_folders, output_faults, sync_folder, write_file
from pathology.errors import UsageError
from pathology.job import key_difference, key_of
from pathology.plan import Plan, Region

SCHEMA = 1


class Work:
    """The work folder of one slide and model, for results of one key."""

    def __init__(self, folder: Path, fields: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fields = dict(fields)
        self.key = key_of(fields)
        self._plan_sha256 = ""

    @property
    def partial(self) -> Path:
        """Where the finished result is built before its one rename; a stable name, so a crash leaves one at most."""
        return self.folder / "partial"

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

        Raises UsageError, with the difference named, if unfinished work of another key lies here and `overwrite` is off.
        """
        record = self._read(self.folder / "plan.json")
        if record is not None and record.get("schema") == SCHEMA:
            if record["fields"] == self.fields:
                self._plan_sha256 = _sha256(record["plan"].encode())
                return Plan.from_json(record["plan"])
            if not overwrite:
                difference = key_difference(record["fields"], self.fields)
                raise UsageError(
                    f"unfinished work of slide {self.folder.parent.name} was begun otherwise ({difference}); "
                    "finish it with the options it was begun with, choose another --out, or drop it with --overwrite"
                )
        self.clear()
        text = plan.to_json()
        make_folders(self.folder / "regions")
        write_file(self.folder / "plan.json", _json({"schema": SCHEMA, "fields": self.fields, "plan": text}))
        self._plan_sha256 = _sha256(text.encode())
        return Plan.from_json(text)

    def resume(self) -> Plan:
        """The plan that work of this key was begun by. Raises UsageError where none was."""
        record = self._read(self.folder / "plan.json")
        if record is None or record.get("schema") != SCHEMA or record["fields"] != self.fields:
            raise UsageError(f"unfinished work of slide {self.folder.parent.name} is gone or was replaced; run the same again")
        self._plan_sha256 = _sha256(record["plan"].encode())
        return Plan.from_json(record["plan"])

    def todo(self, plan: Plan) -> list[int]:
        """Indices of the regions that are not done, in order."""
        return [r.index for r in plan.regions if self._done(r.index) is None]

    def put(
        self, region: Region, heatmap: NDArray[np.float32], counts: Mapping[str, float], environment: Mapping[str, Any]
    ) -> None:
        """Stage one region's (C, H, W) result: data first, then the marker that makes it count."""
        buffer = io.BytesIO()
        np.save(buffer, heatmap, allow_pickle=False)
        data = buffer.getvalue()
        write_file(self._path(region.index, "npy"), data)
        marker = {
            "schema": SCHEMA,
            "key": self.key,
            "plan": self._plan_sha256,
            "region": region.index,
            "sha256": _sha256(data),
            "counts": dict(counts),
            "environment": dict(environment),
        }
        write_file(self._path(region.index, "json"), _json(marker))

    def marker(self, index: int) -> dict[str, Any]:
        """The marker of a region: {sha256, counts, environment, ...}. Raises UsageError if there is none of this work."""
        marker = self._marker(index)
        if marker is None:
            raise UsageError(
                f"region {index} of slide {self.folder.parent.name} is not done; run the same command again to compute it"
            )
        return marker

    def load(self, index: int) -> NDArray[np.float32]:
        """The (C, H, W) float32 result of a region that is done; its hash is checked on the bytes that are returned."""
        marker, path = self.marker(index), self._path(index, "npy")
        data = path.read_bytes() if path.exists() else b""
        if _sha256(data) != marker["sha256"]:
            raise UsageError(
                f"region {index} of slide {self.folder.parent.name} has changed on disk; run the same command again"
            )
        array: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
        return array

    def clear(self) -> None:
        """Forget everything staged here. The plan goes first: without it nothing here counts as begun."""
        with output_faults(self.folder):
            if not self.folder.exists():
                return
            (self.folder / "plan.json").unlink(missing_ok=True)
            sync_folder(self.folder)
            shutil.rmtree(self.folder)

    def _marker(self, index: int) -> dict[str, Any] | None:
        """The marker that names this key and plan; None where there is none. Says nothing of the staged bytes."""
        marker = self._read(self._path(index, "json"))
        expected = {"schema": SCHEMA, "key": self.key, "plan": self._plan_sha256, "region": index}
        return None if marker is None or any(marker.get(k) != v for k, v in expected.items()) else marker

    def _done(self, index: int) -> dict[str, Any] | None:
        """The marker, if the staged bytes are the ones it names."""
        marker = self._marker(index)
        if marker is None:
            return None
        try:
            data = self._path(index, "npy").read_bytes()
        except FileNotFoundError:
            return None
        return marker if _sha256(data) == marker.get("sha256") else None

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / "regions" / f"{index:06d}.{suffix}"

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        """A JSON object, or None where there is none that parses."""
        try:
            value = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True) + "\n").encode()
