"""Errors and the reasons a slide can fail for. Promise: every refusal is one of these, with its remedy in the message."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class _Remedied(StrEnum):
    """Words for machines, each with what it means and what a person can do about it."""

    meaning: str
    remedy: str

    def __new__(cls, word: str, meaning: str = "", remedy: str = "") -> Self:
        told = str.__new__(cls, word)
        told._value_ = word
        told.meaning, told.remedy = meaning, remedy
        return told


class Reason(_Remedied):
    """Why a slide has no result, or no whole one; the word in `summary.csv`, events and `result.json`.

    meaning  what it says of the slide
    remedy   what a person can do about it
    """

    MISSING = "missing", "no such path, or a part of the slide is not there", "correct the path, or copy what is missing"
    EMPTY = "empty_file", "the file has no bytes", "copy it again from its source"
    NOT_A_FILE = "not_a_file", "a folder, pipe or device where a slide was expected", "name the slide's own file"
    PERMISSION = "permission", "the file may not be read", "ask for the right to read it"
    NOT_A_SLIDE = "not_a_slide", "the content is no picture that any reader knows", "leave it out"
    TRUNCATED = "truncated", "the file ends before its own pixels do", "copy it again from its source"
    UNSUPPORTED = "unsupported", "a slide, but of a kind no reader here decodes", "convert it to a tiled RGB pyramid"
    NO_MPP = "no_mpp", "the file names no resolution", "state it: `--slide-mpp`, or the slide list's column `slide_mpp`"
    BAD_MPP = (
        "bad_mpp",
        "the resolution is absurd, anisotropic or contradicts `--slide-mpp`",
        "state the right one, with `--force`",
    )
    BAD_MASK = "bad_mask", "its mask or region of interest cannot be read, or is another slide's", "correct it, or leave it out"
    READ_ERROR = (
        "read_error",
        "the file opened, but cannot be read to its end",
        "check the disk; copy it again, then `--retry-failed`",
    )
    CORRUPT_TILES = (
        "corrupt_tiles",
        "pixels of single tiles cannot be decoded",
        "copy it again from its source, then `--overwrite`",
    )
    BAD_SCORES = (
        "bad_scores",
        "the model answered with NaN or infinity",
        "see to the model; `--precision fp32` has the widest range",
    )
    MODEL_ERROR = "model_error", "the model raised on this slide's tiles", "see to the model, then `--retry-failed`"
    CHANGED = "changed", "the slide, or its result, is not what it was when that was made", "`--overwrite` computes it anew"
    CRASHED = "crashed", "the worker process died on this slide, twice", "try it alone; convert it, or leave it out"
    TIMEOUT = (
        "timeout",
        "a read of it, or the work on it, did not come on in time",
        "check the disk or share, or a longer `--read-timeout` or `--region-timeout`",
    )
    OUT_OF_MEMORY = (
        "out_of_memory",
        "the worker took more memory than there is for it, twice",
        "a smaller `--memory` or `--batch-size`, or a larger `--memory-limit`",
    )
    DEVICE_ERROR = "device_error", "the device failed on this slide's tiles, twice, and on no others", "see to driver and model"
    INTERNAL = "internal", "a bug in this program", "report it, with the message"


class Fault(_Remedied):
    """What of the machine ends a run, which then fails no slide (exit code 3); the word in the event `run-end`.

    meaning  what is at fault
    remedy   what a person can do about it, before the same command goes on
    """

    SHARE_GONE = "share_gone", "what slides lie on does not answer, or is not mounted", "mount it or restore access"
    DISK_FULL = "disk_full", "there is no room for results, or less than `--min-free`", "make room"
    OUTPUT = "output", "the output is gone, read-only or answers with errors", "restore access"
    DEVICE = "device", "the device is lost, or none is to be had", "see that it works, or `--device cpu`"
    NO_MEMORY = "no_memory", "there is no memory for a single tile", "free memory, or a smaller `--memory`"
    MACHINE = "machine", "another part of the machine: a scheduler, a folder for copies, a network", "as the message says"


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
    """The machine, not a slide, is at fault: output, disk, device, share (exit code 3). Fails no slide; carries its `fault`."""

    def __init__(self, message: str, fault: Fault = Fault.MACHINE) -> None:
        super().__init__(message, fault)
        self.fault = fault
        self.message = message

    def __str__(self) -> str:
        return self.message


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
