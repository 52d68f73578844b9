"""Calls in a process apart: what ends or hangs it is the error of that call alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathology.apart import Apart
from pathology.errors import Reason, SlideError, UsageError


@pytest.fixture
def apart() -> Iterator[Apart]:
    with Apart(1, 30) as apart:
        yield apart


def children() -> int:
    """Processes that this one has started and that still run."""
    return len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_it_answers_from_another_process_which_it_keeps(apart: Apart) -> None:
    first = apart.call("x", os.getpid)
    assert first != os.getpid()
    assert apart.call("x", os.getpid) == first
    with pytest.raises(ValueError, match="invalid literal"):
        apart.call("x", int, "no number")
    assert apart.call("x", os.getpid) == first


@pytest.mark.fault("F24")
@pytest.mark.parametrize(("end", "word"), [((os.abort,), "SIGABRT"), ((os._exit, 7), "code 7")])
def test_who_ends_it_twice_crashed_and_the_next_call_finds_another(apart: Apart, end: tuple[object, ...], word: str) -> None:
    first = apart.call("x", os.getpid)
    with pytest.raises(SlideError, match=word) as caught:
        apart.call("'x.svs'", *end)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.CRASHED
    assert str(caught.value).startswith("'x.svs'")
    assert apart.call("x", os.getpid) != first


def end_once(flag: Path) -> str:
    if not flag.exists():
        flag.touch()
        os.abort()
    return "answered"


def test_who_was_ended_once_is_asked_again(apart: Apart, tmp_path: Path) -> None:
    assert apart.call("x", end_once, tmp_path / "flag") == "answered"


@pytest.mark.fault("F25")
def test_what_does_not_come_back_is_a_timeout() -> None:
    with Apart(1, 1) as apart:
        with pytest.raises(SlideError, match="longer than 1 s") as caught:
            apart.call("x", time.sleep, 600)
        assert caught.value.reason is Reason.TIMEOUT
        apart._deadline_s = 120  # a busy machine may take long to begin a process
        assert apart.call("x", len, "abc") == 3


def test_results_come_in_order_with_errors_among_them() -> None:
    calls = [("a", (1,)), ("b", ("no number",)), ("c", (3,))]
    with Apart(2) as apart:
        one, two, three = apart.results(refuse_text, calls)
    assert (one, three) == (1, 3)
    assert isinstance(two, UsageError)


def refuse_text(value: object) -> object:
    if isinstance(value, str):
        raise UsageError("no number")
    return value


def test_nothing_is_left_of_what_nobody_waits_for() -> None:
    before = children()
    began = time.monotonic()
    with Apart(2) as apart:
        for _ in apart.results(time.sleep, [("a", (0,)), ("b", (600,)), ("c", (600,))]):
            break
    assert children() == before
    assert time.monotonic() - began < 300
