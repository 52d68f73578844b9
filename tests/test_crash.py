"""Killed at any moment, the same command ends with the same bytes and computes nothing twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from slides import smooth_pixels, write_tiff

from pathology.events import read_events

TESTS = Path(__file__).parent
IDENTITY = "pathology.testing:identity?tile_px=32&mpp=0.5"
MEAN = "pathology.testing:mean_colour?tile_px=16&mpp=0.5"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    library = tmp_path_factory.mktemp("shim") / "kill_shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, TESTS / "kill_shim.c", "-ldl"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mode"), [(IDENTITY, []), (MEAN, []), (IDENTITY, ["overwrite"])], ids=["dense", "classes", "overwrite"]
)
@pytest.mark.fault("F01", "F19")
def test_killed_at_every_file_operation_in_turn(shim: Path, model: str, mode: list[str], tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(170, 180)])
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "crash_runner.py"), str(shim), str(slide), model, str(tmp_path), *mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == []
    assert found["operations"] > 60
    # zarr writes from threads, so the number of operations may differ by a few from run to run.
    assert found["killed"] >= found["operations"] - 3


def children(marker: str) -> list[int]:
    """Processes whose environment holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.fault("F01")
def test_killed_at_thirty_random_moments(tmp_path: Path) -> None:
    slide = write_tiff(tmp_path / "s.svs", [smooth_pixels(1600, 1600)])
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "run",
        str(slide),
        "--model",
        MEAN,
        "--tissue",
        "none",
        "--batch-size",
        "4",
    ]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    first = next((tmp_path / "whole").glob("slides/*/*/manifest.json")).read_bytes()
    chance, kills, moments = random.Random(1), 0, 0
    while kills < 30:
        out = tmp_path / f"out{moments}"
        moments += 1
        for _ in range(40):
            marker = f"CRASH_TEST={tmp_path.name}-{time.monotonic_ns()}"
            name, _, value = marker.partition("=")
            process = subprocess.Popen(
                [*command, "--out", str(out)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, name: value},
            )
            before = sum(e["event"] == "region-done" for e in read_events(out))
            while process.poll() is None and sum(e["event"] == "region-done" for e in read_events(out)) <= before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.6))
            if process.poll() is None and kills < 30:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            assert process.returncode in (0, -signal.SIGKILL)
            end = time.monotonic() + 5
            while children(marker) and time.monotonic() < end:
                time.sleep(0.05)
            assert not children(marker)
            if process.returncode == 0:
                break
        assert next(out.glob("slides/*/*/manifest.json")).read_bytes() == first
        done = Counter(e["region"] for e in read_events(out) if e["event"] == "region-done")
        assert max(done.values()) == 1
