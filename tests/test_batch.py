"""The command `run` over whole folders: typed failures, resume, refusals, exit codes, records."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from slides import cut, pyramid, smooth_pixels, write_tiff

from pathology import Job, job_slide, open_heatmap, slide_worker
from pathology.calls import Death, WorkerDied
from pathology.errors import EnvironmentFault, Reason, SlideError
from pathology.events import read_events
from pathology.outcome import Outcome
from pathology.work import Work
from pipelines import summary
from pipelines.cli import main
from pipelines.room import Room
from pipelines.slides import SlideEntry, find_slides, share
from pipelines.summary import known_failures, read_failure, write_failure, write_summary

MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"


def pathology(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run(*arguments: object, model: str = MODEL) -> Result:
    return pathology("run", "--model", model, "--scheduler", "sync", "--tissue", "none", "--threads", 1, *arguments)


def rows(out: Path) -> dict[str, dict[str, str]]:
    """The rows of summary.csv by the slide's path below the folder that holds all."""
    with (out / "summary.csv").open(newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


def manifests(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("slides/*/*/manifest.json"))}


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "one.svs", [smooth_pixels(300, 400)])


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Two good slides of one name, a slide of glass, and five that cannot be worked on."""
    folder = tmp_path / "slides"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_tiff(folder / name / "s.svs", pyramid(smooth_pixels(700, 900, seed=ord(name)), (1, 4)))
    write_tiff(folder / "glass.svs", [np.full((600, 500, 3), 244, np.uint8)])
    (folder / "empty.svs").touch()
    (folder / "text.svs").write_text("this is no slide\n" * 100)
    for name, levels in (("cut-many.svs", (1, 4)), ("cut-one.tif", (1,))):
        write_tiff(
            folder / name,
            pyramid(smooth_pixels(700, 900), levels),
            aperio=name.endswith("svs"),
            resolution=(20000, 20000, "CENTIMETER"),
        )
        cut(folder / name, 0.5)
    write_tiff(folder / "no-mpp.svs", [smooth_pixels(300, 400)], mpp=None)
    return folder


@pytest.mark.fault("S01", "S03", "S06", "S08", "S21", "S27", "S31")
def test_a_bad_slide_is_a_row_with_its_reason_and_never_the_end(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pathology("run", mixed_folder, "--model", MODEL, "--out", out, "--scheduler", "sync", "--threads", 1)
    assert done.exit_code == 1, done.output
    found = {str(Path(name).relative_to(mixed_folder)): (row["status"], row["reason"]) for name, row in rows(out).items()}
    assert found == {
        "a/s.svs": ("ok", ""),
        "b/s.svs": ("ok", ""),
        "glass.svs": ("ok_empty", ""),
        "empty.svs": ("failed", "empty_file"),
        "text.svs": ("failed", "not_a_slide"),
        "cut-many.svs": ("failed", "truncated"),
        "cut-one.tif": ("failed", "truncated"),
        "no-mpp.svs": ("failed", "no_mpp"),
    }
    assert "--slide-mpp" in next(r["message"] for r in rows(out).values() if r["reason"] == "no_mpp")
    (glass,) = out.glob("slides/glass-*/mean-colour")
    heatmap = open_heatmap(glass)
    assert np.isnan(heatmap.levels[0].compute()).all()
    assert json.loads((glass / "result.json").read_text())["classes"]["red"] == {"area_mm2": None, "max": None, "mean": None}
    assert pathology("verify", out).exit_code == 0


@pytest.mark.fault("S31")
def test_the_good_slides_of_a_mixed_folder_are_those_of_a_good_one(mixed_folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    for name in ("a", "b"):
        (alone / name).mkdir(parents=True)
        shutil.copy(mixed_folder / name / "s.svs", alone / name / "s.svs")
    assert run(mixed_folder, "--out", tmp_path / "mixed-out").exit_code == 1
    assert run(alone, "--out", tmp_path / "alone-out").exit_code == 0
    mixed = manifests(tmp_path / "mixed-out")
    good = manifests(tmp_path / "alone-out")
    assert len(good) == 2
    assert {name: mixed[name] for name in good} == good


def test_check_names_the_same_failures_and_writes_nothing(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = pathology("check", mixed_folder, "--model", MODEL, "--json")
    assert done.exit_code == 1
    verdicts = [json.loads(line) for line in done.output.splitlines()]
    reasons = {str(Path(v["slide"]).relative_to(mixed_folder)): v.get("reason", "") for v in verdicts}
    assert reasons["a/s.svs"] == reasons["b/s.svs"] == reasons["glass.svs"] == ""
    assert reasons["empty.svs"] == "empty_file"
    assert reasons["cut-one.tif"] == reasons["cut-many.svs"] == "truncated"
    assert sorted(tmp_path.rglob("*")) == before


def test_finished_work_is_kept_and_not_done_again(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(slide, "--out", out).exit_code == 0
    first, starts = manifests(out), sum(e["event"] == "region-start" for e in read_events(out))
    again = run(slide, "--out", out)
    assert again.exit_code == 0
    assert "done before" in again.output
    assert manifests(out) == first
    assert sum(e["event"] == "region-start" for e in read_events(out)) == starts


@pytest.mark.fault("F15")
def test_other_parameters_are_refused_with_the_difference_and_overwrite_replaces(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(slide, "--out", out).exit_code == 0
    first = manifests(out)
    refused = run(slide, "--out", out, "--overlap", 0.5)
    assert refused.exit_code == 2
    assert "stride_px 64 -> 32" in refused.output
    assert manifests(out) == first
    assert run(slide, "--out", out, "--overlap", 0.5, "--overwrite").exit_code == 0
    assert json.loads(next(iter(manifests(out).values())))["fields"]["stride_px"] == 32
    assert pathology("verify", out).exit_code == 0


@pytest.mark.fault("F16")
def test_a_changed_slide_is_refused_by_row(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(slide, "--out", out).exit_code == 0
    write_tiff(slide, [smooth_pixels(300, 400, seed=9)])
    done = run(slide, "--out", out)
    assert done.exit_code == 1
    assert "changed" in done.output
    assert run(slide, "--out", out, "--overwrite").exit_code == 0


@pytest.mark.fault("F16")
@pytest.mark.parametrize("begun", ["unfinished", "finished"])
def test_a_slide_or_mask_that_changed_is_a_row_and_the_others_are_done(begun: str, tmp_path: Path) -> None:
    for name in ("file", "mask", "good"):
        write_tiff(tmp_path / f"{name}.tiff", [smooth_pixels(300, 400)])
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(mask)
    (tmp_path / "list.csv").write_text(f"slide,id,mask\nfile.tiff,file,\nmask.tiff,mask,{mask}\ngood.tiff,good,\n")
    out = tmp_path / "out"
    arguments = (tmp_path / "list.csv", "--out", out)
    if begun == "finished":
        assert run(*arguments).exit_code == 0
        shutil.rmtree(out / "slides" / "good")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pathology.slide_worker.finish", refuse_to_finish)
            assert run(*arguments).exit_code == 1
        assert len(list(out.glob(".work/*/*/*/plan.json"))) == 3
    write_tiff(tmp_path / "file.tiff", [smooth_pixels(300, 400, seed=9)])
    Image.fromarray(np.diag([255] * 40).astype(np.uint8)[:30]).save(mask)
    done = run(*arguments, "--retry-failed")
    assert done.exit_code == 1, done.output
    changed = {json.loads(path.read_bytes())["slide_id"] for path in out.glob(".work/*/*/*/failed.json")}
    assert changed == {"file", "mask"}
    assert "2 changed: " in done.output
    assert [path.parent.parent.name for path in out.glob("slides/good/*/result.json")] == ["good"]
    assert run(*arguments, "--overwrite").exit_code == 0


def refuse_to_finish(*arguments: object) -> None:
    raise SlideError(Reason.READ_ERROR, "not now")


@pytest.mark.fault("F16")
def test_a_slide_that_changes_while_it_is_worked_on_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write_tiff(tmp_path / f"{name}.svs", [smooth_pixels(300, 400)])
    finish, seen = slide_worker.finish_slide, []

    def replace_first(job: Job) -> dict[str, object]:
        if not seen:
            write_tiff(Path(job.slide), [smooth_pixels(300, 400, seed=9)])
        seen.append(job.slide_id)
        return finish(job)

    monkeypatch.setattr(slide_worker, "finish_slide", replace_first)
    done = run(*(tmp_path / f"{name}.svs" for name in "abc"), "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert sorted(row["status"] + row["reason"] for row in rows(tmp_path / "out").values()) == ["failedchanged", "ok", "ok"]


@pytest.mark.fault("F16")
def test_what_was_read_of_another_file_meanwhile_never_counts(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the slide is brought back before the end."""
    assert run(slide, "--out", tmp_path / "sound").exit_code == 0
    kept = slide.rename(tmp_path / "kept")
    shutil.copy2(kept, slide)
    stage, finish = Work.stage, slide_worker.finish_slide

    def stage_and_replace(self: Work, *arguments: Any) -> Any:
        staged = stage(self, *arguments)
        write_tiff(slide, [smooth_pixels(300, 400, seed=9)])
        return staged

    def bring_back(job: Job) -> dict[str, object]:
        shutil.copy2(kept, slide)
        return finish(job)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "stage", stage_and_replace)
        patch.setattr(slide_worker, "finish_slide", bring_back)
        done = run(slide, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "changed while it was worked on" in done.output
    shutil.copy2(kept, slide)
    assert run(slide, "--out", tmp_path / "out", "--retry-failed").exit_code == 0
    assert manifests(tmp_path / "out") == manifests(tmp_path / "sound")


@pytest.mark.fault("F16")
def test_another_model_on_a_changed_mask_is_a_row(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tiff", [smooth_pixels(300, 400)])
    write_tiff(tmp_path / "b.tiff", [smooth_pixels(300, 400)])
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "list.csv").write_text("slide,id,mask\na.tiff,a,mask.png\nb.tiff,b,\n")
    arguments = (tmp_path / "list.csv", "--out", tmp_path / "out")
    assert run(*arguments).exit_code == 0
    Image.fromarray(np.diag([255] * 40).astype(np.uint8)[:30]).save(tmp_path / "mask.png")
    done = run(*arguments, model="pathology.testing:identity?tile_px=64&mpp=0.5")
    assert done.exit_code == 1, done.output
    assert "tissue found otherwise" in done.output
    assert "1 of 2 done" in done.output


@pytest.mark.fault("F17")
@pytest.mark.parametrize("name", ["manifest.json", "result.json"])
def test_a_damaged_record_is_a_row_and_the_others_are_done(name: str, tmp_path: Path) -> None:
    slides = [write_tiff(tmp_path / f"{name}.tiff", [smooth_pixels(300, 400)]) for name in "abc"]
    out = tmp_path / "out"
    assert run(*slides[:2], "--out", out).exit_code == 0
    first = manifests(out)
    for damaged in out.glob(f"slides/*/*/{name}"):
        damaged.write_text("{")
    done = run(*slides[1:], "--out", out)
    assert done.exit_code == 1, done.output
    assert "1 of 2 done, 1 failed" in done.output
    assert "verify --repair" in done.output
    found = {Path(slide).stem: (row["status"], row["reason"]) for slide, row in rows(out).items()}
    assert found["c"] == ("ok", "")
    if name == "result.json":  # what slide the other's was is lost with it; its folder still has its row
        (other,) = (row for row in rows(out).values() if not row["slide"])
        assert (other["id"][:2], other["status"], other["reason"]) == ("a-", "failed", "changed")
        assert "result.json is damaged" in other["message"]
    assert found["b"] == ("failed", "changed") if name == "result.json" else ("ok", "")
    assert run(*slides, "--out", out, "--overwrite").exit_code == 0
    assert {path: manifests(out)[path] for path in first} == first
    assert {row["status"] for row in rows(out).values()} == {"ok"}


def test_a_slides_folder_that_is_removed_meanwhile_is_made_again(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(slide, "--out", tmp_path / "sound").exit_code == 0
    finish = slide_worker.finish_slide

    def remove_first(job: Job) -> dict[str, object]:
        shutil.rmtree(job.slide_folder)
        return finish(job)

    monkeypatch.setattr(slide_worker, "finish_slide", remove_first)
    done = run(slide, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert manifests(tmp_path / "out") == manifests(tmp_path / "sound")
    assert pathology("verify", tmp_path / "out").exit_code == 0


@pytest.mark.fault("F01")
def test_a_worker_that_dies_after_the_commit_leaves_a_slide_that_is_done(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(slide, "--out", tmp_path / "sound").exit_code == 0
    finish, died = slide_worker.finish_slide, []

    def die_first(job: Job) -> dict[str, object]:
        record = finish(job)
        if not died:
            died.append(job)
            raise WorkerDied("killed", Death.KILL)
        return record

    monkeypatch.setattr(slide_worker, "finish_slide", die_first)
    done = run(slide, "--out", tmp_path / "out")
    assert (done.exit_code, len(died)) == (0, 1), done.output
    assert manifests(tmp_path / "out") == manifests(tmp_path / "sound")


@pytest.mark.fault("F16")
def test_unfinished_work_that_is_removed_meanwhile_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slides = [write_tiff(tmp_path / f"{name}.tiff", [smooth_pixels(300, 400)]) for name in "ab"]
    finish, seen = slide_worker.finish_slide, []

    def remove_first(job: Job) -> dict[str, object]:
        if not seen:
            shutil.rmtree(job.work_folder("mean-colour"))
            slide_worker._kept.works.clear()  # as in a process that has taken the place of one that died
        seen.append(job)
        return finish(job)

    monkeypatch.setattr(slide_worker, "finish_slide", remove_first)
    done = run(*slides, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "--retry-failed" in done.output
    assert sorted(row["status"] + row["reason"] for row in rows(tmp_path / "out").values()) == ["failedchanged", "ok"]
    assert run(*slides, "--out", tmp_path / "out", "--retry-failed").exit_code == 0


@pytest.mark.fault("F17")
def test_a_damaged_result_is_named_by_verify_and_replaced_by_overwrite(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(slide, "--out", out).exit_code == 0
    first = manifests(out)
    (shard,) = out.glob("slides/*/*/heatmap.ome.zarr/0/c/0/0/0")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = pathology("verify", out)
    assert done.exit_code == 1
    assert "changed" in done.output
    assert "heatmap.ome.zarr/0/c/0/0/0" in done.output
    shard.write_bytes(b"")
    assert "damaged" in run(slide, "--out", out).output
    assert run(slide, "--out", out, "--overwrite", "--retry-failed").exit_code == 0
    assert manifests(out) == first


def test_a_failure_stands_until_something_about_it_changes(tmp_path: Path) -> None:
    slide, out = write_tiff(tmp_path / "s.svs", [smooth_pixels(300, 400)], mpp=None), tmp_path / "out"
    assert run(slide, "--out", out).exit_code == 1
    assert "failed before" in run(slide, "--out", out).output
    assert "failed before" not in run(slide, "--out", out, "--retry-failed").output
    assert run(slide, "--out", out, "--slide-mpp", 0.5).exit_code == 0
    assert [r["status"] for r in rows(out).values()] == ["ok"]


def test_failures_are_counted_against_their_limits(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.svs").touch()
    assert run(folder, "--out", tmp_path / "a", "--allow-failures", 3).exit_code == 0
    assert run(folder, "--out", tmp_path / "b", "--allow-failures", 2).exit_code == 1
    done = run(folder, "--out", tmp_path / "c", "--max-failures", 1)
    assert done.exit_code == 1
    assert len(rows(tmp_path / "c")) == 2


def test_a_slide_list_gives_ids_resolutions_and_columns(tmp_path: Path) -> None:
    write_tiff(tmp_path / "x.svs", [smooth_pixels(300, 400)], mpp=None)
    (tmp_path / "list.csv").write_text("wsi,slide_mpp,id,site\nx.svs,0.5,patient 7,north\n")
    out = tmp_path / "out"
    assert run(tmp_path / "list.csv", "--out", out).exit_code == 0
    (row,) = rows(out).values()
    assert (row["id"], row["site"]) == ("patient-7", "north")
    assert (out / "slides" / "patient-7").is_dir()
    shutil.rmtree(out / ".work")
    assert run(tmp_path / "list.csv", "--out", out).exit_code == 0
    assert next(iter(rows(out).values()))["site"] == "north"


@pytest.mark.fault("S31")
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name\nx.svs\n", "needs one named slide"),
        ("slide,slide_mpp\nx.svs,half\n", "line 2: slide_mpp 'half' is no number"),
        ("slide,id\nx.svs,a\ny.svs,A\n", "both be called"),
        ("slide\n\n", "no slide found"),
    ],
)
def test_a_broken_slide_list_is_one_line(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    done = run(tmp_path / "list.csv", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert what in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.fault("S31")
def test_equal_names_given_one_by_one_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tiff(tmp_path / name / "s.svs", [smooth_pixels(128, 128)])
    done = run(tmp_path / "a" / "s.svs", tmp_path / "b" / "s.svs", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "slide list" in done.output


def test_two_models_in_one_run(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(slide, "--out", out, "--model", "pathology.testing:constant?tile_px=32&value=0.25")
    assert done.exit_code == 0, done.output
    assert sorted(p.parent.name for p in out.glob("slides/*/*/manifest.json")) == ["constant", "mean-colour"]
    with (out / "summary.csv").open(newline="") as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert table["constant"]["constant_mean"] == "0.25"
    assert table["constant"]["red_mean"] == ""


def test_exports_lie_beside_the_result_and_do_not_disturb_verify(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(slide, "--out", out, "--export", "csv", "--export", "qupath", "--export", "png").exit_code == 0
    (folder,) = out.glob("slides/*/*/")
    first = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert {"tiles.csv", "tiles.geojson", "heatmap-red.png"} <= set(first)
    for name in ("tiles.csv", "tiles.geojson", "heatmap-red.png"):
        (folder / name).unlink()
    assert pathology("export", out, "--to", "csv", "--to", "qupath", "--to", "png").exit_code == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == first
    assert pathology("verify", out).exit_code == 0


def test_a_model_must_be_named(slide: Path, tmp_path: Path) -> None:
    done = pathology("run", slide, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "--model" in done.output


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--model", "nobody"), "not known"),
        (("--overlap", "64"), "overlap"),
        (("--min-tissue", "2"), "min tissue"),
        (("--batch-size", "0"), "batch size"),
        (("--scheduler", "cloud"), "unknown"),
        (("--device", "tpu"), "not known"),
    ],
)
def test_a_bad_option_is_one_line_with_exit_2(arguments: tuple[str, ...], what: str, slide: Path, tmp_path: Path) -> None:
    done = run(slide, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    assert what in done.output.splitlines()[-1]


def test_a_vanished_share_is_the_machines_fault_and_fails_no_slide(slide: Path, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (tmp_path / "list").mkdir()
    write_tiff(share / "s.svs", [smooth_pixels(300, 400)])
    out = tmp_path / "out"
    from pathology.job import Job
    from pathology.runner import run as run_jobs

    job = Job(slide=str(share / "s.svs"), slide_id="s", root=str(share), model=MODEL, out=str(out))
    shutil.rmtree(share)
    with pytest.raises(EnvironmentFault, match="share of the slides is gone; mount it"):
        list(run_jobs([job], "sync"))


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    ("below", "why"), [("file", "/file is no folder; choose another"), ("/proc", "No such file or directory")]
)
def test_an_output_that_cannot_be_made_is_exit_3(below: str, why: str, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(slide, "--out", tmp_path / below / "out")
    assert done.exit_code == 3, done.output
    (line,) = done.output.splitlines()
    assert why in line


@pytest.mark.fault("F10")
def test_an_output_that_may_only_be_read_is_exit_3(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(job_slide, "open_slide", lambda path, *_, **__: opened.append(path))
    out = tmp_path / "out"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", out], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        done = run(slide, "--out", out, "--min-free", 0)
    finally:
        subprocess.run(["umount", out], check=True)
    assert done.exit_code == 3, done.output
    (line,) = done.output.splitlines()
    assert line.startswith(f"pathology: output {out} cannot be written: Read-only file system; ")
    assert opened == []


def test_shares_of_the_slides_are_all_of_them_and_none_twice(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for n in range(5):
        write_tiff(folder / f"s{n}.svs", [smooth_pixels(64, 64, seed=n)])
    shares = []
    for n in (1, 2):
        done = run(folder, "--out", tmp_path / f"out{n}", "--shard", f"{n}/2")
        assert done.exit_code == 0, done.output
        shares.append(set(rows(tmp_path / f"out{n}")))
    assert [len(share) for share in shares] == [3, 2]
    assert len(shares[0] | shares[1]) == 5


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0"])
def test_a_share_that_there_is_not_is_refused(shard: str, slide: Path, tmp_path: Path) -> None:
    done = run(slide, "--out", tmp_path / "out", "--shard", shard)
    assert done.exit_code == 2
    assert f"{shard!r} is no share; write 1/4 for the first of four, up to 4/4" in " ".join(done.output.split())


def test_shares_follow_ids_and_keep_the_order_in_which_slides_come() -> None:
    entries = [SlideEntry(Path(name), name, Path()) for name in ("d", "a", "c", "b", "e")]
    shares = [[entry.slide_id for entry in share(entries, n, 3)] for n in (1, 2, 3)]
    assert shares == [["d", "a"], ["b", "e"], ["c"]]
    assert share(entries, 4, 9)[0].slide_id == "d"
    assert share(entries, 9, 9) == []


def test_a_share_without_slides_ends_well(slide: Path, tmp_path: Path) -> None:
    done = run(slide, "--out", tmp_path / "out", "--shard", "2/2")
    assert done.exit_code == 0, done.output
    assert "0 of 0 done" in done.output


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_tells_whom_a_run_waits_for(form: str, slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (entry,) = find_slides([slide])
    folder = out / ".work" / entry.slide_id / "000000000000-123-456-0"
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps({"token": folder.name, "host": "node7", "pid": 123}))
    done = run(slide, "--out", out, "--lease", "1", "--log-format", form)
    assert done.exit_code == 0, done.output
    if form == "text":
        assert f"waits for process 123 on node7: slide {entry.slide_id}" in done.output.splitlines()
    else:
        (said,) = [line for line in map(json.loads, done.output.splitlines()) if line["event"] == "waiting"]
        assert said == {"event": "waiting", "slide": str(slide), "id": entry.slide_id, "for": "process 123 on node7"}


def failure(job: Job) -> Outcome:
    return Outcome(job, "failed", reason=Reason.TRUNCATED, message="cut")


def test_a_failure_is_found_whoever_owns_the_slide(slide: Path, tmp_path: Path) -> None:
    job = Job(slide=str(slide), slide_id="s", root=str(slide), model=MODEL, out=str(tmp_path))
    theirs = replace(job, owner="another")
    (job.work_place / "another").mkdir(parents=True)
    write_failure(failure(theirs), "mean-colour")
    assert read_failure(job, "mean-colour") == replace(failure(job), before=True)
    assert read_failure(replace(job, min_tissue=0.5), "mean-colour") is None
    assert len(write_summary(tmp_path).read_text().splitlines()) == 2
    write_failure(failure(replace(job, slide_id="lost", owner="gone")), "mean-colour")
    assert not (tmp_path / ".work" / "lost").exists()


def test_with_retry_only_a_failure_that_another_meets_meanwhile_stands(slide: Path, tmp_path: Path) -> None:
    job = Job(slide=str(slide), slide_id="s", root=str(slide), model=MODEL, out=str(tmp_path))
    names = {MODEL: "mean-colour"}
    write_failure(failure(job), "mean-colour")
    assert known_failures([job], names, retry=False)(job) is not None
    known = known_failures([job], names, retry=True)
    assert known(job) is None
    write_failure(failure(job), "mean-colour")
    assert known(job) == replace(failure(job), before=True)


def test_a_row_that_comes_while_the_summary_is_written_is_not_lost(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(slide=str(slide), slide_id=name, root=str(slide), model=MODEL, out=str(tmp_path)) for name in "abc"]
    write_failure(failure(jobs.pop()), "mean-colour")
    write = summary.write_file

    def another_ends(path: Path, data: bytes) -> None:
        write(path, data)
        if path.name == "summary.csv" and jobs:
            write_failure(failure(jobs.pop()), "mean-colour")

    monkeypatch.setattr(summary, "write_file", another_ends)
    assert [line.split(",")[1] for line in write_summary(tmp_path).read_text().splitlines()] == ["id", "a", "b", "c"]


@pytest.mark.fault("S32")
@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_names_that_are_no_text_run(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_tiff(folder / "plain.svs", [smooth_pixels(128, 128)])
    names = [b"sp ace.svs", b"new\nline.svs", b"quote'\".svs", b"-dash.svs", b"\xff.svs", "ärztin.svs".encode()]
    for name in names:
        shutil.copy(folder / "plain.svs", os.path.join(os.fsencode(folder), name))  # noqa: PTH118  # bytes, which Path is not
    done = run(folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert len(manifests(tmp_path / "out")) == 1 + len(names)


@pytest.mark.slow
@pytest.mark.parametrize("asked_by", ["sigterm to the command", "ctrl-c in a terminal"])
@pytest.mark.fault("F04")
def test_a_signal_drains_and_the_same_command_goes_on(asked_by: str, tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(1200, 1200)])
    command = [sys.executable, "-m", "pipelines.cli", "run", str(slide), "--tissue", "none", "--batch-size", "4"]
    command += ["--model", "pathology.testing:mean_colour?tile_px=16&mpp=0.5"]
    undisturbed = subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True, text=True, check=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not any(e["event"] == "region-done" for e in read_events(out)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    if asked_by.startswith("ctrl-c"):
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to workers as well
    else:
        process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert time.monotonic() - asked < 12
    assert not manifests(out)
    assert subprocess.run([*command, "--out", str(out)], capture_output=True, check=False).returncode == 0
    assert manifests(out) == manifests(tmp_path / "whole")
    done = [(e["region"]) for e in read_events(out) if e["event"] == "region-done"]
    assert len(done) == len(set(done))


def test_exports_are_of_what_can_be_and_refused_before_anything_runs_where_nothing_can(slide: Path, tmp_path: Path) -> None:
    dense, tiles = "pathology.testing:identity?tile_px=64", ("--model", "pathology.testing:mean_colour?tile_px=64")
    done = run(slide, "--export", "qupath", "--out", tmp_path / "none", model=dense)
    assert done.exit_code == 2
    assert "identity?tile_px=64 (map) cannot be written as qupath; leave out --export qupath" in done.output
    assert not (tmp_path / "none" / "slides").exists()
    done = run(slide, *tiles, "--export", "qupath", "--out", tmp_path / "out", model=dense)
    assert done.exit_code == 0, done.output
    assert {path.parent.name for path in (tmp_path / "out").rglob("tiles.geojson")} == {"mean-colour"}
    exported = pathology("export", tmp_path / "out", "--to", "csv")
    assert exported.exit_code == 0, exported.output
    assert "holds a dense map, which cannot be written as csv; use png, ngff-0.4" in exported.output
    assert exported.output.count("tiles.csv") == 1


@pytest.mark.parametrize("overlap", ["nan", "inf"])
def test_an_overlap_that_is_no_number_is_one_line(overlap: str, slide: Path, tmp_path: Path) -> None:
    done = run(slide, "--overlap", overlap, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"overlap {overlap} is no number" in done.output


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--lease", "nan", "'nan' is no number"),
        ("--read-timeout", "nan", "'nan' is no number"),
        ("--region-timeout", "inf", "'inf' is no number"),
        ("--stage-size", "inf", "'inf' is no number"),
        ("--limit", "-1", "-1 is not in the range x>=1"),
        ("--limit", "0", "0 is not in the range x>=1"),
        ("--max-failures", "-1", "-1 is not in the range x>=0"),
        ("--allow-failures", "-1", "-1 is not in the range x>=0"),
        ("--dashboard", "abc", "'abc' is not a valid integer"),
        ("--out", "", "'' names no folder"),
        ("--stage", "", "'' names no folder"),
        ("--out", "loop", "Too many levels of symbolic links"),
        ("--out", "x" * 300, "File name too long"),
        ("--slide-mpp", "nan", "nan"),
        ("--overlap", "nan", "nan"),
        ("--heatmap-mpp", "nan", "nan"),
        ("--min-tissue", "nan", "nan"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    option: str, value: str, said: str, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    done = run(slide, "--out", "out", option, value)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "status out --watch nan",
        "models check x --tiles . --expected x.csv --tolerance nan",
    ],
)
def test_no_number_is_no_value_of_other_commands_either(command: str) -> None:
    done = pathology(*command.split())
    assert done.exit_code == 2, done.output
    assert "'nan'" in done.output
    assert "Invalid value" in done.output


def test_a_table_that_cannot_be_written_is_a_line(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "summary.csv").mkdir(parents=True)
    done = run(slide, "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert [line for line in done.output.splitlines() if "Is a directory" in line] == done.output.splitlines()[-1:]


@pytest.mark.fault("F10")
def test_an_output_that_vanishes_is_not_begun_anew(slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def unmounted(_: object, needed: int) -> str:
        shutil.rmtree(out)
        out.mkdir()
        raise EnvironmentFault("the output is gone")

    monkeypatch.setattr(Room, "lack", lambda room, needed: unmounted(room, needed) if (out / "events").exists() else "")
    done = run(slide, "--out", out)
    assert done.exit_code == 3
    assert list(out.iterdir()) == []
