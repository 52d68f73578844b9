"""The slow file is as slow as it says: by a clock of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slow_file import SlowFile


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 4000)
    with (tmp_path / "f").open("rb") as file:
        yield file.fileno()


class Time:
    """Stands still but for sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_call_takes_its_latency_and_its_bytes(descriptor: int) -> None:
    time = Time()
    slow = SlowFile(0.005, 1e6, clock=lambda: time.now, sleep=time.sleep)
    assert slow.pread(descriptor, 3, 254) == b"\xfe\xff\x00"
    slow.pread(descriptor, 20_000, 0)
    slow.pread(descriptor, 1000, 2_000_000)  # behind the end: no bytes, the latency all the same
    assert time.slept == pytest.approx([0.005003, 0.025, 0.005])
    assert (slow.calls, slow.bytes) == (3, 20_003)


def test_calls_at_once_share_the_rate_but_not_the_latency(descriptor: int) -> None:
    time = Time()
    slow = SlowFile(0.005, 1e6, clock=lambda: time.now, sleep=time.slept.append)
    threads = [threading.Thread(target=slow.pread, args=(descriptor, 10_000, 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(time.slept) == pytest.approx([0.015, 0.025, 0.035, 0.045])


def test_after_a_pause_a_burst_comes_at_once(descriptor: int) -> None:
    time = Time()
    slow = SlowFile(0.005, 1e6, burst_bytes=10_000, clock=lambda: time.now, sleep=time.sleep)
    for count in (10_000, 10_000):
        slow.pread(descriptor, count, 0)
    assert time.slept == pytest.approx([0.005, 0.01])
    time.now += 5
    slow.pread(descriptor, 20_000, 0)
    assert time.slept[-1] == pytest.approx(0.015)
