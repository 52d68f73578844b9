"""The engine gives exactly what the model says, however the slide is cut, batched and read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology.batches import ReadPool, read_tiles, tiles_ahead
from pathology.errors import Reason, SlideError
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.plan import Plan
from pathology.predictor import Predictor
from pathology.stitch import Blend
from pathology.testing import array_slide, constant, identity, mean_colour
from tests.slides import noise_pixels
from tests.whole import heatmap, plan_for

BLENDS = st.sampled_from(["hann", "constant"])
SHAPES = st.tuples(st.integers(1, 64), st.integers(1, 64))
CHOSEN = st.lists(st.booleans(), min_size=1, max_size=30)


@st.composite
def tiles_and_strides(draw: st.DrawFn, smallest: int = 12, largest: int = 40) -> tuple[int, int]:
    tile = draw(st.integers(smallest, largest))
    return tile, draw(st.integers(tile // 3, tile))


def predicted(plan: Plan) -> NDArray[np.bool_]:
    """(H, W) bool: heatmap pixels that a chosen tile's answer touches."""
    touched = np.zeros(plan.frame.shape, bool)
    for row, col in plan.tiles.tolist():
        box = Box(row * plan.h_stride, col * plan.h_stride, plan.output_px, plan.output_px)
        touched[box.intersect(Box(0, 0, *plan.frame.shape)).slices()] = True
    return touched


@settings(max_examples=30)
@given(SHAPES, tiles_and_strides(), BLENDS, st.integers(1, 9))
def test_the_identity_model_gives_the_slide_back(
    shape: tuple[int, int], tiles: tuple[int, int], blend: Blend, block: int
) -> None:
    pixels = noise_pixels(*shape)
    slide, model = array_slide(pixels), identity(tile_px=tiles[0])
    whole = heatmap(slide, model, plan_for(slide, model.spec, tiles[1], block=block, blend=blend))
    assert np.array_equal(whole, pixels.transpose(2, 0, 1).astype(np.float32))


@settings(max_examples=30)
@given(SHAPES, tiles_and_strides(), BLENDS, st.integers(1, 9), st.floats(-1e6, 1e6, width=32), CHOSEN)
def test_constant_in_constant_out_and_nan_only_where_nothing_was_predicted(
    shape: tuple[int, int], tiles: tuple[int, int], blend: Blend, block: int, value: float, chosen: list[bool]
) -> None:
    slide, model = array_slide(np.zeros((*shape, 3), np.uint8)), constant(tile_px=tiles[0], output_px=tiles[0], value=value)
    plan = plan_for(slide, model.spec, tiles[1], block=block, blend=blend, chosen=chosen)
    (whole,) = heatmap(slide, model, plan)
    touched = predicted(plan)
    assert (whole[touched] == np.float32(value)).all()
    assert np.isnan(whole[~touched]).all()


@settings(max_examples=30)
@given(
    SHAPES,
    tiles_and_strides(),
    BLENDS,
    st.sampled_from([0.35, 0.499, 0.5, 0.65, 1.0, 1.185]),
    st.sampled_from(["dense", "classifier"]),
    st.integers(2, 12),
    st.integers(1, 9),
    CHOSEN,
)
def test_however_it_is_cut_and_batched_the_heatmap_is_the_same_to_the_bit(
    shape: tuple[int, int],
    tiles: tuple[int, int],
    blend: Blend,
    mpp: float,
    kind: str,
    block: int,
    batch_size: int,
    chosen: list[bool],
) -> None:
    slide = array_slide(noise_pixels(*shape), downsamples=(1, 2) if min(shape) > 1 else (1,))
    model = (identity if kind == "dense" else mean_colour)(tile_px=tiles[0], mpp=mpp)
    one, many = (plan_for(slide, model.spec, tiles[1], block=b, blend=blend, chosen=chosen) for b in (10**6, block))
    assert len(one.regions) <= 1
    reference = heatmap(slide, model, one, batch_size=1)
    assert heatmap(slide, model, many, batch_size).tobytes() == reference.tobytes()
    assert np.array_equal(np.isfinite(reference), np.broadcast_to(predicted(one), reference.shape))


@pytest.mark.parametrize("make", [mean_colour, identity])
def test_predictor_and_reading_threads_change_no_bit(make: Callable[..., mean_colour]) -> None:  # type: ignore[valid-type]
    slide = array_slide(noise_pixels(150, 170), downsamples=(1, 2))
    model = make(tile_px=24, mpp=0.65)
    plan = plan_for(slide, model.spec, 10, block=3)
    reference = heatmap(slide, model, plan)
    predictor = Predictor(model, 5)
    try:
        with closing(ReadPool(3)) as pool:
            assert heatmap(slide, model, plan, predict=predictor.predict, pool=pool).tobytes() == reference.tobytes()
    finally:
        predictor.close()


def test_a_classifiers_pixel_is_its_tiles_answer() -> None:
    pixels = noise_pixels(70, 101)
    slide, model = array_slide(pixels), mean_colour(tile_px=32)
    whole = heatmap(slide, model, plan_for(slide, model.spec, 12, block=2))
    white = np.full((200, 200, 3), 255, np.uint8)
    white[:70, :101] = pixels
    assert whole.shape == (3, 5, 7)
    for row, col in np.ndindex(5, 7):
        tile = white[row * 12 : row * 12 + 32, col * 12 : col * 12 + 32]
        assert np.array_equal(whole[:, row, col], tile.mean(axis=(0, 1), dtype=np.float64).astype(np.float32))


def test_a_classifier_is_a_dense_model_of_one_pixel() -> None:
    slide = array_slide(noise_pixels(96, 128), downsamples=(1, 2))
    small, dense = identity(tile_px=32, mpp=1.0, output_px=1), mean_colour(tile_px=32, mpp=1.0)
    heatmaps = [heatmap(slide, model, plan_for(slide, model.spec, 8, block=2)) for model in (small, dense)]
    assert heatmaps[0].tobytes() == heatmaps[1].tobytes()


def test_dense_answers_smaller_than_the_tile() -> None:
    pixels = noise_pixels(64, 96)
    slide, model = array_slide(pixels), identity(tile_px=32, output_px=8)
    whole = heatmap(slide, model, plan_for(slide, model.spec, 16, block=1))
    means = pixels.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3), dtype=np.float64).transpose(2, 0, 1).astype(np.float32)
    assert np.array_equal(whole, means)


@dataclass(frozen=True)
class Broken:
    """Answers `value` for tiles whose first pixel is black."""

    spec: ModelSpec
    value: float

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = np.ones((len(tiles), 1, 1, 1), np.float32)
        scores[(tiles[:, 0, 0] == 0).all(axis=1)] = self.value
        return scores


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_with_its_place(value: float) -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[32, 48] = 0
    slide, model = array_slide(pixels), Broken(constant(tile_px=16).spec, value)
    plan = plan_for(slide, model.spec, 16, block=4)
    with pytest.raises(SlideError, match=r"NaN or infinity at heatmap pixel \(2, 3\)") as caught:
        heatmap(slide, model, plan)
    assert caught.value.reason is Reason.BAD_SCORES


class AtOnce(Executor):
    """Runs what is submitted there and then."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[object] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def at_once(threads: int) -> ReadPool:
    pool = ReadPool(threads)
    pool.close()
    pool.decode = pool.fetch = AtOnce()  # type: ignore[assignment]
    return pool


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_are_read_a_bounded_number_ahead(threads: int) -> None:
    slide, model = array_slide(noise_pixels(300, 300)), mean_colour(tile_px=8)
    reads = slide._reader.reads  # type: ignore[attr-defined]
    plan = plan_for(slide, model.spec, 8, block=100)
    tiles = read_tiles(slide, model.spec, plan.grid, plan.tiles, at_once(threads))
    assert not reads
    most = 0
    for taken, _ in enumerate(tiles, 1):
        most = max(most, len(reads) - taken)
    assert taken == len(reads) == len(plan.tiles) == 38 * 38
    assert 16 * threads <= most < tiles_ahead(8, threads)


def test_without_a_pool_nothing_is_read_ahead() -> None:
    slide, model = array_slide(noise_pixels(90, 90)), mean_colour(tile_px=8)
    plan = plan_for(slide, model.spec, 8, block=100)
    for taken, _ in enumerate(read_tiles(slide, model.spec, plan.grid, plan.tiles, None), 1):
        assert len(slide._reader.reads) == taken  # type: ignore[attr-defined]


def test_a_region_that_is_dropped_reads_no_further() -> None:
    slide, model = array_slide(noise_pixels(300, 300)), mean_colour(tile_px=8)
    plan = plan_for(slide, model.spec, 8, block=100)
    tiles = read_tiles(slide, model.spec, plan.grid, plan.tiles, at_once(1))
    next(tiles)
    tiles.close()  # type: ignore[attr-defined]
    assert len(slide._reader.reads) <= tiles_ahead(8, 1)  # type: ignore[attr-defined]
