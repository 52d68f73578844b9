"""What a file is, found from its own bytes before any library touches it.

Promise: a missing, empty, foreign, unreadable or cut-short file is told apart from the others by its reason, a pipe or a
device is never opened, and the name's extension decides nothing (but for MIRAX, which has no other mark).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pathology.errors import Reason, SlideError
from pathology.readers.dicom import MAGIC, MAGIC_AT, Instance, slide_instances
from pathology.readers.tiff import MAGICS, CutShort, Directory, Malformed, largest, read_directories


class Kind(StrEnum):
    """What the first bytes say."""

    TIFF = "tiff"
    PNG = "png"
    JPEG = "jpeg"
    DICOM = "dicom"
    MIRAX = "mirax"
    VMS = "vms"
    OTHER = "other"  # a slide format that only OpenSlide knows: Zeiss CZI, Sakura


HEADS = (
    *((magic, Kind.TIFF) for magic in MAGICS),
    (b"\x89PNG\r\n\x1a\n", Kind.PNG),
    (b"\xff\xd8\xff", Kind.JPEG),
    (b"[Virtual Microscope Specimen]", Kind.VMS),
    (b"[Uncompressed Virtual Microscope Specimen]", Kind.VMS),
    (b"ZISRAWFILE", Kind.OTHER),
    (b"SQLite format 3\0", Kind.OTHER),
)
PNG_BITS_AT = 24
MAX_INDEX_BYTES = 2**20  # of a VMS, which lists a few files
CMYK = 5  # TIFF's PhotometricInterpretation


@dataclass(frozen=True, slots=True)
class SlideFile:
    """A regular, readable file of a known kind.

    directories  of a TIFF, all within the file
    instances    of a DICOM slide, all of its images
    """

    path: Path
    size: int
    kind: Kind
    directories: tuple[Directory, ...] = ()
    instances: tuple[Instance, ...] = ()

    @property
    def name(self) -> str:
        """For messages: quoted, and on one line whatever the name is."""
        return repr(self.path.name)

    @property
    def parts(self) -> tuple[Path, ...]:
        """All files of the slide, in or below its folder: MIRAX: the index and those in its folder; VMS: the index and those
        it names; DICOM: those of the series; otherwise the file itself. Raises OSError."""
        if self.kind is Kind.MIRAX:
            return (self.path, *sorted(file for file in mirax_folder(self.path).iterdir() if file.is_file()))
        if self.kind is Kind.VMS:
            index = self.path.read_bytes()
            beside = (file for file in self.path.parent.iterdir() if os.fsencode(file.name) in index and file.is_file())
            return (self.path, *sorted(file for file in beside if file != self.path))
        return tuple(instance.path for instance in self.instances) or (self.path,)


def inspect_file(path: Path) -> SlideFile:
    """The facts of the file at `path`; raises SlideError with its reason where no reader could open it."""
    name = repr(path.name)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # one that may not be listed is met where slides were looked for
        if not stat.S_ISREG(status.st_mode):
            raise SlideError(Reason.NOT_A_FILE, f"{name} is {_sort(status.st_mode)}, not a file; name the slide's own file")
        if mirax_folder(path).joinpath("Slidedat.ini").is_file() and path.suffix == ".mrxs":
            _refuse_pipes(mirax_folder(path))
            return SlideFile(path, status.st_size, Kind.MIRAX)
        if status.st_size == 0:
            raise SlideError(Reason.EMPTY, f"{name} has 0 bytes; copy it again from its source")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise SlideError(Reason.MISSING, f"{name} is no file name: {error}") from error
    except SlideError:
        raise
    except OSError as error:
        raise no_access(name, error) from error
    try:
        head = os.pread(descriptor, 512, 0)
        kind = _kind(head)
        if path.suffix == ".mrxs" and kind in (None, Kind.JPEG):
            folder = repr(path.stem)
            raise SlideError(Reason.MISSING, f"{name} has no folder {folder} with Slidedat.ini beside it; copy both")
        if kind is None:
            message = f"{name} holds no picture of a known format; give a slide, a TIFF, a PNG or a JPEG"
            raise SlideError(Reason.NOT_A_SLIDE, message)
        if kind is Kind.PNG:
            _refuse_deep(name, *head[PNG_BITS_AT : PNG_BITS_AT + 1])
        if kind is Kind.VMS and status.st_size > MAX_INDEX_BYTES:
            message = f"{name} has {status.st_size} bytes, where it should list a few files; give the slide's own index"
            raise SlideError(Reason.UNSUPPORTED, message)
        if kind in (Kind.DICOM, Kind.VMS):
            _refuse_pipes(path.parent)
        if kind is Kind.DICOM:
            return SlideFile(path, status.st_size, kind, instances=slide_instances(path))
        if kind is not Kind.TIFF:
            return SlideFile(path, status.st_size, kind)
        directories = read_directories(descriptor, status.st_size)
    except CutShort as error:
        raise SlideError(Reason.TRUNCATED, f"{name} is cut short: {error}; copy it again from its source") from error
    except Malformed as error:
        raise SlideError(Reason.UNSUPPORTED, f"{name} is no sound TIFF: {error}; write it anew") from error
    except SlideError:
        raise
    except OSError as error:  # of another file of the slide, where the error names one
        raise no_access(repr(Path(error.filename).name) if error.filename else name, error) from error
    finally:
        os.close(descriptor)
    _refuse_deep(name, max(d.bits for d in largest(directories)))
    return SlideFile(path, status.st_size, kind, directories)


def refuse_channels(file: SlideFile) -> None:
    """Raise SlideError(UNSUPPORTED) where a TIFF without a vendor's layout holds several channels or planes, or inks."""
    planes = list(largest(file.directories))
    if len(planes) > 1 or planes[0].photometric == CMYK or planes[0].samples > 4:
        channels = sum(plane.samples for plane in planes)
        message = f"{file.name} has {channels} channels that are not one RGB picture; convert it to RGB"
        raise SlideError(Reason.UNSUPPORTED, message)


def mirax_folder(path: Path) -> Path:
    """Where a MIRAX slide keeps its pixels: the folder beside `path`, named like it without the extension."""
    return path.with_suffix("")


def _kind(head: bytes) -> Kind | None:
    if head[MAGIC_AT:].startswith(MAGIC):
        return Kind.DICOM
    return next((kind for magic, kind in HEADS if head.startswith(magic)), None)


def _refuse_deep(name: str, bits: int = 0) -> None:
    """Libraries cut 16 bits to 8 without a word, which leaves little of a picture that uses the lower ones."""
    if bits > 8:
        raise SlideError(Reason.UNSUPPORTED, f"{name} has {bits} bits per sample; convert it to 8-bit RGB")


def _refuse_pipes(folder: Path) -> None:
    """OpenSlide opens what lies beside a slide of several files, and would wait for a pipe for ever."""
    for entry in os.scandir(folder):
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nowhere, say: for whoever needs the file
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            message = f"{entry.name!r}, beside the slide's own files, is {_sort(mode)}; move it elsewhere"
            raise SlideError(Reason.NOT_A_FILE, message)


def _sort(mode: int) -> str:
    for test, sort in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")):
        if test(mode):
            return sort
    return "a device"


def no_access(name: str, error: OSError) -> SlideError:
    """What the operating system's refusal means for a slide; `name` is for the message."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return SlideError(Reason.MISSING, f"{name} does not exist ({error.strerror}); check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return SlideError(Reason.PERMISSION, f"{name} may not be read ({error.strerror}); ask for the right to read it")
    return SlideError(Reason.READ_ERROR, f"{name} cannot be read: {error.strerror}; check the disk or share it lies on")
