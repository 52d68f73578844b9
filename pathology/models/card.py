"""The model card, `model.toml` beside a model's weights.

Promise: every field is known and checked, by `card.schema.json`, before weights are touched; a field that is not known is
refused, since it may be one that decides scores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pathology.errors import ModelError
from pathology.job import PRECISIONS, Precision
from pathology.model import DetectionRule, ModelSpec, ReadRule
from pathology.models.network import Activation, Colour
from pathology.models.objects import Form

CARD = "model.toml"
# Fields of an output that are not for every kind.
KINDS = {
    "classes": ("classes", "map", "detections"),
    "features": ("features",),
    "output_px": ("map", "detections"),
    "margin_px": ("map", "detections"),
    **dict.fromkeys(("form", "vertices", "most", "nms_px", "nms_iou"), ("detections",)),
}
# Pixels across a tile, and the range of colours in objects per mm2, of a heatmap of density, where a card does not say.
DENSITY_PX, DENSITY_DISPLAY = 4, (0, 5000)
Format = Literal["safetensors", "onnx", "torchscript", "pt2"]


@dataclass(frozen=True, slots=True)
class Weights:
    """A card's weights: their file in its folder, hashed, and for safetensors what network they belong to.

    data  of ONNX: a second file, where weights lie outside the graph
    """

    format: Format
    file: str
    sha256: str
    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    data_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A checked card.

    spec        how the pipeline sees it
    mean, std   of 0..1 colours in the order of `channels`
    precisions  what the network may be computed in; nothing for ONNX, which computes as it was exported
    """

    spec: ModelSpec
    weights: Weights
    sha256: str
    activation: Activation
    form: Form
    channels: Literal["rgb", "bgr"]
    mean: Colour
    std: Colour
    precisions: tuple[Precision, ...]


def read_card(folder: Path) -> Card:
    """The card in `folder`. ModelError names what is wrong, and the field."""
    try:
        raw = (folder / CARD).read_bytes()
    except OSError as error:
        raise ModelError(f"{CARD} in {folder} cannot be read ({error.strerror})") from error
    try:
        content = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{CARD} in {folder} is no TOML: {error}; correct it") from error
    if content.get("schema", 1) != 1:
        raise ModelError(f"{CARD} in {folder} has schema {content['schema']!r}, this program knows 1; update the program")
    if why := _refusal(content):
        raise ModelError(f"{CARD} in {folder}: {why}; correct it, or fetch it again")
    return _card(content, hashlib.sha256(raw).hexdigest())


def toml_value(value: Any) -> str:
    """`value` as TOML: texts, numbers, booleans, and lists and tables of them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings, numbers and booleans are written as JSON's


def _card(content: Mapping[str, Any], sha256: str) -> Card:
    weights, given, answer = Weights(**content["weights"]), content["input"], content["output"]
    kind, classes = answer["kind"], answer.get("classes", [])
    input_px = given.get("input_px", given["tile_px"])
    colors = tuple(c.get("color", "") for c in classes)
    thresholds = tuple(float(c.get("threshold", 0.5)) for c in classes)
    scale = given.get("divide_by", 255) / 255
    # Of JSON's numbers 0 and 0.0 are equal: made floats here, so that equal cards make equal models.
    mean, std = (
        tuple(float(v) * scale for v in given.get(name, default)) for name, default in (("mean", (0, 0, 0)), ("std", (1, 1, 1)))
    )
    spec = ModelSpec(
        name=content["name"],
        # The card decides answers as much as the weights do.
        sha256=hashlib.sha256(f"{weights.sha256} {sha256}".encode()).hexdigest(),
        classes=tuple(c["name"] for c in classes),
        mpp=float(given["mpp"]),
        tile_px=given["tile_px"],
        input_px=input_px,
        output_px=answer.get("output_px", {"map": input_px, "detections": DENSITY_PX}.get(kind, 1)),
        scores=answer.get("scores", "value" if answer["activation"] == "none" else "probability"),
        units=answer.get("units", ""),
        threshold=thresholds,
        colors=colors if all(colors) else (),
        display=tuple(float(v) for v in answer.get("display", DENSITY_DISPLAY if kind == "detections" else (0, 1))),  # type: ignore[arg-type]  # two, by the schema
        margin_px=answer.get("margin_px", 0) if kind == "map" else 0,
        features=answer.get("features", 0),
        detections=_detections(answer) if kind == "detections" else None,
        stain=given.get("stain", ""),
        read=ReadRule(given.get("level", "best"), given.get("margin", True), given.get("filter", "area")),
    )
    return Card(
        spec,
        weights,
        sha256,
        answer["activation"],
        answer.get("form", "peaks"),
        given.get("channels", "rgb"),
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
        () if weights.format == "onnx" else tuple(content.get("precisions", PRECISIONS)),
    )


def _detections(answer: Mapping[str, Any]) -> DetectionRule:
    given = {name: answer[name] for name in ("most", "nms_px", "nms_iou", "margin_px") if name in answer}
    vertices = {"peaks": 0, "boxes": 2}.get(answer["form"], answer.get("vertices", 0))
    return DetectionRule(vertices=vertices, **given)


def _refusal(content: Mapping[str, Any]) -> str:
    """Why the schema refuses `content`; "" where it does not."""
    import fastjsonschema

    try:
        _validate()(content)
    except fastjsonschema.JsonSchemaException as error:
        return re.sub("^data ", "the card ", str(error).removeprefix("data."))
    given, answer = content["input"], content["output"]
    classes = answer.get("classes", [])
    numbers = (*given.get("mean", ()), *given.get("std", ()), *answer.get("display", ()))
    if not all(math.isfinite(n) for n in (*numbers, *(c.get("threshold", 0) for c in classes))):
        return "a number is NaN or infinite"
    colors = [c for c in classes if "color" in c]
    if colors and len(colors) < len(classes):
        return "some of output.classes have a color and some have none"
    if given.get("stain") == "eosin-haematoxylin-od" and given.get("channels", "rgb") != "rgb":
        return "input.channels is the order of colours, and eosin, haematoxylin and optical density are none; leave it out"
    for name, kinds in KINDS.items():
        if name in answer and answer["kind"] not in kinds:
            return f"output.{name} is for kind {' and '.join(kinds)}"
    if "precisions" in content and content["weights"]["format"] == "onnx":
        return "precisions are for torch networks, and ONNX computes as it was exported"
    if answer["kind"] == "detections" and "form" not in answer:
        return "output must contain form for kind detections"
    if "vertices" in answer and answer["form"] != "rows":
        return "output.vertices is for form rows"
    return ""


@functools.cache
def _validate() -> Callable[[Any], Any]:
    import fastjsonschema

    schema = json.loads(resources.files("pathology.models").joinpath("card.schema.json").read_bytes())
    validate: Callable[[Any], Any] = fastjsonschema.compile(schema)
    return validate
