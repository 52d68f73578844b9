"""A table of the catalogue of faults: which tests show a row, and how they ended. Loaded by conftest.py.

Promise: `pytest --fault-table FILE` names every row that a test of this session is marked with, also across xdist's processes.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

ROWS = "fault"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="Write which tests show which rows of docs/reliability.md here.")


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
        lines = ["| row | result | tests |", "|---|---|---|"]
        for row, tests in sorted(self._ended.items()):
            outcomes = sorted(set(tests.values()))
            names = ", ".join(f"`{name.partition('::')[2]}`" for name in sorted(tests))
            lines.append(f"| {row} | {' and '.join(outcomes)} | {names} |")
        self._path.write_text("\n".join(lines) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-table")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(Path(path)))
