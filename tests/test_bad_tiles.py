"""Tiles that cannot be decoded: NaN, listed, the slide partial; the rest as it would be without them."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from slides import noise_pixels

from pathology import Job, job_slide, open_heatmap
from pathology.errors import Reason
from pathology.export.table import read_parquet
from pathology.finish import BAD_TILES, read_manifest
from pathology.geometry import Box
from pathology.integrity import verify
from pathology.outcome import Interrupted, Outcome, Progress
from pathology.runner import run
from pathology.slide import Slide
from pathology.testing import array_slide
from pathology.tissue import find_tissue
from pipelines.cli import main

DENSE = "pathology.testing:identity?tile_px=32"
CLASSIFIER = "pathology.testing:mean_colour?tile_px=32"
DAMAGE = [(0, Box(70, 40, 9, 9)), (0, Box(150, 160, 1, 1))]
# The grid rows and columns of 32-px tiles, 16 px apart, that lie over it.
BAD = {(row, col) for row in (3, 4) for col in (1, 2, 3)} | {(row, col) for row in (8, 9) for col in (9,)}

Damage = Callable[[Sequence[tuple[int, Box]]], None]


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Damage:
    """Sets the boxes that cannot be decoded in the one slide that there is, 200 x 170 px; whole at first."""
    pixels = noise_pixels(200, 170)

    def damaged(bad: Sequence[tuple[int, Box]]) -> None:
        job_slide._kept.slides.clear()

        def open_damaged(*_: object, **__: object) -> Slide:
            return array_slide(pixels, bad=bad)

        monkeypatch.setattr(job_slide, "open_slide", open_damaged)

    damaged(())
    return damaged


def job_for(tmp_path: Path, model: str, **changes: object) -> Job:
    slide = tmp_path / "s.svs"
    slide.touch()
    job = Job(slide=str(slide), slide_id="s", root=str(slide), model=model, out=str(tmp_path / "out"), overlap=0.5)
    return replace(job, **{"tissue": "none", "batch_size": 4, "block": 4, **changes})  # type: ignore[arg-type]


def outcome_of(job: Job) -> Outcome:
    (outcome,) = run([job], "sync")
    return outcome


def folder_of(job: Job) -> Path:
    (manifest,) = job.slide_folder.glob("*/manifest.json")
    return manifest.parent


def test_expected_tiles_lie_over_the_damage() -> None:
    over = {
        (r, c) for r in range(12) for c in range(10) for _, b in DAMAGE if not b.intersect(Box(16 * r, 16 * c, 32, 32)).empty
    }
    assert over == BAD


@pytest.mark.fault("S09")
@pytest.mark.parametrize("model", [DENSE, CLASSIFIER])
@pytest.mark.parametrize("block", [4, 100])
def test_a_damaged_slide_is_partial_with_its_bad_tiles_listed(damage: Damage, model: str, block: int, tmp_path: Path) -> None:
    damage(DAMAGE)
    job = job_for(tmp_path, model, block=block)
    outcome = outcome_of(job)
    assert (outcome.status, outcome.reason) == ("partial", None)
    assert outcome.record is not None
    assert (outcome.record["bad_tiles"], outcome.record["tiles"]) == (len(BAD), 120)
    assert outcome.record["reason"] == "corrupt_tiles"
    with (folder_of(job) / BAD_TILES).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["row"]), int(r["col"])) for r in rows] == sorted(BAD)
    assert all((float(r["l0_y"]), float(r["l0_x"])) == (int(r["row"]) * 16, int(r["col"]) * 16) for r in rows)
    assert {r["reason"] for r in rows} == {"corrupt_tiles"}
    manifest = read_manifest(folder_of(job))
    assert manifest is not None
    assert BAD_TILES in manifest["files"]
    assert list(verify(job.out)) == []


def test_dense_pixels_that_only_bad_tiles_reach_are_nan_and_no_others(damage: Damage, tmp_path: Path) -> None:
    damage(DAMAGE)
    job = job_for(tmp_path, DENSE)
    outcome_of(job)
    scores = open_heatmap(folder_of(job)).read(0, Box(0, 0, 200, 170))
    reached = np.zeros((200, 170), bool)
    for row in range(12):
        for col in range(10):
            if (row, col) not in BAD:
                reached[row * 16 : row * 16 + 32, col * 16 : col * 16 + 32] = True
    assert 0 < np.count_nonzero(~reached) < 2000
    expected = np.where(reached, noise_pixels(200, 170).transpose(2, 0, 1).astype(np.float32), np.float32(np.nan))
    assert scores.tobytes() == expected.tobytes()


def test_a_classifiers_table_keeps_the_rows_of_bad_tiles(damage: Damage, tmp_path: Path) -> None:
    whole = job_for(tmp_path, CLASSIFIER)
    assert outcome_of(whole).status == "ok"
    assert not (folder_of(whole) / BAD_TILES).exists()
    damage(DAMAGE)
    job = replace(whole, out=str(tmp_path / "damaged"))
    outcome_of(job)
    good, bad = (read_parquet(folder_of(j) / "tiles.parquet") for j in (whole, job))
    is_bad = np.array([(row, col) in BAD for row in range(12) for col in range(10)])
    assert np.isnan(bad.scores[is_bad]).all()
    assert np.array_equal(bad.scores[~is_bad], good.scores[~is_bad])
    assert np.array_equal(bad.miny, good.miny)


@pytest.mark.parametrize("model", [DENSE, CLASSIFIER])
def test_how_a_damaged_slide_is_cut_or_interrupted_changes_no_byte(damage: Damage, model: str, tmp_path: Path) -> None:
    damage(DAMAGE)
    job = job_for(tmp_path, model)
    outcome_of(job)
    reference = read_manifest(folder_of(job))
    for block in (1, 7):
        other = replace(job, out=str(tmp_path / f"out{block}"), block=block)
        outcome_of(other)
        assert read_manifest(folder_of(other)) == reference
    stopped, stop, seen = replace(job, out=str(tmp_path / "stopped")), threading.Event(), []

    def watch(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == 6:
            stop.set()

    with pytest.raises(Interrupted):
        list(run([stopped], "sync", progress=watch, stop=stop))
    assert outcome_of(stopped).status == "partial"
    assert read_manifest(folder_of(stopped)) == reference


@pytest.mark.fault("S09")
def test_asked_to_fail_the_slide_fails_with_the_tile_named(damage: Damage, tmp_path: Path) -> None:
    damage(DAMAGE)
    job = job_for(tmp_path, DENSE, on_bad_tile="fail")
    outcome = outcome_of(job)
    assert (outcome.status, outcome.reason) == ("failed", Reason.CORRUPT_TILES)
    assert "tile (row 3, column 1) cannot be decoded" in outcome.message
    # The policy decides no value, so work begun under it goes on under the other.
    assert outcome_of(replace(job, on_bad_tile="mask")).status == "partial"


def test_regions_with_bad_tiles_are_read_again_where_they_must_be_whole(damage: Damage, tmp_path: Path) -> None:
    whole = job_for(tmp_path, DENSE)
    outcome_of(whole)
    damage(DAMAGE)
    job, stop = replace(whole, out=str(tmp_path / "damaged")), threading.Event()
    seen: list[str] = []

    def watch(progress: Progress) -> None:
        seen.append(progress.event)
        if seen.count("region") == 11:
            stop.set()

    with pytest.raises(Interrupted):
        list(run([job], "sync", progress=watch, stop=stop))
    assert outcome_of(replace(job, on_bad_tile="fail")).reason is Reason.CORRUPT_TILES
    damage(())
    assert outcome_of(replace(job, on_bad_tile="fail")).status == "ok"
    assert read_manifest(folder_of(job)) == read_manifest(folder_of(whole))


def test_a_partial_result_stands_until_it_is_overwritten(damage: Damage, tmp_path: Path) -> None:
    damage(DAMAGE)
    job = job_for(tmp_path, DENSE)
    outcome_of(job)
    damage(())
    again = outcome_of(job)
    assert (again.status, again.before) == ("partial", True)
    assert outcome_of(replace(job, overwrite=True)).status == "ok"
    assert not (folder_of(job) / BAD_TILES).exists()
    done = outcome_of(replace(job, overwrite=True))
    assert (done.status, done.before) == ("ok", True)


@pytest.mark.parametrize("policy", ["mask", "fail"])
def test_a_slide_without_a_readable_tile_fails_and_leaves_nothing_to_meet(damage: Damage, policy: str, tmp_path: Path) -> None:
    damage([(0, Box(0, 0, 200, 170))])
    job = job_for(tmp_path, CLASSIFIER, on_bad_tile=policy)
    outcome = outcome_of(job)
    assert (outcome.status, outcome.reason) == ("failed", Reason.CORRUPT_TILES)
    damage(())
    assert outcome_of(job).status == "ok"


@pytest.mark.parametrize("method", ["otsu", "none"])
def test_what_cannot_be_decoded_is_not_taken_for_glass(method: str) -> None:
    """One tile of a slide of one level is corrupt, and lies exactly under one tile of the grid."""
    pixels = np.full((512, 512, 3), 244, np.uint8)
    pixels[:256, :256] = (180, 60, 120)
    tissue = find_tissue(array_slide(pixels, bad=[(0, Box(256, 256, 128, 128))]), method)  # type: ignore[arg-type]
    share = tissue.coverage(np.array([(256.0, 256.0), (384.0, 384.0), (0.0, 0.0)]), 128)
    assert share.tolist() == [1.0, float(method == "none"), 1.0]


def test_the_command_shows_partial_slides_and_exits_with_1(damage: Damage, tmp_path: Path) -> None:
    damage(DAMAGE)
    (tmp_path / "s.tif").touch()

    def command(*options: str) -> tuple[int, str]:
        arguments = ["run", str(tmp_path / "s.tif"), "--model", CLASSIFIER, "--out", str(tmp_path / "out"), "--overlap", "0.5"]
        done = CliRunner().invoke(main, [*arguments, "--scheduler", "sync", "--tissue", "none", "--threads", "1", *options])
        return done.exit_code, done.output

    code, output = command()
    assert code == 1, output
    assert f"corrupt_tiles: {len(BAD)} of 120 tiles cannot be decoded; bad_tiles.csv lists them" in output
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], row["reason"], row["bad_tiles"]) == ("partial", "corrupt_tiles", str(len(BAD)))
    code, output = command("--log-format", "json")
    assert code == 1
    line = next(json.loads(text) for text in output.splitlines() if '"slide"' in text)
    assert (line["status"], line["reason"], line["bad_tiles"], line["before"]) == ("partial", "corrupt_tiles", len(BAD), True)
    assert command("--allow-failures", "1")[0] == 0
    code, output = command("--on-bad-tile", "fail", "--out", str(tmp_path / "failed"))
    assert code == 1
    assert "failed" in output
    assert "cannot be decoded" in output
