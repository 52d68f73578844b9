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
from pathology.memory import memory_bound
from pathology.plan import BLOCK, CANVAS_SHARE, MEMORY_BYTES, Plan, choose_block, cut, make_plan
from pathology.stitch import canvas_bytes
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
    blend = draw(st.sampled_from(["hann", "gaussian", "constant"]))
    block = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return cut(grid, output, blend, block, tiles, coverage, draw(st.floats(0, 1e3)))


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
    height, width = (strides * plan.h_stride for strides in plan.block)
    corners = [(region.box.y, region.box.x) for region in plan.regions]
    assert all(y % height == 0 and x % width == 0 for y, x in corners)
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
    text = cut(grid, 1, "hann", (4, 4), all_tiles(grid), np.ones(4, np.float32), 0.0).to_json()
    with pytest.raises(UsageError, match="plan has schema 1, this version reads 2"):
        Plan.from_json(json.dumps({**json.loads(text), "schema": 1}))


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
    assert memory_bound([(plan, constant(tile_px=32).spec, 1)], readers=1) > 0


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
    plan = cut(grid, 8, "hann", (2, 2), all_tiles(grid), np.ones(4, np.float32), 0.0)
    assert [(r.box, r.tiles[:, 1].tolist()) for r in plan.regions] == [
        (Box(0, 0, 8, 8), [0, 1]),
        (Box(0, 8, 8, 8), [1, 2, 3]),
        (Box(0, 16, 8, 4), [3]),
    ]
    assert plan.forward_passes == 6
    assert plan.recompute_share == 0.5


@pytest.mark.parametrize("tile_px", [512, 1024])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_at_half_overlap_few_tiles_are_computed_twice(tile_px: int, classes: int) -> None:
    """Forward passes of default plans, on a slide full of tissue and on a ragged piece of it."""
    rng = np.random.default_rng(classes)
    side_px = 120 * tile_px
    coarse = rng.random((30, 30)) < 0.5
    spec = replace(identity(tile_px=tile_px).spec, classes=tuple("abcd"[:classes]), threshold=(), colors=())
    grid = TileGrid((side_px, side_px), 0.5, 0.5, tile_px, tile_px // 2)
    for mask in (np.ones((1, 1), bool), coarse):
        tissue = TissueMask(mask, (side_px / len(mask),) * 2, 0.5, (side_px, side_px))
        plan = make_plan(grid, spec, tissue, min_tissue=0.1)
        assert len(plan.tiles) > 20_000
        assert plan.forward_passes <= 1.1 * len(plan.tiles)
        assert (1 + 1 / plan.block[0]) * (1 + 1 / plan.block[1]) <= 1.1, "wherever the slide's edges lie"
        assert max(len(region.tiles) for region in plan.regions) <= 1200, "too much hangs on one retry"
        assert memory_bound([(plan, spec, 1)], readers=1) <= MEMORY_BYTES


@pytest.mark.parametrize("classes", [1, 4, 40])
@pytest.mark.parametrize("stride_px", [64, 128, 256, 512])
def test_a_regions_canvas_takes_its_share_of_memory_and_no_more(classes: int, stride_px: int) -> None:
    spec = replace(
        constant(tile_px=512, output_px=512).spec, classes=tuple(str(c) for c in range(classes)), threshold=(), colors=()
    )
    grid = TileGrid((200_000, 200_000), 0.5, 0.5, 512, stride_px)
    before = 0
    for memory in (2**28, 2**30, 2**34):
        rows, cols = choose_block(grid, (spec,), memory)
        assert cols == 1 or canvas_bytes(classes, 512, stride_px, cols * stride_px) <= memory * CANVAS_SHARE
        assert before <= cols <= rows
        before = cols
    assert (rows, cols) == {64: (64, 64), 128: (64, 64), 256: (32, 32), 512: (64, 16)}[stride_px]


def test_a_narrow_slide_has_tall_regions() -> None:
    spec = constant(tile_px=64, output_px=64).spec
    assert choose_block(TileGrid((100_000, 200), 0.5, 0.5, 64, 32), (spec,), MEMORY_BYTES) == (146, 7)


def test_a_classifiers_regions_are_square_whatever_the_memory() -> None:
    assert choose_block(TileGrid((100_000, 200), 0.5, 0.5, 64, 8), (constant(tile_px=64).spec,), 1) == (BLOCK, BLOCK)
