"""A tile's pixels: the right level, the exact mean where there is one, and nothing but the tile's own window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pathology.geometry import Box
from pathology.model import ReadRule
from pathology.resample import Window, level_for, resize, tile_window
from pathology.testing import ArrayReader, array_slide
from tests.slides import noise_pixels

PIXELS = noise_pixels(160, 180)


def test_scale_one_on_whole_pixels_copies() -> None:
    tile = array_slide(PIXELS).read_tile((16.0, 32.0), (24.0, 24.0), (24, 24))
    assert np.array_equal(tile, PIXELS[16:40, 32:56])


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 8])
def test_whole_ratios_are_exact_area_means(ratio: int) -> None:
    slide = array_slide(PIXELS)
    tile = slide.read_tile((10.0, 20.0), (8.0 * ratio, 8.0 * ratio), (8, 8))
    blocks = PIXELS[10 : 10 + 8 * ratio, 20 : 20 + 8 * ratio].reshape(8, ratio, 8, ratio, 3).astype(int)
    means = blocks.sum(axis=(1, 3)) / ratio**2
    if ratio in (2, 4, 8):
        assert np.array_equal(tile, np.floor(means + 0.5))
    else:  # Pillow divides by multiplying, which is a hair off where it isn't a shift
        assert np.abs(tile - means).max() < 0.6


@pytest.mark.parametrize("origin", [(8.0, 12.0), (9.0, 14.0)], ids=["on the raster", "off it"])
def test_the_mean_is_the_same_wherever_the_window_lies(origin: tuple[float, float]) -> None:
    tile = array_slide(PIXELS).read_tile(origin, (16.0, 16.0), (4, 4))
    y, x = (int(v) for v in origin)
    blocks = PIXELS[y : y + 16, x : x + 16].reshape(4, 4, 4, 4, 3).astype(int)
    assert np.array_equal(tile, (blocks.sum(axis=(1, 3)) + 8) // 16)


@pytest.mark.parametrize(
    ("ratio", "level"),
    [(0.5, 0), (1.0, 0), (3.9, 0), (3.97, 1), (4.0, 1), (8.0, 1), (15.9, 2), (64.0, 2)],
)
def test_the_coarsest_level_that_is_fine_enough(ratio: float, level: int) -> None:
    assert level_for((1.0, 4.0, 16.0), ratio) == level


def test_the_best_level_is_read_unless_level_0_is_asked_for() -> None:
    slide = array_slide(PIXELS, downsamples=(1, 4))
    reader = slide._reader
    assert isinstance(reader, ArrayReader)
    slide.read_tile((0.0, 0.0), (32.0, 32.0), (8, 8))
    slide.read_tile((0.0, 0.0), (32.0, 32.0), (8, 8), ReadRule(level="0"))
    assert reader.reads == [(1, Box(0, 0, 8, 8)), (0, Box(0, 0, 32, 32))]


RULES = st.builds(ReadRule, st.sampled_from(["best", "0"]), st.booleans(), st.sampled_from(["area", "bilinear", "bicubic"]))


@settings(max_examples=60)
@given(
    st.floats(0, 120),
    st.floats(0, 120),
    st.sampled_from([0.4, 0.8, 1.0, 1.3, 2.0, 2.37, 4.0, 5.1]),
    RULES,
    st.sampled_from([(1,), (1, 2), (1, 4)]),
)
def test_nothing_outside_the_window_decides(
    y: float, x: float, ratio: float, rule: ReadRule, downsamples: tuple[int, ...]
) -> None:
    slide = array_slide(PIXELS, downsamples=downsamples)
    size = (12 * ratio, 12 * ratio)
    window = tile_window(slide.info, (y, x), size, (12, 12), rule)
    tile = slide.read_tile((y, x), size, (12, 12), rule)
    reader = slide._reader
    assert isinstance(reader, ArrayReader)
    level = reader.levels[window.level]
    box, k = window.box, window.reduce
    inside = Box(box.y * k, box.x * k, box.height * k, box.width * k).intersect(Box(0, 0, *level.shape[:2])).slices()
    other = 255 - level
    other[inside] = level[inside]
    reader.levels[window.level][...] = other  # type: ignore[index]
    assert tile.shape == (12, 12, 3)
    assert np.array_equal(slide.read_tile((y, x), size, (12, 12), rule), tile)


@settings(max_examples=60)
@given(st.floats(20, 60), st.floats(20, 60), st.sampled_from([0.4, 0.8, 1.3, 2.37, 3.3]), st.sampled_from(["area", "bicubic"]))
def test_the_margin_holds_all_that_the_filter_reaches(y: float, x: float, ratio: float, kind: str) -> None:
    rule = ReadRule(filter=kind)  # type: ignore[arg-type]
    info = array_slide(PIXELS).info
    window = tile_window(info, (y, x), (12 * ratio, 12 * ratio), (12, 12), rule)
    more = 9
    box = Box(window.box.y - more, window.box.x - more, window.box.height + 2 * more, window.box.width + 2 * more)
    y0, x0, y1, x1 = (v + more for v in window.crop)
    wider = Window(window.level, box, (y0, x0, y1, x1), window.shape, window.filter)
    tiles = [resize(PIXELS[w.box.slices()], w).astype(int) for w in (window, wider)]
    assert np.abs(tiles[0] - tiles[1]).max() <= 1  # Pillow's box itself loses bits with the offset


def test_without_a_margin_the_tile_is_cut_out_first() -> None:
    slide = array_slide(PIXELS)
    rule = ReadRule(margin=False, filter="bilinear")
    expected = Image.fromarray(PIXELS[30:60, 40:70]).resize((12, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(slide.read_tile((30.0, 40.0), (30.0, 30.0), (12, 12), rule), np.asarray(expected))
    with_margin = slide.read_tile((30.0, 40.0), (30.0, 30.0), (12, 12), ReadRule(filter="bilinear"))
    assert not np.array_equal(with_margin, np.asarray(expected))


def test_beyond_the_slide_is_white() -> None:
    tile = array_slide(np.zeros((10, 10, 3), np.uint8)).read_tile((8.0, 8.0), (4.0, 4.0), (4, 4))
    assert tile[:2, :2].max() == 0
    assert tile[2:].min() == tile[:, 2:].min() == 255
