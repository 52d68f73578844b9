"""How dense maps are stored: dtypes, label image, and the copy in OME-Zarr 0.4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import ome_zarr_models.v04
import pytest
import yaozarrs
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ngff import assert_valid
from numpy.typing import NDArray

from pathology import Job, UsageError, open_heatmap
from pathology.encoding import Dtype, Encoding, choose_encoding
from pathology.export.ngff04 import write_ngff04
from pathology.geometry import Box, HeatmapFrame
from pathology.labels import label_block
from pathology.model import ModelSpec
from pathology.pyramid import halve
from pathology.result import Heatmap
from pathology.runner import run
from pathology.store import STORE_NAME, HeatmapMeta, write_heatmap

NAN = float("nan")
THREE = ModelSpec("three", "ab" * 32, ("a", "b", "c"), 0.5, 64, 64, output_px=64, colors=("#ff0000", "#00ff00", "#0000ff"))


def scores_of(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    scores = random.random(shape).astype(np.float32)
    scores[:, random.random(shape[1:]) < 0.2] = NAN
    scores[:, :40] = NAN
    return scores


@pytest.mark.parametrize("shape", [(3, 61, 47), (1, 1, 200), (2, 90, 1)])
def test_how_much_is_worked_on_at_once_changes_nothing(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = scores_of(shape)
    spec = replace(THREE, classes=THREE.classes[: shape[0]], colors=(), threshold=())

    def all_of_it() -> list[bytes]:
        stored = [Encoding(dtype, 0.0, 1.0).encode(scores) for dtype in ("uint8", "float16", "float32")]  # type: ignore[arg-type]
        return [array.tobytes() for array in (*stored, label_block(scores, spec), halve(scores))]

    at_once = all_of_it()
    for module in ("encoding", "labels", "pyramid"):
        monkeypatch.setattr(f"pathology.{module}.AT_ONCE", 7)
    assert all_of_it() == at_once


def written(folder: Path, scores: NDArray[np.float32], spec: ModelSpec, dtype: Dtype) -> Heatmap:
    frame = HeatmapFrame((scores.shape[1], scores.shape[2]), 0.0, 1.0, 0.5)
    meta = HeatmapMeta(frame, spec, 64, 32, "f" * 64, {}, choose_encoding(spec, dtype))
    write_heatmap(folder / STORE_NAME, meta, lambda box: scores[:, *box.slices()])
    return open_heatmap(folder)


def read(heatmap: Heatmap, level: int = 0) -> NDArray[np.float32]:
    return heatmap.read(level, Box(0, 0, *heatmap.level_shape(level)))


def test_codes_by_hand() -> None:
    encoding = Encoding("uint8", -1, 1)
    scores = np.array([NAN, -1, 1, 0, -9, 9, -1 + 2 / 254 * 0.49, -1 + 2 / 254 * 0.51], np.float32)
    codes = encoding.encode(scores)
    assert codes.tolist() == [0, 1, 255, 128, 1, 255, 1, 2]
    assert encoding.decode(codes)[:4].tolist() == pytest.approx([NAN, -1, 1, 0], nan_ok=True)


@given(st.floats(-3, 3, width=32), st.floats(0.01, 3))
def test_a_byte_is_within_half_a_step(score: float, width: float) -> None:
    encoding = Encoding("uint8", -1, -1 + width)
    back = float(encoding.decode(encoding.encode(np.array([score], np.float32)))[0])
    assert abs(back - min(max(score, -1), -1 + width)) <= width / 254 / 2 + 1e-6


def test_half_precision_never_becomes_infinite() -> None:
    encoding = Encoding("float16")
    stored = encoding.encode(np.array([NAN, 1e6, -1e6, 0.1], np.float32))
    assert stored.dtype == np.float16
    assert encoding.decode(stored).tolist() == pytest.approx([NAN, 65504, -65504, 0.1], nan_ok=True, rel=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_a_map_is_read_back_in_every_dtype_with_its_pyramid_and_labels(tmp_path: Path, dtype: Dtype) -> None:
    scores = scores_of((3, 700, 530))
    heatmap = written(tmp_path, scores, THREE, dtype)
    assert assert_valid(heatmap.path) == 3
    yaozarrs.validate_zarr_store(heatmap.path / "labels")
    tolerance = {"uint8": 0.5 / 254 + 1e-7, "float16": 5e-4, "float32": 0.0}[dtype]
    level = scores
    for k, labels in enumerate(heatmap.labels):
        assert heatmap.arrays[k].dtype == dtype
        np.testing.assert_allclose(read(heatmap, k), level, atol=tolerance)
        np.testing.assert_array_equal(heatmap.levels[k].compute(), read(heatmap, k))
        missing = np.isnan(level[0])
        expected = np.where(missing, 0, np.where(missing, 0, level).argmax(axis=0) + 1)
        np.testing.assert_array_equal(labels.compute(), expected)
        level = halve(level)


def test_labels_by_hand() -> None:
    scores = np.array([[[0.2, NAN, 0.5, 0]], [[0.7, NAN, 0.5, 0]], [[0.1, NAN, 0.0, 0]]], np.float32)
    assert label_block(scores, THREE).tolist() == [[2, 0, 1, 1]]
    one = replace(THREE, classes=("a",), colors=(), threshold=(0.5,))
    assert label_block(scores[:1], one).tolist() == [[0, 0, 1, 0]]
    many = replace(THREE, classes=tuple(map(str, range(300))), colors=(), threshold=())
    block = label_block(np.linspace(0, 1, 300, dtype=np.float32).reshape(300, 1, 1), many)
    assert (block.dtype, block.tolist()) == (np.uint16, [[300]])


def test_the_label_image_names_and_colours_its_classes(tmp_path: Path) -> None:
    heatmap = written(tmp_path, scores_of((3, 100, 90)), THREE, "uint8")
    about = json.loads((heatmap.path / "labels/classes/zarr.json").read_text())["attributes"]["ome"]["image-label"]
    assert about["properties"][1] == {"label-value": 2, "class": "b"}
    assert about["colors"][1] == {"label-value": 2, "rgba": [0, 255, 0, 255]}


def test_viewers_are_told_the_range_of_what_is_stored(tmp_path: Path) -> None:
    spec = replace(THREE, display=(0.0, 0.5))
    root = json.loads((written(tmp_path, scores_of((3, 50, 50)), spec, "uint8").path / "zarr.json").read_text())
    (channel, *_) = root["attributes"]["ome"]["omero"]["channels"]
    assert channel["window"] == {"min": 0, "max": 255, "start": 1, "end": 128}


def test_bytes_are_for_probabilities_unless_asked_for() -> None:
    value, tile = replace(THREE, scores="value", display=(0, 9)), replace(THREE, output_px=1)
    assert choose_encoding(THREE, "auto") == Encoding("uint8", 0, 1)
    assert choose_encoding(value, "auto") == Encoding("float32")
    assert choose_encoding(value, "uint8") == Encoding("uint8", 0, 9)
    assert choose_encoding(tile, "uint8") == Encoding("float32")
    with pytest.raises(UsageError, match="scores from 3 to 3 cannot be scaled to a byte"):
        choose_encoding(replace(value, display=(3, 3)), "uint8")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_copy_in_0_4(tmp_path: Path, dtype: Dtype) -> None:
    heatmap = written(tmp_path, scores_of((3, 700, 530)), THREE, dtype)
    for _ in range(2):  # a second one takes the place of the first
        write_ngff04(tmp_path / "copy", heatmap)
    copy = zarr.open_group(tmp_path / "copy", mode="r", zarr_format=2)
    image = ome_zarr_models.v04.image.Image.from_zarr(copy)
    assert len(image.datasets[0]) == 3
    yaozarrs.validate_zarr_store(tmp_path / "copy")
    for k in range(3):
        np.testing.assert_array_equal(copy[str(k)][...], heatmap.arrays[k][...])
        np.testing.assert_array_equal(copy[f"labels/classes/{k}"][...], heatmap.label_arrays[k][...])
    assert copy["0"].metadata.dimension_separator == "/"
    assert {path.name for path in tmp_path.iterdir()} == {"copy", STORE_NAME}


def test_another_dtype_is_another_result(tmp_path: Path, small_slide: Path) -> None:
    """A run with a dense network of probabilities stores bytes; asked for float32 it refuses to mix them."""
    job = Job(
        slide=str(small_slide),
        slide_id="s",
        root=str(small_slide),
        model="tests.test_encoding:probabilities",
        out=str(tmp_path),
        tissue="none",
    )
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok", outcome.message
    heatmap = open_heatmap(job.result_folder("probabilities"))
    assert heatmap.arrays[0].dtype == np.uint8
    bytes_read = read(heatmap)
    with pytest.raises(UsageError, match="heatmap_dtype uint8 -> None"):
        list(run([replace(job, heatmap_dtype="float32")], "sync"))
    (outcome,) = run([replace(job, heatmap_dtype="float32", overwrite=True)], "sync")
    assert outcome.status == "ok", outcome.message
    exact = open_heatmap(job.result_folder("probabilities"))
    np.testing.assert_allclose(bytes_read, read(exact), atol=0.5 / 254 + 1e-7)


class Probabilities:
    spec = ModelSpec("probabilities", "cd" * 32, ("red", "green"), 0.5, 32, 32, output_px=32)

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.ascontiguousarray(tiles[..., :2].transpose(0, 3, 1, 2) / np.float32(255), dtype=np.float32)


def probabilities() -> Probabilities:
    return Probabilities()
