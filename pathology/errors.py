"""Errors and the reasons a slide can fail for. Promise: every refusal is one of these, with its remedy in the message."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a slide has no result, or no whole one; the word in `summary.csv`, events and `result.json`."""

    MISSING = "missing"  # no such path
    EMPTY = "empty_file"  # zero bytes
    NOT_A_FILE = "not_a_file"  # a folder, pipe or device where a slide was expected
    PERMISSION = "permission"  # the file may not be read
    NOT_A_SLIDE = "not_a_slide"  # the content is no picture that any reader knows
    TRUNCATED = "truncated"  # the file ends before its own pixels do
    UNSUPPORTED = "unsupported"  # a slide, but of a kind no reader here decodes
    NO_MPP = "no_mpp"  # the file names no resolution
    BAD_MPP = "bad_mpp"  # the resolution is absurd, anisotropic or contradicts --slide-mpp
    BAD_MASK = "bad_mask"  # the mask or region of interest given for it cannot be read, or belongs to another slide
    READ_ERROR = "read_error"  # pixels could not be read although the slide opened
    CORRUPT_TILES = "corrupt_tiles"  # pixels of single tiles cannot be decoded; the file is readable elsewhere
    BAD_SCORES = "bad_scores"  # the model answered with NaN or infinity
    MODEL_ERROR = "model_error"  # the model raised on this slide's tiles
    CHANGED = "changed"  # the slide, or its finished result, is not what it was when the result was made
    CRASHED = "crashed"  # the worker process died on this slide, twice
    TIMEOUT = "timeout"  # a call that reads the file did not come back in time, or nothing else came on
    OUT_OF_MEMORY = "out_of_memory"  # the worker took more memory than there is for it, twice
    DEVICE_ERROR = "device_error"  # the device failed on this slide's tiles, twice, and on no others
    INTERNAL = "internal"  # a bug in this program


class PathologyError(Exception):
    """Base of all errors raised on purpose. The message says what, the value, and the remedy, in one line."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What `error` says, in a line of at most `most` characters; its type's name where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The type of an error that nobody expected, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class UsageError(PathologyError, ValueError):
    """The request makes no sense as stated: an option, a slide list, a refusal to mix results (exit code 2)."""


class ModelError(PathologyError, ValueError):
    """A model that cannot be loaded, is not trusted, or does not do what its card says (exit code 2)."""


class EnvironmentFault(PathologyError, RuntimeError):
    """The machine, not a slide, is at fault: output, disk, device, share (exit code 3). Fails no slide."""


class OutOfMemory(EnvironmentFault):
    """There is no memory for so large a batch; a smaller one may still be computed."""


class SlideError(PathologyError, OSError):
    """One slide cannot be read or finished; carries the typed `reason`.

    The arguments are (reason, message), so that the error survives pickling between processes.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message
