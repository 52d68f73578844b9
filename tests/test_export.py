"""Exports: tables, QuPath GeoJSON, pictures, colours."""

from __future__ import annotations

import csv
import io
import json
import struct
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pathology.errors import UsageError
from pathology.export.colormap import class_colors, colorize, hex_to_rgb, lookup_table
from pathology.export.png import heatmap_png, nice_length, overlay_l0_pixel, overlay_png
from pathology.export.qupath import classify, write_qupath
from pathology.export.table import TileTable, read_parquet, round_span, tile_table, write_csv, write_parquet
from pathology.geometry import Box, HeatmapFrame
from pathology.grid import TileGrid
from pathology.model import ModelSpec
from pathology.testing import array_slide

NAN = float("nan")

DENSITY = ModelSpec(
    "density", "0" * 64, ("nuclei",), 0.5, 64, 64, scores="value", units="per mm2", threshold=(3000.0,), display=(0, 6000)
)
THREE = ModelSpec("three", "1" * 64, ("benign", "tumor", "other"), 0.5, 64, 64, colors=("#00ff00", "#ff0000", "#102030"))
ONE = ModelSpec("one", "2" * 64, ("tumor",), 0.5, 64, 64)


def table_of(scores: list[list[float]], columns: tuple[str, ...]) -> TileTable:
    n = len(scores)
    place = np.arange(n, dtype=np.int64)
    size = np.full(n, 64, np.int64)
    return TileTable(
        place * 64, place * 32, size, size, np.linspace(0, 1, n, dtype=np.float32), np.array(scores, np.float32), columns
    )


# Tables


@given(
    size=st.floats(0.6, 3000) | st.integers(1, 4000).map(lambda n: n / 2),
    centres=st.lists(st.floats(-2000, 300_000) | st.integers(0, 10**6).map(lambda n: n / 4), min_size=1),
)
@settings(max_examples=300, deadline=None)
def test_rounded_spans_keep_their_centres_within_half_a_pixel(size: float, centres: list[float]) -> None:
    start, length = round_span(np.array(centres, np.float64), size)
    assert start.dtype == length.dtype == np.int64
    assert (np.abs(start + length / 2 - centres) < 0.5).all()
    assert (np.abs(length - size) <= 1.5).all()
    assert (length >= 1).all()


@given(
    mpp=st.floats(0.1, 2.0),
    slide_mpp=st.sampled_from([0.25, 0.2528, 0.499, 0.5, 1 / 3]),
    tile_px=st.integers(8, 300),
    overlap=st.floats(0, 0.9),
)
@settings(max_examples=100, deadline=None)
def test_table_centres_are_the_tiles_centres_to_the_far_corner(
    mpp: float, slide_mpp: float, tile_px: int, overlap: float
) -> None:
    grid = TileGrid((50_001, 60_003), slide_mpp, mpp, tile_px, max(4, round(tile_px * (1 - overlap))))
    rows, cols = grid.shape
    tiles = np.array([[0, 0], [1, 3], [rows // 2, cols // 3], [rows - 1, cols - 1]], np.int32)
    table = tile_table(grid, tiles, np.ones(4, np.float32), np.zeros((4, 1), np.float32), ("prob_tumor",))
    true = grid.l0_origins(tiles) + grid.l0_tile / 2
    assert (np.abs(table.miny + table.height / 2 - true[:, 0]) < 0.5).all()
    assert (np.abs(table.minx + table.width / 2 - true[:, 1]) < 0.5).all()


def test_whole_pixel_tiles_are_not_moved() -> None:
    grid = TileGrid((1000, 900), 0.25, 0.5, 64, 48)
    table = tile_table(grid, np.array([[0, 0], [2, 1]]), np.array([1, 0.5]), np.zeros((2, 1)), ("a",))
    assert table.miny.tolist() == [0, 192]
    assert table.minx.tolist() == [0, 96]
    assert table.width.tolist() == table.height.tolist() == [128, 128]


def test_parquet_gives_the_table_back_and_equal_bytes(tmp_path: Path) -> None:
    table = table_of([[0.1, NAN], [0.0, 1.0], [0.7, 3.5]], ("prob_a", "prob_b"))
    write_parquet(tmp_path / "tiles.parquet", table)
    write_parquet(tmp_path / "patient-name.parquet", table)
    data = (tmp_path / "tiles.parquet").read_bytes()
    assert data == (tmp_path / "patient-name.parquet").read_bytes()
    assert b"patient" not in data
    assert str(tmp_path).encode() not in data
    back = read_parquet(tmp_path / "tiles.parquet")
    assert back.columns == table.columns
    for field in ("minx", "miny", "width", "height", "coverage", "scores"):
        got, want = getattr(back, field), getattr(table, field)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_parquet_schema(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "tiles.parquet", table_of([[NAN]], ("prob_a",)))
    schema = pq.read_schema(tmp_path / "tiles.parquet")
    assert schema.names == ["minx", "miny", "width", "height", "coverage", "prob_a"]
    assert [str(t) for t in schema.types] == ["int64"] * 4 + ["float"] * 2
    assert schema.metadata[b"schema"] == b"1"
    assert set(schema.metadata) == {b"schema", b"units"}
    table = pq.read_table(tmp_path / "tiles.parquet")
    assert table["prob_a"].null_count == 0


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    empty = tile_table(
        TileGrid((100, 100), 0.5, 0.5, 64, 64), np.empty((0, 2), np.int32), np.empty(0), np.empty((0, 2)), ("a", "b")
    )
    write_parquet(tmp_path / "t.parquet", empty)
    back = read_parquet(tmp_path / "t.parquet")
    assert len(back) == 0
    assert back.scores.shape == (0, 2)
    write_csv(tmp_path / "t.csv", empty)
    assert (tmp_path / "t.csv").read_text() == "minx,miny,width,height,coverage,a,b\n"


def test_other_files_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    path.write_bytes(b"minx,miny\n")
    with pytest.raises(UsageError, match="no Parquet file"):
        read_parquet(path)
    pq.write_table(pa.table({"minx": [1]}), path)
    with pytest.raises(UsageError, match="no tile table of schema 1"):
        read_parquet(path)


def test_csv_holds_the_same_numbers_and_leaves_gaps_empty(tmp_path: Path) -> None:
    table = table_of([[0.1, NAN], [1e-7, 1.0], [0.0, 123456.789]], ("prob_a", "prob_b, odd"))
    write_csv(tmp_path / "t.csv", table)
    text = (tmp_path / "t.csv").read_bytes().decode()
    assert "\r" not in text
    header, *rows = csv.reader(io.StringIO(text))
    assert header == ["minx", "miny", "width", "height", "coverage", "prob_a", "prob_b, odd"]
    assert rows[0] == ["0", "0", "64", "64", "0.0", "0.1", ""]
    scores = np.array([[np.float32(v or "nan") for v in row[5:]] for row in rows], np.float32)
    np.testing.assert_array_equal(scores, table.scores)


def test_csv_of_many_rows_loses_none(tmp_path: Path) -> None:
    table = table_of([[float(i)] for i in range(10_000)], ("a",))
    write_csv(tmp_path / "t.csv", table)
    rows = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[-1]) for row in rows] == list(range(10_000))


def test_tables_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="all must have the same"):
        replace(table_of([[1.0]], ("a",)), minx=np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="1 scores a tile for 2 columns"):
        table_of([[1.0]], ("a", "b"))
    with pytest.raises(UsageError, match="'width' is also a column"):
        table_of([[1.0]], ("width",))


# QuPath


def qupath(path: Path, table: TileTable, spec: ModelSpec, fingerprint: str = "f" * 64, bounds: Box | None = None) -> list[dict]:
    write_qupath(path, table, spec, fingerprint, bounds)
    data = json.loads(path.read_text())
    assert data["type"] == "FeatureCollection"
    return data["features"]


def test_qupath_tiles(tmp_path: Path) -> None:
    table = table_of([[0.1, 0.7, 0.2], [NAN, NAN, NAN], [0.5, NAN, 0.5]], THREE.columns())
    first, second, third = qupath(tmp_path / "t.geojson", table, THREE)
    assert first["type"] == "Feature"
    assert uuid.UUID(first["id"]).version == 5
    assert first["geometry"] == {"type": "Polygon", "coordinates": [[[0, 0], [64, 0], [64, 64], [0, 64], [0, 0]]]}
    assert first["properties"] == {
        "objectType": "tile",
        "measurements": {"prob_benign": 0.1, "prob_tumor": 0.7, "prob_other": 0.2},
        "classification": {"name": "tumor", "color": [255, 0, 0]},
    }
    assert second["properties"] == {"objectType": "tile", "measurements": {}}
    assert second["geometry"]["coordinates"][0][0] == [64, 32]
    assert third["properties"]["measurements"] == {"prob_benign": 0.5, "prob_other": 0.5}
    assert third["properties"]["classification"]["name"] == "benign"


def test_qupath_bounds_move_tiles_but_not_ids(tmp_path: Path) -> None:
    table = table_of([[0.2], [0.9]], ONE.columns())
    whole = qupath(tmp_path / "a.geojson", table, ONE)
    cropped = qupath(tmp_path / "b.geojson", table, ONE, bounds=Box(-3, 10, 500, 500))
    assert [f["id"] for f in whole] == [f["id"] for f in cropped]
    assert cropped[1]["geometry"]["coordinates"][0][0] == [54, 35]
    again = (tmp_path / "a.geojson").read_bytes()
    qupath(tmp_path / "a.geojson", table, ONE)
    assert (tmp_path / "a.geojson").read_bytes() == again
    ids = [f["id"] for f in whole]
    ids += [f["id"] for f in qupath(tmp_path / "c.geojson", table, ONE, fingerprint="e" * 64)]
    ids += [f["id"] for f in qupath(tmp_path / "d.geojson", table, replace(ONE, name="two"))]
    assert len(set(ids)) == 6


def test_classification_rules() -> None:
    def of(scores: list[float], spec: ModelSpec) -> int | None:
        (index,) = classify(np.array([scores], np.float32), spec).tolist()
        return None if index < 0 else index

    assert [of([s], ONE) for s in (0.49, 0.5, 1.0, NAN)] == [None, 0, 0, None]
    assert [of([s], DENSITY) for s in (2999, 3000)] == [None, 0]
    assert of([0.3, 0.3, 0.4], THREE) == 2
    values = replace(THREE, scores="value", threshold=(1.0, 10.0, 5.0))
    assert of([0.5, 2.0, 4.0], values) is None  # values of different classes can't be compared
    assert of([0.5, 2.0, 5.0], values) == 2
    assert of([1.5, 2.0, 5.0], values) is None
    assert of([NAN, 10.0, NAN], values) == 1
    thirds = replace(ONE, threshold=(0.7,))
    assert of([0.7], thirds) == 0  # 0.7 in float32 is below 0.7 in float64


def test_qupath_refuses_another_models_table(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not those of model one"):
        write_qupath(tmp_path / "t.geojson", table_of([[1.0]], ("prob_other",)), ONE, "f", None)
    assert not (tmp_path / "t.geojson").exists()


def test_qupath_is_written_tile_by_tile(tmp_path: Path) -> None:
    table = table_of([[0.5]] * 10_000, ONE.columns())
    write_qupath(tmp_path / "warm.geojson", table_of([[0.5]], ONE.columns()), ONE, "f", None)
    tracemalloc.start()
    write_qupath(tmp_path / "t.geojson", table, ONE, "f", None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "t.geojson").stat().st_size > 2_500_000
    assert peak < 2_500_000


# Colours


def test_colours_rise_evenly_in_lightness() -> None:
    rgb = lookup_table() / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert np.diff(lightness[::3]).min() > 0  # single steps are rounded to uint8
    straight = np.linspace(lightness[0], lightness[-1], 256)
    assert np.abs(lightness - straight).max() < 3


def test_colorize() -> None:
    table = lookup_table()
    assert table.shape == (256, 3)
    values = np.array([[NAN, -5.0, 0.0], [10.0, 20.0, 5.0]], np.float32)
    rgba = colorize(values, 0.0, 10.0)
    assert rgba.dtype == np.uint8
    np.testing.assert_array_equal(rgba[..., 3], [[0, 255, 255], [255, 255, 255]])
    np.testing.assert_array_equal(rgba[0, 1:, :3], table[[0, 0]])
    np.testing.assert_array_equal(rgba[1, :, :3], table[[255, 255, 128]])
    assert colorize(np.array([np.inf, -np.inf]), 0, 1)[:, :3].tolist() == table[[255, 0]].tolist()
    with pytest.raises(UsageError, match="range 1 to 1 is empty"):
        colorize(values, 1.0, 1.0)


def test_class_colors() -> None:
    assert class_colors(("#0a0B0c",), 1) == ((10, 11, 12),)
    assert len(set(class_colors((), 7))) == 7
    assert class_colors((), 9)[8] == class_colors((), 9)[1]
    for wrong in ("red", "#12345", "#12345g", "1234567"):
        with pytest.raises(UsageError, match="not of the form #rrggbb"):
            hex_to_rgb(wrong)


# Pictures


def png_chunks(data: bytes) -> set[str]:
    names, at = set(), 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        names.add(data[at + 4 : at + 8].decode())
        at += length + 12
    return names


def slide_part(page: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The slide in an overlay page, of `shape` px; its frame of one grey pixel is searched and found."""
    edge = (page == (200, 200, 200)).all(axis=-1)
    rows, cols = np.flatnonzero(edge.sum(axis=1) >= shape[1] + 2), np.flatnonzero(edge.sum(axis=0) >= shape[0] + 2)
    part = page[rows[0] + 1 : rows[-1], cols[0] + 1 : cols[-1]]
    assert part.shape[:2] == shape
    return part


@pytest.mark.parametrize("ratio", [1.0, 1.987, 0.73])
def test_a_hot_cell_lies_on_its_tile(ratio: float) -> None:
    slide = array_slide(np.full((400, 600, 3), 240, np.uint8), 0.5)
    grid = TileGrid((400, 600), 0.5, 0.5 * ratio, 64, 32)
    frame = grid.heatmap_frame(1)
    row, col = grid.shape[0] - 2, grid.shape[1] // 2
    heatmap = np.full(frame.shape, np.nan, np.float32)
    heatmap[row, col] = 6000
    part = slide_part(np.asarray(Image.open(io.BytesIO(overlay_png(slide, heatmap, frame, DENSITY, 0)))), (600, 900))
    # The stride around the tile's centre, in px of a picture that is enlarged 1.5 times.
    centre = (grid.l0_origins(np.array([[row, col]]))[0] + grid.l0_tile / 2) * 1.5
    half = 16 * grid.ratio * 1.5
    y, x = np.mgrid[:600, :900] + 0.5
    inside = (np.abs(y - centre[0]) < half) & (np.abs(x - centre[1]) < half)
    hot = (part != 240).any(axis=-1)
    # Pixels on the very border may fall to either side for float noise.
    border = (np.abs(np.abs(y - centre[0]) - half) < 1e-6) | (np.abs(np.abs(x - centre[1]) - half) < 1e-6)
    np.testing.assert_array_equal(hot[~border], inside[~border])
    red, green, blue = part[hot][0].astype(int)
    assert red > blue + 60  # the high end of the scale is yellow
    assert green > blue + 60


def test_a_dense_heatmap_covers_the_slide_to_its_edge() -> None:
    slide = array_slide(np.full((130, 300, 3), 240, np.uint8), 0.5)
    frame = TileGrid((130, 300), 0.5, 0.5, 64, 64).heatmap_frame(16)
    part = slide_part(
        np.asarray(Image.open(io.BytesIO(overlay_png(slide, np.zeros(frame.shape, np.float32), frame, DENSITY, 0)))), (390, 900)
    )
    assert (part == part[0, 0]).all()
    assert (part[0, 0] != 240).any()


def test_the_colour_of_a_score_does_not_depend_on_the_stain_below() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:, :50], pixels[:, 50:] = (200, 100, 150), (136, 136, 136)  # equal grey
    frame = HeatmapFrame((1, 1), 0.0, 100.0, 0.5)
    part = slide_part(
        np.asarray(
            Image.open(io.BytesIO(overlay_png(array_slide(pixels), np.full((1, 1), 3000, np.float32), frame, DENSITY, 0)))
        ),
        (900, 900),
    )
    left, right = part[450, 200].astype(int), part[450, 700].astype(int)
    assert np.ptp(left - right) <= 1  # as dark as the tissue, of one hue


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (30, 5000), (5000, 20), (1700, 1500)])
def test_overlays_of_any_shape_can_be_read(shape: tuple[int, int]) -> None:
    slide = array_slide(np.full((*shape, 3), 230, np.uint8), 0.25, (1, 4) if min(shape) > 100 else (1,))
    grid = TileGrid(shape, 0.25, 0.5, 64, 64)
    frame = grid.heatmap_frame(1)
    spec = replace(ONE, name="m" * 200, classes=("c" * 200,), units="u" * 100)
    data = overlay_png(slide, np.full(frame.shape, 0.5, np.float32), frame, spec, 0)
    image = Image.open(io.BytesIO(data))
    assert 760 <= image.width <= 1600
    assert image.height <= 1750
    assert png_chunks(data) == {"IHDR", "IDAT", "IEND"}
    assert data == overlay_png(slide, np.full(frame.shape, 0.5, np.float32), frame, spec, 0)
    page = np.asarray(image)
    assert (page[:, :10] == 255).all()
    assert (page[:, -10:] == 255).all(), "text keeps inside the margins"
    assert (page[-60:] < 120).any(), "the footer is written"


def test_scale_bar_has_the_length_it_says() -> None:
    slide = array_slide(np.full((780, 1560, 3), 240, np.uint8), 0.5)
    frame = HeatmapFrame((1, 1), 0.0, 1560.0, 0.5)
    page = np.asarray(Image.open(io.BytesIO(overlay_png(slide, np.full((1, 1), np.nan, np.float32), frame, DENSITY, 0))))
    bar = (page[58 + 780 :, : page.shape[1] // 2] == (32, 32, 32)).all(axis=-1).sum(axis=1).max()
    assert abs(bar - 100 / 0.5) <= 1  # 100 um, the longest that fits 200 px


def test_nice_lengths() -> None:
    assert [nice_length(v) for v in (1, 1.99, 2, 4.9, 5, 9.99, 100, 0.03, 7300)] == [1, 1, 2, 2, 5, 5, 100, 0.02, 5000]


def test_overlay_says_how_fine_a_heatmap_it_can_show() -> None:
    assert overlay_l0_pixel((15_600, 7800)) == 10
    assert overlay_l0_pixel((450, 300)) == 0.5
    assert overlay_l0_pixel((1000, 900)) == 1


def test_wrong_requests_are_refused() -> None:
    slide = array_slide(np.full((64, 64, 3), 240, np.uint8), 0.5)
    frame = HeatmapFrame((2, 2), 0.0, 32.0, 0.5)
    with pytest.raises(UsageError, match="frame of the same pyramid level"):
        overlay_png(slide, np.zeros((2, 3), np.float32), frame, ONE, 0)
    with pytest.raises(UsageError, match="class 1 does not exist"):
        overlay_png(slide, np.zeros((2, 2), np.float32), frame, ONE, 1)


def test_heatmap_png_is_one_pixel_a_heatmap_pixel() -> None:
    heatmap = np.array([[0.0, 1.0, NAN], [0.5, NAN, 2.0]], np.float32)
    data = heatmap_png(heatmap, ONE)
    assert data == heatmap_png(heatmap, ONE)
    assert png_chunks(data) == {"IHDR", "IDAT", "IEND"}
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), colorize(heatmap, 0, 1))
