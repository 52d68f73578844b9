"""Windows and canvases by hand, and constant in, constant out to the bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathology.errors import UsageError
from pathology.geometry import Box
from pathology.plan import canvas_pixel_bytes
from pathology.stitch import Blend, Canvas, blend_window

NAN = np.nan
BLENDS = st.sampled_from(["hann", "constant"])


def test_hann_window_by_hand() -> None:
    a, b = (2 - np.sqrt(2)) / 4, (2 + np.sqrt(2)) / 4  # sin^2 of pi/8 and 3 pi/8; a x b = 1/8
    expected = [
        [a * a, 0.125, 0.125, a * a],
        [0.125, b * b, b * b, 0.125],
        [0.125, b * b, b * b, 0.125],
        [a * a, 0.125, 0.125, a * a],
    ]
    np.testing.assert_allclose(blend_window(4, "hann"), expected, rtol=1e-6)


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
    with pytest.raises(UsageError, match="blend 'cosine' is unknown; use hann or constant"):
        blend_window(4, "cosine")  # type: ignore[arg-type]


def test_canvas_of_plain_means_by_hand() -> None:
    canvas = Canvas(Box(10, 20, 4, 4), 1, blend_window(2, "constant"))
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
    np.testing.assert_array_equal(canvas.mean(), np.array([expected], np.float32))


def test_canvas_weighs_by_the_window() -> None:
    canvas = Canvas(Box(0, 0, 1, 6), 2, blend_window(4, "hann"))
    canvas.add(np.stack([np.zeros((4, 4)), np.full((4, 4), 2)]).astype(np.float32), -1, 0)
    canvas.add(np.stack([np.ones((4, 4)), np.full((4, 4), 2)]).astype(np.float32), -1, 2)
    a, b = (2 - np.sqrt(2)) / 4, (2 + np.sqrt(2)) / 4
    np.testing.assert_allclose(canvas.mean()[0, 0], [0, 0, a / (a + b), b / (a + b), 1, 1], rtol=1e-6)
    assert canvas.mean()[1].tolist() == [[2.0] * 6]


def test_a_tile_larger_than_the_box_gives_its_middle() -> None:
    canvas = Canvas(Box(1, 2, 2, 1), 1, blend_window(4, "hann"))
    canvas.add(np.arange(16, dtype=np.float32).reshape(1, 4, 4), 0, 0)
    assert canvas.mean().tolist() == [[[6.0], [10.0]]]


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(1, 40),
    BLENDS,
    st.lists(st.tuples(st.integers(-40, 60), st.integers(-40, 60)), max_size=20),
)
def test_constant_in_constant_out_to_the_bit(value: float, side: int, blend: Blend, places: list[tuple[int, int]]) -> None:
    box = Box(0, 0, 50, 40)
    canvas, touched = Canvas(box, 1, blend_window(side, blend)), np.zeros(box.shape, bool)
    for y, x in places:
        canvas.add(np.full((1, side, side), value, np.float32), y, x)
        touched[Box(y, x, side, side).intersect(box).slices()] = True
    mean = canvas.mean()[0]
    assert (mean[touched] == np.float32(value)).all()
    assert np.isnan(mean[~touched]).all()


def test_zero_is_a_score() -> None:
    canvas = Canvas(Box(0, 0, 1, 2), 1, blend_window(1, "constant"))
    canvas.add(np.zeros((1, 1, 1), np.float32), 0, 0)
    np.testing.assert_array_equal(canvas.mean(), [[[0.0, NAN]]])


def test_nan_is_one_pattern_of_bits() -> None:
    # 0/0 is NaN with another sign; stores filled with both would differ by how they were cut.
    assert (
        Canvas(Box(0, 0, 3, 5), 2, blend_window(1, "hann")).mean().tobytes() == np.full((2, 3, 5), np.nan, np.float32).tobytes()
    )


def test_a_canvas_takes_the_memory_that_plans_count_with() -> None:
    side, classes = 512, 3
    tracemalloc.start()
    try:
        canvas = Canvas(Box(0, 0, side, side), classes, blend_window(8, "hann"))
        canvas.mean()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= side * side * canvas_pixel_bytes(classes) + 2**19
