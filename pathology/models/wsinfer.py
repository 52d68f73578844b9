"""WSInfer model folders, unchanged: `config.json` beside `torchscript_model.pt`.

Promise: the same numbers as WSInfer's own order of work. A tile is cut out of level 0, resized alone (torchvision's
Resize on a PIL image: bilinear, antialiased), divided by 255, normalised; softmax over two and more classes, sigmoid for
one. Without a Resize the tile is resized to `patch_size_pixels`, where WSInfer would give the network whatever size the
slide's resolution makes of it. Weights are loaded from the very bytes whose sha256 was found trusted.

Format: https://github.com/SBU-BMI/wsinfer-zoo (model-config.schema.json, spec_version 1.0).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathology.errors import ModelError
from pathology.job import Precision
from pathology.model import Model, ModelSpec, ReadRule
from pathology.models.network import Colour, TorchNetwork, on_its_device
from pathology.models.trust import require_trust
from pathology.models.weights import read_script

CONFIG, WEIGHTS = "config.json", "torchscript_model.pt"


@dataclass(frozen=True, slots=True)
class Card:
    """What a valid `config.json` says. `sha256` is that of its bytes; `mean` and `std` are per channel of 0..1 colours."""

    sha256: str
    classes: tuple[str, ...]
    tile_px: int
    mpp: float
    input_px: int
    mean: Colour
    std: Colour


def load(folder: Path, device: str, precision: Precision = "fp32", compile: bool = False) -> Model:
    """The model in `folder`, ready on `device`. ModelError where it is not trusted, not valid or not loadable."""
    card, weights = read_card(folder), _read(folder / WEIGHTS)
    spec = _trusted_spec(folder, card, hashlib.sha256(weights).hexdigest())
    network = read_script(weights, f"{WEIGHTS} of model {spec.name}", device)
    loaded = TorchNetwork(
        spec,
        network,
        mean=card.mean,
        std=card.std,
        activation="softmax" if len(card.classes) > 1 else "sigmoid",
        device=device,
        precision=precision,
        compile=compile,
    )
    return on_its_device(loaded)


def load_spec(folder: Path) -> ModelSpec:
    """The card of the model in `folder`; hashes the weights but does not load them. ModelError as for `load`."""
    return _trusted_spec(folder, read_card(folder), hashlib.sha256(_read(folder / WEIGHTS)).hexdigest())


def read_card(folder: Path) -> Card:
    """The checked content of `folder`'s config.json. ModelError names what is wrong and what is expected."""
    raw = _read(folder / CONFIG)
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise _wrong(folder, "it is no JSON", "fetch it again") from error
    if not isinstance(config, dict):
        raise _wrong(folder, "it is no JSON object", "fetch it again")
    if "spec_version" not in config and "architecture" in config and "spacing_um_px" not in config:
        raise ModelError(
            f"{folder} looks like a folder of timm's; name it as local-dir:{folder}?mpp=0.5, with the mpp it is for"
        )
    for key in (
        "spec_version",
        "architecture",
        "num_classes",
        "patch_size_pixels",
        "spacing_um_px",
        "class_names",
        "transform",
    ):
        if key not in config:
            raise _wrong(folder, f"{key} is missing", "add it")
    if config["spec_version"] != "1.0":
        raise _wrong(folder, f"spec_version is {config['spec_version']!r}", 'only "1.0" is known')
    count, names, tile_px, mpp = (config[k] for k in ("num_classes", "class_names", "patch_size_pixels", "spacing_um_px"))
    if not _is_count(count):
        raise _wrong(folder, f"num_classes is {count!r}", "give a whole number from 1")
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
        raise _wrong(folder, f"class_names is {names!r}", "give a list of different names")
    if len(names) != count:
        raise _wrong(folder, f"class_names has {len(names)} names but num_classes is {count}", "make them agree")
    if not _is_count(tile_px):
        raise _wrong(folder, f"patch_size_pixels is {tile_px!r}", "give a whole number from 1")
    if not _is_number(mpp) or not 0.05 <= mpp <= 100:
        raise _wrong(folder, f"spacing_um_px is {mpp!r}", "give um per pixel, from 0.05 to 100")
    input_px, mean, std = _read_transform(folder, config["transform"], tile_px)
    return Card(hashlib.sha256(raw).hexdigest(), tuple(names), tile_px, float(mpp), input_px, mean, std)


def _read_transform(folder: Path, steps: Any, tile_px: int) -> tuple[int, Colour, Colour]:
    """(side given to the network, mean, std) of a transform [Resize,] ToTensor [, Normalize]."""
    if not isinstance(steps, list) or not all(
        isinstance(s, dict) and {"name"} <= s.keys() <= {"name", "arguments"} and isinstance(s.get("arguments") or {}, dict)
        for s in steps
    ):
        raise _wrong(folder, "transform is not understood", 'give a list of {"name": ..., "arguments": {...}}')
    order = [step["name"] for step in steps]
    if order not in (["ToTensor"], ["Resize", "ToTensor"], ["ToTensor", "Normalize"], ["Resize", "ToTensor", "Normalize"]):
        raise _wrong(
            folder, f"transform is {order}", "only Resize, ToTensor, Normalize in this order are known, ToTensor among them"
        )
    arguments = {step["name"]: step.get("arguments") or {} for step in steps}
    if arguments["ToTensor"]:
        raise _wrong(folder, f"ToTensor has arguments {sorted(arguments['ToTensor'])}", "it takes none")
    input_px = _read_side(folder, arguments["Resize"]) if "Resize" in arguments else tile_px
    if "Normalize" not in arguments:
        return input_px, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if arguments["Normalize"].keys() != {"mean", "std"}:
        raise _wrong(folder, f"Normalize has arguments {sorted(arguments['Normalize'])}", "give mean and std")
    mean, std = arguments["Normalize"]["mean"], arguments["Normalize"]["std"]
    for name, values in (("mean", mean), ("std", std)):
        if (
            not isinstance(values, list)
            or len(values) != 3
            or not all(_is_number(v) and (name == "mean" or v > 0) for v in values)
        ):
            raise _wrong(
                folder, f"Normalize's {name} is {values!r}", f"give three {'numbers' if name == 'mean' else 'numbers above 0'}"
            )
    return input_px, (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))


def _read_side(folder: Path, arguments: dict[str, Any]) -> int:
    # On a PIL image torchvision always antialiases, whatever `antialias` says.
    if not {"size"} <= arguments.keys() <= {"size", "antialias"}:
        raise _wrong(
            folder, f"Resize has arguments {sorted(arguments)}", "only size, and antialias which changes nothing, are known"
        )
    size = arguments["size"]
    sides = size if isinstance(size, list) else [size]
    if not 1 <= len(sides) <= 2 or not all(_is_count(s) for s in sides) or len(set(sides)) != 1:
        raise _wrong(folder, f"Resize's size is {size!r}", "give one side, or two equal ones")
    return int(sides[0])


def _trusted_spec(folder: Path, card: Card, weights_sha256: str) -> ModelSpec:
    entry = require_trust(folder / WEIGHTS, weights_sha256)
    return ModelSpec(
        name=entry.name,
        # The configuration decides answers as much as the weights do: normalisation, sizes, order of classes.
        sha256=hashlib.sha256(f"{weights_sha256} {card.sha256}".encode()).hexdigest(),
        classes=card.classes,
        mpp=card.mpp,
        tile_px=card.tile_px,
        input_px=card.input_px,
        read=ReadRule(level="0", margin=False, filter="bilinear"),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path.name} in {path.parent} cannot be read ({error.strerror}); "
            f"a WSInfer model is a folder with {CONFIG} and {WEIGHTS}"
        ) from error


def _wrong(folder: Path, what: str, remedy: str) -> ModelError:
    return ModelError(f"{CONFIG} in {folder}: {what}; {remedy}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
