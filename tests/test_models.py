"""Models: the built-in, WSInfer folders, Python factories, trust, references, and the check at the door."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pathology import testing
from pathology.errors import ModelError
from pathology.model import Model, ModelSpec, QueuedModel, ReadRule
from pathology.models import add_model, known_models, load_model, load_spec, nuclei, precisions
from pathology.models.checks import check_scores, warm_up
from pathology.models.refs import call, parse_ref
from pathology.models.trust import entries, registry_path

Tiles = NDArray[np.uint8]

MEAN, STD = [0.7238, 0.5716, 0.6779], [0.112, 0.1459, 0.1089]
EOSIN_RGB, NUCLEUS_RGB = (225, 170, 205), (85, 60, 130)


class Block(nn.Module):
    """Two convolutions with batch norm, and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.second(torch.relu(self.first(x)))))


class ResNet(nn.Module):
    """A small residual network."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(Block(8), nn.MaxPool2d(2), Block(8))
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def scripted(network: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), path)


@pytest.fixture(scope="session")
def network() -> ResNet:
    torch.manual_seed(1)
    return ResNet(3).eval()


@pytest.fixture(scope="session")
def weights(network: ResNet, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("weights") / "network.pt"
    scripted(network, path)
    return path.read_bytes()


def config(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "spec_version": "1.0",
        "architecture": "resnet",
        "num_classes": 3,
        "class_names": ["Other", "Tumor", "Stroma"],
        "patch_size_pixels": 50,
        "spacing_um_px": 0.5,
        "transform": [
            {"name": "Resize", "arguments": {"size": 32}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": MEAN, "std": STD}},
        ],
    }
    return {k: v for k, v in {**fields, **changes}.items() if v != "absent"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATHOLOGY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path, weights: bytes) -> Path:
    path = tmp_path / "tumor-net"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config()))
    (path / "torchscript_model.pt").write_bytes(weights)
    return path


def trusted(folder: Path) -> Path:
    add_model(folder, trust=sha256(folder / "torchscript_model.pt"))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Nuclei density


def tile_with_nuclei(centres: list[tuple[float, float]], radius: float, side: int = 128) -> Tiles:
    """(1, side, side, 3): round nuclei on eosin."""
    y, x = np.mgrid[:side, :side] + 0.5
    tile = np.full((side, side, 3), EOSIN_RGB, np.uint8)
    for cy, cx in centres:
        tile[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = NUCLEUS_RGB
    return tile[None]


def lattice(rows: int, side: int = 128) -> list[tuple[float, float]]:
    return [((i + 0.5) * side / rows, (j + 0.5) * side / rows) for i in range(rows) for j in range(rows)]


def test_glass_and_bare_eosin_hold_no_nuclei() -> None:
    model = load_model("nuclei-density")
    for colour in ((255, 255, 255), (243, 243, 244), EOSIN_RGB):
        tile = np.full((1, 128, 128, 3), colour, np.uint8)
        np.testing.assert_array_equal(model(tile), np.zeros((1, 1, 1, 1), np.float32))


def test_haematoxylin_of_a_pure_stain_is_its_amount() -> None:
    """Colours mixed by Beer and Lambert's law come apart again: one unit of each stain at a time."""
    tables = nuclei.haematoxylin_tables()
    for vector, expected in ((nuclei.HAEMATOXYLIN, 0.8), (nuclei.EOSIN, 0.0)):
        unit = np.array(vector) / np.linalg.norm(vector)
        rgb = np.clip(np.round(256 * 10 ** (-0.8 * unit) - 1), 0, 255).astype(int)
        assert sum(tables[c, rgb[c]] for c in range(3)) / nuclei.LEVELS == pytest.approx(expected, abs=0.02)


def test_sums_of_any_colours_stay_exact_in_float32() -> None:
    tables = nuclei.haematoxylin_tables()
    np.testing.assert_array_equal(tables, np.round(tables))
    largest = max(tables.max(axis=1).sum(), -tables.min(axis=1).sum())
    assert largest * nuclei.BACKGROUND_PX**2 < 2**24


def test_more_nuclei_and_larger_nuclei_score_higher() -> None:
    model = load_model("nuclei-density")
    more = [model(tile_with_nuclei(lattice(rows), radius=6)).item() for rows in (0, 1, 2, 3, 4, 5)]
    assert more == sorted(set(more))
    larger = [model(tile_with_nuclei(lattice(3), radius)).item() for radius in (3, 4, 6, 8, 10)]
    assert larger == sorted(set(larger))


def test_score_is_about_the_area_of_the_nuclei() -> None:
    model = load_model("nuclei-density")
    for rows, radius in ((1, 8), (3, 8), (4, 9), (5, 9)):
        share = rows**2 * np.pi * radius**2 / 128**2
        assert model(tile_with_nuclei(lattice(rows), radius)).item() == pytest.approx(share, rel=0.3)


def test_turned_tile_scores_the_same() -> None:
    model = load_model("nuclei-density")
    random = np.random.default_rng(3)
    tile = tile_with_nuclei([tuple(c) for c in random.uniform(0, 128, (12, 2))], radius=7)
    for turned in (np.rot90(tile, 1, (1, 2)), np.rot90(tile, 2, (1, 2)), tile[:, ::-1]):
        np.testing.assert_allclose(model(np.ascontiguousarray(turned)), model(tile), rtol=1e-4)


def test_box_mean_is_the_mean_of_the_box_cut_at_the_edge() -> None:
    values = np.random.default_rng(0).integers(-2000, 2000, (2, 9, 9)).astype(np.float32)
    found = nuclei.box_mean(torch.from_numpy(values), 5).numpy()
    for y in range(9):
        for x in range(9):
            box = values[:, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
            np.testing.assert_allclose(found[:, y, x], box.mean((1, 2)), rtol=1e-6, atol=1e-4)


def test_score_is_the_same_in_any_slot_batch_and_number_of_threads() -> None:
    model = load_model("nuclei-density?tile_px=100")
    tiles = np.random.default_rng(0).integers(0, 256, (16, 100, 100, 3), np.uint8)
    whole = model(tiles)
    assert len(np.unique(whole)) > 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        np.testing.assert_array_equal(model(tiles), whole)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(model(np.ascontiguousarray(tiles[::-1])), whole[::-1])
    np.testing.assert_array_equal(np.concatenate([model(tiles[i : i + 1]) for i in range(16)]), whole)


def test_dense_region_is_told_from_sparse_at_tile_level() -> None:
    """Fields that differ in nothing but number and size of nuclei, with grain and uneven staining: ROC AUC >= 0.95."""
    random = np.random.default_rng(5)

    def field(count: int, radius: float) -> Tiles:
        tile = tile_with_nuclei([tuple(c) for c in random.uniform(0, 128, (count, 2))], radius)
        strength = random.uniform(0.85, 1.15)
        noisy = 255 * (tile / 255) ** strength + random.normal(0, 6, tile.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8)

    sparse = np.concatenate([field(random.poisson(8), random.uniform(5, 6)) for _ in range(60)])
    dense = np.concatenate([field(random.poisson(18), random.uniform(6, 8)) for _ in range(60)])
    model = load_model("nuclei-density")
    below, above = model(sparse).ravel(), model(dense).ravel()
    assert (above[:, None] > below[None, :]).mean() >= 0.95


def test_density_follows_counted_nuclei_of_a_real_field() -> None:
    """Tiles of 100 px of a labelled H&E field: Spearman's rank correlation with the nuclei counted in each."""
    from real_slides import histolytics_field
    from scipy.stats import spearmanr

    field = histolytics_field()
    rgb, instances = field.pixels, field.instances
    side, rows, columns = 100, rgb.shape[0] // 100, rgb.shape[1] // 100
    ids, flat = np.unique(instances, return_inverse=True)
    y, x = np.indices(instances.shape)
    size = np.bincount(flat.ravel())
    centres = np.stack([np.bincount(flat.ravel(), axis.ravel()) / size for axis in (y, x)], axis=1)[ids > 0]
    counts = np.histogram2d(*centres.T, bins=[np.arange(rows + 1) * side, np.arange(columns + 1) * side])[0]
    tiles = rgb[: rows * side, : columns * side].reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    density = load_model(f"nuclei-density?tile_px={side}")(np.ascontiguousarray(tiles)).ravel()
    correlation = float(spearmanr(density, counts.ravel())[0])
    assert correlation >= 0.85
    assert density.mean() == pytest.approx((instances > 0).mean(), rel=0.25)


# WSInfer folders


def by_hand(network: nn.Module, tile: Tiles, side: int) -> NDArray[np.float32]:
    """torchvision's Resize, ToTensor and Normalize on a PIL image, then WSInfer's own softmax."""
    image = np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.BILINEAR))
    x = torch.from_numpy(image.copy()).permute(2, 0, 1).to(torch.float32).div(255)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        return network(x[None]).softmax(1)[0].numpy()


def test_wsinfer_folder_gives_wsinfers_numbers(network: ResNet, folder: Path) -> None:
    model = load_model(str(trusted(folder)))
    assert isinstance(model, Model)
    assert model.spec.read == ReadRule(level="0", margin=False, filter="bilinear")
    assert (model.spec.name, model.spec.mpp, model.spec.tile_px, model.spec.input_px, model.spec.output_px) == (
        "tumor-net",
        0.5,
        50,
        32,
        1,
    )
    assert model.spec.columns() == ("prob_Other", "prob_Tumor", "prob_Stroma")
    coarse = np.random.default_rng(2).integers(0, 256, (25, 25, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((800, 800), Image.Resampling.BICUBIC))
    slide = testing.array_slide(pixels, mpp=0.25, downsamples=(1, 2))
    origins = [(y, x) for y in range(0, 700, 100) for x in range(0, 700, 100)][:48]
    tiles = np.stack([slide.read_tile(o, (100, 100), (32, 32), model.spec.read) for o in origins])
    scores = model(tiles)
    assert scores.dtype == np.float32
    assert scores.shape == (48, 3, 1, 1)
    expected = np.stack([by_hand(network, pixels[y : y + 100, x : x + 100], 32) for y, x in origins])
    assert np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(scores[:, :, 0, 0], expected, atol=1e-4)


def test_wsinfer_scores_are_the_same_in_any_slot_and_call(folder: Path) -> None:
    model = load_model(str(trusted(folder)))
    tiles = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    first = model(tiles)
    for shift in range(1, 8):
        np.testing.assert_array_equal(model(np.roll(tiles, shift, axis=0)), np.roll(first, shift, axis=0))
    np.testing.assert_array_equal(model(tiles), first)


def test_one_class_is_a_sigmoid_and_no_resize_keeps_the_tile(folder: Path) -> None:
    torch.manual_seed(2)
    network = ResNet(1).eval()
    scripted(network, folder / "torchscript_model.pt")
    fields = config(num_classes=1, class_names=["Tumor"], transform=[{"name": "ToTensor"}])
    (folder / "config.json").write_text(json.dumps(fields))
    model = load_model(str(trusted(folder)))
    assert model.spec.input_px == 50
    tiles = np.random.default_rng(0).integers(0, 256, (2, 50, 50, 3), np.uint8)
    with torch.no_grad():
        expected = network(torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255).sigmoid().numpy()
    np.testing.assert_allclose(model(tiles)[:, :, 0, 0], expected, atol=1e-6)


def test_network_with_another_class_count_is_refused_when_it_answers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config(num_classes=2, class_names=["Other", "Tumor"])))
    with pytest.raises(ModelError, match=r"answered \(4, 3\) for 4 tiles, but its card names 2 classes"):
        warm_up(load_model(str(trusted(folder))), 4)


def transform(*steps: Any) -> dict[str, Any]:
    return {"transform": list(steps)}


RESIZE, TENSOR, NORMALIZE = config()["transform"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "absent"}, "num_classes is missing"),
        ({"spec_version": "2.0"}, "spec_version is '2.0'"),
        ({"num_classes": 2}, "class_names has 3 names but num_classes is 2"),
        ({"num_classes": True, "class_names": ["a"]}, "num_classes is True"),
        ({"class_names": ["a", "a", "b"]}, "different names"),
        ({"class_names": "abc"}, "class_names is 'abc'"),
        ({"patch_size_pixels": 0}, "patch_size_pixels is 0"),
        ({"patch_size_pixels": 350.5}, "patch_size_pixels is 350.5"),
        ({"spacing_um_px": 0}, "spacing_um_px is 0"),
        ({"spacing_um_px": "0.5"}, "spacing_um_px is '0.5'"),
        ({"transform": {}}, "transform is not understood"),
        (transform("ToTensor"), "transform is not understood"),
        (transform(RESIZE, NORMALIZE), "ToTensor among them"),
        (transform(TENSOR, RESIZE, NORMALIZE), "in this order"),
        (transform(RESIZE, TENSOR, TENSOR), "in this order"),
        (transform({"name": "CenterCrop", "arguments": {"size": 32}}, TENSOR), "CenterCrop"),
        (transform({"name": "Resize", "arguments": {"size": [32, 48]}}, TENSOR), r"size is \[32, 48\]"),
        (transform({"name": "Resize", "arguments": {"size": 32, "interpolation": 3}}, TENSOR), "interpolation"),
        (transform({"name": "Resize"}, TENSOR), "only size"),
        (transform(TENSOR, {"name": "Normalize", "arguments": {"mean": MEAN}}), "give mean and std"),
        (transform(TENSOR, {"name": "Normalize", "arguments": {"mean": [0.5], "std": STD}}), "three numbers"),
        (transform(TENSOR, {"name": "Normalize", "arguments": {"mean": MEAN, "std": [1, 0, 1]}}), "above 0"),
    ],
)
def test_bad_config_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    trusted(folder)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    for refused in (load_spec, load_model, add_model):
        with pytest.raises(ModelError, match=message) as caught:
            refused(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [[40], [40, 40], 40])
def test_resize_takes_one_side_or_two_equal_ones(folder: Path, size: Any) -> None:
    (folder / "config.json").write_text(
        json.dumps(config(**transform({"name": "Resize", "arguments": {"size": size}}, TENSOR)))
    )
    assert load_spec(str(trusted(folder))).input_px == 40


def test_config_that_is_no_json_and_missing_files_are_refused(folder: Path) -> None:
    trusted(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="it is no JSON"):
        load_spec(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        load_spec(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"a folder with config\.json and torchscript_model.pt"):
        load_spec(str(folder))


def test_weights_that_are_no_torchscript_are_refused(folder: Path) -> None:
    (folder / "torchscript_model.pt").write_bytes(b"not a network")
    with pytest.raises(ModelError, match=r"torch cannot load torchscript_model\.pt"):
        load_model(str(trusted(folder)))


def test_configuration_and_weights_are_both_in_the_cards_hash(folder: Path) -> None:
    before = load_spec(str(trusted(folder)))
    assert load_spec(str(folder)) == before == load_model(str(folder)).spec
    changed = config(**transform(RESIZE, TENSOR))
    (folder / "config.json").write_text(json.dumps(changed))
    assert load_spec(str(folder)).sha256 != before.sha256


# Trust


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to torch's TorchScript loader, which runs what it reads."""
    seen: list[Any] = []
    load: Callable[..., Any] = torch.jit.load

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(file)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch.jit, "load", watched)
    return seen


@pytest.mark.fault("M03")
def test_untrusted_weights_are_never_handed_to_torch(folder: Path, home: Path, loads: list[Any]) -> None:
    digest = sha256(folder / "torchscript_model.pt")
    for refused in (load_model, load_spec):
        with pytest.raises(ModelError, match=f"run: pathology models add {folder} --trust {digest}"):
            refused(str(folder))
    with pytest.raises(ModelError, match=f"sha256 is {digest}: compare it"):
        add_model(folder)
    with pytest.raises(ModelError, match=f"has sha256 {digest}, not {'0' * 64}"):
        add_model(folder, trust="0" * 64)
    assert loads == []
    assert not home.exists()


def test_trusted_once_name_and_path_are_enough(folder: Path, home: Path, loads: list[Any]) -> None:
    digest = sha256(folder / "torchscript_model.pt")
    entry = add_model(str(folder), trust=digest.upper())
    assert (entry.name, entry.path, entry.sha256, entry.kind) == ("tumor-net", str(folder.resolve()), digest, "wsinfer")
    assert loads == []
    assert load_model("tumor-net").spec == load_model(str(folder)).spec
    assert len(loads) == 2
    content = json.loads((home / "models.json").read_text())
    assert content == {
        "schema": 1,
        "models": {"tumor-net": {"path": str(folder.resolve()), "sha256": digest, "kind": "wsinfer"}},
    }
    assert [e.name for e in known_models()] == ["nuclei-density", "tumor-net"]
    before = (home / "models.json").read_bytes()
    add_model(folder, trust=digest)
    assert (home / "models.json").read_bytes() == before


@pytest.mark.fault("M04")
def test_swapped_weights_are_refused(folder: Path, loads: list[Any]) -> None:
    trusted(folder)
    weights = folder / "torchscript_model.pt"
    weights.write_bytes(weights.read_bytes() + b"\0")
    for ref in ("tumor-net", str(folder)):
        with pytest.raises(ModelError, match="is not the file you trusted"):
            load_model(ref)
    assert loads == []


def test_bytes_that_are_loaded_are_the_bytes_that_were_hashed(folder: Path, loads: list[Any]) -> None:
    """The loader is given memory, not a path that could be swapped after the check."""
    load_model(str(trusted(folder)))
    assert hashlib.sha256(loads[0].getvalue()).hexdigest() == sha256(folder / "torchscript_model.pt")


def test_equal_names_are_refused_and_another_name_helps(folder: Path, tmp_path: Path) -> None:
    trusted(folder)
    other = tmp_path / "elsewhere" / folder.name
    other.parent.mkdir()
    folder.rename(other)
    with pytest.raises(ModelError, match="which is gone"):
        load_model("tumor-net")
    with pytest.raises(ModelError, match="the name tumor-net stands for"):
        trusted(other)
    digest = sha256(other / "torchscript_model.pt")
    assert add_model(other, trust=digest, name="second").name == "second"
    assert load_spec("second").name == load_spec(str(other)).name == "second"
    for name in ("nuclei-density", "a/b", "", "x?y=1"):
        with pytest.raises(ModelError, match="name"):
            add_model(other, trust=digest, name=name)


def test_damaged_registry_is_refused(home: Path) -> None:
    home.mkdir()
    for content, message in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema": 1, "models": {"a": {}}}', "damaged"),
        ('{"schema": 9}', "schema 9"),
    ):
        (home / "models.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            entries()


def test_registry_path_follows_the_environment(tmp_path: Path) -> None:
    assert registry_path({"PATHOLOGY_HOME": "/a", "XDG_CONFIG_HOME": "/b"}) == Path("/a/models.json")
    assert registry_path({"XDG_CONFIG_HOME": "/b"}) == Path("/b/pathology/models.json")
    assert registry_path({}) == Path.home() / ".config/pathology/models.json"


# References


def test_reference_is_name_and_arguments() -> None:
    assert parse_ref("nuclei-density") == ("nuclei-density", {})
    assert parse_ref("a.b:c?n=3&x=-2.5e3&s=a%20b&t=0x1&e=") == (
        "a.b:c",
        {"n": 3, "x": -2500.0, "s": "a b", "t": "0x1", "e": ""},
    )
    assert isinstance(parse_ref("m?n=3")[1]["n"], int)
    for wrong, message in (("m?", "no arguments"), ("m?tile", "no arguments"), ("m?a=1&a=2", "given twice")):
        with pytest.raises(ModelError, match=message):
            parse_ref(wrong)


def test_nuclei_density_takes_a_tile_size_and_nothing_else() -> None:
    spec = load_spec("nuclei-density?tile_px=100")
    assert (spec.name, spec.tile_px, spec.input_px, spec.mpp, spec.output_px) == ("nuclei-density-100px", 100, 100, 0.5, 1)
    assert load_model("nuclei-density?tile_px=100").spec == spec
    assert load_spec("nuclei-density").name == "nuclei-density"
    with pytest.raises(ModelError, match="unexpected keyword argument 'tile'; it takes tile_px"):
        load_spec("nuclei-density?tile=100")
    for wrong in ("8", "4096", "100.0", "big"):
        with pytest.raises(ModelError, match="use a whole number"):
            load_spec(f"nuclei-density?tile_px={wrong}")
    with pytest.raises(ModelError, match="--device"):
        load_model("nuclei-density?device=cpu")


def test_unknown_references_say_what_is_known(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"known are nuclei-density, tumor-net; or name a model folder"):
        load_model("nuclei" if trusted(folder) else "")
    with pytest.raises(ModelError, match="is a file; name the folder"):
        load_model(str(folder / "torchscript_model.pt"))
    with pytest.raises(ModelError, match="takes no arguments"):
        load_model(f"{folder}?tile_px=3")


def test_factory_is_given_the_device_if_it_takes_one() -> None:
    def factory(side: int, device: str) -> tuple[int, str]:
        return side, device

    assert call("m", factory, {"side": 3}, "cuda:1") == (3, "cuda:1")
    assert call("m", lambda: 5, {}, "cpu") == 5
    with pytest.raises(ModelError, match=r"missing a required argument: 'side'; it takes side"):
        call("m", factory, {}, "cpu")


def test_precision_and_compiling_are_for_torch_networks(folder: Path) -> None:
    def factory(side: int, precision: str, compile: bool) -> tuple[int, str, bool]:
        return side, precision, compile

    assert call("m", factory, {"side": 3}, "cpu", "bf16", True) == (3, "bf16", True)
    trusted(folder)
    for ref, network in (("nuclei-density", False), ("pathology.testing:identity", False), ("tumor-net", True)):
        assert bool(precisions(ref)) == network
        if network:
            continue
        with pytest.raises(ModelError, match="is no torch network that could compute in bf16; use --precision fp32 or auto"):
            load_model(ref, precision="bf16")
        with pytest.raises(ModelError, match="is no torch network that could be compiled; leave out --compile"):
            load_model(ref, compile=True)
    with pytest.raises(ModelError, match="the precision is no argument of a model; choose it with --precision"):
        load_model("pathology.testing:identity?precision=bf16")
    with pytest.raises(ModelError, match=r"tumor-net is TorchScript, which torch\.compile does not take"):
        load_model("tumor-net", compile=True)


def test_python_factory_of_a_network_is_given_device_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "own_network_of_a_user.py"
    source.write_text(
        "from torch import nn\n"
        "from pathology.model import ModelSpec\n"
        "from pathology.models.network import TorchNetwork\n"
        "SPEC = ModelSpec(name='own', sha256='0', classes=('a', 'b'), mpp=0.5, tile_px=16, input_px=16, scores='value')\n"
        "def make(device, precision, compile):\n"
        "    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))\n"
        "    return TorchNetwork(SPEC, network, device=device, precision=precision, compile=compile)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ref = "own_network_of_a_user:make"
    assert precisions(ref)
    for precision in ("fp32", "bf16"):
        model = load_model(ref, precision=precision)
        assert not isinstance(model, QueuedModel)
        warm_up(model, 2)
    module = sys.modules["own_network_of_a_user"]
    plain = model

    class Queued(Answering):
        def staging(self, batch_size: int) -> Tiles:
            return np.zeros((batch_size, 16, 16, 3), np.uint8)

        def submit(self, tiles: Tiles) -> str:
            return f"{len(tiles)} on their way"

    monkeypatch.setattr(module, "make", lambda: Queued(scores(0.5)))
    queued = load_model(ref)
    assert isinstance(queued, QueuedModel)
    assert queued.submit(queued.staging(3)) == "3 on their way"  # type: ignore[comparison-overlap]  # a made-up answer
    assert queued.spec.sha256 not in ("0", plain.spec.sha256)
    monkeypatch.delitem(sys.modules, "own_network_of_a_user")


def test_python_factory_makes_the_model_it_is_asked_for() -> None:
    model = load_model("pathology.testing:constant?value=0.25&tile_px=32")
    assert isinstance(model, Model)
    assert model.spec.tile_px == 32
    np.testing.assert_array_equal(model(np.zeros((2, 32, 32, 3), np.uint8)), np.full((2, 1, 1, 1), 0.25, np.float32))
    assert load_spec("pathology.testing:constant?value=0.25&tile_px=32") == model.spec
    others = [
        load_spec(f"pathology.testing:constant{a}").sha256 for a in ("", "?value=0.25", "?value=0.5", "?tile_px=32&value=0.25")
    ]
    assert len({*others, model.spec.sha256}) == 4


def test_python_model_hash_follows_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "own_model_of_a_user.py"
    source.write_text("from pathology.testing import constant\ndef make():\n    return constant(value=1.0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = load_spec("own_model_of_a_user:make").sha256
    assert load_spec("own_model_of_a_user:make").sha256 == before
    source.write_text(source.read_text() + "# changed\n")
    assert load_spec("own_model_of_a_user:make").sha256 != before
    monkeypatch.delitem(sys.modules, "own_model_of_a_user")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no_such_package_at_all:make", "cannot be imported"),
        ("pathology.testing:nothing", "no callable nothing"),
        ("pathology.testing:Path", "made a PosixPath"),
        (
            "pathology.testing:constant?tilepx=3",
            "unexpected keyword argument 'tilepx'; it takes tile_px, mpp, output_px, value",
        ),
        ("pathology.testing:constant?tile_px=-4", "do not fit"),
        ("pathology.testing:constant?mpp=fine", "factory failed with TypeError"),
    ],
)
def test_python_factories_that_make_no_model_are_refused(ref: str, message: str) -> None:
    for refused in (load_model, load_spec):
        with pytest.raises(ModelError, match=message):
            refused(ref)


def test_cards_are_read_without_torch(folder: Path, home: Path) -> None:
    trusted(folder)
    code = (
        "import sys; from pathology.models import known_models, load_spec\n"
        f"for ref in ('nuclei-density', {str(folder)!r}, 'tumor-net', 'pathology.testing:identity'):\n"
        "    print(load_spec(ref).name)\n"
        "known_models(); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout.split()) == (0, ["nuclei-density", "tumor-net", "tumor-net", "identity"]), done.stderr


# Checks at the door


class Answering:
    """A model that answers what a function makes of its tiles."""

    def __init__(self, answer: Callable[[Tiles], Any], **fields: Any) -> None:
        card = ModelSpec(name="m", sha256="0", classes=("a", "b"), mpp=0.5, tile_px=16, input_px=16)
        self.spec = replace(card, **fields)
        self.answer = answer

    def __call__(self, tiles: Tiles) -> Any:
        return self.answer(tiles)


def scores(value: float, classes: int = 2, side: int = 1) -> Callable[[Tiles], NDArray[np.float32]]:
    return lambda tiles: np.full((len(tiles), classes, side, side), value, np.float32)


def nan_on_plain_tiles(tiles: Tiles) -> NDArray[np.float32]:
    contrast = tiles.astype(np.float32).std((1, 2, 3))
    with np.errstate(invalid="ignore"):
        return np.repeat((contrast / contrast)[:, None, None, None], 2, axis=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Answering(scores(0.5, classes=3)), r"answered shape \(4, 3, 1, 1\), its card says \(4, 2, 1, 1\)"),
        (Answering(scores(0.5, side=2)), "its card says"),
        (Answering(scores(0.5), output_px=4), "its card says"),
        (Answering(lambda t: scores(0.5)(t[1:])), "its card says"),
        (Answering(lambda t: scores(0.5)(t).astype(np.float64)), "answered float64"),
        (Answering(lambda t: scores(0.5)(t).tolist()), "answered a list"),
        (Answering(scores(float("inf"))), "NaN or infinity"),
        (Answering(nan_on_plain_tiles), "NaN or infinity"),
        (Answering(scores(1.5)), r"answered 1.5 to 1.5, but its card says probabilities"),
        (Answering(scores(-0.5)), "its card says probabilities"),
    ],
)
@pytest.mark.fault("F29")
def test_warm_up_refuses_a_model_that_breaks_its_card(model: Answering, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        warm_up(model, 4)


def test_warm_up_takes_good_models() -> None:
    warm_up(Answering(scores(1.0)), 4)
    warm_up(Answering(scores(-70.0), scores="value"), 1)
    warm_up(testing.identity(tile_px=16), 3)
    warm_up(load_model("nuclei-density"), 2)
    check_scores(testing.constant().spec, 2, np.zeros((2, 1, 1, 1), np.float32))


def _with_card(tile_px: int = 32) -> object:
    raise AssertionError("the model itself is not needed for its card")


_with_card.card = lambda tile_px=32: testing.constant(tile_px=tile_px).spec  # type: ignore[attr-defined]


def _with_wrong_card() -> object:
    return testing.constant()


_with_wrong_card.card = lambda: "no card"  # type: ignore[attr-defined]


def test_a_factorys_card_spares_making_the_model() -> None:
    spec = load_spec(f"{__name__}:_with_card?tile_px=48")
    assert (spec.tile_px, spec.classes) == (48, ("constant",))
    assert spec.sha256 != testing.constant(tile_px=48).spec.sha256
    with pytest.raises(ModelError, match="AssertionError"):
        load_model(f"{__name__}:_with_card?tile_px=48")
    with pytest.raises(ModelError, match="return a ModelSpec"):
        load_spec(f"{__name__}:_with_wrong_card")
