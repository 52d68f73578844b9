"""When memory runs out the batch is halved, the run goes on, and the record says so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from pathology import Box, Job
from pathology.errors import EnvironmentFault, ModelError, UsageError
from pathology.finish import read_record
from pathology.models.halving import halving, ran_out
from pathology.predictor import Predictor, predict_in_order
from pathology.result import open_heatmap
from pathology.runner import run
from pathology.store import STORE_NAME
from pathology.testing import marks, mean_colour
from pipelines.batch import exit_code
from pipelines.cli import main
from tests.starving import Done, Starving, starving

SIDE = 8
JOIN_S = 30

KINDS = ["", "early", "late"]


def noise(count: int, seed: int = 1) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8))


def expected(tiles: list[NDArray[np.uint8]], batch: int) -> list[bytes]:
    """The answers of calls with `batch` tiles from the start."""
    model = starving(most=batch, tile_px=SIDE)
    assert isinstance(model, Starving)
    return [a.tobytes() for a in predict_in_order(model, batch, tiles)]


def sizes(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


@contextmanager
def predictor(model: object, batch: int) -> Iterator[Predictor]:
    made = Predictor(model, batch)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("error", ["cuda", "cpu", "numpy"])
@pytest.mark.parametrize(
    ("batch", "most", "ends"), [(8, 8, 8), (8, 7, 4), (8, 4, 4), (8, 1, 1), (12, 4, 3), (7, 6, 3), (10, 2, 2), (1, 1, 1)]
)
def test_a_batch_is_halved_until_there_is_memory_for_it(tmp_path: Path, batch: int, most: int, ends: int, error: str) -> None:
    tiles = noise(2 * batch + 1)
    model = halving(starving(most, log=str(tmp_path / "log"), error=error, tile_px=SIDE))
    assert [a.tobytes() for a in predict_in_order(model, batch, tiles)] == expected(tiles, ends)
    tried = []
    while batch >> len(tried) > ends:
        tried.append(batch >> len(tried))
    # Each size that is too large is tried once; then whole batches in calls of one size.
    assert sizes(tmp_path / "log") == tried + [ends] * (3 * -(-batch // ends))
    assert model.sizes.answered() == Counter({ends: 3})


@pytest.mark.parametrize("queued", KINDS)
def test_many_regions_at_once_equal_smaller_batches_from_the_start(tmp_path: Path, queued: str) -> None:
    lanes = [noise(count, seed) for seed, count in enumerate([0, 1, 2, 3, 5, 8, 13, 21, 34, 7])]
    model = halving(starving(3, log=str(tmp_path / "log"), queued=queued, tile_px=SIDE))
    with predictor(model, 8) as made, ThreadPoolExecutor(len(lanes)) as pool:
        futures = [pool.submit(lambda tiles: [a.tobytes() for a in made.predict(tiles)], tiles) for tiles in lanes]
        assert [future.result(JOIN_S) for future in futures] == [expected(tiles, 2) for tiles in lanes]
        batches = made.calls
    counted = Counter(sizes(tmp_path / "log"))
    # Of batches that wait for their answers some may have been begun with the size before.
    assert 1 <= counted[8] <= 3
    assert counted[4] <= 3
    assert counted[2] == 4 * batches


@pytest.mark.parametrize("queued", KINDS)
def test_other_errors_halve_nothing(queued: str) -> None:
    model = halving(starving(3, error="none", queued=queued, tile_px=SIDE))
    with predictor(model, 8) as made, pytest.raises(ModelError, match="raised KeyError: 'none'"):
        list(made.predict(noise(5)))
    assert model.sizes.now(8) == 8


@pytest.mark.parametrize("queued", KINDS)
def test_no_memory_for_a_single_tile_is_the_machines_fault(tmp_path: Path, queued: str) -> None:
    model = halving(starving(0, log=str(tmp_path / "log"), queued=queued, tile_px=SIDE))
    message = r"mean-colour: no memory is left for even one tile \(CUDA out of memory.*\); end what else runs there, or use"
    with predictor(model, 8) as made, pytest.raises(EnvironmentFault, match=message):
        list(made.predict(noise(5)))
    assert sizes(tmp_path / "log") == [8, 4, 2, 1]


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_what_torch_numpy_and_python_say_is_understood(allocate: Callable[[int], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        allocate(2**52)
    assert ran_out(error.value)
    assert ran_out(RuntimeError("could not create a primitive"))
    assert not ran_out(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(ModelError("model x is out of memory of its past"))


@pytest.mark.parametrize("queued", [False, True])
def test_what_travels_beside_tiles_is_cut_with_them(queued: bool) -> None:
    class Beside:
        """Answers a tile's mean colour plus the sum of what is given beside it; has memory for two tiles."""

        spec = mean_colour(tile_px=SIDE).spec

        def __call__(self, tiles: NDArray[np.uint8], beside: NDArray[np.float32]) -> NDArray[np.float32]:
            if len(tiles) > 2:
                raise MemoryError
            assert beside.shape == (len(tiles), 3)
            return mean_colour(tile_px=SIDE)(tiles) + beside.sum(axis=1)[:, None, None, None]

    class QueuedBeside(Beside):
        def staging(self, batch_size: int) -> NDArray[np.uint8]:
            return np.zeros((batch_size, SIDE, SIDE, 3), np.uint8)

        def submit(self, tiles: NDArray[np.uint8], beside: NDArray[np.float32]) -> Done:
            return Done(self(tiles, beside))

    tiles = np.stack(noise(7))
    beside = np.random.default_rng(2).random((7, 3), np.float32)
    expected = mean_colour(tile_px=SIDE)(tiles) + beside.sum(axis=1)[:, None, None, None]
    np.testing.assert_array_equal(halving((QueuedBeside if queued else Beside)())(tiles, beside), expected)  # type: ignore[arg-type]  # it takes more


def test_a_detectors_calls_may_find_different_numbers_of_objects() -> None:
    class Detector:
        """Answers a tile with as many objects as its first value; of more than two tiles it finds no memory."""

        spec = marks(tile_px=SIDE).spec

        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            if len(tiles) > 2:
                raise MemoryError
            counts = tiles[:, 0, 0, 0].astype(int)
            answer = np.full((len(tiles), counts.max(), 4), np.nan, np.float32)
            for number, count in enumerate(counts):
                answer[number, :count] = 1
            return answer

    tiles = np.zeros((5, SIDE, SIDE, 3), np.uint8)
    tiles[:, 0, 0, 0] = found = [1, 0, 5, 3, 2]
    answer = halving(Detector())(tiles)
    assert answer.shape == (5, 5, 4)
    assert (answer == 1).all(axis=2).sum(axis=1).tolist() == found
    assert np.isnan(answer).all(axis=2).sum() == 25 - sum(found)


# Whole runs


@pytest.fixture
def job(reference_job: Job, tmp_path: Path) -> Job:
    return replace(reference_job, out=str(tmp_path / "out"), overlap=0.0, batch_size=8)


def named(**arguments: object) -> str:
    return "tests.starving:starving?" + "&".join(f"{key}={value}" for key, value in arguments.items())


def finished(job: Job, scheduler: str = "sync") -> tuple[NDArray[np.float32], dict[str, object]]:
    (outcome,) = run([job], scheduler)
    assert outcome.status == "ok", outcome.message
    heatmap = open_heatmap(job.result_folder("mean-colour") / STORE_NAME)
    scores = heatmap.read(0, Box(0, 0, *heatmap.level_shape(0)))
    record = read_record(job.result_folder("mean-colour"))
    assert record is not None
    assert record == outcome.record
    return scores, record


@pytest.mark.parametrize("queued", KINDS)
@pytest.mark.parametrize("scheduler", ["sync", "threads", pytest.param("processes", marks=pytest.mark.slow)])
@pytest.mark.fault("F22")
def test_a_run_goes_on_with_smaller_batches(tmp_path: Path, job: Job, scheduler: str, queued: str) -> None:
    small, record = finished(replace(job, model=named(most=2), out=str(tmp_path / "small"), batch_size=2))
    assert (record["batch_size"], record["halved_to"]) == (2, None)
    log = tmp_path / "log"
    # The first call is the warm-up's.
    halved, record = finished(replace(job, model=named(most=3, calls=1, log=log, queued=queued), strict=True), scheduler)
    assert halved.tobytes() == small.tobytes()
    assert (record["batch_size"], record["halved_to"]) == (8, 2)
    assert [e["batch"] for e in record["environments"]] == [2]  # type: ignore[attr-defined]
    counted = Counter(sizes(log))
    assert set(counted) == {8, 4, 2}
    assert counted[2] % 4 == 0
    assert {e["halved_to"] for e in events(job) if e["event"] == "region-done"} == {2}


def test_results_of_several_sizes_are_told_and_strict_refuses_them(tmp_path: Path, job: Job) -> None:
    # One batch a region, in order: the warm-up and two regions find memory.
    model = named(most=4, calls=3, log=tmp_path / "log")
    _, record = finished(replace(job, model=model, batch_size=16))
    assert sizes(tmp_path / "log")[:4] == [16, 16, 16, 16]
    assert record["halved_to"] == 4
    assert sorted(e["batch"] for e in record["environments"]) == [4, 16]  # type: ignore[attr-defined]
    strict = replace(job, model=named(most=4, calls=3), batch_size=16, strict=True, out=str(tmp_path / "strict"))
    with pytest.raises(UsageError, match="regions from 2 different environments"):
        list(run([strict], "sync"))


def test_a_region_halved_on_the_way_tells_both_sizes(job: Job) -> None:
    # A region of 16 tiles in two batches of 8, of which the first finds memory.
    _, record = finished(replace(job, model=named(most=4, calls=2), block=100))
    assert sorted(e["batch"] for e in record["environments"]) == [4, 8]  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.fault("F22")
def test_a_run_without_any_memory_ends_and_loses_nothing(tmp_path: Path, job: Job, scheduler: str) -> None:
    left = tmp_path / "left"
    left.write_text("9")  # the warm-up, and some of 12 regions
    job = replace(job, model=f"tests.starving:hungry?left={left}", batch_size=4, block=2)
    with pytest.raises(EnvironmentFault, match=r"no memory is left for even one tile \(MemoryError\)") as fault:
        list(run([job], scheduler))
    assert exit_code(fault.value) == 3
    done = {path.name for path in Path(job.out, ".work").rglob("regions/*.json")}
    assert done
    left.write_text("1000")
    _, record = finished(job, scheduler)
    assert record["regions"] == sum(e["event"] == "region-done" for e in events(job))  # none was computed twice


def events(job: Job) -> list[dict[str, object]]:
    return [json.loads(line) for file in Path(job.out, "events").iterdir() for line in file.read_text().splitlines()]


def test_the_command_says_it(tmp_path: Path, job: Job) -> None:
    def command(out: str, model: str, *options: str) -> Result:
        common = ["--scheduler", "sync", "--threads", "1", "--num-workers", "1", "--batch-size", "8", "--tissue", "none"]
        return CliRunner().invoke(main, ["run", job.slide, "--model", model, "--out", str(tmp_path / out), *common, *options])

    done = command("text", named(most=3, name="a"))
    assert done.exit_code == 0, done.output
    assert "memory ran out: batches of 2 tiles" in done.output
    done = command("json", named(most=3, name="b"), "--log-format", "json")
    assert [json.loads(line).get("halved_to") for line in done.stdout.splitlines()] == [2, None]
    (tmp_path / "left").write_text("3")
    done = command("none", f"tests.starving:hungry?left={tmp_path / 'left'}")
    assert done.exit_code == 3
    assert done.output.splitlines()[-1].endswith("end what else runs there, or use another --device")
