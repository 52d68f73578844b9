"""Slides through OpenSlide. Promise: a level's own pixels, over white where the scan has none, from many threads; a read that
fails spoils no other. Only `level` pictures are read, never a label or a macro; of a file's properties, which may name a
patient, only those of `PROPERTIES`; colour profiles are not applied.

OpenSlide's (x, y) is used in this file alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from openslide.lowlevel import OpenSlideError, OpenSlideUnsupportedFormatError
from PIL import Image

from pathology.errors import Reason, SlideError, UsageError
from pathology.faults import probe, read_fault
from pathology.geometry import Box
from pathology.readers.inspect import Kind, SlideFile, refuse_channels
from pathology.readers.mpp import PROPERTIES as MPP_PROPERTIES
from pathology.readers.mpp import openslide_claim
from pathology.readers.opened import Opened, over_white, whole_downsample

BOUNDS = tuple(f"openslide.bounds-{what}" for what in ("y", "x", "height", "width"))
PROPERTIES = MPP_PROPERTIES | {*BOUNDS, openslide.PROPERTY_NAME_VENDOR, openslide.PROPERTY_NAME_OBJECTIVE_POWER}


class OpenSlideReader:
    """Reads through one handle, shared by all threads.

    A handle refuses everything after its first error, so each read that fails is tried once more with a new one, and a good one
    is kept. Handles are let go, not closed: each is closed when the last thread inside it is out.
    """

    def __init__(self, path: Path, handle: openslide.OpenSlide, downsamples: Sequence[float]) -> None:
        self._path = path
        self._downsamples = tuple(downsamples)
        self._lock = threading.Lock()
        self._handle: openslide.OpenSlide | None = handle  # None once closed

    def read(self, level: int, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        handle = self._handle
        if handle is None:
            raise UsageError("the slide is closed; open it again")
        if box.empty:
            return np.empty((*box.shape, 3), np.uint8), None
        try:
            image = self._region(handle, level, box)
        except OpenSlideError:  # perhaps of another thread's read, which the handle repeats to everyone
            image = self._region_anew(level, box)
        return over_white(image)

    def close(self) -> None:
        with self._lock:
            self._handle = None

    def _region(self, handle: openslide.OpenSlide, level: int, box: Box) -> Image.Image:
        downsample = self._downsamples[level]
        location = round(box.x * downsample), round(box.y * downsample)
        return handle.read_region(location, level, (box.width, box.height))

    def _region_anew(self, level: int, box: Box) -> Image.Image:
        """The box through a handle that no other thread can spoil. It becomes the shared one if it survives."""
        with self._lock:
            try:
                fresh = openslide.OpenSlide(self._path)
            except OpenSlideError as error:
                self._raise_fault()
                message = f"{self._path.name!r} can no longer be opened: {_words(error, self._path)}; check where it lies"
                raise SlideError(Reason.READ_ERROR, message) from error
            try:
                image = self._region(fresh, level, box)
            except OpenSlideError as error:
                self._raise_fault()
                message = f"{self._path.name!r}: level {level}, {box} cannot be decoded: {_words(error, self._path)}"
                raise SlideError(Reason.CORRUPT_TILES, message) from error
            if self._handle is not None:
                self._handle = fresh
            return image

    def _raise_fault(self) -> None:
        """Raise what the file system has to say of a file that OpenSlide could not read, if anything."""
        try:
            probe(self._path)
        except OSError as error:
            raise read_fault(repr(self._path.name), self._path, error) from error


def open_with_openslide(file: SlideFile) -> Opened | None:
    """The slide as OpenSlide opens it; None where it does not know the format.

    Raises SlideError(UNSUPPORTED) where it knows the format but cannot read this file, or would read it wrongly.
    """
    try:
        handle = openslide.OpenSlide(file.path)
    except OpenSlideUnsupportedFormatError:
        return None
    except OpenSlideError as error:
        message = f"{file.name} cannot be opened: {_words(error, file.path)}; convert it to a tiled RGB pyramid"
        raise SlideError(Reason.UNSUPPORTED, message) from error
    # Name by name: those that are no text are listed, and then not found.
    properties = {name: value for name in PROPERTIES if (value := handle.properties.get(name)) is not None}
    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "openslide")
    if file.kind is Kind.TIFF and vendor == "generic-tiff":
        refuse_channels(file)  # it would show the first of several channels as if that were the slide
    shapes = tuple((height, width) for width, height in handle.level_dimensions)
    downsamples = handle.level_downsamples
    return Opened(
        reader=OpenSlideReader(file.path, handle, downsamples),
        library=f"openslide {openslide.__library_version__}",
        vendor=vendor,
        level_shapes=shapes,
        level_downsamples=tuple(whole_downsample(shapes[0], s, d) for s, d in zip(shapes, downsamples, strict=True)),
        claim=openslide_claim(properties),
        bounds=scanned_bounds(properties),
        objective=_objective(properties),
    )


def scanned_bounds(properties: Mapping[str, str]) -> Box | None:
    """The part of level 0 that was scanned; None where the file says nothing. MIRAX's may begin at negative places."""
    try:
        return Box(*(int(properties[name]) for name in BOUNDS))
    except (KeyError, ValueError):
        return None


def _objective(properties: Mapping[str, str]) -> float | None:
    try:
        return float(properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER])
    except (KeyError, ValueError):
        return None


def _words(error: Exception, path: Path) -> str:
    """OpenSlide's own words on one line, without the folder they may name."""
    return " ".join(str(error).replace(str(path), path.name).split())
