"""The predictor of many regions equals the sequential loop, with full batches, bounded memory, and errors kept apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from pathology.model import ModelSpec
from pathology.predictor import Predictor, predict_in_order
from pathology.testing import mean_colour

SIDE, BATCH = 8, 4
JOIN_S = 30  # only a test that hangs waits for it

Tile = NDArray[np.uint8]


class Watched:
    """Mean colours; keeps the batches it saw, refuses tiles of 13, and waits for `gate` before it answers."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.inner = mean_colour(tile_px=SIDE)
        self.batches: list[tuple[int, ...]] = []
        self.gate = gate
        self.at_once = threading.Lock()

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: Tile) -> NDArray[np.float32]:
        assert self.at_once.acquire(blocking=False), "called from two threads at once"
        try:
            if self.gate is not None:
                assert self.gate.wait(JOIN_S)
            self.batches.append(tiles.shape)
            if (tiles == 13).all(axis=(1, 2, 3)).any():
                raise ValueError("a tile of 13")
            return self.inner(tiles)
        finally:
            self.at_once.release()


def noise(count: int, seed: int) -> list[Tile]:
    return list(np.random.default_rng(seed).integers(20, 256, (count, SIDE, SIDE, 3), np.uint8))


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def predictor(watched: Watched) -> Iterator[Predictor]:
    made = Predictor(watched, BATCH)
    yield made
    made.close()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 17])
def test_in_order_calls_the_model_with_whole_batches_only(watched: Watched, count: int) -> None:
    tiles = noise(count, 1)
    answers = list(predict_in_order(watched, BATCH, tiles))
    assert watched.batches == [(BATCH, SIDE, SIDE, 3)] * -(-count // BATCH)
    expected = [tile.reshape(-1, 3).mean(axis=0, dtype=np.float64).astype(np.float32) for tile in tiles]
    assert len(answers) == count
    assert all(np.array_equal(a[:, 0, 0], e) for a, e in zip(answers, expected, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_answers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    tiles = noise(20, 2)
    reference = [a.tobytes() for a in predict_in_order(mean_colour(SIDE), 1, tiles)]
    assert [a.tobytes() for a in predict_in_order(mean_colour(SIDE), batch_size, tiles)] == reference


def test_in_order_pulls_no_more_than_a_batch_ahead(watched: Watched) -> None:
    pulled = []

    def tiles() -> Iterator[Tile]:
        for number, tile in enumerate(noise(40, 3)):
            pulled.append(number)
            yield tile

    for taken, _ in enumerate(predict_in_order(watched, BATCH, tiles()), 1):
        assert len(pulled) < taken + BATCH


@pytest.mark.parametrize("count", [0, 1, 4, 5, 17])
def test_one_region_alone(watched: Watched, predictor: Predictor, count: int) -> None:
    tiles = noise(count, 4)
    reference = [a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, tiles)]
    assert [a.tobytes() for a in predictor.predict(tiles)] == reference
    assert watched.batches == [(BATCH, SIDE, SIDE, 3)] * -(-count // BATCH)
    assert predictor.calls == -(-count // BATCH)


def test_many_regions_at_once_equal_the_sequential_loop(predictor: Predictor) -> None:
    lanes = [noise(count, seed) for seed, count in enumerate([0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 7, 7])]
    reference = [[a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, tiles)] for tiles in lanes]
    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(lambda tiles: [a.tobytes() for a in predictor.predict(tiles)], tiles) for tiles in lanes]
        assert [future.result(JOIN_S) for future in futures] == reference


def test_regions_share_batches_so_that_only_the_last_is_padded(watched: Watched, predictor: Predictor) -> None:
    # Every region has begun before any has ended, so no batch but the last can be partial.
    lanes = [noise(count, seed) for seed, count in enumerate([1, 2, 3, 5, 7, 9])]
    all_begun = threading.Barrier(len(lanes))

    def tiles(own: list[Tile]) -> Iterator[Tile]:
        all_begun.wait(JOIN_S)
        yield from own

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(lambda own: len(list(predictor.predict(tiles(own)))), own) for own in lanes]
        assert [future.result(JOIN_S) for future in futures] == [len(own) for own in lanes]
    assert len(watched.batches) == -(-27 // BATCH)


def test_a_region_hands_in_at_most_two_batches_ahead() -> None:
    gate = threading.Event()
    predictor = Predictor(Watched(gate), BATCH)
    try:
        pulled, full = [], threading.Event()

        def tiles() -> Iterator[Tile]:
            for number, tile in enumerate(noise(50, 5)):
                pulled.append(number)
                if len(pulled) == 2 * BATCH:
                    full.set()
                yield tile

        answers: list[int] = []
        lane = predictor.predict(tiles())

        def first() -> None:
            next(lane)
            answers.append(len(pulled))

        thread = threading.Thread(target=first)
        thread.start()
        assert full.wait(JOIN_S)
        gate.set()
        thread.join(JOIN_S)
        assert answers == [2 * BATCH]
        for taken, _ in enumerate(lane, 2):
            assert len(pulled) <= taken + 2 * BATCH
        assert len(pulled) == 50
    finally:
        predictor.close()


def collect(predict: Callable[[], list[bytes]]) -> list[bytes] | Exception:
    try:
        return predict()
    except Exception as error:
        return error


def test_an_error_fails_only_the_region_whose_tiles_raise_it(predictor: Predictor) -> None:
    lanes = [noise(9, seed) for seed in range(5)]
    lanes[2][4] = np.full((SIDE, SIDE, 3), 13, np.uint8)
    reference = [[a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, tiles)] for tiles in lanes]
    begun = threading.Barrier(len(lanes))

    def answers(own: list[Tile]) -> list[bytes]:
        def tiles() -> Iterator[Tile]:
            begun.wait(JOIN_S)
            yield from own

        return [a.tobytes() for a in predictor.predict(tiles())]

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(collect, lambda own=own: answers(own)) for own in lanes]
        results = [future.result(JOIN_S) for future in futures]
    for place, result in enumerate(results):
        if place == 2:
            assert isinstance(result, ValueError)
            assert str(result) == "a tile of 13"
        else:
            assert result == reference[place]


def test_a_reader_that_fails_ends_its_own_region_only(predictor: Predictor) -> None:
    def broken() -> Iterator[Tile]:
        yield from noise(6, 6)
        raise OSError("cannot be decoded")

    with pytest.raises(OSError, match="cannot be decoded"):
        list(predictor.predict(broken()))
    assert len(list(predictor.predict(noise(5, 7)))) == 5


def test_an_abandoned_region_holds_up_nobody(predictor: Predictor) -> None:
    abandoned = predictor.predict(noise(30, 8))
    next(abandoned)
    abandoned.close()
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(len(list(predictor.predict(noise(5, 9))))), daemon=True)
    thread.start()
    thread.join(JOIN_S)
    assert done == [5]


def test_close_ends_a_region_that_waits() -> None:
    gate = threading.Event()
    predictor = Predictor(Watched(gate), BATCH)
    waiting = threading.Event()

    def tiles() -> Iterator[Tile]:
        yield from noise(2, 10)
        waiting.set()

    with ThreadPoolExecutor(2) as pool:
        region = pool.submit(lambda: list(predictor.predict(tiles())))
        assert waiting.wait(JOIN_S)
        closing = pool.submit(predictor.close)
        gate.set()
        closing.result(JOIN_S)
        # The batch may have gone out before the close; if not, the region is told.
        error = region.exception(JOIN_S)
        assert error is None or "the predictor was closed" in str(error)
    with pytest.raises(RuntimeError, match="the predictor was closed"):
        list(predictor.predict(noise(1, 11)))


def test_a_model_that_breaks_its_card_is_named() -> None:
    class Wrong(Watched):
        def __call__(self, tiles: Tile) -> NDArray[np.float32]:
            return super().__call__(tiles)[:, :2]

    with pytest.raises(ValueError, match=r"mean-colour answered float32 \(4, 2, 1, 1\), its card says float32 \(4, 3, 1, 1\)"):
        list(predict_in_order(Wrong(), BATCH, noise(1, 12)))


def test_a_partial_batch_waits_for_a_region_that_still_feeds(watched: Watched, predictor: Predictor) -> None:
    more, handed_in = threading.Event(), threading.Event()

    def slow() -> Iterator[Tile]:
        first, second = noise(2, 13)
        yield first
        handed_in.set()
        assert more.wait(JOIN_S)
        yield second

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lambda: len(list(predictor.predict(slow()))))
        assert handed_in.wait(JOIN_S)
        other = pool.submit(lambda: len(list(predictor.predict(noise(2, 14)))))
        with predictor._changed:  # until the other has handed in all it has
            assert predictor._changed.wait_for(lambda: len(predictor._pending) == 3 and predictor._feeding == 1, JOIN_S)
        more.set()
        assert (one.result(JOIN_S), other.result(JOIN_S)) == (2, 2)
    assert len(watched.batches) == 1
