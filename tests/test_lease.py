"""Slides claimed by processes that know nothing of each other but a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pathology import lease
from pathology.lease import FREE, OWNER, Leases, Owner, sweep


def test_one_of_two_has_a_slide_until_it_lets_go(tmp_path: Path) -> None:
    one, two = Leases(), Leases()
    assert one.claim(tmp_path, "s") is None
    assert one.claim(tmp_path, "s") is None  # its own
    assert two.claim(tmp_path, "s") == one.owner
    assert str(one.owner).startswith(f"process {os.getpid()} on ")
    assert (one.owns(tmp_path, "s"), two.owns(tmp_path, "s")) == (True, False)
    (tmp_path / "s" / one.owner.token / "work").touch()
    one.release(tmp_path, "s")
    assert [entry.name for entry in (tmp_path / "s").iterdir()] == [FREE]
    assert two.claim(tmp_path, "s") is None
    assert (tmp_path / "s" / two.owner.token / "work").exists()  # goes on where the other stopped
    (tmp_path / "s" / two.owner.token / "work").unlink()
    two.release(tmp_path, "s")
    assert not (tmp_path / "s").exists()
    one.close()
    two.close()


def dead() -> Owner:
    """A process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lease._started(process.pid)
    process.communicate(b"\n")
    return replace(Owner.here(), pid=process.pid, started=started)


def owned_by(owner: Owner, place: Path) -> Path:
    folder = place / owner.token
    folder.mkdir(parents=True)
    (folder / OWNER).write_text(json.dumps({**asdict(owner), "beat": 1}))
    return folder


def test_the_slide_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    owner = dead()
    (owned_by(owner, tmp_path / "s") / "work").touch()
    leases = Leases()
    assert leases.claim(tmp_path, "s") is None
    assert (tmp_path / "s" / leases.owner.token / "work").exists()
    assert not (tmp_path / "s" / owner.token).exists()
    leases.close()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "another"}, {"boot": ""}])
def test_one_that_cannot_be_looked_at_is_waited_for(tmp_path: Path, change: dict[str, str]) -> None:
    """Its own beat counts, by the clock of who waits; what its clock says does not."""
    owner = replace(dead(), **change)
    folder = owned_by(owner, tmp_path / "s")
    leases = Leases(seconds=0.3)
    assert leases.claim(tmp_path, "s") == owner
    time.sleep(0.2)
    (folder / OWNER).write_text(json.dumps({**asdict(owner), "beat": 2}))
    assert leases.claim(tmp_path, "s") == owner
    time.sleep(0.2)
    assert leases.claim(tmp_path, "s") == owner
    time.sleep(0.2)
    assert leases.claim(tmp_path, "s") is None
    leases.close()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_an_owner_who_shows_nothing_that_can_be_read_is_waited_for(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "s" / "0123"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / OWNER).write_text(content)
    leases = Leases(seconds=0.1)
    end = time.monotonic() + 5
    while not leases.owns(tmp_path, "s"):
        assert time.monotonic() < end
        leases.claim(tmp_path, "s")
        time.sleep(0.02)
    leases.close()


def test_who_was_taken_over_has_no_paths_left_and_its_late_rename_changes_nothing(tmp_path: Path) -> None:
    zombie, new = Leases(), Leases()
    assert zombie.claim(tmp_path, "s") is None
    mine = tmp_path / "s" / zombie.owner.token
    (mine / "partial").mkdir()
    # Stopped past its lease: another renames the folder away.
    mine.rename(tmp_path / "s" / new.owner.token)
    with pytest.raises(FileNotFoundError):
        (mine / "partial").rename(tmp_path / "result")
    with pytest.raises(FileNotFoundError):
        (mine / "region").write_text("late")
    assert not zombie.owns(tmp_path, "s")
    zombie.close()  # and lets nothing go that is not its own
    assert (tmp_path / "s" / new.owner.token / "partial").is_dir()


def test_an_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    leases = Leases()
    leases.claim(tmp_path, "s")
    path = tmp_path / "s" / leases.owner.token / OWNER
    end = time.monotonic() + 10
    while json.loads(path.read_text())["beat"] < 3:
        assert time.monotonic() < end
    leases.close()


def claimer(work: Path, ids: list[str], results: multiprocessing.Queue[tuple[str, str]]) -> None:
    leases = Leases()
    for name in ids:
        if leases.claim(work, name) is None:
            results.put((name, leases.owner.token))
    results.put(("", ""))
    time.sleep(2)  # alive while the others claim
    os._exit(0)


def test_of_many_that_claim_at_once_one_wins_each_slide(tmp_path: Path) -> None:
    ids = [f"s{i}" for i in range(60)]  # some a dead process had, some are free, some are new
    owned_by(dead(), tmp_path / ids[0])
    for name in ids[1::3]:
        (tmp_path / name / FREE).mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[str, str]] = context.Queue()
    processes = [context.Process(target=claimer, args=(tmp_path, ids, results)) for _ in range(4)]
    for process in processes:
        process.start()
    won: Counter[str] = Counter()
    ended = 0
    while ended < 4:
        name, _ = results.get(timeout=60)
        ended += not name
        won[name] += bool(name)
    for process in processes:
        process.join()
    assert {name: count for name, count in won.items() if name} == dict.fromkeys(ids, 1)


def test_litter_of_the_dead_is_swept_and_nothing_else(tmp_path: Path) -> None:
    owner, alive = dead(), Owner.here()
    owned_by(owner, tmp_path / f".claim-{owner.token}")
    owned_by(alive, tmp_path / f".claim-{alive.token}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / FREE).mkdir(parents=True)
    (tmp_path / "threads-1").touch()
    sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {f".claim-{alive.token}", "full", "threads-1"}


def test_a_stopped_process_is_not_dead_but_one_that_was_killed_is(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = replace(Owner.here(), pid=process.pid, started=lease._started(process.pid))
    assert not owner.known_dead()
    process.send_signal(signal.SIGSTOP)
    assert not owner.known_dead()
    process.kill()
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is not None
    assert owner.known_dead()  # a zombie that nobody has waited for yet
    process.wait()
    assert owner.known_dead()
    assert threading.active_count() < 20
