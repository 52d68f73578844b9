"""Where time went: what is counted for whom, and the line that names the bottleneck."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathology.batches import read_tiles
from pathology.clock import STAGES, Clock, counting, covered, current, timed, total
from pathology.finish import time_spent
from pathology.infer import infer_region
from pathology.job import Job
from pathology.predictor import Predictor
from pathology.runner import run
from pathology.testing import array_slide, identity
from pipelines.bottleneck import ADVICE, bottleneck
from tests.slides import noise_pixels, write_tiff
from tests.whole import plan_for


def test_time_counts_for_the_clock_of_the_thread() -> None:
    outer, inner = Clock(), Clock()
    with counting(outer):
        with timed("read"), counting(inner), timed("decode"):
            assert current() is inner
        other: list[Clock | None] = []
        thread = threading.Thread(target=lambda: other.append(current()))
        thread.start()
        thread.join()
        assert other == [None]
    assert current() is None
    with timed("write"):
        pass
    assert {k for k, v in outer.seconds().items() if v} <= {"read"}
    assert {k for k, v in inner.seconds().items() if v} <= {"decode"}


def test_time_is_counted_where_the_step_fails() -> None:
    clock = Clock()
    with counting(clock), pytest.raises(ValueError, match="no"), timed("model"):
        raise ValueError("no")
    assert clock.seconds()["model"] > 0


def test_threads_add_up() -> None:
    clock = Clock()
    threads = [threading.Thread(target=lambda: [clock.add("copy", 1.0) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.seconds()["copy"] == 2000
    assert total([clock.seconds(), {"copy": 1.5, "read": 2.0}]) == {**dict.fromkeys(STAGES, 0.0), "copy": 2001.5, "read": 2.0}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8))
def test_covered_counts_every_second_once(spans: list[tuple[int, int]]) -> None:
    seconds = {second for begin, length in spans for second in range(begin, begin + length)}
    assert covered([(begin, begin + length) for begin, length in spans]) == len(seconds)


def test_a_region_is_charged_for_its_own_tiles() -> None:
    slide, model = array_slide(noise_pixels(96, 96)), identity(tile_px=16)
    plan = plan_for(slide, model.spec, 16, block=100)
    (region,) = plan.regions
    predictor, clock = Predictor(model, 4), Clock()
    try:
        read = partial(read_tiles, slide, model.spec, plan.grid, pool=None, clock=clock)
        with counting(clock):
            bands = list(infer_region(read, model.spec, plan, region, predictor.predict, print))
    finally:
        predictor.close()
    assert np.concatenate(bands, axis=1).shape == (3, 96, 96)
    seconds = clock.seconds()
    assert all(seconds[stage] > 0 for stage in ("resample", "copy", "model", "stitch"))
    assert seconds["model"] <= predictor.spent().model_s * 1.001


def test_the_record_tells_where_the_time_went(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(300, 300)], compression="jpeg")
    out = tmp_path / "out"
    job = Job(
        slide=str(path),
        slide_id="s",
        root=str(path),
        model="pathology.testing:identity?tile_px=32",
        out=str(out),
        tissue="none",
        block=4,
    )
    (outcome,) = run([job], "sync")
    assert outcome.record is not None
    spent = outcome.record["time"]
    assert set(spent["stages"]) == set(STAGES)
    # Nothing is left to decode: so small a slide was read when its tissue was found.
    assert {stage for stage, seconds in spent["stages"].items() if not seconds} == {"read", "decode"}
    assert outcome.record["seconds"] == round(spent["wall_s"], 3)
    assert spent["wall_s"] >= max(spent["stages"].values())
    assert spent["waiting_s"] == pytest.approx(spent["wall_s"] - spent["stages"]["model"], abs=1e-5)
    assert 0 < spent["device_busy"] < 1
    manifest = (out / "slides" / "s" / "identity" / "manifest.json").read_text()
    assert "stages" not in json.loads(manifest)["fields"]


def test_regions_side_by_side_take_their_time_together_once() -> None:
    def counts(process: int, began: float, seconds: float) -> dict[str, object]:
        return {"process": process, "began": began, "seconds": seconds, "stages": {"model": 1.0}}

    # Two that overlap in one process, one after a pause, and one in another process at the same time.
    spent = time_spent([counts(1, 0.0, 4.0), counts(1, 2.0, 4.0), counts(1, 10.0, 1.0), counts(2, 0.0, 3.0)])
    assert spent["wall_s"] == 6 + 1 + 3
    assert spent["waiting_s"] == 10 - 4


@pytest.mark.parametrize("stage", STAGES)
def test_the_bottleneck_is_the_stage_that_took_most(stage: str) -> None:
    stages = {**dict.fromkeys(STAGES, 1.0), "model": 9.0 if stage == "model" else 0.5}
    if stage != "model":
        stages[stage] = 3.0
    line = bottleneck(stages, working_s=10.0, run_s=20.0, fast_decode=True)
    assert line.endswith(ADVICE[stage])
    without = bottleneck(stages, working_s=10.0, run_s=20.0, fast_decode=False)
    assert ("--fast-decode" in without) == (stage == "decode"), "no advice to do what is done"
    assert f"device busy {stages['model'] / 20:.0%}" in line
    assert bottleneck(dict.fromkeys(STAGES, 0.0), 0.0, 5.0, fast_decode=False) == ""
