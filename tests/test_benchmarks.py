"""The benchmarks' arithmetic: figures from rounds, what peers are said to have done, whose scores are compared with whose."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from real_slides import cmu_small_region

from benchmarks import peers, run
from benchmarks.page import EXACT, TILE_MM2, after_start, medians, page, proportion, rate, roof_share
from benchmarks.slides import SLIDES, Layout, build

ROOT = Path(__file__).parent.parent
PLAIN = "plain script"


def row(wall_s: float, tiles: float, cpu_s: float = 1.0) -> dict[str, float]:
    return {"wall_s": wall_s, "cpu_s": cpu_s, "tiles": tiles}


def test_in_each_round_everyone_has_one_turn() -> None:
    turns: list[str] = []

    def contestant(name: str) -> run.Contestant:
        return lambda: turns.append(name) or row(len(turns), 1)

    contests = {
        "s": {"ours": contestant("s ours"), "plain": contestant("s plain")},
        "t": {"ours": contestant("t ours")},
        "u": {},
    }
    found = run.alternately(contests, run.Choice(runs=2))
    assert turns == ["s ours", "s plain", "t ours"] * 2
    assert found == {
        "s": {"ours": [row(1, 1), row(4, 1)], "plain": [row(2, 1), row(5, 1)]},
        "t": {"ours": [row(3, 1), row(6, 1)]},
    }
    assert list(run.alternately(contests, run.Choice(runs=1, only=("plain",)))) == ["s"]


def test_what_was_written_by_hand_stays(tmp_path: Path) -> None:
    written = tmp_path / "page.md"
    assert run.remarks(written) == ""
    written.write_text(f"# Benchmarks\n\n1.0x\n\n{run.REMARKS}\n\nA quiet day.\n")
    assert run.remarks(written) == f"\n{run.REMARKS}\n\nA quiet day.\n"


def test_medians_and_spread() -> None:
    found = medians({"a": [row(2, 10), row(5, 10), row(3, 10)]})
    assert found == {"a": {"wall_s": 3, "cpu_s": 1, "tiles": 10, "spread": 1.0}}


def test_start_up_falls_out() -> None:
    def run_of(tiles: int) -> dict[str, float]:
        return row(5 + tiles / 100, tiles, 4 + tiles / 50)  # 5 s to start, 100 tiles a second

    found = after_start({"a": run_of(1000), "b": run_of(1000)}, {"a": run_of(200)})
    assert found == {"a": pytest.approx(row(8, 800, 16))}
    assert after_start({"a": run_of(200)}, {"a": run_of(200)}) == {}


def test_share_of_the_roof() -> None:
    # 2 ms a tile on two cores: at best 1,000 tiles a second, of which 800 were reached.
    assert roof_share(row(10, 8000), decode_ms=1.5, model_ms=0.5, cores=2) == pytest.approx(0.8)


def test_twice_the_tissue_twice_the_time_whatever_the_start_up() -> None:
    dot, half, full = (row(7 + tiles / 50, tiles) for tiles in (100, 300, 600))
    assert proportion(dot, half, full) == pytest.approx(1.0)
    assert proportion(dot, half, row(full["wall_s"] + 3, 600)) == pytest.approx(1.5)


def test_rates_are_of_unique_tissue() -> None:
    assert rate(row(2, 100), "wall_s") == pytest.approx(100 * TILE_MM2 / 2)
    assert pytest.approx(0.012544) == TILE_MM2


def test_the_page() -> None:
    parts = {
        "whole": {
            "tiny on s40": {PLAIN: [row(20, 1000)], EXACT: [{**row(5, 500), "difference": 2e-7, "agreement": 1.0}]},
            "tiny on s40half": {PLAIN: [row(12, 500)], EXACT: [row(4, 250)]},
            "tiny on s40dot": {PLAIN: [row(8, 250, 0.5)], EXACT: [row(3.5, 125, 0.5)]},
        },
        "roofs": {"roofs": {"decode s40": [{"cpu_ms": 4.0}], "tiny": [{"cpu_ms": 2.0}]}},
        "storage": {"tiny on s40": {"this disk": [row(4, 1000)], "slow storage": [row(5, 1000)]}},
    }
    text = page(parts, "Measured on 2 cores.", 2, ["X: ERROR: no such package"])
    lines = text.splitlines()
    # Half the tiles in a quarter of the time is twice the rate, not four times.
    assert "| ours, exact | 5.00 | 1.00 | 500 | 100 | 1.25 | 2.00 | 0.50 | 0% | 2.0e-07 | 100.00% |" in lines
    # 375 tiles in 1.5 s, each 6 ms of CPU, on two cores.
    assert "Share of the roof, ours, exact: 0.75" in lines
    assert "- ours, exact, tiny on s40: 1.00" in lines
    assert "| slow storage | 5.00 | 200 | 0.80 | 0% |" in lines
    assert "- X: ERROR: no such package" in lines
    assert text == page(parts, "Measured on 2 cores.", 2, ["X: ERROR: no such package"])


def test_a_page_of_one_part() -> None:
    nothing: dict[str, run.Rounds] = {part: {} for part in run.PARTS}
    text = page(nothing | {"whole": {"tiny on s40": {EXACT: [row(5, 500)]}}}, "Measured on 2 cores.", 2)
    assert "After start-up" not in text
    assert "Twice" not in text
    assert "difference" not in text


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of peers that were installed, instead of installing them; slide2vec cannot be."""
    done: list[str] = []

    def install(peer: peers.Peer, folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        done.append(peer.title)
        return "ERROR: no such package" if "slide2vec" in peer.title else ""

    monkeypatch.setattr(peers, "_install", install)
    return done


def test_a_peer_is_installed_once(installs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert peers.python_of("pyvips", tmp_path) == tmp_path / "venv-pyvips" / "bin" / "python"
    assert len(installs) == 1
    monkeypatch.setitem(peers.PEERS, "pyvips", peers.Peer("pyvips 3.0.1", (("pyvips==3.0.1",),)))
    peers.python_of("pyvips", tmp_path)
    assert installs == ["pyvips 3.0.0", "pyvips 3.0.1"]


def test_a_peer_that_cannot_be_had_says_why_each_time_and_is_tried_once(installs: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(peers.Unavailable, match=r"slide2vec .*: ERROR: no such package"):
            peers.python_of("slide2vec", tmp_path)
    assert len(installs) == 1


def test_tiles_that_peers_computed(tmp_path: Path) -> None:
    table = tmp_path / "results" / "model-outputs-csv" / "s.csv"
    table.parent.mkdir(parents=True)
    table.write_text("minx,miny,prob_a\n0,0,0.5\n224,0,0.5\n")
    assert peers.tiles_done("wsinfer", tmp_path) == 2
    (tmp_path / "results" / "process_list.csv").write_text("sample_id,num_tiles,feature_status\ns,7,success\nt,9,error\n")
    assert peers.tiles_done("slide2vec", tmp_path) == 7
    table.write_text("minx,miny,prob_a\n")
    with pytest.raises(SystemExit, match="computed no tile"):
        peers.tiles_done("wsinfer", tmp_path)


def test_wsinfer_is_given_a_folder_of_one_slide(tmp_path: Path) -> None:
    slide = tmp_path / "s.svs"
    slide.write_bytes(b"pixels")
    command = peers.wsinfer_command(Path("python"), slide, tmp_path / "model", tmp_path / "out")
    (only,) = (tmp_path / "out" / "slides").iterdir()
    assert only.read_bytes() == b"pixels"
    assert str(only.parent) in command


def test_scores_are_compared_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides have the tiles in their own order."""
    corners = np.array([[0, 0], [0, 224], [224, 0]])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], np.float32)
    np.save(tmp_path / "list.npy", corners)
    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "tiles", lambda name: tmp_path / "list.npy")

    def written(order: list[int], a: np.ndarray) -> None:
        columns = {"miny": corners[order, 0], "minx": corners[order, 1], "prob_a": a[order], "prob_b": 1 - a[order]}
        parquet.write_table(pa.table(columns), tmp_path / "tiles.parquet")

    written([2, 0, 1], scores[:, 0])
    assert run.compared(tmp_path, "s", "tiny") == {}  # nothing to compare with yet
    np.save(run.plain_scores("s", "tiny"), scores)
    assert run.compared(tmp_path, "s", "tiny") == {"difference": pytest.approx(0, abs=1e-6), "agreement": 1.0}
    written([2, 0, 1], np.array([0.9, 0.2, 0.6], np.float32))
    assert run.compared(tmp_path, "s", "tiny") == {"difference": pytest.approx(0.2), "agreement": pytest.approx(2 / 3)}
    written([2, 0], scores[:, 0])
    with pytest.raises(SystemExit, match="other tiles"):
        run.compared(tmp_path, "s", "tiny")


def test_slides_have_the_tissue_they_are_said_to_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {}
    for name in ("s40", "s40half", "s40dot"):
        monkeypatch.setitem(SLIDES, name, Layout((4800, 4800), 0.25, 40, SLIDES[name].blobs, shared=True))
        with openslide.OpenSlide(build(name, cmu_small_region(), tmp_path)) as slide:
            colour = np.asarray(slide.read_region((0, 0), 2, slide.level_dimensions[2]).convert("RGB"))
        shares[name] = float((np.ptp(colour, axis=-1) > 8).mean())
    assert shares == {
        "s40": pytest.approx(0.4, abs=0.03),
        "s40half": pytest.approx(0.2, abs=0.02),
        "s40dot": pytest.approx(0.08, abs=0.01),
    }


def test_exported_card_is_what_the_network_expects(tmp_path: Path) -> None:
    folder = peers.export("tiny", tmp_path / "tiny")
    card = json.loads((folder / "config.json").read_text())
    assert (card["num_classes"], card["patch_size_pixels"], card["spacing_um_px"]) == (2, 224, 0.5)
    before = (folder / "torchscript_model.pt").stat().st_mtime_ns
    assert peers.export("tiny", tmp_path / "tiny") == folder
    assert (folder / "torchscript_model.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_scripts_import_of_the_project_is_there(script: Path) -> None:
    """Also what they import only once a contest runs."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("pathology", "pipelines"):
            module = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), ast.unparse(node)
