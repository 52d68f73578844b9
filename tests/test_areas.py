"""Areas from files: polygons and pictures as masks, through the whole command, and what of them is refused."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

import pathology
from pathology.areas import file_sha256, fill, read_tissue, within
from pathology.errors import Reason, SlideError, UsageError
from pathology.geometry import Box
from pathology.model import ModelSpec
from pathology.slide import SlideInfo
from pathology.tissue import TissueMask
from pipelines.cli import main
from pipelines.config import Settings, tissue_settings
from tests.slides import noise_pixels, write_tiff

HEIGHT, WIDTH, MPP, TILE = 400, 600, 2.0, 40


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_tiff(tmp_path / "s.tiff", [noise_pixels(HEIGHT, WIDTH)], mpp=MPP)


@pytest.fixture
def info(slide: Path) -> SlideInfo:
    with pathology.open_slide(slide) as opened:
        return opened.info


def square(y: float, x: float, side: float) -> list[list[float]]:
    """A closed ring in x, y."""
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def write(path: Path, *polygons: list[list[list[float]]], **more: Any) -> Path:
    features = [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": p}} for p in polygons]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return path


# Polygons


def inside(y: float, x: float, ring: NDArray[np.float64]) -> bool:
    """Whether a ray from (y, x) to the right crosses `ring` an odd number of times."""
    odd = False
    for (y0, x0), (y1, x1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) > x:
            odd = not odd
    return odd


@given(hnp.arrays(np.float64, st.tuples(st.integers(3, 9), st.just(2)), elements=st.integers(-6, 40).map(lambda n: n / 3)))
def test_a_pixel_is_inside_if_its_centre_is(ring: NDArray[np.float64]) -> None:
    expected = [[inside(y + 0.5, x + 0.5, ring) for x in range(9)] for y in range(11)]
    near = np.zeros((11, 9), bool)  # centres on an edge go by rounding
    for (y0, x0), (y1, x1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        for y in range(11):
            if y0 != y1 and min(y0, y1) <= y + 0.5 <= max(y0, y1):
                at = x0 + (y + 0.5 - y0) * (x1 - x0) / (y1 - y0) - 0.5
                if abs(at - round(at)) < 1e-9 and 0 <= round(at) < 9:
                    near[y, round(at)] = True
    np.testing.assert_array_equal(fill((11, 9), [ring])[~near], np.array(expected)[~near])


def test_a_hole_is_outside() -> None:
    rings = [np.array(square(0, 0, 6))[:, ::-1], np.array(square(2, 2, 2))[:, ::-1]]
    expected = np.ones((6, 6), bool)
    expected[2:4, 2:4] = False
    np.testing.assert_array_equal(fill((6, 6), rings), expected)


def test_polygons_of_every_kind_of_export(tmp_path: Path, info: SlideInfo) -> None:
    ring = square(80, 160, 120)
    polygon = {"type": "Polygon", "coordinates": [ring]}
    feature = {"type": "Feature", "geometry": polygon}
    multi = {"type": "MultiPolygon", "coordinates": [[ring], [square(300, 0, 40)]]}
    masks = {}
    for name, content in {
        "collection": {"type": "FeatureCollection", "features": [feature]},
        "list": [feature],
        "feature": feature,
        "polygon": polygon,
        "geometries": {"type": "GeometryCollection", "geometries": [polygon]},
        "multi": multi,
    }.items():
        (tmp_path / f"{name}.geojson").write_text(json.dumps(content))
        masks[name] = read_tissue(tmp_path / f"{name}.geojson", info)
    area = 120**2 * MPP**2 / 1e6
    for name in ("collection", "list", "feature", "polygon", "geometries"):
        assert masks[name].area_mm2 == pytest.approx(area)
    assert masks["multi"].area_mm2 == pytest.approx(area + 40**2 * MPP**2 / 1e6)


def test_overlapping_polygons_are_one_area(tmp_path: Path, info: SlideInfo) -> None:
    both = write(tmp_path / "a.geojson", [square(0, 0, 80)], [square(0, 40, 80)])
    assert read_tissue(both, info).area_mm2 == pytest.approx(80 * 120 * MPP**2 / 1e6)


def test_qupath_counts_from_the_bounds_and_our_own_files_from_the_corner(tmp_path: Path, info: SlideInfo) -> None:
    info = replace(info, bounds=Box(40, 80, 200, 300))
    drawn = write(tmp_path / "a.geojson", [square(0, 0, 80)])
    ours = write(tmp_path / "b.geojson", [square(40, 80, 80)], tissue_mm2=1)
    expected = np.zeros((100, 150), bool)
    expected[10:30, 20:40] = True
    for path in (drawn, ours):
        np.testing.assert_array_equal(read_tissue(path, info).mask, expected)


def test_what_lies_beside_the_slide_is_cut_off(tmp_path: Path, info: SlideInfo) -> None:
    path = write(tmp_path / "a.geojson", [square(-1000, -1000, 1040)], [square(9000, 9000, 10)])
    assert read_tissue(path, info).area_mm2 == pytest.approx(40**2 * MPP**2 / 1e6)


def test_a_region_of_interest_cuts_tissue(tmp_path: Path, info: SlideInfo) -> None:
    tissue = TissueMask(np.ones((20, 30), bool), (20.0, 20.0), MPP, (HEIGHT, WIDTH), "otsu")
    cut = within(tissue, write(tmp_path / "a.geojson", [square(100, 200, 100)]), info)
    expected = np.zeros((20, 30), bool)
    expected[5:10, 10:15] = True
    np.testing.assert_array_equal(cut.mask, expected)
    assert cut.method == "otsu, roi"


# Pictures


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_all_but_black_is_tissue(tmp_path: Path, info: SlideInfo, mode: str) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 1
    if mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * 300)
    elif mode == "P":
        image = Image.fromarray(mask, "P")
        image.putpalette([0, 0, 0, 200, 10, 10])
    elif mode == "1":
        image = Image.fromarray(mask * 255).convert("1")
    else:
        image = Image.fromarray(mask * 7).convert(mode)
    image.save(tmp_path / "m.png")
    found = read_tissue(tmp_path / "m.png", info)
    np.testing.assert_array_equal(found.mask, mask > 0)
    assert found.l0_pixel == (10.0, 10.0)


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", b"{", "it is no GeoJSON"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": []}', "it holds no polygon"),
        ("a.geojson", b'{"type": "Point", "coordinates": [1, 2]}', "it holds a Point, which has no area: export polygons"),
        ("a.geojson", b'{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', "a ring needs three points"),
        ("a.geojson", b'{"type": "Polygon", "coordinates": [[[1, 2], [3, "x"], [1, 1]]]}', "a polygon is not understood"),
        ("a.geojson", b'{"type": "Polygon", "coordinates": [[[1, 2], [3, NaN], [1, 1]]]}', "a polygon is not understood"),
        ("a.geojson", b"\xff\xfe", "it is no GeoJSON"),
        ("a.geojson", b"[" * 100_000, "it is no GeoJSON"),
        (
            "a.geojson",
            b'{"type": "Polygon", "coordinates": [[[1, 2], [' + b"9" * 400 + b", 1], [1, 1]]]}",
            "a polygon is not understood",
        ),
        ("m.png", b"nothing", "it is no picture that can be read"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(
    tmp_path: Path, info: SlideInfo, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=message) as caught:
        read_tissue(tmp_path / name, info)
    assert caught.value.reason is Reason.BAD_MASK
    assert str(caught.value).startswith(f"mask or region of interest {name}: ")


@pytest.mark.parametrize("name", ["a.geojson", "m.png"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, info: SlideInfo, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for use in (lambda path: read_tissue(path, info), file_sha256):
        with pytest.raises(SlideError, match="it is no file"):
            use(tmp_path / name)


def test_the_mask_of_another_slide_is_refused(tmp_path: Path, info: SlideInfo) -> None:
    Image.new("L", (40, 60)).save(tmp_path / "m.png")
    with pytest.raises(SlideError, match=r"m\.png is 40 x 60 px, the slide 600 x 400: a mask shows the whole slide"):
        read_tissue(tmp_path / "m.png", info)


# Through the command


def invoke(slides: Path, out: Path, *more: str) -> Any:
    arguments = [str(slides), "--model", f"pathology.testing:mean_colour?tile_px={TILE}&mpp={MPP:g}", "--out", str(out)]
    return CliRunner().invoke(main, ["run", *arguments, "--scheduler", "sync", *more])


def inferred(out: Path) -> dict[str, NDArray[np.bool_]]:
    """Where each slide's heatmap has scores."""
    found = {}
    for record in sorted(out.glob("slides/*/*/result.json")):
        scores = pathology.open_heatmap(record.parent).levels[0].compute(scheduler="sync")
        found[record.parent.parent.name] = np.isfinite(scores[0])
    return found


def test_only_tiles_inside_are_inferred(slide: Path, tmp_path: Path) -> None:
    drawn = write(tmp_path / "a.geojson", [square(2 * TILE, 3 * TILE, 4 * TILE)])
    expected = np.zeros((HEIGHT // TILE, WIDTH // TILE), bool)
    expected[2:6, 3:7] = True
    for number, options in enumerate((["--tissue", str(drawn)], ["--tissue", "none", "--roi", str(drawn)])):
        out = tmp_path / f"out{number}"
        result = invoke(slide, out, *options)
        assert result.exit_code == 0, result.output
        (found,) = inferred(out).values()
        np.testing.assert_array_equal(found, expected)
        (tissue,) = out.glob("slides/*/tissue.geojson")
        assert json.loads(tissue.read_text())["tissue_mm2"] == pytest.approx((4 * TILE * MPP / 1000) ** 2)


def test_another_area_is_another_result(slide: Path, tmp_path: Path) -> None:
    drawn = write(tmp_path / "a.geojson", [square(0, 0, 200)])
    assert invoke(slide, tmp_path / "out", "--roi", str(drawn), "--tissue", "none").exit_code == 0
    (found,) = inferred(tmp_path / "out").values()
    assert found.sum() == 25
    again = invoke(slide, tmp_path / "out", "--roi", str(drawn), "--tissue", "none")
    assert "1 of 1 done" in again.output
    write(drawn, [square(0, 0, 80)])
    refused = invoke(slide, tmp_path / "out", "--roi", str(drawn), "--tissue", "none")
    assert refused.exit_code == 1
    assert "was made otherwise (roi " in refused.output
    assert invoke(slide, tmp_path / "out", "--roi", str(drawn), "--tissue", "none", "--overwrite").exit_code == 0
    (found,) = inferred(tmp_path / "out").values()
    assert found.sum() == 4


def test_a_slide_list_names_masks_and_regions(slide: Path, tmp_path: Path) -> None:
    write(tmp_path / "roi.geojson", [square(0, 0, 80)])
    mask = np.zeros((40, 60), np.uint8)
    mask[:4, :12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    rows = [("a", "mask.png", ""), ("b", "", "roi.geojson"), ("c", "gone.png", ""), ("d", "", "")]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide", "id", "mask", "roi"])
        table.writerows([slide.name, *row] for row in rows)
    result = invoke(tmp_path / "list.csv", tmp_path / "out", "--tissue", "none")
    assert result.exit_code == 1
    assert "bad_mask" in result.output
    assert "gone.png: there is no such file" in result.output
    counts = {name: int(found.sum()) for name, found in inferred(tmp_path / "out").items()}
    assert counts == {"a": 3, "b": 4, "d": (HEIGHT // TILE) * (WIDTH // TILE)}


def test_a_misspelt_method_is_refused_before_anything_runs(slide: Path, tmp_path: Path) -> None:
    result = invoke(slide, tmp_path / "out", "--tissue", "otsuu")
    assert result.exit_code == 2
    assert "tissue otsuu is neither otsu nor none nor a file" in result.output
    assert not (tmp_path / "out").exists()


# Results of other models


class Finder:
    """A dense model at 8 um per pixel that calls what is not white tissue; `classes` as asked."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.spec = ModelSpec(
            "finder", "ef" * 32, classes, mpp=8.0, tile_px=16, input_px=16, output_px=16, threshold=(0.75,) * len(classes)
        )

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        coloured = (tiles.min(axis=3) < 230).astype(np.float32)[:, None]
        coloured[(tiles == 7).all(axis=(1, 2, 3))] = np.nan  # such tiles it can make nothing of
        return np.concatenate([coloured if name != "glass" else 1 - coloured for name in self.spec.classes], axis=1)


def finder(classes: str = "tissue") -> Finder:
    return Finder(tuple(classes.split("-")))


def found_by(classes: str, slide: Path, out: Path) -> Path:
    """The folder of the result of such a model."""
    wanted = pathology.Job(
        slide=str(slide),
        slide_id="s",
        root=str(slide),
        model=f"tests.test_areas:finder?classes={classes}",
        out=str(out),
        tissue="none",
    )
    (outcome,) = pathology.run([wanted], "sync")
    assert outcome.status == "ok", outcome.message
    return wanted.result_folder("finder")


@pytest.mark.parametrize("classes", ["tissue", "nest", "glass-Tissue"])
def test_the_result_of_another_model_is_tissue(tmp_path: Path, classes: str) -> None:
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[100:220, 240:400] = (200, 80, 160)
    slide = write_tiff(tmp_path / "s.tiff", [pixels], mpp=MPP)
    folder = found_by(classes, slide, tmp_path / "out")
    with pathology.open_slide(slide) as opened:
        tissue = read_tissue(folder, opened.info)
    assert tissue.l0_pixel == (4.0, 4.0)
    expected = np.zeros((100, 150), bool)
    expected[25:55, 60:100] = True
    np.testing.assert_array_equal(tissue.mask, expected)
    assert tissue.method == "model finder"
    assert file_sha256(folder) == file_sha256(folder / "manifest.json")


def test_results_that_say_nothing_of_this_slides_tissue_are_refused(slide: Path, info: SlideInfo, tmp_path: Path) -> None:
    folder = found_by("nest-stroma", slide, tmp_path / "out")
    with pytest.raises(SlideError, match="model finder finds no tissue: it answers map of nest, stroma; use one"):
        read_tissue(folder, info)
    with pytest.raises(SlideError, match="is no heatmap"):
        read_tissue(tmp_path, info)
    other = write_tiff(tmp_path / "t.tiff", [noise_pixels(HEIGHT, WIDTH, 5)], mpp=MPP)
    with pathology.open_slide(other) as opened, pytest.raises(SlideError, match="it is the result of another slide"):
        read_tissue(found_by("tissue", slide, tmp_path / "out2"), opened.info)


def test_a_model_finds_tissue_first_and_one_slide_it_fails_on_fails_alone(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[100:220, 240:400] = (200, 80, 160)
    write_tiff(slides / "good.tiff", [pixels], mpp=MPP)
    write_tiff(slides / "masked.tiff", [pixels], mpp=MPP)
    write_tiff(slides / "dark.tiff", [np.full_like(pixels, 7)], mpp=MPP)
    (slides / "bad.tiff").write_bytes(b"II*\0 nothing more")
    Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    rows = [["slide", "mask"], ["good.tiff", ""], ["masked.tiff", "../mask.png"], ["bad.tiff", ""], ["dark.tiff", ""]]
    (slides / "list.csv").write_text("\n".join(",".join(row) for row in rows))
    common = ["--model", f"pathology.testing:mean_colour?tile_px={TILE}&mpp={MPP}", "--scheduler", "sync"]
    tissue = ["--tissue", "model:tests.test_areas:finder"]
    checked = CliRunner().invoke(main, ["check", str(slides / "list.csv"), *common[:2], *tissue])
    assert checked.exit_code == 1
    for _ in range(2):
        done = CliRunner().invoke(main, ["run", str(slides / "list.csv"), "--out", str(tmp_path / "out"), *common, *tissue])
        assert done.exit_code == 1, done.output
        assert done.output.startswith("tissue by finder:\n")
        assert "2 of 4 done, 2 failed or partial" in done.output
    with (tmp_path / "out" / "summary.csv").open() as file:
        summary = {row["id"].rpartition("-")[0]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in summary.items()} == {
        "good": "ok",
        "masked": "ok",
        "bad": "failed",
        "dark": "failed",
    }
    assert summary["bad"]["reason"] not in ("", "bad_mask")  # it is the slide that is at fault
    assert summary["dark"]["reason"] == "bad_mask"
    assert "finder: this model was to find the tissue, and failed" in summary["dark"]["message"]
    area_mm2 = 120 * 160 * MPP**2 / 1e6
    assert float(summary["good"]["tissue_mm2"]) == pytest.approx(area_mm2)
    assert float(summary["masked"]["tissue_mm2"]) != pytest.approx(area_mm2)
    with (tmp_path / "out" / "tissue" / "summary.csv").open() as file:
        found = {row["id"].rpartition("-")[0]: row["status"] for row in csv.DictReader(file)}
    assert found == {"good": "ok", "bad": "failed", "dark": "failed"}
    (manifest,) = (tmp_path / "out").glob("slides/good-*/mean-colour/manifest.json")
    (by,) = (tmp_path / "out").glob("tissue/slides/good-*/finder")
    assert json.loads(manifest.read_text())["fields"]["tissue"] == f"file {file_sha256(by)}"


def test_a_model_that_finds_no_tissue_is_refused_before_it_runs(slide: Path, tmp_path: Path) -> None:
    arguments = ["run", str(slide), "--model", "nuclei-density", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--tissue", "model:nuclei-density"])
    assert done.exit_code == 2
    assert "model nuclei-density finds no tissue: it answers classes of nuclei; use one" in done.output
    done = CliRunner().invoke(main, [*arguments, "--tissue", "modell"])
    assert "tissue modell is neither otsu nor none nor a file or a result's folder; give a mask picture" in done.output


def test_a_tissue_model_keeps_its_answers_on_one_raster() -> None:
    """Its margins ask for an overlap that its pixels do not divide: the next larger is taken."""
    spec = ModelSpec("t", "0" * 64, ("tissue",), 2.0, 100, 64, output_px=64, margin_px=1)
    settings = tissue_settings(Settings(out=Path("out"), tissue="model:t"), spec)
    assert (settings.overlap, settings.tissue, settings.out) == (25, "none", Path("out/tissue"))
    with pytest.raises(UsageError, match="which leave no stride; it cannot find tissue"):
        tissue_settings(settings, replace(spec, tile_px=64, margin_px=31, output_px=63))
