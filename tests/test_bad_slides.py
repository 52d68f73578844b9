"""Slides that are broken, odd or made to do harm: each has its reason, and costs nobody memory, time or a process.

Rows of the catalogue of faults that other files show as well carry the same marks there.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner, Result
from dicom_slides import write_series
from mutants import MORE_BYTES, chain, limit_memory, try_to_open
from PIL import Image
from slides import Pixels, cut, noise_pixels, patch_tag, pyramid, smooth_pixels, tile_span, write_tiff
from test_readers import handmade, refused

from pathology import open_heatmap
from pathology.apart import Apart
from pathology.errors import Reason, SlideError, UsageError
from pathology.finish import TISSUE_FILES
from pathology.geometry import Box
from pathology.job import Job, ReaderName
from pathology.outcome import Outcome
from pathology.readers import open_slide, whole_hashes
from pathology.readers.inspect import inspect_file
from pathology.readers.plain import PlainReader
from pathology.thumbnail import thumbnail
from pathology.tissue import find_tissue
from pipelines.cli import main
from pipelines.slides import OF_RESULTS, find_slides
from pipelines.summary import read_failure, write_failure

MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"
READERS: list[ReaderName] = ["direct", "openslide"]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run(*arguments: object) -> Result:
    return command("run", "--model", MODEL, "--scheduler", "sync", "--threads", 1, *arguments)


def rows(out: Path) -> dict[str, dict[str, str]]:
    """The rows of summary.csv by the slide's name."""
    with (out / "summary.csv").open(newline="") as file:
        return {Path(row["slide"]).name: row for row in csv.DictReader(file)}


def patch(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


@pytest.fixture
def apart() -> Iterator[Apart]:
    """A process that may have 1 GiB more than it takes to open a small slide."""
    with Apart(1, 60) as apart:
        yield apart


@pytest.fixture
def confined(apart: Apart, tmp_path: Path) -> Apart:
    apart.call("warm", try_to_open, write_tiff(tmp_path / "warm.svs", [smooth_pixels(128, 128)]))
    assert apart.call("limit", limit_memory) > MORE_BYTES
    return apart


# --- no slides


@pytest.mark.fault("S01", "S02", "S03", "S04", "S05")
def test_S01_to_S05_what_is_no_slide_has_reasons_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "empty.svs").touch()
    (folder / "junk.svs").write_bytes(np.random.default_rng(1).bytes(100_000))
    (folder / "text.svs").write_text("this is no slide\n" * 100)
    (folder / "folder.svs").mkdir()
    (folder / "gone.svs").symlink_to("nowhere")
    names = ["empty.svs", "junk.svs", "text.svs", "folder.svs", "gone.svs"]
    (tmp_path / "list.csv").write_text("slide\n" + "".join(f"slides/{name}\n" for name in names))
    done = command("check", tmp_path / "list.csv", "--json")
    assert done.exit_code == 1
    found = [json.loads(line)["reason"] for line in done.output.splitlines()]
    assert found == ["empty_file", "not_a_slide", "not_a_slide", "not_a_file", "missing"]


@pytest.mark.fault("F25")
@pytest.mark.parametrize("kind", ["dicom", "vms", "mirax"])
def test_a_pipe_beside_a_slide_of_several_files_is_never_opened(kind: str, apart: Apart, tmp_path: Path) -> None:
    if kind == "dicom":
        path, folder = write_series(tmp_path / "s", "1.2.9", smooth_pixels(200, 200))[0], tmp_path / "s"
        assert apart.call("s", try_to_open, path).verdict == "opens"
    elif kind == "vms":
        path, folder = tmp_path / "s.vms", tmp_path
        path.write_text("[Virtual Microscope Specimen]\nImageFile=pipe.dcm\nMapFile=pipe.dcm\nNoJpegRows=1\nNoJpegColumns=1\n")
    else:
        path, folder = tmp_path / "s.mrxs", tmp_path / "s"
        path.write_bytes(b"\xff\xd8\xff\xe0")
        folder.mkdir()
        (folder / "Slidedat.ini").write_text("[HIERARCHICAL]\nINDEXFILE=pipe.dcm\n")
    os.mkfifo(folder / "pipe.dcm")
    found = apart.call("s", try_to_open, path)
    assert (found.verdict, "'pipe.dcm'" in found.detail) == ("not_a_file", True)


# --- cut short


@pytest.mark.fault("S07")
def test_S07_a_file_that_lost_its_label_alone_is_refused_by_name(tmp_path: Path) -> None:
    picture = noise_pixels(40, 60)
    path = write_tiff(tmp_path / "s.svs", pyramid(noise_pixels(1500, 1500), [1, 4]), label=picture, macro=picture)
    os.truncate(path, path.stat().st_size - 3000)
    with openslide.OpenSlide(path) as handle:  # which says nothing of it
        assert handle.level_count == 2
    with refused(Reason.TRUNCATED, "s.svs", "copy it again"):
        open_slide(path)


@pytest.mark.fault("S08")
@pytest.mark.parametrize("tiled", [True, False])
def test_S08_half_of_a_picture_is_found_by_its_header(tiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"tile": (128, 128)} if tiled else {"rowsperstrip": 16}
    tifffile.imwrite(tmp_path / "s.tif", noise_pixels(600, 600), photometric="rgb", compression="deflate", **tile)
    cut(tmp_path / "s.tif", 0.5)
    monkeypatch.setattr(openslide, "OpenSlide", lambda _: pytest.fail("a library met it"))
    with refused(Reason.TRUNCATED, "lie beyond"):
        open_slide(tmp_path / "s.tif", 0.5)


# --- changes that no decoder sees


@pytest.mark.fault("S10", "S11")
@pytest.mark.parametrize("damage", ["a bit", "zeros at the end"])
def test_S10_S11_damage_that_decodes_is_found_by_the_hash_of_the_input(damage: str, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(512, 512)], compression="jpeg", tile_px=256)
    at, count = tile_span(path, 1)
    whole = path.read_bytes()
    assert run(path, "--out", tmp_path / "out", "--tissue", "none", "--hash-input").exit_code == 0
    assert command("verify", tmp_path / "out", "--verify-input").exit_code == 0
    patch(path, at + count - 200, bytes([whole[at + count - 200] ^ 16]) if damage == "a bit" else bytes(200))
    with open_slide(path) as slide:  # nobody complains
        slide.read(0, Box(0, 0, 512, 512))
    assert command("verify", tmp_path / "out").exit_code == 0
    done = command("verify", tmp_path / "out", "--verify-input")
    assert done.exit_code == 1
    assert f"changed     {path}" in done.output.splitlines()
    path.unlink()
    assert f"missing     {path}" in command("verify", tmp_path / "out", "--verify-input").output.splitlines()


@pytest.mark.fault("S10")
def test_S10_a_result_without_hashes_says_so(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(128, 128)])
    assert run(path, "--out", tmp_path / "out", "--tissue", "none").exit_code == 0
    done = command("verify", tmp_path / "out", "--verify-input")
    assert done.exit_code == 1
    assert "unhashed" in done.output
    assert "--hash-input" in done.output


def test_all_files_of_a_slide_are_hashed(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "s", "1.2.9", smooth_pixels(200, 200))
    hashes = whole_hashes(paths[0])
    assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- headers that lie


@pytest.mark.fault("S14")
def test_S14_a_lying_tile_size_is_refused_before_any_library_meets_it(
    confined: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(128, 128)], compression="jpeg")
    for tag in (tifffile.TIFF.TAGS["TileWidth"], tifffile.TIFF.TAGS["TileLength"]):
        patch_tag(path, tag, 65520)
    with monkeypatch.context() as patched:
        patched.setattr(openslide, "OpenSlide", lambda _: pytest.fail("a library met it"))
        with refused(Reason.UNSUPPORTED, "65520 x 65520"):
            open_slide(path)
    assert confined.call("s", try_to_open, path).verdict == "unsupported"


def sparse(path: Path, side: int, tile: int) -> Path:
    """A BigTIFF of side x side px of which no tile is stored: places and sizes of tiles all lie in one stretch of zeros."""
    count = (-(-side // tile)) ** 2
    values = {256: side, 257: side, 258: 8, 259: 1, 262: 2, 277: 3, 284: 1, 322: tile, 323: tile}
    entries = [struct.pack("<HHQQ", tag, 4, 1, value) for tag, value in sorted(values.items())]
    at = 16 + 8 + 20 * (len(entries) + 2) + 8
    entries += [struct.pack("<HHQQ", tag, 16, count, at) for tag in (324, 325)]
    head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(entries)) + b"".join(entries) + bytes(8)
    path.write_bytes(head + bytes(8 * count))
    return path


def small_pictures(path: Path) -> tuple[tuple[int, ...], bool, float]:
    with open_slide(path, 0.5) as slide:
        picture = thumbnail(slide, 512)
        return picture.shape, bool((picture == 255).all()), find_tissue(slide).area_mm2


@pytest.mark.fault("S16")
def test_S16_a_huge_slide_of_nothing_is_white_in_bounded_memory(confined: Apart, tmp_path: Path) -> None:
    path = sparse(tmp_path / "s.tif", 200_000, 1024)
    assert path.stat().st_size < 400_000
    shape, white, tissue_mm2 = confined.call("s", small_pictures, path)
    assert white
    assert max(shape) <= 512
    assert tissue_mm2 == 0


@pytest.mark.fault("S16")
def test_S16_its_map_is_of_no_data(tmp_path: Path) -> None:
    done = run(sparse(tmp_path / "s.tif", 50_000, 1024), "--out", tmp_path / "out", "--slide-mpp", 0.5)
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "out")["s.tif"]["status"] == "ok_empty"


@pytest.mark.fault("S16", "S17")
@pytest.mark.parametrize("side", [2**31, 2**31 - 1, 2**21 + 1, 2**19 + 1, 0])
def test_S17_sizes_beyond_any_slide_are_refused(side: int, confined: Apart, tmp_path: Path) -> None:
    tags = {256: (4, side), 257: (4, side), 258: (3, 8), 262: (3, 2), 277: (3, 3), 273: (4, 100), 279: (4, 10)}
    path = handmade(tmp_path / "s.tif", tags, "classic", 16, 2000)
    found = confined.call("s", try_to_open, path)
    assert (found.verdict, f"{side} x {side} px" in found.detail) == ("unsupported", True)


def test_a_picture_lists_all_of_its_tiles_or_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(256, 256)])
    patch_tag(path, 256, 60_000)
    with refused(Reason.UNSUPPORTED, "lists 4 of its 938 tiles"):
        open_slide(path)


@pytest.mark.parametrize(
    ("directories", "tags", "words"), [(4000, 20, ""), (5000, 3, "4096 directories"), (100, 4000, "131072 tags")]
)
def test_many_directories_take_no_time(directories: int, tags: int, words: str, apart: Apart, tmp_path: Path) -> None:
    found = apart.call("s", try_to_open, chain(tmp_path / "s.tif", directories, tags))
    assert found.verdict in ("unsupported", "read_error") if words == "" else found.verdict == "unsupported"
    assert words in found.detail
    assert found.seconds < 5


def test_a_tag_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """Libraries believe the first or the last of them: of two tile sizes one would be looked at here and the other used."""
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(128, 128)])
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].tags["Software" if "Software" in tiff.pages[0].tags else "ResolutionUnit"].offset
    patch(path, at, struct.pack("<HHII", 323, 4, 1, 40_000))
    with refused(Reason.UNSUPPORTED, "lists tag 323 twice"):
        open_slide(path)


def test_limits_over_all_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "s.svs", pyramid(smooth_pixels(512, 512), [1, 2]))
    inspect_file(path)
    for limit, most in (("MAX_ALL_TAGS", 20), ("MAX_ALL_VALUES", 40)):
        with monkeypatch.context() as patched:
            patched.setattr(f"pathology.readers.tiff.{limit}", most)
            with refused(Reason.UNSUPPORTED, "more than"):
                inspect_file(path)


def test_a_tag_of_no_use_here_may_not_be_huge(tmp_path: Path) -> None:
    tags = {256: (4, 10), 257: (4, 10)}
    path = handmade(tmp_path / "s.tif", tags, "classic", 16, 2**27)
    at = 16 + 2 + 12
    patch(path, at, struct.pack("<HHII", 270, 2, 2**26 + 1, 1000))
    with refused(Reason.UNSUPPORTED, "tag 270 has 67108865 bytes"):
        inspect_file(path)


@pytest.mark.parametrize("value", [2**63 + 5, 2**64 - 1])
def test_tiles_before_the_file_are_left_to_nobody(value: int, tmp_path: Path) -> None:
    """Places that overflow a signed number were once read as places before the file."""
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, smooth_pixels(64, 64), photometric="rgb", tile=(64, 64), bigtiff=True)
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        place = tag.valueoffset
        at = tiff.pages[0].tags["TileOffsets"]
    patch(path, at.offset + 2, struct.pack("<HQQ", 16, 1, value))
    assert place
    with pytest.raises(SlideError) as caught:
        open_slide(path, 0.5)
    assert caught.value.reason in (Reason.TRUNCATED, Reason.UNSUPPORTED)


def test_types_that_tifffile_takes_for_negative_numbers(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(128, 128)])
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].tags["TileOffsets"].offset
    patch(path, at + 2, struct.pack("<HIi", 9, 1, -5000))  # SLONG
    assert try_to_open(path).verdict in ("unsupported", "read_error", "truncated")


def lying_jpeg(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 65500, 65500) + data[at + 9 :]


@pytest.mark.fault("S18")
@pytest.mark.parametrize("reader", READERS)
def test_S18_a_jpeg_bomb_is_one_bad_tile_and_a_slide_of_them_is_refused(
    reader: ReaderName, confined: Apart, tmp_path: Path
) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(512, 512)], compression="jpeg")
    first = tile_span(path, 5)
    content = path.read_bytes()
    patch(path, first[0], lying_jpeg(content[first[0] : sum(first)]))
    with open_slide(path, reader=reader) as slide:
        assert slide.read(0, Box(0, 0, 128, 128)).any()
        with refused(Reason.CORRUPT_TILES):
            slide.read(0, Box(128, 128, 128, 128))
    for tile in range(16):
        at, count = tile_span(path, tile)
        patch(path, at, lying_jpeg(content[at : at + count]))
    found = confined.call("s", try_to_open, path)
    assert (found.verdict, "65500 x 65500" in found.detail) == ("corrupt_tiles", True)


def read_all(path: Path, reader: ReaderName, expected: Pixels | None = None) -> str:
    with open_slide(path, 0.5, reader=reader) as slide:
        try:
            pixels = slide.read(0, Box(0, 0, *slide.info.shape))
            assert expected is None or np.array_equal(pixels, expected)
        except SlideError as error:
            return str(error.reason)
    return "read"


@pytest.mark.fault("S19")
@pytest.mark.parametrize("reader", ["auto", "openslide"])
def test_S19_a_deflate_bomb_ends_at_the_size_of_its_tile(reader: ReaderName, confined: Apart, tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, noise_pixels(256, 256), photometric="rgb", tile=(256, 256), compression="deflate", metadata=None)
    bomb = zlib.compress(bytes(2**29), 1)
    at = path.stat().st_size
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["TileOffsets"].overwrite(at)
        tiff.pages[0].tags["TileByteCounts"].overwrite(len(bomb))
    with path.open("ab") as file:
        file.write(bytes(max(0, at - path.stat().st_size)) + bomb)
    assert confined.call("s", read_all, path, reader) in ("read", "corrupt_tiles", "read_error")


@pytest.mark.fault("S19")
@pytest.mark.parametrize("kind", ["png", "jpeg", "tif"])
def test_pictures_are_not_decoded_to_be_looked_at(kind: str, tmp_path: Path) -> None:
    Image.fromarray(smooth_pixels(50, 40)).save(tmp_path / f"s.{kind}")
    with open_slide(tmp_path / f"s.{kind}", 0.5) as slide:
        reader = slide._reader
        assert isinstance(reader, PlainReader)
        assert reader._held is None
        slide.read(0, Box(0, 0, 5, 5))
        assert reader._held is not None


# --- levels and sizes


@pytest.mark.fault("S25")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("order", [[1, 2.5, 7], [1, 4, 2]])
def test_S25_levels_in_any_order_at_any_ratio(order: Sequence[float], reader: ReaderName, tmp_path: Path) -> None:
    whole = smooth_pixels(700, 1050)
    sizes = [(round(1050 / k), round(700 / k)) for k in order]
    path = write_tiff(
        tmp_path / "s.svs", [np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.BOX)) for size in sizes]
    )
    if sorted(order) != order:  # OpenSlide refuses such a file, and with it go its levels and its resolution
        with refused(Reason.NO_MPP, "--slide-mpp"):
            open_slide(path)
        reader = "auto"
    with open_slide(path, 0.5, reader=reader) as slide:
        downsamples = slide.info.level_downsamples
        assert downsamples == pytest.approx(order, rel=0.01)
        for level, downsample in enumerate(downsamples):
            height, width = slide.info.level_shapes[level]
            y, x = height // 2, width // 3
            pixel = slide.read(level, Box(y, x, 1, 1))[0, 0].astype(int)
            expected = whole[int((y + 0.5) * downsample), int((x + 0.5) * downsample)]
            assert np.abs(pixel - expected).max() <= 12


@pytest.mark.fault("S24", "S26")
@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (40, 30), (63, 65)])
def test_S26_a_slide_smaller_than_a_tile_is_one_padded_tile(shape: tuple[int, int], tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [np.full((*shape, 3), 100, np.uint8)])
    done = run(path, "--out", tmp_path / "out", "--tissue", "none")
    assert done.exit_code == 0, done.output
    (result,) = tmp_path.glob("out/slides/*/mean-colour")
    heatmap = open_heatmap(result)
    assert heatmap.level_shape(0) == (1, -(-shape[1] // 64))
    scores = heatmap.read(0, Box(0, 0, 1, 1))
    share = min(64, shape[0]) * min(64, shape[1]) / 64**2
    assert scores[0, 0, 0] == pytest.approx(100 * share + 255 * (1 - share), abs=0.5)


@pytest.mark.fault("S27", "S28", "S29")
@pytest.mark.parametrize(("grey", "status"), [(255, "ok_empty"), (244, "ok_empty"), (0, "ok_empty"), (None, "ok")])
def test_S27_to_S29_glass_black_and_tissue_everywhere_are_no_errors(grey: int | None, status: str, tmp_path: Path) -> None:
    pixels = smooth_pixels(600, 500) if grey is None else np.full((600, 500, 3), grey, np.uint8)
    path = write_tiff(tmp_path / "s.svs", [pixels])
    done = run(path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert rows(tmp_path / "out")["s.svs"]["status"] == status
    (result,) = tmp_path.glob("out/slides/*/mean-colour")
    scores = open_heatmap(result).read(0, Box(0, 0, 9, 7))
    assert np.isnan(scores).all() == (status == "ok_empty")
    assert command("verify", tmp_path / "out").exit_code == 0


# --- names and places


@pytest.mark.fault("S31")
def test_S31_equal_stems_in_one_search_are_slides_of_their_own(tmp_path: Path) -> None:
    for name in ("a/s.svs", "b/s.svs", "s.svs", "s.tif", "S.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ids = [entry.slide_id.casefold() for entry in find_slides([tmp_path])]
    assert len(set(ids)) == len(ids) == 5


@pytest.mark.fault("S32")
def test_S32_any_name_that_a_file_system_takes_runs(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    path = write_tiff(tmp_path / "plain.svs", [smooth_pixels(128, 128)])
    names = [
        unicodedata.normalize("NFC", "ärztin.svs").encode(),
        unicodedata.normalize("NFD", "ärztin.svs").encode(),
        b"$(touch x)`y`.svs",
        b"new\nline \"q\" 'q'.svs",
        b"-rf.svs",
        b"\xff\xfe.svs",
        b"n" * 251 + b".svs",
    ]
    for name in names:
        shutil.copy(path, os.path.join(os.fsencode(folder), name))  # noqa: PTH118  # bytes, which Path is not
    checked = command("check", folder, "--json")
    assert checked.exit_code == 0, checked.output
    assert sorted(os.fsencode(Path(json.loads(line)["slide"]).name) for line in checked.output.splitlines()) == sorted(names)
    assert run(folder, "--out", tmp_path / "out", "--tissue", "none").exit_code == 0
    assert len(list(tmp_path.glob("out/slides/*/*/manifest.json"))) == len(names)
    assert command("verify", tmp_path / "out").exit_code == 0


@pytest.mark.fault("S33")
def test_S33_links_are_followed_to_files_and_not_to_folders(tmp_path: Path) -> None:
    folder, outside = tmp_path / "slides", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    write_tiff(folder / "s.svs", [smooth_pixels(128, 128)])
    write_tiff(outside / "o.svs", [smooth_pixels(128, 128, seed=1)])
    (folder / "again.svs").symlink_to("s.svs")
    (folder / "hard.svs").hardlink_to(folder / "s.svs")
    (folder / "other.svs").symlink_to("../outside/o.svs")
    (folder / "round.svs").symlink_to("round.svs")
    (folder / "nowhere.svs").symlink_to("nothing")
    (folder / "up").symlink_to("..")
    found = {entry.path.name for entry in find_slides([folder])}
    assert found == {"s.svs", "hard.svs", "other.svs", "round.svs", "nowhere.svs"}
    done = command("check", folder, "--json")
    reasons = {Path(v["slide"]).name: v.get("reason", "") for v in map(json.loads, done.output.splitlines())}
    assert reasons == {"s.svs": "", "hard.svs": "", "other.svs": "", "round.svs": "missing", "nowhere.svs": "missing"}


def closed(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> Path:
    """`folder` as its share or its rights let nobody list it, root included."""
    listed = os.scandir

    def refuse(path: str | Path | int = ".") -> Iterator[os.DirEntry[str]]:
        if not isinstance(path, int) and Path(path) == folder:
            raise OSError(code, os.strerror(code), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return folder


@pytest.mark.parametrize("at", ["b", "b/c", "."])
def test_a_folder_that_may_not_be_listed_is_a_row_and_the_others_run(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slides"
    for name in ("a", "b/c", "lost+found"):
        (folder / name).mkdir(parents=True)
    write_tiff(folder / "a" / "s.svs", [smooth_pixels(128, 128)])
    write_tiff(folder / "b" / "c" / "t.svs", [smooth_pixels(128, 128)])
    unlisted = closed(folder / at, monkeypatch, errno.EACCES)
    done = run(folder, "--out", tmp_path / "out", "--tissue", "none")
    assert done.exit_code == 1, done.output
    (failed,) = [row for row in rows(tmp_path / "out").values() if row["status"] == "failed"]
    assert (failed["slide"], failed["reason"]) == (str(unlisted), "permission")
    assert ("s.svs" in rows(tmp_path / "out")) == (at != ".")


def test_a_folder_closed_as_lost_and_found_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "s.svs").touch()
    closed(tmp_path / "lost+found", monkeypatch, errno.EACCES)
    assert [entry.path.name for entry in find_slides([tmp_path])] == ["s.svs"]


def test_a_folder_on_a_share_that_does_not_answer_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "s.svs").touch()
    closed(tmp_path / "b", monkeypatch, errno.ESTALE)
    waits: list[float] = []
    monkeypatch.setattr("pathology.faults.time.sleep", waits.append)
    done = run(tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert f"folder {tmp_path / 'b'} cannot be listed" in done.output
    assert len(waits) == 3  # it may pass


@pytest.mark.fault("S34")
def test_S34_a_vms_without_its_pictures_is_refused(tmp_path: Path) -> None:
    text = "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=one.jpg\nMapFile=map.jpg\n"
    (tmp_path / "v.vms").write_text(text + "OptimisationFile=\nSourceLens=20\nPhysicalWidth=1000\nPhysicalHeight=1000\n")
    with refused(Reason.UNSUPPORTED, "v.vms"):
        open_slide(tmp_path / "v.vms", 0.5)
    os.truncate(tmp_path / "v.vms", 2**21)
    with refused(Reason.UNSUPPORTED, "2097152 bytes"):
        open_slide(tmp_path / "v.vms", 0.5)


@pytest.mark.fault("S35")
@pytest.mark.parametrize("reader", READERS)
def test_S35_pixels_above_four_gigabytes_are_read(reader: ReaderName, tmp_path: Path) -> None:
    path, pixels = tmp_path / "s.tif", noise_pixels(64, 64)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), bigtiff=True, metadata=None)
    at, count = tile_span(path, 0)
    data = path.read_bytes()[at : at + count]
    far = 5 * 2**30 + 12_345
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
    patch(path, tag.offset + 2, struct.pack("<HQQ", 16, 1, far))
    patch(path, at, bytes(count))
    patch(path, far, data)
    with open_slide(path, 0.5, reader=reader) as slide:
        assert np.array_equal(slide.read(0, Box(0, 0, 64, 64)), pixels)


@pytest.mark.fault("S38")
def test_S38_grey_jpeg_and_samples_in_planes(tmp_path: Path) -> None:
    grey = smooth_pixels(256, 256)[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric="minisblack", tile=(128, 128), compression="jpeg")
    with open_slide(tmp_path / "grey.tif", 0.5) as slide:
        read = slide.read(0, Box(0, 0, 256, 256))
    assert np.abs(read - grey[..., None].astype(int)).max() <= 8
    planes = np.ascontiguousarray(noise_pixels(256, 256).transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate", tile=(128, 128))
    assert read_all(tmp_path / "planes.tif", "auto", planes.transpose(1, 2, 0)) == "read"


@pytest.mark.fault("S40")
def test_S40_other_files_and_earlier_results_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_tiff(folder / "s.svs", [smooth_pixels(300, 300)])
    assert run(folder / "s.svs", "--out", folder / "earlier", "--tissue", "none", "--export", "png").exit_code == 0
    for k in range(5000):
        (folder / f"note-{k}.txt").touch()
    opened: list[Path] = []
    monkeypatch.setattr("pipelines.slides.read_instance", lambda path: opened.append(path))
    assert [entry.path.name for entry in find_slides([folder], pictures=True)] == ["s.svs"]
    assert opened == []
    assert {*TISSUE_FILES} == OF_RESULTS


# --- the catalogue


def test_every_row_of_bad_slides_has_a_test() -> None:
    rows = {f"S{k:02}" for k in range(1, 41)} - {"S15", "S20", "S36", "S39"}  # which the catalogue does not have
    marked = [line for file in Path(__file__).parent.glob("test_*.py") for line in file.read_text().splitlines()]
    shown = {row for line in marked if line.strip().startswith("@pytest.mark.fault(") for row in re.findall(r'"(S\d\d)"', line)}
    assert shown == rows


@pytest.mark.parametrize(
    "named",
    [
        ("x/s.svs", "x/s.svs"),
        ("x/s.svs", "x"),
        ("x", "."),
        (".", "x/s.svs"),
        ("x/s.svs", "y/../x/s.svs"),
        ("x", "y"),
        ("x/s.svs", "list.csv"),
        ("list.csv", "."),
        (".", "list.csv"),
        ("list.csv", "list.csv"),
    ],
    ids=" and ".join,
)
def test_a_slide_that_is_named_again_is_one_slide_as_a_list_has_it(named: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "s.svs").touch()
    (tmp_path / "y").symlink_to("x")
    (tmp_path / "list.csv").write_text("slide,id,note\nx/s.svs,mine,n\n")
    (entry,) = find_slides([tmp_path / name for name in named])
    assert (entry.slide_id == "mine") == (entry.columns == (("note", "n"),)) == ("list.csv" in named)


def test_a_list_may_give_a_slide_several_ids_and_not_two_meanings(tmp_path: Path) -> None:
    (tmp_path / "s.svs").touch()
    (tmp_path / "list.csv").write_text("slide,id,roi\ns.svs,a,a.geojson\ns.svs,b,b.geojson\n")
    assert [entry.slide_id for entry in find_slides([tmp_path / "list.csv", tmp_path])] == ["a", "b"]
    (tmp_path / "list.csv").write_text("slide,roi\ns.svs,a.geojson\ns.svs,b.geojson\n")
    with pytest.raises(UsageError, match=r"s\.svs is listed twice .* an `id` of its own"):
        find_slides([tmp_path / "list.csv"])


def test_a_czi_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "s.czi").write_bytes(b"ZISRAWFILE" + bytes(100))
    assert [entry.path.name for entry in find_slides([tmp_path])] == ["s.czi"]


# --- files that do not answer, before any slide is opened


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of files whose opening does not come back before the test ends."""
    names: set[str] = set()
    over = threading.Event()
    opened = os.open

    def wait(path: str | Path, *arguments: int) -> int:
        if Path(path).name in names:
            over.wait(300)
        return opened(path, *arguments)

    monkeypatch.setattr("pipelines.slides.ANSWER_S", 0.5)
    monkeypatch.setattr(os, "open", wait)
    yield names
    over.set()


def test_a_file_that_does_not_answer_is_left_to_its_reader(no_answer: set[str], tmp_path: Path) -> None:
    write_series(tmp_path, "1.2.3", smooth_pixels(300, 300))
    (tmp_path / "x.dcm").touch()
    no_answer.add("x.dcm")
    assert {entry.path.name for entry in find_slides([tmp_path])} == {"0.dcm", "x.dcm"}
    assert [entry.path.name for entry in find_slides([tmp_path / "x.dcm"])] == ["x.dcm"]


def test_a_second_file_that_does_not_answer_is_its_share(no_answer: set[str], tmp_path: Path) -> None:
    for name in ("x.dcm", "y.dcm", "s.svs"):
        (tmp_path / name).touch()
    no_answer |= {"x.dcm", "y.dcm"}
    done = run(tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 3, done.output
    assert "does not answer" in done.output


def test_a_file_with_a_slides_ending_is_not_opened_by_a_search(no_answer: set[str], tmp_path: Path) -> None:
    (tmp_path / "s.svs").touch()
    (tmp_path / "list.csv").write_text("slide\ns.svs\n")
    no_answer |= {"s.svs"}
    for named in (tmp_path, tmp_path / "s.svs", tmp_path / "list.csv"):
        assert [entry.path.name for entry in find_slides([named])] == ["s.svs"]


def test_a_list_that_does_not_answer_is_its_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("slide\ns.svs\n")
    over = threading.Event()
    monkeypatch.setattr("pipelines.slides.ANSWER_S", 0.5)
    monkeypatch.setattr("pipelines.slides.csv.DictReader", lambda file: over.wait(300))
    try:
        done = run(tmp_path / "list.csv", "--out", tmp_path / "out")
    finally:
        over.set()
    assert done.exit_code == 3, done.output
    assert "list.csv' does not answer" in done.output


def test_a_pipe_is_no_slide_list(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    done = command("check", tmp_path / "list.csv")
    assert done.exit_code == 2, done.output
    assert "is no file" in done.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide\ns\0.svs\n", "line 2: column slide"),
        ("slide,mask\ns.svs,\ns.svs,m\0.png\n", "line 3: column mask"),
        ("slide,roi\ns.svs,\0\n", "line 2: column roi"),
        ("slide,note\ns.svs," + "x" * 131_073 + "\n", "field larger than field limit"),
    ],
    ids=["slide", "mask", "roi", "long"],
)
def test_cells_of_a_slide_list_that_name_no_file_are_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    done = run(tmp_path / "list.csv", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert len(done.output.splitlines()) == 1


def test_a_failure_of_a_path_that_no_file_can_have_is_kept(tmp_path: Path) -> None:
    job = Job(slide="s\0.svs", slide_id="s", root=str(tmp_path), model="m", out=str(tmp_path))
    write_failure(Outcome(job, "failed", reason=Reason.MISSING, message="no file name"), "m")
    kept = read_failure(job, "m")
    assert kept is not None
    assert kept.reason is Reason.MISSING


# --- quickly


@pytest.mark.slow
def test_a_thousand_slides_are_looked_at_without_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Path(__file__).parent.parent / "sample_data" / "sample.svs"
    for k in range(1000):
        try:
            (tmp_path / f"{k}.svs").hardlink_to(sample)
        except OSError:  # another file system
            shutil.copy(sample, tmp_path / f"{k}.svs")
    done = command("check", tmp_path)
    assert done.exit_code == 0
    assert Counter(line.rsplit("  ", 1)[-1] for line in done.output.splitlines()[1:]) == {"opens": 1000}


def test_headers_only_reads_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(300, 300)], compression="jpeg")
    monkeypatch.setattr("pathology.readers.fingerprint_file", lambda _: pytest.fail("hashed"))
    monkeypatch.setattr(openslide.OpenSlide, "read_region", lambda *_: pytest.fail("decoded"))
    with open_slide(path, headers_only=True) as slide:
        assert slide.info.fingerprint == ""
        assert slide.info.shape == (300, 300)
