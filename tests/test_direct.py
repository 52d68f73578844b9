"""The direct reader: OpenSlide's pixels, each tile decoded once, neighbours fetched together, nothing believed unseen."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from real_slides import cmu_small_region
from slides import Pixels, corrupt_tile, drop_tiles, noise_pixels, pyramid, smooth_pixels, tile_span, write_tiff

from pathology.batches import ReadPool, read_tiles
from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.readers import direct, open_slide
from pathology.readers.codecs import MADE_AT_ONCE, VECTOR_BYTES, Corrupt, TileCodec, empty_pixels, ycbcr_to_rgb
from pathology.readers.direct import GAP_BYTES, LARGEST_READ, DirectReader, merged
from pathology.readers.tile_cache import TileCache
from pathology.slide import Slide
from pathology.testing import mean_colour
from pathology.thumbnail import thumbnail

TILE = 64


def reader_of(slide: Slide) -> DirectReader:
    assert isinstance(slide._reader, DirectReader)
    return slide._reader


def tiled(path: Path, pixels: Pixels, **options: Any) -> Path:
    tifffile.imwrite(path, pixels, **{"tile": (TILE, TILE), "photometric": "rgb", "metadata": None, **options})
    return path


def both(path: Path, mpp: float | None = 0.5) -> tuple[Slide, Slide]:
    return open_slide(path, mpp, reader="direct"), open_slide(path, mpp, reader="openslide")


# --- pixels


KINDS: dict[str, dict[str, Any]] = {
    "raw": {},
    "deflate": {"compression": "deflate"},
    "deflate with differences": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "lzw with differences": {"compression": "lzw", "predictor": True},
    "jpeg 4:4:4": {"compression": "jpeg", "subsampling": (1, 1)},
    "jpeg 4:2:2": {"compression": "jpeg", "subsampling": (2, 1)},
    "jpeg 4:2:0": {"compression": "jpeg", "subsampling": (2, 2)},
    "bigtiff": {"compression": "deflate", "bigtiff": True},
}


@pytest.mark.fault("S38")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_openslide_reads_has_its_pixels(tmp_path: Path, kind: str) -> None:
    own, theirs = both(tiled(tmp_path / "s.tif", smooth_pixels(200, 300), **KINDS[kind]))
    with own, theirs:
        whole = Box(0, 0, 200, 300)
        assert np.array_equal(own.read(0, whole), theirs.read(0, whole))
        assert own.info.reader.startswith("direct")
        for ratio in (1.0, 2.0, 4.0, 1.7, 0.6):
            for y, x in ((0.0, 0.0), (32.0, 48.0), (17.0, 5.0), (120.0, 220.0)):
                size = (20 * ratio, 20 * ratio)
                assert np.array_equal(own.read_tile((y, x), size, (20, 20)), theirs.read_tile((y, x), size, (20, 20)))


def as_rgb_jpeg(pixels: Pixels, subsampling: str = "422") -> bytes:
    """A JPEG of RGB without any mark that says so, as Aperio's scanners write it."""
    data = imagecodecs.jpeg8_encode(pixels, level=80, colorspace="RGB", outcolorspace="RGB", subsampling=subsampling)
    return bytes(data)


def aperio(path: Path, tiles: list[bytes], shape: tuple[int, int], compression: int, photometric: int = 2) -> Path:
    """An Aperio slide of one level from encoded tiles."""
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter(tiles),
            shape=(*shape, 3),
            dtype=np.uint8,
            tile=(TILE, TILE),
            photometric=photometric,
            compression=compression,
            compressionargs={"outcolorspace": "rgb"} if compression == 7 else None,
            description=f"Aperio Image Library v0\r\n{shape[1]}x{shape[0]} ({TILE}x{TILE})|AppMag = 20|MPP = 0.5",
            metadata=None,
            software=False,
        )
    return path


def blocks(pixels: Pixels) -> list[Pixels]:
    return [
        np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE])
        for y in range(0, pixels.shape[0], TILE)
        for x in range(0, pixels.shape[1], TILE)
    ]


def to_ycbcr(pixels: Pixels) -> Pixels:
    rgb = pixels.astype(float)
    y = rgb @ [0.299, 0.587, 0.114]
    cb, cr = 128 + (rgb[..., 2] - y) / 1.772, 128 + (rgb[..., 0] - y) / 1.402
    return np.stack([y, cb, cr], axis=-1).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("compression", "encode"),
    [
        (7, as_rgb_jpeg),
        (33005, lambda tile: imagecodecs.jpeg2k_encode(tile, codecformat="j2k", mct=False, reversible=True)),
        (33003, lambda tile: imagecodecs.jpeg2k_encode(to_ycbcr(tile), codecformat="j2k", mct=False, reversible=True)),
    ],
    ids=["jpeg rgb", "jpeg 2000 rgb", "jpeg 2000 ycbcr"],
)
def test_aperio_tiles_have_openslides_pixels(tmp_path: Path, compression: int, encode: Callable[[Pixels], bytes]) -> None:
    pixels = smooth_pixels(128, 192)
    own, theirs = both(aperio(tmp_path / "s.svs", [encode(b) for b in blocks(pixels)], (128, 192), compression), None)
    with own, theirs:
        assert (own.info.vendor, own.info.mpp) == (theirs.info.vendor, theirs.info.mpp) == ("aperio", 0.5)
        read = own.read(0, Box(0, 0, 128, 192))
        assert np.array_equal(read, theirs.read(0, Box(0, 0, 128, 192)))
        assert np.abs(read - pixels.astype(int)).max() < 30
        assert np.array_equal(
            own.read_tile((0.0, 0.0), (128.0, 128.0), (64, 64)), theirs.read_tile((0.0, 0.0), (128.0, 128.0), (64, 64))
        )


@pytest.mark.parametrize("compression", ["jpeg2000", "webp"])
def test_kinds_that_openslide_refuses(tmp_path: Path, compression: str) -> None:
    pixels = smooth_pixels(200, 300)
    lossless = {"compressionargs": {"level": 0 if compression == "jpeg2000" else True}}
    path = tiled(tmp_path / "s.tif", pixels, compression=compression, **({} if compression == "webp" else lossless))
    with open_slide(path, 0.5) as slide:
        assert slide.info.reader.startswith("direct")
        assert np.abs(slide.read(0, Box(0, 0, 200, 300)).astype(int) - pixels).max() <= (40 if compression == "webp" else 0)
    with pytest.raises(SlideError):
        open_slide(path, 0.5, reader="openslide")


def test_big_endian(tmp_path: Path) -> None:
    pixels = noise_pixels(200, 300)
    with open_slide(tiled(tmp_path / "s.tif", pixels, compression="deflate", byteorder=">"), 0.5) as slide:
        assert slide.info.reader.startswith("direct")
        assert np.array_equal(slide.read(0, Box(0, 0, 200, 300)), pixels)


@pytest.mark.fault("S38")
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_is_rgb_of_equal_parts(tmp_path: Path, white_is_zero: bool) -> None:
    grey = smooth_pixels(150, 150)[..., 0]
    photometric = "miniswhite" if white_is_zero else "minisblack"
    path = tiled(tmp_path / "s.tif", grey, photometric=photometric, compression="deflate")
    with open_slide(path, 0.5, reader="direct") as slide:
        read = slide.read(0, Box(0, 0, 150, 150))
    assert np.array_equal(read, np.repeat((255 - grey if white_is_zero else grey)[..., None], 3, axis=2))


def test_ycbcr_ends_are_black_white_and_pure() -> None:
    known = np.array([[[0, 128, 128], [255, 128, 128], [76, 85, 255], [29, 255, 107]]], np.uint8)
    assert ycbcr_to_rgb(known).tolist() == [[[0, 0, 0], [255, 255, 255], [254, 0, 0], [0, 0, 254]]]


def test_ome_tiff_with_its_pyramid_in_sub_directories(tmp_path: Path) -> None:
    levels = pyramid(noise_pixels(512, 768), [1, 2, 4])
    with tifffile.TiffWriter(tmp_path / "s.ome.tif") as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="deflate",
                subifds=2 if number == 0 else None,
                subfiletype=1 if number else 0,
                metadata={"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25} if number == 0 else None,
            )
    with open_slide(tmp_path / "s.ome.tif") as slide:
        assert (slide.info.mpp, slide.info.mpp_source) == (0.25, "OME PhysicalSize")
        assert slide.info.vendor == "ome-tiff"
        assert slide.info.level_downsamples == (1.0, 2.0, 4.0)
        for number, level in enumerate(levels):
            assert np.array_equal(slide.read(number, Box(0, 0, *level.shape[:2])), level)


@pytest.mark.fault("S12")
def test_missing_tiles_are_white_and_no_data_and_never_decoded(tmp_path: Path) -> None:
    pixels = noise_pixels(256, 256)
    path = write_tiff(tmp_path / "s.svs", [pixels], tile_px=TILE)
    drop_tiles(path, [5])
    with open_slide(path, reader="direct") as slide:
        rgb, valid = slide.read_masked(0, Box(0, 0, 256, 256))
        assert reader_of(slide).decodes == 15
        assert (rgb[64:128, 64:128] == 255).all()
        assert not valid[64:128, 64:128].any()
        assert valid.sum() == 256 * 256 - TILE * TILE
        assert (slide.read_tile((64.0, 64.0), (64.0, 64.0), (32, 32)) == 255).all()


@pytest.mark.fault("S13")
def test_a_tile_is_averaged_with_white_beyond_the_slides_edge(tmp_path: Path) -> None:
    own, theirs = both(write_tiff(tmp_path / "s.svs", [noise_pixels(101, 131)], tile_px=TILE))
    with own, theirs:
        for origin in ((64.0, 96.0), (0.0, 96.0), (96.0, 0.0)):
            tile = own.read_tile(origin, (64.0, 64.0), (32, 32))
            assert np.array_equal(tile, theirs.read_tile(origin, (64.0, 64.0), (32, 32)))
    assert (tile[3:] == 255).all()


def test_real_slide_is_openslides_to_the_bit() -> None:
    own, theirs = both(cmu_small_region(), None)
    with own, theirs:
        assert np.array_equal(own.read(0, Box(0, 0, 2967, 2220)), theirs.read(0, Box(0, 0, 2967, 2220)))
        for ratio in (2.0, 4.0, 2.004, 1.3):
            size, shape = (200 * ratio, 200 * ratio), (200, 200)
            at = (400.0 * ratio, 200.0 * ratio)
            assert np.array_equal(own.read_tile(at, size, shape), theirs.read_tile(at, size, shape))


@pytest.mark.parametrize("opencv", [True, False])
def test_the_mean_has_the_same_bits_with_and_without_opencv(opencv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if opencv:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr("pathology.readers.codecs.cv2", None)
    pixels = noise_pixels(64, 64)
    data = as_rgb_jpeg(pixels)
    whole = codec().decode(data).astype(int)
    for factor in (2, 4, 8):
        side = 64 // factor
        sums = whole.reshape(side, factor, side, factor, 3).sum(axis=(1, 3))
        assert np.array_equal(codec().decode_mean(data, factor), (sums + factor**2 // 2) // factor**2)


def test_tiles_do_not_share_the_room_they_were_made_in() -> None:
    first, second = (codec().decode_mean(as_rgb_jpeg(noise_pixels(64, 64)), 2) for _ in range(2))
    assert not np.shares_memory(first, second)


def test_rows_of_tiles_begin_off_the_places_that_are_written_past_the_caches() -> None:
    for shape in ((240, 240, 3), (256, 256, 4), (120, 120, 3), (8, 8, 3)):
        pixels = empty_pixels(shape)
        assert pixels.shape == shape
        assert pixels.flags.c_contiguous
        assert all(row.ctypes.data % VECTOR_BYTES for row in pixels)


@pytest.mark.parametrize(("factor", "fast"), [(1, False), (2, False), (2, True)])
def test_a_tile_of_many_keeps_the_memory_of_few(factor: int, fast: bool) -> None:
    data = as_rgb_jpeg(noise_pixels(64, 64))
    (alone,) = codec().decode_all([data], factor, fast)
    tracemalloc.start()
    try:
        tiles = codec().decode_all([data] * 5 * MADE_AT_ONCE, factor, fast)
        assert all(np.array_equal(tile, alone) for tile in tiles)  # type: ignore[arg-type]
        (last,) = tiles[-1:]
        del tiles
        assert isinstance(last, np.ndarray)
        assert tracemalloc.get_traced_memory()[0] < (MADE_AT_ONCE + 2) * last.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ratio", [2, 4, 3.1])
def test_fast_decoding_is_near_the_mean_and_not_it(ratio: float) -> None:
    path = cmu_small_region()
    with open_slide(path, fast_decode=True) as fast, open_slide(path) as exact:
        assert fast.info.reader == exact.info.reader
        origin, size = (160.0 * ratio, 120.0 * ratio), (224 * ratio, 224 * ratio)
        near, mean = (s.read_tile(origin, size, (224, 224)).astype(float) for s in (fast, exact))
    error = np.sqrt(np.mean((near - mean) ** 2))
    assert 0 < error < 5
    assert np.abs(near.mean(axis=(0, 1)) - mean.mean(axis=(0, 1))).max() < 0.5


def test_a_tile_that_ends_early_is_shown_with_fast_decoding_as_without(tmp_path: Path) -> None:
    tiles = [as_rgb_jpeg(block) for block in blocks(noise_pixels(2 * TILE, 2 * TILE))]
    tiles[1] = tiles[1][: len(tiles[1]) // 2]
    path = aperio(tmp_path / "s.svs", tiles, (2 * TILE, 2 * TILE), 7)
    with open_slide(path, fast_decode=True, reader="direct") as fast, open_slide(path, reader="direct") as exact:
        shown, mean = (s.read_tile((0.0, float(TILE)), (TILE, TILE), (TILE // 2, TILE // 2)) for s in (fast, exact))
        assert np.array_equal(shown, mean)
        assert not np.array_equal(*(s.read_tile((0.0, 0.0), (TILE, TILE), (TILE // 2, TILE // 2)) for s in (fast, exact)))


# --- which reader


def test_the_choice_and_its_reason(tmp_path: Path) -> None:
    own, theirs = both(write_tiff(tmp_path / "s.svs", [noise_pixels(90, 90)]))
    with own, theirs, open_slide(tmp_path / "s.svs") as chosen:
        assert own.info.reader_why == theirs.info.reader_why == "it was asked for"
        assert chosen.info.reader == own.info.reader
        assert "without a slide library" in chosen.info.reader_why
    tifffile.imwrite(tmp_path / "strips.tif", noise_pixels(90, 90), photometric="rgb")
    with pytest.raises(SlideError, match="not tiled") as caught:
        open_slide(tmp_path / "strips.tif", 0.5, reader="direct")
    assert caught.value.reason is Reason.UNSUPPORTED


def test_what_cannot_be_decoded_here_is_left_to_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(90, 90)])
    monkeypatch.setattr(direct, "VENDORS", frozenset())
    with open_slide(path) as slide:
        assert slide.info.reader.startswith("openslide")
        assert "aperio" in slide.info.reader_why


def test_a_make_whose_tiles_come_out_otherwise_is_left_to_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(90, 90)])
    decode = TileCodec.decode
    monkeypatch.setattr(TileCodec, "decode", lambda codec, data: decode(codec, data) ^ 1)
    with open_slide(path) as slide:
        assert slide.info.reader.startswith("openslide")
        assert "otherwise" in slide.info.reader_why

    def refuse(codec: TileCodec, data: bytes) -> Pixels:
        raise Corrupt("never seen")

    monkeypatch.setattr(TileCodec, "decode", refuse)
    with pytest.raises(SlideError, match="otherwise"):
        open_slide(path, reader="direct")


# --- each tile once


def counted(slide: Slide, plan_tiles: NDArray[np.int32], grid: TileGrid, threads: int) -> list[Pixels | None]:
    with closing(ReadPool(threads)) as pool:
        return list(read_tiles(slide, mean_colour(tile_px=grid.tile_px, mpp=grid.mpp).spec, grid, plan_tiles, pool))


def touched(tiles: NDArray[np.int32], l0_tile: int, l0_stride: int, shape: tuple[int, int]) -> set[tuple[int, int]]:
    """The file's own tiles under `tiles`."""
    found = set()
    for row, col in tiles.tolist():
        y, x = row * l0_stride, col * l0_stride
        for ty in range(y // TILE, -(-min(y + l0_tile, shape[0]) // TILE)):
            for tx in range(x // TILE, -(-min(x + l0_tile, shape[1]) // TILE)):
                found.add((ty, tx))
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("mpp", "stride"), [(0.5, 40), (0.5, 20), (1.0, 40)])
def test_every_source_tile_is_decoded_once_and_others_never(tmp_path: Path, threads: int, mpp: float, stride: int) -> None:
    shape = (1100, 1200)
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(*shape)], compression="jpeg", tile_px=TILE)
    ratio = round(mpp / 0.5)
    with open_slide(path) as slide:
        grid = TileGrid(shape, 0.5, mpp, 40, stride)
        rows, cols = grid.shape
        # All lie inside: a window over the slide's edge at another ratio is averaged by itself.
        inner = (min(rows, shape[0] // (ratio * stride) - 2), min(cols, shape[1] // (ratio * stride) - 2))
        tiles = np.array([(r, c) for r in range(inner[0]) for c in range(inner[1]) if (r * c) % 7 != 3], np.int32)
        read = counted(slide, tiles, grid, threads)
        assert all(tile is not None for tile in read)
        assert reader_of(slide).decodes == len(touched(tiles, 40 * ratio, stride * ratio, shape))


def test_neighbours_are_fetched_together(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(1024, 1024)], compression="jpeg", tile_px=TILE)
    with open_slide(path) as slide:
        grid = TileGrid((1024, 1024), 0.5, 0.5, TILE, TILE)
        tiles = np.array([(r, c) for r in range(16) for c in range(16)], np.int32)
        counted(slide, tiles, grid, 2)
        reader = reader_of(slide)
        assert reader.decodes == 256
        assert reader.reads <= 16


def test_a_large_box_is_fetched_together(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [pixels := smooth_pixels(1024, 1024)], compression="deflate", tile_px=TILE)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, Box(0, 0, 1024, 1024)), pixels)
        assert reader_of(slide).decodes == 256
        assert reader_of(slide).reads <= 4  # of 3 MB


def test_spans_are_merged_across_small_gaps_up_to_a_size() -> None:
    spans = [(0, 100, (0, 0)), (100, 50, (0, 1)), (150 + GAP_BYTES, 10, (0, 2)), (10**9, 10, (0, 3))]
    assert [(first, end, [name for *_, name in members]) for first, end, members in merged(spans)] == [
        (0, 160 + GAP_BYTES, [(0, 0), (0, 1), (0, 2)]),
        (10**9, 10**9 + 10, [(0, 3)]),
    ]
    assert list(merged([])) == []


@given(st.lists(st.tuples(st.integers(0, 20 * LARGEST_READ), st.integers(1, LARGEST_READ)), max_size=30))
def test_merged_reads_cover_every_span_once(places: list[tuple[int, int]]) -> None:
    spans = sorted((place, size, (0, i)) for i, (place, size) in enumerate(places))
    found = []
    for first, end, members in merged(spans):
        assert all(first <= place and place + size <= end for place, size, _ in members)
        assert end - first <= LARGEST_READ or len(members) == 1
        found += members
    assert found == spans


def test_a_cache_of_one_makes_again_what_it_forgot() -> None:
    cache, made = TileCache[str](100), []

    def make(names: Sequence[str]) -> list[Pixels]:
        made.extend(names)
        return [np.zeros(80, np.uint8) for _ in names]

    for name in "aabbab":
        cache.get([name], make)
    assert made == ["a", "b", "a", "b"]


def test_tiles_come_in_the_order_asked_for_though_some_are_forgotten_meanwhile() -> None:
    cache, made = TileCache[int](100), []

    def make(names: Sequence[int]) -> list[Pixels]:
        made.extend(names)
        return [np.full(80, name, np.uint8) for name in names]

    cache.get([2], make)
    assert [tile[0] for tile in cache.get([3, 2, 1, 0], make) if not isinstance(tile, Corrupt)] == [3, 2, 1, 0]
    assert made == [2, 3, 1, 0]


def test_threads_that_want_the_same_tile_wait_for_the_one_that_makes_it() -> None:
    cache, made, gate = TileCache[str](10**6), [], threading.Event()

    def make(names: Sequence[str]) -> list[Pixels]:
        made.extend(names)
        gate.wait(5)
        return [np.zeros(8, np.uint8) for _ in names]

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(cache.get, ["a", "b"], make) for _ in range(6)]
        gate.set()
        answers = [f.result() for f in futures]
    assert sorted(made) == ["a", "b"]
    assert all(mine is theirs for answer in answers for mine, theirs in zip(answer, answers[0], strict=True))


def test_a_thread_makes_its_own_tiles_before_it_waits_for_others() -> None:
    cache, begun, other_made = TileCache[str](10**6), threading.Event(), threading.Event()

    def make_late(names: Sequence[str]) -> list[Pixels]:
        begun.set()
        assert other_made.wait(10)
        return [np.zeros(8, np.uint8) for _ in names]

    def make(names: Sequence[str]) -> list[Pixels]:
        assert names == ["b"]
        other_made.set()
        return [np.ones(8, np.uint8)]

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(cache.get, ["a"], make_late)
        assert begun.wait(10)
        a, b = cache.get(["a", "b"], make)
        assert a is late.result()[0]
        assert b is not a


def test_another_thread_makes_them_when_the_first_was_refused() -> None:
    cache = TileCache[str](10**6)

    def refuse(names: Sequence[str]) -> list[Pixels]:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.get(["a", "b"], refuse)
    assert len(cache.get(["b", "a"], lambda names: [np.ones(1, np.uint8) for _ in names])) == 2


def test_what_is_told_of_a_corrupt_tile_holds_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Room:
        """What the frame that decodes holds."""

    held: list[weakref.ref[Room]] = []

    def decode(self: TileCodec, data: bytes, *_: object) -> Pixels:
        room = Room()
        held.append(weakref.ref(room))
        raise Corrupt("it ends early")

    monkeypatch.setattr(TileCodec, "decode", decode)
    tiles = codec().decode_all([b"1", b"2"], 1, fast=False)
    assert [str(tile) for tile in tiles if isinstance(tile, Corrupt)] == ["it ends early"] * 2
    gc.collect()
    assert [room() for room in held] == [None, None]


def test_a_corrupt_tile_takes_no_neighbour_with_it_and_is_decoded_once(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(64, 256)], compression="jpeg", tile_px=TILE)
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages.first.dataoffsets[2]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"gone")
    with open_slide(path) as slide:
        reader = reader_of(slide)
        for _ in range(2):
            with pytest.raises(SlideError, match="tile 2 of level 0"):
                slide.read(0, Box(0, 0, 64, 256))
        assert reader.decodes == 4
        assert slide.read(0, Box(0, 192, 64, 64)).shape == (64, 64, 3)
        assert reader.decodes == 4


# --- bad input


def codec(**options: Any) -> TileCodec:
    return TileCodec(**{"compression": 7, "photometric": 2, "shape": (64, 64), "samples": 3, **options})


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 9 :]


@pytest.mark.fault("S18")
@pytest.mark.parametrize("decode", ["decode", "decode_mean", "decode_scaled"])
def test_a_header_that_claims_another_size_is_refused_before_decoding(decode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = as_rgb_jpeg(smooth_pixels(64, 64))
    arguments = () if decode == "decode" else (2,)
    assert getattr(codec(), decode)(data, *arguments).shape in ((64, 64, 3), (32, 32, 3))
    called: list[int] = []
    monkeypatch.setattr("pathology.readers.codecs.imagecodecs.jpeg8_decode", lambda *a, **k: called.append(1))
    monkeypatch.setattr("pathology.readers.codecs.simplejpeg.decode_jpeg", lambda *a, **k: called.append(1))
    honest = codec()
    honest._check(data)  # tiles that begin as this one does are not looked at again
    for lie in ((65000, 65000), (64, 65), (0, 64)):
        for of_a_level in (codec(), honest):
            with pytest.raises(Corrupt, match="claims"):
                getattr(of_a_level, decode)(with_size(data, *lie), *arguments)
    assert not called


@pytest.mark.fault("S18")
@pytest.mark.parametrize("kind", ["jpeg2000", "webp", "webp lossless"])
def test_headers_of_other_codecs_are_looked_at_too(kind: str) -> None:
    number = 34712 if kind == "jpeg2000" else 50001
    for shape in ((64, 64), (80, 48)):
        pixels = smooth_pixels(*shape)
        data = (
            imagecodecs.jpeg2k_encode(pixels, level=0)
            if kind == "jpeg2000"
            else imagecodecs.webp_encode(pixels, lossless="lossless" in kind)
        )
        right = codec(compression=number, shape=shape)
        assert right.decode(bytes(data)).shape == (*shape, 3)
        with pytest.raises(Corrupt, match="claims"):
            codec(compression=number, shape=(shape[0], shape[1] + 1)).decode(bytes(data))


JUNK = [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0", b"\xa5" * 300, b"\xff\xd8" + b"\xff" * 300, b"RIFF"]


@pytest.mark.parametrize("compression", [1, 5, 7, 8, 33003, 33005, 34712, 50001])
def test_junk_is_corrupt(compression: int) -> None:
    for junk in JUNK:
        with pytest.raises(Corrupt):
            codec(compression=compression).decode(junk)


@pytest.mark.fault("S19")
def test_a_bomb_ends_at_the_tiles_size() -> None:
    bomb = imagecodecs.zlib_encode(bytes(50_000_000))
    with pytest.raises(Corrupt):
        codec(compression=8).decode(bytes(bomb))


@pytest.mark.fault("S09")
def test_a_corrupt_tile_is_tried_once_and_named(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(256, 256)], compression="jpeg", tile_px=TILE)
    corrupt_tile(path, 5)
    with open_slide(path) as slide:
        for _ in range(3):
            with pytest.raises(SlideError, match="tile 5 of level 0") as caught:
                slide.read(0, Box(64, 64, 10, 10))
            assert caught.value.reason is Reason.CORRUPT_TILES
        assert reader_of(slide).decodes == 1
        grid = TileGrid((256, 256), 0.5, 0.5, TILE, TILE)
        tiles = np.array([(r, c) for r in range(4) for c in range(4)], np.int32)
        read = counted(slide, tiles, grid, 2)
    assert [i for i, tile in enumerate(read) if tile is None] == [5]


def test_a_file_that_shrinks_is_a_read_error_and_no_corrupt_tile(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(256, 256)], tile_px=TILE)
    with open_slide(path) as slide:
        os.truncate(path, tile_span(path, 9)[0] + 5)
        for _ in range(2):
            with pytest.raises(SlideError, match="ends at byte") as caught:
                slide.read(0, Box(128, 64, 8, 8))
            assert caught.value.reason is Reason.READ_ERROR


def test_a_corrupt_tile_in_a_coarse_level_takes_no_more_than_itself_from_pictures(tmp_path: Path) -> None:
    levels = pyramid(smooth_pixels(2048, 2048), [1, 4])
    path = write_tiff(tmp_path / "s.svs", levels, compression="jpeg", tile_px=TILE)
    with open_slide(path) as slide:
        whole = thumbnail(slide, 512)
    corrupt_tile(path, 9, page=2)  # the thumbnail is the second page
    with open_slide(path) as slide:
        holed = thumbnail(slide, 512)
    differs = np.argwhere((whole != holed).any(axis=-1))
    assert differs.min(axis=0).tolist() == [64, 64]
    assert differs.max(axis=0).tolist() == [127, 127]
    assert (holed[64:128, 64:128] == 255).all()


def test_bytes_fetched_twice_at_once_count_once(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(256, 256)], compression="jpeg", tile_px=TILE)
    window = [(0, Box(0, 0, 64, 256), 1)]
    with open_slide(path) as slide:
        reader = reader_of(slide)
        reader._cache = TileCache[tuple[int, int, int]](1)
        beside = [window]

        def pread(descriptor: int, count: int, place: int) -> bytes:
            if beside:  # another thread wants the same while the first read is under way
                reader.prefetch(beside.pop())
            return os.pread(descriptor, count, place)

        reader._pread = pread
        reader.prefetch(window)
        assert reader._fetched_bytes == sum(map(len, reader._fetched.values())) > 0
