"""Asked to stop, a run ends in time whatever it is doing, and the same command ends with the same bytes."""

from __future__ import annotations

import fcntl
import os
import signal
import termios
import time
from pathlib import Path

import pytest
from processes import Command, command
from slides import noise_pixels, write_tiff

from pathology.events import read_events
from pathology.finish import MANIFEST
from tests.crashing import POISON

MODEL = "tests.crashing:stuck"
TERM, USR1, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 regions; the model may be stuck in one of the first."""
    pixels = noise_pixels(160, 160)
    pixels[64, 32] = POISON
    return write_tiff(tmp_path_factory.mktemp("stop") / "s.svs", [pixels])


def arguments(slide: Path, out: Path, scheduler: str) -> list[object]:
    options = ["--tissue", "none", "--batch-size", "4", "--threads", "1", "--scheduler", scheduler]
    return ["run", slide, "--model", MODEL, "--out", out, *options]


def manifest(out: Path) -> bytes:
    (path,) = out.glob(f"slides/*/*/{MANIFEST}")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The manifest of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with command(*arguments(slide, out, "sync")) as running:
        said = running.process.communicate()[0]
        assert running.process.returncode == 0, said
    return manifest(out)


def wait_until_stuck(running: Command, out: Path, flag: Path) -> None:
    running.wait(flag.exists)
    assert any(event["event"] == "region-start" for event in read_events(out))


def ends_as_undisturbed(slide: Path, out: Path, scheduler: str, whole: bytes) -> None:
    """The same command, whose model is no longer stuck."""
    assert not list(out.glob(f"slides/*/*/{MANIFEST}"))
    with command(*arguments(slide, out, scheduler)) as again:
        said = again.process.communicate()[0]
        assert again.process.returncode == 0, said
    assert manifest(out) == whole


@pytest.mark.fault("F04")
@pytest.mark.parametrize(
    ("scheduler", "number"), [("processes", TERM), ("processes", USR1), ("processes", INT), ("threads", TERM), ("sync", USR1)]
)
def test_a_region_that_takes_longer_than_a_stop_may_is_dropped(
    scheduler: str, number: signal.Signals, slide: Path, whole: bytes, tmp_path: Path
) -> None:
    out, flag = tmp_path / "out", tmp_path / "stuck"
    with command(*arguments(slide, out, scheduler), STUCK_S="100", STUCK_FLAG=str(flag)) as running:
        wait_until_stuck(running, out, flag)
        running.process.send_signal(number)
        asked = time.monotonic()
        said = running.process.communicate(timeout=60)[0]
        assert running.process.returncode == 75, said
        assert time.monotonic() - asked < 10
        assert "run the same command again to go on" in said
        assert "Traceback" not in said
        assert running.all_gone()
    if scheduler != "sync":  # whose only thread is the one that is stuck
        assert [event["why"] for event in read_events(out) if event["event"] == "run-end"] != [""]
    ends_as_undisturbed(slide, out, scheduler, whole)


@pytest.mark.fault("F04")
@pytest.mark.parametrize(("by_nohup", "code"), [(False, 75), (True, 0)])
def test_the_terminal_is_closed(by_nohup: bool, code: int, slide: Path, whole: bytes, tmp_path: Path) -> None:
    """Without `nohup` it is asked to stop; with it, it goes on, and nobody sees what it prints."""
    out, flag = tmp_path / "out", tmp_path / "stuck"
    ours, theirs = os.openpty()

    def begin() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(HUP, signal.SIG_IGN if by_nohup else signal.SIG_DFL)

    stuck_s = "5" if by_nohup else "100"
    with command(
        *arguments(slide, out, "processes"), terminal=theirs, begin=begin, STUCK_S=stuck_s, STUCK_FLAG=str(flag)
    ) as running:
        os.close(theirs)
        running.wait(flag.exists)
        os.close(ours)
        assert running.process.wait(timeout=60) == code
        assert running.all_gone()
    if not by_nohup:
        assert [event["why"] for event in read_events(out) if event["event"] == "run-end"] != [""]
        ends_as_undisturbed(slide, out, "processes", whole)
    assert manifest(out) == whole


@pytest.mark.fault("F06")
def test_a_second_ctrl_c_ends_at_once(slide: Path, whole: bytes, tmp_path: Path) -> None:
    out, flag = tmp_path / "out", tmp_path / "stuck"
    with command(*arguments(slide, out, "processes"), STUCK_S="100", STUCK_FLAG=str(flag)) as running:
        wait_until_stuck(running, out, flag)
        running.process.send_signal(INT)
        time.sleep(1)
        assert running.process.poll() is None  # it lets regions end
        running.process.send_signal(INT)
        asked = time.monotonic()
        running.process.communicate(timeout=60)
        assert (running.process.returncode, time.monotonic() - asked < 2) == (75, True)
        assert running.all_gone()
    ends_as_undisturbed(slide, out, "processes", whole)


@pytest.mark.fault("F05")
def test_killed_a_second_after_it_was_asked_to_stop(slide: Path, whole: bytes, tmp_path: Path) -> None:
    out, flag = tmp_path / "out", tmp_path / "stuck"
    with command(*arguments(slide, out, "processes"), STUCK_S="100", STUCK_FLAG=str(flag)) as running:
        wait_until_stuck(running, out, flag)
        running.process.send_signal(TERM)
        time.sleep(1)
        running.process.kill()
        running.process.communicate(timeout=60)
        assert running.process.returncode == -signal.SIGKILL
        assert running.all_gone()
    ends_as_undisturbed(slide, out, "processes", whole)


@pytest.mark.fault("F04")
def test_asked_before_its_first_slide_it_begins_none(slide: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with command(*arguments(slide, out, "processes")) as running:
        running.wait(lambda: running.heeds(USR1))
        running.process.send_signal(USR1)
        asked = time.monotonic()
        said = running.process.communicate(timeout=60)[0]
        assert (running.process.returncode, time.monotonic() - asked < 10) == (75, True), said
        assert running.all_gone()
    assert [event for event in read_events(out) if event["event"] == "region-start"] == []
