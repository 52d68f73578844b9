"""Tissue: the mask, coverage of tiles, outlines, thumbnails."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageFilter
from scipy import ndimage

from pathology.components import components, drop_small, fill_holes
from pathology.errors import UsageError
from pathology.geometry import Box
from pathology.outline import polygons, signed_area
from pathology.slide import Slide, SlideInfo
from pathology.testing import ArrayReader, array_slide
from pathology.thumbnail import BLOCK_PX, SMALLER, thumbnail
from pathology.tissue import (
    MEDIAN_ROWS,
    OUTLINE_COLOR,
    TissueMask,
    find_tissue,
    median,
    otsu_threshold,
    tissue_geojson,
    tissue_png,
)

PINK = (200, 120, 170)
GLASS = (243, 243, 243)

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def slide_of(pixels: np.ndarray, mpp: float, valid: np.ndarray | None = None) -> Slide:
    """A slide of one level that shares memory with `pixels`."""
    shape = (pixels.shape[0], pixels.shape[1])
    info = SlideInfo(shape, (shape,), (1.0,), mpp, "option", "array", "array", None, "0" * 64)
    return Slide(Path("array"), info, ArrayReader([pixels], None if valid is None else [valid]))


def disc(side: int, radius: float, centre: tuple[float, float], color: tuple[int, int, int] = PINK) -> np.ndarray:
    y, x = np.ogrid[:side, :side]
    inside = (y + 0.5 - centre[0]) ** 2 + (x + 0.5 - centre[1]) ** 2 <= radius**2
    return np.where(inside[..., None], np.uint8(color), np.uint8(GLASS))


# Coverage


@st.composite
def masks_on_slides(draw: st.DrawFn) -> TissueMask:
    mask = draw(masks)
    pixel = (draw(st.floats(1, 40)), draw(st.floats(1, 40)))
    # The slide may end inside the last mask pixel or a little after it.
    shape = tuple(max(1, int(n * p + draw(st.floats(-0.9, 0.9)) * p)) for n, p in zip(mask.shape, pixel, strict=True))
    return TissueMask(mask, pixel, 0.5, (shape[0], shape[1]))


def brute_coverage(tissue: TissueMask, y: float, x: float, side: float) -> float:
    """Overlap of the tile with every mask pixel in turn, over the tile's part on the slide."""
    l0_y, l0_x = tissue.l0_edges()
    height, width = tissue.l0_shape

    def overlap(a0: float, a1: float, b0: float, b1: float) -> float:
        return max(0.0, min(a1, b1) - max(a0, b0))

    area = overlap(y, y + side, 0, height) * overlap(x, x + side, 0, width)
    covered = sum(
        overlap(y, y + side, l0_y[i], l0_y[i + 1]) * overlap(x, x + side, l0_x[j], l0_x[j + 1])
        for i, j in np.argwhere(tissue.mask)
    )
    return covered / area if area > 0 else 0.0


@given(
    tissue=masks_on_slides(),
    places=st.lists(st.tuples(st.floats(-60, 400), st.floats(-60, 400)), min_size=1),
    side=st.floats(1, 90),
)
@settings(max_examples=200, deadline=None)
def test_coverage_equals_brute_force(tissue: TissueMask, places: list[tuple[float, float]], side: float) -> None:
    expected = [brute_coverage(tissue, y, x, side) for y, x in places]
    got = tissue.coverage(np.array(places, np.float64), side)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_coverage_by_hand() -> None:
    mask = np.array([[True, False], [False, False]])
    tissue = TissueMask(mask, (4.0, 4.0), 0.5, (8, 7))
    origins = np.array([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0], [0.0, 3.0], [-4.0, 0.0], [-2.0, -2.0], [8.0, 0.0], [1.0, 6.0]])
    # The sixth lies half beside the slide: only its quarter on the slide counts. The last reaches past the right edge.
    expected = [1.0, 0.25, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0]
    np.testing.assert_array_equal(tissue.coverage(origins, 4.0), expected)


def test_tiles_without_tissue_have_exactly_zero_and_full_ones_exactly_one() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((300, 300)) < 0.5
    mask[100:150] = False
    mask[200:250] = True
    tissue = TissueMask(mask, (33.37, 33.37), 0.25, (10011, 10011))
    at = rng.random((500, 2)) * (40 * 33.37, 9000)
    assert (tissue.coverage(at + np.array([101 * 33.37, 0]), 223.71) == 0).all()
    assert (tissue.coverage(at + np.array([201 * 33.37, 0]), 223.71).astype(np.float32) == 1).all()


def test_coverage_beside_the_slide_is_zero_and_nothing_asked_is_nothing_answered() -> None:
    tissue = TissueMask(np.ones((3, 3), bool), (10.0, 10.0), 0.5, (25, 30))
    np.testing.assert_array_equal(tissue.coverage(np.array([[30.0, 0.0], [0.0, -8.0]]), 8.0), [0.0, 0.0])
    assert tissue.coverage(np.empty((0, 2)), 8.0).shape == (0,)


def test_area_ends_where_the_slide_ends() -> None:
    assert TissueMask(np.ones((3, 3), bool), (10.0, 10.0), 2.0, (25, 28)).area_mm2 == pytest.approx(25 * 28 * 4 / 1e6)
    assert TissueMask(np.eye(3, dtype=bool), (10.0, 10.0), 2.0, (30, 30)).area_mm2 == pytest.approx(300 * 4 / 1e6)


@pytest.mark.parametrize(
    ("mask", "pixel", "shape", "words"),
    [
        (np.ones((3, 3), np.uint8), (10.0, 10.0), (30, 30), "uint8"),
        (np.ones((3, 0), bool), (10.0, 10.0), (30, 30), "at least one pixel"),
        (np.ones((3, 3), bool), (10.0, 0.0), (30, 30), "above 0"),
        (np.ones((30, 30), bool), (10.0, 10.0), (300, 900), "does not fit the slide's 900 px"),
    ],
)
def test_masks_that_cannot_be_placed_are_refused(
    mask: np.ndarray, pixel: tuple[float, float], shape: tuple[int, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        TissueMask(mask, pixel, 0.5, shape)


# Finding tissue


@pytest.mark.parametrize("mpp", [0.25, 0.5, 2.0])
def test_disc_on_glass_has_its_area(mpp: float) -> None:
    side, radius = int(1000 / mpp), 320 / mpp
    found = find_tissue(slide_of(disc(side, radius, (side * 0.45, side * 0.52)), mpp))
    assert found.method == "otsu"
    assert found.area_mm2 == pytest.approx(np.pi * 0.32**2, rel=0.05)
    centre = found.coverage(np.array([[side * 0.45 - 10, side * 0.52 - 10], [0.0, 0.0]]), 20.0)
    np.testing.assert_array_equal(centre, [1.0, 0.0])


@pytest.mark.parametrize("downsamples", [(1,), (1, 4), (1, 2, 4, 8, 16, 32)])
def test_mask_pixels_are_about_8_um_whatever_the_levels(downsamples: tuple[int, ...]) -> None:
    found = find_tissue(array_slide(disc(1600, 500, (800, 800)), 0.5, downsamples))
    assert 5.3 <= found.l0_pixel[0] * 0.5 <= 11.3
    assert found.area_mm2 == pytest.approx(np.pi * 0.25**2, rel=0.05)


def noisy_glass(tint: tuple[int, int, int], quality: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    pixels = np.clip(rng.normal(tint, 4, (900, 900, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


@pytest.mark.parametrize("tint", [(255, 255, 255), (243, 243, 243), (236, 232, 240), (0, 0, 0), (90, 90, 90)])
@pytest.mark.parametrize("quality", [30, 90])
@pytest.mark.parametrize("mpp", [0.5, 8.0])
def test_glass_and_black_have_no_tissue(tint: tuple[int, int, int], quality: int, mpp: float) -> None:
    found = find_tissue(slide_of(noisy_glass(tint, quality), mpp))
    assert not found.mask.any()
    assert found.area_mm2 == 0


@pytest.mark.parametrize("color", [PINK, (235, 205, 225), (120, 70, 150)])
def test_a_field_of_tissue_is_all_tissue(color: tuple[int, int, int]) -> None:
    assert find_tissue(slide_of(np.full((700, 900, 3), color, np.uint8), 0.5)).mask.all()


def test_a_field_of_pale_and_dark_tissue_is_not_cut_in_two() -> None:
    pixels = np.full((1000, 1000, 3), (225, 190, 215), np.uint8)  # stroma
    pixels[:, 600:] = (90, 40, 120)  # epithelium
    assert find_tissue(slide_of(pixels, 0.5)).mask.all()


def test_a_tiny_field_of_tissue_is_kept() -> None:
    assert find_tissue(slide_of(np.full((64, 40, 3), PINK, np.uint8), 0.5)).mask.all()
    assert find_tissue(slide_of(np.full((1, 1, 3), PINK, np.uint8), 0.5)).mask.all()


def test_a_little_tissue_on_much_glass_is_found() -> None:
    glass = noisy_glass((240, 238, 242), 80)
    glass[400:420, 500:520] = PINK
    found = find_tissue(slide_of(glass, 8.0))
    assert found.area_mm2 == pytest.approx((20 * 0.008) ** 2, rel=0.15)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 4.0])
def test_small_pieces_and_holes_go_by_their_size_in_um2(mpp: float) -> None:
    side = int(1000 / mpp)
    pixels = np.full((side, side, 3), GLASS, np.uint8)

    def square(y_um: float, x_um: float, side_um: float, color: tuple[int, int, int]) -> None:
        y, x, n = (round(v / mpp) for v in (y_um, x_um, side_um))
        pixels[y : y + n, x : x + n] = color

    square(40, 40, 64, PINK)  # 4,096 um2: dust
    square(40, 200, 144, PINK)  # 20,736 um2: a piece
    square(360, 80, 560, PINK)
    square(400, 120, 120, GLASS)  # 14,400 um2: a lumen
    square(600, 320, 256, GLASS)  # 65,536 um2: glass
    found = find_tissue(slide_of(pixels, mpp))

    def at(y_um: float, x_um: float) -> bool:
        return bool(found.mask[int(y_um / mpp / found.l0_pixel[0]), int(x_um / mpp / found.l0_pixel[1])])

    assert [at(72, 72), at(112, 272), at(460, 180), at(728, 448), at(380, 100)] == [False, True, True, False, True]


def test_parts_without_data_are_neither_tissue_nor_in_the_histogram() -> None:
    pixels = np.full((800, 800, 3), PINK, np.uint8)
    valid = np.zeros((800, 800), bool)
    valid[160:640, 160:640] = True
    pixels[~valid] = (0, 255, 0)  # what a reader leaves there must not matter
    expected = np.pad(np.ones((30, 30), bool), 10)
    np.testing.assert_array_equal(find_tissue(slide_of(pixels, 0.5, valid), "none").mask, expected)
    found = find_tissue(slide_of(pixels, 0.5, valid), "otsu").mask
    assert np.argwhere(found != expected).tolist() == [[10, 10], [10, 39], [39, 10], [39, 39]]  # the median rounds corners
    assert not find_tissue(slide_of(pixels, 0.5, np.zeros_like(valid))).mask.any()


def test_none_takes_everything() -> None:
    found = find_tissue(slide_of(np.full((333, 517, 3), 255, np.uint8), 0.5), "none")
    assert found.mask.all()
    assert found.area_mm2 == pytest.approx(333 * 517 * 0.25 / 1e6)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="'magic' is unknown; use otsu or none"):
        find_tissue(slide_of(np.zeros((8, 8, 3), np.uint8), 0.5), "magic")  # type: ignore[arg-type]


def test_a_single_level_is_read_once_in_bounded_blocks() -> None:
    pixels = np.broadcast_to(np.array(PINK, np.uint8), (5003, 4501, 3))
    slide = slide_of(pixels, 0.25)
    assert find_tissue(slide).mask.all()
    boxes = [box for _, box in slide._reader.reads]  # type: ignore[attr-defined]
    assert max(max(box.shape) for box in boxes) <= BLOCK_PX
    assert sum(box.height * box.width for box in boxes) == 5003 * 4501


@given(array_shapes(min_dims=2, max_dims=2, max_side=2 * MEDIAN_ROWS + 3), st.sampled_from([2, 256]))
def test_the_median_is_pillows(shape: tuple[int, int], levels: int) -> None:
    image = np.random.default_rng(0).integers(0, levels, shape, np.uint8, endpoint=False)
    assert np.array_equal(median(image), Image.fromarray(image).filter(ImageFilter.MedianFilter(3)))


def test_otsu_threshold() -> None:
    histogram = np.zeros(256, np.int64)
    histogram[[10, 12, 90, 92]] = [500, 500, 100, 100]
    assert 12 <= otsu_threshold(histogram) < 90
    assert otsu_threshold(np.bincount([7] * 9, minlength=256)) == 0
    assert otsu_threshold(np.zeros(256, np.int64)) == 0


# Components


@given(mask=masks, diagonal=st.booleans())
@settings(deadline=None)
def test_components_equal_scipy(mask: np.ndarray, diagonal: bool) -> None:
    labels, count = ndimage.label(mask, np.ones((3, 3)) if diagonal else None)
    found = components(mask, diagonal=diagonal)
    y, x = np.nonzero(mask)
    assert len(set(zip(found.at(y, x).tolist(), labels[y, x].tolist(), strict=True))) == count
    assert len(set(found.roots.tolist())) == count


def test_a_long_spiral_is_one_component() -> None:
    mask = np.zeros((201, 201), bool)
    for i in range(0, 100, 2):
        mask[i, i : 201 - i] = mask[200 - i, i : 201 - i] = True
        mask[i : 201 - i, 200 - i] = mask[i + 2 : 201 - i, i] = True
        mask[i + 2, i : i + 2] = True
    assert ndimage.label(mask)[1] == 1
    assert len(set(components(mask, diagonal=False).roots.tolist())) == 1


def test_small_objects_and_holes_by_hand() -> None:
    def picture(*rows: str) -> np.ndarray:
        return np.array([[c == "#" for c in row] for row in rows])

    speckled = picture("#....##", ".#...##", ".......", "#......")  # corners connect
    np.testing.assert_array_equal(drop_small(speckled, 2), picture("#....##", ".#...##", ".......", "......."))
    np.testing.assert_array_equal(drop_small(speckled, 3), picture(".....##", ".....##", ".......", "......."))
    holed = picture("#####.#", "#.#..##", "##.####", "#######")  # corners don't connect holes
    np.testing.assert_array_equal(fill_holes(holed, 2), picture("#####.#", "###..##", "#######", "#######"))
    np.testing.assert_array_equal(fill_holes(holed, 3), picture("#####.#", "#######", "#######", "#######"))


# Outlines


def rasterise(rings: list[np.ndarray], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(len(y), len(x)) bool by the even-odd rule at points y, x; rings of (n, 2) y, x with edges along the axes."""
    inside = np.zeros((len(y), len(x)), bool)
    for ring in rings:
        for (y0, x0), (y1, x1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if x0 == x1:
                inside ^= ((y > min(y0, y1)) & (y < max(y0, y1)))[:, None] & (x > x0)[None, :]
    return inside


@given(mask=masks)
@settings(max_examples=300, deadline=None)
def test_polygons_reproduce_the_mask(mask: np.ndarray) -> None:
    centres = (np.arange(mask.shape[0]) + 0.5, np.arange(mask.shape[1]) + 0.5)
    found = polygons(mask)
    assert len(found) == ndimage.label(mask)[1]
    total = np.zeros(mask.shape, int)
    for outer, *holes in found:
        assert signed_area(outer) > 0
        assert all(signed_area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring), "a ring that meets itself is no valid polygon"
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps != 0).sum(axis=1) == 1).all(), "edges run along pixel edges"
            assert (steps[:, 0].astype(bool) != np.roll(steps[:, 0], 1).astype(bool)).all(), "every corner is a turn"
        total += rasterise([outer, *holes], *centres)
    np.testing.assert_array_equal(total, mask.astype(int))


def test_geojson_covers_the_mask_in_level_0_pixels() -> None:
    rng = np.random.default_rng(3)
    mask = ndimage.zoom(rng.random((6, 7)), 5, order=1) > 0.45
    pixel = (16.004, 16.004)
    tissue = TissueMask(mask, pixel, 0.5, (int(30 * 16.004 - 7), int(35 * 16.004 + 3)), "otsu")
    data = json.loads(tissue_geojson(tissue, polygons(tissue.mask), "f" * 64))
    assert data["type"] == "FeatureCollection"
    assert data["tissue_mm2"] == pytest.approx(tissue.area_mm2, abs=1e-6)
    assert "properties" not in data  # RFC 7946, 7.1
    inside = np.zeros(mask.shape, int)
    for feature in data["features"]:
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        rings = [np.array(ring)[:, ::-1] for ring in feature["geometry"]["coordinates"]]
        assert all((ring[0] == ring[-1]).all() and len(ring) >= 5 for ring in rings)
        inside += rasterise([ring[:-1] for ring in rings], *((np.arange(n) + 0.4) * 16.004 for n in mask.shape))
    np.testing.assert_array_equal(inside, mask.astype(int))
    corners = np.concatenate([np.array(ring) for f in data["features"] for ring in f["geometry"]["coordinates"]])
    assert corners.min() == 0
    assert corners[:, 0].max() <= tissue.l0_shape[1]
    assert corners[:, 1].max() <= tissue.l0_shape[0]


def test_geojson_ids_are_stable_and_offset_moves_nothing_else() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1]], bool)
    tissue = TissueMask(mask, (8.0, 8.0), 0.5, (24, 24))
    outline = polygons(tissue.mask)
    whole, cropped = tissue_geojson(tissue, outline, "a"), tissue_geojson(tissue, outline, "a", Box(-5, 7, 10, 10))
    assert whole == tissue_geojson(tissue, outline, "a")
    first, second = json.loads(whole)["features"], json.loads(cropped)["features"]
    ids = [feature["id"] for feature in first]
    assert len(set(ids)) == 4
    assert ids == [feature["id"] for feature in second]
    assert first[0]["geometry"]["coordinates"] == [[[0, 0], [8, 0], [8, 8], [0, 8], [0, 0]]]
    assert second[0]["geometry"]["coordinates"] == [[[-7, 5], [1, 5], [1, 13], [-7, 13], [-7, 5]]]
    assert not set(ids) & {feature["id"] for feature in json.loads(tissue_geojson(tissue, outline, "b"))["features"]}


def test_geojson_of_no_tissue_is_an_empty_collection() -> None:
    data = json.loads(tissue_geojson(TissueMask(np.zeros((3, 3), bool), (8.0, 8.0), 0.5, (24, 24)), [], "a"))
    assert data["features"] == []
    assert data["tissue_mm2"] == 0


# Pictures


@pytest.mark.parametrize("downsamples", [(1,), (1, 4), (1, 2, 8)])
@pytest.mark.parametrize("max_px", [100, 173, 250])
def test_thumbnail_lies_exactly_on_the_slide(downsamples: tuple[int, ...], max_px: int) -> None:
    height, width = 701, 997
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([y * (250 / height), x * (250 / width), np.full_like(y, 90)], axis=-1).round().astype(np.uint8)
    small = thumbnail(array_slide(pixels, 0.5, downsamples), max_px)
    assert max_px / SMALLER <= max(small.shape) <= max_px
    assert small.dtype == np.uint8
    rows, cols = (
        (np.arange(small.shape[0]) + 0.5) / small.shape[0] * 250,
        (np.arange(small.shape[1]) + 0.5) / small.shape[1] * 250,
    )
    inner = slice(3, -3)  # a filter has less to see at the rim
    np.testing.assert_allclose(small[inner, inner, 0], np.broadcast_to(rows[:, None], small.shape[:2])[inner, inner], atol=1.6)
    np.testing.assert_allclose(small[inner, inner, 1], np.broadcast_to(cols, small.shape[:2])[inner, inner], atol=1.6)


def test_thumbnail_keeps_small_slides_and_thin_ones() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    np.testing.assert_array_equal(thumbnail(slide_of(pixels, 0.5), 400), pixels)
    assert thumbnail(slide_of(np.zeros((3, 5000, 3), np.uint8), 0.5), 100).shape == (1, 100, 3)


def test_thumbnail_reads_bounded_blocks() -> None:
    slide = slide_of(np.broadcast_to(np.uint8(200), (5000, 5000, 3)), 0.5)
    assert (thumbnail(slide, 8) == 200).all()
    assert max(max(box.shape) for _, box in slide._reader.reads) <= BLOCK_PX  # type: ignore[attr-defined]


def test_tissue_png_draws_the_outline_where_the_tissue_ends() -> None:
    slide = slide_of(disc(2048, 600, (1024, 1024)), 0.5)
    tissue = find_tissue(slide)
    data = tissue_png(slide, tissue, polygons(tissue.mask))
    assert data == tissue_png(slide, tissue, polygons(tissue.mask))
    page = np.asarray(Image.open(io.BytesIO(data)))
    assert page.shape[1] == 1024
    drawn = (page == OUTLINE_COLOR).all(axis=-1)
    y, x = np.nonzero(drawn)
    assert len(y) > 300
    away = np.abs(np.hypot(y + 0.5 - 512, x + 0.5 - 512) - 300)
    assert away.max() < 10  # one mask pixel is 8 px here
    assert (page[1024:] < 128).any(), "a caption below"


@pytest.mark.parametrize("shape", [(1, 1), (3, 4000), (4000, 3)])
def test_tissue_png_of_odd_shapes(shape: tuple[int, int]) -> None:
    slide = slide_of(np.full((*shape, 3), PINK, np.uint8), 0.5)
    tissue = find_tissue(slide)
    assert max(Image.open(io.BytesIO(tissue_png(slide, tissue, polygons(tissue.mask)))).size) <= 1024 + 26
