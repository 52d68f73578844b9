"""The engine gives exactly what the model says, however the slide is cut, batched and read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from pathology import open_slide
from pathology.batches import ReadPool, read_chunk, read_tiles, strips, tiles_ahead, windows
from pathology.errors import ModelError, Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.infer import Tile, infer_region
from pathology.job import Job
from pathology.memory import memory_bound
from pathology.model import ModelSpec
from pathology.models.network import TorchNetwork
from pathology.plan import Plan
from pathology.predictor import Predictor, predict_in_order
from pathology.stitch import Blend
from pathology.testing import array_slide, constant, identity, mean_colour
from pathology.work import Work
from tests.slides import corrupt_tile, noise_pixels, smooth_pixels, write_tiff
from tests.whole import heatmap, plan_for

BLENDS = st.sampled_from(["hann", "gaussian", "constant"])
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
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    CHOSEN,
)
def test_however_it_is_cut_and_batched_the_heatmap_is_the_same_to_the_bit(
    shape: tuple[int, int],
    tiles: tuple[int, int],
    blend: Blend,
    mpp: float,
    kind: str,
    batch_size: int,
    block: tuple[int, int],
    chosen: list[bool],
) -> None:
    slide = array_slide(noise_pixels(*shape), downsamples=(1, 2) if min(shape) > 1 else (1,))
    model = (identity if kind == "dense" else mean_colour)(tile_px=tiles[0], mpp=mpp)
    cuts: list[int | tuple[int, int]] = [10**6, block]
    one, many = (plan_for(slide, model.spec, tiles[1], block=b, blend=blend, chosen=chosen) for b in cuts)
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


class Padded(nn.Module):
    """Two 5 x 5 convolutions that pad with zeros: four pixels from a tile's edge its answers depend on the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 5, padding=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("blend", ["hann", "gaussian", "constant"])
@pytest.mark.parametrize("overlap", [8, 16, 32])
def test_with_its_margin_a_network_answers_tiles_as_the_whole_image(tmp_path: Path, blend: Blend, overlap: int) -> None:
    torch.manual_seed(0)
    network, margin, side = Padded().eval(), 4, 48
    pixels = smooth_pixels(230, 310)
    with torch.inference_mode():
        whole = network(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0].numpy()
    differences = {}
    for discarded in (0, margin):
        card = ModelSpec("padded", "0", ("a", "b"), 0.5, side, side, side, scores="value", margin_px=discarded)
        with open_slide(write_tiff(tmp_path / "s.tiff", [pixels])) as slide:
            ours = heatmap(slide, TorchNetwork(card, network), plan_for(slide, card, side - overlap, block=3, blend=blend))
        assert ours.shape == whole.shape
        assert np.isfinite(ours).all()  # at the slide's edge there is nothing but margins
        inner = (slice(None), slice(margin, -margin), slice(margin, -margin))
        differences[discarded] = float(np.abs(ours[inner] - whole[inner]).max())
    assert differences[margin] < 1e-5 < 1e-3 < differences[0]


def test_an_overlap_that_does_not_cover_the_margins_is_refused() -> None:
    card = ModelSpec("padded", "0", ("a",), 0.5, 64, 64, 32, margin_px=3)
    job = Job(slide="s", slide_id="s", root="s", model="m", out="o", overlap=11)
    with pytest.raises(
        UsageError, match=r"padded has margins of 12 px in all, which neighbours must cover; use --overlap 12 or more"
    ):
        job.stride_px(card)
    assert replace(job, overlap=12).stride_px(card) == 52
    with pytest.raises(ModelError, match="margin 16 px leaves nothing of an answer of 32 px"):
        replace(card, margin_px=16)


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
@pytest.mark.fault("F28")
def test_a_score_that_is_no_number_is_refused_with_its_place(value: float) -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[32, 48] = 0
    slide, model = array_slide(pixels), Broken(constant(tile_px=16).spec, value)
    plan = plan_for(slide, model.spec, 16, block=4)
    with pytest.raises(SlideError, match=r"NaN or infinity for the tile in row 2, column 3") as caught:
        heatmap(slide, model, plan)
    assert caught.value.reason is Reason.BAD_SCORES


@settings(max_examples=30)
@given(
    tiles_and_strides(),
    BLENDS,
    st.sampled_from([0.5, 1.0]),
    st.sampled_from(["dense", "classifier"]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 109)), min_size=1, max_size=4),
)
def test_tiles_that_cannot_be_decoded_leave_the_rest_as_if_they_were_not_chosen(
    tiles: tuple[int, int], blend: Blend, mpp: float, kind: str, block: tuple[int, int], damage: list[tuple[int, int]]
) -> None:
    pixels = noise_pixels(100, 110)
    whole, damaged = array_slide(pixels), array_slide(pixels, bad=[(0, Box(y, x, 1, 1)) for y, x in damage])
    model = (identity if kind == "dense" else mean_colour)(tile_px=tiles[0], mpp=mpp)
    plan = plan_for(damaged, model.spec, tiles[1], block=block, blend=blend)
    found: set[Tile] = set()
    scores = heatmap(damaged, model, plan, batch_size=3, bad_tiles=found)
    readable = [t is not None for t in read_tiles(damaged, model.spec, plan.grid, plan.tiles, None)]
    assert found == {(row, col) for (row, col), good in zip(plan.tiles.tolist(), readable, strict=True) if not good}
    assert found
    rest = plan_for(whole, model.spec, tiles[1], block=10**6, blend=blend, chosen=readable)
    assert scores.tobytes() == heatmap(whole, model, rest).tobytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_taken_ahead_keep_their_places_where_some_cannot_be_decoded(threads: int) -> None:
    pixels = noise_pixels(150, 170)
    damaged = array_slide(pixels, bad=[(0, Box(70, 0, 1, 90)), (0, Box(10, 120, 1, 1)), (0, Box(149, 169, 1, 1))])
    model = mean_colour(tile_px=24)
    plan = plan_for(damaged, model.spec, 10, block=(5, 7))
    found: list[set[Tile]] = [set(), set()]
    reference = heatmap(damaged, model, plan, bad_tiles=found[0])
    predictor = Predictor(model, 5)
    try:
        with closing(ReadPool(threads)) as pool:
            again = heatmap(damaged, model, plan, predict=predictor.predict, pool=pool, bad_tiles=found[1])
    finally:
        predictor.close()
    assert again.tobytes() == reference.tobytes()
    assert found[0] == found[1]
    assert np.count_nonzero(np.isnan(reference[0])) == len(found[0]) > 10


def test_a_region_without_a_readable_tile_asks_the_model_nothing() -> None:
    slide = array_slide(noise_pixels(64, 64), bad=[(0, Box(0, 0, 64, 64))])
    model = identity(tile_px=16)
    plan = plan_for(slide, model.spec, 8, block=100)
    found: set[Tile] = set()

    def predict(tiles: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        assert list(tiles) == []
        yield from ()

    assert np.isnan(heatmap(slide, model, plan, predict=predict, bad_tiles=found)).all()
    assert len(found) == len(plan.tiles)


def test_an_unanswered_tile_is_no_hole_in_the_heatmap() -> None:
    slide, model = array_slide(noise_pixels(64, 64)), identity(tile_px=16)

    def forgetful(tiles: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        yield from predict_in_order(model, 4, list(tiles)[:-1])

    with pytest.raises(RuntimeError, match="left 1 tiles unanswered"):
        heatmap(slide, model, plan_for(slide, model.spec, 16, block=100), predict=forgetful)


def test_a_read_that_fails_otherwise_fails_the_region() -> None:
    slide, model = array_slide(noise_pixels(64, 64)), identity(tile_px=16)

    def fail(level: int, box: Box) -> None:
        raise SlideError(Reason.READ_ERROR, "the file is gone")

    slide._reader.read = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(SlideError, match="the file is gone"):
        heatmap(slide, model, plan_for(slide, model.spec, 16, block=100))


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
        read = sum(-(-box.width // 8) for _, box in reads)
        most = max(most, read - taken)
    assert taken == read == len(plan.tiles) == 38 * 38
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
    assert 0 < sum(box.width // 8 for _, box in slide._reader.reads) <= tiles_ahead(8, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("tile_px", "stride", "chosen", "read"),
    [
        (32, 32, [0, 1, 2, 4, 5], [[0, 1, 2], [4, 5]]),  # a gap
        (32, 24, [0, 1, 2, 3, 4], [[0, 1, 2, 3, 4]]),  # overlapping
        (32, 32, [5, 6, 8, 9], [[5], [6], [8, 9]]),  # over the slide's edge; the next row
        (512, 512, [0, 1, 2, 3, 4, 5], [[0, 1, 2, 3, 4], [5]]),  # as many as may be
    ],
)
def test_tiles_that_touch_in_a_row_are_read_as_one(tile_px: int, stride: int, chosen: list[int], read: list[list[int]]) -> None:
    slide = array_slide(np.zeros((600, 3100, 3) if tile_px == 512 else (80, 210, 3), np.uint8))
    model = mean_colour(tile_px=tile_px)
    grid = TileGrid(slide.info.shape, 0.5, 0.5, tile_px, stride)
    tiles = np.stack(np.unravel_index(np.array(chosen), grid.shape), axis=1).astype(np.int32)
    wanted = windows(slide, model.spec, grid, tiles)
    numbers = iter(chosen)
    assert [[next(numbers) for _ in strip] for strip in strips(slide, wanted)] == read


@pytest.mark.parametrize("mpp", [0.5, 1.0, 0.7])  # the tile's own pixels, means of them, resized
@pytest.mark.parametrize("stride", [32, 24])
def test_tiles_read_into_memory_that_is_there_are_the_same(mpp: float, stride: int, tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(300, 300)], mpp=0.5, tile_px=48)
    corrupt_tile(path, 10)
    spec = replace(mean_colour(tile_px=32).spec, mpp=mpp)
    with open_slide(path, reader="direct") as slide:
        grid = TileGrid(slide.info.shape, 0.5, mpp, 32, stride)
        bad = 0
        for row in range(grid.shape[0]):  # over the slide's edges as well
            tiles = np.array([(row, col) for col in range(grid.shape[1])], np.int32)
            room = np.zeros((len(tiles), 32, 32, 3), np.uint8)
            into = list(read_chunk(slide, spec, grid, tiles, room))
            for slot, tile, place in zip(room, into, tiles, strict=True):
                (alone,) = read_chunk(slide, spec, grid, place[None])
                bad += alone is None
                assert (tile is None) == (alone is None)
                assert alone is None or (np.shares_memory(tile, slot) and np.array_equal(slot, alone))
        assert 0 < bad < grid.shape[0] * grid.shape[1] / 4


def test_a_regions_memory_follows_its_width_and_stays_within_the_bound(tmp_path: Path) -> None:
    model = constant(tile_px=256, output_px=256)

    def peak_and_bound(height: int) -> tuple[int, int]:
        slide = array_slide(np.zeros((height, 1500, 3), np.uint8))
        plan = plan_for(slide, model.spec, 128, block=1000)
        work = Work(tmp_path / str(height), {})
        plan = work.begin(plan, overwrite=False)
        (region,) = plan.regions
        tracemalloc.start()
        try:
            read = partial(read_tiles, slide, model.spec, plan.grid, pool=None)
            with closing(infer_region(read, model.spec, plan, region, partial(predict_in_order, model, 2), print)) as rows:
                work.stage(region, rows)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return peak, memory_bound([(plan, model.spec, 2)], readers=1, regions=1)

    (low, low_bound), (high, high_bound) = peak_and_bound(1024), peak_and_bound(4096)
    assert low_bound == high_bound
    ahead = tiles_ahead(256, 1) * 256**2 * 3  # nothing is read ahead without a pool
    assert 0.5 * (low_bound - ahead) < low <= low_bound
    assert high <= high_bound
    assert abs(high - low) < 0.02 * low
