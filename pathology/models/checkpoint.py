"""From a training checkpoint to a model folder. Promise: the folder holds a model that has answered, or is not there at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathology.durable import make_folders, write_file
from pathology.errors import ModelError
from pathology.models import folder as folders
from pathology.models.card import CARD, Weights, read_card, toml_value
from pathology.models.checks import warm_up
from pathology.models.network import Activation, Colour
from pathology.models.trust import checked_name, entries, forget, register
from pathology.models.weights import check_finite, common_prefix, fill, read_checkpoint

WEIGHTS = "weights.safetensors"
NORMALIZATIONS: Mapping[str, tuple[Colour, Colour]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user says of a checkpoint; the fields of a card.

    classes    none of an embedding model
    features   length of the vector that it answers; 0: it answers scores
    output_px  side of a map's answer; 0: a score per tile
    margin_px  of a map, from its edges, that counts only where nothing else does
    prefix     what stands before the network's names in the checkpoint; None: found
    """

    architecture: str
    arguments: Mapping[str, Any]
    classes: Sequence[str]
    mpp: float
    tile_px: int
    mean: Colour
    std: Colour
    activation: Activation
    output_px: int = 0
    margin_px: int = 0
    prefix: str | None = None
    features: int = 0


@dataclass(frozen=True, slots=True)
class Made:
    """A model folder that was made: its name, how many weights it has, and what of the checkpoint was taken off or left out."""

    name: str
    folder: Path
    weights: int
    prefix: str
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Converted:
    """Safetensors out of a checkpoint: how many weights, and what of the checkpoint was taken off names or left out."""

    data: bytes
    weights: int
    prefix: str
    left_out: tuple[str, ...]


def make_folder(checkpoint: Path, folder: Path, wanted: Wanted) -> Made:
    """Write the network's weights as safetensors beside a card, try the model, and register it under the folder's name.

    Prefixes of wrappers (`module.`, `model.` ...) are found by matching names with the architecture's, and taken off. What the
    checkpoint has beyond the network is left out and told. Raises ModelError where it lacks any of the network's weights.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists already; name another folder, or remove it")
    if not folder.absolute().parent.is_dir():
        raise ModelError(f"{folder} cannot be made: {folder.absolute().parent} is no folder; make it first")
    entries()  # a registry that is damaged is told of before anything is written
    converted = convert(checkpoint, wanted.architecture, wanted.arguments, wanted.prefix)
    existed, name = folder.exists(), checked_name(None, folder.resolve())
    try:
        make_folders(folder)
        write_file(folder / WEIGHTS, converted.data)
        write_file(folder / CARD, _card(name, hashlib.sha256(converted.data).hexdigest(), wanted).encode())
        card = read_card(folder)
        # The user named the architecture, function or class: that is their consent to calling it.
        register(folder, "safetensors", (folders.runs_code(folder, card) or (folder, card.spec.sha256))[1], name)
        warm_up(folders.load(folder, "cpu"), 2)
    except BaseException:
        with suppress(OSError):
            for file in (WEIGHTS, CARD):
                (folder / file).unlink(missing_ok=True)
            if not existed:
                folder.rmdir()
        with suppress(OSError, ModelError):
            forget(folder)
        raise
    return Made(name, folder, converted.weights, converted.prefix, converted.left_out)


def convert(checkpoint: Path, architecture: str, arguments: Mapping[str, Any], prefix: str | None = None) -> Converted:
    """The weights that the network of `architecture` takes from `checkpoint`, as safetensors: equal input gives equal bytes.

    `prefix`, and errors, are those of `make_folder`.
    """
    state = read_checkpoint(checkpoint)
    network = folders.build(Weights("safetensors", WEIGHTS, "", architecture, arguments))
    own = network.state_dict()
    if prefix is None:
        prefix = common_prefix(state, own.keys(), checkpoint.name)
    fitting = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    kept = {key: tensor for key, tensor in fitting.items() if key in own}
    left_out = tuple(key for key in state if not key.startswith(prefix) or key.removeprefix(prefix) not in own)
    fill(network, kept, checkpoint.name)
    check_finite(network.state_dict(), checkpoint.name)
    return Converted(_safetensors(network), len(kept), prefix, left_out)


def _safetensors(network: Any) -> bytes:
    from safetensors.torch import save

    # Its own copies: weights that share memory, as tied ones do, cannot be stored.
    return save({key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()})


def _card(name: str, sha256: str, wanted: Wanted) -> str:
    kind = "features" if wanted.features else "map" if wanted.output_px else "classes"
    lines = [
        "# What this model is. Every field: docs/models.md. Research use only: not for diagnosis.",
        "schema = 1",
        f"name = {toml_value(name)}",
        '# version = "1"',
        '# licence = ""            # of the weights',
        '# source = ""             # where they come from',
        '# intended_use = ""       # organ, stain, scanner, question',
        "",
        "[weights]",
        'format = "safetensors"',
        f"file = {toml_value(WEIGHTS)}",
        f"sha256 = {toml_value(sha256)}",
        f"architecture = {toml_value(wanted.architecture)}",
        *([f"arguments = {toml_value(wanted.arguments)}"] if wanted.arguments else []),
        "",
        "[input]",
        f"mpp = {toml_value(wanted.mpp)}             # um per pixel",
        f"tile_px = {toml_value(wanted.tile_px)}",
        f"mean = {toml_value(wanted.mean)}",
        f"std = {toml_value(wanted.std)}",
        "",
        "[output]",
        f"kind = {toml_value(kind)}",
        *([f"features = {wanted.features}"] if wanted.features else []),
        *([f"output_px = {wanted.output_px}"] if wanted.output_px else []),
        *([f"margin_px = {wanted.margin_px}"] if wanted.margin_px else []),
        f"activation = {toml_value(wanted.activation)}",
        *(line for c in wanted.classes for line in ("", "[[output.classes]]", f"name = {toml_value(c)}", "threshold = 0.5")),
    ]
    return "\n".join(lines) + "\n"
