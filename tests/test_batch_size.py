"""The batch size that a run finds: large enough to be quick, with memory to spare, and the same when it is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology import Job, worker
from pathology.batch_size import MOST, choose_batch, cpu_batch, find_batch, most_tiles
from pathology.errors import ModelError
from pathology.memory import slot_bytes
from pathology.models.pieces import piece_tiles
from pathology.runner import run
from pathology.testing import constant, identity
from pipelines.cli import main
from pipelines.config import Settings, cards, make_jobs
from pipelines.slides import SlideEntry


class Device:
    """A model on a made-up device: a call takes `fixed_s` and `a_tile_s` a tile, and there is room for `room` tiles."""

    def __init__(self, fixed_s: float, a_tile_s: float, room: int = 10**9) -> None:
        self.inner = constant(tile_px=4)
        self.spec = self.inner.spec
        self.fixed_s, self.a_tile_s, self.room = fixed_s, a_tile_s, room
        self.now = 0.0
        self.calls: list[int] = []

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.calls.append(len(tiles))
        if len(tiles) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.now += self.fixed_s + self.a_tile_s * len(tiles)
        return self.inner(tiles)

    def find(self, most: int = MOST) -> int:
        return find_batch(self, most, lambda: self.now)


@pytest.mark.parametrize(
    ("fixed_s", "a_tile_s", "size"),
    [
        (0.0, 0.001, 1),  # no larger batch is any quicker
        (0.001, 0.001, 16),  # of 32 tiles each takes 1.03 ms, of 16 1.06
        (0.001, 1e-9, MOST),  # each doubling doubles the speed
    ],
)
def test_the_smallest_of_the_quick_ones(fixed_s: float, a_tile_s: float, size: int) -> None:
    assert Device(fixed_s, a_tile_s).find() == size


@pytest.mark.parametrize(("room", "size"), [(100, 64), (80, 64), (79, 32), (10, 8), (9, 4), (2, 1), (1, 1), (0, 1)])
def test_memory_is_left_for_a_quarter_more(room: int, size: int) -> None:
    device = Device(0.001, 1e-9, room)
    assert device.find() == size
    assert max(device.calls[:-1], default=0) <= room  # the first that finds no memory is the last that is tried


def test_a_batch_that_takes_long_is_the_last(tmp_path: Path) -> None:
    device = Device(1.5, 0.2)
    assert device.find() == 4
    assert max(device.calls) == 5


def test_what_the_host_may_hold_bounds_it_on_any_device() -> None:
    device = Device(0.001, 0.0)
    spec = device.spec
    assert choose_batch(device, "cpu", 4, 2**30) == cpu_batch(spec, 4, 2**30)
    assert device.calls == []
    assert choose_batch(device, "cuda", 4, 8 * 50 * slot_bytes(spec)) <= 32
    assert max(device.calls) <= 40


@given(most=st.integers(1, 5000))
def test_no_more_than_it_may(most: int) -> None:
    device = Device(0.001, 1e-9)
    assert device.find(most) == min(MOST, 1 << (most.bit_length() - 1))
    # Three calls for each size: one with a quarter more, two of which the quicker counts.
    assert len(device.calls) == 3 * min(most.bit_length(), MOST.bit_length())


def test_a_model_that_breaks_its_card_is_named() -> None:
    class Broken(Device):
        def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
            if len(tiles) > 4:
                raise ValueError("takes 4 tiles at most")
            return super().__call__(tiles)

    with pytest.raises(ModelError, match="failed on made-up tiles: ValueError: takes 4 tiles at most"):
        Broken(0.001, 1e-9).find()


@pytest.mark.parametrize(
    ("tile_px", "cores", "memory", "size"),
    [
        (224, 1, 2**30, 8),
        (224, 2, 2**30, 16),
        (224, 3, 2**30, 32),
        (224, 16, 2**30, 128),
        (240, 4, 2**30, 24),  # pieces of 6
        (1024, 2, 2**30, 2),
        (224, 16, 2**27, 32),  # 16 MiB of batches
        (224, 16, 2**20, 1),
    ],
)
def test_on_the_cpu_each_core_has_a_piece(tile_px: int, cores: int, memory: int, size: int) -> None:
    spec = constant(tile_px=tile_px).spec
    assert cpu_batch(spec, cores, memory) == size
    assert size <= most_tiles(spec, memory)


@given(tile_px=st.integers(1, 2000), cores=st.integers(1, 256), memory=st.integers(1, 2**33))
def test_pieces_are_those_of_any_batch_and_fit_into_memory(tile_px: int, cores: int, memory: int) -> None:
    spec = identity(tile_px=tile_px).spec
    size = cpu_batch(spec, cores, memory)
    assert size == 1 or size * slot_bytes(spec) <= memory / 8
    assert size / piece_tiles(size, tile_px) <= 2 * cores
    if size < cpu_batch(spec, cores, 2**60):
        assert 2 * size > most_tiles(spec, memory)


# Whole runs


def test_a_run_finds_it_once_and_a_resumed_one_keeps_it(
    reference_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(reference_job, out=str(tmp_path), batch_size=0, memory=2**26)
    monkeypatch.setattr(worker, "core_count", lambda: 2)
    first = worker.find_batch_size(job)
    assert first == cpu_batch(worker.check_model(job), job.threads, 2**26)
    assert worker.find_batch_size(replace(job, memory=2**20)) == first  # less is free now
    assert worker.find_batch_size(replace(job, memory=2**20, out=str(tmp_path / "other"))) < first


@pytest.mark.parametrize("scheduler", ["sync", "processes"])
def test_the_record_says_what_was_found(reference: Path, reference_job: Job, tmp_path: Path, scheduler: str) -> None:
    job = replace(reference_job, out=str(tmp_path), batch_size=0)
    (outcome,) = run([job], scheduler)
    assert outcome.record is not None
    expected = cpu_batch(worker.check_model(job), job.threads, job.memory)
    assert outcome.job.batch_size == outcome.record["batch_size"] == expected > 1
    assert [e["batch"] for e in outcome.record["environments"]] == [expected]
    assert outcome.record["halved_to"] is None
    assert (job.result_folder("identity") / "manifest.json").read_bytes() == (reference / "manifest.json").read_bytes()


def test_the_command_takes_auto(reference_job: Job, tmp_path: Path) -> None:
    model = "pathology.testing:mean_colour?tile_px=32"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('schema = 1\nbatch-size = "auto"\n')
    common = [reference_job.slide, "--model", model, "--tissue", "none"]
    for number, options in enumerate((["--batch-size", "auto"], ["--recipe", str(recipe)], [])):
        out = tmp_path / f"out-{number}"
        options = [*common, *options, "--out", str(out), "--scheduler", "sync", "--threads", "1"]
        done = CliRunner().invoke(main, ["run", *options])
        assert done.exit_code == 0, done.output
        (result,) = out.glob("slides/*/*/result.json")
        assert (json.loads(result.read_bytes())["batch_size"] == 32) == (number == 2)
    done = CliRunner().invoke(main, ["check", *common, "--batch-size", "auto"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["run", *common, "--out", str(tmp_path / "none"), "--batch-size", "many"])
    assert done.exit_code == 2
    assert "'many' is no batch size; use a number from 1, or auto" in done.output


@pytest.mark.parametrize(
    ("tile_px", "expected"), [(16, 32), (224, 32), (256, 32), (299, 32), (317, 16), (512, 8), (1024, 2), (4096, 1)]
)
def test_large_tiles_have_a_smaller_batch_unless_it_is_given(tile_px: int, expected: int, tmp_path: Path) -> None:
    model = f"pathology.testing:identity?tile_px={tile_px}"
    slide = SlideEntry(tmp_path / "slide.tiff", "slide", tmp_path)
    for asked, threads, device, size in (
        (None, 1, "cpu", expected),
        (None, 12, "cpu", max(16, expected)),  # a piece for each
        (None, 64, "cpu", 32),
        (None, 12, "cuda", expected),
        (7, 12, "cpu", 7),
        ("auto", 12, "cpu", 0),
    ):
        settings = Settings(out=tmp_path, batch_size=asked, threads=threads)
        (job,) = make_jobs([slide], cards([model], settings), settings, device)
        assert job.batch_size == size
        assert size == 7 or not size or piece_tiles(size, tile_px) == piece_tiles(32, tile_px)
