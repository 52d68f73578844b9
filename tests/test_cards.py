"""Model folders with a card: five formats of one network, checkpoints brought along, and all that is refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save
from torch import nn

import pathology
from pathology.errors import ModelError, UsageError
from pathology.models import add_model, load_model, load_spec, precisions
from pathology.models.card import CARD, read_card, toml_value
from pathology.models.checks import warm_up
from pathology.models.weights import common_prefix, read_checkpoint
from pathology.runner import run
from pipelines.cli import main
from tests.networks import Small, seeded
from tests.slides import noise_pixels

ROOT = Path(__file__).parent.parent
MEAN, STD = (0.7, 0.6, 0.7), (0.2, 0.25, 0.2)
TILE = 32
SAID = ["--arch", "tests.networks:Small", "--classes", "a,b", "--mpp", "0.5", "--tile-px", "32"]
FILES = {"safetensors": "weights.safetensors", "onnx": "model.onnx", "torchscript": "model.pt", "pt2": "model.pt2"}


pytestmark = pytest.mark.usefixtures("own_home")


def onnx_bytes(network: Small, batch: int | str = "batch") -> bytes:
    """The network's graph, written by hand operator by operator."""
    weights = {key: tensor.numpy() for key, tensor in network.state_dict().items() if tensor.ndim}
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), key) for key, value in weights.items()]
    conv = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "first.weight", "first.bias"], ["a"], **conv),
        helper.make_node(
            "BatchNormalization",
            ["a", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"],
            ["b"],
            epsilon=1e-5,
        ),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "second.weight", "second.bias"], ["d"], **conv),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, TILE, TILE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, network.head.out_features])
    graph = helper.make_graph(nodes, "small", [x], [y], tensors)
    data: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return data


def torchscript_bytes(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), buffer)
    return buffer.getvalue()


def pt2_bytes(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    example = torch.zeros(2, 3, TILE, TILE)
    program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, buffer)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Small], bytes]] = {
    "safetensors": lambda network: save(network.state_dict()),
    "onnx": onnx_bytes,
    "torchscript": torchscript_bytes,
    "pt2": pt2_bytes,
}


def card(format: str, data: bytes, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a card; `changes` are made to them, None removing a field."""
    tables: dict[str, dict[str, Any]] = {
        "": {"schema": 1, "name": "small"},
        "weights": {"format": format, "file": FILES[format], "sha256": hashlib.sha256(data).hexdigest()},
        "input": {"mpp": 0.5, "tile_px": TILE, "mean": MEAN, "std": STD},
        "output": {"kind": "classes", "activation": "softmax", "classes": [{"name": "a"}, {"name": "b"}]},
    }
    if format == "safetensors":
        tables["weights"]["architecture"] = "tests.networks:Small"
    for table, fields in changes.items():
        target = tables.setdefault("" if table == "top" else table, {})
        for key, value in fields.items():
            if value is None:
                target.pop(key)
            else:
                target[key] = value
    return tables


def folder_of(place: Path, format: str = "safetensors", data: bytes | None = None, **changes: dict[str, Any]) -> Path:
    data = WRITERS[format](seeded()) if data is None else data
    place.mkdir(exist_ok=True)
    (place / FILES[format]).write_bytes(data)
    lines = []
    for name, fields in card(format, data, **changes).items():
        lines += [f"[{name}]"] * bool(name) + [f"{key} = {toml_value(value)}" for key, value in fields.items()]
    (place / CARD).write_text("\n".join(lines) + "\n")
    return place


def expected_scores(network: nn.Module, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        logits = network((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - mean) / std)
    answer: NDArray[np.float32] = logits.softmax(1).numpy()[:, :, None, None]
    return answer


def tiles(count: int = 5) -> NDArray[np.uint8]:
    return np.stack([noise_pixels(TILE, TILE, seed) for seed in range(count)])


def trusted(folder: Path, file: str) -> Path:
    add_model(folder, trust=hashlib.sha256((folder / file).read_bytes()).hexdigest())
    return folder


# Formats


def test_one_network_in_five_formats_gives_the_same_heatmap(tmp_path: Path, small_slide: Path) -> None:
    network = seeded()
    models = {}
    for format in FILES:
        folder = folder_of(tmp_path / format, format, WRITERS[format](network), top={"name": format})
        models[format] = trusted(folder, FILES[format]) if format in ("torchscript", "pt2") else folder
    wsinfer = tmp_path / "wsinfer"
    wsinfer.mkdir()
    (wsinfer / "torchscript_model.pt").write_bytes(torchscript_bytes(network))
    transform = [{"name": "ToTensor"}, {"name": "Normalize", "arguments": {"mean": list(MEAN), "std": list(STD)}}]
    config = {"spec_version": "1.0", "architecture": "small", "num_classes": 2, "patch_size_pixels": TILE, "spacing_um_px": 0.5}
    (wsinfer / "config.json").write_text(json.dumps({**config, "class_names": ["a", "b"], "transform": transform}))
    models["wsinfer"] = trusted(wsinfer, "torchscript_model.pt")

    heatmaps = {}
    for format, folder in models.items():
        job = pathology.Job(
            slide=str(small_slide),
            slide_id="small",
            root=str(small_slide),
            model=str(folder),
            out=str(tmp_path / "out"),
            overlap=0.5,
            tissue="none",
            batch_size=4,
        )
        (outcome,) = run([job], "sync")
        assert outcome.status == "ok", outcome
        heatmaps[format] = (
            pathology.open_heatmap(job.result_folder(load_spec(str(folder)).name)).levels[0].compute(scheduler="sync")
        )
    reference = heatmaps.pop("safetensors")
    assert np.isfinite(reference).all()
    assert reference.std() > 0.01
    for heatmap in heatmaps.values():
        np.testing.assert_allclose(heatmap, reference, atol=1e-5)


@pytest.mark.parametrize("format", FILES)
def test_scores_are_those_by_hand(tmp_path: Path, format: str) -> None:
    folder = folder_of(tmp_path / "m", format)
    if format in ("torchscript", "pt2"):
        trusted(folder, FILES[format])
    model = load_model(str(folder))
    assert model.spec == load_spec(str(folder))
    np.testing.assert_allclose(model(tiles()), expected_scores(seeded(), tiles()), atol=1e-6)
    assert bool(precisions(str(folder))) == (format != "onnx")


@pytest.mark.parametrize("batch", [1, 2])
def test_an_onnx_graph_of_fixed_batch_size_is_given_such(tmp_path: Path, batch: int) -> None:
    model = load_model(str(folder_of(tmp_path / "m", "onnx", onnx_bytes(seeded(), batch))))
    np.testing.assert_allclose(model(tiles()), expected_scores(seeded(), tiles()), atol=1e-6)


def test_onnx_says_what_it_cannot(tmp_path: Path) -> None:
    asked = folder_of(tmp_path / "asked", "onnx", top={"precisions": ["fp32"]})
    with pytest.raises(ModelError, match="precisions are for torch networks, and ONNX computes as it was exported"):
        load_spec(str(asked))
    folder = folder_of(tmp_path / "m", "onnx")
    with pytest.raises(ModelError, match="ONNX, which runs on the CPU here; pass --device cpu"):
        load_model(str(folder), "cuda:0")
    with pytest.raises(ModelError, match=r"model\.onnx of model small cannot be loaded by onnxruntime"):
        load_model(str(folder_of(tmp_path / "n", "onnx", onnx_bytes(seeded())[:200])))


# What a card says


def test_colours_in_another_order_and_on_another_scale(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "m",
        input={"channels": "bgr", "divide_by": 1, "mean": [255 * v for v in MEAN], "std": [255 * v for v in STD]},
    )
    turned = np.ascontiguousarray(tiles()[..., ::-1])
    np.testing.assert_allclose(load_model(str(folder))(tiles()), expected_scores(seeded(), turned), atol=1e-6)


def test_a_card_tells_the_pipeline_all_of_it(tmp_path: Path) -> None:
    classes = [{"name": "a", "color": "#ff0000", "threshold": 0.7}, {"name": "b", "color": "#00ff00"}]
    changes = {
        "top": {"version": "2", "licence": "MIT", "source": "a paper", "intended_use": "H&E"},
        "input": {"input_px": 16, "level": "0", "margin": False, "filter": "bilinear", "mpp": 1},
        "output": {"classes": classes, "activation": "none", "units": "per mm2", "display": [0, 9]},
    }
    spec = load_spec(str(folder_of(tmp_path / "m", **changes)))
    assert (spec.name, spec.classes, spec.mpp, spec.tile_px, spec.input_px, spec.output_px) == (
        "small",
        ("a", "b"),
        1.0,
        TILE,
        16,
        1,
    )
    assert (spec.scores, spec.units, spec.display, spec.threshold) == ("value", "per mm2", (0.0, 9.0), (0.7, 0.5))
    assert spec.colors == ("#ff0000", "#00ff00")
    assert spec.read == pathology.model.ReadRule("0", False, "bilinear")
    other = load_spec(str(folder_of(tmp_path / "n", **{**changes, "input": {**changes["input"], "mean": (0, 0, 0)}})))
    assert other.sha256 != spec.sha256  # the card decides scores as the weights do


def test_a_map_of_every_pixel(tmp_path: Path) -> None:
    classes = [{"name": name} for name in ("red", "green", "blue")]
    folder = folder_of(
        tmp_path / "m",
        data=save({"gain": torch.ones(1)}),
        weights={"architecture": "tests.networks:Pixels"},
        input={"mean": [0, 0, 0], "std": [1, 1, 1]},
        output={"kind": "map", "activation": "none", "classes": classes},
    )
    model = load_model(str(folder))
    assert model.spec.output_px == TILE
    np.testing.assert_allclose(model(tiles(2)), tiles(2).transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_features_of_a_tile(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", output={"kind": "features", "features": 2, "classes": None, "activation": "none"})
    model = load_model(str(folder))
    assert (model.spec.output, model.spec.classes) == ("features", ())
    with torch.inference_mode():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        direct = seeded()((torch.from_numpy(tiles()).permute(0, 3, 1, 2).float() / 255 - mean) / std).numpy()
    np.testing.assert_allclose(model(tiles())[:, :, 0, 0], direct, atol=1e-5)
    wrong = load_model(
        str(folder_of(tmp_path / "n", output={"kind": "features", "features": 3, "classes": None, "activation": "none"}))
    )
    with pytest.raises(ModelError, match="its card names 3 features"):
        wrong(tiles())


def test_detections_in_peaks_of_a_map(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "m",
        data=save({"gain": torch.ones(1)}),
        weights={"architecture": "tests.networks:Pixels"},
        input={"mean": [0, 0, 0], "std": [1, 1, 1]},
        output={
            "kind": "detections",
            "form": "peaks",
            "activation": "none",
            "nms_px": 3,
            "margin_px": 5,
            "classes": [{"name": name, "threshold": 0.9} for name in ("red", "green", "blue")],
        },
    )
    model = load_model(str(folder))
    assert model.spec.detections == pathology.model.DetectionRule(nms_px=3.0, margin_px=5)
    assert (model.spec.output, model.spec.output_px, model.spec.display) == ("detections", 4, (0.0, 5000.0))
    tile = np.full((1, TILE, TILE, 3), 100, np.uint8)
    tile[0, 7, 9] = (100, 255, 100)
    (answer,) = model(tile)
    assert answer[~np.isnan(answer[:, 3])].tolist() == [[7.5, 9.5, 1, 1]]


def test_the_shipped_schema_takes_the_cards_that_are_made(tmp_path: Path) -> None:
    schema = json.loads((ROOT / "pathology/models/card.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    tables = card("safetensors", b"")
    jsonschema.validate({**tables.pop(""), **json.loads(json.dumps(tables))}, schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": {"tile_size": 3}}, r"input must not contain \{'tile_size'\}"),
        ({"top": {"licens": "MIT"}}, r"the card must not contain \{'licens'\}"),
        ({"input": {"mpp": None}}, "input must contain .*'mpp'"),
        ({"input": {"mpp": 900}}, "input.mpp must be smaller"),
        ({"input": {"std": [0.2, 0, 0.2]}}, "std.* must be bigger than 0"),
        ({"output": {"kind": "mask"}}, r"output.kind must be one of"),
        ({"output": {"classes": [{"name": "a", "color": "#ff0000"}, {"name": "b"}]}}, "some of output.classes have a color"),
        ({"output": {"output_px": 4}}, "output.output_px is for kind map and detections"),
        ({"output": {"kind": "detections"}}, "output must contain form for kind detections"),
        ({"output": {"kind": "detections", "form": "boxes", "vertices": 4}}, "output.vertices is for form rows"),
        ({"output": {"nms_px": 3}}, "output.nms_px is for kind detections"),
        ({"output": {"kind": "features", "classes": None}}, "output must contain .*'features'"),
        ({"output": {"kind": "features", "features": 9}}, "output.classes is for kind classes and map and detections"),
        ({"output": {"classes": None}}, "output must contain .*'classes'"),
        ({"output": {"classes": [{"name": "a"}]}}, "softmax of a single class is always 1; use sigmoid"),
        (
            {"output": {"kind": "features", "features": 9, "classes": None}},
            "output.activation is for scores; for features say none",
        ),
        ({"output": {"kind": "detections", "form": "boxes"}}, "output.activation is for scores; for boxes say none"),
        (
            {"output": {"kind": "detections", "form": "boxes", "activation": "none", "nms_px": 2}},
            "output.nms_px is for outlines|nms_px is for points",
        ),
        ({"output": {"kind": "detections", "form": "peaks", "nms_iou": 0.5}}, "output.nms_iou is for outlines"),
        ({"output": {"classes": [{"name": "a", "threshold": 2}, {"name": "b"}]}}, "threshold is no probability from 0 to 1"),
        ({"output": {"display": [1, 1]}}, "output.display is no range"),
        ({"output": {"kind": "map", "margin_px": 3.0}}, "output.margin_px is 3.0: write a whole number without a point"),
        ({"input": {"tile_px": 32.0}}, "input.tile_px is 32.0: write a whole number"),
        ({"top": {"name": "tissue.png"}}, "a name that ends in png would be taken for one of a result's files"),
        ({"output": {"activation": "none", "classes": [{"name": "minx"}]}}, "class minx is also a column of a tile's place"),
        ({"weights": {"file": "../weights.safetensors"}}, r"weights.file must match pattern"),
        ({"weights": {"architecture": None}}, "weights must contain .*'architecture'"),
        ({"top": {"precisions": []}}, "precisions must contain at least 1 items"),
        ({"top": {"precisions": ["int8"]}}, "precisions.* must be one of"),
        ({"top": {"schema": 2}}, "has schema 2, this program knows 1; update the program"),
    ],
)
def test_a_card_that_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_spec(str(folder_of(tmp_path / "m", **changes)))
    assert str(tmp_path / "m") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["safetensors", "torchscript"])
def test_a_card_says_what_its_network_may_be_computed_in(tmp_path: Path, format: str) -> None:
    both = folder_of(tmp_path / "both", format, top={"precisions": ["bf16", "fp32"]})
    one = folder_of(tmp_path / "one", format, top={"precisions": ["fp32"]})
    for folder in (both, one):
        if format == "torchscript":
            trusted(folder, FILES[format])
    assert (precisions(str(both)), precisions(str(one))) == (("bf16", "fp32"), ("fp32",))
    load_model(str(both), precision="bf16")
    with pytest.raises(UsageError, match="model small allows fp32 only, by its card; use --precision fp32"):
        load_model(str(one), precision="bf16")
    asked = ["--model", str(one), "--precision", "bf16", "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(main, ["run", str(ROOT / "sample_data/sample.svs"), *asked])
    assert (done.exit_code, done.output) == (
        2,
        f"pathology: model {one} allows fp32 only, by its card; use --precision fp32\n",
    )


def test_a_card_nested_without_end_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / CARD).write_text("x = " + "[" * 100_000)
    with pytest.raises(ModelError, match=r"model\.toml in .* is no TOML"):
        load_spec(str(folder))


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    text = (folder / CARD).read_text()
    for number in ("nan", "inf"):
        (folder / CARD).write_text(text.replace("mean = [0.7", f"mean = [{number}"))
        with pytest.raises(ModelError, match="a number is NaN or infinite"):
            load_spec(str(folder))


# What is refused before anything runs


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.fault("M01", "M06")
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    marker = tmp_path / "ran"
    content = {"state_dict": seeded().state_dict(), "callbacks": Payload(marker)}
    torch.save(content, tmp_path / "c.ckpt", _use_new_zipfile_serialization=not legacy)
    for force in ("0", "1"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pipelines.cli",
                "models",
                "init",
                str(tmp_path / "c.ckpt"),
                *SAID,
                "--normalize",
                "half",
                "-o",
                str(tmp_path / "m"),
            ],
            env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": force},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "holds more than weights, and loading that would run code" in done.stderr
        assert "save the weights alone" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not marker.exists()
        assert not (tmp_path / "m").exists()


@pytest.mark.fault("M01")
def test_a_plain_malicious_pickle_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Payload(marker)))
    result = init(tmp_path / "c.pt", tmp_path / "m")
    assert result.exit_code == 2
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.fault("M08")
def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(
    tmp_path: Path, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = seeded().state_dict()
    name = next(iter(state))
    claimed = torch.zeros(1).expand(2**20, 2**20)  # 4 TiB, of 4 bytes
    torch.save({**state, name: claimed}, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    assert (tmp_path / "c.pt").stat().st_size < 100_000
    for word in ("clone", "contiguous", "float", "copy_", "isfinite"):
        monkeypatch.setattr(torch.Tensor, word, refuse)  # what would make room for it
    with pytest.raises(ModelError, match=rf"its tensors claim 43980\d+, {name} alone \(1048576, 1048576\)"):
        read_checkpoint(tmp_path / "c.pt")
    result = init(tmp_path / "c.pt", tmp_path / "m")
    assert result.exit_code == 2
    assert "it is no honest checkpoint" in result.output
    assert not (tmp_path / "m").exists()


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("memory was taken for it")


def test_weights_that_are_repeated_in_small_or_shared_are_no_lie(tmp_path: Path) -> None:
    shared = torch.arange(2.0**16)
    state = {"mask": torch.zeros(1).expand(2**10, 2**10), "one": shared, "two": shared, "view": shared[5:]}
    torch.save(state, tmp_path / "c.pt")
    assert {key: tensor.shape for key, tensor in read_checkpoint(tmp_path / "c.pt").items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
@pytest.mark.fault("M02", "M03")
def test_what_runs_code_is_not_looked_into_before_it_is_trusted(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    folder = folder_of(tmp_path / "m", format, buffer.getvalue())
    for loader in (torch.jit, torch.export):
        monkeypatch.setattr(loader, "load", lambda *_: pytest.fail("looked into"))
    with pytest.raises(ModelError, match=r"is not trusted yet; its sha256 is [0-9a-f]{64}"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="runs code when it is loaded"):
        add_model(folder)
    assert not marker.exists()


def test_a_function_named_by_a_card_is_called_only_when_the_card_is_trusted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", weights={"architecture": "tests.networks:small"})
    with pytest.raises(ModelError, match=r"model\.toml in .* runs code when it is loaded and is not trusted yet"):
        load_model(str(folder))
    warm_up(load_model(str(trusted(folder, CARD))), 2)
    (folder / CARD).write_text((folder / CARD).read_text() + "\n# changed\n")
    with pytest.raises(ModelError, match="is not the file you trusted"):
        load_model(str(folder))


@pytest.mark.parametrize("architecture", ["os:system", "unittest.__main__:x", "antigravity:x", "pip.__main__:x"])
@pytest.mark.fault("M09")
def test_modules_that_hold_no_networks_are_not_even_imported(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "m", weights={"architecture": architecture})
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} imported"))
    for use in (load_model, add_model):
        with pytest.raises(ModelError, match=r"holds no networks; name a torch\.nn\.Module of an installed package"):
            use(str(folder))


def broken(state: dict[str, torch.Tensor], key: str, tensor: torch.Tensor | None) -> bytes:
    changed = {k: v for k, v in state.items() if k != key}
    return save(changed if tensor is None else {**changed, key: tensor})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda state: save(state)[:-10], "is no whole safetensors file"),
        (lambda state: b"", "is no whole safetensors file"),
        (lambda state: broken(state, "head.bias", torch.tensor([0.0, float("nan")])), "holds NaN or infinity in head.bias"),
        (lambda state: broken(state, "head.bias", None), "does not fit the architecture: without head.bias"),
        (lambda state: broken(state, "extra", torch.ones(1)), "does not fit the architecture: also with extra"),
        (
            lambda state: broken(state, "head.bias", torch.ones(3)),
            r"another shape: head.bias \(3,\) for \(2,\); correct the architecture or its arguments",
        ),
    ],
)
@pytest.mark.fault("M05", "M07")
def test_weights_that_are_damaged_or_do_not_fit_are_refused(
    tmp_path: Path, data: Callable[[dict[str, torch.Tensor]], bytes], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder_of(tmp_path / "m", data=data(seeded().state_dict()))))
    assert "weights.safetensors of model small" in str(caught.value)


@pytest.mark.fault("M04")
def test_another_file_than_the_cards_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    (folder / "weights.safetensors").write_bytes(save(Small().state_dict()))
    with pytest.raises(ModelError, match=r"its card says [0-9a-f]{64}: it is not the card's file, or damaged"):
        load_model(str(folder))


def test_another_number_of_classes_than_the_cards_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", output={"classes": [{"name": c} for c in "abc"]})
    with pytest.raises(ModelError, match="but its card names 3 classes; correct the card"):
        warm_up(load_model(str(folder)), 2)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("no_such_package:Net", "no_such_package cannot be imported"),
        ("tests.networks:Nothing", "tests.networks has no callable Nothing"),
    ],
)
def test_an_architecture_that_is_not_there_is_named(tmp_path: Path, architecture: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(folder_of(tmp_path / "m", weights={"architecture": architecture})))


# A checkpoint brought along


def init(checkpoint: Path, folder: Path, *more: str) -> Result:
    arguments = [*SAID, *more]
    if "--normalize" not in more:
        arguments += ["--normalize", "0.7,0.6,0.7/0.2,0.25,0.2"]
    return CliRunner().invoke(main, ["models", "init", str(checkpoint), *arguments, "-o", str(folder)])


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.backbone."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "anything"])
def test_a_checkpoint_becomes_a_model(tmp_path: Path, prefix: str, key: str | None) -> None:
    state = {prefix + name: tensor for name, tensor in seeded().state_dict().items()}
    content: Any = state if key is None else {key: state, "epoch": 3, "lr": 0.1, "names": ["a"]}
    torch.save(content, tmp_path / "c.ckpt")
    result = init(tmp_path / "c.ckpt", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert (f"taken off their names: {prefix}\n" in result.output) == bool(prefix)
    np.testing.assert_allclose(load_model("mine")(tiles()), expected_scores(seeded(), tiles()), atol=1e-6)


def test_an_embedding_model_is_made_without_classes(tmp_path: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "c.ckpt")
    place = SAID.index("--classes")
    said = [*SAID[:place], *SAID[place + 2 :], "--features", "2", "--normalize", "none"]
    command = ["models", "init", str(tmp_path / "c.ckpt"), *said, "-o", str(tmp_path / "mine")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert load_model("mine")(tiles()).shape == (5, 2, 1, 1)
    for more, message in (
        (["--classes", "a,b"], "give --classes of a model that answers scores, or --features"),
        (["--output-px", "4"], "a vector of --features has no --activation"),
    ):
        refused = CliRunner().invoke(main, [*command, *more])
        assert refused.exit_code == 2
        assert message in refused.output


def test_a_map_is_made_with_its_side_and_margin(tmp_path: Path) -> None:
    torch.save({"gain": torch.ones(1)}, tmp_path / "c.pt")
    more = ["--arch", "tests.networks:Pixels", "--classes", "r,g,b", "--normalize", "none", "--activation", "none"]
    result = init(tmp_path / "c.pt", tmp_path / "mine", *more, "--output-px", "32", "--margin-px", "3")
    assert result.exit_code == 0, result.output
    spec = load_spec("mine")
    assert (spec.output_px, spec.margin_px, spec.scores) == (32, 3, "value")
    result = init(tmp_path / "c.pt", tmp_path / "other", *more, "--output-px", "32", "--margin-px", "16")
    assert "margin 16 px leaves nothing of an answer of 32 px" in result.output
    assert not (tmp_path / "other").exists()


def test_what_is_not_the_networks_is_left_out_and_told(tmp_path: Path) -> None:
    state = {f"net.{name}": tensor for name, tensor in seeded().state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(2), "net.aux.bias": torch.ones(1)}}, tmp_path / "c.ckpt")
    result = init(tmp_path / "c.ckpt", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    assert "left out: loss.weight\n" in result.output
    assert "left out: net.aux.bias\n" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"head.weight": torch.ones(2, 16)}, "c.pt does not fit the architecture: without first.weight, first.bias"),
        ({"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}, "holds weights under a, b, and cannot tell which are meant"),
        ({"epoch": 3}, "holds no weights; save the network's state_dict"),
        ([1, 2], "holds no weights"),
    ],
)
def test_a_checkpoint_without_the_networks_weights_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "c.pt")
    result = init(tmp_path / "c.pt", tmp_path / "mine")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "mine").exists()


def test_a_truncated_or_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "c.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:3000])
    for name, message in (("cut.pt", "is no whole checkpoint of torch"), ("none.pt", "is no file")):
        result = init(tmp_path / name, tmp_path / "mine")
        assert result.exit_code == 2
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_of_several_networks_in_a_checkpoint_one_has_to_be_named(tmp_path: Path) -> None:
    mine, other = seeded().state_dict(), Small().state_dict()
    both = {**{f"model.{k}": v for k, v in mine.items()}, **{f"ema.{k}": v for k, v in other.items()}}
    torch.save({"state_dict": both}, tmp_path / "c.ckpt")
    result = init(tmp_path / "c.ckpt", tmp_path / "mine")
    assert result.exit_code == 2
    assert "c.ckpt holds several networks that fit: model., ema.; say which is meant: --prefix model." in result.output
    assert init(tmp_path / "c.ckpt", tmp_path / "mine", "--prefix", "model.").exit_code == 0
    np.testing.assert_allclose(load_model("mine")(tiles()), expected_scores(seeded(), tiles()), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int32), "another kind of number: head.bias torch.int32 for torch.float32"),
        (lambda t: t.to(torch.complex64), "another kind of number: head.bias torch.complex64 for torch.float32"),
        (lambda t: t.double() + 1e300, "holds NaN or infinity in head.bias"),
        (lambda t: t.to_sparse(), "holds no weights"),
    ],
)
def test_weights_of_another_kind_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    state = seeded().state_dict()
    torch.save({**state, "head.bias": change(state["head.bias"])}, tmp_path / "c.pt")
    result = init(tmp_path / "c.pt", tmp_path / "mine")
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_weights_in_float8_are_weights(tmp_path: Path) -> None:
    state = {key: t.to(torch.float8_e4m3fn) if key == "head.bias" else t for key, t in seeded().state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    assert init(tmp_path / "c.pt", tmp_path / "mine").exit_code == 0


def test_what_is_wrong_around_a_checkpoint_is_one_line_and_leaves_nothing(tmp_path: Path, own_home: Path) -> None:
    torch.save(seeded().state_dict(), tmp_path / "c.pt")
    (tmp_path / "file").touch()
    for folder, more, message in (
        (tmp_path / "no" / "such" / "mine", [], "no/such is no folder; make it first"),
        (tmp_path / "file" / "mine", [], "file is no folder"),
        (tmp_path / "mine", ["--mpp", "nan"], "--mpp nan: give um per pixel"),
        (tmp_path / "mine", ["--normalize", "nan,0,0/1,1,1"], "--normalize nan"),
        (tmp_path / "mine", ["--classes", "a\x7f,b"], "cannot be printed"),
        (tmp_path / "mine", ["--arch", "tests.networks:Fails"], "failed on made-up tiles: ZeroDivisionError: integer division"),
    ):
        result = init(tmp_path / "c.pt", folder, *more)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert len(result.output.strip().splitlines()) == 1
        assert not (tmp_path / "no").exists()
        assert not (tmp_path / "mine").exists()
    own_home.mkdir(exist_ok=True)
    (own_home / "models.json").write_text("{broken")
    result = init(tmp_path / "c.pt", tmp_path / "mine")
    assert "is damaged" in result.output
    assert not (tmp_path / "mine").exists()


def test_nothing_is_left_of_a_model_that_does_not_answer_as_said(tmp_path: Path) -> None:
    torch.save(seeded(3).state_dict(), tmp_path / "c.pt")
    result = init(tmp_path / "c.pt", tmp_path / "mine", "--arg", "classes=3")
    assert result.exit_code == 2
    assert "its card names 2 classes" in result.output
    assert not (tmp_path / "mine").exists()
    assert "mine" not in CliRunner().invoke(main, ["models"]).output
    assert init(tmp_path / "c.pt", tmp_path / "mine", "--arg", "classes=3", "--classes", "a,b,c").exit_code == 0
    assert "exists already" in init(tmp_path / "c.pt", tmp_path / "mine").output


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["a.w", "b.w"], ""),
        (["model.a.w", "model.b.w", "a.w"], "model."),
        (["module.model.a.w", "module.model.b.w"], "module.model."),
        (["x", "y"], ""),
        ([], ""),
    ],
)
def test_the_prefix_is_what_most_names_share(keys: list[str], prefix: str) -> None:
    assert common_prefix(keys, {"a.w", "b.w"}) == prefix


def test_from_a_checkpoint_to_a_heatmap_of_the_sample_in_four_commands(tmp_path: Path) -> None:
    """As the README has it, in processes of their own: a Lightning checkpoint of a network in a package of the user's."""
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "networks.py").write_text((ROOT / "tests/networks.py").read_text())
    state = {f"model.{name}": tensor for name, tensor in seeded().state_dict().items()}
    torch.save({"epoch": 3, "pytorch-lightning_version": "2.0", "state_dict": state}, tmp_path / "best.ckpt")
    (tmp_path / "tiles").mkdir()
    picture = noise_pixels(224, 224)
    Image.fromarray(picture).save(tmp_path / "tiles" / "0.png")
    half = (torch.from_numpy(picture)[None].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        scores = seeded()(half).softmax(1)[0].tolist()
    (tmp_path / "scores.csv").write_text(f"tile,normal,tumour\n0.png,{scores[0]},{scores[1]}\n")
    sample = str(ROOT / "sample_data/sample.svs")
    said = ["--arch", "mylab.networks:Small", "--classes", "normal,tumour", "--mpp", "0.5", "--tile-px", "224"]
    for command in (
        ["models", "init", "best.ckpt", *said, "--normalize", "half", "-o", "tumour"],
        ["models", "check", "tumour", "--tiles", "tiles", "--expected", "scores.csv"],
        ["check", sample, "--model", "tumour"],
        ["run", sample, "--model", "tumour", "--out", "results"],
    ):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "results").glob("slides/*/tumour")
    heatmap = pathology.open_heatmap(result).levels[0].compute(scheduler="sync")
    assert np.isfinite(heatmap[0]).sum() == 161
    np.testing.assert_allclose(np.nansum(heatmap, axis=0)[np.isfinite(heatmap[0])], 1, atol=1e-6)


# Scores compared


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A model, pictures of tiles and their scores."""
    torch.save(seeded().state_dict(), tmp_path / "c.pt")
    assert init(tmp_path / "c.pt", tmp_path / "mine").exit_code == 0
    (tmp_path / "tiles").mkdir()
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tile", "prob_a", "b"])
        for number, (tile, scores) in enumerate(zip(tiles(), expected_scores(seeded(), tiles())[:, :, 0, 0], strict=True)):
            Image.fromarray(tile).save(tmp_path / "tiles" / f"{number}.png")
            table.writerow([f"{number}.png", *scores])
    return tmp_path


def check(place: Path, *more: str) -> Result:
    arguments = ["models", "check", "mine", "--tiles", str(place / "tiles"), "--expected", str(place / "scores.csv"), *more]
    return CliRunner().invoke(main, arguments)


def test_equal_scores_are_within_and_others_are_named(made: Path) -> None:
    result = check(made)
    assert result.exit_code == 0, result.output
    assert "5 tiles, largest difference" in result.output
    assert "all within 0.0001" in result.output
    text = (made / "scores.csv").read_text().splitlines()
    name, a, b = text[3].split(",")
    text[3] = f"{name},{float(a) - 0.25},{b}"
    (made / "scores.csv").write_text("\n".join(text))
    result = check(made)
    assert result.exit_code == 1
    assert result.output.startswith("2.5e-01  2.png  prob_a ")
    assert "largest difference 2.5e-01: NOT within 0.0001" in result.output
    assert check(made, "--tolerance", "0.3").exit_code == 0
    assert check(made, "--tolerance", "nan").exit_code == 2


def test_scores_that_are_no_numbers_never_pass(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("mine")

    def broken(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.full((len(batch), 2, 1, 1), np.nan, np.float32)

    monkeypatch.setattr(type(model), "__call__", lambda _, batch: broken(batch))
    result = check(made)
    assert result.exit_code == 2
    assert "model mine answered NaN or infinity for 0.png" in result.output


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("tile,prob_a\n0.png,1\n", "has columns tile, prob_a; needed are tile, prob_a, prob_b"),
        ("tile,a,b\n", "has no rows"),
        ("tile,a,b\n0.png,1,\n", "give a number for each class"),
        ("tile,a,b\n0.png,1,nan\n", "no finite number"),
        ("tile,a,b\nnone.png,1,0\n", "none.png cannot be read"),
        ("tile,a,b\nlarge.png,1,0\n", "large.png is 40 x 40 px; model mine takes 32 px a side"),
    ],
)
def test_tables_and_tiles_that_do_not_fit_are_refused(made: Path, table: str, message: str) -> None:
    Image.new("RGB", (40, 40)).save(made / "tiles" / "large.png")
    (made / "scores.csv").write_text(table)
    result = check(made)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_cards_are_read_without_torch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    code = f"import sys; from pathology.models import load_spec; load_spec({str(folder)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert read_card(folder).weights.architecture == "tests.networks:Small"
    assert onnx.__version__
