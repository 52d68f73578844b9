"""JSON that this program wrote, read back. Promise: whatever a file holds by now, reading it takes little memory and gives an
object of the promised fields, or ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

MOST_BYTES = 2**24  # tens of times more than any record
MOST_WORK_BYTES = 2**28  # of a plan, which lists every tile


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError (or another OSError), ValueError where it holds none."""
    size = path.stat().st_size
    if not path.is_file() or size > most_bytes:
        raise ValueError(f"it is no file, or has more than {most_bytes} bytes")
    with path.open("rb") as file:
        data = file.read(size)
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no object")
    return value


def check_fields(record: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise ValueError where a field is not there, or not of its kind."""
    for name, kind in kinds.items():
        value = record.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"its {name} is {type(value).__name__}")


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError where one of `names` is not that of a file below a folder."""
    for name in names:
        path = PurePosixPath(name)
        if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name[:80]!r} is no name of a file in it")


def check_files(entries: Mapping[str, Any]) -> None:
    """Raise ValueError where `entries` are not {name: {sha256, bytes}} with names of files below one folder."""
    check_names(entries)
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{name[:80]!r} has no hash")
        check_fields(entry, {"sha256": str, "bytes": int})
