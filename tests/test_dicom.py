"""DICOM slides: a series is one slide, found by its content, read whole or refused for what it lacks."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathology import Box, SlideError, open_slide
from pathology.errors import Reason, UsageError
from pathology.readers import dicom, fingerprint
from pathology.readers.dicom import WHOLE_SLIDE, read_instance
from pipelines.slides import find_slides
from tests.dicom_slides import JPEG, element, write_instance, write_series
from tests.real_slides import boxes_dicom
from tests.slides import Pixels, smooth_pixels, write_tiff
from tests.test_batch import manifests, pathology, run

PIXELS = smooth_pixels(300, 400)
ONE, TWO = "1.2.826.0.1.1", "1.2.826.0.1.2"


def refusal(path: Path) -> tuple[Reason, str]:
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    return caught.value.reason, str(caught.value)


# --- reading


@pytest.mark.parametrize(("jpeg", "difference"), [(False, 0), (True, 6)])
def test_any_file_of_a_series_gives_the_whole_slide(jpeg: bool, difference: int, tmp_path: Path) -> None:
    files = write_series(tmp_path, ONE, PIXELS, jpeg=jpeg)
    write_series(tmp_path, TWO, PIXELS[::-1], prefix="other", jpeg=jpeg)
    prints = set()
    for file in files:
        with open_slide(file) as slide:
            info = slide.info
            assert (info.vendor, info.shape, info.mpp, info.level_downsamples) == ("dicom", (300, 400), 0.5, (1.0, 4.0))
            read = slide.read(0, Box(0, 0, 300, 400))
            assert np.abs(read.astype(int) - PIXELS).max() <= difference
            prints.add(info.fingerprint)
    assert prints == {fingerprint(files[0])}
    files[1].unlink()
    assert fingerprint(files[0]) not in prints
    assert fingerprint(tmp_path / "other0.dcm") not in prints


def test_real_dicom(tmp_path: Path) -> None:
    for file in boxes_dicom():
        shutil.copy(file, tmp_path)
    (entry,) = find_slides([tmp_path])
    assert entry.path.name == "boxes_0.dcm"  # boxes_1 is its thumbnail
    with open_slide(entry.path) as slide:
        assert (slide.info.shape, slide.info.mpp, slide.info.objective) == ((16, 16), 0.499, 20)
        corner = slide.read(0, Box(0, 0, 11, 16))[::5, ::15]
    expected = [[[245, 243, 252], [255, 241, 255]], [[234, 241, 246], [247, 236, 243]], [[243, 224, 248], [237, 252, 242]]]
    assert np.abs(corner.astype(int) - expected).max() <= 2
    instance = read_instance(entry.path)
    assert instance is not None
    assert (instance.shape, instance.tile_shape, instance.frames, instance.full) == ((16, 16), (64, 64), 1, True)
    assert (instance.syntax, instance.image_type) == (JPEG, ("DERIVED", "PRIMARY", "VOLUME", "NONE"))


def test_a_reader_that_does_not_suit_says_so(tmp_path: Path) -> None:
    file = write_series(tmp_path, ONE, PIXELS)[0]
    for reader, words in (("direct", "cannot be read directly: it is no TIFF"), ("pillow", "no picture that pillow reads")):
        with pytest.raises(SlideError, match=words):
            open_slide(file, reader=reader)  # type: ignore[arg-type]


# --- what is one slide


@pytest.mark.fault("S34")
def test_a_series_is_one_slide_whatever_its_files_are_called(tmp_path: Path) -> None:
    write_series(tmp_path / "case 1", ONE, PIXELS)
    write_series(tmp_path / "case 1", TWO, PIXELS, suffix="", prefix="IM00")
    write_series(tmp_path / "b", "1.2.3", PIXELS, suffix=".77", prefix="1.2.3.")  # called like UIDs
    write_tiff(tmp_path / "b" / "s.svs", [PIXELS])
    (tmp_path / "b" / "README").write_text("not a slide")
    (tmp_path / "b" / "notes.txt").write_bytes((tmp_path / "case 1" / "0.dcm").read_bytes())  # not a name of DICOM
    found = {entry.series: entry for entry in find_slides([tmp_path])}
    assert set(found) == {ONE, TWO, "1.2.3", ""}
    assert len(find_slides([tmp_path])) == 4
    assert [found[uid].path.name for uid in (ONE, TWO, "1.2.3")] == ["0.dcm", "IM000", "1.2.3.0.77"]
    assert found[ONE].slide_id.startswith("case-1-")
    assert found[ONE].slide_id != found[TWO].slide_id


def test_an_id_stays_when_files_or_other_series_come_and_go(tmp_path: Path) -> None:
    files = write_series(tmp_path / "case", ONE, PIXELS)
    (before,) = find_slides([tmp_path])
    files[0].rename(tmp_path / "case" / "zz")
    write_series(tmp_path / "case", TWO, PIXELS, prefix="a")
    named = find_slides([tmp_path / "case"])  # the folder itself
    after = next(entry for entry in named if entry.series == ONE)
    assert len(named) == 2
    assert (after.slide_id, after.path.name) == (before.slide_id, "zz")
    assert find_slides([files[1]])[0].slide_id == before.slide_id


def test_files_that_are_named_count_once(tmp_path: Path) -> None:
    files = write_series(tmp_path / "case", ONE, PIXELS)
    (entry,) = find_slides([*reversed(files), tmp_path, tmp_path / "case"])
    assert entry.path == files[0]


def test_a_series_in_two_places_is_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a", ONE, PIXELS)
    (tmp_path / "b").mkdir()
    files[1].rename(tmp_path / "b" / "1.dcm")
    with pytest.raises(UsageError, match="belong to one DICOM slide"):
        find_slides([tmp_path])
    (tmp_path / "list.csv").write_text("slide,id\na/0.dcm,x\na/label.dcm,y\n")
    with pytest.raises(UsageError, match=r"\(x\) and .* \(y\) belong to one DICOM slide"):
        find_slides([tmp_path / "list.csv"])


def test_what_is_dicom_but_no_slide_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path, ONE, PIXELS)
    scan = "1.2.840.10008.5.1.4.1.1.2"
    write_instance(tmp_path / "ct.dcm", TWO, "1.2.9", PIXELS, sop_class=scan)
    write_instance(tmp_path / "DICOMDIR", TWO, "1.2.8", PIXELS, sop_class=dicom.DIRECTORY)
    (entry,) = find_slides([tmp_path])
    assert entry.series == ONE
    reason, words = refusal(tmp_path / "ct.dcm")
    assert reason is Reason.UNSUPPORTED
    assert scan in words
    reason, words = refusal(tmp_path / "DICOMDIR")
    assert reason is Reason.NOT_A_SLIDE
    assert "name the folder" in words


def test_a_search_reads_132_bytes_of_what_is_no_dicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        (tmp_path / f"data{number}").write_bytes(bytes(100_000))
        (tmp_path / f"data{number}.bin").write_bytes(bytes(100_000))
    os.mkfifo(tmp_path / "pipe")
    write_series(tmp_path, ONE, smooth_pixels(1000, 1000), downsamples=[1])
    asked: Counter[int] = Counter()
    monkeypatch.setattr(os, "pread", lambda fd, count, at, read=os.pread: asked.update([count]) or read(fd, count, at))
    assert len(find_slides([tmp_path])) == 1
    assert asked == {132: 52, dicom.WINDOW_BYTES: 2}


# --- what a slide lacks


@pytest.mark.fault("S34")
def test_missing_images_are_named(tmp_path: Path) -> None:
    level0, level1, label = write_series(tmp_path, ONE, PIXELS)
    level0.unlink()
    reason, words = refusal(label)
    assert reason is Reason.MISSING
    assert "full resolution" in words
    level1.unlink()
    reason, words = refusal(label)
    assert reason is Reason.MISSING
    assert "no VOLUME image" in words


@pytest.mark.fault("S34")
def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = [write_instance(tmp_path / f"{n}.dcm", ONE, f"{ONE}.5", PIXELS, part=(n, 3)) for n in range(3)]
    with open_slide(parts[1]) as slide:
        assert np.array_equal(slide.read(0, Box(0, 0, 300, 400)), PIXELS)
    parts[1].unlink()
    reason, words = refusal(parts[0])
    assert reason is Reason.MISSING
    assert "1 of its 3 files" in words
    content = parts[0].read_bytes()  # without the number of files, which is optional, the frames are counted
    parts[0].write_bytes(content.replace(struct.pack("<HH", 0x0020, 0x9163), struct.pack("<HH", 0x0020, 0x9164)))
    parts[2].unlink()
    reason, words = refusal(parts[0])
    assert reason is Reason.MISSING
    assert "8 of its 12 frames" in words


@pytest.mark.fault("S34")
def test_a_duplicate_is_refused_and_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, ONE, PIXELS)
    shutil.copy(files[0], tmp_path / "copy of 0.dcm")
    (entry,) = find_slides([tmp_path])
    reason, words = refusal(entry.path)
    assert reason is Reason.UNSUPPORTED
    assert "'0.dcm' and 'copy of 0.dcm'" in words


@pytest.mark.parametrize("jpeg", [False, True])
def test_a_cut_file_is_found_before_its_pixels_are_wanted(jpeg: bool, tmp_path: Path) -> None:
    files = write_series(tmp_path, ONE, PIXELS, jpeg=jpeg)
    os.truncate(files[0], files[0].stat().st_size - 5000)
    reason, words = refusal(files[1])  # whichever file is named
    assert reason is Reason.TRUNCATED
    assert "'0.dcm'" in words


def test_a_file_cut_in_its_header_or_empty_has_a_row_of_its_own(tmp_path: Path) -> None:
    write_series(tmp_path, ONE, PIXELS)
    for name, size in (("cut", 300), ("nothing.dcm", 0)):
        shutil.copy(tmp_path / "0.dcm", tmp_path / name)
        os.truncate(tmp_path / name, size)
    assert {entry.path.name for entry in find_slides([tmp_path])} == {"0.dcm", "cut", "nothing.dcm"}
    assert refusal(tmp_path / "cut")[0] is Reason.TRUNCATED
    assert refusal(tmp_path / "nothing.dcm")[0] is Reason.EMPTY


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_series(tmp_path, ONE, PIXELS)

    def opened(path: Path, flags: int, really: Callable[[Path, int], int] = os.open) -> int:
        if path == files[1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really(path, flags)

    monkeypatch.setattr(os, "open", opened)
    reason, words = refusal(files[0])
    assert reason is Reason.PERMISSION
    assert "'1.dcm'" in words


# --- the parser


def test_sequences_and_private_elements_are_stepped_over(tmp_path: Path) -> None:
    decoy = element(0x0020, 0x000E, "UI", "9.9.9")
    endless = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + decoy + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    unknown = struct.pack("<HHI", 0xFFFE, 0xE000, 12) + struct.pack("<HHI", 0x0020, 0x000E, 4) + b"9.9 "
    private = b"".join(
        (
            element(0x0009, 0x0010, "SQ", [decoy]),
            struct.pack("<HH2sHI", 0x0009, 0x0011, b"SQ", 0, 0xFFFFFFFF) + endless + end,
            struct.pack("<HH2sHI", 0x0009, 0x0012, b"UN", 0, 0xFFFFFFFF) + unknown + end,
            element(0x0009, 0x0013, "OB", bytes(3_000_000)),
        )
    )
    instance = read_instance(write_instance(tmp_path / "a.dcm", ONE, "1.2.3", PIXELS, private=private))
    assert instance is not None
    assert (instance.series, instance.uid, instance.shape) == (ONE, "1.2.3", (300, 400))


def test_implicit_elements_are_read(tmp_path: Path) -> None:
    meta = element(0x0002, 0x0002, "UI", WHOLE_SLIDE) + element(0x0002, 0x0010, "UI", dicom.IMPLICIT)
    data = b"".join(
        struct.pack("<HHI", group, number, len(value)) + value
        for group, number, value in ((8, 0x18, b"1.2\0"), (0x20, 0xE, b"1.2.3\0"), (0x48, 7, struct.pack("<I", 9)))
    )
    (tmp_path / "a.dcm").write_bytes(bytes(128) + b"DICM" + meta + data + element(0x7FE0, 0x10, "OB", b""))
    instance = read_instance(tmp_path / "a.dcm")
    assert instance is not None
    assert (instance.series, instance.uid, instance.shape, instance.cut) == ("1.2.3", "1.2", (9, 0), False)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels: Pixels = smooth_pixels(64, 64)
    return write_instance(tmp_path_factory.mktemp("sound") / "a.dcm", ONE, "1.2.3", pixels)


@given(at=st.integers(132, 900), new=st.binary(min_size=1, max_size=12), keep=st.integers(132, 2000))
def test_no_bytes_upset_the_parser(sound: Path, at: int, new: bytes, keep: int) -> None:
    content = sound.read_bytes()
    other = sound.with_name("b.dcm")
    other.write_bytes((content[:at] + new + content[at + len(new) :])[:keep])
    assert read_instance(other) is not None


# --- the whole command


@pytest.mark.fault("S34")
def test_two_series_in_a_folder_run_and_resume(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_series(slides, ONE, PIXELS)
    write_series(slides, TWO, PIXELS[::-1], prefix="b", jpeg=True)
    checked = pathology("check", slides)
    assert checked.exit_code == 0, checked.output
    assert checked.output.count("  opens\n") == 2
    first = run(slides, "--out", out)
    assert first.exit_code == 0, first.output
    made = manifests(out)
    assert len(made) == 2
    again = run(slides, slides / "0.dcm", "--out", out)
    assert again.exit_code == 0, again.output
    assert again.output.count("done before") == 2
    assert manifests(out) == made


@pytest.mark.fault("S34")
def test_a_broken_series_is_a_row_and_the_other_runs(tmp_path: Path) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    write_series(slides, ONE, PIXELS)
    broken = write_series(slides, TWO, PIXELS, prefix="b")
    broken[0].unlink()
    done = run(slides, "--out", out)
    assert done.exit_code == 1, done.output
    assert "missing: DICOM series " + TWO in done.output
    assert len(manifests(out)) == 1
