"""Whether a slide is still the same one. Promise: decided by sizes and sampled content, never by names of slides or by times.

A sample finds another scan, another export and a cut file; a flipped bit between the samples it does not find.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pathology.pulse import beat
from pathology.readers.inspect import Kind, SlideFile, inspect_file, mirax_folder, no_access

ENDS_BYTES = 256 * 1024
BLOCKS, BLOCK_BYTES = 64, 4096
# Of a whole file, read at once.
PART_BYTES = 2**20


def fingerprint(path: str | os.PathLike[str]) -> str:
    """64 hex digits: sha256 over each file of the slide: its size, first and last 256 KiB and 64 evenly spaced 4-KiB blocks.

    Most slides are one file. MIRAX: every file of its folder, with its name. VMS: the index and the files it names. DICOM: the
    sorted instance UIDs and sizes of the files of its series in the same folder, so that any of them gives the same answer.
    Raises SlideError as `open_slide` does where the path is no readable slide.
    """
    return fingerprint_file(inspect_file(Path(path)))


def fingerprint_file(file: SlideFile) -> str:
    """`fingerprint` of a file that was inspected."""
    try:
        return _fingerprint(file)
    except OSError as error:
        raise no_access(file.name, error) from error


def whole_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of every byte of each file of the slide, by its name in or below the slide's folder.

    Bits that flipped inside a tile are decoded without complaint; this is what shows them. Raises SlideError.
    """
    file = inspect_file(Path(path))
    try:
        return {part.relative_to(file.path.parent).as_posix(): _whole(part) for part in file.parts}
    except OSError as error:
        raise no_access(file.name, error) from error


def _whole(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(PART_BYTES):
            digest.update(data)
            beat()
    return digest.hexdigest()


def _fingerprint(file: SlideFile) -> str:
    path, kind = file.path, file.kind
    total = hashlib.sha256()
    if kind is Kind.MIRAX:
        _add_named(total, [file for file in mirax_folder(path).iterdir() if file.is_file()])
    elif kind is Kind.VMS:
        index = path.read_bytes()
        total.update(index)
        _add_named(total, [file for file in path.parent.iterdir() if os.fsencode(file.name) in index and file.is_file()])
    elif kind is Kind.DICOM:
        for instance in file.instances:
            total.update(f"{instance.uid}\0{instance.size}\0".encode())
    else:
        total.update(_sample(path))
    return total.hexdigest()


def _add_named(total: hashlib._Hash, files: list[Path]) -> None:
    for file in sorted(files):
        total.update(os.fsencode(file.name) + b"\0" + _sample(file))


def _sample(path: Path) -> bytes:
    """sha256 over a file's size and samples."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(b"%d\0" % size)
        last = max(0, size - BLOCK_BYTES)
        spans = [(0, ENDS_BYTES), (max(0, size - ENDS_BYTES), ENDS_BYTES)]
        spans += [(last * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]
        for at, count in spans:
            digest.update(os.pread(file.fileno(), count, at))
            beat()
    return digest.digest()
