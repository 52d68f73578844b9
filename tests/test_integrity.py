"""verify names every kind of difference, and changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pathology.errors import UsageError
from pathology.events import emit
from pathology.integrity import verify


@pytest.fixture
def result(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference's result folder, beside its tissue."""
    shutil.copytree(reference.parent, tmp_path / "slides" / "small")
    return tmp_path / "slides" / "small" / reference.name


def differences(folder: Path) -> list[tuple[str, str]]:
    return [(str(d.path.relative_to(folder)), d.what) for d in verify(folder)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    elsewhere = next(p for p in path.parents if p.name == "slides").parent / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_an_untouched_result_has_no_differences(result: Path, tmp_path: Path) -> None:
    assert differences(tmp_path) == differences(result.parent) == differences(result) == []


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("overlay.png", flip, "changed"),
        ("heatmap.ome.zarr/zarr.json", flip, "changed"),
        ("overlay.png", Path.unlink, "missing"),
        ("manifest.json", flip, None),
        ("result.json", Path.unlink, "missing"),
        ("stray.txt", Path.touch, "unexpected"),
        ("heatmap.ome.zarr/9", Path.touch, "unexpected"),
        ("../tissue.png", flip, "changed"),
        ("../stray.txt", Path.touch, "unexpected"),
        ("../stray", Path.mkdir, "unexpected"),
        ("overlay.png", replace_by_link, "changed"),
        ("heatmap.ome.zarr/0/c/0/0/0", replace_by_link, "changed"),
        ("heatmap.ome.zarr/0/c/0/0/0", replace_by_pipe, "changed"),
        ("overlay.png", replace_by_pipe, "changed"),
        ("stray.pipe", os.mkfifo, "unexpected"),
        ("stray.link", replace_by_link, "unexpected"),
        ("../tissue.geojson", Path.unlink, "missing"),
    ],
)
@pytest.mark.fault("F17", "F18")
def test_each_kind_of_difference_is_named(
    result: Path, name: str, change: Callable[[Path], None], what: str | None, tmp_path: Path
) -> None:
    path = result / name
    change(path)
    path = path.parent.resolve() / path.name
    found = [(d.path.parent.resolve() / d.path.name, d.what) for d in verify(tmp_path)]
    if what is None:  # a flipped bit may leave JSON that parses, or not
        assert (path, "changed") in found or (path, "damaged") in found
    else:
        assert found == [(path, what)]


def test_every_file_of_the_store_is_watched(result: Path) -> None:
    for path in sorted(p for p in result.rglob("*") if p.is_file() and p.name not in ("result.json", "manifest.json")):
        data = path.read_bytes()
        flip(path)
        assert differences(result) == [(str(path.relative_to(result)), "changed")]
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "result.json"])
def test_a_record_that_is_no_json_is_damaged(result: Path, name: str) -> None:
    (result / name).write_text("{")
    assert [what for _, what in differences(result)] == ["damaged"]


def test_a_folder_that_is_a_link_is_a_difference(result: Path, tmp_path: Path) -> None:
    (result / "heatmap.ome.zarr" / "0").rename(tmp_path / "elsewhere")
    (result / "heatmap.ome.zarr" / "0").symlink_to(tmp_path / "elsewhere")
    found = differences(result)
    assert ("heatmap.ome.zarr/0/c/0/0/0", "changed") in found
    assert all(name.startswith("heatmap.ome.zarr/0") for name, _ in found)


def test_strays_beside_two_results_are_named_once(result: Path, tmp_path: Path) -> None:
    shutil.copytree(result, result.with_name("zz"))
    (result.parent / "stray.txt").touch()
    assert [(d.path.name, d.what) for d in verify(tmp_path)] == [("stray.txt", "unexpected")]


@pytest.mark.parametrize("where", ["", "slides", "slides/small", "slides/small/{}"])
def test_a_result_that_is_gone_is_missed(where: str, result: Path, tmp_path: Path) -> None:
    emit(tmp_path, "slide-done", {"slide": "small", "model": result.name, "status": "ok", "reason": None})
    emit(tmp_path, "slide-done", {"slide": "../small", "model": "x", "status": "ok", "reason": None})
    emit(tmp_path, "slide-done", {"slide": "..", "model": "..", "status": "ok", "reason": None})
    folder = tmp_path / where.format(result.name)
    assert differences(folder) == []
    shutil.rmtree(result)
    assert [(d.path, d.what) for d in verify(folder)] == [
        (result / "result.json", "missing"),
        (result / "manifest.json", "missing"),
    ]


def test_exports_are_no_difference(result: Path) -> None:
    for name in ("tiles.csv", "tiles.geojson", "heatmap-red.png"):
        (result / name).touch()
    assert differences(result) == []


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no finished result"):
        list(verify(tmp_path))
