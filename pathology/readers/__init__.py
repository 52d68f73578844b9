"""Opening slides. Promise: one door for every format, and whatever cannot be read rightly is refused with its reason.

The libraries that read files are imported here only, each when its first file is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from pathology.errors import Reason, SlideError
from pathology.faults import retried
from pathology.job import ReaderName
from pathology.readers.fingerprint import fingerprint, fingerprint_file, whole_hashes
from pathology.readers.inspect import Kind, SlideFile, inspect_file, no_access
from pathology.readers.mpp import choose_mpp
from pathology.readers.opened import CACHE_BYTES, Opened
from pathology.readers.tiff import too_large
from pathology.slide import Slide, SlideInfo

__all__ = ["fingerprint", "open_slide", "whole_hashes"]


def open_slide(
    path: str | os.PathLike[str],
    slide_mpp: float | None = None,
    *,
    force: bool = False,
    reader: ReaderName = "auto",
    fast_decode: bool = False,
    cache_bytes: int = 4 * CACHE_BYTES,
    headers_only: bool = False,
) -> Slide:
    """An open slide, whatever its format; a context manager.

    slide_mpp    um per level-0 pixel, used in place of what the file states
    force        take `slide_mpp` although the file states a sound value more than 10 % away
    reader       "direct" (tiled TIFF, decoded here), "openslide", "pillow" (whole pictures); "auto": the first of these that
                 reads the file
    fast_decode  let JPEG's scaled decoding stand in for the mean where a coarser picture is wanted (direct reader only)
    cache_bytes  most bytes of decoded tiles that the direct reader keeps
    headers_only for a quick look at many: no fingerprint is taken ("") and no tile of a direct reader compared with OpenSlide's

    What the disk or share may give at another try is tried again. Raises SlideError: MISSING, EMPTY, NOT_A_FILE, PERMISSION,
    NOT_A_SLIDE, TRUNCATED, UNSUPPORTED, NO_MPP, BAD_MPP, READ_ERROR.
    """
    place = Path(path)
    try:
        return retried(
            lambda: _open_slide(
                place,
                slide_mpp,
                force=force,
                reader=reader,
                fast_decode=fast_decode,
                cache_bytes=cache_bytes,
                headers_only=headers_only,
            )
        )
    except SlideError:
        raise
    except OSError as error:  # of a library that reads by itself
        raise no_access(repr(place.name), error) from error


def _open_slide(
    path: Path,
    slide_mpp: float | None,
    *,
    force: bool,
    reader: ReaderName,
    fast_decode: bool,
    cache_bytes: int,
    headers_only: bool,
) -> Slide:
    file = inspect_file(path)
    opened, why = _open(file, reader, fast_decode, cache_bytes, compare=not headers_only)
    try:
        height, width = opened.level_shapes[0]
        if too_large((height, width)):
            message = f"{file.name} claims {width} x {height} px, which is larger than any slide; copy it again from its source"
            raise SlideError(Reason.UNSUPPORTED, message)
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
            fingerprint="" if headers_only else fingerprint_file(file),
            objective=opened.objective,
            reader_why=why,
        )
    except BaseException:
        opened.reader.close()
        raise
    return Slide(file.path, info, opened.reader)


def _open(file: SlideFile, wanted: ReaderName, fast: bool, cache_bytes: int, compare: bool) -> tuple[Opened, str]:
    """The file through the reader that suits it, and why that one: the one place that chooses."""
    refused: SlideError | None = None
    direct_not = "it is no TIFF"
    if file.kind not in (Kind.PNG, Kind.JPEG) and wanted != "pillow":
        from pathology.readers.openslide_reader import open_with_openslide

        opened = None
        try:
            opened = open_with_openslide(file)
        except SlideError as error:
            refused = error
        if file.kind is Kind.TIFF and wanted != "openslide":
            from pathology.readers.direct import open_direct

            direct = open_direct(file, opened, cache_bytes, fast, compare=compare)
            if isinstance(direct, Opened):
                return direct, "its tiles can be decoded without a slide library" if wanted == "auto" else "it was asked for"
            direct_not = direct
        if opened is not None and wanted != "direct":
            return opened, "it was asked for" if wanted == "openslide" else f"the direct reader does not suit: {direct_not}"
    if wanted == "direct":
        raise SlideError(Reason.UNSUPPORTED, f"{file.name} cannot be read directly: {direct_not}; use --reader auto")
    if refused is not None:
        raise refused
    if file.kind not in (Kind.PNG, Kind.JPEG, Kind.TIFF):
        if wanted == "pillow":
            raise SlideError(
                Reason.UNSUPPORTED, f"{file.name} ({file.kind}) is no picture that pillow reads; use --reader auto"
            )
        message = f"{file.name} ({file.kind}) is of a make that OpenSlide does not read; convert it to a tiled TIFF pyramid"
        raise SlideError(Reason.UNSUPPORTED, message)
    if wanted == "openslide":
        raise SlideError(Reason.UNSUPPORTED, f"{file.name} is none of OpenSlide's formats; use --reader auto")
    from pathology.readers.plain import open_plain

    return open_plain(file), "it was asked for" if wanted == "pillow" else "it is one picture without tiles"
