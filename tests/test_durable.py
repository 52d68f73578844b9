"""Files that several processes write at the same time, or die while they do."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from pathology.alive import mark
from pathology.durable import make_folders, new_file, sweep_temporaries, write_file, write_once


def test_two_writers_of_one_path_share_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with new_file(path) as one, new_file(path) as two:
        one(b"one of ")
        two(b"two")
        one(b"one")
    assert path.read_bytes() == b"one of one"  # the last to end; of neither are there parts only
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_leaves_is_swept_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def die() -> None:
        with new_file(path) as write:
            write(b"half")
            os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    (litter,) = tmp_path.iterdir()
    assert mark() not in litter.name
    with new_file(path) as write:
        write(b"whole")
        sweep_temporaries(tmp_path)
        assert not litter.exists()
    assert path.read_bytes() == b"whole"


def test_the_first_of_two_that_find_a_number_is_believed_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_once(tmp_path / "number", b"5") == b"5"
    assert write_once(tmp_path / "number", b"7") == b"5"
    assert [entry.name for entry in tmp_path.iterdir()] == ["number"]

    def no_links(*_: object) -> None:
        raise PermissionError(1, "no links")

    monkeypatch.setattr(os, "link", no_links)
    assert write_once(tmp_path / "other", b"7") == b"7"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["number", "other"]


def test_with_the_folder_for_temporaries_gone_a_file_stays_as_it_is(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"before")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "file", b"after", tmp_path / "gone")
    assert (tmp_path / "file").read_bytes() == b"before"


def test_folders_are_made_within_one_that_must_be_there(tmp_path: Path) -> None:
    make_folders(tmp_path / "a" / "b", within=tmp_path)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        make_folders(tmp_path / "gone" / "b", within=tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
