"""Whole runs with worker processes that hang, break their device, take all memory, or are killed: others notice nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

import pathology
from pathology.errors import Reason
from pathology.events import read_events
from pathology.integrity import verify
from pathology.outcome import Outcome
from pathology.runner import run
from pathology.watch import Limits
from pipelines.cli import main
from tests.crashing import POISON
from tests.slides import noise_pixels, pyramid, smooth_pixels, tile_span, write_tiff

pytestmark = pytest.mark.slow

UNRULY = Path(__file__).parent / "unruly"
NAMES = ("bad", "good", "other")
POISONED = 6  # region of the bad slide whose tile is what models stumble over


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of two levels and several regions. The second tile of the bad one's level 0 is what models stumble over."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(NAMES):
        pixels = noise_pixels(256, 256, seed=seed)
        if name == "bad":
            pixels[64, 160] = POISON
        write_tiff(folder / f"{name}.tiff", [pixels, *pyramid(pixels, [4])], tile_px=64)
    return folder


def jobs(folder: Path, out: Path, model: str) -> list[pathology.Job]:
    return [
        pathology.Job(
            slide=str(folder / f"{name}.tiff"),
            slide_id=name,
            root=str(folder),
            model=f"tests.crashing:fragile?{model}",
            out=str(out),
            block=2,
            tissue="none",
            batch_size=4,
        )
        for name in NAMES
    ]


def ended(jobs: list[pathology.Job], limits: Limits | None = None) -> dict[str, Outcome]:
    return {outcome.job.slide_id: outcome for outcome in run(jobs, "processes", limits=limits)}


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in out.glob("slides/*/*/manifest.json")}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Manifests of the good ones. Models of other names have other keys, so whose slide it is does not show in `heatmap`."""
    out = tmp_path_factory.mktemp("undisturbed")
    for outcome in run(jobs(folder, out, "flag=/")[1:], "sync"):
        assert outcome.status == "ok"
    return heatmaps(out)


def heatmaps(out: Path) -> dict[str, bytes]:
    """By slide, all chunks of its heatmap, which do not depend on what the model is called."""
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("slides/*/*/*.ome.zarr/**/c/**/*")):
        if path.is_file():
            slide = path.relative_to(out / "slides").parts[0]
            found[slide] = found.get(slide, b"") + path.read_bytes()
    return found


def only_bad_fails(found: dict[str, Outcome], out: Path, undisturbed: dict[str, bytes], reason: Reason) -> str:
    assert {name: outcome.status for name, outcome in found.items()} == {"bad": "failed", "good": "ok", "other": "ok"}
    assert found["bad"].reason is reason, found["bad"].message
    assert heatmaps(out) == undisturbed
    assert list(verify(out)) == []
    return found["bad"].message


@pytest.mark.fault("F25")
def test_a_read_that_hangs_fails_its_slide_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = tile_span(folder / "bad.tiff", 9)
    monkeypatch.setenv("PYTHONPATH", str(UNRULY), prepend=os.pathsep)
    monkeypatch.setenv("UNRULY", f"hang bad.tiff {place}")
    found = ended(jobs(folder, tmp_path, "flag=/"), Limits(read_s=5))
    message = only_bad_fails(found, tmp_path, undisturbed, Reason.TIMEOUT)
    assert message.startswith("a read of the slide did not come back within 5 s, and again when it was tried alone; ")


@pytest.mark.fault("F25")
def test_a_model_that_hangs_on_a_slide_fails_it_alone(folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    found = ended(jobs(folder, tmp_path, "how=hang"), Limits(region_s=20))
    message = only_bad_fails(found, tmp_path, undisturbed, Reason.TIMEOUT)
    assert message.startswith("nothing came on for 20 s, and again when it was tried alone; ")


@pytest.mark.fault("F25")
def test_a_model_that_hangs_once_costs_nothing(folder: Path, tmp_path: Path) -> None:
    found = ended(jobs(folder, tmp_path, f"how=hang&flag={tmp_path / 'flag'}"), Limits(region_s=20))
    assert (tmp_path / "flag").exists()
    assert {outcome.status for outcome in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("how", "scheduler", "words"),
    [
        ("refuse", "sync", "ValueError: no such tile"),
        ("refuse", "processes", "ValueError: no such tile"),
        ("leave", "processes", "SystemExit: 5"),
    ],
)
def test_a_model_that_raises_on_a_slide_fails_it_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], how: str, scheduler: str, words: str
) -> None:
    found = {one.job.slide_id: one for one in run(jobs(folder, tmp_path, f"how={how}"), scheduler)}
    assert words in only_bad_fails(found, tmp_path, undisturbed, Reason.MODEL_ERROR)


def test_a_region_that_takes_longer_than_the_deadline_is_none_that_hangs(folder: Path, tmp_path: Path) -> None:
    pixels = noise_pixels(256, 256)
    pixels[[0, 32, 64, 96], 0] = POISON  # each in a batch of its own
    path = write_tiff(tmp_path / "slow.tiff", [pixels])
    job = replace(jobs(folder, tmp_path / "out", "how=pause")[0], slide=str(path), slide_id="slow", block=8)
    (outcome,) = run([job], "processes", limits=Limits(region_s=20))
    assert outcome.status == "ok", outcome.message
    (done,) = (event for event in read_events(tmp_path / "out") if event["event"] == "region-done")
    assert done["seconds"] > 30


@pytest.mark.fault("F23")
def test_a_poisoned_device_is_left_to_a_new_process(folder: Path, tmp_path: Path) -> None:
    found = ended(jobs(folder, tmp_path, f"how=device&flag={tmp_path / 'flag'}"))
    assert {name: (outcome.status, outcome.message) for name, outcome in found.items()} == dict.fromkeys(NAMES, ("ok", ""))
    poisoned = int((tmp_path / "flag").read_text())
    done = {
        (event["slide"], event["region"]): event["process"]
        for event in read_events(tmp_path)
        if event["event"] == "region-done"
    }
    assert len(done) == len(NAMES) * 16
    assert done["bad", POISONED] != poisoned


@pytest.mark.fault("F23")
def test_a_slide_on_which_the_device_always_fails_fails_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    message = only_bad_fails(ended(jobs(folder, tmp_path, "how=device")), tmp_path, undisturbed, Reason.DEVICE_ERROR)
    assert "device-side assert" in message


@pytest.mark.fault("F23")
def test_a_device_that_is_lost_ends_the_run_and_fails_no_slide(folder: Path, tmp_path: Path) -> None:
    model = f"tests.crashing:fragile?how=device&lasting=1&flag={tmp_path / 'flag'}"
    command = ["run", str(folder), "--model", model, "--out", str(tmp_path / "out"), "--tissue", "none"]
    done = CliRunner().invoke(main, [*command, "--batch-size", "4", "--threads", "1", "--num-workers", "1"])
    assert done.exit_code == 3, done.output
    assert "and in a new process again" in done.output
    assert "failed  " not in done.output
    (tmp_path / "flag").unlink()
    with suppress(FileNotFoundError):
        assert not list((tmp_path / "out").glob("slides/*/failed.json"))


@pytest.mark.fault("F21")
def test_a_model_that_takes_too_much_memory_fails_its_slide_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    found = ended(jobs(folder, tmp_path, "how=memory"), Limits(memory_bytes=3 * 2**30))
    message = only_bad_fails(found, tmp_path, undisturbed, Reason.OUT_OF_MEMORY)
    assert "GB of memory, more than the 3.2 GB that it may" in message


@pytest.mark.fault("F21")
def test_a_reader_that_takes_too_much_memory_fails_its_slide_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = tile_span(folder / "bad.tiff", 9)
    monkeypatch.setenv("PYTHONPATH", str(UNRULY), prepend=os.pathsep)
    monkeypatch.setenv("UNRULY", f"take bad.tiff {place}")
    found = ended(jobs(folder, tmp_path, "flag=/"), Limits(memory_bytes=3 * 2**30))
    only_bad_fails(found, tmp_path, undisturbed, Reason.OUT_OF_MEMORY)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A cgroup of 2 GiB of memory, where this process may make one."""
    group = next(
        root / f"pathology-{os.getpid()}" for root in map(Path, ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")) if root.is_dir()
    )
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if "memory" in group.parts else "memory.max")).write_text(str(2 * 2**30))
    except OSError as error:
        pytest.skip(f"needs leave to make a cgroup: {error}")
    yield group
    group.rmdir()


@pytest.mark.fault("F21")
def test_a_worker_that_the_system_kills_for_memory_fails_its_slide_alone(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], memory_group: Path
) -> None:
    # Of these, whose limit would have been 1.8 GiB by itself, the system is to be the first to kill.
    command = [sys.executable, "-m", "pipelines.cli", "run", str(folder), "--model", "tests.crashing:fragile?how=memory"]
    command += ["--out", str(tmp_path), "--tissue", "none", "--batch-size", "4", "--memory-limit", "9G", "--memory", "128M"]
    enter = f'echo $$ > {memory_group}/cgroup.procs && exec "$@"'
    done = subprocess.run(["sh", "-c", enter, "sh", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    (failed,) = (line for line in done.stdout.splitlines() if line.startswith("failed"))
    assert "out_of_memory: the worker process for a device was killed by the system when memory ran out" in failed
    assert sum(line.startswith("ok ") for line in done.stdout.splitlines()) == 2


def command(folder: Path, out: Path) -> list[str]:
    model = "pathology.testing:mean_colour?tile_px=16&mpp=0.5"
    options = ["--tissue", "none", "--batch-size", "4", "--threads", "1", "--num-workers", "1"]
    return [sys.executable, "-m", "pipelines.cli", "run", str(folder), "--model", model, "--out", str(out), *options]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(6):
        write_tiff(folder / f"s{number}.tiff", [smooth_pixels(600, 600, seed=number)])
    return folder


@pytest.fixture(scope="module")
def many_whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(many, out), check=True, capture_output=True)
    return manifests(out)


def kill_one(process: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kill one of its worker processes, if there is any."""
    with suppress(psutil.NoSuchProcess, IndexError):
        chance.choice(psutil.Process(process.pid).children()).kill()
        return True
    return False


@pytest.mark.fault("F03")
@pytest.mark.parametrize("every_s", [2.0, 6.0])
def test_a_random_worker_is_killed_every_few_seconds(
    many: Path, many_whole: dict[str, bytes], tmp_path: Path, every_s: float
) -> None:
    chance, until = random.Random(1), time.monotonic() + 60
    with subprocess.Popen(command(many, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        over = threading.Event()

        def kill() -> None:
            while not over.wait(every_s) and time.monotonic() < until:
                kill_one(process, chance)

        killer = threading.Thread(target=kill)
        killer.start()
        out, err = process.communicate()
        over.set()
        killer.join()
    assert process.returncode in (0, 3), out + err
    assert "failed  " not in out
    if process.returncode == 3:
        assert "worker processes were killed 10 times in a row" in err.splitlines()[-1]
        subprocess.run(command(many, tmp_path), check=True, capture_output=True)
    assert manifests(tmp_path) == many_whole


@pytest.mark.fault("F03")
def test_as_long_as_something_is_done_between_kills_the_run_finishes(
    many: Path, many_whole: dict[str, bytes], tmp_path: Path
) -> None:
    chance, kills, seen = random.Random(2), 0, 0
    with subprocess.Popen(command(many, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and kills < 8:
            time.sleep(0.05)
            done = sum(event["event"] in ("region-done", "slide-begin", "slide-done") for event in read_events(tmp_path))
            if done > seen:
                seen = done
                kills += kill_one(process, chance)
        out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert kills == 8
    assert manifests(tmp_path) == many_whole


def test_the_options_reach_the_worker(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that nothing can keep ends the worker that tries the model."""
    options = ["--memory-limit", "1M", "--read-timeout", "7", "--region-timeout", "8"]
    done = CliRunner().invoke(main, [*command(folder, tmp_path)[3:], *options])
    assert done.exit_code == 2, done.output
    assert "more than the 0.0 GB that it may" in done.output.splitlines()[-1]
