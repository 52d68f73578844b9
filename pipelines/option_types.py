"""Kinds of values that options take. Promise: what makes no sense is refused in one line, before anything is done."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any, Literal

import click

# Of options that are numbers: 30 years in seconds.
MOST = 1e9


class Bytes(click.ParamType[int]):
    """A number of bytes for people: 512M, 2G, 1.5GiB; 0 only where that is something."""

    name = "size"

    def __init__(self, or_none: bool = False) -> None:
        self._or_none = or_none

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)i?B?\s*", str(value))
        if match is None or not (float(match[1]) or self._or_none):
            self.fail(f"{value!r} is no number of bytes; write 512M or 2G", param, context)
        return int(float(match[1]) * 1024 ** " kMGT".index(match[2].replace("K", "k") or " "))


class Number(click.FloatRange):
    """A number within bounds; not nan, which no bound keeps out, and none so large that it is beyond clocks and disks."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        number: float = super().convert(value, param, context)
        if not abs(number) <= MOST:
            self.fail(f"{value!r} is no number up to {MOST:g}", param, context)
        return number


class Folder(click.Path):
    """A path that may be a folder's, there or not; no word is not the working directory."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if not str(value):
            self.fail("'' names no folder; write . for this one", param, context)
        try:
            Path(value).stat()
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                self.fail(f"{str(value)!r}: {error.strerror}", param, context)
        return super().convert(value, param, context)


class BatchSize(click.ParamType[int | Literal["auto"]]):
    """A number of tiles, or auto."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if not re.fullmatch(r"\d+", str(value)) or not int(value):
            self.fail(f"{value!r} is no batch size; use a number from 1, or auto", param, context)
        return int(value)


class Shard(click.ParamType[tuple[int, int]]):
    """One of so many shares: 2/5."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no share; write 1/4 for the first of four, up to 4/4", param, context)
        return int(match[1]), int(match[2])
