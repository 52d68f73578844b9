"""The heatmap store: bytes, pyramid, metadata, reading back, and slides as lazy arrays."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ngff import assert_valid
from numpy.typing import NDArray
from zarr.storage import LocalStore

from pathology import pyramid
from pathology.errors import EnvironmentFault, UsageError
from pathology.geometry import Box, HeatmapFrame
from pathology.grid import TileGrid
from pathology.model import ModelSpec, ReadRule
from pathology.pyramid import ShardGather, halve, make_levels
from pathology.result import open_heatmap
from pathology.store import STORE_NAME, HeatmapMeta, HeatmapSummary, write_heatmap
from pathology.testing import array_slide

NAN = np.nan


def make_spec(classes: int = 1) -> ModelSpec:
    names = tuple(f"class {i}" for i in range(classes))
    return ModelSpec("demo", "ab" * 32, names, mpp=0.5, tile_px=224, input_px=224)


def make_meta(shape: tuple[int, int], spec: ModelSpec) -> HeatmapMeta:
    frame = HeatmapFrame(shape, l0_origin=0.0, l0_pixel=448.0, slide_mpp=0.25)
    return HeatmapMeta(frame, spec, 224, 224, "f" * 64, {"min_tissue": 0.1, "reader": "openslide 4.0.1"})


def random_scores(shape: tuple[int, ...], holes: float = 0.3) -> NDArray[np.float32]:
    """Scores with a share of pixels that no class has, and one large hole."""
    rng = np.random.default_rng(list(shape))
    scores = rng.random(shape, np.float32)
    scores[:, rng.random(shape[1:]) < holes] = NAN
    scores[:, : shape[1] // 2, : shape[2] // 3] = NAN
    return scores


def reader(scores: NDArray[np.float32]) -> Callable[[Box], NDArray[np.float32]]:
    return lambda box: scores[:, *box.slices()]


def write(path: Path, scores: NDArray[np.float32], spec: ModelSpec | None = None) -> HeatmapSummary:
    return write_heatmap(path, make_meta(scores.shape[1:], spec or make_spec(len(scores))), reader(scores))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def nan_halves(level: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next level as numpy states it: nanmean of 2 x 2 blocks, odd sides padded by NaN."""
    classes, height, width = level.shape
    padded = np.pad(level, ((0, 0), (0, height % 2), (0, width % 2)), constant_values=NAN).astype(np.float64)
    blocks = padded.reshape(classes, padded.shape[1] // 2, 2, padded.shape[2] // 2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")
        return np.nanmean(blocks, axis=(2, 4)).astype(np.float32)


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (1, 1, 777),
        (2, 513, 1),
        (3, 256, 256),
        (1, 257, 3),
        (1, 2049, 1025),
        (3, 2049, 1025),
        (1, 600, 4200),
        (17, 90, 1100),
    ],
)
def test_what_is_written_is_read_back_with_its_whole_pyramid(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    scores = random_scores(shape)
    write(tmp_path / STORE_NAME, scores)
    heatmap = open_heatmap(tmp_path)
    expected, level = scores, 0
    while True:
        found = heatmap.read(level, Box(0, 0, *heatmap.level_shape(level)))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(heatmap.levels[level].compute(), expected)
        if max(expected.shape[1:]) <= 256:
            break
        expected, level = nan_halves(expected), level + 1
    assert len(heatmap.arrays) == level + 1


def test_halve_by_hand() -> None:
    level = np.array(
        [
            [1, 2, NAN, NAN],
            [3, 6, NAN, NAN],
            [NAN, 5, 0, 0],
            [NAN, NAN, 1, NAN],
        ],
        np.float32,
    )
    np.testing.assert_array_equal(halve(level[None]), np.array([[[3, NAN], [5, np.float32(1 / 3)]]], np.float32))
    # Odd sides: the last row and column are the mean of what there is.
    odd = np.array([[1, 3, 8], [5, 7, NAN], [2, 4, 9]], np.float32)
    np.testing.assert_array_equal(halve(odd[None]), np.array([[[4, 8], [3, 9]]], np.float32))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 90))
def test_shards_gathered_in_row_major_order_equal_halving_the_whole(classes: int, height: int, width: int) -> None:
    """Tiny shards, so that every level has many: the same code, brute force, and what waits in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramid, "SHARD_PX", 16)
        patch.setattr(pyramid, "CHUNK_PX", 4)
        patch.setattr(pyramid, "SMALLEST_PX", 3)
        levels = make_levels(classes, (height, width))
    whole = [random_scores((classes, height, width))]
    gathered = [np.full(level.shape, -1, np.float32) for level in levels[1:]]
    for _ in levels[1:]:
        whole.append(halve(whole[-1]))
    gathers = [ShardGather(level) for level in levels[1:]]
    for shard in levels[0].shard_boxes():
        box, block = shard, whole[0][:, *shard.slices()]
        for k, gather in enumerate(gathers):
            done = gather.add(box, block)
            if done is None:
                break
            box, block = done
            assert box in set(levels[k + 1].shard_boxes())
            assert (gathered[k][:, *box.slices()] == -1).all(), "a shard came twice"
            gathered[k][:, *box.slices()] = block
        # The first two lower levels never hold more than one unfinished shard.
        assert all(len(gather._open) <= 1 for gather in gathers[:2])
    assert not any(gather._open for gather in gathers)
    for found, expected in zip(gathered, whole[1:], strict=True):
        np.testing.assert_array_equal(found, expected)


@given(st.integers(1, 5000), st.integers(1, 200_000), st.integers(1, 200_000))
def test_levels_have_whole_chunks_bounded_shards_and_halve(classes: int, height: int, width: int) -> None:
    levels = make_levels(classes, (height, width))
    assert max(levels[-1].shape[1:]) <= 256
    for level in levels:
        assert level.chunk[0] == 1
        assert level.shard[0] == classes
        assert all(shard % chunk == 0 for shard, chunk in zip(level.shard, level.chunk, strict=True))
        assert all(chunk <= min(512, side) for chunk, side in zip(level.chunk[1:], level.shape[1:], strict=True))
        assert math.prod(level.shard) * 4 <= 256 * 2**20
    for fine, coarse in itertools.pairwise(levels):
        assert max(fine.shape[1:]) > 256
        assert coarse.shape == (classes, (fine.shape[1] + 1) // 2, (fine.shape[2] + 1) // 2)


# --- how it is written ---------------------------------------------------------------------------------------------


def test_one_read_and_one_write_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores((2, 2100, 4500), holes=0.1)
    boxes: list[Box] = []
    keys: list[str] = []
    put = LocalStore.set

    def read(box: Box) -> NDArray[np.float32]:
        boxes.append(box)
        return scores[:, *box.slices()]

    async def counted(self: LocalStore, key: str, value: object) -> None:
        keys.append(key)
        await put(self, key, value)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "set", counted)
    write_heatmap(tmp_path / "a", make_meta((2100, 4500), make_spec(2)), read)
    assert boxes == [
        Box(0, 0, 2048, 2048),
        Box(0, 2048, 2048, 2048),
        Box(0, 4096, 2048, 404),
        Box(2048, 0, 52, 2048),
        Box(2048, 2048, 52, 2048),
        Box(2048, 4096, 52, 404),
    ]
    assert len(keys) == len(set(keys))
    assert sorted(keys) == sorted(hashes(tmp_path / "a"))  # nothing else lies there: no *.partial, no second metadata
    shards = [key for key in keys if "/c/" in key]
    assert {k: sum(s.startswith(f"{k}/") for s in shards) for k in range(6)} == {0: 6, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    # One row of level 0 completes shards of levels 1 and 2 before the next row is read.
    assert shards[:6] == ["0/c/0/0/0", "0/c/0/0/1", "0/c/0/0/2", "1/c/0/0/0", "2/c/0/0/0", "0/c/0/1/0"]


def test_a_whole_classifier_heatmap_is_a_handful_of_files(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((3, 446, 312)))  # a slide of 100,000 x 70,000 px at 0.25 um in tiles of 224 at 0.5
    assert list(hashes(tmp_path / "a")) == ["0/c/0/0/0", "0/zarr.json", "1/c/0/0/0", "1/zarr.json", "zarr.json"]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    scores = random_scores((3, 600, 2100))
    scores[:, :, :1030] = NAN  # whole chunks
    write(tmp_path / "a", scores)
    # NaN of other bits (what 0 / 0 gives differs between processors), another user's zarr settings, a path of its own,
    # provenance in another order, and the leavings of a write that was killed.
    other_nan = scores.copy()
    other_nan.view(np.uint32)[np.isnan(scores)] = 0xFFC00001
    meta = make_meta((600, 2100), make_spec(3))
    meta = replace(meta, provenance=dict(reversed(meta.provenance.items())))
    stale = tmp_path / "elsewhere" / "b"
    (stale / "0" / "c").mkdir(parents=True)
    (stale / "0" / "c" / "0.0123456789abcdef.partial").write_bytes(b"torn")
    with zarr.config.set({"array.write_empty_chunks": True, "async.concurrency": 1}):
        write_heatmap(stale, meta, reader(other_nan))
    assert hashes(tmp_path / "a") == hashes(stale)


def test_a_bit_flip_anywhere_in_a_shard_is_detected(tmp_path: Path) -> None:
    scores = np.linspace(0, 1, 700 * 700, dtype=np.float32).round(2).reshape(1, 700, 700)  # compresses well, as heatmaps do
    write(tmp_path / "a", scores)
    heatmap = open_heatmap(tmp_path / "a")
    shard = tmp_path / "a" / "0/c/0/0/0"
    good = shard.read_bytes()
    box = Box(0, 0, 700, 700)
    rng = np.random.default_rng(0)
    for position in [0, len(good) - 1, *rng.integers(0, len(good), 58)]:
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        shard.write_bytes(bad)
        with pytest.raises(EnvironmentFault, match="damaged at level 0"):
            heatmap.read(0, box)
    shard.write_bytes(good[:-100])
    with pytest.raises(EnvironmentFault, match="damaged at level 0"):
        heatmap.read(0, box)
    shard.write_bytes(good)
    np.testing.assert_array_equal(heatmap.read(0, box), scores)


def test_nothing_predicted_is_a_valid_heatmap_without_pixels(tmp_path: Path) -> None:
    summary = write(tmp_path / "a", np.full((2, 300, 40), NAN, np.float32))
    assert list(hashes(tmp_path / "a")) == ["0/zarr.json", "1/zarr.json", "zarr.json"]
    assert np.isnan(open_heatmap(tmp_path / "a").read(1, Box(0, 0, 150, 20))).all()
    for found in summary.classes:
        assert (found.predicted_px, found.present_px, found.mean, found.max, found.area_mm2) == (0, 0, None, None, None)


def test_metadata_is_strict_json(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((1, 300, 10)))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    parsed = {p.parent.name: json.loads(p.read_text(), parse_constant=refuse) for p in (tmp_path / "a").rglob("zarr.json")}
    assert parsed["0"]["fill_value"] == "NaN"
    assert parsed["0"]["dimension_names"] == ["c", "y", "x"]
    codec = parsed["0"]["codecs"][0]["configuration"]
    assert [c["name"] for c in codec["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [c["name"] for c in codec["index_codecs"]] == ["bytes", "crc32c"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(make_meta((1, 1), make_spec()), provenance={"min_tissue": NAN}).to_json()


@pytest.mark.parametrize("wrong", [np.zeros((1, 9, 10), np.float32), np.zeros((1, 10, 10)), np.zeros((2, 10, 10), np.float32)])
def test_scores_of_another_shape_or_type_are_refused(tmp_path: Path, wrong: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="must be float32"):
        write_heatmap(tmp_path / "a", make_meta((10, 10), make_spec()), lambda box: wrong)


def test_a_full_disk_is_no_fault_of_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = LocalStore.set

    async def full(self: LocalStore, key: str, value: object) -> None:
        if "/c/" in key:
            raise OSError(errno.ENOSPC, "No space left on device")
        await put(self, key, value)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "set", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; make room"):
        write(tmp_path / "a", random_scores((1, 10, 10)))


def test_summary_by_hand(tmp_path: Path) -> None:
    scores = np.array([[[0.5, NAN], [0.7, 0.1]], [[-3.0, NAN], [-2.0, -1.0]], [[NAN, NAN], [NAN, NAN]]], np.float32)
    a, b, c = write(tmp_path / "a", scores, replace(make_spec(3), threshold=(0.7, -2.0, 0.0))).classes
    pixel_mm2 = (448 * 0.25) ** 2 / 1e6
    # 0.7 as float32 is below 0.7 as float64 and counts all the same.
    assert (a.name, a.predicted_px, a.present_px, a.max, a.area_mm2) == ("class 0", 3, 1, float(np.float32(0.7)), pixel_mm2)
    assert a.mean == pytest.approx(1.3 / 3, abs=1e-7)
    assert (b.predicted_px, b.present_px, b.mean, b.max, b.area_mm2) == (3, 2, -2.0, -1.0, 2 * pixel_mm2)
    assert (c.predicted_px, c.mean, c.max, c.area_mm2) == (0, None, None, None)


def test_summary_over_several_shards(tmp_path: Path) -> None:
    scores = random_scores((2, 2100, 2100))
    for found, plane in zip(write(tmp_path / "a", scores).classes, scores.astype(np.float64), strict=True):
        assert found.predicted_px == np.count_nonzero(~np.isnan(plane))
        assert found.present_px == np.count_nonzero(plane >= 0.5)
        assert found.mean == pytest.approx(np.nanmean(plane), rel=1e-12)
        assert found.max == np.nanmax(plane)


# --- what it says --------------------------------------------------------------------------------------------------


def datasets(path: Path) -> list[tuple[list[float], list[float]]]:
    """(scale, translation) per level, as any NGFF reader finds them."""
    ome = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]
    transforms = [d["coordinateTransformations"] for d in ome["multiscales"][0]["datasets"]]
    assert all([t["type"] for t in both] == ["scale", "translation"] for both in transforms)
    return [(scale["scale"], translation["translation"]) for scale, translation in transforms]


@pytest.mark.parametrize("stride_px", [224, 56])
def test_level_0_lies_where_the_tiles_were_read(tmp_path: Path, stride_px: int) -> None:
    tile_px, mpp, slide_mpp = 224, 0.5, 0.2485
    frame = TileGrid((100_000, 60_000), slide_mpp, mpp, tile_px, stride_px).heatmap_frame(output_px=1)
    write_heatmap(
        tmp_path / "a", replace(make_meta((1, 1), make_spec()), frame=frame), lambda box: np.zeros((1, *box.shape), np.float32)
    )
    scale, translation = datasets(tmp_path / "a")[0]
    assert scale == pytest.approx([1, stride_px * mpp, stride_px * mpp], rel=1e-15)
    offset = (tile_px * mpp - slide_mpp) / 2
    assert translation == pytest.approx([0, offset, offset], rel=1e-13)
    # Heatmap pixel (300, 200) as um is the centre of tile (300, 200), from the centre of the slide's pixel 0.
    tile_centre_l0 = 300 * stride_px * (mpp / slide_mpp) + tile_px / 2 * (mpp / slide_mpp)
    assert 300 * scale[1] + translation[1] == pytest.approx((tile_centre_l0 - 0.5) * slide_mpp, rel=1e-13)


def test_dense_heatmap_by_hand(tmp_path: Path) -> None:
    frame = HeatmapFrame((600, 600), l0_origin=0.0, l0_pixel=4.0, slide_mpp=0.25)
    write_heatmap(
        tmp_path / "a", replace(make_meta((1, 1), make_spec()), frame=frame), lambda box: np.zeros((1, *box.shape), np.float32)
    )
    # Pixel centres in um from the centre of slide pixel 0: (4 - 1) / 2 * 0.25, then the same from 8 and 16 px.
    assert datasets(tmp_path / "a") == [
        ([1, 1.0, 1.0], [0, 0.375, 0.375]),
        ([1, 2.0, 2.0], [0, 0.875, 0.875]),
        ([1, 4.0, 4.0], [0, 1.875, 1.875]),
    ]


def test_a_lower_pixels_centre_is_the_mean_of_its_level_0_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((1, 1024, 2048)))
    (_, scale, _), (_, first, _) = datasets(tmp_path / "a")[0]
    heatmap = open_heatmap(tmp_path / "a")
    for k, ((_, y_scale, x_scale), (_, y_first, x_first)) in enumerate(datasets(tmp_path / "a")):
        for i in (0, 1, 77):
            below = (np.arange(i * 2**k, (i + 1) * 2**k) * scale + first).mean()
            assert i * y_scale + y_first == pytest.approx(below, rel=1e-14)
            assert i * x_scale + x_first == pytest.approx(below, rel=1e-14)
            # The frame of the level says the same in level-0 px with (0, 0) at the corner.
            centre, _ = heatmap.level_frame(k).heatmap_to_level0(i + 0.5, 0)
            assert (centre - 0.5) * heatmap.frame.slide_mpp == pytest.approx(below, rel=1e-14)


def test_channels_for_viewers(tmp_path: Path) -> None:
    spec = replace(make_spec(2), colors=("#ff0000", "#00a0c0"), display=(0.0, 4000.0))
    write(tmp_path / "a", random_scores((2, 8, 8)), spec)
    ome = json.loads((tmp_path / "a" / "zarr.json").read_text())["attributes"]["ome"]
    window = {"min": 0.0, "max": 4000.0, "start": 0.0, "end": 4000.0}
    assert ome["omero"]["channels"] == [
        {"label": "class 0", "color": "FF0000", "window": window, "active": True},
        {"label": "class 1", "color": "00A0C0", "window": window, "active": True},
    ]
    assert ome["multiscales"][0]["name"] == "demo"


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2049, 700)])
def test_three_validators_accept_the_store(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = tmp_path / STORE_NAME
    write(path, random_scores(shape))
    assert assert_valid(path) == len(make_levels(shape[0], shape[1:]))


# --- reading -------------------------------------------------------------------------------------------------------


def test_open_gives_back_all_that_was_said(tmp_path: Path) -> None:
    spec = replace(make_spec(2), colors=("#ff0000", "#00a0c0"), display=(0.0, 9.5), units="nuclei per mm2", scores="value")
    meta = make_meta((300, 200), replace(spec, threshold=(0.1, 7.0), read=ReadRule("0", False, "bicubic")))
    meta = replace(meta, frame=HeatmapFrame((300, 200), -0.3, 224 * 0.5 / 0.2485, 0.2485), stride_px=112)
    write_heatmap(tmp_path / STORE_NAME, meta, reader(random_scores((2, 300, 200))))
    for path in (tmp_path, tmp_path / STORE_NAME, str(tmp_path)):
        heatmap = open_heatmap(path)
        assert heatmap.meta == meta
        assert heatmap.path == tmp_path / STORE_NAME
    assert (heatmap.classes, heatmap.spec, heatmap.frame) == (meta.spec.classes, meta.spec, meta.frame)
    assert heatmap.attrs["schema"] == 2
    assert heatmap.attrs["research_use_only"] is True
    assert heatmap.attrs["frame"]["mpp"] == meta.frame.mpp
    assert heatmap.attrs["provenance"] == meta.provenance
    assert [level.shape for level in heatmap.levels] == [(2, 300, 200), (2, 150, 100)]


def test_coordinates_there_and_back(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((1, 4, 4)))
    heatmap = open_heatmap(tmp_path / "a")
    assert heatmap.level0_to_heatmap(448.0, 672.0) == (1.0, 1.5)
    assert heatmap.heatmap_to_level0(1.0, 1.5) == (448.0, 672.0)


def test_read_gives_any_box_and_refuses_others(tmp_path: Path) -> None:
    scores = random_scores((2, 700, 900))
    write(tmp_path / "a", scores)
    heatmap = open_heatmap(tmp_path / "a")
    np.testing.assert_array_equal(heatmap.read(0, Box(500, 510, 60, 7)), scores[:, 500:560, 510:517])
    np.testing.assert_array_equal(heatmap.levels[0][:, 500:560, 510:517].compute(), scores[:, 500:560, 510:517])
    np.testing.assert_array_equal(heatmap.read(1, Box(349, 0, 1, 450)), halve(scores)[:, 349:])
    for box in (Box(-1, 0, 5, 5), Box(0, 896, 5, 5)):
        with pytest.raises(UsageError, match="reaches out of level 0 of 700 x 900 px"):
            heatmap.read(0, box)
    with pytest.raises(UsageError, match="level 3 does not exist; this heatmap has levels 0 to 2"):
        heatmap.read(3, Box(0, 0, 1, 1))


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_what_is_no_heatmap_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match=f"is no heatmap; give a {STORE_NAME}"):
            open_heatmap(path)
    plain = tmp_path / "file.svs"
    plain.write_bytes(b"")
    with pytest.raises(UsageError, match="is no heatmap; give"):
        open_heatmap(plain)
    zarr.create_group(LocalStore(tmp_path / "other.ome.zarr"), zarr_format=3)
    with pytest.raises(UsageError, match="no heatmap that this program wrote"):
        open_heatmap(tmp_path / "other.ome.zarr")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("zarr.json", lambda j: j["attributes"]["pathology"].update(schema=1), "schema 1, this version reads 2"),
        ("zarr.json", lambda j: j["attributes"]["pathology"].pop("schema"), "schema None, this version reads 2"),
        ("zarr.json", lambda j: j["attributes"]["pathology"].pop("frame"), "attributes are damaged"),
        ("zarr.json", lambda j: j["attributes"]["pathology"]["model"].update(mpp=1e6), "attributes are damaged"),
        ("zarr.json", lambda j: j["attributes"].update(pathology=[1]), "no heatmap that this program wrote"),
        ("zarr.json", lambda j: j["attributes"]["ome"]["multiscales"].clear(), "no heatmap that this program wrote"),
        ("zarr.json", lambda j: j.update(attributes=3), "no heatmap that this program wrote"),
        ("0/zarr.json", lambda j: j.update(shape=[1, 300, 41]), "level 0 is float32"),
        ("1/zarr.json", lambda j: j.pop("codecs"), "array 1 cannot be opened"),
    ],
)
def test_another_schema_and_damaged_metadata_are_refused(
    tmp_path: Path, file: str, change: Callable[[dict[str, object]], object], message: str
) -> None:
    write(tmp_path / "a", random_scores((1, 300, 40)))
    edit(tmp_path / "a" / file, change)
    with pytest.raises(UsageError, match=message):
        open_heatmap(tmp_path / "a")


def test_a_level_that_is_gone_or_unreadable_metadata_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((1, 300, 40)))
    (tmp_path / "a" / "1" / "zarr.json").unlink()
    with pytest.raises(UsageError, match="array 1 cannot be opened"):
        open_heatmap(tmp_path / "a")
    (tmp_path / "a" / "zarr.json").write_bytes(b"\x00\xff")
    with pytest.raises(UsageError, match="no heatmap that this program wrote"):
        open_heatmap(tmp_path / "a")


# --- slides as lazy arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mpp", "chunk_px"), [(0.5, 64), (1.0, 32), (0.77, 50), (0.5, 1000)])
def test_a_lazy_slide_is_read_mpp_of_each_chunk(mpp: float, chunk_px: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (131, 200, 3), np.uint8)
    slide = array_slide(pixels, mpp=0.5, downsamples=(1, 2))
    lazy = slide.to_dask(mpp, chunk_px)
    reads = slide._reader.reads  # type: ignore[attr-defined]
    assert not reads, "nothing is read before it is computed"
    height, width = slide.shape_at(mpp)
    assert (lazy.shape, lazy.dtype) == ((height, width, 3), np.uint8)
    found = lazy.compute()
    assert len(reads) == lazy.npartitions
    for y in range(0, height, chunk_px):
        for x in range(0, width, chunk_px):
            box = Box(y, x, min(chunk_px, height - y), min(chunk_px, width - x))
            np.testing.assert_array_equal(found[box.slices()], slide.read_mpp(box, mpp))
    if mpp == 0.5:
        np.testing.assert_array_equal(found, pixels)


def test_a_slice_of_a_lazy_slide_reads_its_chunks_only() -> None:
    slide = array_slide(np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8))
    reads = slide._reader.reads  # type: ignore[attr-defined]
    whole = slide.to_dask(0.77, 64).compute()
    reads.clear()
    part = slide.to_dask(0.77, 64)[60:70, 10:20].compute()
    assert len(reads) == 2
    np.testing.assert_array_equal(part, whole[60:70, 10:20])
    with pytest.raises(UsageError, match="chunk of 0 px"):
        slide.to_dask(0.5, 0)


def test_opening_a_heatmap_imports_no_dask_and_a_lazy_slide_no_zarr(tmp_path: Path) -> None:
    write(tmp_path / "a", random_scores((1, 4, 4)))
    code = (
        "import sys; from pathology.result import open_heatmap; from pathology.geometry import Box;"
        f"open_heatmap({str(tmp_path / 'a')!r}).read(0, Box(0, 0, 4, 4)); assert 'dask' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, pathology.lazy; assert not {'zarr', 'dask'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
