"""How far the runs of an output folder are, from their events alone. Promise: reads only, whether a run writes meanwhile, was
killed, or goes on what others began; a damaged line is counted and hides no other.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pathology.errors import UsageError
from pathology.events import Log, read_log
from pipelines.check import table

SCHEMA = 1

# The rate is that of regions that ended so recently.
RECENT_S = 600.0
# A run elsewhere that wrote no end counts as going on while its host wrote anything within this time.
QUIET_S = 3600.0
# No event counts or lasts as much.
MOST = 1e15

GOING = ("running", "elsewhere")

Pair = tuple[str, str]  # a slide's id and a model's name
Ended = Literal["done", "partial", "failed"]
DOING = {"slide-open": "opens", "region-start": "infers", "slide-finish": "finishes"}


@dataclass(frozen=True, slots=True)
class Run:
    """One call of `pathology run`.

    state    "running"; "ended", "stopped" (`why`); "gone": its process is no more and it wrote no end; "elsewhere": it wrote
             none and is a process of another machine
    seconds  that it took, or takes so far
    quiet_s  since its end, or else since the last line of any process on its host
    """

    host: str
    pid: int
    began: float
    seconds: float
    state: Literal["running", "ended", "stopped", "gone", "elsewhere"]
    why: str
    quiet_s: float


@dataclass(frozen=True, slots=True)
class Holding:
    """What a process works on, and for how long.

    alive   None for a process of another machine
    region  None where it opens or finishes a slide
    """

    host: str
    pid: int
    alive: bool | None
    doing: str
    slide: str
    model: str
    region: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """The runs that go on, or the last one where none does, and their slides, counted once for each model.

    reasons           of failed and partial slides
    tiles             forward passes since the first of these runs began
    tiles_per_second  of regions that ended within the last 10 minutes, or else of all; None where none did
    seconds_left      None where it cannot be said
    """

    runs: tuple[Run, ...]
    total: int
    done: int
    partial: int
    failed: int
    running: int
    left: int
    reasons: dict[str, int]
    tiles: int
    tiles_per_second: float | None
    seconds_left: float | None
    processes: tuple[Holding, ...]
    damaged_lines: int
    foreign_lines: int

    @property
    def going(self) -> bool:
        """Whether any run goes on, as far as can be told."""
        return any(run.state in GOING for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def read_status(out: Path, now: float) -> Status:
    """The state of the runs under `out` at `now`, in seconds since 1970. Raises UsageError where no run wrote there."""
    return status_of(read_log(out), now, out)


def status_of(log: Log, now: float, out: Path) -> Status:
    """As `read_status`, of events that were read."""
    story = _Story()
    damaged = log.damaged
    for event in log.events:
        try:
            story.add(event)
        except (KeyError, TypeError, ValueError):
            damaged += 1
    if not story.runs:
        more = f"; {log.foreign} lines are of another version of this program" if log.foreign else ""
        raise UsageError(f"{out} holds no events of a run{more}; give the --out folder of one")
    runs = _current([_run(begin, story, now) for begin in story.runs.values()], story)
    since = min(run.began for run in runs)
    pairs = dict.fromkeys(pair for run in runs for pair in story.runs[run.host, run.pid, run.began].pairs)
    ends = {pair: story.ends[pair] for pair in pairs if pair in story.ends}
    going = any(run.state in GOING for run in runs)
    busy = {pair for pair in pairs if going and pair not in ends and story.touched.get(pair, 0.0) >= since}
    states = Counter(end.state for end in ends.values())
    tiles, rate = _rate(story, since, now if going else None)
    left = len(pairs) - len(ends) - len(busy)
    return Status(
        runs=tuple(runs),
        total=len(pairs),
        done=states["done"],
        partial=states["partial"],
        failed=states["failed"],
        running=len(busy),
        left=left,
        reasons=dict(Counter(end.reason for end in ends.values() if end.reason).most_common()),
        tiles=tiles,
        tiles_per_second=rate,
        seconds_left=_seconds_left(story, busy, left, rate, since),
        processes=tuple(_holdings(story, pairs, since, now)),
        damaged_lines=damaged,
        foreign_lines=log.foreign,
    )


@dataclass(frozen=True, slots=True)
class _Begin:
    host: str
    pid: int
    time: float
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class _End:
    state: Ended
    reason: str


@dataclass(frozen=True, slots=True)
class _Claim:
    time: float
    host: str
    pid: int
    event: str


class _Story:
    """What the events say, taken one by one in the order of time. An event that makes no sense raises and changes nothing."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, int, float], _Begin] = {}
        self.over: dict[tuple[str, int, float], tuple[float, str]] = {}  # when a run ended, and why
        self.heard: dict[str, float] = {}  # hosts
        self.ends: dict[Pair, _End] = {}
        self.touched: dict[Pair, float] = {}
        self.begun: dict[Pair, tuple[float, int]] = {}  # when, and the tiles that were left
        self.claims: dict[Pair, dict[int, _Claim]] = {}  # by region, -1: the whole slide
        self.regions: list[tuple[float, float, int, Pair]] = []  # when it began and ended, tiles
        self._drivers: dict[tuple[str, int], float] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        name, time, host, pid = event["event"], event["time"], event["host"], event["pid"]
        self.heard[host] = time
        if name == "run-begin":
            pairs = tuple((_text(slide), _text(model)) for slide in event["slides"] for model in event["models"])
            self._drivers[host, pid] = time
            self.runs[host, pid, time] = _Begin(host, pid, time, pairs)
        elif name == "run-end":
            self.over[host, pid, self._drivers[host, pid]] = time, _text(event["why"])
        elif name in ("slide-done", "slide-kept", "slide-failed"):
            pair = _pair(event)
            status, reason = event.get("status", "failed"), event["reason"] or ""
            state: Ended = status if status in ("partial", "failed") else "done"
            self.ends[pair] = _End(state, _text(reason))
            self.claims.pop(pair, None)
        elif name == "slide-begin":
            pair = _pair(event)
            self.begun[pair] = time, int(_number(event["tiles"]))
            self.claims.pop(pair, None)
            self.ends.pop(pair, None)  # it was done before, and is done again
            self.touched[pair] = time
        elif name == "region-done":
            pair, region = _pair(event), int(_number(event["region"]))
            self.regions.append((time - _number(event["seconds"]), time, int(_number(event["tiles"])), pair))
            self.claims.get(pair, {}).pop(region, None)
        elif name in DOING:
            pair, region = _pair(event), int(_number(event["region"])) if name == "region-start" else -1
            self.claims.setdefault(pair, {})[region] = _Claim(time, host, pid, name)
            self.touched[pair] = time


def _pair(event: Mapping[str, Any]) -> Pair:
    return _text(event["slide"]), _text(event["model"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST:
        raise ValueError(f"{value!r} counts nothing")
    return value


def _run(begin: _Begin, story: _Story, now: float) -> Run:
    name = begin.host, begin.pid, begin.time
    quiet_s = max(0.0, now - story.heard[begin.host])
    if name in story.over:
        ended, why = story.over[name]
        return Run(*name, ended - begin.time, "stopped" if why else "ended", why, max(0.0, now - ended))
    alive = is_alive(begin.host, begin.pid, begin.time)
    state: Literal["running", "gone", "elsewhere"] = "elsewhere" if alive is None else "running" if alive else "gone"
    return Run(*name, max(0.0, now - begin.time), state, "", quiet_s)


def _current(runs: list[Run], story: _Story) -> list[Run]:
    """The runs that go on; the last one where none does."""
    last = max(runs, key=lambda run: run.began)
    going = [r for r in runs if r.state == "running" or (r.state == "elsewhere" and (r is last or r.quiet_s < QUIET_S))]
    return going or [last]


def _rate(story: _Story, since: float, now: float | None) -> tuple[int, float | None]:
    """Tiles since then, and tiles per second of late; `now` None: of the whole run, which is over."""
    regions = [region for region in story.regions if region[1] >= since]
    tiles = sum(count for _, _, count, _ in regions)
    if not regions:
        return 0, None
    first = min(began for began, _, _, _ in regions)
    until = max(ended for _, ended, _, _ in regions) if now is None else now
    start = first if now is None else max(first, until - RECENT_S)
    recent = sum(count for _, ended, count, _ in regions if ended >= start)
    if not recent:
        start, recent = first, tiles
    return tiles, recent / (until - start) if recent and until > start else None


def _seconds_left(story: _Story, busy: Iterable[Pair], left: int, rate: float | None, since: float) -> float | None:
    """Tiles to come over the rate. Slides that have not begun count as those that have, on the mean."""
    busy = set(busy)
    if not busy and not left:
        return 0.0
    begun = {pair: (time, tiles) for pair, (time, tiles) in story.begun.items() if time >= since}
    if rate is None or not begun:
        return None
    to_come = sum(tiles for pair, (_, tiles) in begun.items() if pair in busy)
    to_come -= sum(
        tiles for _, ended, tiles, pair in story.regions if pair in busy and pair in begun and ended >= begun[pair][0]
    )
    unknown = left + len(busy - begun.keys())
    return (max(0, to_come) + unknown * sum(tiles for _, tiles in begun.values()) / len(begun)) / rate


def _holdings(story: _Story, pairs: Iterable[Pair], since: float, now: float) -> Iterator[Holding]:
    held = ((claim, pair, region) for pair in pairs for region, claim in story.claims.get(pair, {}).items())
    for claim, pair, region in sorted(held, key=lambda one: (one[0].host, one[0].pid, one[0].time)):
        if claim.time >= since:
            alive = is_alive(claim.host, claim.pid, claim.time)
            place, seconds = None if region < 0 else region, max(0.0, now - claim.time)
            yield Holding(claim.host, claim.pid, alive, DOING[claim.event], *pair, place, seconds)


def is_alive(host: str, pid: int, since: float) -> bool | None:
    """Whether the process that was `pid` at `since` still runs; None where it is one of another machine."""
    if host != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
        # The name stands in brackets and may hold anything; behind it the state and, 20th, the start in ticks since boot.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, StopIteration):  # another user's, or no Linux: that it is there is all that is known
        return True
    started = int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # Numbers are given again. The clock may have been set since boot: two seconds are no difference.
    return fields[0] not in "ZX" and started <= since + 2


def lines(status: Status) -> Iterator[str]:
    """The status for people."""
    for run in status.runs:
        yield f"run of {run.host}, pid {run.pid}: {_STATES[run.state](run)}"
    counts = {"done": status.done, "partial": status.partial, "failed": status.failed, "running": status.running}
    some = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "done")
    yield f"slides     {some}, {status.left} left of {status.total}"
    if status.reasons:
        yield f"reasons    {', '.join(f'{reason} {n}' for reason, n in status.reasons.items())}"
    rate = "" if status.tiles_per_second is None else f", {status.tiles_per_second:.1f} a second"
    yield f"tiles      {status.tiles}{rate}"
    if status.going:
        yield f"time left  {'unknown' if status.seconds_left is None else 'about ' + clock(status.seconds_left)}"
    if status.processes:
        alive = {None: "", True: "", False: "gone"}
        rows = [("process", "does", "slide", "model", "region", "for", "state")]
        for held in status.processes:
            region = "" if held.region is None else str(held.region)
            what = (held.doing, held.slide, held.model, region, clock(held.seconds), alive[held.alive])
            rows.append((f"{held.host} {held.pid}", *what))
        yield from table(rows)
    if status.damaged_lines:
        yield f"{status.damaged_lines} damaged lines of events were left out"
    if status.foreign_lines:
        yield f"{status.foreign_lines} lines of events are of another version of this program and were left out"


_STATES: dict[str, Callable[[Run], str]] = {
    "running": lambda run: f"began {clock(run.seconds)} ago and goes on",
    "ended": lambda run: f"ended {clock(run.quiet_s)} ago, after {clock(run.seconds)}",
    "stopped": lambda run: f"stopped {clock(run.quiet_s)} ago: {run.why}",
    "gone": lambda run: "gone without an end; run the same command again to go on",
    "elsewhere": lambda run: f"on another machine, which wrote last {clock(run.quiet_s)} ago",
}


def clock(seconds: float) -> str:
    """1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
