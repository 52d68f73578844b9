"""From a model's reference to a model. Promise: a card (`load_spec`) costs no import of torch, except by a user's own factory.

A reference is, in this order: a folder of timm's, `local-dir:PATH` or `hf-hub:ORG/NAME`; a built-in's name; a name in the
local registry; a model folder (with a card, or WSInfer's); or a Python factory `package.module:factory`. Timm's folders,
built-ins and factories take arguments: `nuclei-density?tile_px=224`.
"""

from __future__ import annotations

from pathlib import Path

from pathology.errors import ModelError
from pathology.job import PRECISIONS, Precision
from pathology.model import Model, ModelSpec
from pathology.models import folder as folders
from pathology.models import nuclei, python, timm_folder, wsinfer
from pathology.models.card import CARD, read_card
from pathology.models.refs import call, parse_ref
from pathology.models.trust import Entry, entries, register, trust_file

__all__ = ["add_model", "known_models", "load_model", "load_spec", "precisions"]


def load_model(ref: str, device: str = "cpu", precision: Precision = "fp32", compile: bool = False) -> Model:
    """The model that `ref` names, ready on `device` ("cpu", "cuda", "cuda:N", "mps"). ModelError where it cannot be.

    `precision` and `compile` are for models that are torch networks; others refuse all but fp32, and compiling.
    """
    if device.startswith("cuda"):
        from pathology.device import set_exact

        set_exact()
    if timm_folder.is_source(ref):
        return timm_folder.load(*parse_ref(ref), device, precision, compile)
    if folder := _folder(ref):
        load = folders.load if _has_card(folder) else wsinfer.load
        return load(folder, device, precision, compile)
    name, arguments = parse_ref(ref)
    if name == nuclei.NAME:
        return call(name, nuclei.NucleiDensity, arguments, device, precision, compile)
    return python.load(name, arguments, device, precision, compile)


def precisions(ref: str) -> tuple[Precision, ...]:
    """What the model that `ref` names may be asked to compute in; nothing for one that is no torch network.

    ModelError where it is nothing known.
    """
    if timm_folder.is_source(ref):
        return PRECISIONS
    if folder := _folder(ref):
        return read_card(folder).precisions if _has_card(folder) else PRECISIONS
    name = parse_ref(ref)[0]
    return PRECISIONS if name != nuclei.NAME and python.takes_precision(name) else ()


def load_spec(ref: str) -> ModelSpec:
    """The card of the model that `ref` names, without loading weights. ModelError as for `load_model`, trust included."""
    if timm_folder.is_source(ref):
        return timm_folder.load_spec(*parse_ref(ref))
    if folder := _folder(ref):
        return folders.load_spec(folder) if _has_card(folder) else wsinfer.load_spec(folder)
    name, arguments = parse_ref(ref)
    if name == nuclei.NAME:
        return call(name, nuclei.spec, arguments, "cpu")
    return python.load_spec(name, arguments)


def add_model(path: str | Path, trust: str | None = None, name: str | None = None) -> Entry:
    """Check the model folder at `path` and register it, so that it may be loaded by name or path.

    What runs code when loaded must be trusted: `trust` is then the sha256 of that file (the weights, or a card that names a
    function for its architecture). Without it, or with another, ModelError tells the actual one. `name` is the folder's name
    unless given.
    """
    folder = Path(path).expanduser()
    if (name or folder.resolve().name) == nuclei.NAME:
        raise ModelError(f"{nuclei.NAME} is built in; add {folder} under another name")
    if not _has_card(folder):
        wsinfer.read_card(folder)
        if not (folder / wsinfer.WEIGHTS).is_file():
            raise ModelError(f"{folder} has no {wsinfer.WEIGHTS}; fetch the whole model folder")
        return trust_file(folder / wsinfer.WEIGHTS, "wsinfer", trust, name)
    card = read_card(folder)
    for file in filter(None, (card.weights.file, card.weights.data)):
        if not (folder / file).is_file():
            raise ModelError(f"{folder} has no {file}; fetch the whole model folder")
    if (risky := folders.runs_code(folder, card)) is not None:
        return trust_file(risky[0], card.weights.format, trust, name)
    return register(folder, card.weights.format, card.spec.sha256, name)


def known_models() -> list[Entry]:
    """The built-in models, then the registered ones by name."""
    return [Entry(nuclei.NAME, "", nuclei.spec().sha256, "built-in"), *entries()]


def _has_card(folder: Path) -> bool:
    return (folder / CARD).is_file()


def _folder(ref: str) -> Path | None:
    """The model folder that `ref` names or is; None for a built-in or a factory. ModelError where it is nothing known."""
    name = ref.partition("?")[0]
    if name == nuclei.NAME:
        return None
    registered = {e.name: Path(e.path) for e in entries()}
    if ref in registered:
        if not registered[ref].is_dir():
            raise ModelError(f"model {ref} was in {registered[ref]}, which is gone; bring it back or add the model again")
        return registered[ref]
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if name in registered or Path(name).expanduser().is_dir():
        raise ModelError(f"model {ref}: a model folder takes no arguments; leave out everything from the question mark")
    if path.exists():
        raise ModelError(f"model {ref} is a file; name the folder that holds it, with {CARD} or {wsinfer.CONFIG}")
    if not python.is_factory(name):
        known = ", ".join([nuclei.NAME, *registered])
        raise ModelError(
            f"model {ref} is not known; known are {known}; or name a model folder, or a factory as package.module:factory"
        )
    return None
