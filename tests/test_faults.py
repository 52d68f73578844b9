"""Disks and shares that answer with errors: what passes is waited for, what does not is the share's fault or one file's."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openslide.lowlevel import OpenSlideError
from slides import noise_pixels, write_tiff
from test_direct import reader_of

from pathology import Job, durable, faults, job_slide, slide_worker
from pathology.alive import mark
from pathology.durable import new_file, write_file
from pathology.errors import EnvironmentFault, Fault, PathologyError, Reason, SlideError
from pathology.events import emit, read_events
from pathology.faults import WAITS_S, retried, share_gone
from pathology.geometry import Box
from pathology.readers import open_slide
from pathology.readers.openslide_reader import OpenSlideReader
from pathology.runner import run
from pathology.slide import Slide

TRIES = len(WAITS_S) + 1


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    mark()  # found out once, and not while the system fails
    made: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", made.append)
    return made


class Failing:
    """A function that raises OSError of `code` for its calls number `first` to `last`, counted from 1; it counts all."""

    def __init__(self, call: Callable[..., Any], code: int, first: int = 1, last: int = 10**9) -> None:
        self.calls = 0
        self._call, self._code, self._span = call, code, range(first, last + 1)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls in self._span:
            raise OSError(self._code, os.strerror(self._code))
        return self._call(*arguments, **options)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR])
def test_what_passes_is_waited_for_and_what_does_not_is_told(code: int, waits: list[float]) -> None:
    passes = Failing(lambda: "answer", code, last=TRIES - 1)
    assert retried(passes) == "answer"
    assert waits == list(WAITS_S)
    stays = Failing(lambda: "answer", code)
    with pytest.raises(OSError, match=os.strerror(code)):
        retried(stays)
    assert (passes.calls, stays.calls) == (TRIES, TRIES)


def test_what_cannot_pass_is_not_tried_again(waits: list[float]) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "gone"), SlideError(Reason.TRUNCATED, "cut"), ValueError("no number")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            retried(fail)
    assert waits == []


@pytest.fixture
def slide_path(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    return write_tiff(tmp_path / "share" / "s.svs", [noise_pixels(256, 256)], tile_px=64)


def pixels(slide: Slide) -> list[int]:
    return slide.read(0, Box(0, 0, 256, 256))[::32, ::32].ravel().tolist()


@pytest.mark.fault("F27")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("number", [1, 3])
def test_a_read_that_fails_and_then_does_not_gives_the_same_pixels(code: int, number: int, slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        whole = pixels(slide)
    with open_slide(slide_path) as slide:
        reader = reader_of(slide)
        reader._pread = failing = Failing(os.pread, code, number, number + TRIES - 2)
        assert pixels(slide) == whole
        assert failing.calls == 16 + TRIES - 1  # a read a tile


@pytest.mark.fault("F27")
def test_a_descriptor_that_went_stale_is_opened_anew_unless_the_file_is_another(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        reader, opened = reader_of(slide), []

        def stale(descriptor: int, count: int, place: int) -> bytes:
            state = os.fstat(descriptor).st_ino
            opened.append(state)
            if state == first:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return os.pread(descriptor, count, place)

        first, reader._pread = slide_path.stat().st_ino, stale
        shutil.copy2(slide_path, slide_path.with_name("new"))
        slide_path.with_name("new").replace(slide_path)
        slide.read(0, Box(0, 0, 64, 64))
        assert opened == [first, slide_path.stat().st_ino]
        first = slide_path.stat().st_ino
        shutil.copy(slide_path, slide_path.with_name("new"))  # with another time: who knows what is in it
        os.utime(slide_path.with_name("new"), (1, 1))
        slide_path.with_name("new").replace(slide_path)
        with pytest.raises(SlideError, match="was changed while it was read") as caught:
            slide.read(0, Box(128, 128, 64, 64))
        assert caught.value.reason is Reason.CHANGED


@pytest.mark.fault("F27")
def test_a_read_that_keeps_failing_is_the_files_fault_while_its_folder_is_there(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        reader = reader_of(slide)
        reader._pread = failing = Failing(os.pread, errno.EIO)
        with pytest.raises(SlideError, match=f"Input/output error, tried {TRIES} times; check the disk") as caught:
            slide.read(0, Box(0, 0, 8, 8))
        assert caught.value.reason is Reason.READ_ERROR
        assert failing.calls == TRIES


@pytest.mark.fault("F27")
@pytest.mark.parametrize("how", ["stale", "not connected", "renamed", "unmounted", "not listed"])
def test_a_read_that_keeps_failing_is_the_shares_fault_where_that_is_gone(
    how: str, slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"stale": errno.ESTALE, "not connected": errno.ENOTCONN}.get(how, errno.EIO)
    with open_slide(slide_path) as slide:
        reader_of(slide)._pread = Failing(os.pread, code)
        if how == "renamed":
            slide_path.parent.rename(slide_path.parent.with_name("elsewhere"))
        elif how == "unmounted":
            slide_path.unlink()
        elif how == "not listed":
            monkeypatch.setattr(os, "scandir", Failing(os.scandir, errno.EIO))
        with pytest.raises(EnvironmentFault, match="then run the same again"):
            slide.read(0, Box(0, 0, 8, 8))


@pytest.mark.fault("F27")
@pytest.mark.parametrize("reader", ["direct", "openslide"])
def test_opening_is_tried_again(reader: Any, slide_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pathology.readers as readers

    real = readers.inspect_file
    monkeypatch.setattr(readers, "inspect_file", passes := Failing(real, errno.EIO, last=TRIES - 1))
    open_slide(slide_path, reader=reader).close()
    assert passes.calls == TRIES
    real_pread = os.pread  # of the first bytes, in `inspect_file` itself, whose error comes as a slide's
    monkeypatch.setattr(readers, "inspect_file", real)
    monkeypatch.setattr(os, "pread", failing := Failing(real_pread, errno.ETIMEDOUT))
    with pytest.raises(SlideError) as caught:
        open_slide(slide_path, reader=reader)
    assert caught.value.reason is Reason.READ_ERROR
    assert failing.calls == TRIES


@pytest.mark.fault("F27")
def test_a_slide_that_openslide_reads_is_no_corrupt_one_where_its_share_is_gone(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(slide_path, reader="openslide") as slide:

        def fail(*_: object) -> None:
            raise OpenSlideError("cannot read")

        monkeypatch.setattr(OpenSlideReader, "_region", fail)
        with pytest.raises(SlideError) as caught:
            slide.read(0, Box(64, 64, 8, 8))
        assert caught.value.reason is Reason.CORRUPT_TILES
        slide_path.parent.rename(slide_path.parent.with_name("elsewhere"))
        with pytest.raises(EnvironmentFault, match="is gone; mount it"):
            slide.read(0, Box(64, 64, 8, 8))


def test_a_share_is_gone_where_what_was_named_is_or_a_mount_point_is_bare(tmp_path: Path) -> None:
    case = tmp_path / "share" / "case"
    case.mkdir(parents=True)
    slide = case / "s.svs"
    root = tmp_path / "share"
    assert share_gone(slide, root) == f"folder {case} of the slides is empty"
    (case / "other").touch()
    assert share_gone(slide, root) == share_gone(slide, slide) == ""
    shutil.rmtree(case)
    assert share_gone(slide, root) == f"folder {root} of the slides is empty"
    (root / "other").mkdir()
    assert share_gone(slide, root) == ""  # a person has moved one folder
    assert share_gone(slide, slide) == share_gone(slide, tmp_path / "list") == f"folder {case} of the slides is gone"
    shutil.rmtree(root)
    (tmp_path / "more").touch()
    assert share_gone(slide, root) == f"folder {root} of the slides is gone"


@pytest.mark.fault("F27")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("operation", ["open", "fsync", "replace", "folder"])
def test_writing_is_tried_again(operation: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "marker.json"
    path.write_bytes(b"before")
    where: Any = {"open": Path, "fsync": os, "replace": Path, "folder": durable}[operation]
    name = {"folder": "sync_folder"}.get(operation, operation)
    real = getattr(where, name)

    def write_as(last: int) -> int:
        with monkeypatch.context() as patch:
            failing = Failing(real, code, last=last)
            patch.setattr(where, name, lambda *arguments, **options: failing(*arguments, **options))
            write_file(path, b"after")
        return failing.calls

    assert write_as(TRIES - 1) >= TRIES
    assert path.read_bytes() == b"after"
    path.write_bytes(b"before")
    with pytest.raises(EnvironmentFault, match=f"{os.strerror(code)}; make room or restore access"):
        write_as(10**9)
    assert path.read_bytes() == (b"after" if operation == "folder" else b"before")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_rename_that_came_to_pass_although_it_told_of_an_error_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def replace_and_fail(self: Path, target: Path) -> Path:
        real(self, target)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", replace_and_fail)
    write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.fault("F27")
def test_a_staged_region_is_written_whole_though_writes_fail_on_the_way(tmp_path: Path) -> None:
    parts = [bytes([k]) * 1000 for k in range(5)]

    class File:
        def __init__(self, file: Any, code: int, last: int) -> None:
            self.file, self.write = file, Failing(file.write, code, 3, last)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return int(self.file.fileno())

    def write(last: int) -> None:
        real = Path.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", lambda self, *a, **o: File(real(self, *a, **o), errno.ESTALE, last))
            with new_file(tmp_path / "region") as append:
                for part in parts:
                    append(part)

    write(2 + TRIES - 1)
    assert (tmp_path / "region").read_bytes() == b"".join(parts)
    (tmp_path / "region").unlink()
    with pytest.raises(EnvironmentFault, match=r"Stale file handle; make room"):
        write(10**9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("F27")
def test_an_fsync_of_a_region_that_failed_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may have dropped what it could not write, and would say that all is well."""
    monkeypatch.setattr(os, "fsync", failing := Failing(os.fsync, errno.EIO, last=1))
    with pytest.raises(EnvironmentFault, match="Input/output error"), new_file(tmp_path / "region") as append:
        append(b"content")
    assert failing.calls == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("F27")
def test_an_event_is_written_at_another_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(tmp_path, "one", {})
    monkeypatch.setattr(os, "write", Failing(os.write, errno.EIO, last=2))
    emit(tmp_path, "two", {})
    assert [event["event"] for event in read_events(tmp_path)] == ["one", "two"]


MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """Three slides in a folder, read one by one by the sequential loop."""
    share = tmp_path / "share"
    share.mkdir()
    for name in "abc":
        write_tiff(share / f"{name}.svs", [noise_pixels(200, 200, seed=ord(name))], tile_px=64)
    return [
        Job(
            slide=str(share / f"{name}.svs"),
            slide_id=name,
            root=str(share),
            model=MODEL,
            out=str(tmp_path / "out"),
            tissue="none",
        )
        for name in "abc"
    ]


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


@pytest.mark.fault("F27")
@pytest.mark.parametrize("how", ["renamed", "unmounted", "renamed, files named", "io", "stale", "not connected"])
def test_a_share_that_goes_away_stops_the_run_and_fails_no_slide(how: str, jobs: list[Job], tmp_path: Path) -> None:
    share, away = tmp_path / "share", tmp_path / "away"
    if how.endswith("named"):
        jobs = [replace(job, root=job.slide) for job in jobs]
    whole = tmp_path / "whole"
    assert {o.status for o in run([replace(job, out=str(whole)) for job in jobs], "sync")} == {"ok"}
    slide_worker._kept, job_slide._kept = slide_worker._Kept(), job_slide._Kept()
    ended = []

    def go_away(patch: pytest.MonkeyPatch) -> None:
        if "renamed" in how or how == "unmounted":
            share.rename(away)
            if how == "unmounted":
                share.mkdir()
            return
        code = {"io": errno.EIO, "stale": errno.ESTALE, "not connected": errno.ENOTCONN}[how]
        for name in ("open", "stat", "scandir"):
            patch.setattr(os, name, broken(getattr(os, name), os.fspath(share), code))
        patch.setattr(os, "pread", Failing(os.pread, code))

    def run_on(patch: pytest.MonkeyPatch) -> None:
        for outcome in run(jobs, "sync"):
            ended.append((outcome.job.slide_id, outcome.status))
            if len(ended) == 1:
                go_away(patch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EnvironmentFault, match="then run the same again") as fault:
        run_on(patch)
    assert len(str(fault.value).splitlines()) == 1
    assert {status for _, status in ended} == {"ok"}
    assert len(ended) < 3
    assert not list((tmp_path / "out").rglob("failed.json"))
    if away.exists():
        shutil.rmtree(share, ignore_errors=True)
        away.rename(share)
    slide_worker._kept, job_slide._kept = slide_worker._Kept(), job_slide._Kept()
    assert {o.status for o in run(jobs, "sync")} == {"ok"}
    assert manifests(tmp_path / "out") == manifests(whole)
    assert len(manifests(whole)) == 3


def broken(call: Callable[..., Any], below: str, code: int) -> Callable[..., Any]:
    """`call` that fails for paths `below` a folder."""

    def fails(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(below):
            raise OSError(code, os.strerror(code))
        return call(path, *arguments, **options)

    return fails


def test_a_bad_sector_fails_its_slide_alone(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Path(jobs[1].slide).stat().st_ino
    real = os.pread

    def sector(descriptor: int, count: int, place: int) -> bytes:
        if place > 4096 and count > 4096 and os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, count, place)

    monkeypatch.setattr(os, "pread", sector)
    ended = {o.job.slide_id: (o.status, o.reason) for o in run(jobs, "sync")}
    assert ended.pop("b") == ("failed", Reason.READ_ERROR)
    assert set(ended.values()) == {("ok", None)}


def test_an_error_of_the_disk_that_nobody_expected_fails_no_slide(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error", "plan.json")

    monkeypatch.setattr(slide_worker, "open_work", fail)
    with pytest.raises(PathologyError, match=r"Input/output error.*run the same again"):
        list(run(jobs[:1], "sync"))


@pytest.mark.fault("F27")
@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_descriptors_or_memory_is_not_blamed_on_slide_or_output(
    code: int, slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault.NO_MEMORY if code == errno.ENOMEM else Fault.MACHINE
    with open_slide(slide_path) as slide:
        reader_of(slide)._pread = Failing(os.pread, code)
        with pytest.raises(EnvironmentFault, match=os.strerror(code)) as caught:
            slide.read(0, Box(0, 0, 8, 8))
        assert caught.value.fault is fault
    refused = SlideError(Reason.READ_ERROR, "cannot be opened")
    refused.__cause__ = OSError(code, os.strerror(code))
    told = faults.share_fault(refused, slide_path, slide_path.parent)
    assert told is not None
    assert told.fault is fault
    monkeypatch.setattr(durable, "_write_all", Failing(durable._write_all, code))
    with pytest.raises(EnvironmentFault, match=os.strerror(code)) as caught:
        write_file(tmp_path / "f", b"x")
    assert caught.value.fault is fault


@pytest.mark.fault("F27")
@pytest.mark.parametrize("code", [errno.EKEYEXPIRED, errno.ENOKEY, errno.EREMOTEIO, errno.ENOLINK])
def test_a_ticket_that_has_expired_is_the_shares_fault(code: int, slide_path: Path) -> None:
    assert os.strerror(code) in share_gone(slide_path, slide_path.parent, code)
