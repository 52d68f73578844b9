"""DICOM whole-slide images: which files are one slide, and whether all of it is there.

Promise: a file's header alone is read, element by element, never its pixels; a file that is no DICOM costs 132 bytes.

OpenSlide opens a series from any of its files with whatever it finds in that file's folder. An image that is not there it
leaves white, and of two copies it takes the one that the file system lists first: `check_series` refuses both before it does.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathology.errors import Reason, SlideError
from pathology.pulse import beat

MAGIC, MAGIC_AT = b"DICM", 128
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
DIRECTORY = "1.2.840.10008.1.3.10"  # what a DICOMDIR is
IMPLICIT = "1.2.840.10008.1.2"
NATIVE = {IMPLICIT, "1.2.840.10008.1.2.1"}  # transfer syntaxes whose pixels stand as they are, not in items
NOT_READ = {"1.2.840.10008.1.2.2": "big endian", "1.2.840.10008.1.2.1.99": "deflated"}  # headers not read here

# What is read, in the order of the file: PS3.6.
SOP_CLASS, SYNTAX = (0x0002, 0x0002), (0x0002, 0x0010)
IMAGE_TYPE, INSTANCE_UID = (0x0008, 0x0008), (0x0008, 0x0018)
SERIES_UID, PARTS, TILING = (0x0020, 0x000E), (0x0020, 0x9163), (0x0020, 0x9311)
FRAMES, ROWS, COLUMNS = (0x0028, 0x0008), (0x0028, 0x0010), (0x0028, 0x0011)
MATRIX_COLUMNS, MATRIX_ROWS = (0x0048, 0x0006), (0x0048, 0x0007)
WANTED = {
    *(SOP_CLASS, SYNTAX, IMAGE_TYPE, INSTANCE_UID, SERIES_UID, PARTS, TILING),
    *(FRAMES, ROWS, COLUMNS, MATRIX_COLUMNS, MATRIX_ROWS),
}
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
# Their lengths have 32 bits: PS3.5, 7.1.2.
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
UNDEFINED = 0xFFFFFFFF

WINDOW_BYTES = 8192
MOST_ELEMENTS = 20_000
MOST_VALUE_BYTES = 1024
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Instance:
    """What one DICOM file says of itself; "" or 0 where it does not.

    size        of the file, in bytes
    sop_class   what kind of object it is; `WHOLE_SLIDE` for the images of a slide
    series      UID shared by the images of one slide
    uid         the image's own UID
    image_type  the parts of ImageType: VOLUME, LABEL, OVERVIEW, THUMBNAIL at index 2
    shape       (height, width) of the whole image, px
    tile_shape  (height, width) of a frame, px
    frames      how many of them the file holds
    parts       how many files hold the image, where it is split and says so
    full        every frame of the image is stored, none left out as glass
    cut         the file ends within its header
    """

    path: Path
    size: int
    sop_class: str
    syntax: str
    series: str
    uid: str
    image_type: tuple[str, ...]
    shape: tuple[int, int]
    tile_shape: tuple[int, int]
    frames: int
    parts: int
    full: bool
    cut: bool

    @property
    def of_slide(self) -> bool:
        """It is an image of a slide, and says of which one."""
        return self.sop_class == WHOLE_SLIDE and bool(self.series and self.uid)

    @property
    def volume(self) -> bool:
        """It is (part of) a level of the slide, not its label, overview or thumbnail."""
        return self.of_slide and self.image_type[2:3] == ("VOLUME",)


def may_be_dicom(name: str) -> bool:
    """A file of this name is worth a look: it ends in .dcm, or has no ending, or is called like a UID."""
    suffix = Path(name).suffix
    return suffix.lower() == ".dcm" or not suffix.rstrip(".") or suffix[1:].isdecimal()


def read_instance(path: Path) -> Instance | None:
    """The file's header; None for whatever is no regular file or no DICOM. Raises OSError where it cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    beat()  # a folder may hold thousands
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, MAGIC_AT + len(MAGIC), 0)[MAGIC_AT:] != MAGIC:
            return None
        size = os.fstat(descriptor).st_size
        found: dict[tuple[int, int], bytes] = {}
        cut = False
        try:
            for tag, value in _elements(descriptor, size):
                found[tag] = value
        except EOFError:
            cut = True
    finally:
        os.close(descriptor)
    return Instance(
        path=path,
        size=size,
        sop_class=_text(found, SOP_CLASS),
        syntax=_text(found, SYNTAX),
        series=_text(found, SERIES_UID),
        uid=_text(found, INSTANCE_UID),
        image_type=tuple(part.strip() for part in _text(found, IMAGE_TYPE).split("\\")),
        shape=(_integer(found, MATRIX_ROWS), _integer(found, MATRIX_COLUMNS)),
        tile_shape=(_integer(found, ROWS), _integer(found, COLUMNS)),
        frames=int(text) if (text := _text(found, FRAMES)).isdecimal() else 0,
        parts=_integer(found, PARTS),
        full=_text(found, TILING) == "TILED_FULL",
        cut=cut,
    )


def folder_instances(folder: Path) -> tuple[Instance, ...]:
    """The images of slides in a folder itself, by UID and then by name.

    Raises OSError where a file that may be one of them cannot be read; OpenSlide would go on without it.
    """
    found = []
    for file in folder.iterdir():
        try:
            instance = read_instance(file)
        except OSError:
            if may_be_dicom(file.name):
                raise
            continue
        if instance is not None and instance.of_slide:
            found.append(instance)
    return tuple(sorted(found, key=lambda i: (i.uid, i.path)))


def name_instance(instances: Sequence[Instance]) -> Path:
    """The file that stands for its series, whatever the files are called: of its largest image, the one of the lowest UID."""
    return min(instances, key=lambda i: (not i.volume, -i.shape[0] * i.shape[1], i.uid, i.path)).path


def slide_instances(path: Path) -> tuple[Instance, ...]:
    """All images of the slide that the DICOM file `path` belongs to, checked: see `check_series`.

    Raises SlideError(NOT_A_SLIDE, UNSUPPORTED, TRUNCATED) where the file is none of a slide's images.
    """
    name = repr(path.name)
    instance = read_instance(path)
    if instance is None:
        raise SlideError(Reason.NOT_A_SLIDE, f"{name} is no longer the DICOM file it was; check where it lies")
    if instance.sop_class == DIRECTORY:
        raise SlideError(Reason.NOT_A_SLIDE, f"{name} is a DICOMDIR, which only lists files; name the folder that it lies in")
    if instance.cut:
        raise SlideError(Reason.TRUNCATED, f"{name} is cut short: it ends within its header; copy it again from its source")
    if instance.sop_class != WHOLE_SLIDE:
        of = instance.sop_class or "none stated"
        message = f"{name} is no dicom whole-slide image (SOP class {of}); name one of class {WHOLE_SLIDE}"
        raise SlideError(Reason.UNSUPPORTED, message)
    if not instance.of_slide:
        how = NOT_READ.get(instance.syntax, instance.syntax)
        message = f"{name} states no series or instance UID that can be read (transfer syntax {how}); convert it to explicit VR"
        raise SlideError(Reason.UNSUPPORTED, message)
    instances = tuple(i for i in folder_instances(path.parent) if i.series == instance.series)
    check_series(instances)
    return instances


def check_series(instances: Sequence[Instance]) -> None:
    """Raise SlideError where the files of a series are not one whole slide.

    TRUNCATED    a file ends before its pixels do
    MISSING      no image of the slide's tissue, not the one of full resolution, or not all parts of one
    UNSUPPORTED  two files hold the same image
    """
    series = f"DICOM series {instances[0].series}"
    again = "copy the series again from its source"
    if twice := next((uid for uid, count in Counter(i.uid for i in instances).items() if count > 1), None):
        names = " and ".join(repr(i.path.name) for i in instances if i.uid == twice)
        raise SlideError(Reason.UNSUPPORTED, f"{series} holds image {twice} more than once ({names}); keep one of them")
    if cut := next((i for i in instances if _is_cut(i)), None):
        raise SlideError(Reason.TRUNCATED, f"{cut.path.name!r} is cut short: its pixels do not end within it; {again}")
    volumes = [i for i in instances if i.volume]
    if not volumes:
        raise SlideError(Reason.MISSING, f"{series} has no VOLUME image in the folder, only {_types(instances)}; {again}")
    largest = max(i.shape for i in volumes)
    if all(i.image_type[3:4] == ("RESAMPLED",) for i in volumes if i.shape == largest):
        raise SlideError(Reason.MISSING, f"{series} lacks its image of full resolution: what is here is RESAMPLED; {again}")
    for shape in {i.shape: None for i in volumes}:
        parts = [i for i in volumes if i.shape == shape]
        if missing := _missing(parts):
            raise SlideError(Reason.MISSING, f"{series}: its image of {shape[1]} x {shape[0]} px lacks {missing}; {again}")


def _missing(parts: Sequence[Instance]) -> str:
    """What is not there of an image in one or several files; "" where nothing is missing."""
    if (stated := max(i.parts for i in parts)) > len(parts):
        return f"{stated - len(parts)} of its {stated} files"
    (height, width), (tile_height, tile_width) = parts[0].shape, parts[0].tile_shape
    if all(i.full for i in parts) and tile_height and tile_width:
        tiles = -(-height // tile_height) * -(-width // tile_width)
        if (frames := sum(i.frames for i in parts)) < tiles:
            return f"{tiles - frames} of its {tiles} frames"
    return ""


def _is_cut(instance: Instance) -> bool:
    """The pixels end beyond the file: it is smaller than its raw frames, or compressed ones lack the mark at their end."""
    if instance.cut:
        return True
    if instance.syntax in NATIVE:
        height, width = instance.tile_shape
        return instance.volume and instance.size < instance.frames * height * width * 3
    descriptor = os.open(instance.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tail = os.pread(descriptor, TAIL_BYTES, max(0, instance.size - TAIL_BYTES))
    finally:
        os.close(descriptor)
    return b"\xfe\xff\xdd\xe0\0\0\0\0" not in tail


def _types(instances: Sequence[Instance]) -> str:
    return ", ".join(sorted({"\\".join(i.image_type) for i in instances}))


def _elements(descriptor: int, size: int) -> Iterator[tuple[tuple[int, int], bytes]]:
    """The wanted elements of the file meta group and of the data set's top level, up to the last that can be wanted.

    Stops early where the bytes are no elements any more. Raises EOFError where the file ends within one.
    """
    window, window_at = b"", 0

    def take(at: int, count: int) -> bytes:
        nonlocal window, window_at
        if at < window_at or at + count > window_at + len(window):
            window, window_at = os.pread(descriptor, max(count, WINDOW_BYTES), at), at
        taken = window[at - window_at : at - window_at + count]
        if len(taken) < count:
            raise EOFError
        return taken

    at = MAGIC_AT + len(MAGIC)
    explicit = True  # so is the meta group always
    outer: list[bool] = []  # for each sequence that is open: whether what surrounds it is explicit
    meta, syntax = True, ""
    for _ in range(MOST_ELEMENTS):
        head = take(at, 8)
        tag = (int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little"))
        if meta and tag[0] != 0x0002:
            meta = False
            explicit = syntax != IMPLICIT
            if syntax in NOT_READ:
                return
        if not outer and tag > MATRIX_ROWS:
            return
        at += 8
        kind = head[4:6]
        if tag[0] == 0xFFFE:
            length = int.from_bytes(head[4:], "little")
        elif not explicit:
            kind, length = b"", int.from_bytes(head[4:], "little")
        elif not kind.isalpha() or not kind.isupper():
            return
        elif kind in LONG:
            length = int.from_bytes(take(at, 4), "little")
            at += 4
        else:
            length = int.from_bytes(head[6:], "little")
        if tag == SEQUENCE_END:
            explicit = outer.pop()
        elif tag == ITEM_END or (tag == ITEM and length == UNDEFINED):
            pass  # what is in it follows
        elif length == UNDEFINED:
            outer.append(explicit)
            explicit = explicit and kind != b"UN"  # PS3.5, 6.2.2: such a sequence is written as implicit
        else:
            if at + length > size:
                raise EOFError
            if not outer and tag in WANTED and length <= MOST_VALUE_BYTES:
                value = take(at, length)
                if tag == SYNTAX:
                    syntax = value.rstrip(b"\0 ").decode("ascii", "replace")
                yield tag, value
            at += length


def _text(found: dict[tuple[int, int], bytes], tag: tuple[int, int]) -> str:
    text = found.get(tag, b"").rstrip(b"\0 ").decode("ascii", "replace").strip()
    return "".join(c if c.isprintable() else "\ufffd" for c in text)  # it stands in messages


def _integer(found: dict[tuple[int, int], bytes], tag: tuple[int, int]) -> int:
    return int.from_bytes(found.get(tag, b""), "little")
