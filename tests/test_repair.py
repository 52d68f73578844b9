"""Damage is found to the chunk, whatever bit it is, and repaired to the byte or refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.typing import NDArray
from slides import noise_pixels, write_tiff

import pathology
from pathology import integrity, worker
from pathology.errors import UsageError
from pathology.integrity import Damage, find_results, verify
from pathology.lease import Leases
from pathology.model import Model, ModelSpec
from pathology.runner import run
from pathology.seal import MEND_BYTES, is_sealed, mended, sealed, to_json
from pathology.testing import identity
from pipelines.cli import main
from pipelines.repair import repair
from pipelines.verify import lines

DTYPES = ("float32", "uint8")
STORE = "heatmap.ome.zarr"
AGAIN = pathology.Job.again


@dataclass(frozen=True)
class Moody:
    """The identity, but for its mood: a device that computes otherwise on another day."""

    inner: Model

    @property
    def spec(self) -> ModelSpec:
        return self.inner.spec

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.abs(self.inner(tiles) - np.float32(os.environ.get("MOOD", "0")))


def moody() -> Moody:
    return Moody(identity(tile_px=64, mpp=0.5))


@pytest.fixture(scope="module", params=DTYPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Path:
    """An output folder with one dense result: 3 x 700 x 600 px, in 6 chunks of level 0, labels, 77 regions."""
    folder = tmp_path_factory.mktemp("made")
    slide = write_tiff(folder / "s.tiff", [noise_pixels(700, 600)])
    job = pathology.Job(
        slide=str(slide),
        slide_id="s",
        root=str(slide),
        model="tests.test_repair:moody",
        out=str(folder / "out"),
        heatmap_dtype=request.param,
        block=1,
        tissue="none",
        batch_size=8,
        columns=(("case", "17"),),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHOLOGY_HOME", str(empty_home))
        (outcome,) = run([job], "sync")
    assert outcome.status == "ok"
    return folder / "out"


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    """A copy of the result, in an output folder of its own."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out" / "slides" / "s" / "identity"


def contents(result: Path) -> dict[str, bytes]:
    """All files of the slide's folder."""
    return {str(p.relative_to(result.parent)): p.read_bytes() for p in sorted(result.parent.rglob("*")) if p.is_file()}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def unreadable(array: zarr.Array[Any]) -> set[tuple[int, ...]]:
    """Indices of the chunks that zarr itself cannot read."""
    failed = set()
    for index in np.ndindex(*(-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True))):
        at = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, array.chunks, strict=True))
        try:
            array[at]
        except ValueError:
            failed.add(tuple(index))
    return failed


def test_the_chunks_named_are_those_that_zarr_cannot_read(result: Path) -> None:
    store, chance = result / STORE, random.Random(3)
    arrays = ["0", "1", "2", *(["labels/classes/0"] if (store / "labels").exists() else [])]
    for name in arrays:
        (path,) = (p for p in (store / name / "c").rglob("*") if p.is_file())
        data = path.read_bytes()
        for _ in range(6):
            for _ in range(chance.choice((1, 1, 3))):
                flip(path, chance.randrange(8 * len(data)))
            (difference,) = verify(result)
            failed = unreadable(zarr.open_array(store / name, mode="r"))
            named = {d.chunk for d in difference.damage}
            assert difference.path == path
            assert {d.array for d in difference.damage} == {f"{STORE}/{name}"}
            assert named == failed or (named == {None} and failed)
            path.write_bytes(data)


def test_a_chunk_is_named_with_its_place_on_the_slide(result: Path) -> None:
    path = result / STORE / "0" / "c" / "0" / "0" / "0"
    flip(path, 8 * 100)  # in what was written first
    (difference,) = verify(result)
    assert difference.damage == (Damage(f"{STORE}/0", 0, (0, 0, 0), (0, 0, 0), (1, 512, 512), (0.0, 0.0, 512.0, 512.0)),)
    said = CliRunner().invoke(main, ["verify", str(result)])
    assert said.exit_code == 1
    assert "level 0 of heatmap.ome.zarr, chunk (0, 0, 0): slide x 0 to 512, y 0 to 512 px" in said.output
    told = CliRunner().invoke(main, ["verify", str(result), "--json"])
    assert json.loads(told.stdout)["damage"][0]["box"] == [0, 0, 512, 512]
    path.unlink()
    (difference,) = verify(result)
    assert [(d.chunk, d.end, d.box) for d in difference.damage] == [(None, (3, 700, 600), (0.0, 0.0, 700.0, 600.0))]
    lower = result / STORE / "1" / "c" / "0" / "0" / "0"
    lower.write_bytes(lower.read_bytes()[:-1])  # no index where one is due
    assert [d.damage[0].box for d in verify(result)] == [(0.0, 0.0, 700.0, 600.0)] * 2


def test_no_place_is_named_by_metadata_that_are_damaged_themselves(result: Path) -> None:
    flip(result / STORE / "0" / "c" / "0" / "0" / "0", 800)
    flip(result / STORE / "zarr.json", 800)
    differences = {d.path.name: d.damage for d in verify(result)}
    assert [d.box for d in differences["0"]] == [None]
    flip(result / STORE / "0" / "zarr.json", 800)
    assert [d.damage for d in verify(result)] == [(), (), ()]


@pytest.mark.slow
@pytest.mark.fault("F17")
def test_one_flipped_bit_anywhere_is_found_and_repaired(result: Path) -> None:
    """200 of 200, in every file of a finished result; one of each file is repaired as well."""
    sound, chance = contents(result), random.Random(7)
    names = sorted(sound)
    assert len(names) > 10
    found = 0
    for number in range(200):
        path = result.parent / names[number % len(names)]
        flip(path, chance.randrange(8 * path.stat().st_size))
        differences = list(verify(result.parent))
        assert [d.path for d in differences] == [path]
        assert bool(differences[0].damage) == ("/c/" in str(path))
        found += 1
        if number < len(names):
            assert list(repair(result, "sync")) == [path]
            assert contents(result) == sound
        else:
            path.write_bytes(sound[names[number % len(names)]])
    assert found == 200


def test_only_regions_under_damaged_chunks_are_inferred_again(
    result: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    sound, inferred = contents(result), []
    real = worker.run_region

    def counted(job: pathology.Job, index: int, in_order: bool = False) -> int:
        inferred.append(index)
        return real(job, index, in_order)

    monkeypatch.setattr(worker, "run_region", counted)
    regions = json.loads(sound["identity/result.json"])["regions"]
    path = result / STORE / "0" / "c" / "0" / "0" / "0"
    data = path.read_bytes()
    last = len(data) - 4 - 16  # in the index behind the chunks: where the last one begins
    flip(path, 8 * (int.from_bytes(data[last : last + 8], "little") + 20))
    assert [d.chunk for d in next(verify(result)).damage] == [(2, 1, 1)]
    assert list(repair(result, "sync")) == [path]
    assert contents(result) == sound
    if request.node.callspec.params["made"] == "float32":
        assert 0 < len(inferred) < regions / 2
    else:  # a rounded score is no longer what was computed
        assert len(inferred) == regions
    inferred.clear()
    flip(result / "overlay.png", 999)
    assert list(repair(result, "sync")) == [result / "overlay.png"]
    assert contents(result) == sound
    assert len(inferred) == (0 if request.node.callspec.params["made"] == "float32" else regions)


def test_much_damage_at_once_is_repaired(result: Path) -> None:
    sound = contents(result)
    (result / "manifest.json").write_text("nothing")
    (result / "overlay.png").unlink()
    shutil.rmtree(result / STORE / "0" / "c")
    flip(result / "result.json", 800)
    (result / "notes.txt").write_text("mine")
    assert len(list(repair(result, "sync"))) == 4
    assert contents(result) == sound | {"identity/notes.txt": b"mine"}
    assert list(repair(result, "sync")) == []
    assert not list((result.parents[2] / ".work").iterdir())


def test_a_slide_that_a_run_works_on_is_not_repaired_meanwhile(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result / "overlay.png").unlink()
    place = result.parents[2] / ".work" / "s"
    with closing(Leases()) as other:
        assert other.claim(place) is None
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.repair.LEASE_S", 0.0)
            patch.setattr("pipelines.repair.BEAT_S", 0.0)
            with pytest.raises(
                UsageError, match=f"process {os.getpid()} on .* works on slide s; repair it when that has ended"
            ):
                list(repair(result, "sync"))
        assert not (result / "overlay.png").exists()
    assert list(repair(result, "sync")) == [result / "overlay.png"]


def lose_the_record(result: Path, patch: pytest.MonkeyPatch) -> None:
    (result / "result.json").write_bytes(b"\0" * 500)


def change_the_slide(result: Path, patch: pytest.MonkeyPatch) -> None:
    other = write_tiff(result.parents[3] / "other.tiff", [noise_pixels(700, 600, seed=1)])
    patch.setattr(pathology.Job, "again", lambda *asked: replace(AGAIN(*asked), slide=str(other)))


def lose_the_slide(result: Path, patch: pytest.MonkeyPatch) -> None:
    nowhere = str(result.parents[3] / "nowhere.tiff")  # in a folder that is there: else it would be the share that is lost
    patch.setattr(pathology.Job, "again", lambda *asked: replace(AGAIN(*asked), slide=nowhere, root=nowhere))


def change_the_mood(result: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MOOD", "1")
    shutil.rmtree(result / STORE / "0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_the_record, "is lost"),
        (change_the_slide, "would be made otherwise \\(slide "),
        (lose_the_slide, "cannot be computed again \\(missing\\)"),
        (change_the_mood, "came out otherwise"),
    ],
)
def test_what_cannot_come_out_the_same_is_refused_in_one_line_and_left(
    result: Path, change: Callable[[Path, pytest.MonkeyPatch], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(result / "overlay.png", 5000)
    change(result, monkeypatch)
    before = contents(result)
    with pytest.raises(UsageError, match=words) as raised:
        list(repair(result, "sync"))
    assert "\n" not in str(raised.value)
    assert contents(result) == before
    assert not list((result.parents[2] / ".work").iterdir())


def test_a_result_under_another_name_is_refused(result: Path) -> None:
    flip(result / "overlay.png", 5000)
    moved = result.parent.rename(result.parent.with_name("t")) / "identity"
    with pytest.raises(UsageError, match="was moved"):
        list(repair(moved, "sync"))
    with pytest.raises(UsageError, match="does not lie in an output folder"):
        list(repair(moved.rename(moved.parents[2] / "identity"), "sync"))


@pytest.mark.slow
def test_the_command_repairs_and_says_so(result: Path) -> None:
    sound = contents(result)
    flip(result / "overlay.png", 5000)
    done = CliRunner().invoke(main, ["verify", str(result.parents[2]), "--repair"])
    assert done.exit_code == 0, done.output
    assert "changed     " in done.output
    assert "repaired    " in done.output
    assert contents(result) == sound
    (result / "result.json").write_bytes(b"{}")
    done = CliRunner().invoke(main, ["verify", str(result.parents[2]), "--repair"])
    assert done.exit_code == 1
    assert "not repaired: " in done.output
    assert "--overwrite" in done.output


def test_a_seal_shows_every_bit_and_lets_one_be_turned_back() -> None:
    value = {"a": 1.5, "columns": {"seal": "0" * 64, 'x "seal": "': "\n"}, "z": None}
    data = sealed(value)
    assert is_sealed(data)
    assert {k: v for k, v in json.loads(data).items() if k != "seal"} == value
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert not is_sealed(bytes(changed))
        if bit % 97 == 0:
            assert mended(bytes(changed), is_sealed) == data
    assert mended(b"x" + data[1:-1] + b"x", is_sealed) is None
    assert mended(b"\0" * (MEND_BYTES + 1), lambda tried: tried[0] == 1) is None  # too long to try


def test_a_manifest_that_leads_out_of_its_folder_is_damage(result: Path) -> None:
    record = json.loads((result / "result.json").read_bytes())
    manifest = json.loads((result / "manifest.json").read_bytes())
    outside = [{name: {"sha256": "0", "bytes": 1}} for name in ("../../../../../etc/hostname", "/etc/hostname")]
    for files in (*outside, ["overlay.png"], {"overlay.png": 5}, {"overlay.png": {"sha256": "0", "bytes": "many"}}):
        data = to_json({**manifest, "files": files})
        (result / "manifest.json").write_bytes(data)
        (result / "result.json").write_bytes(sealed({**record, "manifest_sha256": hashlib.sha256(data).hexdigest()}))
        assert [(d.path.name, d.what) for d in verify(result)] == [("manifest.json", "damaged")]


def test_damaged_features_are_named_by_their_tiles_and_repaired(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.tiff", [noise_pixels(200, 170)])
    model = "pathology.testing:thumbnail?tile_px=32&mpp=0.5"
    job = pathology.Job(
        slide=str(slide), slide_id="s", root=str(slide), model=model, out=str(tmp_path / "out"), tissue="none", batch_size=8
    )
    (outcome,) = run([job], "sync")
    assert outcome.record is not None
    result, tiles = job.result_folder("thumbnail"), outcome.record["tiles"]
    sound = contents(result)
    path = result / "features.zarr" / "vectors" / "c" / "0" / "0"
    flip(path, 800)
    (difference,) = verify(result)
    (damage,) = difference.damage
    assert (damage.array, damage.level, damage.chunk, damage.box) == ("features.zarr/vectors", None, (0, 0), None)
    assert (damage.first[0], damage.end[0]) == (0, tiles)
    assert [text.split(": ")[-1] for text in lines(difference)][1] == f"rows 0 to {tiles}"
    assert list(repair(result, "sync")) == [path]
    assert contents(result) == sound


def test_a_file_that_the_disk_does_not_give_is_named(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = integrity._sha256

    def failing(path: Path) -> str:
        if path.name == "overlay.png":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(integrity, "_sha256", failing)
    assert [(d.path.name, d.what) for d in verify(result)] == [("overlay.png", "unreadable")]


def test_a_result_that_lost_its_manifest_is_still_a_result(result: Path) -> None:
    (result / "manifest.json").unlink()
    assert find_results(result.parents[2]) == [result]
    assert [(d.path.name, d.what) for d in verify(result.parents[2])] == [("manifest.json", "missing")]
