"""Reasons and faults: each has its remedy, the page lists them all, and they come through processes, events and records."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from slides import smooth_pixels, write_tiff

from pathology import durable
from pathology.errors import EnvironmentFault, Fault, OutOfMemory, PathologyError, Reason, SlideError
from pathology.events import read_events
from pipelines.batch import ENVIRONMENT, SOME_FAILED, exit_code
from pipelines.cli import main

ROOT = Path(__file__).parent.parent
MODEL = "pathology.testing:mean_colour?tile_px=64&mpp=0.5"


def run(*arguments: object) -> Result:
    fixed = ("run", "--model", MODEL, "--scheduler", "sync", "--tissue", "none", "--threads", 1)
    return CliRunner().invoke(main, [str(a) for a in (*fixed, *arguments)])


@pytest.mark.parametrize("kinds", [Reason, Fault])
def test_the_page_lists_each_with_its_remedy(kinds: type[Reason] | type[Fault]) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    first = page.index(f"| {kinds.__name__.lower()} | what it means | what to do |") + 2
    listed = page[first : page.index("", first)]
    assert listed == [f"| `{kind}` | {kind.meaning} | {kind.remedy} |" for kind in kinds]
    assert all(kind.meaning and kind.remedy for kind in kinds)


@pytest.mark.parametrize(
    "error",
    [
        SlideError(Reason.TRUNCATED, "'a.svs' is cut short"),
        EnvironmentFault("no room", Fault.DISK_FULL),
        EnvironmentFault("no scheduler answers"),
        OutOfMemory("no memory for a batch"),
    ],
)
def test_they_come_from_another_process_as_they_were(error: PathologyError) -> None:
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), str(sent), vars(sent)) == (type(error), str(error), vars(error))
    assert exit_code(sent) == (SOME_FAILED if isinstance(error, SlideError) else ENVIRONMENT)


def test_a_word_is_its_reason() -> None:
    for reason in Reason:
        assert Reason(str(reason)) is reason
        assert json.loads(json.dumps({"reason": reason})) == {"reason": str(reason)}


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_run_ends_with_its_reasons_and_their_remedies(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_tiff(folder / "a.svs", [smooth_pixels(200, 200)])
    write_tiff(folder / "b.svs", [smooth_pixels(200, 200)], mpp=None)
    for name in ("c", "d"):
        (folder / f"{name}.svs").touch()
    done = run(folder, "--out", tmp_path / "out", "--log-format", form)
    assert done.exit_code == 1, done.output
    if form == "json":
        assert json.loads(done.output.splitlines()[-1])["reasons"] == {"empty_file": 2, "no_mpp": 1}
        return
    lines = done.output.splitlines()
    assert "2 empty_file: the file has no bytes; copy it again from its source" in lines
    assert "1 no_mpp: the file names no resolution; state it: --slide-mpp, or the slide list's column slide_mpp" in lines


def test_the_events_say_what_of_the_machine_ended_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide, out = write_tiff(tmp_path / "a.svs", [smooth_pixels(200, 200)]), tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_write_all", full)
        done = run(slide, "--out", out)
    assert done.exit_code == 3, done.output
    assert "No space left on device; make room (" in done.output
    assert "bytes are free) or restore access, then run the same again" in done.output
    assert run(slide, "--out", out).exit_code == 0
    ends = [event for event in read_events(out) if event["event"] == "run-end"]
    assert [(end["fault"], bool(end["why"])) for end in ends] == [("disk_full", True), ("", False)]
