"""The page on reliability names every row that tests are marked with, and says why where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tests.fault_table import Table

ROOT = Path(__file__).parent.parent


def rows_of_the_page() -> dict[str, str]:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = dict(re.findall(r"^\| ([FMZP]\d\d) \| (.*) \|$", text, flags=re.M))
    return rows | {f"S{k:02}": "" for k in range(1, 41)}


def marked_rows() -> set[str]:
    marks = (
        line
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        for line in file.read_text().splitlines()
        if ".mark.fault(" in line
    )
    return {row for line in marks for row in re.findall(r'"([FSMZP]\d\d)"', line)}


def test_every_row_is_shown_by_a_test_or_says_what_stands_instead() -> None:
    page, marked = rows_of_the_page(), marked_rows()
    assert marked <= set(page)
    without = {row for row, text in page.items() if row not in marked and row[0] != "S"}
    assert {row for row in without if "*" not in page[row]} == set()


@pytest.mark.parametrize("processes", ["0", "2"])
def test_the_table_names_rows_tests_and_results(pytester: pytest.Pytester, processes: str) -> None:
    pytester.makeconftest((ROOT / "tests" / "fault_table.py").read_text())
    pytester.makeini("[pytest]\nmarkers = fault(id, ...): rows")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.fault("F01", "F02")
        def test_good(): pass

        @pytest.mark.fault("F02")
        def test_bad(): assert False

        @pytest.mark.fault("F03")
        @pytest.mark.skip
        def test_skipped(): pass

        def test_other(): pass
        """
    )
    pytester.runpytest_subprocess("-n", processes, "--fault-table", "table.md")
    assert (pytester.path / "table.md").read_text().splitlines()[2:] == [
        "| F01 | passed | `test_good` |",
        "| F02 | failed and passed | `test_bad`, `test_good` |",
        "| F03 | skipped | `test_skipped` |",
    ]


def test_what_another_session_has_written_stays(tmp_path: Path) -> None:
    def session(test: str, row: str, outcome: Literal["passed", "failed"]) -> None:
        report = pytest.TestReport(
            nodeid=f"test_file.py::{test}",
            location=("test_file.py", 0, test),
            keywords={},
            outcome=outcome,
            longrepr=None,
            when="call",
            user_properties=[("fault", row)],
        )
        table = Table(tmp_path / "table.md")
        table.pytest_runtest_logreport(report)
        table.pytest_sessionfinish()

    session("test_quick", "F02", "passed")
    session("test_slow[a, b]", "F02", "failed")
    session("test_other", "F01", "passed")
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| F01 | passed | `test_other` |",
        "| F02 | failed and passed | `test_quick`, `test_slow[a, b]` |",
    ]


def test_the_second_session_of_ci_adds_to_the_table_of_the_first(tmp_path: Path) -> None:
    """pytest takes a word that names a file for a place of tests, and then looks for this option there."""
    sessions = re.findall(r'^make test.* ARGS="(.*?)"', (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert len(sessions) == 2
    (tmp_path / "faults").write_text("of the first\n")
    for words in sessions:
        options = words.replace("$logs", str(tmp_path)).split()
        subprocess.run([sys.executable, "-m", "pytest", "--markers", *options], cwd=ROOT, check=True, capture_output=True)
