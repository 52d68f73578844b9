"""Windows and canvases by hand, and constant in, constant out to the bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathology.errors import UsageError
from pathology.geometry import Box
from pathology.stitch import Blend, Canvas, bands, blend_window, canvas_bytes

NAN = np.nan
BLENDS = st.sampled_from(["hann", "gaussian", "constant"])


def test_hann_window_by_hand() -> None:
    a, b = (2 - np.sqrt(2)) / 4, (2 + np.sqrt(2)) / 4  # sin^2 of pi/8 and 3 pi/8; a x b = 1/8
    expected = [
        [a * a, 0.125, 0.125, a * a],
        [0.125, b * b, b * b, 0.125],
        [0.125, b * b, b * b, 0.125],
        [a * a, 0.125, 0.125, a * a],
    ]
    np.testing.assert_allclose(blend_window(4, "hann"), expected, rtol=1e-6)


def test_gaussian_window_by_hand() -> None:
    far, near = np.exp(-(1.5**2) / (2 * 0.5**2)), np.exp(-(0.5**2) / (2 * 0.5**2))
    least = 1e-3  # far * far is below it
    expected = [
        [least, far * near, far * near, least],
        [far * near, near * near, near * near, far * near],
        [far * near, near * near, near * near, far * near],
        [least, far * near, far * near, least],
    ]
    np.testing.assert_allclose(blend_window(4, "gaussian"), expected, rtol=1e-6)


def test_constant_window_by_hand() -> None:
    window = blend_window(4, "constant")
    assert window.dtype == np.float32
    assert window.tolist() == [[1.0] * 4] * 4


@given(st.integers(1, 700), BLENDS)
def test_weights_are_above_zero_everywhere(side: int, blend: Blend) -> None:
    window = blend_window(side, blend)
    assert window.shape == (side, side)
    assert window.min() > 0


def test_an_unknown_blend_is_refused() -> None:
    with pytest.raises(UsageError, match="blend 'cosine' is unknown; use hann, gaussian or constant"):
        blend_window(4, "cosine")  # type: ignore[arg-type]


def rolled(canvas: Canvas, box: Box) -> np.ndarray:
    """(C, H, W) of all bands that are left."""
    return np.concatenate(list(canvas.final(box.y1)), axis=1)


def test_canvas_of_plain_means_by_hand() -> None:
    box = Box(10, 20, 4, 4)
    canvas = Canvas(box, 1, blend_window(2, "constant"))
    canvas.add(np.full((1, 2, 2), 1, np.float32), 10, 20)
    canvas.add(np.full((1, 2, 2), 4, np.float32), 11, 21)
    canvas.add(np.full((1, 2, 2), 7, np.float32), 11, 21)
    canvas.add(np.full((1, 2, 2), 9, np.float32), 13, 23)  # all but its corner lies outside
    canvas.add(np.full((1, 2, 2), 99, np.float32), 14, 20)  # beside the box
    expected = [
        [1, 1, NAN, NAN],
        [1, 4, 5.5, NAN],
        [NAN, 5.5, 5.5, NAN],
        [NAN, NAN, NAN, 9],
    ]
    np.testing.assert_array_equal(rolled(canvas, box), np.array([expected], np.float32))


def test_canvas_weighs_by_the_window() -> None:
    box = Box(0, 0, 1, 6)
    canvas = Canvas(box, 2, blend_window(4, "hann"))
    canvas.add(np.stack([np.zeros((4, 4)), np.full((4, 4), 2)]).astype(np.float32), -1, 0)
    canvas.add(np.stack([np.ones((4, 4)), np.full((4, 4), 2)]).astype(np.float32), -1, 2)
    a, b = (2 - np.sqrt(2)) / 4, (2 + np.sqrt(2)) / 4
    mean = rolled(canvas, box)
    np.testing.assert_allclose(mean[0, 0], [0, 0, a / (a + b), b / (a + b), 1, 1], rtol=1e-6)
    assert mean[1].tolist() == [[2.0] * 6]


def test_a_tile_above_the_one_before_it_is_refused_whose_weights_would_be_missed() -> None:
    canvas, tile = Canvas(Box(0, 0, 100, 10), 1, blend_window(8, "hann")), np.ones((1, 8, 8), np.float32)
    canvas.add(tile, 20, 0)
    canvas.add(tile, 20, 4)
    with pytest.raises(ValueError, match=r"tile at heatmap row 19 .* row-major order"):
        canvas.add(tile, 19, 0)


def test_a_tile_larger_than_the_box_gives_its_middle() -> None:
    box = Box(1, 2, 2, 1)
    canvas = Canvas(box, 1, blend_window(4, "hann"))
    canvas.add(np.arange(16, dtype=np.float32).reshape(1, 4, 4), 0, 0)
    assert rolled(canvas, box).tolist() == [[[6.0], [10.0]]]


def test_bands_end_at_multiples_of_their_height() -> None:
    assert list(bands(Box(60, 7, 200, 5))) == [
        Box(60, 7, 4, 5),
        Box(64, 7, 64, 5),
        Box(128, 7, 64, 5),
        Box(192, 7, 64, 5),
        Box(256, 7, 4, 5),
    ]
    assert list(bands(Box(64, 0, 64, 3))) == [Box(64, 0, 64, 3)]
    assert list(bands(Box(65, 0, 2, 3))) == [Box(65, 0, 2, 3)]


PLACES = st.lists(st.tuples(st.integers(-40, 230), st.integers(-40, 60)), max_size=20).map(sorted)


@given(st.integers(1, 90), BLENDS, PLACES, st.integers(0, 200))
def test_a_canvas_that_rolls_is_one_that_does_not(side: int, blend: Blend, places: list[tuple[int, int]], top: int) -> None:
    box = Box(top, 0, 200, 40)
    rng = np.random.default_rng(side)
    canvas, still = Canvas(box, 2, blend_window(side, blend)), Canvas(box, 2, blend_window(side, blend))
    rows: list[np.ndarray] = []
    for y, x in places:
        scores = rng.random((2, side, side), np.float32)
        rows += canvas.final(y)
        assert sum(band.shape[1] for band in rows) <= max(0, y - top), "a row was handed out before it was final"
        canvas.add(scores, y, x)
        still.add(scores, y, x)
    rows += canvas.final(box.y1)
    assert np.concatenate(rows, axis=1).tobytes() == rolled(still, box).tobytes()
    assert [len(band[0]) for band in rows] == [band.height for band in bands(box)]


def test_a_tile_above_final_rows_is_refused() -> None:
    canvas = Canvas(Box(0, 0, 100, 10), 1, blend_window(8, "hann"))
    canvas.add(np.ones((1, 8, 8), np.float32), -7, 0)
    list(canvas.final(20))
    canvas.add(np.ones((1, 8, 8), np.float32), 20, 5)
    with pytest.raises(ValueError, match=r"tile at heatmap row 19 .* row-major order"):
        canvas.add(np.ones((1, 8, 8), np.float32), 19, 0)


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(1, 40),
    BLENDS,
    PLACES,
)
def test_constant_in_constant_out_to_the_bit(value: float, side: int, blend: Blend, places: list[tuple[int, int]]) -> None:
    box = Box(0, 0, 150, 40)
    canvas, touched = Canvas(box, 1, blend_window(side, blend)), np.zeros(box.shape, bool)
    rows: list[np.ndarray] = []
    for y, x in places:
        rows += canvas.final(min(y, box.y1))
        canvas.add(np.full((1, side, side), value, np.float32), y, x)
        touched[Box(y, x, side, side).intersect(box).slices()] = True
    mean = np.concatenate([*rows, *canvas.final(box.y1)], axis=1)[0]
    assert (mean[touched] == np.float32(value)).all()
    assert np.isnan(mean[~touched]).all()


def test_zero_is_a_score() -> None:
    canvas = Canvas(Box(0, 0, 1, 2), 1, blend_window(1, "constant"))
    canvas.add(np.zeros((1, 1, 1), np.float32), 0, 0)
    np.testing.assert_array_equal(next(canvas.final(1)), [[[0.0, NAN]]])


@pytest.mark.parametrize("touched", [False, True])
def test_nan_is_one_pattern_of_bits(touched: bool) -> None:
    # 0/0 is NaN with another sign; stores filled with both would differ by how they were cut.
    canvas = Canvas(Box(0, 0, 3, 5), 2, blend_window(1, "hann"))
    if touched:
        canvas.add(np.ones((2, 1, 1), np.float32), 0, 0)
    (mean,) = canvas.final(3)
    nan = np.full((2, 3, 5), np.nan, np.float32)
    assert mean[:, 1:].tobytes() == nan[:, 1:].tobytes()
    assert mean.tobytes() == nan.tobytes() or touched


@pytest.mark.parametrize(("side", "stride", "classes"), [(512, 256, 1), (512, 256, 4), (200, 50, 2), (200, 33, 2)])
def test_a_canvas_takes_the_memory_that_plans_count_with(side: int, stride: int, classes: int) -> None:
    width = 4 * side
    box = Box(0, 0, max(5 * side, 2400), width)
    window, scores = blend_window(side, "hann"), np.ones((classes, side, side), np.float32)
    tracemalloc.start()
    try:
        canvas = Canvas(box, classes, window)
        for y in range(0, box.height, stride):
            sum(1 for _ in canvas.final(y))
            for x in range(0, width, stride):
                canvas.add(scores, y, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = canvas_bytes(classes, side, stride, width)
    assert 0.85 * bound <= peak <= bound + 2**16
