"""What slides say of themselves, asked in processes apart. Promise: little is imported there, and no slide is opened here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pathology.apart import Apart
from pathology.cores import core_count
from pathology.errors import Reason, SlideError
from pathology.faults import share_fault
from pathology.job import ReaderName
from pathology.readers import open_slide
from pathology.slide import SlideInfo
from pipelines.slides import SlideEntry

# More readers at once do not make storage faster, and a process takes as long to start as this many slides to look at.
MOST_PROCESSES = 8
SLIDES_A_PROCESS = 50


def headers(
    apart: Apart, slides: Sequence[SlideEntry], slide_mpp: float | None, force: bool, reader: ReaderName
) -> Iterator[SlideInfo | SlideError]:
    """What each slide's headers say, or why it cannot be worked on: in order, by the processes of `apart`, side by side.

    Raises EnvironmentFault where a slide's share does not answer.
    """
    calls = ((repr(slide.path.name), (slide, slide_mpp, force, reader)) for slide in slides)
    for found in apart.results(_header, calls):
        if isinstance(found, Exception) and not isinstance(found, SlideError):
            raise found
        yield found


def processes(slides: int) -> int:
    """How many are worth starting for so many slides."""
    return min(core_count(), MOST_PROCESSES, 1 + slides // SLIDES_A_PROCESS)


def _header(slide: SlideEntry, slide_mpp: float | None, force: bool, reader: ReaderName) -> SlideInfo:
    mpp = slide.slide_mpp if slide.slide_mpp is not None else slide_mpp
    try:
        with open_slide(slide.path, mpp, force=force, reader=reader, headers_only=True) as opened:
            return opened.info
    except SlideError as error:
        fault = share_fault(error, slide.path, slide.root) if error.reason is Reason.READ_ERROR else None
        raise (fault or error) from error.__cause__
