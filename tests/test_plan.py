"""Regions cut the heatmap without gap or overlap, and a plan survives the way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathology.errors import UsageError
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.plan import CANVAS_BYTES, CLASSIFIER_BLOCK, Plan, canvas_bytes, canvas_pixel_bytes, cut, make_plan, memory_bound
from pathology.testing import constant, identity
from pathology.tissue import TissueMask
from tests.whole import all_tiles


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    output = draw(st.sampled_from([1, 1, 4, 8]))
    step = draw(st.integers(1, 4))  # level-0 px per output px
    tile = output * step if output > 1 else draw(st.integers(1, 40))
    stride = draw(st.integers(1, output)) * step if output > 1 else draw(st.integers(1, tile))
    mpp = draw(st.sampled_from([0.5, 0.5, 1.0, 1.3]))
    extents = [(tile + stride * draw(st.integers(0, 8)) - draw(st.integers(0, stride - 1))) * mpp / 0.5 for _ in "yx"]
    grid = TileGrid((max(1, int(extents[0])), max(1, int(extents[1]))), 0.5, mpp, tile, stride)
    tiles = all_tiles(grid)
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    chosen = np.random.default_rng(draw(st.integers(0, 9))).random(len(tiles)) < share
    tiles = tiles[chosen]
    coverage = np.linspace(0.1, 1, len(tiles), dtype=np.float32)
    blend = draw(st.sampled_from(["hann", "constant"]))
    return cut(grid, output, blend, draw(st.integers(1, 20)), tiles, coverage, draw(st.floats(0, 1e3)))


def answer(plan: Plan, tile: np.ndarray) -> Box:
    """Where a tile's answer lies in the heatmap, cut to it."""
    corner = tile.astype(int) * plan.h_stride
    return Box(int(corner[0]), int(corner[1]), plan.output_px, plan.output_px).intersect(Box(0, 0, *plan.frame.shape))


@given(plans())
def test_regions_hold_every_pixel_that_bears_a_tile_exactly_once(plan: Plan) -> None:
    regions, answers = np.zeros(plan.frame.shape, int), np.zeros(plan.frame.shape, bool)
    for region in plan.regions:
        assert region.box.intersect(Box(0, 0, *plan.frame.shape)) == region.box
        regions[region.box.slices()] += 1
    for tile in plan.tiles:
        answers[answer(plan, tile).slices()] = True
    assert regions.max(initial=0) <= 1
    assert (regions[answers] == 1).all()


@given(plans())
def test_a_region_lists_exactly_the_tiles_that_touch_it(plan: Plan) -> None:
    for place, region in enumerate(plan.regions):
        assert region.index == place
        expected = [t.tolist() for t in plan.tiles if not answer(plan, t).intersect(region.box).empty]
        assert region.tiles.tolist() == expected
        assert expected, "a region without a tile is no work"


@given(plans())
def test_regions_lie_on_multiples_of_the_block(plan: Plan) -> None:
    side = plan.block * plan.h_stride
    corners = [(region.box.y, region.box.x) for region in plan.regions]
    assert all(y % side == 0 and x % side == 0 for y, x in corners)
    assert corners == sorted(corners)


@given(plans())
def test_plan_to_json_and_back_is_the_same_plan(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    for name in ("grid", "frame", "output_px", "blend", "block", "tissue_mm2"):
        assert getattr(again, name) == getattr(plan, name)
    for name in ("tiles", "coverage"):
        assert getattr(again, name).dtype == getattr(plan, name).dtype
        assert np.array_equal(getattr(again, name), getattr(plan, name))
    assert [(r.index, r.box, r.tiles.tolist()) for r in again.regions] == [
        (r.index, r.box, r.tiles.tolist()) for r in plan.regions
    ]


def test_a_plan_of_another_schema_is_refused() -> None:
    grid = TileGrid((64, 64), 0.5, 0.5, 32, 32)
    text = cut(grid, 1, "hann", 4, all_tiles(grid), np.ones(4, np.float32), 0.0).to_json()
    with pytest.raises(UsageError, match="plan has schema 2, this version reads 1"):
        Plan.from_json(json.dumps({**json.loads(text), "schema": 2}))


def test_tiles_are_chosen_by_tissue() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[2:, 2:] = True
    tissue = TissueMask(mask, (16.0, 16.0), 0.5, (64, 64))
    grid, spec = TileGrid((64, 64), 0.5, 0.5, 32, 32), constant(tile_px=32).spec

    def chosen(min_tissue: float) -> list[list[int]]:
        return make_plan(grid, spec, tissue, min_tissue=min_tissue).tiles.tolist()

    assert chosen(0.0) == [[0, 0], [1, 1]]  # a tile without any tissue is never inferred
    assert chosen(0.25) == [[0, 0], [1, 1]]
    assert chosen(0.26) == [[1, 1]]
    plan = make_plan(grid, spec, tissue, min_tissue=0.0)
    assert plan.coverage.tolist() == [0.25, 1.0]
    assert plan.tissue_mm2 == pytest.approx(5 * (16 * 0.5) ** 2 / 1e6)


def test_no_tissue_is_a_plan_without_regions() -> None:
    tissue = TissueMask(np.zeros((4, 4), bool), (16.0, 16.0), 0.5, (64, 64))
    plan = make_plan(TileGrid((64, 64), 0.5, 0.5, 32, 32), constant(tile_px=32).spec, tissue, min_tissue=0.1)
    assert (plan.regions, plan.forward_passes, plan.recompute_share) == ((), 0, 0.0)
    assert memory_bound(plan, constant(tile_px=32).spec, batch_size=1, readers=1) > 0


@pytest.mark.parametrize("min_tissue", [-0.1, 1.1, float("nan")])
def test_an_impossible_share_of_tissue_is_refused(min_tissue: float) -> None:
    tissue = TissueMask(np.ones((4, 4), bool), (16.0, 16.0), 0.5, (64, 64))
    with pytest.raises(UsageError, match=r"outside 0\.\.1"):
        make_plan(TileGrid((64, 64), 0.5, 0.5, 32, 32), constant(tile_px=32).spec, tissue, min_tissue=min_tissue)


def test_a_region_of_no_strides_is_refused() -> None:
    tissue = TissueMask(np.ones((4, 4), bool), (16.0, 16.0), 0.5, (64, 64))
    with pytest.raises(UsageError, match="region of 0 strides"):
        make_plan(TileGrid((64, 64), 0.5, 0.5, 32, 32), constant(tile_px=32).spec, tissue, min_tissue=0.1, block=0)


def test_tiles_on_a_border_count_once_for_each_side() -> None:
    # One row of four tiles of 8 px every 4 px; regions of two strides. Tiles 1 and 3 straddle the ends of regions.
    grid = TileGrid((8, 20), 0.5, 0.5, 8, 4)
    plan = cut(grid, 8, "hann", 2, all_tiles(grid), np.ones(4, np.float32), 0.0)
    assert [(r.box, r.tiles[:, 1].tolist()) for r in plan.regions] == [
        (Box(0, 0, 8, 8), [0, 1]),
        (Box(0, 8, 8, 8), [1, 2, 3]),
        (Box(0, 16, 8, 4), [3]),
    ]
    assert plan.forward_passes == 6
    assert plan.recompute_share == 0.5


def test_default_regions_fit_the_canvas() -> None:
    tissue = TissueMask(np.ones((10, 10), bool), (10_000.0, 10_000.0), 0.5, (100_000, 100_000))
    grid = TileGrid((100_000, 100_000), 0.5, 0.5, 1000, 500)
    dense = identity(tile_px=1000).spec
    plan = make_plan(grid, dense, tissue, min_tissue=0.1)
    assert CANVAS_BYTES / 2 < canvas_bytes(plan, 3) <= CANVAS_BYTES
    many = replace(dense, classes=tuple("abcdefghijkl"), threshold=(), colors=())
    assert canvas_bytes(make_plan(grid, many, tissue, min_tissue=0.1), 12) <= CANVAS_BYTES
    assert make_plan(grid, constant(tile_px=1000).spec, tissue, min_tissue=0.1).block == CLASSIFIER_BLOCK
    assert canvas_pixel_bytes(3) == 3 * 12 + 9
