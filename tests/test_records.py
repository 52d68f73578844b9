"""Records read back: an object of the promised fields or an error, whatever lies there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pathology import open_heatmap
from pathology.errors import SlideError, UsageError
from pathology.finish import read_manifest, read_record
from pathology.integrity import verify
from pathology.records import check_fields, check_files, read_object


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_object(tmp_path / "a.json")


def test_files_that_are_none_or_too_large_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json", 8) == {"a": 1}
    with pytest.raises(ValueError, match="more than 7 bytes"):
        read_object(tmp_path / "a.json", 7)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no file"):
        read_object(tmp_path / "pipe")


def test_fields_are_there_and_of_their_kind() -> None:
    check_fields({"a": 1, "b": "x"}, {"a": (int, float), "b": str})
    for record in ({}, {"a": None}, {"a": "1"}, {"a": True}):
        with pytest.raises(ValueError, match="its a is"):
            check_fields(record, {"a": int})


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "nul\0"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    entry = {"sha256": "0", "bytes": 1}
    check_files({"a/b.json": entry})
    with pytest.raises(ValueError, match="no name of a file"):
        check_files({name: entry})


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("manifest.json", {"files": {"../../../etc/passwd": {"sha256": "0", "bytes": 1}}}),
        ("manifest.json", {"files": {"tiles.parquet": 3}}),
        ("manifest.json", {"slide_files": []}),
        ("result.json", {"manifest_sha256": None}),
        ("result.json", {"bounds": [1, 2]}),
        ("result.json", {"tiles": "many"}),
    ],
)
def test_damaged_records_are_named_by_verify(file: str, change: dict[str, Any], reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference.parent, tmp_path / "slide")
    folder = tmp_path / "slide" / reference.name
    record = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps(record | change))
    with pytest.raises(SlideError, match="is damaged"):
        (read_manifest if file == "manifest.json" else read_record)(folder)
    assert next(verify(folder)).what == "damaged"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1, 10**7, 10**12]}, "shape"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 10**7, 10**7]}}}, "chunks"),
        ({"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]}, "codecs are numcodecs.pickle"),
        ({"codecs": [{"name": "gzip", "configuration": {"level": 1}}]}, "codecs are gzip"),
    ],
)
@pytest.mark.fault("Z01", "Z02", "Z03")
def test_arrays_that_ask_for_more_than_we_write_are_refused(
    change: dict[str, Any], words: str, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "result")
    path = tmp_path / "result" / "heatmap.ome.zarr" / "0" / "zarr.json"
    metadata = json.loads(path.read_bytes())
    plain = {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]} if "chunk_grid" in change else {}
    path.write_text(json.dumps(metadata | plain | change))
    with pytest.raises(UsageError, match=words):
        open_heatmap(tmp_path / "result")
