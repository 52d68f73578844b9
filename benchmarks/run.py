"""How long `pathology run` takes from start to exit, on the sample slide unless told otherwise; a Markdown table on stdout.

    python benchmarks/run.py [--slide SLIDE] [--model MODEL] [--runs 5] [--size PX]

Promise: wall time of the whole command as a user meets it, start-up, tissue, inference and all files included, each run a fresh
process into an empty folder. The first run warms the page cache and is not counted.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed_run(slide: Path, model: str) -> tuple[float, int]:
    """(seconds, tiles) of one run."""
    with tempfile.TemporaryDirectory(prefix="pathology-bench-") as folder:
        command = [str(Path(sys.executable).parent / "pathology"), "run", str(slide), "--model", model, "--out", folder]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        with (Path(folder) / "summary.csv").open(newline="") as table:
            return seconds, sum(int(row["tiles"]) for row in csv.DictReader(table))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `pathology run` from start to exit.")
    parser.add_argument("--slide", type=Path, default=ROOT / "sample_data" / "sample.svs", help="default: the sample slide")
    parser.add_argument("--size", type=int, help="make a synthetic slide of this many px a side instead, seed 1")
    parser.add_argument("--model", default="nuclei-density", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="counted runs (default: %(default)s)")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: use 1 or more")

    with tempfile.TemporaryDirectory(prefix="pathology-bench-slide-") as folder:
        slide = options.slide
        if options.size:
            slide = Path(folder) / f"synthetic-{options.size}.svs"
            subprocess.run(
                [sys.executable, str(ROOT / "sample_data" / "generate.py"), str(slide), "--size", str(options.size)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        timed_run(slide, options.model)
        runs = [timed_run(slide, options.model) for _ in range(options.runs)]

    seconds, tiles = [s for s, _ in runs], runs[0][1]
    median = statistics.median(seconds)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}\n")
    print("| slide | model | tiles | runs | median s | fastest s | slowest s | tiles/s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {slide.name} | {options.model} | {tiles} | {len(runs)} | {median:.2f} | {min(seconds):.2f} | {max(seconds):.2f} "
        f"| {tiles / median:.0f} |"
    )


if __name__ == "__main__":
    main()
