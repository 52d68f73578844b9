"""What all tests share: no deadlines (counts, not clocks), no registry of the user's own, and one finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

import pathology
from pathology.runner import run
from tests.slides import noise_pixels, write_tiff

pytest_plugins = ["pytester", "tests.fault_table"]

settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def home(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of models of the tests' own."""
    monkeypatch.setenv("PATHOLOGY_HOME", str(empty_home))
    return empty_home


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of models of this test's own."""
    monkeypatch.setenv("PATHOLOGY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 x 170 px of noise at 0.5 mpp: 12 x 10 tiles of 32 px at half overlap, 12 regions of 4 x 4 strides."""
    return write_tiff(tmp_path_factory.mktemp("slide") / "small.tiff", [noise_pixels(200, 170)])


@pytest.fixture(scope="session")
def reference_job(small_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> pathology.Job:
    """A job of several regions whose right answer is the slide itself."""
    return pathology.Job(
        slide=str(small_slide),
        slide_id="small",
        root=str(small_slide),
        model="pathology.testing:identity?tile_px=32&mpp=0.5",
        out=str(tmp_path_factory.mktemp("reference")),
        overlap=0.5,
        block=4,
        tissue="none",
        batch_size=4,
    )


@pytest.fixture(scope="session")
def reference(reference_job: pathology.Job, empty_home: Path) -> Path:
    """The result folder of `reference_job`, made by the sequential loop. Copy it before changing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHOLOGY_HOME", str(empty_home))
        (outcome,) = run([reference_job], "sync")
    assert outcome.status == "ok"
    return reference_job.result_folder("identity")
