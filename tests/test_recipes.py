"""Recipes: defaults of a run from a file, checked as if typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import run
from pipelines.recipes import known_recipes, read_recipe
from tests.commands import invoke
from tests.slides import noise_pixels, write_tiff

MODEL = "pathology.testing:mean_colour?tile_px=40&mpp=2"


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "s.tiff", [noise_pixels(200, 200)], mpp=2.0)


def recipe(folder: Path, *lines: str) -> Path:
    (folder / "r.toml").write_text("\n".join(["schema = 1", *lines]) + "\n")
    return folder / "r.toml"


def result_of(out: Path) -> dict[str, object]:
    (record,) = out.glob("slides/*/*/result.json")
    fields: dict[str, object] = json.loads((record.parent / "manifest.json").read_text())["fields"]
    return fields


def test_a_recipe_is_the_whole_of_a_run_but_slides_and_output(slide: Path, tmp_path: Path) -> None:
    lines = (
        f'model = "{MODEL}"',
        "overlap = 0.5",
        'tissue = "none"',
        'scheduler = "sync"',
        'memory = "512M"',
        'export = ["csv"]',
    )
    file = recipe(tmp_path, *lines)
    done = invoke("run", "--recipe", file, slide, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    fields = result_of(tmp_path / "out")
    assert (fields["stride_px"], fields["tissue"]) == (20, "none")
    assert list((tmp_path / "out").glob("slides/*/*/tiles.csv"))


def test_the_command_line_comes_first_wherever_it_stands(slide: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, f'model = ["{MODEL}"]', "overlap = 0.5", 'tissue = "none"', "scheduler = 'sync'")
    done = invoke("run", "--overlap", 0, slide, "--out", tmp_path / "out", "--recipe", file)
    assert done.exit_code == 0, done.output
    assert result_of(tmp_path / "out")["stride_px"] == 40


def test_check_takes_what_it_has_of_a_recipe(slide: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, f'model = "{MODEL}"', "overlap = 0.5", 'tissue = "none"', 'scheduler = "sync"')
    done = invoke("check", "--recipe", file, slide, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["tiles"] == 81


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("overlpa = 1", "overlpa is no option of pathology run; take it out"),
        ('out = "x"', "out is given with the command, not in a recipe"),
        ("overwrite = true", "overwrite is given with the command"),
        ("overlap = [1, 2]", "overlap = [1, 2] is not what --overlap takes"),
        ('overlap = "much"', "'much' is not a valid float"),
        ('precision = "fp64"', "'fp64' is not one of 'fp32'"),
        ("model = 3", "model = 3 is not what --model takes"),
        ("schema = 2", "is no TOML"),
        ("overlap = ", "is no TOML"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused(slide: Path, tmp_path: Path, line: str, message: str) -> None:
    done = invoke("run", "--recipe", recipe(tmp_path, line), "--model", MODEL, slide, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_another_schema_or_none_is_refused(slide: Path, tmp_path: Path) -> None:
    for content in ("schema = 2", "overlap = 0"):
        (tmp_path / "r.toml").write_text(content)
        done = invoke("run", "--recipe", tmp_path / "r.toml", "--model", MODEL, slide, "--out", tmp_path / "out")
        assert done.exit_code == 2
        assert "this program knows 1" in done.output


def test_a_recipe_that_is_not_there_names_those_that_are(slide: Path, tmp_path: Path) -> None:
    done = invoke("run", "--recipe", "nuclei", "--model", MODEL, slide, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert (
        "recipe nuclei is neither known (efficientnet-lite0, nuclei-density, prostate-glands, wsinfer-classifier) nor a file"
        in done.output
    )


def test_every_recipe_that_comes_along_is_understood() -> None:
    names = dict(known_recipes())
    assert {"efficientnet-lite0", "nuclei-density", "prostate-glands", "wsinfer-classifier"} <= names.keys()
    for name, description in names.items():
        assert read_recipe(name, run)
        assert description
        assert f"{name:<24} {description}" in invoke("recipes").output


def test_the_nuclei_recipe_runs_on_the_sample(tmp_path: Path) -> None:
    sample = Path(__file__).parent.parent / "sample_data/sample.svs"
    done = invoke("run", "--recipe", "nuclei-density", sample, "--out", tmp_path / "out", "--scheduler", "sync")
    assert done.exit_code == 0, done.output
    assert result_of(tmp_path / "out")["min_tissue"] == 0.25
    assert list((tmp_path / "out").glob("slides/*/nuclei-density/heatmap-*.png"))
