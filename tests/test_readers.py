"""Readers: one contract for all, bad files told apart, the order of resolutions, fingerprints, real pixels."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import openslide
import PIL.Image
import pytest
import slides
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from real_slides import cmu_small_region, histolytics_field
from slides import Pixels, corrupt_tile, cut, drop_tiles, noise_pixels, pyramid, smooth_pixels, write_tiff

from pathology.errors import Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.job import ReaderName
from pathology.readers import fingerprint, open_slide
from pathology.readers.direct import DirectReader
from pathology.readers.inspect import Kind, inspect_file
from pathology.readers.mpp import Claim, choose_mpp, openslide_claim, tags_claim
from pathology.readers.openslide_reader import OpenSlideReader, scanned_bounds, whole_downsample
from pathology.readers.plain import PlainReader
from pathology.slide import Slide

SHAPE = (512, 768)


@contextmanager
def refused(reason: Reason, *words: str) -> Iterator[None]:
    """The block raises SlideError with this reason and one line that holds the words."""
    with pytest.raises(SlideError) as caught:
        yield
    assert caught.value.reason is reason, caught.value
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# --- the contract


@dataclass(frozen=True)
class Sample:
    """A file and what its levels hold; `tolerance` in grey levels for lossy ones."""

    path: Path
    levels: list[Pixels]
    vendor: str
    tolerance: int = 0
    reader: ReaderName = "auto"

    def open(self) -> Slide:
        return open_slide(self.path, 0.5, reader=self.reader)


def aperio(folder: Path) -> Sample:
    levels = pyramid(noise_pixels(*SHAPE), [1, 2, 4])
    return Sample(write_tiff(folder / "s.svs", levels), levels, "aperio")


def aperio_jpeg(folder: Path) -> Sample:
    levels = pyramid(smooth_pixels(*SHAPE), [1, 4])
    return Sample(write_tiff(folder / "s.svs", levels, compression="jpeg"), levels, "aperio", 8)


def generic(folder: Path) -> Sample:
    levels = pyramid(noise_pixels(*SHAPE), [1, 2, 4])
    return Sample(write_tiff(folder / "s.tif", levels, aperio=False, compression=None), levels, "generic-tiff")


def png(folder: Path) -> Sample:
    pixels = noise_pixels(*SHAPE)
    Image.fromarray(pixels).save(folder / "s.png")
    return Sample(folder / "s.png", [pixels], "png")


def jpeg(folder: Path) -> Sample:
    pixels = smooth_pixels(*SHAPE)
    Image.fromarray(pixels).save(folder / "s.jpg", quality=95, subsampling=0)
    return Sample(folder / "s.jpg", [pixels], "jpeg", 8)


def strips(folder: Path) -> Sample:
    pixels = noise_pixels(*SHAPE)
    tifffile.imwrite(folder / "s.tif", pixels, photometric="rgb", compression="lzw", rowsperstrip=16)
    return Sample(folder / "s.tif", [pixels], "tiff")


SLIDES = [aperio, aperio_jpeg, generic]
READERS: list[ReaderName] = ["direct", "openslide"]


@pytest.fixture(
    params=[*itertools.product(SLIDES, READERS), *itertools.product([png, jpeg, strips], ["pillow"])],
    ids=lambda param: f"{param[0].__name__}-{param[1]}",
)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Sample:
    make, reader = request.param
    return replace(make(tmp_path), reader=reader)


def boxes(sample: Sample, count: int) -> list[tuple[int, Box]]:
    """Boxes of any place and size inside the levels."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        level = int(rng.integers(len(sample.levels)))
        h, w = sample.levels[level].shape[:2]
        y, x = int(rng.integers(h)), int(rng.integers(w))
        found.append((level, Box(y, x, int(rng.integers(1, h - y + 1)), int(rng.integers(1, w - x + 1)))))
    return found


class TestContract:
    def test_facts(self, sample: Sample) -> None:
        with sample.open() as slide:
            info = slide.info
            assert info.shape == SHAPE
            assert info.level_shapes == tuple(level.shape[:2] for level in sample.levels)
            assert info.level_downsamples == tuple(SHAPE[0] / level.shape[0] for level in sample.levels)
            assert (info.mpp, info.mpp_source, info.vendor) == (0.5, "option", sample.vendor)
            assert info.reader.split()[0] == sample.reader
            assert re.search(r"\d+\.\d+", info.reader)
            assert info.fingerprint == fingerprint(sample.path)

    def test_own_pixels_of_every_level(self, sample: Sample) -> None:
        with sample.open() as slide:
            for level, box in boxes(sample, 40):
                pixels, valid = slide.read_masked(level, box)
                assert pixels.dtype == np.uint8
                expected = sample.levels[level][box.slices()].astype(int)
                assert np.abs(pixels - expected).max() <= sample.tolerance
                assert valid.all()

    @pytest.mark.fault("S13")
    def test_white_outside(self, sample: Sample) -> None:
        with sample.open() as slide:
            for level, pixels in enumerate(sample.levels):
                h, w = pixels.shape[:2]
                for y, x in ((-7, -9), (h - 7, w - 9), (-7, w - 9)):
                    rgb, valid = slide.read_masked(level, Box(y, x, 20, 30))
                    rows, columns = np.arange(y, y + 20), np.arange(x, x + 30)
                    inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))[None]
                    assert np.array_equal(valid, inside)
                    assert (rgb[~inside] == 255).all()
                    own = pixels[max(y, 0) : y + 20, max(x, 0) : x + 30].reshape(-1, 3)
                    assert np.abs(rgb[inside].astype(int) - own).max() <= sample.tolerance
                assert (slide.read(level, Box(h, 0, 5, 5)) == 255).all()

    def test_no_pixels(self, sample: Sample) -> None:
        with sample.open() as slide:
            for box in (Box(3, 4, 0, 5), Box(3, 4, 5, 0), Box(SHAPE[0], SHAPE[1], 0, 0)):
                pixels, valid = slide.read_masked(0, box)
                assert (pixels.shape, valid.shape) == ((*box.shape, 3), box.shape)

    def test_pixels_belong_to_the_caller(self, sample: Sample) -> None:
        with sample.open() as slide:
            box = Box(5, 6, 7, 8)
            first = slide.read(0, box)
            kept = first.copy()
            first[:] = 0
            assert np.array_equal(slide.read(0, box), kept)

    def test_threads_give_the_same(self, sample: Sample) -> None:
        wanted = boxes(sample, 60)
        with sample.open() as slide:
            one_by_one = [slide.read(level, box) for level, box in wanted]
        with sample.open() as slide, ThreadPoolExecutor(8) as pool:
            at_once = list(pool.map(lambda at: slide.read(*at), wanted))
        assert all(np.array_equal(a, b) for a, b in zip(one_by_one, at_once, strict=True))

    def test_close_twice(self, sample: Sample) -> None:
        slide = sample.open()
        slide.close()
        slide.close()
        with pytest.raises(UsageError, match="closed"):
            slide.read(0, Box(0, 0, 4, 4))

    @pytest.mark.fault("S30", "S32")
    def test_name_decides_nothing(self, sample: Sample, tmp_path: Path) -> None:
        for name in ("x.svs", "x.png", "x.tif", "x", "a b'\n\"$(c).jpg", os.fsdecode(b"\xff.svs"), "-x.svs"):
            renamed = tmp_path / "renamed" / name
            renamed.parent.mkdir(exist_ok=True)
            shutil.copy(sample.path, renamed)
            with open_slide(renamed, 0.5) as slide:
                assert slide.info.vendor == sample.vendor
                assert slide.info.fingerprint == fingerprint(sample.path)
                assert np.abs(slide.read(0, Box(0, 0, 9, 9)) - sample.levels[0][:9, :9].astype(int)).max() <= sample.tolerance


# --- OpenSlide


@pytest.mark.fault("S25")
def test_levels_a_hair_off_a_whole_downsample(tmp_path: Path) -> None:
    levels = pyramid(smooth_pixels(701, 901), [1, 2, 4, 16])
    with open_slide(write_tiff(tmp_path / "s.svs", levels)) as slide:
        assert slide.info.level_downsamples == (1.0, 2.0, 4.0, 16.0)
        for number, level in enumerate(levels):
            # OpenSlide places reads by whole level-0 px and interpolates what is left: a fraction of this slope per px.
            box = Box(20, 33, 18, 15)
            assert np.abs(slide.read(number, box) - level[box.slices()].astype(int)).max() <= (0 if number == 0 else 2)


@given(st.integers(2, 64), st.integers(130, 4000), st.integers(130, 4000), st.integers(0, 63), st.sampled_from("frc"))
def test_whole_downsample_is_found(k: int, h: int, w: int, rest: int, rounding: str) -> None:
    l0 = h * k + rest % k, w * k + (rest * 7) % k
    side: Callable[[int], int] = {"f": lambda n: n // k, "r": lambda n: round(n / k), "c": lambda n: -(-n // k)}[rounding]
    level = side(l0[0]), side(l0[1])
    stated = (l0[0] / level[0] + l0[1] / level[1]) / 2
    assert whole_downsample(l0, level, stated) == k


def test_other_downsamples_stay() -> None:
    assert whole_downsample((1000, 1000), (400, 400), 2.5) == 2.5
    assert whole_downsample((1000, 1000), (250, 240), 4.0833) == 4.0833


@pytest.mark.fault("S12")
def test_missing_tiles_are_white_and_no_data(tmp_path: Path) -> None:
    pixels = noise_pixels(384, 384)
    path = write_tiff(tmp_path / "s.svs", [pixels])
    drop_tiles(path, [0, 4])
    present = np.ones((384, 384), bool)
    present[:128, :128] = present[128:256, 128:256] = False
    with open_slide(path) as slide:
        rgb, valid = slide.read_masked(0, Box(0, 0, 384, 384))
        assert np.array_equal(valid, present)
        assert (rgb[~present] == 255).all()
        assert np.array_equal(rgb[present], pixels[present])
        assert not slide.valid(0, Box(3, 3, 50, 50)).any()
        assert (slide.read(0, Box(3, 3, 50, 50)) == 255).all()


@pytest.mark.fault("S12", "S38")
@pytest.mark.parametrize("tiled", [True, False])
def test_alpha_over_white(tmp_path: Path, tiled: bool) -> None:
    rgba = np.dstack([noise_pixels(128, 128), np.repeat(np.arange(128, dtype=np.uint8) * 2, 128).reshape(128, 128)])
    tile = {"tile": (128, 128)} if tiled else {}
    tifffile.imwrite(tmp_path / "s.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], **tile)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    with open_slide(tmp_path / "s.tif", 0.5) as slide:
        assert slide.info.vendor == ("generic-tiff" if tiled else "tiff")
        rgb, valid = slide.read_masked(0, Box(0, 0, 128, 128))
    assert np.abs(rgb - expected).max() <= 2
    assert np.array_equal(valid, rgba[..., 3] > 0)


@pytest.mark.fault("S09")
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("reader", READERS)
def test_a_failed_read_spoils_no_other(tmp_path: Path, compression: str, reader: ReaderName) -> None:
    pixels = smooth_pixels(64 * 8, 64 * 8)
    path = write_tiff(tmp_path / "s.svs", [pixels], compression=compression, tile_px=64)
    bad = 19
    corrupt_tile(path, bad)
    tiles = [Box(y, x, 64, 64) for y in range(0, 512, 64) for x in range(0, 512, 64)]

    def read(slide: Slide, box: Box) -> Pixels | Reason | None:
        try:
            return slide.read(0, box)
        except SlideError as error:
            return None if str(tmp_path) in str(error) else error.reason

    for threads in (1, 8):
        with open_slide(path, reader=reader) as slide, ThreadPoolExecutor(threads) as pool:
            order = tiles * 3
            for box, got in zip(order, pool.map(lambda box: read(slide, box), order), strict=True):
                if box == tiles[bad]:
                    assert got is Reason.CORRUPT_TILES
                else:
                    assert isinstance(got, np.ndarray)
                    assert np.abs(got - pixels[box.slices()].astype(int)).max() <= 8


def test_handles_are_opened_only_after_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(256, 256)], tile_px=64)
    corrupt_tile(path, 5)
    opened: list[Path] = []
    real = openslide.OpenSlide
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: opened.append(path) or real(path))
    good, bad = Box(0, 0, 64, 64), Box(64, 64, 64, 64)
    with open_slide(path, reader="openslide") as slide:
        for box, opens in ((good, 1), (bad, 2), (good, 3), (good, 3), (good, 3)):
            if box == bad:
                with refused(Reason.CORRUPT_TILES):
                    slide.read(0, box)
            else:
                slide.read(0, box)
            assert len(opened) == opens


def test_a_file_that_vanishes_is_a_read_error(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(600, 600)])
    with open_slide(path) as slide:
        slide.read(0, Box(0, 0, 8, 8))
        cut(path, 0.1)
        with refused(Reason.READ_ERROR, "s.svs"):
            slide.read(0, Box(500, 500, 64, 64))
        with refused(Reason.READ_ERROR, "s.svs"):
            slide.read(0, Box(500, 500, 64, 64))


@pytest.mark.fault("P02")
def test_label_and_macro_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise_pixels(40, 60)
    path = write_tiff(tmp_path / "s.svs", pyramid(noise_pixels(256, 256), [1, 2]), label=picture, macro=picture)
    with openslide.OpenSlide(path) as handle:
        assert {"label", "macro"} <= set(handle.associated_images)  # they are there to be read

    def read(*_: object) -> None:
        raise AssertionError("an associated picture was read")

    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", read)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(read))
    with open_slide(path) as slide:
        assert len(slide.info.level_shapes) == 2
        slide.read(1, Box(0, 0, 128, 128))


def test_bounds() -> None:
    names = {f"openslide.bounds-{k}": v for k, v in (("x", "-7"), ("y", "20"), ("width", "300"), ("height", "200"))}
    assert scanned_bounds(names) == Box(20, -7, 200, 300)
    assert scanned_bounds({}) is None


def test_objective(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)])
    for reader, kind in (("direct", DirectReader), ("openslide", OpenSlideReader)):
        with open_slide(path, reader=reader) as slide:  # type: ignore[arg-type]
            assert slide.info.objective == 20
            assert slide.info.bounds is None
            assert isinstance(slide._reader, kind)


def test_openslide_is_imported_for_slides_only() -> None:
    code = "import pathology.readers, sys; sys.exit('openslide' in sys.modules or 'tifffile' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- plain pictures


@pytest.mark.fault("S38")
def test_modes(tmp_path: Path) -> None:
    rgb = noise_pixels(40, 50)
    colour, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 0])
    palette = colour.quantize(32)
    black_and_white = grey.point(lambda v: 255 * (v > 128)).convert("1")
    for number, image in enumerate((colour, grey, palette, black_and_white)):
        for ending in ("png", "tif"):
            path = tmp_path / f"{number}.{ending}"
            image.save(path)
            with open_slide(path, 0.5) as slide:
                assert np.array_equal(slide.read(0, Box(0, 0, 40, 50)), np.asarray(image.convert("RGB"))), path


@pytest.mark.fault("S38")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures(tmp_path: Path, mode: str) -> None:
    pixels = noise_pixels(20, 30)
    pixels[:, 10:] = (10, 20, 30)
    clear = np.zeros((20, 30), bool)
    clear[:, 10:] = True
    if mode == "P":
        image = Image.fromarray(pixels).quantize(16)
        (index,) = set(np.asarray(image)[clear].tolist())
        clear = np.asarray(image) == index
        image.save(tmp_path / "s.png", transparency=index)
    else:
        alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
        image = Image.fromarray(pixels).convert(mode[:-1])
        image.putalpha(alpha)
        assert image.mode == mode
        image.save(tmp_path / "s.png")
    with open_slide(tmp_path / "s.png", 0.5) as slide:
        rgb, valid = slide.read_masked(0, Box(0, 0, 20, 30))
    assert np.array_equal(valid, ~clear)
    assert (rgb[clear] == 255).all()
    assert np.array_equal(rgb[~clear], np.asarray(image.convert("RGB"))[~clear])


def test_own_limit_on_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise_pixels(100, 100)).save(tmp_path / "s.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own warning and error must not surface
    with open_slide(tmp_path / "s.png", 0.5) as slide:
        assert isinstance(slide._reader, PlainReader)
    monkeypatch.setattr("pathology.readers.plain.MAX_PIXELS", 9999)
    with refused(Reason.UNSUPPORTED, "100 x 100", "tiled pyramid"):
        open_slide(tmp_path / "s.png", 0.5)


# --- files that are no slides


@pytest.mark.fault("S05", "S33")
def test_missing(tmp_path: Path) -> None:
    (tmp_path / "dangling.svs").symlink_to("nowhere.svs")
    (tmp_path / "loop.svs").symlink_to("loop.svs")
    (tmp_path / "file").touch()
    for name in ("no.svs", "dangling.svs", "loop.svs", "file/s.svs", "x" * 300, "nul\0.svs"):
        with refused(Reason.MISSING):
            open_slide(tmp_path / name)


@pytest.mark.fault("S01")
def test_empty(tmp_path: Path) -> None:
    (tmp_path / "s.svs").touch()
    with refused(Reason.EMPTY, "'s.svs'", "0 bytes"):
        open_slide(tmp_path / "s.svs")


@pytest.mark.fault("S04", "F25")
def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.svs").mkdir()
    os.mkfifo(tmp_path / "pipe.svs")
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as short:
        listener.bind(f"{short}/s.svs")
        for path, sort in (
            (tmp_path / "folder.svs", "folder"),
            (tmp_path / "pipe.svs", "pipe"),
            (Path(short) / "s.svs", "socket"),
            (Path("/dev/null"), "device"),
        ):
            with refused(Reason.NOT_A_FILE, sort):
                open_slide(path)


@pytest.mark.fault("S37")
def test_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own, which others may not enter
        Path(folder).chmod(0o755)
        path = write_tiff(Path(folder) / "s.svs", [noise_pixels(64, 64)])
        path.chmod(0)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            with refused(Reason.PERMISSION, "s.svs"):
                open_slide(path)
        finally:
            os.seteuid(me)


@pytest.mark.fault("S02", "S03")
def test_not_a_slide(tmp_path: Path) -> None:
    for content in (b"x", b"slide,mpp\n" * 100, b"GIF89a" + bytes(100), b"PK\3\4" + bytes(100), bytes(1000)):
        (tmp_path / "s.svs").write_bytes(content)
        with refused(Reason.NOT_A_SLIDE, "s.svs"):
            open_slide(tmp_path / "s.svs")


@pytest.mark.fault("S06", "S08")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_cut_short(tmp_path: Path, share: float) -> None:
    pixels = noise_pixels(600, 600)
    many = write_tiff(tmp_path / "many.svs", pyramid(pixels, [1, 2, 4]), compression="jpeg", label=pixels[:50, :50])
    one, tiled, wide = tmp_path / "one.tif", tmp_path / "tiled.tif", tmp_path / "wide.tif"
    tifffile.imwrite(one, pixels, photometric="rgb")
    tifffile.imwrite(tiled, pixels, photometric="rgb", tile=(128, 128), compression="deflate")
    tifffile.imwrite(wide, pixels, photometric="rgb", tile=(128, 128), bigtiff=True)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    Image.fromarray(pixels).save(tmp_path / "p.jpg")
    for path in (many, one, tiled, wide, tmp_path / "p.png", tmp_path / "p.jpg"):
        open_slide(path, 0.5).close()
        with refused(Reason.TRUNCATED, path.name, "copy it again"):
            open_slide(cut(path, share), 0.5)


@pytest.mark.fault("S06")
@pytest.mark.parametrize("layout", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}], ids=str)
def test_every_cut_is_found(tmp_path: Path, layout: dict[str, object]) -> None:
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path, **layout) as tiff:
        for side in (32, 16):
            pixels = noise_pixels(side, side)[..., 0]
            tiff.write(pixels, photometric="minisblack", tile=(16, 16), description="a long description", metadata=None)
    assert [d.shape for d in inspect_file(path).directories] == [(32, 32), (16, 16)]
    whole = path.stat().st_size
    for size in range(whole - 1, 4, -1):
        os.truncate(path, size)
        with refused(Reason.TRUNCATED):
            inspect_file(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_headers_are_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, noise_pixels(32, 32), photometric="rgb", tile=(16, 16), bigtiff=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(4, 420), max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    reason = None
    try:
        inspect_file(path)
    except SlideError as error:
        reason = error.reason
    assert reason in (None, Reason.TRUNCATED, Reason.UNSUPPORTED)


def handmade(path: Path, tags: dict[int, tuple[int, int]], sort: str, at: int, size: int, following: int = 0) -> Path:
    """A TIFF of one directory `at` that place, with (type, value) per tag, in a sparse file of `size` bytes."""
    header, body, end = b"", b"", b""
    for tag, (kind, value) in sorted(tags.items()):
        if sort == "big":
            body += struct.pack("<HHQQ", tag, kind, 1, value)
        else:
            body += struct.pack("<HHII", tag, kind, 1, value & 0xFFFFFFFF)
            end += struct.pack("<I", value >> 32) if sort == "ndpi" else b""
    if sort == "big":
        header = b"II+\0" + struct.pack("<HHQ", 8, 0, at)
        directory = struct.pack("<Q", len(tags)) + body + struct.pack("<Q", following)
    else:
        header = b"II*\0" + struct.pack("<Q", at)
        directory = struct.pack("<H", len(tags)) + body + struct.pack("<Q" if sort == "ndpi" else "<I", following) + end
    with path.open("wb") as file:
        file.write(header)
        file.seek(at)
        file.write(directory)
        file.truncate(size)
    return path


@pytest.mark.fault("S35")
@pytest.mark.parametrize("sort", ["big", "ndpi"])
def test_beyond_four_gigabytes(tmp_path: Path, sort: str) -> None:
    gib = 2**30
    mark = {65421: (4, 1)} if sort == "ndpi" else {}
    tags = {256: (4, 5000), 257: (4, 4000), 258: (3, 8), 277: (3, 3), 273: (16 if sort == "big" else 4, 5 * gib), 279: (4, gib)}
    path = handmade(tmp_path / "s.ndpi", tags | mark, sort, 4 * gib + 10, 6 * gib)
    (directory,) = inspect_file(path).directories
    assert (directory.shape, directory.bits, directory.samples) == ((4000, 5000), 8, 3)
    os.truncate(path, 6 * gib - 1)
    with refused(Reason.TRUNCATED, "strips"):
        inspect_file(path)
    os.truncate(path, 4 * gib + 20)
    with refused(Reason.TRUNCATED, "directory"):
        inspect_file(path)


@pytest.mark.fault("S14", "S17")
def test_lying_headers(tmp_path: Path) -> None:
    tile = {256: (4, 65520), 257: (4, 65520), 322: (4, 65520), 323: (4, 65520), 324: (4, 1000), 325: (4, 10)}
    with refused(Reason.UNSUPPORTED, "65520 x 65520"):
        open_slide(handmade(tmp_path / "tile.tif", tile, "classic", 16, 2000))
    with refused(Reason.UNSUPPORTED, "form a loop"):
        open_slide(handmade(tmp_path / "loop.tif", {256: (4, 10), 257: (4, 10)}, "classic", 16, 2000, following=16))
    with refused(Reason.UNSUPPORTED, "0 tags"):
        open_slide(handmade(tmp_path / "none.tif", {}, "classic", 16, 2000))
    with refused(Reason.TRUNCATED, "written to its end"):
        (tmp_path / "unfinished.tif").write_bytes(b"II+\0\x08" + bytes(2000))
        open_slide(tmp_path / "unfinished.tif")
    with refused(Reason.TRUNCATED, "tag 270"):  # a double takes 8 bytes, which stand elsewhere
        open_slide(handmade(tmp_path / "text.tif", {256: (4, 10), 270: (12, 1993)}, "classic", 16, 2000))
    huge = {256: (4, 2**31), 257: (4, 2**31), 258: (3, 8), 273: (4, 100), 279: (4, 10)}
    with refused(Reason.UNSUPPORTED):
        open_slide(handmade(tmp_path / "huge.tif", huge, "classic", 16, 2000), 0.5)


@pytest.mark.fault("S38")
def test_unsupported(tmp_path: Path) -> None:
    rgb = noise_pixels(300, 300)
    deep = rgb.astype(np.uint16) * 257
    channels = noise_pixels(300, 300).transpose(2, 0, 1).copy()
    ink = np.dstack([rgb, rgb[..., 0]])
    for tile in ({}, {"tile": (128, 128)}):
        for pixels, layout, word in (
            (deep, {"photometric": "rgb"}, "16 bits"),
            (deep[..., 0], {"photometric": "minisblack"}, "16 bits"),
            (rgb[..., 0].astype(np.float32), {"photometric": "minisblack"}, "32 bits"),
            (channels, {"photometric": "minisblack"}, "3 channels"),
            (ink, {"photometric": "separated"}, "4 channels"),
        ):
            tifffile.imwrite(tmp_path / "s.tif", pixels, **layout, **tile)
            with refused(Reason.UNSUPPORTED, word, "convert"):
                open_slide(tmp_path / "s.tif", 0.5)
    Image.fromarray(deep[..., 0]).save(tmp_path / "s.png")
    with refused(Reason.UNSUPPORTED, "16 bits"):
        open_slide(tmp_path / "s.png", 0.5)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "s.jpg")
    with refused(Reason.UNSUPPORTED, "CMYK"):
        open_slide(tmp_path / "s.jpg", 0.5)
    tifffile.imwrite(tmp_path / "s.svs", rgb, photometric="rgb", tile=(128, 128), compression="jpeg2000")
    with refused(Reason.UNSUPPORTED, "compression"):
        open_slide(tmp_path / "s.svs", 0.5, reader="openslide")
    for name, reader in (("s.png", "direct"), ("s.jpg", "openslide")):
        Image.fromarray(rgb).save(tmp_path / name)
        with refused(Reason.UNSUPPORTED, "--reader auto"):
            open_slide(tmp_path / name, 0.5, reader=reader)  # type: ignore[arg-type]


def test_damaged_picture(tmp_path: Path) -> None:
    Image.fromarray(noise_pixels(90, 90)).save(tmp_path / "s.png")
    content = bytearray((tmp_path / "s.png").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "s.png").write_bytes(content)
    with open_slide(tmp_path / "s.png", 0.5) as slide:  # pixels are decoded when they are wanted
        for _ in range(2):
            with refused(Reason.READ_ERROR, "s.png"):
                slide.read(0, Box(0, 0, 9, 9))


@pytest.mark.fault("S34")
def test_slides_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "m.mrxs").write_bytes(b"\xff\xd8\xff\xe0")
    with refused(Reason.MISSING, "Slidedat.ini"):
        open_slide(tmp_path / "m.mrxs")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Slidedat.ini").write_text("[GENERAL]\n")
    assert inspect_file(tmp_path / "m.mrxs").kind is Kind.MIRAX
    with refused(Reason.UNSUPPORTED, "m.mrxs"):  # by OpenSlide: it was let through
        open_slide(tmp_path / "m.mrxs")
    (tmp_path / "d.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    with refused(Reason.UNSUPPORTED, "dicom"):
        open_slide(tmp_path / "d.dcm")
    (tmp_path / "v.vms").write_text("[Virtual Microscope Specimen]\n")
    with refused(Reason.UNSUPPORTED, "v.vms"):
        open_slide(tmp_path / "v.vms")


# --- resolution


def test_what_the_file_states(tmp_path: Path) -> None:
    pixels = noise_pixels(64, 64)
    for number, (aperio, mpp, resolution, expected) in enumerate(
        (
            (True, 0.25, None, (0.25, "openslide.mpp")),
            (True, 0.25, (20000, 20000, "CENTIMETER"), (0.25, "openslide.mpp")),
            (True, None, (20000, 20000, "CENTIMETER"), (0.5, "tiff tags")),
            (True, None, (50800, 50800, "INCH"), (0.5, "tiff tags")),
            (False, None, (20000, 20000, "CENTIMETER"), (0.5, "openslide.mpp")),
            (False, None, (20000, 19500, "CENTIMETER"), ((0.5 + 1e4 / 19500) / 2, "openslide.mpp")),
        )
    ):
        path = write_tiff(tmp_path / f"{number}.tif", [pixels], mpp=mpp, aperio=aperio, resolution=resolution)
        with open_slide(path) as slide:
            assert slide.info.mpp == pytest.approx(expected[0], rel=1e-12)
            assert slide.info.mpp_source == expected[1]
    tifffile.imwrite(tmp_path / "s.tif", pixels, photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER")
    with open_slide(tmp_path / "s.tif") as slide:
        assert (slide.info.mpp, slide.info.mpp_source, slide.info.vendor) == (0.5, "tiff tags", "tiff")


@pytest.mark.fault("S22")
@pytest.mark.parametrize("mpp", ["0", "-0.5", "nan", "inf", "1e6", "0,5", "0.04", "11", "half", "", "1_0"])
def test_absurd_resolutions(tmp_path: Path, mpp: str) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)], mpp=mpp)
    with refused(Reason.BAD_MPP, "--slide-mpp", "s.svs"):
        open_slide(path)
    with open_slide(path, 0.5) as slide:  # the option mends it, no force needed
        assert (slide.info.mpp, slide.info.mpp_source) == (0.5, "option")


@pytest.mark.fault("S21")
def test_no_resolution(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)], mpp=None)
    Image.fromarray(noise_pixels(64, 64)).save(tmp_path / "s.png", dpi=(72, 72))
    tifffile.imwrite(tmp_path / "s.tif", noise_pixels(64, 64), photometric="rgb")
    for path in (slide, tmp_path / "s.png", tmp_path / "s.tif"):
        with refused(Reason.NO_MPP, "--slide-mpp", path.name):
            open_slide(path)


@pytest.mark.fault("S22")
def test_screen_resolution_is_none(tmp_path: Path) -> None:
    for aperio in (True, False):
        path = write_tiff(tmp_path / "s.tif", [noise_pixels(64, 64)], mpp=None, aperio=aperio, resolution=(72, 72, "INCH"))
        with refused(Reason.BAD_MPP, "352.778", "--slide-mpp"):
            open_slide(path)


@pytest.mark.fault("S23")
def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.tif", [noise_pixels(64, 64)], aperio=False, resolution=(20000, 18000, "CENTIMETER"))
    with refused(Reason.BAD_MPP, "not square", "--slide-mpp"):
        open_slide(path)


def test_option_against_the_file(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)], mpp=0.5)
    with open_slide(path, 0.549) as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (0.549, "option")
    for option in (0.551, 0.449, 0.25):
        with refused(Reason.BAD_MPP, "--force", "0.5 um/px"):
            open_slide(path, option)
        with open_slide(path, option, force=True) as slide:
            assert slide.info.mpp == option
    for option in (0.0, -1.0, float("nan"), float("inf"), 352.8):
        with refused(Reason.BAD_MPP, "--slide-mpp"):
            open_slide(path, option, force=True)


def test_order_of_claims() -> None:
    stated = {
        "openslide.mpp-x": "0.25",
        "openslide.mpp-y": "0.26",
        "aperio.MPP": "0.3",
        "tiff.XResolution": "20000",
        "tiff.YResolution": "20000",
        "tiff.ResolutionUnit": "centimeter",
    }
    assert openslide_claim(stated) == Claim("0.26", "0.25", "openslide.mpp")
    del stated["openslide.mpp-x"], stated["openslide.mpp-y"]
    assert openslide_claim(stated) == Claim("0.3", "0.3", "aperio.MPP")
    del stated["aperio.MPP"]
    assert openslide_claim(stated) == Claim(0.5, 0.5, "tiff tags")
    stated["tiff.ResolutionUnit"] = "none"
    assert openslide_claim(stated) is None
    assert openslide_claim({}) is None


def test_one_axis_is_not_enough() -> None:
    with refused(Reason.BAD_MPP, "nothing"):
        choose_mpp("s", Claim(None, "0.5", "openslide.mpp"), None, force=False)
    assert tags_claim(20000.0, float("nan"), 3) == Claim(0.5, None, "tiff tags")


# --- fingerprint


def test_fingerprint_sees_ends_size_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, noise_pixels(1500, 1500), photometric="rgb")
    first, size = fingerprint(path), path.stat().st_size
    assert len(first) == 64
    os.utime(path, (0, 0))
    assert fingerprint(path) == first
    block = (size - 4096) * 31 // 63
    for at in (size - 1, size - 2**18, 2**18 - 1, block, block + 4095):
        assert _flipped(path, at) != first
    assert _flipped(path, block + 4096) == first  # between the samples: not promised, but what "sampled" means
    with path.open("ab") as file:
        file.write(b"\0")
    assert fingerprint(path) != first


def test_fingerprint_of_small_files_sees_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, noise_pixels(30, 30), photometric="rgb")
    first = fingerprint(path)
    assert all(_flipped(path, at) != first for at in range(600, path.stat().st_size, 37))


def _flipped(path: Path, at: int) -> str:
    """The fingerprint with one byte changed, which is put back."""
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))
        file.flush()
        changed = fingerprint(path)
        file.seek(at)
        file.write(old)
    return changed


def test_fingerprint_of_mirax_covers_the_folder(tmp_path: Path) -> None:
    (tmp_path / "m.mrxs").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Slidedat.ini").write_text("[GENERAL]\n")
    (tmp_path / "m" / "Data0001.dat").write_bytes(b"pixels")
    seen = {fingerprint(tmp_path / "m.mrxs")}
    (tmp_path / "m" / "Data0001.dat").write_bytes(b"others")
    seen.add(fingerprint(tmp_path / "m.mrxs"))
    (tmp_path / "m" / "Data0002.dat").touch()
    seen.add(fingerprint(tmp_path / "m.mrxs"))
    (tmp_path / "m" / "Slidedat.ini").write_text("[GENERAL]\nX = 1\n")
    seen.add(fingerprint(tmp_path / "m.mrxs"))
    (tmp_path / "m" / "Data0001.dat").rename(tmp_path / "m" / "Data0000.dat")
    seen.add(fingerprint(tmp_path / "m.mrxs"))
    assert len(seen) == 5


def test_fingerprint_of_vms_covers_the_named_files(tmp_path: Path) -> None:
    (tmp_path / "v.vms").write_text("[Virtual Microscope Specimen]\nImageFile=one.jpg\n")
    (tmp_path / "one.jpg").write_bytes(b"one")
    first = fingerprint(tmp_path / "v.vms")
    (tmp_path / "two.jpg").write_bytes(b"not of this slide")
    assert fingerprint(tmp_path / "v.vms") == first
    (tmp_path / "one.jpg").write_bytes(b"two")
    assert fingerprint(tmp_path / "v.vms") != first


# --- writers and real pixels


def test_writers_are_deterministic(tmp_path: Path) -> None:
    for number in (1, 2):
        levels = pyramid(smooth_pixels(200, 300), [1, 2])
        write_tiff(tmp_path / f"{number}.svs", levels, compression="jpeg", label=noise_pixels(30, 40))
    assert (tmp_path / "1.svs").read_bytes() == (tmp_path / "2.svs").read_bytes()
    assert slides.tile_span(tmp_path / "1.svs", 0)[1] > 0


def test_real_slide() -> None:
    with open_slide(cmu_small_region()) as slide:
        info = slide.info
        assert (info.shape, info.level_downsamples) == ((2967, 2220), (1.0,))
        assert (info.mpp, info.mpp_source, info.vendor, info.objective) == (0.499, "openslide.mpp", "aperio", 20)
        whole = slide.read(0, Box(0, 0, *info.shape))
        assert np.array_equal(slide.read(0, Box(1111, 777, 224, 224)), whole[1111:1335, 777:1001])
        pixels, valid = slide.read_masked(0, Box(2900, 2200, 100, 100))
        assert np.array_equal(valid, np.pad(np.ones((67, 20), bool), ((0, 33), (0, 80))))
        assert (pixels[~valid] == 255).all()
    with tifffile.TiffFile(cmu_small_region()) as tiff:  # another decoder: libjpeg-turbo through imagecodecs
        assert np.array_equal(tiff.pages[0].asarray(), whole)


def test_real_field() -> None:
    field = histolytics_field()
    assert field.instances.shape == (1500, 1500)
    assert len(np.unique(field.instances)) - 1 == 1294
    with refused(Reason.NO_MPP, "--slide-mpp"):
        open_slide(field.path)
    with open_slide(field.path, 0.5) as slide:
        assert (slide.info.vendor, slide.info.shape) == ("jpeg", (1500, 1500))
        assert np.array_equal(slide.read(0, Box(0, 0, 1500, 1500)), field.pixels)
        nuclei = field.instances > 0
        assert field.pixels[nuclei].mean() < field.pixels[~nuclei].mean() - 20
