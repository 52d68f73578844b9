"""Nobody reads what a run prints, or it cannot be printed: the work is done all the same, and the exit code tells of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slides import smooth_pixels, write_tiff

MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"
RUN = f"run --model '{MODEL}' --scheduler sync --tissue none --threads 1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slides, the second of which fails."""
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a", "c"):
        write_tiff(slides / f"{name}.svs", [smooth_pixels(100, 150, seed=ord(name))])
    (slides / "b.svs").touch()
    return slides


def shell(words: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `pathology` is the program."""
    program = f'pathology() {{ {sys.executable} -m pipelines.cli "$@"; }}; {words}'
    return subprocess.run(
        ["bash", "-c", program], env={**os.environ, "PYTHONUNBUFFERED": "1"}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "log_format"),
    [
        ("> /dev/full", "text"),
        ("> /dev/full 2>&1", "json"),
        ("| head -1", "json"),
        ("<&- >&-", "text"),
        ("<&- >&- 2>&-", "json"),
    ],
)
def test_a_run_whose_words_reach_nobody_ends_as_any_other(where: str, log_format: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = f"pathology {RUN} {folder} --out {out} --log-format {log_format} {where}"
    done = shell(f"{run}; echo ${{PIPESTATUS[0]}} > {tmp_path}/rc")
    assert (tmp_path / "rc").read_text() == "1\n", done.stderr
    assert done.stderr == ""
    assert len(list(out.glob("slides/*/*/manifest.json"))) == 2
    assert len((out / "summary.csv").read_text().splitlines()) == 4


def test_a_command_whose_answer_is_lost_says_so() -> None:
    done = shell("pathology recipes > /dev/full")
    assert done.returncode == 3
    assert done.stderr == "pathology: [Errno 28] No space left on device\n"
