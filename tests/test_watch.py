"""What a worker may take: time in which nothing comes on, and memory. The time is the test's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pathology import pulse, watch
from pathology.calls import Death, WorkerDied
from pathology.pulse import SLOTS, TICKS, beat, under_way
from pathology.watch import Limits, Pulses, death_by, held_bytes, overweight

LIMITS = Limits(read_s=10, region_s=100)


@pytest.fixture
def pulses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pulses]:
    """Of two processes, of which this is the second."""
    monkeypatch.setattr(pulse, "_page", None)
    monkeypatch.setattr(pulse, "_tick", lambda _: None)  # by hand
    pulses = Pulses(2)
    for number in range(2):
        pulse.show_in(pulses.descriptor, number)
        beat()  # all is loaded
    yield pulses
    os.close(pulses.descriptor)


def death(pulses: Pulses, passed: float, busy: bool = True) -> Death | None:
    found = pulses.overdue(passed, busy, LIMITS)
    return None if found is None else found.death


def test_a_process_that_nobody_watches_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_page", None)
    with under_way("read"):
        beat()


def test_a_read_that_does_not_come_back_is_overdue_though_others_do(pulses: Pulses) -> None:
    begun, over = threading.Event(), threading.Event()

    def hang() -> None:
        with under_way("read"):
            begun.set()
            over.wait()

    thread = threading.Thread(target=hang)
    thread.start()
    begun.wait()
    for _ in range(3):  # the first look only sees that it is there
        with under_way("read"):
            assert death(pulses, 5) is None
    assert death(pulses, 1) is Death.READ
    over.set()
    thread.join()
    assert death(pulses, 5) is None


def test_what_comes_on_within_a_long_read_counts_for_it(pulses: Pulses) -> None:
    with under_way("read"):
        for _ in range(50):
            assert death(pulses, 9) is None
            beat()
        with under_way("read"):  # within the other, in the same thread
            pass
        assert death(pulses, 9) is None
        assert death(pulses, 9) is None
        assert death(pulses, 9) is Death.READ


def test_steps_of_another_thread_are_not_this_reads(pulses: Pulses) -> None:
    with under_way("read"):
        assert death(pulses, 0) is None
        thread = threading.Thread(target=beat)
        thread.start()
        thread.join()
        assert death(pulses, 11) is Death.READ


def test_a_write_has_longer_and_is_told_apart(pulses: Pulses) -> None:
    page = pulse._page
    assert page is not None
    with under_way("write"):
        for number in range(4):
            page.words[TICKS] = number + 1
            assert death(pulses, 33, busy=False) is None
        page.words[TICKS] = 9
        assert death(pulses, 2, busy=False) is Death.WRITE


def test_a_write_that_a_native_call_holds_with_all_its_process_is_not_the_outputs_fault(pulses: Pulses) -> None:
    page = pulse._page
    assert page is not None
    with under_way("write"):
        page.words[TICKS] = 1
        assert death(pulses, 0) is None  # since when no thread of it has run
        assert death(pulses, 99) is None
        assert death(pulses, 2) is Death.STILL


def test_where_nothing_comes_on_only_waiting_counts(pulses: Pulses) -> None:
    assert death(pulses, 1000, busy=False) is None
    for _ in range(20):  # a slow model, of which one piece after the other is done
        beat()
        assert death(pulses, 99) is None
    assert death(pulses, 99) is None
    assert death(pulses, 99) is Death.STILL
    assert death(pulses, 99, busy=False) is None
    assert death(pulses, 99) is None


@pytest.mark.fault("F25")
def test_what_a_process_takes_to_load_its_libraries_is_no_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "_page", None)
    monkeypatch.setattr(pulse, "_tick", lambda _: None)
    monkeypatch.setattr(watch, "START_S", 500)
    pulses = Pulses(2)
    for number in range(2):
        pulse.show_in(pulses.descriptor, number)
        assert death(pulses, 240) is None
    beat()
    pulse.show_in(pulses.descriptor, 0)
    assert death(pulses, 99) is None
    beat()
    assert death(pulses, 99) is None  # now both are loaded
    assert death(pulses, 99) is None
    assert death(pulses, 99) is Death.STILL
    os.close(pulses.descriptor)


def test_more_calls_at_once_than_there_is_room_for_go_unseen(pulses: Pulses, monkeypatch: pytest.MonkeyPatch) -> None:
    page = pulse._page
    assert page is not None
    page.free["write"].clear()
    with under_way("write"):
        assert not page.free["write"]
        assert all(page.words[slot] == 0 for slot in SLOTS["write"])
    assert not page.free["write"]


def test_slots_are_given_back_whatever_ends_the_call(pulses: Pulses) -> None:
    for _ in range(2 * len(SLOTS["read"])):
        with pytest.raises(OSError, match="cut"), under_way("read"):
            raise OSError("cut")
    assert death(pulses, 0) is None
    assert death(pulses, 50) is None


def test_memory_is_what_processes_hold_together() -> None:
    code = "import sys; block = bytearray(b'x') * 300_000_000; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        held = held_bytes(process.pid)
        assert 300_000_000 < held < 400_000_000
        pids = [process.pid, os.getpid()]
        assert overweight(pids, Limits(memory_bytes=20 * held)) is None
        told = overweight(pids, Limits(memory_bytes=held))
        process.communicate(b"")
    assert told is not None
    assert told.death is Death.MEMORY
    assert held_bytes(process.pid) == 0


def test_without_a_number_nearly_all_memory_is_the_limit() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < Limits().most_bytes <= 0.9 * total
    assert Limits(memory_bytes=7).most_bytes == 7


@pytest.mark.parametrize(
    ("code", "death", "words"),
    [
        (134, Death.CRASH, "ended with code 134"),
        (0, Death.CRASH, "ended with code 0"),
        (-signal.SIGABRT, Death.CRASH, "ended by SIGABRT"),
        (-signal.SIGSEGV, Death.CRASH, "ended by SIGSEGV"),
        (-signal.SIGKILL, Death.KILL, "ended by SIGKILL"),
        (-signal.SIGTERM, Death.KILL, "ended by SIGTERM"),
    ],
)
def test_what_native_code_does_to_itself_is_told_from_what_others_do(code: int, death: Death, words: str) -> None:
    found = death_by("it", code, watch.killed_for_memory())
    assert found.death is death
    assert words in str(found)


@pytest.mark.fault("F21")
def test_a_kill_is_put_down_to_memory_where_the_system_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = watch.killed_for_memory()
    monkeypatch.setattr(watch, "killed_for_memory", lambda: before + 1)
    assert death_by("it", -signal.SIGKILL, before).death is Death.MEMORY
    assert death_by("it", -signal.SIGKILL, before + 1).death is Death.KILL
    assert death_by("it", -signal.SIGSEGV, before).death is Death.CRASH


def test_a_death_survives_pickling() -> None:
    import pickle

    died = pickle.loads(pickle.dumps(WorkerDied("so", Death.READ)))
    assert (str(died), died.death) == ("so", Death.READ)
