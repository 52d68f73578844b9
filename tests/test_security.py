"""docs/security.md names tests that exist, and the controls that have no better place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from slides import smooth_pixels, write_tiff

from pathology.job import slug
from pipelines.cli import main

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_page_names_exists() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20
    assert named - there == set()
    # Each control has one: a row of a table that ends without would be a claim.
    rows = [
        line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| threat", "| promise"))
    ]
    assert [row for row in rows if not re.search(r"`test_\w+`[^|]*\|$", row)] == []


@pytest.mark.parametrize("name", ["../../up", "/etc/x", "..", "a/../../b", "con\\..\\x", "\x00", "a\nb", ".", "-rf", "~root"])
def test_no_id_leads_out_of_the_output(name: str, tmp_path: Path) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,59}", slug(name))
    write_tiff(tmp_path / "s.svs", [smooth_pixels(64, 64)])
    (tmp_path / "list.csv").write_text(f'slide,id\ns.svs,"{name}"\n')
    before = set(tmp_path.rglob("*"))
    command = ["run", str(tmp_path / "list.csv"), "--out", str(tmp_path / "a" / "b" / "out"), "--scheduler", "sync"]
    CliRunner().invoke(main, [*command, "--threads", "1", "--model", "pathology.testing:mean_colour?tile_px=64&mpp=0.5"])
    made = set(tmp_path.rglob("*")) - before
    outside = {path for path in made if (tmp_path / "a" / "b" / "out") not in (path, *path.parents)}
    assert outside <= {tmp_path / "a", tmp_path / "a" / "b"}
