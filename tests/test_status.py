"""`pathology status`: what the events of a folder say of its runs, by hand, live, after a kill, and through damage."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from slides import smooth_pixels, write_tiff

from pathology.errors import UsageError
from pathology.events import SCHEMA, emit, read_log
from pipelines.cli import main
from pipelines.status import Status, is_alive, lines, read_status

HERE = socket.gethostname()
NOBODY = 2**22 + 1  # no Linux gives such a number to a process
NOW = 1_000_000.0
MODEL = "pathology.testing:mean_colour?tile_px=16&mpp=0.5"


def write(out: Path, host: str, pid: int, *events: tuple[float, str, dict[str, Any]]) -> Path:
    """A process's file of events, each at so many seconds before NOW."""
    path = out / "events" / f"{host}-{pid}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for ago, name, fields in events:
            file.write(json.dumps({"schema": SCHEMA, "time": NOW - ago, "event": name, **fields}) + "\n")
    return path


def of(slide: str, **more: Any) -> dict[str, Any]:
    return {"slide": slide, "model": "m", **more}


def begin(*slides: str) -> dict[str, Any]:
    return {"jobs": len(slides), "slides": list(slides), "models": ["m"], "device": "cpu"}


def counts(status: Status) -> tuple[int, ...]:
    return status.done, status.partial, status.failed, status.running, status.left


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of a machine elsewhere: of seven slides one is done, one partial, two failed, two are under way, one is left."""
    write(
        tmp_path,
        "node-1",
        7,
        (100, "run-begin", begin(*"abcdefg")),
        (60, "slide-failed", of("c", reason="truncated")),
        (50, "slide-failed", of("d", reason="no_mpp")),
    )
    write(
        tmp_path,
        "node-1",
        8,
        (99, "slide-open", of("a")),
        (98, "slide-begin", of("a", regions=2, todo=2, tiles=40)),
        (80, "slide-open", of("b")),
        (79, "slide-begin", of("b", regions=1, todo=1, tiles=60)),
        (70, "slide-finish", of("a")),
        (69, "slide-done", of("a", status="ok", reason=None)),
        (66, "slide-done", of("b", status="partial", reason="corrupt_tiles")),
        (65, "slide-open", of("c")),
        (45, "slide-open", of("e")),
        (44, "slide-begin", of("e", regions=2, todo=2, tiles=80)),
        (30, "slide-open", of("f")),
    )
    write(
        tmp_path,
        "node-1",
        9,
        (90, "region-start", of("a", region=0)),
        (80, "region-done", of("a", region=0, tiles=20, seconds=10.0)),
        (80, "region-start", of("a", region=1)),
        (75, "region-start", of("b", region=0)),
        (70, "region-done", of("a", region=1, tiles=20, seconds=10.0)),
        (67, "region-done", of("b", region=0, tiles=60, seconds=8.0)),
        (40, "region-start", of("e", region=0)),
        (35, "region-start", of("e", region=1)),
        (10, "region-done", of("e", region=1, tiles=50, seconds=25.0)),
    )
    return tmp_path


def test_a_run_by_hand(out: Path) -> None:
    status = read_status(out, NOW)
    assert counts(status) == (1, 1, 2, 2, 1)
    assert status.total == 7
    assert status.reasons == {"corrupt_tiles": 1, "truncated": 1, "no_mpp": 1}
    assert status.tiles == 150
    assert status.tiles_per_second == pytest.approx(150 / 90)  # since the first region began
    # 30 tiles of e are to come; f and g count as the mean of a, b and e.
    assert status.seconds_left == pytest.approx((30 + 2 * 60) / (150 / 90))
    held = [(h.pid, h.alive, h.doing, h.slide, h.region, h.seconds) for h in status.processes]
    assert held == [(8, None, "opens", "f", None, 30.0), (9, None, "infers", "e", 0, 40.0)]
    (run,) = status.runs
    assert (run.host, run.pid, run.state, run.seconds, run.quiet_s) == ("node-1", 7, "elsewhere", 100.0, 10.0)
    assert json.loads(json.dumps(status.to_json()))["processes"][1]["slide"] == "e"
    text = "\n".join(lines(status))
    assert "1 done, 1 partial, 2 failed, 2 running, 1 left of 7" in text
    assert "time left  about 0:01:30" in text


def test_the_rate_is_that_of_the_last_ten_minutes(out: Path) -> None:
    write(out, "node-1", 9, (-1990, "region-done", of("e", region=0, tiles=30, seconds=2030.0)))
    assert read_status(out, NOW + 2000).tiles_per_second == pytest.approx(30 / 600)


def test_a_resumed_run_goes_on_counting(out: Path) -> None:
    write(out, "node-1", 7, (9, "run-end", {"failed": 2, "why": "the run was stopped"}))
    stopped = read_status(out, NOW)
    assert counts(stopped) == (1, 1, 2, 0, 3)
    assert [(r.state, r.why, r.seconds, r.quiet_s) for r in stopped.runs] == [("stopped", "the run was stopped", 91.0, 9.0)]
    assert not stopped.going
    # The same number again: processes of other days share a file.
    write(out, "node-1", 7, (5, "run-begin", begin(*"abcdefg")), (4, "slide-kept", of("a", status="ok", reason=None)))
    resumed = read_status(out, NOW)
    assert counts(resumed) == (1, 1, 2, 0, 3)  # e and f have not begun again
    assert resumed.processes == ()
    write(out, "node-2", 3, (3, "slide-open", of("e")), (2, "slide-begin", of("c", regions=1, todo=1, tiles=5)))
    assert counts(read_status(out, NOW)) == (1, 1, 1, 2, 2)  # c failed before, and is tried again


def test_a_run_of_other_slides_counts_its_own(out: Path) -> None:
    write(out, "node-1", 7, (9, "run-end", {"failed": 2, "why": ""}))
    write(out, "node-1", 17, (5, "run-begin", begin("x", "y")))
    assert counts(read_status(out, NOW)) == (0, 0, 0, 0, 2)


def test_runs_that_share_a_folder_are_counted_together(out: Path) -> None:
    write(out, "node-2", 7, (20, "run-begin", begin(*"gh")), (5, "slide-done", of("h", status="ok_empty", reason=None)))
    status = read_status(out, NOW)
    assert [run.host for run in status.runs] == ["node-1", "node-2"]
    assert status.total == 8
    assert counts(status) == (2, 1, 2, 2, 1)


def test_a_run_elsewhere_that_fell_silent_gives_way_to_a_later_one(out: Path) -> None:
    write(out, "node-2", 7, (-4000, "run-begin", begin("x")))
    status = read_status(out, NOW + 4001)
    assert [run.host for run in status.runs] == ["node-2"]


def test_which_processes_are_gone_is_known_of_this_machine(out: Path) -> None:
    assert is_alive("elsewhere", 1, time.time()) is None
    assert is_alive(HERE, os.getpid(), time.time()) is True
    assert is_alive(HERE, os.getpid(), time.time() - 10**7) is False  # that one had the number before
    assert is_alive(HERE, NOBODY, time.time()) is False
    assert is_alive(HERE, 10**30, time.time()) is False
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(HERE, child.pid, time.time()) is False  # ended, and nobody has asked how
    child.wait()


def test_a_torn_last_line_is_no_damage_and_any_other_is_counted(out: Path) -> None:
    before = read_status(out, NOW)
    path = out / "events" / "node-1-9.jsonl"
    with path.open("ab") as file:
        file.write(b'{"schema": 4, "time": 9999')
    assert read_status(out, NOW) == before
    with path.open("ab") as file:
        file.write(b"\n\x00\xff\n[1]\n\n" + b"[" * 100_000 + b"\n")
        file.write(b'{"schema": 4, "time": NaN, "event": "run-end"}\n')
        file.write(b'{"schema": 4, "time": 1.0, "event": "region-done", "slide": "a"}\n')
        file.write(b'{"schema": 4, "time": 1.0, "event": "region-done", "slide": [], "model": "m", "region": 0}\n')
        file.write(b'{"schema": 1, "time": 1.0, "event": "run-begin", "jobs": 3}\n')
    status = read_status(out, NOW)
    assert (status.damaged_lines, status.foreign_lines) == (7, 1)
    assert counts(status) == counts(before)
    assert "7 damaged lines" in "\n".join(lines(status))


def test_no_damage_raises(out: Path) -> None:
    """Three hundred times some bytes of the files are others: what comes of it is a status, or that there was no run."""
    files = {path: path.read_bytes() for path in sorted((out / "events").iterdir())}
    chance, damaged = random.Random(5), 0
    for _ in range(300):
        for path, data in files.items():
            changed = bytearray(data)
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(changed))
                changed[at : at + chance.randrange(3)] = bytes(chance.choices(b'019.-e"\n{}[]:,NaIxt', k=chance.randrange(4)))
            path.write_bytes(changed)
        try:
            status = read_status(out, NOW)
        except UsageError:
            continue
        "".join(lines(status)) + json.dumps(status.to_json())
        damaged += status.damaged_lines > 0
    assert damaged > 100


def test_a_folder_without_events_is_refused_in_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no events of a run" in done.output


def test_a_reused_file_keeps_both_processes_lines(tmp_path: Path) -> None:
    emit(tmp_path, "run-begin", begin("a"))
    path = tmp_path / "events" / f"{HERE}-{os.getpid()}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"schema": 4, "ti')  # killed while it wrote
    emit(tmp_path, "run-end", {"failed": 0, "why": ""})
    log = read_log(tmp_path)
    assert [event["event"] for event in log.events] == ["run-begin", "run-end"]
    assert log.damaged == 1


def test_finished_before_counts_as_done(tmp_path: Path) -> None:
    """Also where events of the run that did it were thrown away, or never written because it was killed between."""
    slide, bad = write_tiff(tmp_path / "one.svs", [smooth_pixels(100, 100)]), tmp_path / "two.svs"
    bad.write_bytes(b"")
    out = tmp_path / "out"
    command = ["run", str(slide), str(bad), "--model", MODEL, "--out", str(out), "--scheduler", "sync", "--tissue", "none"]
    for _ in range(2):
        assert CliRunner().invoke(main, [*command, "--threads", "1"]).exit_code == 1
        status = read_status(out, time.time())
        assert counts(status) == (1, 0, 1, 0, 0)
        assert status.reasons == {"empty_file": 1}
        assert [run.state for run in status.runs] == ["ended"]
        for path in (out / "events").iterdir():
            path.unlink()


@pytest.mark.slow
def test_status_of_a_run_that_writes_is_killed_and_goes_on(tmp_path: Path) -> None:
    slides = [write_tiff(tmp_path / f"{n}.svs", [smooth_pixels(900, 900, n)]) for n in range(3)]
    (tmp_path / "bad.svs").write_text("this is no slide\n" * 100)
    out = tmp_path / "out"
    run = [sys.executable, "-m", "pipelines.cli", "run", *map(str, slides), str(tmp_path / "bad.svs"), "--tissue", "none"]
    run += ["--batch-size", "4", "--model", MODEL, "--out", str(out)]
    ask = [sys.executable, "-m", "pipelines.cli", "status", str(out), "--json"]

    def asked() -> dict[str, Any]:
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if done.stdout else 2), done.stderr
        return dict(json.loads(done.stdout)) if done.stdout else {}

    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: list[dict[str, Any]] = []
    while not (seen and seen[-1].get("tiles") and seen[-1]["processes"]):
        assert process.poll() is None
        seen.append(asked())
    process.send_signal(signal.SIGKILL)
    process.wait()
    going, end = seen[-1], time.monotonic() + 10
    assert (going["total"], going["runs"][0]["state"], going["runs"][0]["pid"]) == (4, "running", process.pid)
    assert going["running"] >= 1
    assert going["tiles_per_second"] > 0
    assert all(held["alive"] for held in going["processes"])
    killed = asked()
    while any(held["alive"] for held in killed["processes"]):  # they end with their driver
        assert time.monotonic() < end
        killed = asked()
    assert killed["runs"][0]["state"] == "gone"
    assert killed["running"] == 0
    assert killed["done"] + killed["failed"] + killed["left"] == 4
    assert killed["left"]
    watched = subprocess.Popen([*ask, "--watch", "0.2"], stdout=subprocess.PIPE, text=True)
    assert watched.communicate()[0].count("\n") == 1  # nothing goes on, so it ends
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        status = asked()
        assert status["done"] + status["failed"] + status["running"] + status["left"] == status["total"] == 4
        assert status["damaged_lines"] == 0
    assert process.returncode == 1
    ended = asked()
    assert (ended["done"], ended["failed"], ended["left"], ended["reasons"]) == (3, 1, 0, {"not_a_slide": 1})
    assert [run["state"] for run in ended["runs"]] == ["ended"]
    assert ended["processes"] == []


def test_a_pipe_among_the_events_is_not_waited_for(out: Path) -> None:
    before = read_status(out, NOW)
    os.mkfifo(out / "events" / "node-1-10.jsonl")
    assert read_status(out, NOW) == before
