"""The grid covers every slide, lists tiles exactly, and its frames convert back and forth."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pathology.errors import UsageError
from pathology.geometry import Box, HeatmapFrame, mpp_ratio
from pathology.grid import EDGE_SLACK_PX, TileGrid

MPPS = st.sampled_from([0.1, 0.2527, 0.25, 0.3, 0.5, 0.499, 1.0, 1.3, 8.0])


@st.composite
def grids(draw: st.DrawFn, side: int = 600) -> TileGrid:
    tile = draw(st.integers(1, 90))
    shape = (draw(st.integers(1, side)), draw(st.integers(1, side)))
    return TileGrid(shape, draw(MPPS), draw(MPPS), tile, draw(st.integers(1, tile)))


def boxes(side: int = 300) -> st.SearchStrategy[Box]:
    return st.builds(Box, st.integers(-50, side), st.integers(-50, side), st.integers(0, 120), st.integers(0, 120))


@given(grids())
def test_every_pixel_of_any_slide_lies_in_a_tile(grid: TileGrid) -> None:
    slack = EDGE_SLACK_PX * grid.ratio * 2
    for axis, extent in enumerate(grid.l0_shape):
        index = np.zeros((grid.shape[axis], 2), np.int32)
        index[:, axis] = np.arange(grid.shape[axis])
        starts = grid.l0_origins(index)[:, axis]
        assert starts[0] == 0
        assert (np.diff(starts) <= grid.l0_tile * (1 + 1e-12)).all(), "a gap between tiles"
        assert starts[-1] + grid.l0_tile >= extent - slack, "the end of the slide lies in no tile"


@given(grids())
def test_no_more_tiles_than_it_takes(grid: TileGrid) -> None:
    for count, extent in zip(grid.shape, grid.g_extent, strict=True):
        assert count == 1 or (count - 2) * grid.stride_px + grid.tile_px < extent


@given(grids(), boxes())
def test_tiles_within_equals_a_scan_of_all_tiles(grid: TileGrid, within: Box) -> None:
    assume(grid.shape[0] * grid.shape[1] < 3000)
    expected = [
        (row, col)
        for row in range(grid.shape[0])
        for col in range(grid.shape[1])
        if not within.intersect(Box(row * grid.stride_px, col * grid.stride_px, grid.tile_px, grid.tile_px)).empty
    ]
    found = grid.tiles(within)
    assert found.dtype == np.int32
    assert found.shape == (len(expected), 2)
    assert [tuple(tile) for tile in found.tolist()] == expected


@given(grids(side=100_000), st.integers(0, 10_000), st.integers(0, 10_000))
def test_origins_are_multiplied_and_rounded_once(grid: TileGrid, row: int, col: int) -> None:
    (origin,) = grid.l0_origins(np.array([[row, col]], np.int32))
    assert origin.tolist() == [float(Fraction(i * grid.stride_px) * Fraction(grid.ratio)) for i in (row, col)]


@pytest.mark.parametrize(("mpp", "slide_mpp", "ratio"), [(0.3, 0.1, 3.0), (0.5, 0.25, 2.0), (0.1, 0.3, 0.1 / 0.3)])
def test_a_whole_ratio_is_whole(mpp: float, slide_mpp: float, ratio: float) -> None:
    assert mpp_ratio(mpp, slide_mpp) == ratio


def test_float_noise_adds_no_row_of_tiles() -> None:
    # 3 x 64 px at a third of the resolution: 192 * 0.1 / 0.3 is a hair off 64.
    assert TileGrid((192, 64 * 7), 0.1, 0.7, 64, 64).shape == (1, 1)
    assert TileGrid((192, 193), 0.1, 0.3, 64, 64).shape == (1, 2)


@given(
    st.builds(
        HeatmapFrame,
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.floats(0, 1e4),
        st.floats(0.01, 1e4),
        st.floats(0.05, 10),
    ),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
)
def test_frame_conversions_are_inverse(frame: HeatmapFrame, y: float, x: float) -> None:
    assert frame.level0_to_heatmap(*frame.heatmap_to_level0(y, x)) == pytest.approx((y, x), rel=1e-9, abs=1e-6)
    assert frame.heatmap_to_level0(*frame.level0_to_heatmap(y, x)) == pytest.approx((y, x), rel=1e-9, abs=1e-6)


@given(st.integers(1, 600), MPPS, MPPS)
def test_ngff_translation_of_a_tile_heatmap(tile_px: int, mpp: float, slide_mpp: float) -> None:
    frame = TileGrid((5000, 5000), slide_mpp, mpp, tile_px, tile_px).heatmap_frame(1)
    assert frame.translation_um == pytest.approx((tile_px * mpp - slide_mpp) / 2, rel=1e-9, abs=1e-9)
    assert frame.mpp == pytest.approx(tile_px * mpp)


def test_a_classifiers_pixel_lies_around_its_tiles_centre() -> None:
    grid = TileGrid((1000, 1000), 0.25, 0.5, 64, 16)
    frame = grid.heatmap_frame(1)
    assert frame.shape == grid.shape == (29, 29)
    centre = grid.l0_origins(np.array([[3, 5]]))[0] + grid.l0_tile / 2
    assert frame.heatmap_to_level0(3.5, 5.5) == tuple(centre)


def test_a_dense_heatmap_ends_with_the_slide() -> None:
    frame = TileGrid((101, 203), 0.5, 0.5, 64, 32).heatmap_frame(16)
    assert frame == HeatmapFrame((26, 51), 0.0, 4.0, 0.5)


@pytest.mark.parametrize(
    ("shape", "tile", "stride", "message"),
    [
        ((0, 10), 8, 8, "slide of 0 x 10 px has no pixels"),
        ((10, 10), 0, 1, "tile 0 px is smaller than one pixel"),
        ((10, 10), 8, 9, "stride 9 px does not fit tile 8 px"),
        ((10, 10), 8, 0, "stride 0 px does not fit tile 8 px"),
    ],
)
def test_impossible_grids_are_refused(shape: tuple[int, int], tile: int, stride: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TileGrid(shape, 0.5, 0.5, tile, stride)


def test_a_stride_off_the_output_raster_is_refused_with_the_remedy() -> None:
    grid = TileGrid((100, 100), 0.5, 0.5, 64, 30)
    with pytest.raises(UsageError, match="use a stride that is a multiple of 4"):
        grid.heatmap_frame(16)
    assert TileGrid((100, 100), 0.5, 0.5, 64, 28).heatmap_pixels_per_stride(16) == 7
