"""Heatmap pixels lie where their tiles were read, to within half a level-0 pixel, out to the far corner of a wide slide.

The slide's colours are triangle waves with a slope of 4 grey levels a pixel, so a tile's mean colour tells where its pixels
came from to a fraction of a pixel, wherever no fold of the wave is near.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from slides import write_tiff

from pathology import Job, open_slide
from pathology.export.qupath import write_qupath
from pathology.export.table import read_parquet
from pathology.geometry import Box
from pathology.model import ReadRule
from pathology.resample import tile_window
from pathology.result import open_heatmap
from pathology.runner import run

HEIGHT, WIDTH = 62, 60_000
SLOPE, HALF = 4.0, 63  # grey levels a px; px from fold to fold
SLIDE_MPP, TILE_PX = 0.5, 12
RATIOS = (1.0, 2.0, 1.987, 0.73)
MARGIN = 4.0  # px beside a tile that a resize may look at


def wave(position: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    """The triangle wave at continuous positions; folds at shift + k * HALF."""
    return SLOPE * np.abs((position - shift + HALF) % (2 * HALF) - HALF)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue waves along x, half a fold apart, so that one of them is straight anywhere; green along y."""
    x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
    levels = []
    for k in (1, 2):
        xs, ys = (a.reshape(-1, k) for a in (x, y))
        across = [wave(xs, shift).mean(axis=1) for shift in (0.0, HALF / 2)]
        pixels = np.empty((HEIGHT // k, WIDTH // k, 3), np.uint8)
        pixels[..., 0], pixels[..., 2] = (np.round(a)[None, :] for a in across)
        pixels[..., 1] = np.round(wave(ys, 0.0).mean(axis=1))[:, None]
        levels.append(pixels)
    return write_tiff(tmp_path_factory.mktemp("wide") / "wide.svs", levels, mpp=SLIDE_MPP)


def result_of(slide: Path, ratio: float, out: Path) -> Path:
    model = f"pathology.testing:mean_colour?tile_px={TILE_PX}&mpp={SLIDE_MPP * ratio}"
    job = Job(
        slide=str(slide),
        slide_id="wide",
        root=str(slide),
        model=model,
        out=str(out),
        tissue="none",
        min_tissue=0.0,
        batch_size=256,
    )
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok"
    return out / "slides" / "wide" / "mean-colour"


def off_by(centres: NDArray[np.float64], scores: NDArray[np.float64], side: float) -> NDArray[np.float64]:
    """(n, 2) how far in level-0 px y, x tiles of these mean colours were read from their claimed centres; NaN at folds."""
    reach = side / 2 + MARGIN
    y, x = centres.T
    errors = np.full((3, len(centres)), np.nan)
    # Beside the slide all is white, in every channel.
    inside = (y > reach) & (y < HEIGHT - reach) & (x > reach) & (x < WIDTH - reach)
    for channel, position, shift in ((0, x, 0.0), (1, y, 0.0), (2, x, HALF / 2)):
        to_fold = np.abs((position - shift + HALF / 2) % HALF - HALF / 2)
        straight = (to_fold > reach) & inside
        errors[channel, straight] = np.abs(scores[straight, channel] - wave(position[straight], shift)) / SLOPE
    return np.stack([errors[1], np.fmax(errors[0], errors[2])], axis=1)


@pytest.mark.parametrize("ratio", RATIOS)
def test_centres_read_back_lie_where_tiles_were_read(slide: Path, ratio: float, tmp_path: Path) -> None:
    folder, side = result_of(slide, ratio, tmp_path), TILE_PX * ratio
    attributes = json.loads((folder / "heatmap.ome.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    scale, translation = attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert (scale["type"], translation["type"]) == ("scale", "translation")
    heatmap = open_heatmap(folder)
    height, width = heatmap.level_shape(0)
    values = heatmap.read(0, Box(0, 0, height, width)).reshape(3, -1).T.astype(np.float64)
    index = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    # NGFF counts um from the centre of the slide's first pixel.
    from_ngff = (index * scale["scale"][1:] + translation["translation"][1:]) / SLIDE_MPP + 0.5

    table = read_parquet(folder / "tiles.parquet")
    from_table = np.stack([table.miny + table.height / 2, table.minx + table.width / 2], axis=1)

    write_qupath(tmp_path / "tiles.geojson", table, heatmap.spec, "f", None)
    features = json.loads((tmp_path / "tiles.geojson").read_text())["features"]
    corners = np.array([f["geometry"]["coordinates"][0][:4] for f in features], np.float64)
    from_geojson = corners.mean(axis=1)[:, ::-1]
    measured = np.array([[f["properties"]["measurements"][c] for c in ("red", "green", "blue")] for f in features])

    for centres, scores, allowed in (
        (from_ngff, values, 0.2),
        (from_table, table.scores.astype(np.float64), 0.5),
        (from_geojson, measured, 0.5),
    ):
        errors = off_by(centres, scores, side)
        tested = ~np.isnan(errors)
        assert tested[:, 0].sum() > 1000
        assert tested[:, 1].sum() > 1000
        assert centres[tested[:, 1], 1].max() > WIDTH - 150
        # Parquet and GeoJSON have whole pixels: up to half of one, plus what 8-bit colours leave uncertain.
        assert np.nanmax(errors) < allowed + (0.0 if allowed < 0.5 else 0.12)
        if allowed == 0.5:
            assert np.abs(centres - from_ngff[: len(centres)]).max() < 0.5


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_read_window_is_exact(slide: Path, ratio: float) -> None:
    """Windows against exact fractions: floor(origin) - margin to ceil(end) + margin, the crop unrounded inside."""
    with open_slide(slide) as opened:
        info = opened.info
    side = TILE_PX * ratio
    level = 1 if ratio * 1.01 >= 2 else 0
    downsample = (1, 2)[level]
    scale = Fraction(side) / TILE_PX / downsample
    columns = [*range(200), *range(int(WIDTH / side) - 200, int(WIDTH / side) + 1)]
    for column in columns:
        origin = (0.0, column * TILE_PX * ratio)
        window = tile_window(info, origin, (side, side), (TILE_PX, TILE_PX), ReadRule())
        start = Fraction(origin[1]) / downsample
        end = Fraction(origin[1] + side) / downsample
        whole = scale == 1 and start.denominator == 1
        margin = 0 if whole else math.ceil(max(scale, 1))
        assert window.level == level
        assert window.box.x == math.floor(start) - margin
        assert window.box.x1 == math.ceil(end) + margin
        assert window.crop[1] == pytest.approx(float(start - window.box.x), abs=1e-9)
        assert window.crop[3] == pytest.approx(float(end - window.box.x), abs=1e-9)
