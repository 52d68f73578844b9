"""A vector for each tile, with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from pathology import Job, UsageError, features, open_features, open_slide
from pathology.export.result import export_result
from pathology.export.table import read_parquet
from pathology.finish import read_manifest
from pathology.geometry import Box
from pathology.integrity import verify_result
from pathology.runner import run
from tests.slides import smooth_pixels, write_tiff

MODEL = "pathology.testing:thumbnail?tile_px=32"


def job(slide: Path, out: Path, **options: object) -> Job:
    return Job(slide=str(slide), slide_id="s", root=str(slide), model=MODEL, out=str(out), tissue="none", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_every_tile_has_its_vector_at_its_place(
    overlap: float, chunk: int, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK_ROWS", chunk)
    wanted = job(small_slide, tmp_path, overlap=overlap, block=4)
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "ok", outcome.message
    folder = wanted.result_folder("thumbnail")
    found = open_features(folder)
    vectors, origins = np.asarray(found.vectors[...]), np.asarray(found.origins[...])
    count = 7 * 6 if overlap == 0 else 12 * 10
    assert vectors.shape == (count, 48)
    assert outcome.record is not None
    assert (outcome.record["output"], outcome.record["features"]) == ("features", 48)
    assert origins.tolist() == sorted(origins.tolist())
    with open_slide(small_slide) as slide:
        for (y, x), vector in zip(origins.tolist(), vectors, strict=True):
            tile = slide.read(0, Box(int(y), int(x), 32, 32)).astype(np.float64)
            means = tile.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3)).reshape(-1)
            assert np.abs(vector - means).max() < 1e-4
    table = read_parquet(folder / "tiles.parquet")
    assert np.array_equal(np.stack([table.miny, table.minx], axis=1), origins)
    assert found.l0_tile == 32
    assert (folder / "overlay.png").is_file()
    assert not list(verify_result(folder))


def test_the_same_bytes_from_every_cut_and_scheduler(small_slide: Path, tmp_path: Path) -> None:
    manifests = []
    for block, scheduler in ((3, "sync"), (100, "processes")):
        wanted = job(small_slide, tmp_path / scheduler, overlap=0.5, block=block)
        (outcome,) = run([wanted], scheduler)
        assert outcome.status == "ok", outcome.message
        manifests.append(read_manifest(wanted.result_folder("thumbnail")))
    assert manifests[0] == manifests[1]


def test_a_flipped_bit_in_the_vectors_is_found_when_they_are_read(small_slide: Path, tmp_path: Path) -> None:
    wanted = job(small_slide, tmp_path)
    list(run([wanted], "sync"))
    folder = wanted.result_folder("thumbnail")
    chunk = folder / "features.zarr/vectors/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        open_features(folder).vectors[...]


def test_a_slide_of_glass_has_no_vectors(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "glass.tiff", [np.full((200, 200, 3), 255, np.uint8)])
    wanted = Job(slide=str(slide), slide_id="s", root=str(slide), model=MODEL, out=str(tmp_path / "out"))
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "ok_empty", outcome.message
    assert open_features(wanted.result_folder("thumbnail")).vectors.shape == (0, 48)


def test_tiles_that_cannot_be_read_have_no_row(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "bad.tiff", [smooth_pixels(256, 256)], compression="jpeg")
    data = bytearray(path.read_bytes())
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        at, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    data[at : at + count] = bytes(count)
    path.write_bytes(data)
    wanted = job(path, tmp_path / "out")
    (outcome,) = run([wanted], "sync")
    assert outcome.status == "partial", outcome.message
    assert outcome.record is not None
    assert outcome.record["bad_tiles"] == 16
    folder = wanted.result_folder("thumbnail")
    vectors = np.asarray(open_features(folder).vectors[...])
    assert len(vectors) == len(read_parquet(folder / "tiles.parquet")) == 48
    assert np.isfinite(vectors).all()


def test_exports_and_wrong_folders(small_slide: Path, tmp_path: Path) -> None:
    wanted = job(small_slide, tmp_path)
    list(run([wanted], "sync"))
    folder = wanted.result_folder("thumbnail")
    (table,) = export_result(folder, "csv")
    assert table.read_text().splitlines()[0] == "minx,miny,width,height,coverage"
    with pytest.raises(UsageError, match="holds features, which cannot be written as png; use csv"):
        export_result(folder, "png")
    with pytest.raises(UsageError, match="holds no features"):
        open_features(tmp_path)
    zarr.open_group(folder / "features.zarr", mode="r+").attrs["pathology"] = {"schema": 99, "l0_tile": 1}
    with pytest.raises(UsageError, match="schema 99"):
        open_features(folder)
