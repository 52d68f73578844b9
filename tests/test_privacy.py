"""What names a patient or a person stays out of results: P01 to P03. Names are planted wherever slides carry them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed
import openslide
import pyarrow.parquet as pq
import pytest
import tifffile
from click.testing import CliRunner, Result
from dicom_slides import element, write_series
from PIL import ImageDraw
from slides import noise_pixels, pyramid, smooth_pixels, tile_span, write_tiff

import pathology
from pathology import slide_worker
from pathology.errors import EnvironmentFault, UsageError
from pathology.export.result import export_result
from pathology.readers.direct import DirectReader
from pathology.readers.openslide_reader import PROPERTIES
from pipelines.cli import main

PATIENT, ACCESSION, OPERATOR, BARCODE = "DOE^JOHN", "S19-1234567", "drsmithson", "BC98765432"
APERIO = f"0.5|Patient = {PATIENT}|Accession = {ACCESSION}|User = {OPERATOR}|Title = {BARCODE}"
APERIO += f"|Filename = C:\\{OPERATOR}\\{PATIENT}.svs"
FOLDER, FILE = "Doe John born 1950", f"Johnny_Doe {ACCESSION}"
# Whatever is left of a name after it was cut to plain characters counts as well.
SECRETS = re.compile(rb"doe.?john|johnny.?doe|1234567|drsmithson|bc98765432|born.?1950", re.IGNORECASE)

LABEL = noise_pixels(40, 60)
UID = "1.2.826.0.1.777"

# The only files of an output that may name a slide: what a person looks it up in.
NAMING = re.compile(r"summary\.csv|events/[^/]*\.jsonl|slides/[^/]*/[^/]*/result\.json|\.work/[^/]*/[^/]*/[^/]*/failed\.json")
EXPORTS = ("csv", "qupath", "png", "ngff-0.4")
MODELS = {
    "classes": "pathology.testing:mean_colour?tile_px=64&mpp=0.5",
    "map": "pathology.testing:identity?tile_px=64&mpp=0.5",
    "detections": "pathology.testing:marks?tile_px=64&mpp=0.5",
    "features": "pathology.testing:thumbnail?tile_px=64&mpp=0.5",
}


def plant(folder: Path) -> Path:
    """A folder of slides that carry names in every place, one that cannot be read, and one that is cut in half."""
    home = folder / OPERATOR / FOLDER
    home.mkdir(parents=True)
    pixels = smooth_pixels(260, 300)
    write_tiff(home / f"{FILE}.svs", pyramid(pixels, [1, 2]), mpp=APERIO, label=LABEL, macro=LABEL, compression="jpeg")
    (home / f"{FILE} broken.svs").write_text(PATIENT * 100)
    with tifffile.TiffWriter(home / f"{FILE}.ome.tiff", ome=False) as tiff:
        xml = f'<?xml version="1.0"?><OME><Experimenter UserName="{OPERATOR}"/><Image Name="{PATIENT}">'
        xml += '<Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.5" SizeX="300" SizeY="260" SizeC="3" SizeZ="1" SizeT="1" '
        xml += 'DimensionOrder="XYCZT" Type="uint8" ID="Pixels:0"><Channel ID="Channel:0" SamplesPerPixel="3"/>'
        xml += "<TiffData/></Pixels></Image></OME>"
        tiff.write(pixels, tile=(128, 128), photometric="rgb", description=xml, metadata=None, software=OPERATOR)
    patient = b"".join(
        (
            element(0x0008, 0x1070, "PN", OPERATOR),
            element(0x0010, 0x0010, "PN", PATIENT),
            element(0x0010, 0x0020, "LO", ACCESSION),
            element(0x0010, 0x0030, "DA", "19500101"),
        )
    )
    write_series(home / f"{PATIENT} dicom", UID, pixels, private=patient, prefix=f"{ACCESSION}-")
    return folder / OPERATOR


def run(slides: Path, out: Path, *options: str, scheduler: str = "sync") -> Result:
    command = ["run", str(slides), "--out", str(out), "--scheduler", scheduler, "--tissue", "none", "--threads", "1"]
    return CliRunner().invoke(main, [*command, "--num-workers", "1", *options])


def found_in(data: bytes) -> list[bytes]:
    """The secrets that bytes hold, as text of one or two bytes a letter."""
    return SECRETS.findall(data) + SECRETS.findall(data.replace(b"\0", b""))


def files(out: Path) -> Iterator[tuple[str, Path]]:
    return ((str(path.relative_to(out)), path) for path in sorted(out.rglob("*")) if path.is_file())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> tuple[Path, list[str], Result]:
    """The output of all kinds of models with all exports on planted slides, and all text that was drawn into pictures."""
    folder = tmp_path_factory.mktemp("planted")
    slides, drawn = plant(folder), []
    real = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: Any, words: str, *more: Any, **options: Any) -> None:
        drawn.append(words)
        real(self, xy, words, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHOLOGY_HOME", str(empty_home))
        patch.setattr(ImageDraw.ImageDraw, "text", text)
        models = [word for model in MODELS.values() for word in ("--model", model)]
        done = run(slides, folder / "out", *models)
        for kind in EXPORTS:
            for record in sorted((folder / "out").glob("slides/*/*/result.json")):
                with suppress(UsageError):  # not every kind is made of every kind of answers
                    export_result(record.parent, kind)
    return folder / "out", drawn, done


@pytest.mark.fault("P01")
def test_p01_names_stand_only_where_a_person_looks_a_slide_up(everything: tuple[Path, list[str], Result]) -> None:
    out, _, done = everything
    assert done.exit_code == 1, done.output  # for the slide that is none
    names = [name for name, _ in files(out)]
    ended = [name for name in names if name.endswith("result.json")]
    assert len(ended) == 3 * len(MODELS), done.output
    for wanted in ("heatmap-0.4.ome.zarr", "tiles.geojson", "tiles.csv", "heatmap-red.png", "detections.csv", "features.zarr"):
        assert any(wanted in name for name in names), wanted
    assert any(name.endswith("failed.json") for name in names)
    leaks = {name: found_in(path.read_bytes()) for name, path in files(out) if not NAMING.fullmatch(name)}
    assert len(leaks) > 150
    assert {name: secrets for name, secrets in leaks.items() if secrets} == {}
    # The search would have found them: in the files that may name slides they are.
    assert found_in((out / "summary.csv").read_bytes())
    assert found_in((out / ended[0]).read_bytes())


def test_p01_what_a_file_says_of_a_patient_is_said_nowhere(everything: tuple[Path, list[str], Result]) -> None:
    """Of the slide's own fields nothing is passed on, not even to files that may name the slide, nor to the console."""
    out, _, done = everything
    fields = (BARCODE, "19500101", "C:\\", "Filename", "Patient", "Experimenter")
    assert {name: f for name, path in files(out) for f in fields if f.encode() in path.read_bytes()} == {}
    assert [f for f in fields if f in done.output] == []


def test_p01_ids_stand_in_folder_names_and_in_no_file_below_them(everything: tuple[Path, list[str], Result]) -> None:
    out, drawn, _ = everything
    ids = [folder.name for folder in (out / "slides").iterdir()]
    assert len(ids) == 3
    for name, path in files(out):
        if not NAMING.fullmatch(name):
            data = path.read_bytes()
            assert not [one for one in ids if one.encode() in data], name
    assert drawn
    assert not [words for words in drawn if found_in(words.encode()) or any(one in words for one in ids)]


def test_p01_unfinished_work_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise EnvironmentFault("the disk is full")

    monkeypatch.setattr(slide_worker, "finish", full)
    assert run(plant(tmp_path), tmp_path / "out", "--model", MODELS["classes"]).exit_code == 3
    work = {name: path.read_bytes() for name, path in files(tmp_path / "out") if name.startswith(".work")}
    assert any(name.endswith("plan.json") for name in work)
    assert any(name.endswith("000000.json") for name in work)
    assert {name for name, data in work.items() if found_in(data) and not NAMING.fullmatch(name)} == set()


def test_p01_tasks_of_dask_have_opaque_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    real = distributed.Client.submit

    def submit(self: distributed.Client, function: Any, *arguments: Any, key: str, **options: Any) -> Any:
        keys.append(key)
        return real(self, function, *arguments, key=key, **options)

    monkeypatch.setattr(distributed.Client, "submit", submit)
    slides, out = plant(tmp_path), tmp_path / "out"
    assert run(slides, out, "--model", MODELS["classes"], scheduler="threads").exit_code == 1
    assert len(keys) > 6
    assert [key for key in keys if not re.fullmatch(r"task-[0-9a-f]{32}", key)] == []


def test_p01_models_and_their_registry_know_of_no_slide(everything: tuple[Path, list[str], Result], empty_home: Path) -> None:
    assert [name for name, path in files(empty_home) if found_in(path.read_bytes())] == []


def test_p02_label_and_macro_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole runs, by either reader: not by OpenSlide's calls, not as pages of a TIFF."""

    def opened(*_: object) -> None:
        raise AssertionError("an associated picture was opened")

    slides = plant(tmp_path)
    svs = slides / FOLDER / f"{FILE}.svs"
    with openslide.OpenSlide(svs) as handle:
        assert {"label", "macro"} <= set(handle.associated_images)  # they are there to be opened
    with tifffile.TiffFile(svs) as tiff:
        hidden = [n for n, page in enumerate(tiff.pages) if page.shape[:2] == LABEL.shape[:2]]
        spans = [(page.dataoffsets[0], page.databytecounts[0]) for page in (tiff.pages[n] for n in hidden)]
    assert len(spans) == 2
    reads: list[tuple[int, int]] = []
    own = DirectReader._bytes

    def read(self: DirectReader, file: Any, place: int, count: int) -> bytes:
        if self._name == repr(svs.name):
            reads.append((place, count))
        return own(self, file, place, count)

    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", opened)
    monkeypatch.setattr(openslide.lowlevel, "get_associated_image_dimensions", opened)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(opened))
    for name in ("asarray", "decode", "segments", "asrgb"):
        monkeypatch.setattr(tifffile.TiffPage, name, opened)
    monkeypatch.setattr(DirectReader, "_bytes", read)
    for reader in ("direct", "openslide", "auto"):
        done = run(svs if reader == "direct" else slides, tmp_path / reader, "--model", MODELS["classes"], "--reader", reader)
        assert "   internal: " not in done.output
        assert list((tmp_path / reader).glob("slides/*/*/result.json")), done.output
    place, count = tile_span(svs, 0)
    assert any(at <= place and at + n >= place + count for at, n in reads)  # it is tiles that are seen here
    assert [(at, n) for at, n in reads for label, size in spans if at < label + size and label < at + n] == []


def test_p02_the_label_of_a_dicom_slide_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("an associated picture was opened")

    plant(tmp_path)
    (folder,) = (tmp_path / OPERATOR / FOLDER).glob("*dicom")
    with openslide.OpenSlide(folder / f"{ACCESSION}-0.dcm") as handle:
        assert "label" in handle.associated_images
    monkeypatch.setattr(openslide.lowlevel, "read_associated_image", opened)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(opened))
    assert run(folder, tmp_path / "out", "--model", MODELS["classes"]).exit_code == 0


@pytest.mark.fault("P03")
def test_p03_pictures_tables_and_stores_carry_listed_metadata_only(everything: tuple[Path, list[str], Result]) -> None:
    out, _, _ = everything
    seen = set()
    for name, path in files(out):
        seen.add(path.suffix)
        if path.suffix == ".png":
            assert set(png_chunks(path.read_bytes())) <= {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}, name
        elif path.suffix == ".parquet":
            about = pq.read_schema(path).metadata
            assert set(about) <= {b"schema", b"units", b"kind"}, name
        elif path.name == "zarr.json" and path.parent.suffix == ".zarr":
            attributes = json.loads(path.read_bytes())["attributes"]
            assert set(attributes) <= {"ome", "pathology"}, name
            own = {
                "schema",
                "research_use_only",
                "frame",
                "tile_px",
                "stride_px",
                "fingerprint",
                "model",
                "provenance",
                "encoding",
            }
            assert set(attributes["pathology"]) <= own | {"l0_tile"}, name
            assert set(attributes["pathology"]["provenance"]) == {"key", "fields"}, name
        elif path.name == "manifest.json":
            assert set(json.loads(path.read_bytes())) == {"schema", "key", "fields", "files", "slide_files"}, name
    assert {".png", ".parquet", ".json", ".geojson", ".csv"} <= seen


def png_chunks(data: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(data):
        yield data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")


@pytest.mark.parametrize("kind", ["svs", "dicom"])
def test_p03_of_openslides_properties_only_listed_ones_are_asked_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = plant(tmp_path) / FOLDER
    path = home / f"{FILE}.svs" if kind == "svs" else next(home.glob("*dicom")) / f"{ACCESSION}-0.dcm"
    asked: set[str] = set()
    real = openslide.lowlevel.get_property_value

    def value(handle: Any, name: str) -> str | None:
        asked.add(name)
        answer: str | None = real(handle, name)
        return answer

    with openslide.OpenSlide(path) as handle:
        stated = set(handle.properties)
    assert any(word in name for name in stated for word in ("Patient", "User"))
    monkeypatch.setattr(openslide.lowlevel, "get_property_value", value)
    with pathology.open_slide(path, reader="openslide") as slide:
        known = repr(slide.info)
    assert asked
    assert asked <= PROPERTIES
    assert found_in(known.encode()) == []


def test_p03_a_resolution_that_is_text_is_not_repeated(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)], mpp=f"{PATIENT} {ACCESSION}")
    with pytest.raises(pathology.SlideError, match="its resolution, other text by other text, is not a number") as raised:
        pathology.open_slide(path)
    assert found_in(str(raised.value).encode()) == []
    for sound in ("0,5", "nan", "1.2.3", "-1e"):
        path = write_tiff(tmp_path / "s.svs", [noise_pixels(64, 64)], mpp=sound)
        with pytest.raises(pathology.SlideError, match=re.escape(repr(sound))):
            pathology.open_slide(path)
