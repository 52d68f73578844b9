"""The predictor of many regions equals the sequential loop, with full batches, bounded memory, and errors kept apart."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathology.errors import EnvironmentFault, ModelError
from pathology.model import ModelSpec, QueuedModel
from pathology.predictor import IN_FLIGHT, Predictor, closed_at_end, predict_in_order
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


def until(true: Callable[[], bool]) -> None:
    """Wait for what another thread is about to bring about."""
    end = time.monotonic() + JOIN_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


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
            assert isinstance(result, ModelError)
            assert str(result) == "model mean-colour raised ValueError: a tile of 13"
        else:
            assert result == reference[place]


class BrokenOnce(Watched):
    """Its device fails at the first call; at others it answers, as a device that failed may, whatever that is worth."""

    def __call__(self, tiles: Tile) -> NDArray[np.float32]:
        answers = super().__call__(tiles)
        if len(self.batches) == 1:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return answers


def test_a_device_that_failed_is_asked_nothing_more_for_the_regions_of_that_batch() -> None:
    model, begun = BrokenOnce(), threading.Barrier(2)

    def tiles(seed: int) -> Iterator[Tile]:
        begun.wait(JOIN_S)
        yield from noise(BATCH // 2, seed)

    with closing(Predictor(model, BATCH)) as predictor, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(collect, lambda seed=seed: list(predictor.predict(tiles(seed)))) for seed in range(2)]
        assert [type(future.result(JOIN_S)) for future in futures] == [torch.AcceleratorError] * 2
    assert len(model.batches) == 1


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

    message = r"mean-colour answered shape \(4, 2, 1, 1\), its card says \(4, 3, 1, 1\)"
    with pytest.raises(ModelError, match=message):
        list(predict_in_order(Wrong(), BATCH, noise(1, 12)))
    predictor = Predictor(Wrong(), BATCH)
    with pytest.raises(ModelError, match=message):
        list(predictor.predict(noise(1, 12)))
    predictor.close()


class Raising(Watched):
    """Raises `error` at every call."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def __call__(self, tiles: Tile) -> NDArray[np.float32]:
        raise self.error


class QueuedRaising(Raising):
    """Raises `error` when its answer is asked for."""

    def staging(self, batch_size: int) -> Tile:
        return np.zeros((batch_size, SIDE, SIDE, 3), np.uint8)

    def submit(self, tiles: Tile) -> QueuedRaising:
        return self

    def result(self) -> NDArray[np.float32]:
        raise self.error


class Panic(BaseException):
    """As native extensions raise one that is no Exception."""


@pytest.mark.parametrize("kind", [Raising, QueuedRaising])
@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), Panic("panicked"), RuntimeError("so"), KeyError("a")])
def test_whatever_a_model_raises_is_told_to_its_region_as_the_models_error(kind: type[Raising], error: BaseException) -> None:
    predictor = Predictor(kind(error), BATCH)
    with ThreadPoolExecutor(1) as pool:  # else a model that ends the predictor's thread would hang the test
        try:
            found = pool.submit(lambda: list(predictor.predict(noise(1, 12)))).exception(JOIN_S)
        finally:
            predictor.close()
    assert isinstance(found, ModelError)
    assert str(found).startswith(f"model mean-colour raised {type(error).__name__}: ")
    assert found.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        OSError(errno.ENOSPC, "No space left on device"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        EnvironmentFault("no memory is left for even one tile"),
    ],
)
def test_what_is_no_fault_of_a_model_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as found:
        list(predict_in_order(Raising(error), BATCH, noise(1, 12)))
    assert found.value is error
    predictor = Predictor(Raising(error), BATCH)
    with pytest.raises(type(error)):
        list(predictor.predict(noise(1, 12)))
    predictor.close()


def test_who_interrupts_the_caller_means_the_caller() -> None:
    with pytest.raises(KeyboardInterrupt):
        list(predict_in_order(Raising(KeyboardInterrupt()), BATCH, noise(1, 12)))
    with pytest.raises(ModelError, match="raised Panic: panicked"):
        list(predict_in_order(Raising(Panic("panicked")), BATCH, noise(1, 12)))


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
        batch = predictor._filling
        assert batch is not None
        until(lambda: len(batch.lanes) == 3 and predictor._feeding == 1)  # the other has handed in all it has
        assert watched.batches == []
        more.set()
        assert (one.result(JOIN_S), other.result(JOIN_S)) == (2, 2)
    assert len(watched.batches) == 1


@pytest.mark.parametrize("wrong", [np.zeros((SIDE - 1, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE, 3), np.float32), np.uint8(7)])
def test_a_tile_that_does_not_fit_is_never_stretched(predictor: Predictor, watched: Watched, wrong: Tile) -> None:
    for predict in (predictor.predict, lambda tiles: predict_in_order(watched, BATCH, tiles)):
        with pytest.raises(ModelError, match=r"mean-colour takes uint8 tiles of 8 x 8 x 3, not"):
            list(predict([wrong]))
    assert len(list(predictor.predict(noise(5, 1)))) == 5


class Hoarding(Watched):
    """Keeps copies of the batches it is given, and where they lay."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tile] = []
        self.places: set[int] = set()

    def __call__(self, tiles: Tile) -> NDArray[np.float32]:
        self.seen.append(tiles.copy())
        self.places.add(tiles.ctypes.data)
        return super().__call__(tiles)


def test_batches_are_used_again_and_what_they_held_before_is_gone() -> None:
    model = Hoarding()
    predictor = Predictor(model, BATCH)
    for seed in range(5):
        tiles = noise(2 * BATCH + 1, seed)
        list(predictor.predict(tiles))
        np.testing.assert_array_equal(np.concatenate(model.seen[-3:])[: len(tiles)], tiles)
        assert (model.seen[-1][1:] == 0).all()
    assert len(model.places) <= 2
    predictor.close()


def test_what_was_spent_is_counted(watched: Watched, predictor: Predictor) -> None:
    assert predictor.spent() == type(predictor.spent())()
    list(predictor.predict(noise(9, 1)))
    spent = predictor.spent()
    assert (spent.calls, spent.padded) == (3, 3)
    assert min(spent.copy_s, spent.model_s, spent.waiting_s) > 0
    time.sleep(0.05)  # nobody waits when there is no region
    list(predictor.predict(noise(4, 1)))
    again = predictor.spent()
    assert again.calls == 4
    assert again.waiting_s - spent.waiting_s < 0.05


def test_a_region_whose_error_is_kept_holds_up_nobody(predictor: Predictor) -> None:
    """An error's traceback keeps the frame that was going through the answers, and with it the generator."""

    def region() -> None:
        with closed_at_end(predictor.predict) as predict:
            for _ in predict(noise(30, 8)):
                raise ValueError("not a number")

    with pytest.raises(ValueError, match="not a number") as kept:
        region()
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(len(list(predictor.predict(noise(5, 9))))), daemon=True)
    thread.start()
    thread.join(JOIN_S)
    assert done == [5]
    assert kept.traceback


def test_answers_keep_their_order_when_slots_are_filled_out_of_order(predictor: Predictor) -> None:
    """A batch that is full but for one slow copy goes out before the next, though that is full as well."""

    gate, begun = threading.Event(), threading.Event()
    first, second = noise(1, 20), noise(2 * BATCH - 1, 21)
    copying = predictor._filling
    assert copying is not None
    inner = copying.array

    class Gated:
        """The array of a batch, whose first slot takes its time."""

        def __setitem__(self, at: int | slice, value: object) -> None:
            if at == 0:
                begun.set()
                assert gate.wait(JOIN_S)
            inner[at] = value

    copying.array = Gated()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lambda: [a.tobytes() for a in predictor.predict(first)])
        assert begun.wait(JOIN_S)
        other = pool.submit(lambda: [a.tobytes() for a in predictor.predict(second)])
        until(lambda: len(predictor._full) == 2)
        assert predictor.calls == 0
        copying.array = inner
        gate.set()
        for tiles, found in ((first, one), (second, other)):
            assert found.result(JOIN_S) == [a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, tiles)]


class Flying(Watched):
    """A model that works by itself: answers come when `land` is called, or at once where `itself` is set."""

    def __init__(self, itself: bool = True) -> None:
        super().__init__()
        self.itself = itself
        self.flying: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self.in_flight = self.most = 0
        self.staged: list[Tile] = []

    def staging(self, batch_size: int) -> Tile:
        self.staged.append(np.zeros((batch_size, SIDE, SIDE, 3), np.uint8))
        return self.staged[-1]

    def __call__(self, tiles: Tile) -> NDArray[np.float32]:
        if (tiles == 14).all(axis=(1, 2, 3)).any():
            raise ValueError("a tile of 14")
        return super().__call__(tiles)

    def submit(self, tiles: Tile) -> Flight:
        assert any(tiles is staged for staged in self.staged)
        if (tiles == 14).all(axis=(1, 2, 3)).any():
            raise ValueError("a tile of 14")
        flight = Flight(self, tiles)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        if self.itself:
            flight.landed.set()
        self.flying.put(flight)
        return flight


class Flight:
    def __init__(self, model: Flying, tiles: Tile) -> None:
        self.model, self.tiles, self.landed, self.before = model, tiles, threading.Event(), tiles.tobytes()

    def result(self) -> NDArray[np.float32]:
        assert self.landed.wait(JOIN_S)
        assert self.tiles.tobytes() == self.before, "written over while it was on its way"
        self.model.in_flight -= 1
        return Watched.__call__(self.model, self.tiles)


def test_a_model_that_works_by_itself_is_given_two_batches_and_a_third_fills_meanwhile() -> None:
    model = Flying(itself=False)
    assert isinstance(model, QueuedModel)
    predictor = Predictor(model, BATCH)
    lanes = [noise(3 * BATCH, seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(lambda own: [a.tobytes() for a in predictor.predict(own)], own) for own in lanes]
        first, second = model.flying.get(timeout=JOIN_S), model.flying.get(timeout=JOIN_S)
        until(lambda: predictor._filling is None)  # the third is full
        assert (model.in_flight, model.flying.empty()) == (IN_FLIGHT, True)
        for flight in (first, second):
            flight.landed.set()
        for _ in range(4):
            model.flying.get(timeout=JOIN_S).landed.set()
        for own, future in zip(lanes, futures, strict=True):
            assert future.result(JOIN_S) == [a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, own)]
    assert len(model.staged) == 3
    predictor.close()


@pytest.mark.parametrize("value", [13, 14], ids=["at the answer", "at the start"])
def test_many_regions_through_a_model_that_works_by_itself(value: int) -> None:
    model = Flying()
    predictor = Predictor(model, BATCH)
    lanes = [noise(count, seed) for seed, count in enumerate([0, 1, 5, 8, 21, 34, 7, 9])]
    lanes[3][4] = np.full((SIDE, SIDE, 3), value, np.uint8)

    def answers(own: list[Tile]) -> list[bytes]:
        return [a.tobytes() for a in predictor.predict(own)]

    with ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(collect, lambda own=own: answers(own)) for own in lanes]
        results = [future.result(JOIN_S) for future in futures]
    for place, (own, result) in enumerate(zip(lanes, results, strict=True)):
        if place == 3:
            assert isinstance(result, ModelError)
            assert str(result) == f"model mean-colour raised ValueError: a tile of {value}"
        else:
            assert result == [a.tobytes() for a in predict_in_order(mean_colour(SIDE), BATCH, own)]
    assert model.most <= IN_FLIGHT
    predictor.close()
