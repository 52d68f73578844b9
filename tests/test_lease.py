"""Slides claimed by processes that know nothing of each other but a folder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathology import alive, lease
from pathology.alive import known_dead, mark
from pathology.errors import EnvironmentFault
from pathology.job import FREE
from pathology.lease import CLAIM, OWNER, Leases, sweep


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def leases() -> Iterator[Leases]:
    opened = Leases()
    yield opened
    opened.close()


def test_one_of_two_has_a_slide_until_it_lets_go(place: Path, leases: Leases) -> None:
    two = Leases()
    assert leases.claim(place) is None
    assert leases.claim(place) is None  # its own
    holder = two.claim(place)
    assert holder is not None
    assert holder.token == leases.token(place)
    assert str(holder).startswith(f"process {os.getpid()} on ")
    assert (leases.owns(place), two.owns(place)) == (True, False)
    (place / leases.token(place) / "work").touch()
    leases.release(place)
    assert [entry.name for entry in place.iterdir()] == [FREE]
    assert two.claim(place) is None
    assert (place / two.token(place) / "work").exists()  # goes on where the other stopped
    (place / two.token(place) / "work").unlink()
    two.release(place)
    assert not place.exists()
    two.close()


def test_what_the_dead_were_writing_is_no_work(place: Path, leases: Leases) -> None:
    assert leases.claim(place) is None
    (place / leases.token(place) / f"tissue.png.{dead()}-3.tmp").touch()
    leases.release(place)
    assert not place.exists()


def dead() -> str:
    """The token of a process of this system that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    system, *_ = mark().split("-")
    token = f"{system}-{process.pid}-{alive._began(process.pid)}-0"
    process.communicate(b"\n")
    return token


def owned_by(token: str, place: Path) -> Path:
    folder = place / token
    folder.mkdir(parents=True)
    (folder / OWNER).write_text(json.dumps({"token": token, "host": "node7", "pid": 123, "time": 1}))
    return folder


@pytest.mark.fault("F14")
def test_the_slide_of_a_dead_process_is_taken_over_at_once(place: Path, leases: Leases) -> None:
    token = dead()
    (owned_by(token, place) / "work").touch()
    assert leases.claim(place) is None
    assert (place / leases.token(place) / "work").exists()
    assert not (place / token).exists()


@pytest.mark.fault("F14")
@pytest.mark.parametrize("elsewhere", ["000000000000-123-456-0", "x0123456789abcdef-123-0-0"])
def test_one_that_cannot_be_looked_at_is_waited_for(place: Path, elsewhere: str) -> None:
    """Its own beat counts, by the clock of who waits; what its clock says does not."""
    folder = owned_by(elsewhere, place)
    leases = Leases(seconds=0.3)
    assert str(leases.claim(place)) == "process 123 on node7"
    time.sleep(0.2)
    (folder / OWNER).write_text(json.dumps({"token": elsewhere, "host": "node7", "pid": 123, "time": 0}))
    assert str(leases.claim(place)) == "process 123 on node7"
    time.sleep(0.2)
    assert leases.claim(place) is not None
    time.sleep(0.2)
    assert leases.claim(place) is None
    leases.close()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_owner_who_shows_nothing_that_can_be_read_is_waited_for(place: Path, content: str) -> None:
    (place / "0123").mkdir(parents=True)
    (place / "0123" / OWNER).write_text(content)
    leases = Leases(seconds=0.1)
    assert str(leases.claim(place)) == "another process"
    end = time.monotonic() + 5
    while not leases.owns(place):
        assert time.monotonic() < end
        leases.claim(place)
        time.sleep(0.02)
    leases.close()


def take_over(place: Path, former: Leases) -> Path:
    """Make the folder of `former`, as of one stopped past its lease, another's."""
    folder = place / "000000000000-1-1-0"
    (place / former.token(place)).rename(folder)
    return folder


@pytest.mark.fault("F26")
def test_who_was_taken_over_has_no_paths_left_and_its_late_rename_changes_nothing(place: Path, leases: Leases) -> None:
    assert leases.claim(place) is None
    mine = place / leases.token(place)
    (mine / "partial").mkdir()
    other = take_over(place, leases)
    with pytest.raises(FileNotFoundError):
        (mine / "partial").rename(place.parent / "result")
    with pytest.raises(FileNotFoundError):
        (mine / "region").write_text("late")
    assert not leases.owns(place)
    leases.close()  # and lets nothing go that is not its own
    assert (other / "partial").is_dir()


def test_what_a_former_owner_makes_again_is_no_work_and_goes(
    place: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that makes the folders above what it writes cannot bring a lost slide back, nor can a beat."""
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    assert leases.claim(place) is None
    former = leases.token(place)
    (place / former / "partial").mkdir()
    other = take_over(place, leases)
    (place / former / "partial").mkdir(parents=True)
    time.sleep(0.1)
    assert not leases.owns(place)
    two = Leases()
    assert two.claim(place).token == other.name  # type: ignore[union-attr]
    (other / "partial").rmdir()
    (other / OWNER).unlink()
    other.rmdir()
    assert two.claim(place) is None
    assert [entry.name for entry in place.iterdir()] == [two.token(place)]
    two.close()


def test_one_who_lost_a_slide_has_it_again_under_another_name(place: Path, leases: Leases) -> None:
    assert leases.claim(place) is None
    former = leases.token(place)
    take_over(place, leases).rename(place / FREE)
    assert leases.claim(place) is None
    assert leases.owns(place)
    assert leases.token(place) != former
    assert (place / leases.token(place) / OWNER).exists()


def test_free_work_that_nobody_ever_owned_can_be_claimed(place: Path, leases: Leases) -> None:
    (place / FREE / "model").mkdir(parents=True)
    assert leases.claim(place) is None
    assert (place / leases.token(place) / "model").is_dir()
    assert leases.owns(place)


def test_an_owner_beats(place: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    leases.claim(place)
    path = place / leases.token(place) / OWNER
    shown = path.read_bytes()
    end = time.monotonic() + 10
    while path.read_bytes() == shown:
        assert time.monotonic() < end
    assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_a_rename_that_tells_of_an_error_after_it_was_done_is_a_claim(
    place: Path, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server asked twice, because its first answer was lost, finds nothing to rename."""
    rename = Path.rename

    def lost_answer(path: Path, target: Path) -> Path:
        rename(path, target)
        raise FileNotFoundError(errno.ENOENT, "asked again", str(path))

    (place / FREE).mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lost_answer)
        assert leases.claim(place) is None
        assert leases.claim(place.with_name("new")) is None
    assert leases.owns(place)
    assert leases.owns(place.with_name("new"))


def test_an_output_that_vanishes_is_no_place_for_claims(tmp_path: Path, leases: Leases) -> None:
    work = tmp_path / "out" / ".work"
    assert leases.claim(work / "s") is None
    (tmp_path / "out").rename(tmp_path / "gone")
    with pytest.raises(EnvironmentFault, match="is gone; mount it"):
        leases.claim(work / "t")
    leases.close()
    assert not (tmp_path / "out").exists()


def claimer(work: Path, ids: list[str], results: multiprocessing.Queue[str], start: float) -> None:
    leases = Leases()
    time.sleep(max(0.0, start - time.time()))
    for name in ids:
        if leases.claim(work / name) is None:
            results.put(name)
    results.put("")
    time.sleep(2)  # alive while the others claim
    os._exit(0)


@pytest.mark.fault("F13")
def test_of_many_that_claim_at_once_one_wins_each_slide(tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(60)]  # some a dead process had, some are free, some are new
    owned_by(dead(), tmp_path / ids[0])
    for name in ids[1::3]:
        (tmp_path / name / FREE).mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    start = time.time() + 0.3
    processes = [context.Process(target=claimer, args=(tmp_path, ids, results, start)) for _ in range(4)]
    for process in processes:
        process.start()
    won = Counter(_names(results, 4))
    for process in processes:
        process.join()
    assert won == dict.fromkeys(ids, 1)


def _names(results: multiprocessing.Queue[str], ends: int) -> Iterator[str]:
    while ends:
        name = results.get(timeout=60)
        ends -= not name
        if name:
            yield name


def test_litter_of_the_dead_is_swept_and_nothing_else(tmp_path: Path) -> None:
    gone, here = dead(), mark()
    for token in (gone, f"{here}-7"):
        owned_by(token, tmp_path / f"{CLAIM}{token}")
        (tmp_path / f"threads-1.{token}.tmp").touch()
    (tmp_path / f"{CLAIM}{gone}" / gone / OWNER).unlink()  # it died before it had shown itself
    (tmp_path / "old.x0-1-0-2.tmp").touch()
    os.utime(tmp_path / "old.x0-1-0-2.tmp", (1, 1))
    (tmp_path / "elsewhere.x0-1-0-2.tmp").touch()
    (tmp_path / f".repair-{gone}" / "slides").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / FREE).mkdir(parents=True)
    (tmp_path / "threads-1").touch()
    sweep(tmp_path)
    kept = {f"{CLAIM}{here}-7", f"threads-1.{here}-7.tmp", "elsewhere.x0-1-0-2.tmp", "full", "threads-1"}
    assert {entry.name for entry in tmp_path.iterdir()} == kept


def test_a_claim_of_the_dead_that_nothing_was_done_with_is_swept(tmp_path: Path, leases: Leases) -> None:
    claimed, begun, theirs = (tmp_path / "work" / name for name in ("claimed", "begun", "theirs"))
    token = dead()
    owned_by(token, claimed)
    (owned_by(token, begun) / "model").mkdir()
    owned_by("000000000000-123-456-0", theirs)
    assert leases.claim(tmp_path / "work" / "mine") is None
    sweep(tmp_path / "work")
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["begun", "mine", "theirs"]
    assert (begun / token / OWNER).exists()
    assert leases.owns(tmp_path / "work" / "mine")


def test_a_stopped_process_is_not_dead_but_one_that_was_killed_is() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    of_it = f"{mark().split('-')[0]}-{process.pid}-{alive._began(process.pid)}"
    assert not known_dead(of_it)
    process.send_signal(signal.SIGSTOP)
    assert not known_dead(of_it)
    process.kill()
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is not None
    assert known_dead(of_it)  # a zombie that nobody has waited for yet
    process.wait()
    assert known_dead(of_it)


def test_a_mark_is_another_after_a_fork_and_holds_no_dot() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(mark()))
    process.start()
    of_child = ours.recv()
    process.join()
    assert of_child != mark()
    assert known_dead(of_child)
    assert not known_dead(mark())
    assert "." not in mark()


@pytest.mark.parametrize("name", [FREE, "", "-", "--", "slide-0a1b2c3d", "threads-0-0"])
def test_names_that_are_no_marks_are_not_of_the_dead(name: str) -> None:
    assert not known_dead(name)


def test_one_thread_shows_all_that_is_owned(tmp_path: Path, leases: Leases) -> None:
    before = threading.active_count()
    for name in ("a", "b", "c"):
        leases.claim(tmp_path / name)
    assert threading.active_count() == before + 1
