"""`pathology benchmark`, and what the benchmarks are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
from click.testing import CliRunner
from real_slides import cmu_small_region
from slides import smooth_pixels, write_tiff

from benchmarks.measure import descendants, measure, pss
from benchmarks.slides import SLIDES, Layout, build
from pathology.readers import open_slide
from pipelines import benchmark
from pipelines.cli import main


@pytest.mark.parametrize("cores", [2, 16])
def test_it_measures_reading_the_model_and_both(tmp_path: Path, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "core_count", lambda: cores)
    path = write_tiff(tmp_path / "s.svs", [smooth_pixels(400, 400)], compression="jpeg")
    options = [
        "--model",
        "pathology.testing:mean_colour?tile_px=32",
        "--slide",
        str(path),
        "--tiles",
        "60",
        "--batch-size",
        "8",
    ]
    done = CliRunner().invoke(main, ["benchmark", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "60 tiles" in done.output
    assert ("a run reads with 4 on these cores" in done.output) == (cores == 16)
    for row in ("reading alone", "model alone", "roof", "pipeline, after start-up"):
        (line,) = (x for x in done.output.splitlines() if x.startswith(row))
        each, rate = (float(v) for v in line.split()[-3:-1])
        assert 1000 / rate == pytest.approx(each, abs=6e-4), "as far as it is printed"


def test_a_slide_without_tissue_is_nothing_to_measure(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "s.svs", [np.full((300, 300, 3), 243, np.uint8)])
    done = CliRunner().invoke(main, ["benchmark", "--model", "pathology.testing:mean_colour", "--slide", str(path)])
    assert done.exit_code == 2
    assert "no tissue" in done.output


def test_slides_are_aperio_and_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shared in (("a", False), ("b", True)):
        monkeypatch.setitem(SLIDES, name, Layout((2400, 3120), 0.25, 40, shared=shared))
        path = build(name, cmu_small_region(), tmp_path)
        with openslide.OpenSlide(path) as theirs:
            assert theirs.properties["openslide.vendor"] == "aperio"
            assert theirs.level_dimensions == ((3120, 2400), (780, 600), (195, 150))
            expected = np.asarray(theirs.read_region((700, 600), 0, (500, 400)).convert("RGB"))
        with open_slide(path) as slide:
            assert slide.info.mpp == 0.25
            tile = slide.read_tile((600.0, 700.0), (400.0, 500.0), (400, 500))
        assert np.array_equal(tile, expected)
    assert (tmp_path / "b.svs").stat().st_size < (tmp_path / "a.svs").stat().st_size


def test_all_processes_of_a_command_count() -> None:
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.4: pass"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    command = f"[sys.executable, '-c', {code!r}]"
    script = f"import os, sys; from benchmarks.measure import measure; print(measure({command}, os.environ).cpu_s)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.4  # the child outlives the command, and is waited for


def test_a_command_that_fails_is_shown() -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        measure([sys.executable, "-c", "raise ValueError('no such thing')"], os.environ)


def test_memory_of_processes() -> None:
    assert pss(os.getpid()) > 10**7
    assert pss(2**22 + 1) == 0
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in descendants(os.getpid())
    finally:
        child.communicate(b"\n")
