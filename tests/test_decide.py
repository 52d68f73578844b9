"""Tiles that half precision leaves in doubt are decided by float32, once each and no others."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology import Job
from pathology.decide import BATCH, DOUBT, doubt, doubtful, exact, models
from pathology.errors import UsageError
from pathology.export.qupath import classify
from pathology.export.table import TileTable, read_parquet
from pathology.finish import read_manifest, read_record
from pathology.model import ModelSpec
from pathology.models import load_spec
from pathology.runner import run
from pipelines.cli import main
from tests.rounding import ERROR

WIDTH = DOUBT["bf16"]
SAMPLE = Path(__file__).parent.parent / "sample_data" / "sample.svs"


@pytest.fixture
def job(reference_job: Job, tmp_path: Path) -> Job:
    return replace(reference_job, model=named(), out=str(tmp_path / "out"), overlap=0.0, precision="bf16")


def named(**arguments: object) -> str:
    return "tests.rounding:rounding?" + "&".join(f"{name}={value}" for name, value in {"tile_px": 8, **arguments}.items())


def table(job: Job, scheduler: str = "sync") -> TileTable:
    (outcome,) = run([job], scheduler)
    assert outcome.status == "ok", outcome.message
    return read_parquet(job.result_folder("rounding") / "tiles.parquet")


@pytest.mark.parametrize(
    ("scores", "threshold", "expected"),
    [
        ((0.6,), (0.5,), False),
        ((0.54,), (0.5,), True),
        ((0.46,), (0.5,), True),
        ((0.54,), (0.6,), False),
        ((0.02,), (0.03,), False),  # where probabilities crowd, so do those in doubt
        ((0.029,), (0.03,), True),
        ((0.0,), (0.0,), False),  # which every tile reaches
        ((1.0,), (1.0,), True),
        ((0.9,), (1.0,), False),
        ((0.8, 0.1, 0.1), (0.5, 0.5, 0.5), False),
        ((0.42, 0.38, 0.2), (0.5, 0.5, 0.5), True),  # which is the best
        ((0.41, 0.34, 0.25), (0.5, 0.5, 0.5), True),
        ((0.45, 0.35, 0.2), (0.5, 0.5, 0.5), False),
        ((0.2, 0.7, 0.1), (0.22, 0.5, 0.5), True),
        ((0.1, 0.1, 0.05), (0.5, 0.5, 0.5), False),  # several labels, none of them there
        ((0.9, 0.9, 0.05), (0.5, 0.5, 0.5), True),
    ],
)
def test_a_tile_is_doubtful_near_a_threshold_or_between_two_classes(
    scores: tuple[float, ...], threshold: tuple[float, ...], expected: bool
) -> None:
    assert doubtful(np.array([scores], np.float32), threshold, WIDTH).tolist() == [expected]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
def test_log_odds_that_move_by_less_change_no_class(seed: int, classes: int, exclusive: bool) -> None:
    """Of what is not doubtful: its classes present, and the best of them where there is one, or they exclude each other."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (200, classes))
    # Half of the width each: the log-odds between two classes move by no more than both.
    moved = logits + random.uniform(-WIDTH / 2, WIDTH / 2, logits.shape)
    threshold = tuple(random.uniform(0.02, 0.98, classes).tolist())
    spec = ModelSpec("own", "", tuple("abcde"[:classes]), 0.5, 8, 8, threshold=threshold)

    def probabilities(values: NDArray[np.float64]) -> NDArray[np.float32]:
        if exclusive and classes > 1:
            return (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)).astype(np.float32)
        return (1 / (1 + np.exp(-values))).astype(np.float32)

    first, second = probabilities(moved), probabilities(logits)
    clear = ~doubtful(first, threshold, WIDTH)
    assert clear.any()
    assert ((first >= np.float32(threshold)) == (second >= np.float32(threshold)))[clear].all()
    named = clear & ((first >= np.float32(threshold)).any(axis=1) | (exclusive or classes == 1))
    assert (classify(first, spec) == classify(second, spec))[named].all()


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_no_tile_changes_class_and_only_doubtful_ones_are_computed_again(job: Job, tmp_path: Path, classes: int) -> None:
    log = tmp_path / "log"
    fp32 = table(replace(job, model=named(classes=classes), precision="fp32", out=str(tmp_path / "fp32")))
    bf16 = table(replace(job, model=named(classes=classes, log=log)))
    assert 0 < np.abs(bf16.scores - fp32.scores).max() <= ERROR + 1e-6
    assert ((bf16.scores >= 0.5) == (fp32.scores >= 0.5)).all()
    assert (bf16.scores.argmax(axis=1) == fp32.scores.argmax(axis=1)).all()

    again = (bf16.scores == fp32.scores).all(axis=1)
    clear = ~doubtful(fp32.scores, (0.5,) * classes, 2 * WIDTH)
    assert not again[clear].any()
    record = read_record(job.result_folder("rounding"))
    assert record is not None
    assert 0 < record["decided"] == again.sum() < len(bf16)
    calls = Counter(log.read_text().split("\n")[:-1])
    assert set(calls) == {"bf16 4", "fp32 4"}
    # Each region has its own batches, and each of the two models one call before the first of them.
    assert again.sum() / 4 <= calls["fp32 4"] - 1 <= again.sum() / 4 + record["regions"]


@pytest.mark.parametrize("scheduler", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_any_scheduler_decides_as_the_sequential_one(job: Job, tmp_path: Path, scheduler: str) -> None:
    other = replace(job, out=str(tmp_path / scheduler))
    table(job)
    table(other, scheduler)
    assert read_manifest(job.result_folder("rounding")) == read_manifest(other.result_folder("rounding"))


def test_models_that_read_together_each_decide_their_own(job: Job) -> None:
    alone = table(job)
    beside = replace(job, out=job.out + "-both")
    jobs = [beside, replace(beside, model="pathology.testing:mean_colour?tile_px=8", precision="fp32")]
    assert {outcome.status for outcome in run(jobs, "sync")} == {"ok"}
    both = read_parquet(jobs[0].result_folder("rounding") / "tiles.parquet")
    assert both.scores.tobytes() == alone.scores.tobytes()


def test_what_has_no_class_is_computed_once(job: Job, tmp_path: Path) -> None:
    log = tmp_path / "log"
    value = replace(job, model=named(scores="value", log=log))
    table(value)
    assert set(log.read_text().split("\n")) == {"bf16 4", ""}
    record = read_record(value.result_folder("rounding"))
    assert record is not None
    assert record["decided"] is None
    assert doubt(replace(job, precision="fp32"), load_spec(job.model)) == 0


def test_float32_is_never_compiled_and_in_small_batches_on_a_device_of_its_own(job: Job) -> None:
    spec = load_spec(job.model)
    asked = replace(job, batch_size=512, compile=True)
    assert models(asked, spec) == (asked, exact(asked))
    again = exact(asked)
    assert (again.precision, again.compile, again.batch_size) == ("fp32", False, 512)
    assert exact(replace(asked, device="cuda")).batch_size == BATCH
    assert models(again, spec) == (again,)


def test_a_card_that_rules_out_fp32_has_nothing_decided(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(job.model)
    assert doubt(job, spec) == WIDTH
    monkeypatch.setattr("pathology.decide._allows_fp32", lambda ref: False)
    assert doubt(job, spec) == 0
    assert models(job, spec) == (job,)


def test_how_near_is_doubtful_is_part_of_what_a_result_was_made_with(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    table(job)
    monkeypatch.setitem(DOUBT, "bf16", 0.4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"made otherwise \(doubt 0.2 -> 0.4\)"):
        list(run([job], "sync"))


def test_a_tile_that_cannot_be_read_again_fails_the_slide(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathology import batches

    read, times = batches.read_tiles, []

    def once(*arguments: object) -> object:
        times.append(arguments)
        return read(*arguments) if len(times) % 2 else iter([None] * len(arguments[3]))  # type: ignore[arg-type]

    monkeypatch.setattr("pathology.worker.read_tiles", once)
    (outcome,) = run([job], "sync")
    assert (outcome.status, outcome.reason) == ("failed", "read_error")
    assert "a second time" in outcome.message


def test_too_little_memory_for_float32_halves_its_batch_alone_and_is_told(job: Job, tmp_path: Path) -> None:
    table(job)
    log = tmp_path / "log"
    halved = replace(job, model=named(most=2, log=log), out=str(tmp_path / "halved"))
    table(halved)
    records = [read_record(one.result_folder("rounding")) for one in (job, halved)]
    assert [record and record["halved_to"] for record in records] == [None, 2]
    assert [sorted(e["batch"] for e in record["environments"]) for record in records if record] == [[4], [2, 4]]
    assert Counter(log.read_text().split("\n"))["fp32 4"] == 1  # the first call, which found no memory


def test_events_tell_how_many_were_decided(job: Job) -> None:
    table(job)
    record = read_record(job.result_folder("rounding"))
    assert record is not None
    lines = [json.loads(line) for log in Path(job.out, "events").glob("*.jsonl") for line in log.read_text().splitlines()]
    assert sum(line["decided"] for line in lines if line["event"] == "region-done") == record["decided"]


def called(log: Path) -> set[str]:
    """The precisions in which a model was called."""
    return {line.split()[0] for line in log.read_text().splitlines()}


def test_check_counts_the_memory_of_both_models(job: Job, tmp_path: Path) -> None:
    log = tmp_path / "log"
    asked = ["check", job.slide, "--model", named(log=log), "--tissue", "none", "--json", "--precision", "bf16"]
    checked = CliRunner().invoke(main, asked)
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.output)["memory_bytes"] > 0
    assert called(log) == {"bf16", "fp32"}


def test_benchmark_decides_as_a_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    asked = ["benchmark", "--model", named(log=log, tile_px=64), "--slide", str(SAMPLE), "--tiles", "40", "--device", "cpu"]
    for width, precisions in ((1e-9, {"bf16"}), (50.0, {"bf16", "fp32"})):
        monkeypatch.setitem(DOUBT, "bf16", width)  # type: ignore[arg-type]
        measured = CliRunner().invoke(main, [*asked, "--precision", "bf16"])
        assert measured.exit_code == 0, measured.output
        assert called(log) == precisions
