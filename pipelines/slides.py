"""From what the user named to slides: files, folders, slide lists.

Promise: each has an id of its own, and no file that is opened, nor folder that is listed, to find them holds the search up for
longer than a deadline.
"""

from __future__ import annotations

import csv
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from pathology.errors import EnvironmentFault, Fault, UsageError
from pathology.faults import TRANSIENT, retried
from pathology.job import slide_id, slug
from pathology.readers.dicom import WHOLE_SLIDE, Instance, folder_instances, may_be_dicom, name_instance, read_instance

T = TypeVar("T")

# The longest that the look at one file, or the list of one folder, may take: storage that is asleep takes long to answer.
ANSWER_S = 120.0
# What a folder is searched for, beside DICOM, which its content tells; a file that is named is tried whatever it is called.
SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".czi"}
PICTURES = {".png", ".jpg", ".jpeg"}
# What the folder of a slide's results holds, as `pathology.finish.TISSUE_FILES`, whose import takes long.
OF_RESULTS = {"tissue.geojson", "tissue.png"}
# What a check of a file system has left: closed to all but root, and nobody's slides.
ORPHANS = "lost+found"
SLIDE_COLUMNS = ("slide", "wsi")
OWN_COLUMNS = {*SLIDE_COLUMNS, "slide_mpp", "id", "mask", "roi"}


@dataclass(frozen=True, slots=True)
class SlideEntry:
    """One slide of a run.

    root     the folder or file through which it was found
    columns  (name, value) pairs of the slide list that are passed through
    series   SeriesInstanceUID of a DICOM slide, otherwise ""
    mask     file of its tissue, roi of the region of interest; None: as the run's options say
    """

    path: Path
    slide_id: str
    root: Path
    slide_mpp: float | None = None
    columns: tuple[tuple[str, str], ...] = ()
    series: str = ""
    mask: Path | None = None
    roi: Path | None = None


def find_slides(named: Sequence[str | Path], out: Path | None = None, pictures: bool = False) -> list[SlideEntry]:
    """The slides in `named`: files as they are, folders searched to the bottom, `.csv` files read as slide lists.

    A DICOM series of whole-slide images is one slide, however many of its files are found or named. In a folder that is
    searched results of earlier runs are left out, links to folders are not followed, and a link to a slide that is found by
    itself is not a second one. Nor is a slide that is named or found again; what a slide list says of it counts. A folder that
    may not be listed stands as an entry of its own, for the reader to refuse.

    out       an output folder inside a searched folder is left out
    pictures  search folders for PNG and JPEG as well: they state no resolution, so only with --slide-mpp

    Raises UsageError for equal ids, for a series in two places, for a broken slide list, and where nothing is found;
    EnvironmentFault where what a folder lies on does not answer.
    """
    entries: list[SlideEntry] = []
    listed: set[SlideEntry] = set()
    looks = _Looks()
    for name in (Path(n).absolute() for n in named):  # a worker elsewhere has another working directory
        if _is_folder(name):
            entries += _without_links(_folder(name, looks, out, SUFFIXES | PICTURES if pictures else SUFFIXES))
        elif name.suffix.lower() == ".csv":
            rows = list(_slide_list(name, looks))
            entries += rows
            listed.update(rows)
        else:
            entries.append(_file(name, looks))
    if not entries:
        known = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"no slide found in {', '.join(str(n) for n in named)}; known are DICOM and the endings {known}")
    entries = list(_one_a_series(list(_one_a_path(entries, listed))))
    seen: dict[str, Path] = {}
    for entry in entries:
        # Compared without case: the folders of two slides must differ on every file system.
        other = seen.setdefault(entry.slide_id.casefold(), entry.path)
        if other == entry.path and other is not entry.path:
            raise UsageError(
                f"{other} is listed twice as {entry.slide_id}; list it once, or give each row of it an `id` of its own"
            )
        if other is not entry.path:
            raise UsageError(
                f"{other} and {entry.path} would both be called {entry.slide_id}; name the folder that holds both, "
                "or give each an `id` in a slide list"
            )
    return entries


def share(entries: Sequence[SlideEntry], number: int, of: int) -> list[SlideEntry]:
    """The share of that number, 1..`of`, of the slides, in the order they come in: the same for any order, by sorted ids."""
    ids = set(sorted(entry.slide_id for entry in entries)[number - 1 :: of])
    return [entry for entry in entries if entry.slide_id in ids]


def _folder(folder: Path, looks: _Looks, out: Path | None, suffixes: set[str]) -> Iterator[SlideEntry]:
    skipped = None if out is None else out.resolve()
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        try:
            folders, files = _listed(at)
        except FileNotFoundError:  # removed since it was seen
            continue
        except OSError:
            yield SlideEntry(at, slide_id(at.relative_to(folder).as_posix() if at != folder else at.name), folder)
            continue
        if {*files} >= OF_RESULTS:
            continue
        waiting += (at / f for f in folders if not f.startswith(".") and f != ORPHANS and (at / f).resolve() != skipped)
        series: dict[str, list[Instance]] = {}
        for name in sorted(files):
            path = at / name
            known = Path(name).suffix.lower() in suffixes
            if name.startswith(".") or not (known or may_be_dicom(name)):
                continue
            if not known and (instance := looks.instance(path)) is not None:
                if instance.of_slide:
                    series.setdefault(instance.series, []).append(instance)
                    continue
                known = instance.sop_class in ("", WHOLE_SLIDE)  # broken: for the reader to say how; others are no slides
            elif not known:
                known = path.suffix.lower() == ".dcm" or path in looks.silent
            if known:
                yield SlideEntry(path, slide_id(path.relative_to(folder).as_posix()), folder)
        for uid in sorted(series):
            yield _series(series[uid], folder)


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders in `folder`, last first, as a stack takes them, and of the files; links to folders are neither.

    Raises EnvironmentFault where what it lies on does not answer, otherwise OSError where it may not be listed.
    """
    try:
        entries = _in_time(folder, partial(retried, partial(_entries, folder)))
    except OSError as error:
        if error.errno not in TRANSIENT:
            raise
        message = f"folder {folder} cannot be listed ({error.strerror}); mount it or restore access, then run the same again"
        raise EnvironmentFault(message, Fault.SHARE_GONE) from error
    folders = sorted((entry.name for entry in entries if _is_folder(entry) and not entry.is_symlink()), reverse=True)
    return folders, sorted(entry.name for entry in entries if not _is_folder(entry))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(path: Path | os.DirEntry[str]) -> bool:
    try:
        return path.is_dir()
    except OSError:  # for the reader to say
        return False


def _without_links(found: Iterator[SlideEntry]) -> Iterator[SlideEntry]:
    """The entries but for links to one of them."""
    entries = list(found)
    links = {entry.path for entry in entries if entry.path.is_symlink()}
    if links:
        kept = {entry.path.resolve() for entry in entries if entry.path not in links}
        entries = [entry for entry in entries if entry.path not in links or _target(entry.path) not in kept]
    yield from entries


def _target(link: Path) -> Path | None:
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # to nowhere, or to itself: for the reader to say
        return None


class _Looks:
    """Looks at single files, of one search.

    silent  files that did not answer
    """

    def __init__(self) -> None:
        self.silent: set[Path] = set()
        self._folders: dict[Path, tuple[Instance, ...]] = {}

    def instance(self, path: Path) -> Instance | None:
        """The header of a DICOM file; None for all others, and for what cannot be read, which the slide's reader will say.

        Raises EnvironmentFault where this is the second file that does not answer: one may be damaged, two are their share.
        """
        try:
            return _in_time(path, partial(read_instance, path))
        except EnvironmentFault:
            self.silent.add(path)
            if len(self.silent) > 1:
                raise
        except (OSError, ValueError):
            pass
        return None

    def beside(self, instance: Instance) -> list[Instance]:
        """All of the same series in the same folder, which is read once."""
        folder = instance.path.parent
        if folder not in self._folders:
            try:
                self._folders[folder] = _in_time(folder, partial(folder_instances, folder))
            except (OSError, EnvironmentFault):
                self._folders[folder] = ()  # the reader meets the same file, and says which
        return [i for i in self._folders[folder] if i.series == instance.series] or [instance]


def _in_time(path: Path, call: Callable[[], T]) -> T:
    """What `call` returns or raises; EnvironmentFault where `path`, which it is about, does not answer for `ANSWER_S`."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="look", daemon=True).start()  # nobody waits for one that hangs
    if not wait([answer], ANSWER_S).done:
        message = f"{str(path)!r} does not answer for {ANSWER_S:g} s; mount it or restore access, then run the same again"
        raise EnvironmentFault(message, Fault.SHARE_GONE)
    return answer.result()


def _file(path: Path, looks: _Looks) -> SlideEntry:
    """A file that was named. Any file of a DICOM slide stands for the whole slide."""
    instance = _named_instance(path, looks)
    if instance is None:
        return SlideEntry(path, slide_id(path.name), path)
    return _series(looks.beside(instance), path)


def _series(instances: Sequence[Instance], root: Path) -> SlideEntry:
    """A DICOM slide. Its id is made of its folder's name and its UID: neither files' names nor other series change it."""
    path, series = name_instance(instances), instances[0].series
    digest = hashlib.sha256(series.encode()).hexdigest()[:8]
    return SlideEntry(path, f"{slug(path.parent.name)}-{digest}", root, series=series)


def _named_instance(path: Path, looks: _Looks) -> Instance | None:
    """The image of a slide that a file holds which was named; None for others, and unopened where the ending tells."""
    if path.suffix.lower() in SUFFIXES | PICTURES:
        return None
    instance = looks.instance(path)
    return instance if instance is not None and instance.of_slide else None


def _one_a_path(entries: Sequence[SlideEntry], listed: set[SlideEntry]) -> Iterator[SlideEntry]:
    """The entries, each file once, the first of it. Of a file that a slide list has, the list's rows alone, each of them once.

    DICOM slides are left as they are: their files do not tell them apart.
    """
    by_lists = {_place(entry) for entry in listed}
    seen: set[SlideEntry | Path] = set()
    for entry in entries:
        place = _place(entry)
        key = replace(entry, path=place, root=place) if entry in listed else place
        if not entry.series and (key in seen or (place in by_lists and entry not in listed)):
            continue
        seen.add(key)
        yield entry


def _place(entry: SlideEntry) -> Path:
    return _target(entry.path) or entry.path


def _one_a_series(entries: Sequence[SlideEntry]) -> Iterator[SlideEntry]:
    """The entries, each DICOM slide once. Raises UsageError where a series lies in two folders or was given two ids."""
    seen: dict[str, SlideEntry] = {}
    for entry in entries:
        other = seen.setdefault(entry.series, entry) if entry.series else entry
        if other is entry:
            yield entry
        elif replace(other, root=entry.root) != entry:
            raise UsageError(
                f"{other.path} ({other.slide_id}) and {entry.path} ({entry.slide_id}) belong to one DICOM slide, series "
                f"{entry.series}; put all of its files into one folder, and name it once"
            )


def _slide_list(path: Path, looks: _Looks) -> Iterator[SlideEntry]:
    try:
        columns, rows = _in_time(path, partial(_table, path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"slide list {path} cannot be read ({error}); give a CSV file in UTF-8") from error
    name = next((c for c in SLIDE_COLUMNS if c in columns), None)
    if name is None:
        raise UsageError(f"slide list {path} has the columns {', '.join(columns) or 'none'}; it needs one named slide (or wsi)")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise UsageError(f"slide list {path}, line {number}: not as many fields as the header has columns")
        if not row[name].strip():
            raise UsageError(f"slide list {path}, line {number}: column {name} is empty")
        if bad := next((c for c in (name, "mask", "roi") if "\0" in row.get(c, "")), None):
            raise UsageError(f"slide list {path}, line {number}: column {bad} holds {row[bad]!r}, which no file can be called")
        slide = path.parent / row[name].strip()  # an absolute path stays as it is
        instance = _named_instance(slide, looks)
        yield SlideEntry(
            slide,
            slug(row["id"]) if row.get("id", "").strip() else slide_id(row[name].strip()),
            path.parent,
            _number(row.get("slide_mpp", ""), path, number),
            tuple((c, row[c]) for c in columns if c not in OWN_COLUMNS),
            "" if instance is None else instance.series,
            *(path.parent / row[c].strip() if row.get(c, "").strip() else None for c in ("mask", "roi")),
        )


def _table(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """Columns and rows of a slide list."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"slide list {path} is no file; write the list into one")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames or [], list(reader)


def _number(text: str, path: Path, line: int) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"slide list {path}, line {line}: slide_mpp {text!r} is no number; write um per pixel as 0.25"
        ) from None
