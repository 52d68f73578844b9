"""Objects are found once, wherever borders of tiles and regions lie, and whatever the regions' size."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathology import Job, detections, open_heatmap
from pathology.batches import read_tiles
from pathology.detections import Objects, first_of_each, near_pairs, overlap_share, resolve
from pathology.errors import ModelError, SlideError, UsageError
from pathology.export.result import export_result
from pathology.export.table import read_objects
from pathology.finish import read_manifest
from pathology.infer import detect_region
from pathology.integrity import verify_result
from pathology.model import DetectionRule, Model, ModelSpec
from pathology.models.checks import warm_up
from pathology.models.network import TorchNetwork
from pathology.models.objects import Form
from pathology.predictor import predict_in_order
from pathology.runner import run
from pathology.slide import Slide
from pathology.testing import array_slide, marks
from tests.slides import write_tiff
from tests.whole import plan_for

Place = tuple[int, int, int]

RED, BLUE = (255, 0, 0), (0, 0, 255)


def planted(height: int, width: int, count: int, seed: int = 0, apart: int = 1) -> tuple[NDArray[np.uint8], set[Place]]:
    """Grey noise with `count` marks, no two closer than `apart` px along both axes, and their (y, x, class)."""
    random = np.random.default_rng(seed)
    pixels = np.repeat(random.integers(100, 156, (height, width, 1), np.uint8), 3, axis=2)
    cells = random.choice((height // apart) * (width // apart), count, replace=False)
    truth = set()
    for i, cell in enumerate(cells.tolist()):
        y, x = cell // (width // apart) * apart, cell % (width // apart) * apart
        pixels[y, x] = (RED, BLUE)[i % 2]
        truth.add((y, x, i % 2))
    return pixels, truth


def found(slide: Slide, model: Model, stride: int, block: int) -> Objects:
    """All objects of a slide, through every region of a plan of such blocks."""
    rule = model.spec.detections
    assert rule is not None
    plan = plan_for(slide, model.spec, stride, block=block)
    read, predict = partial(read_tiles, slide, model.spec, plan.grid, pool=None), partial(predict_in_order, model, 4)
    rows = [detect_region(read, model.spec, rule, plan, region, predict, lambda tile: None) for region in plan.regions]
    return resolve(Objects.from_rows(np.concatenate(rows)), model.spec, rule, plan.grid, plan.tiles)


def places(objects: Objects) -> list[tuple[int, int, int]]:
    """(y, x, class) of the pixels that hold the centres."""
    pixel = np.floor(objects.centres).astype(int)
    return list(zip(*pixel.T.tolist(), objects.classes.tolist(), strict=True))


def test_ten_thousand_marks_are_found_once_each_whatever_the_regions_and_overlap() -> None:
    # In clusters of any density: marks may touch, and lie on every border of tiles of 64 px.
    pixels, truth = planted(1500, 1300, 10_000)
    slide = array_slide(pixels)
    rule = DetectionRule(nms_px=0.5, most=1024)
    model = marks(64)
    model = replace(model, spec=replace(model.spec, detections=rule))
    cuts = ((64, 1), (64, 7), (64, 100), (48, 3), (32, 1), (32, 5), (32, 100))
    rows = {(stride, block): found(slide, model, stride, block).to_rows() for stride, block in cuts}
    for (stride, _), objects in rows.items():
        got = places(Objects.from_rows(objects))
        assert len(got) == 10_000
        assert set(got) == truth
        assert np.array_equal(objects, rows[stride, 100 if stride != 48 else 3])


@pytest.mark.parametrize("margin", [0, 8])
@pytest.mark.parametrize("vertices", [0, 2, 4])
def test_marks_on_which_tiles_disagree_are_one_and_do_not_depend_on_the_cut(vertices: int, margin: int) -> None:
    pixels, truth = planted(700, 500, 400, apart=14)
    slide, model = array_slide(pixels), marks(64, vertices=vertices, shift=0.4, margin_px=margin)
    reference = found(slide, model, 32, 100)
    assert len(reference) == 400
    away = np.abs(np.array(sorted((y + 0.5, x + 0.5) for y, x, _ in truth)) - sorted(reference.centres.tolist()))
    assert 0.1 < away.max() < 0.9
    for block in (1, 2, 5):
        assert np.array_equal(found(slide, model, 32, block).to_rows(), reference.to_rows())


def test_a_mark_seen_whole_by_one_tile_counts_from_there_and_one_seen_by_none_still_counts() -> None:
    pixels = np.full((128, 128, 3), 120, np.uint8)
    pixels[33, 40] = RED  # in the margin of the tiles of row 0 (0..64) no more, of row 1 (32..96) still
    pixels[2, 2] = RED  # in a corner of the slide: no tile has it inside its margin
    model = marks(64, vertices=4, margin_px=10)
    objects = found(array_slide(pixels), model, 32, 4)
    assert places(objects) == [(2, 2, 0), (33, 40, 0)]
    # Scores fall towards a tile's edge: the one that is left is of the tile that sees it in its middle.
    assert objects.scores[1] == pytest.approx(1 - 8.5 / 64)


class Everywhere:
    """Answers an object at the same place (y, x) in every tile."""

    def __init__(self, place: tuple[float, float], tile_px: int = 64) -> None:
        self.spec = marks(tile_px).spec
        self.place = place

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        answer = np.full((len(tiles), 1, 4), np.nan, np.float32)
        answer[:, 0] = (*self.place, 0, 1)
        return answer


@pytest.mark.parametrize(
    ("shape", "tile", "places"),
    [
        ((100, 100), 64, [[50, 50]]),
        ((260, 200), 256, [[50, 50]]),
        ((115, 113), 64, [[50, 50], [50, 113], [114, 50], [114, 113]]),
    ],
)
def test_objects_beyond_the_slides_end_are_none(shape: tuple[int, int], tile: int, places: list[list[float]]) -> None:
    """The last tiles reach past the edge, where the picture is white; a detector may see things there."""
    objects = found(array_slide(np.full((*shape, 3), 200, np.uint8)), Everywhere((50, 50), tile), tile, 2)
    np.testing.assert_allclose(objects.centres, places, atol=1e-6)  # just beyond the end is at the end


class Drifting:
    """Sees red pixels, but `drift` px further from the middle of its tile than they are, also beyond its edges."""

    def __init__(self, margin_px: int, drift: float) -> None:
        self.inner = marks(64, margin_px=margin_px)
        self.spec = self.inner.spec
        self.drift = drift

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        answer = self.inner(tiles)
        answer[..., :2] += self.drift * np.sign(answer[..., :2] - 32)
        return answer


@pytest.mark.parametrize(("margin", "stride"), [(0, 64), (0, 32), (8, 48), (8, 32), (15, 32), (16, 32)])
@pytest.mark.parametrize("drift", [0.6, 1.0, -1.0])
def test_what_tiles_place_differently_at_their_borders_is_neither_lost_nor_doubled(
    margin: int, stride: int, drift: float
) -> None:
    """With the least overlap that a margin allows, an object may lie in the margins of all tiles, as each of them has it."""
    pixels, truth = planted(512, 448, 400, apart=16)
    slide, model = array_slide(pixels), Drifting(margin, drift)
    reference = found(slide, model, stride, 100)
    assert len(reference) == len(truth) == 400
    assert np.array_equal(found(slide, model, stride, 2).to_rows(), reference.to_rows())


def test_an_overlap_too_small_for_the_margin_is_refused(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.tiff", [np.full((200, 200, 3), 200, np.uint8)])
    wanted = replace(job(slide, tmp_path / "out", "pathology.testing:marks?tile_px=64&margin_px=16"), overlap=31)
    with pytest.raises(UsageError, match=r"model marks has margins of 32 px in all.*use --overlap 32 or more"):
        list(run([wanted], "sync"))


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(0, 10_000), st.floats(0.3, 9))
def test_pairs_and_rounds_are_those_of_greedy_suppression(count: int, seed: int, reach: float) -> None:
    points = np.random.default_rng(seed).random((count, 2)) * 20
    near = np.abs(points[:, None] - points[None]).max(axis=2) < reach
    got = [pair for first, second in near_pairs(points, reach) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    ordered = [(min(pair), max(pair)) for pair in got]
    assert len(set(ordered)) == len(ordered)
    assert {(i, j) for i in range(count) for j in range(i + 1, count) if near[i, j]} <= set(ordered)
    pairs = np.array([(i, j) for i, j in sorted(ordered) if near[i, j]], np.int64).reshape(-1, 2)
    kept = np.ones(count, bool)
    for i in range(count):
        kept[i + 1 :] &= ~(kept[i] & near[i, i + 1 :])
    assert np.array_equal(first_of_each(count, pairs[:, 0], pairs[:, 1]), kept)


def test_pairs_in_portions_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).random((300, 2)) * 20

    def pairs() -> set[tuple[int, int]]:
        return {p for first, second in near_pairs(points, 1.5) for p in zip(first.tolist(), second.tolist(), strict=True)}

    whole = pairs()
    monkeypatch.setattr(detections, "PAIRS_AT_ONCE", 50)
    assert pairs() == whole
    assert len(whole) > 1000


def test_shares_of_boxes() -> None:
    one = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [1, 1, 1, 1.0]])
    other = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2], [1, 1, 1, 1.0]])
    assert overlap_share(one, other).tolist() == [1, 1 / 7, 0, 0]


class Answers:
    """Answers the same rows for every tile."""

    def __init__(self, *rows: tuple[float, ...], most: int = 8) -> None:
        spec = marks(64).spec
        self.spec = replace(spec, detections=DetectionRule(most=most, vertices=(len(rows[0]) - 4) // 2))
        self.rows = rows

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = np.array(self.rows, np.float32)
        return np.broadcast_to(rows[None], (len(tiles), *rows.shape)).copy()


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([(1, 1, 0, np.nan)], "NaN or infinity"),
        ([(1, np.inf, 0, 1)], "NaN or infinity"),
        ([(1, 1, 2, 1)], "a class that is none of 0 to 1"),
        ([(1, 1, 0.5, 1)], "a class that is none of 0 to 1"),
        ([(1, 1, 0, 1, -200, 0, 9, 9)], "an outline that reaches more than a tile beyond its tile"),
    ],
)
def test_rows_that_are_no_objects_are_refused(rows: list[tuple[float, ...]], what: str) -> None:
    slide, model = array_slide(np.full((64, 64, 3), 200, np.uint8)), Answers(*rows)
    with pytest.raises(SlideError, match=f"model marks answered {what} for the tile in row 0, column 0"):
        found(slide, model, 64, 1)
    with pytest.raises(ModelError, match=f"answered {what} for a made-up tile"):
        warm_up(model, 2)


def test_a_tile_as_full_as_its_card_allows_is_refused_since_objects_may_be_missing() -> None:
    slide = array_slide(np.full((64, 64, 3), 200, np.uint8))
    rows = [(8.0 * i + 1, 1.0, 0.0, 1.0) for i in range(4)]
    assert len(found(slide, Answers(*rows, most=5), 64, 1)) == 4
    with pytest.raises(SlideError, match="4 objects, as many as its card allows"):
        found(slide, Answers(*rows, most=4), 64, 1)


# Networks.


class Given(torch.nn.Module):
    """Answers what it was made with, for every tile."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.answer, torch.Tensor)
        return self.answer.expand(len(tiles), *self.answer.shape)


def network(answer: torch.Tensor, form: Form, **rule: int) -> TorchNetwork:
    spec = ModelSpec(
        "given", "0" * 64, ("a", "b"), 0.5, 64, 64, 4, threshold=(0.5, 0.7), detections=DetectionRule(most=6, **rule)
    )
    return TorchNetwork(spec, Given(answer), form=form)


def rows_of(model: TorchNetwork) -> list[list[float]]:
    answer = model(np.zeros((2, 64, 64, 3), np.uint8))
    assert answer.shape == model.spec.answer_shape(2)
    assert np.array_equal(answer[0], answer[1], equal_nan=True)
    rows = answer[0][~np.isnan(answer[0]).all(axis=1)]
    return [[float(v) for v in row] for row in rows]


def test_peaks_of_a_map_are_points() -> None:
    scores = torch.zeros(2, 16, 16)  # a pixel of the answer is 4 of the input
    scores[0, 3, 5], scores[0, 3, 6] = 0.875, 0.75  # one object: the highest
    scores[1, 3, 5] = 0.8125  # of one class: the likeliest
    scores[1, 15, 0] = 0.625  # below the threshold of its class
    scores[0, 15, 15] = 0.5
    assert rows_of(network(scores, "peaks")) == [[14, 22, 0, 0.875], [62, 62, 0, 0.5]]


def test_a_flat_top_is_one_object_in_its_middle() -> None:
    """Between four pixels, or where an activation comes to its end at 1."""
    scores = torch.zeros(2, 16, 16)
    scores[0, 3:5, 5:7] = 0.75  # the middle lies between them
    scores[1, 10, 10:13] = 0.75  # of three, the middle of the two that touch the first
    assert sorted(rows_of(network(scores, "peaks"))) == [
        [16, 24, 0, 0.75],
        [42, 44, 1, 0.75],
    ]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_peaks_are_those_of_logits_where_scores_are_all_one(activation: Literal["sigmoid", "softmax"]) -> None:
    y, x = np.mgrid[0:16, 0:16]
    bump = torch.from_numpy(30 - 0.3 * ((y - 8) ** 2 + (x - 5) ** 2)).to(torch.float32)
    logits = torch.stack([bump, torch.full_like(bump, -20)])
    model = TorchNetwork(network(logits, "peaks").spec, Given(logits), form="peaks", activation=activation)
    assert rows_of(model) == [[34, 22, 0, 1]]


def test_boxes_as_yolo_exports_them() -> None:
    boxes = torch.tensor([[10, 20, 14, 30, 0.75, 1], [1, 2, 3, 4, 0.625, 1], [0, 0, 8, 8, 0.5, 0], [0, 0, 0, 0, 0, 0]])
    assert rows_of(network(boxes, "boxes", vertices=2)) == [
        [25, 12, 1, 0.75, 20, 10, 30, 14],
        [4, 4, 0, 0.5, 0, 0, 8, 8],
    ]


def test_rows_with_contours() -> None:
    rows = torch.tensor([[5, 5, 0, 0.9, 4, 4, 4, 6, 6, 5], [5, 5, 1, 0.6, 4, 4, 4, 6, 6, 5]])
    (row,) = rows_of(network(rows, "rows", vertices=3))
    assert row == pytest.approx([5, 5, 0, 0.9, 4, 4, 4, 6, 6, 5])


def test_an_answer_of_another_form_is_refused() -> None:
    with pytest.raises(ModelError, match=r"answered \(2, 7, 6\), but detections from boxes are \(batch, up to 6, 6\)"):
        rows_of(network(torch.zeros(7, 6), "boxes", vertices=2))
    with pytest.raises(ModelError, match=r"answered \(2, 3, 16, 16\), but detections from peaks are \(batch, 2, h, w\)"):
        rows_of(network(torch.zeros(3, 16, 16), "peaks"))


# Whole runs.


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[Place]]:
    pixels, truth = planted(400, 300, 300, apart=14)
    return write_tiff(tmp_path_factory.mktemp("marked") / "marked.tiff", [pixels]), truth


def job(slide: Path, out: Path, model: str, **options: object) -> Job:
    return Job(
        slide=str(slide),
        slide_id="marked",
        root=str(slide),
        model=model,
        out=str(out),
        overlap=0.5,
        tissue="none",
        **options,  # type: ignore[arg-type]
    )


def test_a_run_writes_a_table_and_the_density(marked: tuple[Path, set[Place]], tmp_path: Path) -> None:
    slide, truth = marked
    wanted = job(slide, tmp_path, "pathology.testing:marks?tile_px=64", block=2)
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "ok", outcome.message
    folder = wanted.result_folder("marks")
    objects = read_objects(folder / "detections.parquet", ("red", "blue"))
    assert sorted(places(objects)) == sorted(truth)
    assert outcome.record is not None
    assert outcome.record["output"] == "detections"
    assert outcome.record["detections"] == 300
    classes = outcome.record["classes"]
    assert [c["count"] for c in classes.values()] == [150, 150]
    heatmap = open_heatmap(folder)
    density = heatmap.read(0, detections.Box(0, 0, *heatmap.frame.shape))
    counts = density * heatmap.frame.mpp**2 / 1e6
    expected = np.zeros_like(counts)
    for y, x, number in truth:
        expected[number, y // 16, x // 16] += 1  # 64 px a tile, 4 px of density across it
    assert np.allclose(counts, expected, rtol=1e-6)
    areas = [(of_class > 0).sum() * heatmap.frame.mpp**2 / 1e6 for of_class in expected]
    assert [c["area_mm2"] for c in classes.values()] == pytest.approx(areas)
    assert heatmap.spec.units == "per mm2"
    assert not list(verify_result(folder))


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_every_scheduler_and_cut_gives_the_same_bytes(scheduler: str, marked: tuple[Path, set[Place]], tmp_path: Path) -> None:
    model = "pathology.testing:marks?tile_px=64&vertices=2&shift=0.4"
    one, other = job(marked[0], tmp_path / "one", model, block=100), job(marked[0], tmp_path / "other", model, block=3)
    for asked, how in ((one, "sync"), (other, scheduler)):
        (outcome,) = run([asked], how)
        assert outcome.status == "ok", outcome.message
    assert read_manifest(one.result_folder("marks")) == read_manifest(other.result_folder("marks"))


@pytest.mark.parametrize("vertices", [0, 2, 4])
def test_exports(vertices: int, marked: tuple[Path, set[Place]], tmp_path: Path) -> None:
    wanted = job(marked[0], tmp_path, f"pathology.testing:marks?tile_px=64&vertices={vertices}")
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "ok", outcome.message
    folder = wanted.result_folder("marks")
    (geojson,) = export_result(folder, "qupath")
    assert geojson.name == "detections.geojson"
    features = json.loads(geojson.read_text())["features"]
    assert len({f["id"] for f in features}) == 300
    for feature, (y, x) in zip(features, read_objects(folder / "detections.parquet", ("red", "blue")).centres, strict=True):
        assert feature["properties"]["objectType"] == "detection"
        assert feature["properties"]["classification"]["name"] in ("red", "blue")
        if vertices:
            (ring,) = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1]
            assert {tuple(point) for point in ring} == {(x + dx, y + dy) for dx in (-6, 6) for dy in (-6, 6)}
        else:
            assert feature["geometry"] == {"type": "Point", "coordinates": [x, y]}
    (table,) = export_result(folder, "csv")
    lines = table.read_text().splitlines()
    assert lines[0] == "x,y,class,score" + (",outline" if vertices else "")
    assert len(lines) == 301
    assert not list(verify_result(folder))


def test_a_slide_without_tissue_has_no_objects(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "glass.tiff", [np.full((200, 200, 3), 255, np.uint8)])
    wanted = replace(job(slide, tmp_path / "out", "pathology.testing:marks?tile_px=64&vertices=2"), tissue="otsu")
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "ok_empty", outcome.message
    assert len(read_objects(wanted.result_folder("marks") / "detections.parquet", ("red", "blue"))) == 0
