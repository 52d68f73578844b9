"""Killed at any moment, the same command ends with the same bytes and computes nothing twice."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import Command, command
from slides import cut, smooth_pixels, write_tiff

from pathology.events import read_events

TESTS = Path(__file__).parent
IDENTITY = "pathology.testing:identity?tile_px=32&mpp=0.5"
MEAN = "pathology.testing:mean_colour?tile_px={}&mpp=0.5"
KILLS = 40  # at random moments


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt-get install gcc libc6-dev")
    library = tmp_path_factory.mktemp("shim") / "kill_shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, TESTS / "kill_shim.c", "-ldl"], check=True)
    return library


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """Two slides, and between them one whose file ends before its pixels do."""
    folder = tmp_path / "slides"
    folder.mkdir()
    write_tiff(folder / "a.svs", [smooth_pixels(170, 120)])
    cut(write_tiff(folder / "bad.svs", [smooth_pixels(170, 120, seed=1)]), 0.5)
    write_tiff(folder / "c.svs", [smooth_pixels(120, 90, seed=2)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mode"), [(IDENTITY, []), (MEAN.format(32), []), (IDENTITY, ["overwrite"])], ids=["dense", "classes", "overwrite"]
)
@pytest.mark.fault("F01", "F19")
def test_killed_at_every_file_operation_in_turn(shim: Path, model: str, mode: list[str], slides: Path, tmp_path: Path) -> None:
    """At least 300 kills in all three."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "crash_runner.py"), str(shim), str(slides), model, str(tmp_path), *mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == []
    assert found["results"] == 2
    assert found["operations"] > 120
    # zarr writes from threads, so the number of operations may differ by a few from run to run.
    assert found["killed"] >= found["operations"] - 3


@dataclass
class Chance:
    """Kills at random moments after the first region of a command: the command, one of its workers, or both."""

    random: random.Random
    kills: Counter[str]

    def strike(self, running: Command, out: Path, most: int) -> None:
        before = regions_done(out)
        while running.process.poll() is None and regions_done(out) <= before:
            time.sleep(0.01)
        for victim in self.random.choice([("driver",), ("worker",), ("worker", "driver")]):
            time.sleep(self.random.uniform(0, 0.6))
            pids = [running.process.pid] if victim == "driver" else running.workers()
            if running.process.poll() is None and pids and self.kills.total() < most:
                os.kill(self.random.choice(pids), signal.SIGKILL)
                self.kills[victim] += 1


def regions_done(out: Path) -> int:
    return sum(event["event"] == "region-done" for event in read_events(out))


@pytest.mark.slow
@pytest.mark.fault("F01", "F02")
def test_driver_and_workers_killed_at_random_moments(tmp_path: Path) -> None:
    """Between the first region and the last rename: whoever dies, two slides end as undisturbed and the bad one fails."""
    slides = tmp_path / "slides"
    slides.mkdir()
    write_tiff(slides / "a.svs", [smooth_pixels(1200, 1200)])
    cut(write_tiff(slides / "bad.svs", [smooth_pixels(300, 300)]), 0.5)
    write_tiff(slides / "c.svs", [smooth_pixels(1200, 800, seed=1)])
    arguments = ["run", slides, "--model", MEAN.format(16), "--tissue", "none", "--batch-size", "4", "--threads", "1"]
    with command(*arguments, "--out", tmp_path / "whole") as running:
        said = running.process.communicate()[0]
        assert running.process.returncode == 1, said
    first = manifests(tmp_path / "whole")
    assert len(first) == 2
    chance, moments = Chance(random.Random(1), Counter()), 0
    while chance.kills.total() < KILLS:
        out = tmp_path / f"out{moments}"
        moments += 1
        for _ in range(40):
            with command(*arguments, "--out", out) as running:
                chance.strike(running, out, KILLS)
                said = running.process.communicate()[0]
                assert running.process.returncode in (1, -signal.SIGKILL), said
                assert running.all_gone()
            if running.process.returncode == 1:
                break
        assert manifests(out) == first
        with (out / "summary.csv").open(newline="") as file:
            assert [(row["id"][:1], row["reason"]) for row in csv.DictReader(file)] == [
                ("a", ""),
                ("b", "truncated"),
                ("c", ""),
            ]
        done = Counter((e["slide"], e["region"]) for e in read_events(out) if e["event"] == "region-done")
        assert max(done.values()) == 1
    print(chance.kills)
    assert min(chance.kills["driver"], chance.kills["worker"]) > KILLS / 4


def manifests(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}
