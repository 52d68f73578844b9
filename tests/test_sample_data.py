"""The synthetic slide is what it claims: an Aperio file, an honest truth, and a region that only nuclei give away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from sample_data import generate as g

SAMPLES = Path(g.__file__).parent
SIZE, SEED = 1307, 5  # no multiple of a tile, a block or a downsample


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, g.Truth]:
    path = tmp_path_factory.mktemp("made") / "made.svs"
    return path, g.make_slide(path, SIZE, SEED)


@pytest.fixture
def slide(made: tuple[Path, g.Truth]) -> Iterator[openslide.OpenSlide]:
    with openslide.OpenSlide(made[0]) as slide:
        yield slide


def level_pixels(slide: openslide.OpenSlide, level: int) -> NDArray[np.uint8]:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def test_openslide_opens_it_as_an_aperio_scan(slide: openslide.OpenSlide) -> None:
    assert slide.properties["openslide.vendor"] == "aperio"
    assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == g.MPP
    assert slide.properties["openslide.objective-power"] == "20"
    assert slide.level_dimensions == ((1307, 1307), (326, 326), (81, 81))
    assert slide.properties["openslide.level[0].tile-width"] == "240"
    assert slide.associated_images["thumbnail"].size == (81, 81)


def test_levels_are_area_means_of_level_0_and_lie_where_they_should(tmp_path: Path) -> None:
    """In luma at the best quality, where chroma subsampling and quantisation do not hide half a grey level."""
    g.make_slide(tmp_path / "fine.svs", SIZE, SEED, quality=100)
    with openslide.OpenSlide(tmp_path / "fine.svs") as slide:
        luma = [level_pixels(slide, level) @ np.array([0.299, 0.587, 0.114]) for level in range(3)]
    for level, factor in ((1, 4), (2, 16)):
        side = SIZE // factor
        expected = luma[0][: side * factor, : side * factor].reshape(side, factor, side, factor).mean(axis=(1, 3))
        assert np.abs(luma[level] - expected).mean() < 0.5
        assert np.abs(luma[level][1:, 1:] - expected[:-1, :-1]).mean() > 5


def test_all_of_the_slide_is_drawn(slide: openslide.OpenSlide) -> None:
    pixels = level_pixels(slide, 0)
    assert pixels.min(axis=2)[-40:, -40:].min() > 225  # glass to the corner, not the padding of an unfinished tile
    assert 0.25 < (np.ptp(pixels, axis=2) > 30).mean() < 0.6  # tissue


def test_size_and_seed_decide_every_byte(made: tuple[Path, g.Truth], tmp_path: Path) -> None:
    again = g.make_slide(tmp_path / "again.svs", SIZE, SEED)
    assert (tmp_path / "again.svs").read_bytes() == made[0].read_bytes()
    np.testing.assert_array_equal(again.nuclei, made[1].nuclei)
    assert not np.array_equal(g.make_layout(SIZE, SEED + 1).region, again.region)


def test_nuclei_are_where_the_truth_says(made: tuple[Path, g.Truth], slide: openslide.OpenSlide) -> None:
    pixels, truth = level_pixels(slide, 0).astype(float), made[1]
    red = pixels[..., 0]  # stroma hardly absorbs red, nuclei do

    def around(y: int, x: int) -> float:
        return float(red[y - 2 : y + 2, x - 2 : x + 2].mean())

    assert len(truth.nuclei) > 150
    assert np.mean([around(y, x) < 140 for y, x in truth.nuclei]) > 0.99
    rng = np.random.default_rng(0)
    free = [p for p in rng.integers(30, SIZE - 30, (3000, 2)) if np.hypot(*(truth.nuclei - p).T).min() > g.NUCLEUS_REACH_PX]
    assert np.mean([around(y, x) > 150 for y, x in free]) > 0.99


def test_drawn_area_is_the_ellipses_area() -> None:
    bank = g.make_bank(np.random.default_rng(0))
    per_diameter = len(g.ELONGATIONS) * g.ANGLES
    assert len(bank) == len(g.DIAMETERS_PX) * per_diameter
    for i, diameter in enumerate(g.DIAMETERS_PX):
        drawn = np.mean([(mask > 0.35).sum() for mask in bank[i * per_diameter : (i + 1) * per_diameter]])
        assert drawn == pytest.approx(np.pi / 4 * diameter**2, rel=0.12)


def test_nothing_but_nuclei_tells_the_region() -> None:
    """Without its nuclei the slide is the same wherever the region lies; and single nuclei follow one law in and out."""
    layout, texture = g.make_layout(SIZE, SEED), g.make_texture(np.random.default_rng(1))
    bank, palette = g.make_bank(np.random.default_rng(2)), g.make_palette()
    moved = replace(layout, region=layout.region // 3)
    none = g.Nuclei(
        g.Truth(SIZE, layout.region, np.empty((0, 2), np.int64), np.empty(0), np.empty(0, bool)),
        np.empty(0, np.intp),
        np.empty(0, np.float32),
    )
    bare = [g.render(where, texture, bank, none, palette, 0, 0) for where in (layout, moved)]
    np.testing.assert_array_equal(*bare)

    nuclei = g.place_nuclei(g.make_layout(4000, 1), texture, bank, np.random.default_rng(3))
    inside = nuclei.truth.planted
    elongation = g.ELONGATIONS[nuclei.mask // g.ANGLES % len(g.ELONGATIONS)]
    assert nuclei.stain[inside].mean() == pytest.approx(nuclei.stain[~inside].mean(), rel=0.03)
    assert elongation[inside].mean() == pytest.approx(elongation[~inside].mean(), rel=0.03)
    assert nuclei.truth.area_um2[inside].mean() > 1.8 * nuclei.truth.area_um2[~inside].mean()


@pytest.mark.parametrize("seed", range(12))
def test_every_seed_has_its_region_well_inside_tissue(seed: int) -> None:
    size = 12000
    layout = g.make_layout(size, seed)
    y, x = (np.arange(40, size, 80.0) for _ in range(2))
    tissue = layout.depth(y[:, None], x[None, :]) > 0
    rows, cols = (a.ravel() for a in np.meshgrid(y, x, indexing="ij"))
    region = g._inside(layout.region, rows, cols).reshape(tissue.shape)
    depth = layout.pieces[0].depth(*layout.region.T.astype(float))
    assert depth.min() > 0.02 * size  # between the region and glass
    assert 0.08 < (region & tissue).sum() / tissue.sum() < 0.14
    assert tissue[0].sum() + tissue[-1].sum() + tissue[:, 0].sum() + tissue[:, -1].sum() == 0


def test_polygon_test_and_centroid_by_hand() -> None:
    square = np.array([[2, 2], [2, 6], [10, 6], [10, 2]])
    y, x = np.array([3.0, 9.0, 1.0, 5.0, 11.0]), np.array([3.0, 5.0, 3.0, 7.0, 5.0])
    assert g._inside(square, y, x).tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(g._centroid(square), [6, 4])


def test_a_slide_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size 600 px leaves no room for tissue; use 640 or more"):
        g.make_slide(tmp_path / "small.svs", 600, 0)
    assert not (tmp_path / "small.svs").exists()


def read_truth(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Region (y, x), nuclei (y, x), areas."""
    features = json.loads(path.read_text())["features"]
    assert features[0]["properties"]["classification"]["name"] == "Tumour-like"
    ring = features[0]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    points = [f["geometry"]["coordinates"] for f in features[1:]]
    areas = [f["properties"]["measurements"]["area_um2"] for f in features[1:]]
    return np.array(ring[:-1])[:, ::-1], np.array(points)[:, ::-1], np.array(areas)


def test_truth_round_trips_through_geojson(made: tuple[Path, g.Truth], tmp_path: Path) -> None:
    truth = made[1]
    g.write_truth(tmp_path / "t.geojson", truth)
    region, nuclei, areas = read_truth(tmp_path / "t.geojson")
    np.testing.assert_array_equal(region, truth.region)
    np.testing.assert_array_equal(nuclei, truth.nuclei)
    np.testing.assert_allclose(areas, truth.area_um2, atol=0.051)


def test_the_region_is_found_by_nuclei_and_not_by_stroma() -> None:
    """On the committed slide, with a haematoxylin measure that shares nothing with the project's models."""
    tile = 125
    region, _, _ = read_truth(SAMPLES / "sample.geojson")
    with openslide.OpenSlide(SAMPLES / "sample.svs") as slide:
        pixels = level_pixels(slide, 0)
    n = pixels.shape[0] // tile
    tiles = pixels.reshape(n, tile, n, tile, 3).swapaxes(1, 2).reshape(n * n, -1, 3)
    tissue, nuclear = np.ptp(tiles, axis=2) > 30, tiles[..., 0] < 130
    chosen = np.flatnonzero(tissue.mean(axis=1) > 0.5)
    share = (nuclear.sum(axis=1) / np.maximum(tissue.sum(axis=1), 1))[chosen]
    plain = tissue & (tiles[..., 0] > 190)
    stroma = np.array([tiles[i][plain[i]].mean() for i in chosen])
    y, x = (chosen // n + 0.5) * tile, (chosen % n + 0.5) * tile
    label = g._inside(region, y, x)

    assert roc_auc_score(label, share) > 0.98
    hot = np.argsort(-share)[: len(share) // 20]
    assert label[hot].all()
    assert np.hypot(y[hot].mean() - y[label].mean(), x[hot].mean() - x[label].mean()) < tile
    assert stroma[label].mean() == pytest.approx(stroma[~label].mean(), rel=0.02)


def test_what_is_committed_is_small() -> None:
    assert sum((SAMPLES / name).stat().st_size for name in ("sample.svs", "sample.geojson")) < 3e6


@pytest.mark.slow
def test_the_documented_command_makes_the_committed_sample(tmp_path: Path) -> None:
    """Pixels, not bytes: another libjpeg or another processor may round the odd grey level otherwise."""
    command = next(
        line.strip() for line in (SAMPLES / "README.md").read_text().splitlines() if "sample_data/sample.svs" in line
    )
    words = command.replace("sample_data/sample.", f"{tmp_path}/sample.").split()
    subprocess.run([sys.executable, *words[1:]], check=True, cwd=SAMPLES.parent)
    for new, old in zip(read_truth(tmp_path / "sample.geojson"), read_truth(SAMPLES / "sample.geojson"), strict=True):
        np.testing.assert_array_equal(new, old)
    with openslide.OpenSlide(tmp_path / "sample.svs") as new, openslide.OpenSlide(SAMPLES / "sample.svs") as old:
        assert new.level_dimensions == old.level_dimensions
        for level in range(3):
            difference = np.abs(level_pixels(new, level).astype(int) - level_pixels(old, level))
            assert difference.mean() < 0.05
