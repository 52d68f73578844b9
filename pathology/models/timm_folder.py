"""Networks of timm: folders as timm saves them, and the architecture `timm:create_model` of a card. The only import of timm.

Promise: only networks of timm's own, by name, are made, with plain arguments and without weights; the weights are safetensors,
loaded from the very bytes that the model's sha256 covers. So nothing of a folder runs, and none needs trust.

A folder holds `config.json` and `model.safetensors`. It is named `local-dir:PATH`, or `hf-hub:ORG/NAME` where it lies on the
Hugging Face hub. It says nothing of slides, so arguments do: `local-dir:PATH?mpp=0.5&classes=normal,tumour`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pathology.errors import ModelError, one_line
from pathology.job import Precision, slug
from pathology.model import Model, ModelSpec
from pathology.models.hub import EXTRA, REMEDY, fetch, pickles_in
from pathology.models.network import Activation, Colour, TorchNetwork, on_its_device
from pathology.models.refs import Argument
from pathology.models.weights import check_finite, fill, read_safetensors

if TYPE_CHECKING:
    import torch

LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FACTORY = "timm:create_model"
TAKES = ("mpp", "tile_px", "name")
# Besides, a classifier takes the first two, and a network without classes, which answers features, their number.
OF_CLASSES, OF_FEATURES = ("classes", "activation"), ("features",)

# Arguments of timm.create_model that open or fetch files, or make another thing of the network than its answer.
NOT_ARGUMENTS = {
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "feature_cfg",
    "feature_cls",
}
# Of `pretrained_cfg` what has a say in how a network is built.
BUILDS = ("num_classes", "input_size", "fixed_input_size", "global_pool", "first_conv", "classifier")
# timm's own, where a configuration is silent.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Config:
    """What a valid `config.json` says. `sha256` is that of its bytes; `pretrained` what of its pretrained_cfg builds.

    count     classes; 0 of a network that answers `features`, whose number may be 0 where it is not said
    """

    sha256: str
    architecture: str
    arguments: Mapping[str, Any]
    pretrained: Mapping[str, Any]
    count: int
    features: int
    labels: tuple[str, ...]
    input_px: int
    mean: Colour
    std: Colour


def is_source(name: str) -> bool:
    """Whether a reference without its arguments names such a folder."""
    return name.startswith((LOCAL, HUB))


def load(
    name: str, arguments: Mapping[str, Argument], device: str, precision: Precision = "fp32", compile: bool = False
) -> Model:
    """The model in the folder that `name` names, ready on `device`. ModelError where it is not valid or not to be had."""
    folder = _folder(name)
    config, data = read_config(folder), _read(folder / WEIGHTS)
    spec = _spec(name, config, arguments, hashlib.sha256(data).hexdigest())
    what = f"{WEIGHTS} of model {spec.name}"
    state = read_safetensors(data, what)
    check_finite(state, what)
    network = _create(config.architecture, config.arguments, config.pretrained)
    fill(network, state, what)
    loaded = TorchNetwork(
        spec,
        network,
        mean=config.mean,
        std=config.std,
        activation=_activation(name, config, arguments),
        device=device,
        precision=precision,
        compile=compile,
    )
    return on_its_device(loaded)


def load_spec(name: str, arguments: Mapping[str, Argument]) -> ModelSpec:
    """The card of that model; hashes the weights but does not load them, and needs no timm. ModelError as for `load`."""
    folder = _folder(name)
    config = read_config(folder)
    try:
        stat = (folder / WEIGHTS).stat()
    except OSError:
        _read(folder / WEIGHTS)
        raise
    return _spec(name, config, arguments, _sha256(folder / WEIGHTS, stat.st_size, stat.st_mtime_ns))


def make(arguments: Mapping[str, Any]) -> torch.nn.Module:
    """The network of a card whose architecture is `FACTORY`, untrained. ModelError for anything but a network of timm's."""
    given = dict(arguments)
    return _create(given.pop("model_name", None), given)


def read_config(folder: Path) -> Config:
    """The checked content of `folder`'s config.json. ModelError names what is wrong and what is expected."""
    raw = _read(folder / CONFIG)
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise _wrong(folder, "it is no JSON", "fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        raise _wrong(folder, "architecture is missing", "a folder of timm's names its network there")
    # Older ones have no inner table.
    inner = content.get("pretrained_cfg", content)
    arguments = content.get("model_args") or {}
    if not isinstance(inner, dict) or not isinstance(arguments, dict):
        raise _wrong(folder, "pretrained_cfg or model_args is no table", "fetch it again")
    count = arguments.get("num_classes", content.get("num_classes", inner.get("num_classes")))
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise _wrong(folder, f"num_classes is {count!r}", "give a whole number")
    size = inner.get("input_size", (3, 224, 224))
    if not isinstance(size, (list, tuple)) or len(size) != 3 or size[0] != 3 or size[1] != size[2] or not _count(size[1]):
        raise _wrong(folder, f"input_size is {size!r}", "only [3, side, side] is known: colour tiles")
    input_px = arguments.get("img_size", size[1])
    sides: list[Any] = input_px if isinstance(input_px, list) else [input_px]
    if not 1 <= len(sides) <= 2 or not all(map(_count, sides)) or len(set(sides)) != 1:
        raise _wrong(folder, f"img_size is {input_px!r}", "give one side, or two equal ones")
    features: Any = content.get("num_features", inner.get("num_features"))
    labels = content.get("label_names", inner.get("label_names", inner.get("labels")))
    known = labels if isinstance(labels, list) and all(isinstance(label, str) and label for label in labels) else []
    side: int = sides[0]
    return Config(
        hashlib.sha256(raw).hexdigest(),
        content["architecture"],
        arguments,
        {**{key: inner[key] for key in BUILDS if key in inner}, "num_classes": count},
        count,
        features if _count(features) else 0,
        tuple(known) if len(known) == count else (),
        side,
        _colour(folder, inner, "mean", MEAN),
        _colour(folder, inner, "std", STD),
    )


def _spec(name: str, config: Config, arguments: Mapping[str, Argument], weights_sha256: str) -> ModelSpec:
    takes = TAKES + (OF_CLASSES if config.count else OF_FEATURES)
    if unknown := sorted(arguments.keys() - set(takes)):
        raise ModelError(f"model {name}: {unknown[0]} is no argument of it; it takes {', '.join(takes)}")
    mpp, tile_px = arguments.get("mpp"), arguments.get("tile_px", config.input_px)
    if mpp is None:
        raise ModelError(f"model {name} does not say for which resolution it is made; add it, in um per px: {name}?mpp=0.5")
    if isinstance(mpp, str):
        raise ModelError(f"model {name}: mpp is {mpp!r}; give um per px, as {name}?mpp=0.5")
    if not isinstance(tile_px, int):
        raise ModelError(f"model {name}: tile_px is {tile_px!r}; give a whole number of pixels")
    activation = _activation(name, config, arguments)
    return ModelSpec(
        name=slug(str(arguments.get("name", Path(name.partition(":")[2].partition("@")[0]).name))),
        # What is said of it decides answers as much as the weights do.
        sha256=hashlib.sha256(json.dumps([weights_sha256, config.sha256, sorted(arguments.items())]).encode()).hexdigest(),
        classes=_classes(name, config, arguments) if config.count else (),
        mpp=float(mpp),
        tile_px=tile_px,
        input_px=config.input_px,
        scores="value" if activation == "none" else "probability",
        features=0 if config.count else _features(name, config, arguments),
    )


def _features(name: str, config: Config, arguments: Mapping[str, Argument]) -> int:
    features = arguments.get("features", config.features)
    if not isinstance(features, int) or features < 1:
        raise ModelError(f"model {name} answers features (num_classes is 0); say how many: {name}?features=768")
    return features


def _classes(name: str, config: Config, arguments: Mapping[str, Argument]) -> tuple[str, ...]:
    if "classes" not in arguments and config.labels:
        return config.labels
    classes = tuple(c.strip() for c in str(arguments.get("classes", "")).split(",") if c.strip())
    if len(classes) != config.count:
        have = f"model {name} has {config.count} classes and {len(classes)} names for them"
        raise ModelError(f"{have}; name each, in their order: {name}?classes=a,b")
    return classes


def _activation(name: str, config: Config, arguments: Mapping[str, Argument]) -> Activation:
    if not config.count:
        return "none"
    activation = arguments.get("activation", "softmax" if config.count > 1 else "sigmoid")
    for known in get_args(Activation):
        if activation == known:
            return known  # type: ignore[no-any-return]  # one of the literals
    raise ModelError(f"model {name}: activation is {activation!r}; use softmax, sigmoid or none")


def _create(name: object, arguments: Mapping[str, Any], pretrained: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """timm's network `name`, without weights. `pretrained`: how the weights to come were trained; timm's own record if None."""
    timm = _timm()
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise ModelError(f"timm {timm.__version__} has no network {name!r}; use one of its names, or a timm that has it")
    if wrong := sorted(arguments.keys() & NOT_ARGUMENTS):
        raise ModelError(f"timm's {name}: {wrong[0]} is no argument of a network; leave it out")
    if wrong := sorted(key for key, value in arguments.items() if not _plain(value)):
        raise ModelError(f"timm's {name}: argument {wrong[0]} is no text, number, boolean or list of them; correct it")
    given = dict(arguments) if pretrained is None else {"pretrained_cfg": dict(pretrained), **arguments}
    try:
        network: torch.nn.Module = timm.create_model(name, pretrained=False, **given)
    except Exception as error:  # foreign code
        raise ModelError(
            f"timm's {name} failed with {type(error).__name__}: {one_line(error)}; correct its arguments"
        ) from error
    return network


def _timm() -> Any:
    try:
        import timm
    except Exception as error:  # torchvision, which it imports, fails in ways of its own beside another torch
        raise ModelError(
            f"timm cannot be imported ({one_line(error)}); install it, and a torchvision made for this torch: {EXTRA}"
        ) from error
    return timm


def _folder(name: str) -> Path:
    """The folder that `name` stands for, with its files; those of the hub are fetched where they are not in the cache."""
    if name.startswith(HUB):
        return fetch(name.removeprefix(HUB), (CONFIG, WEIGHTS))
    folder = Path(name.removeprefix(LOCAL)).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model {name}: there is no folder {folder}; name one with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        holds = f", only {pickles[0]}" if (pickles := pickles_in(folder)) else ""
        raise ModelError(f"model {name} has no {WEIGHTS}{holds}; {REMEDY}")
    return folder


@functools.cache
def _sha256(file: Path, size: int, time: int) -> str:
    """Of a file as it is now: asked for by every slide, and weights may be gigabytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path.name} in {path.parent} cannot be read ({error.strerror}); fetch the whole folder") from error


def _colour(folder: Path, inner: Mapping[str, Any], key: str, default: Colour) -> Colour:
    value = inner.get(key, default)
    numbers = isinstance(value, (list, tuple)) and len(value) == 3 and all(_number(v) for v in value)
    if not numbers or (key == "std" and min(value) <= 0):
        raise _wrong(folder, f"{key} is {value!r}", f"give three numbers{' above 0' if key == 'std' else ''}")
    return float(value[0]), float(value[1]), float(value[2])


def _wrong(folder: Path, what: str, remedy: str) -> ModelError:
    return ModelError(f"{CONFIG} in {folder}: {what}; {remedy}")


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float)) or (isinstance(value, list) and all(map(_plain, value)))


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 16384


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
