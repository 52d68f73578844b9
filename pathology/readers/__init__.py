"""Opening slides. Promise: one door for every format, and whatever cannot be read rightly is refused with its reason.

The libraries that read files are imported here only, each when its first file is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from pathology.errors import Reason, SlideError
from pathology.readers.fingerprint import fingerprint, fingerprint_file
from pathology.readers.inspect import Kind, SlideFile, inspect_file
from pathology.readers.mpp import choose_mpp
from pathology.readers.opened import Opened
from pathology.slide import Slide, SlideInfo

__all__ = ["fingerprint", "open_slide"]


def open_slide(path: str | os.PathLike[str], slide_mpp: float | None = None, *, force: bool = False) -> Slide:
    """An open slide, whatever its format; a context manager.

    slide_mpp  um per level-0 pixel, used in place of what the file states
    force      take `slide_mpp` although the file states a sound value more than 10 % away

    Raises SlideError: MISSING, EMPTY, NOT_A_FILE, PERMISSION, NOT_A_SLIDE, TRUNCATED, UNSUPPORTED, NO_MPP, BAD_MPP, READ_ERROR.
    """
    file = inspect_file(Path(path))
    opened = _open(file)
    try:
        mpp, mpp_source = choose_mpp(file.name, opened.claim, slide_mpp, force=force)
        info = SlideInfo(
            shape=opened.level_shapes[0],
            level_shapes=opened.level_shapes,
            level_downsamples=opened.level_downsamples,
            mpp=mpp,
            mpp_source=mpp_source,
            reader=opened.library,
            vendor=opened.vendor,
            bounds=opened.bounds,
            fingerprint=fingerprint_file(file),
            objective=opened.objective,
        )
    except BaseException:
        opened.reader.close()
        raise
    return Slide(file.path, info, opened.reader)


def _open(file: SlideFile) -> Opened:
    """The file through the reader that suits it: the one place that chooses."""
    if file.kind not in (Kind.PNG, Kind.JPEG):
        from pathology.readers.openslide_reader import open_with_openslide

        opened = open_with_openslide(file)
        if opened is not None:
            return opened
        if file.kind is not Kind.TIFF:
            message = f"{file.name} ({file.kind}) is of a make that OpenSlide does not read; convert it to a tiled TIFF pyramid"
            raise SlideError(Reason.UNSUPPORTED, message)
    from pathology.readers.plain import open_plain

    return open_plain(file)
