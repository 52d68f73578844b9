"""JSON files that tell of a result, and one that carries its own hash. Promise: no byte of a sealed file changes unseen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# Larger files are not searched for a single bit that flipped: each try hashes the whole.
MEND_BYTES = 2**15

# At the top level of what `to_json` writes, where a name stands behind one space; text in a file has no raw line ends.
_SEAL = re.compile(rb'(?<=\n "seal": ")[0-9a-f]{64}(?=")')
_BLANK = b"0" * 64


def to_json(value: Mapping[str, Any]) -> bytes:
    """`value` in the one form in which these files are written."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """`to_json` of value and `seal`: the sha256 of the file with 64 zeros in its place."""
    blank = to_json({**value, "seal": _BLANK.decode()})
    return _SEAL.sub(hashlib.sha256(blank).hexdigest().encode(), blank, count=1)


def is_sealed(data: bytes) -> bool:
    """Whether the bytes are those that were sealed."""
    found = _SEAL.search(data)
    if found is None:
        return False
    rest = hashlib.sha256(data[: found.start()] + _BLANK + data[found.end() :])
    return rest.hexdigest().encode() == found.group()


def mended(data: bytes, right: Callable[[bytes], bool]) -> bytes | None:
    """The bytes that are `right` and differ from `data` in one bit at most; None where there are none, or too many to try."""
    if right(data):
        return data
    if len(data) > MEND_BYTES:
        return None
    tried = bytearray(data)
    for at in range(len(tried)):
        for bit in range(8):
            tried[at] ^= 1 << bit
            if right(bytes(tried)):
                return bytes(tried)
            tried[at] ^= 1 << bit
    return None
