"""From what the user named to slides: files, folders, slide lists. Promise: each has an id of its own."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathology.errors import UsageError
from pathology.job import slide_id, slug

# What a folder is searched for; a file that is named is tried whatever it is called.
SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".svslide"}
PICTURES = {".png", ".jpg", ".jpeg"}
SLIDE_COLUMNS = ("slide", "wsi")
OWN_COLUMNS = {*SLIDE_COLUMNS, "slide_mpp", "id"}


@dataclass(frozen=True, slots=True)
class SlideEntry:
    """One slide of a run.

    root     the folder or file through which it was found
    columns  (name, value) pairs of the slide list that are passed through
    """

    path: Path
    slide_id: str
    root: Path
    slide_mpp: float | None = None
    columns: tuple[tuple[str, str], ...] = ()


def find_slides(named: Sequence[str | Path], out: Path | None = None, pictures: bool = False) -> list[SlideEntry]:
    """The slides in `named`: files as they are, folders searched to the bottom, `.csv` files read as slide lists.

    out       an output folder inside a searched folder is left out
    pictures  search folders for PNG and JPEG as well: they state no resolution, so only with --slide-mpp

    Raises UsageError for equal ids, for a broken slide list, and where nothing is found.
    """
    entries: list[SlideEntry] = []
    for name in (Path(n).absolute() for n in named):  # a worker elsewhere has another working directory
        if name.is_dir():
            entries += _folder(name, out, SUFFIXES | PICTURES if pictures else SUFFIXES)
        elif name.suffix.lower() == ".csv":
            entries += _slide_list(name)
        else:
            entries.append(SlideEntry(name, slide_id(name.name), name))
    if not entries:
        raise UsageError(
            f"no slide found in {', '.join(str(n) for n in named)}; known endings are {', '.join(sorted(SUFFIXES))}"
        )
    seen: dict[str, Path] = {}
    for entry in entries:
        # Compared without case: the folders of two slides must differ on every file system.
        other = seen.setdefault(entry.slide_id.casefold(), entry.path)
        if other is not entry.path:
            raise UsageError(
                f"{other} and {entry.path} would both be called {entry.slide_id}; name the folder that holds both, "
                "or give each an `id` in a slide list"
            )
    return entries


def _folder(folder: Path, out: Path | None, suffixes: set[str]) -> Iterator[SlideEntry]:
    skipped = None if out is None else out.resolve()
    for at, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(at) / f).resolve() != skipped)
        for name in sorted(files):
            if Path(name).suffix.lower() in suffixes and not name.startswith("."):
                path = Path(at) / name
                yield SlideEntry(path, slide_id(path.relative_to(folder).as_posix()), folder)


def _slide_list(path: Path) -> Iterator[SlideEntry]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"slide list {path} cannot be read ({error}); give a CSV file in UTF-8") from error
    name = next((c for c in SLIDE_COLUMNS if c in columns), None)
    if name is None:
        raise UsageError(f"slide list {path} has the columns {', '.join(columns) or 'none'}; it needs one named slide (or wsi)")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UsageError(f"slide list {path}, line {number}: not as many fields as the header has columns")
        if not row[name].strip():
            raise UsageError(f"slide list {path}, line {number}: column {name} is empty")
        slide = Path(row[name].strip())
        yield SlideEntry(
            slide if slide.is_absolute() else path.parent / slide,
            slug(row["id"]) if row.get("id", "").strip() else slide_id(row[name].strip()),
            path.parent,
            _number(row.get("slide_mpp", ""), path, number),
            tuple((c, row[c]) for c in columns if c not in OWN_COLUMNS),
        )


def _number(text: str, path: Path, line: int) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"slide list {path}, line {line}: slide_mpp {text!r} is no number; write um per pixel as 0.25"
        ) from None
