"""Which chunks of a Zarr array's file are not what was written, by their own checksums. Promise: nothing is decompressed, and
nothing larger than the file is held.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

CRC_BYTES = 4
ABSENT = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Cut:
    """How an array is cut into files and chunks.

    shape  of the array
    file   shape of what a file holds: a shard, or a chunk where there are no shards
    chunk  shape of a chunk
    """

    shape: tuple[int, ...]
    file: tuple[int, ...]
    chunk: tuple[int, ...]
    sharded: bool

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many chunks a file has along each axis."""
        return tuple(whole // part for whole, part in zip(self.file, self.chunk, strict=True))


def cut_of(zarr_json: Mapping[str, Any]) -> Cut:
    """The cut that an array's zarr.json states. Raises KeyError, TypeError, ValueError where it is not one of ours."""
    shape = _sizes(zarr_json["shape"])
    file = _sizes(zarr_json["chunk_grid"]["configuration"]["chunk_shape"])
    outer = zarr_json["codecs"][0]
    sharded = outer["name"] == "sharding_indexed"
    codecs = outer["configuration"]["codecs"] if sharded else zarr_json["codecs"]
    if codecs[-1]["name"] != "crc32c" or (sharded and outer["configuration"].get("index_location", "end") != "end"):
        raise ValueError("chunks without a checksum of their own")
    cut = Cut(shape, file, _sizes(outer["configuration"]["chunk_shape"]) if sharded else file, sharded)
    if not len(cut.shape) == len(cut.file) == len(cut.chunk) or any(f % c for f, c in zip(cut.file, cut.chunk, strict=True)):
        raise ValueError("shards that are no whole number of chunks")
    return cut


def damaged(path: Path, cut: Cut) -> list[tuple[int, ...]] | None:
    """Places in the file of the chunks whose checksum fails; None: all of it, as it is gone, too short, or its index fails."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not cut.sharded:
                return None if _fails(_read(file, 0, size)) else []
            count = math.prod(cut.chunks)
            end = size - 16 * count - CRC_BYTES
            index = b"" if end < 0 else _read(file, end, size - end)
            if _fails(index):
                return None
            failed = []
            for number, (offset, length) in enumerate(struct.iter_unpack("<QQ", index[:-CRC_BYTES])):
                if offset == length == ABSENT:
                    continue
                if offset + length > end or _fails(_read(file, offset, length)):
                    failed.append(tuple(int(i) for i in np.unravel_index(number, cut.chunks)))
            return failed
    except OSError:  # gone, or a disk that cannot be read there
        return None


def _read(file: BinaryIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def _fails(data: bytes) -> bool:
    """Whether the four bytes at the end are not the crc32c of those before."""
    if len(data) < CRC_BYTES:
        return True
    return bool(google_crc32c.value(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"))


def _sizes(values: Sequence[object]) -> tuple[int, ...]:
    if not all(isinstance(value, int) and 0 < value < 2**40 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(int(value) for value in values if isinstance(value, int))
