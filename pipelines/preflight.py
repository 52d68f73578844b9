"""A look at the headers of all slides, before the first is computed.

Promise: none is opened in this process, none holds a run up for long, and what cannot be worked on is known before a model is
shown anything.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pathology.apart import Apart
from pathology.encoding import stored_bytes
from pathology.errors import EnvironmentFault, Fault, Reason, SlideError
from pathology.faults import share_gone
from pathology.grid import TileGrid
from pathology.job import Job
from pathology.model import ModelSpec
from pathology.readers.inspect import inspect_file
from pathology.slide import SlideInfo
from pathology.window import SLIDES_AHEAD
from pipelines.config import Settings
from pipelines.headers import headers, processes
from pipelines.slides import SlideEntry

# By a slide's id.
Found = dict[str, SlideInfo | SlideError]

# What was not looked at by then is when its turn comes.
LONGEST_S = 60.0


class Preflight:
    """A look at the slides of a run by a thread of its own, while the model is loaded. A context manager.

    As many as a run begins at once anyway are not looked at beforehand, but whether they are there: their plans are made
    before anything else.

    found  what was seen of slides before, by their ids; what is seen now is added
    """

    def __init__(self, slides: Sequence[SlideEntry], settings: Settings, found: Found) -> None:
        self._slides = list(slides)
        self._new = [slide for slide in slides if slide.slide_id not in found]
        self._settings = settings
        self._found = found
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._given_up = False
        self._began = time.monotonic()
        self.seconds = 0.0
        self._apart: Apart | None = None
        self.many = len(self._new) > SLIDES_AHEAD
        if self.many:
            self._apart = Apart(processes(len(self._new)), LONGEST_S)
            threading.Thread(target=self._look, name="preflight", daemon=True).start()
        else:
            self._find()
            self._over.set()

    def __enter__(self) -> Preflight:
        return self

    def __exit__(self, *_: object) -> None:
        self._give_up()

    def wait(self, stop: threading.Event) -> None:
        """Until all slides were looked at, `LONGEST_S` have passed, or `stop` is set.

        Raises EnvironmentFault where a share does not answer, or no slide at all is where it should be.
        """
        while not self._over.wait(0.05) and not stop.is_set() and time.monotonic() - self._began < LONGEST_S:
            pass
        self._give_up()
        if self._error is not None:
            raise self._error
        missing = [s for s in self._slides if isinstance(e := self._found.get(s.slide_id), SlideError) and _is_missing(e)]
        if len(missing) == len(self._slides) > 1 and (why := share_gone(missing[0].path, missing[0].root)):
            message = f"none of the {len(missing)} slides is there: {why}; mount it or correct their paths"
            raise EnvironmentFault(message, Fault.SHARE_GONE)

    @property
    def slides(self) -> int:
        """How many there are to be looked at."""
        return len(self._new)

    @property
    def looked_at(self) -> int:
        """Of these, how many it is known of whether they can be worked on."""
        return sum(slide.slide_id in self._found for slide in self._new)

    def failure(self, slide_id: str) -> SlideError | None:
        """Why a slide cannot be worked on; None where nothing speaks against it."""
        found = self._found.get(slide_id)
        return found if isinstance(found, SlideError) else None

    def failures(self) -> dict[Reason, int]:
        """How many slides cannot be worked on, by their reason, the most frequent first."""
        errors = (self.failure(slide.slide_id) for slide in self._new)
        return dict(Counter(error.reason for error in errors if error is not None).most_common())

    def most_bytes(self, job: Job, spec: ModelSpec) -> int:
        """Bytes that the job's result may take, with tissue everywhere and not compressed; 0 where the slide is not known."""
        info = self._found.get(job.slide_id)
        if not isinstance(info, SlideInfo):
            return 0
        grid = TileGrid(info.shape, info.mpp, spec.mpp, spec.tile_px, job.stride_px(spec))
        rows, cols = grid.shape
        return stored_bytes(spec, job.heatmap_dtype, grid.heatmap_frame(spec.output_px).shape, rows * cols)

    def _look(self) -> None:
        assert self._apart is not None
        asked = self._settings
        try:
            with self._apart:
                seen = headers(self._apart, self._new, asked.slide_mpp, asked.force, asked.reader)
                for slide, found in zip(self._new, seen, strict=True):
                    if self._given_up:  # what comes now has been cut off
                        break
                    self._found[slide.slide_id] = found
        except BaseException as error:
            if not self._given_up:
                self._error = error
        finally:
            if not self._given_up:
                self.seconds = time.monotonic() - self._began
            self._over.set()

    def _find(self) -> None:
        for slide in self._new:
            try:
                there = slide.path.exists()
            except OSError:  # for the worker that opens it to say
                continue
            if not there:
                self._found[slide.slide_id] = _missing(slide.path)

    def _give_up(self) -> None:
        if not self._over.is_set() and not self._given_up:
            self._given_up = True
            self.seconds = time.monotonic() - self._began
            if self._apart is not None:
                self._apart.stop()


def _missing(path: Path) -> SlideError:
    try:
        inspect_file(path)
    except SlideError as error:
        return error
    return SlideError(Reason.MISSING, f"{path.name!r} was not there a moment ago; run the same again with --retry-failed")


def _is_missing(error: SlideError) -> bool:
    return error.reason is Reason.MISSING
