"""A table of the catalogue of faults: which tests show a row, and how they ended. Loaded by conftest.py.

Promise: `pytest --fault-table=FILE` names every row that a test of this session is marked with, also across xdist's processes.
What another session has written there stays, so that quick and slow tests make one table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROWS = "fault"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="Add to this table which tests show which rows of faults.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers(ROWS):
            item.user_properties += [(ROWS, row) for row in mark.args]


class Table:
    """Collects how marked tests end, in the process that hears of all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ended: dict[str, dict[str, str]] = defaultdict(dict)  # row -> test -> outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, row in report.user_properties:
            if name == ROWS and (report.when == "call" or report.outcome != "passed"):
                self._ended[str(row)][report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        rows = _read(self._path)
        for row, tests in self._ended.items():
            outcomes, names = rows.setdefault(row, (set(), set()))
            outcomes.update(tests.values())
            names.update(name.partition("::")[2] for name in tests)
        lines = ["| row | result | tests |", "|---|---|---|"]
        for row, (outcomes, names) in sorted(rows.items()):
            lines.append(f"| {row} | {' and '.join(sorted(outcomes))} | {', '.join(f'`{name}`' for name in sorted(names))} |")
        self._path.write_text("\n".join(lines) + "\n")


def _read(path: Path) -> dict[str, tuple[set[str], set[str]]]:
    """The results and tests of each row of a table."""
    if not path.exists():
        return {}
    rows = re.findall(r"^\| ([A-Z]\d\d) \| (.*?) \| (.*) \|$", path.read_text(), flags=re.M)
    return {row: (set(outcomes.split(" and ")), set(re.findall(r"`([^`]*)`", tests))) for row, outcomes, tests in rows}


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(path)))
