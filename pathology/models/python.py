"""Models made by Python code: `package.module:factory?key=value`, an importable callable that returns a Model.

Promise: the model's sha256 changes with the source of the factory's module, with the arguments, and with the sha256 that
the factory itself states (of its weights, say). Modules that the factory imports are not looked into.

A factory with parameters `device`, `precision`, `compile` is given what was chosen; `TorchNetwork` takes all three. It is
called for `load_spec` too, with "cpu", "fp32" and False.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathology.errors import ModelError, PathologyError
from pathology.job import Precision
from pathology.model import Answer, Model, ModelSpec, QueuedModel, answer, begin
from pathology.models.refs import Argument, call, imported


@dataclass(frozen=True, slots=True)
class PythonModel:
    """A factory's model, `inner`, under a card whose sha256 also covers source and arguments."""

    spec: ModelSpec
    inner: Model

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return answer(self.inner, tiles, stains)


@dataclass(frozen=True, slots=True)
class QueuedPythonModel:
    """The same of a model that works by itself."""

    spec: ModelSpec
    inner: QueuedModel

    def __call__(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return answer(self.inner, tiles, stains)

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        return self.inner.staging(batch_size)

    def submit(self, tiles: NDArray[np.uint8], stains: NDArray[np.float32] | None = None) -> Answer:
        return begin(self.inner, tiles, stains)


def is_factory(name: str) -> bool:
    """Whether `name` has the form `package.module:factory`."""
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", name) is not None


def takes_precision(name: str) -> bool:
    """Whether the factory `name` can be asked for a precision. ModelError where it cannot be imported."""
    return "precision" in inspect.signature(_import(name)).parameters


def load(
    name: str, arguments: Mapping[str, Argument], device: str, precision: Precision = "fp32", compile: bool = False
) -> PythonModel | QueuedPythonModel:
    """The model that the factory `name` makes. ModelError where it cannot be imported or called, or makes no Model."""
    factory = _import(name)
    try:
        model = call(name, factory, arguments, device, precision, compile)
    except PathologyError:
        raise
    except Exception as error:  # foreign code: whatever it raises, the model is at fault
        raise ModelError(
            f"model {name}: its factory failed with {type(error).__name__}: {error}; correct it or its arguments"
        ) from error
    if not isinstance(model, Model) or not isinstance(model.spec, ModelSpec):
        raise ModelError(
            f"model {name}: its factory made a {type(model).__name__}, which is no pathology.model.Model; "
            "return an object with `spec` (a ModelSpec) and a call from uint8 tiles to float32 scores"
        )
    spec = replace(model.spec, sha256=_sha256(name, factory, arguments, model.spec.sha256))
    return QueuedPythonModel(spec, model) if isinstance(model, QueuedModel) else PythonModel(spec, model)


def load_spec(name: str, arguments: Mapping[str, Argument]) -> ModelSpec:
    """The card of the model that the factory `name` makes: by its attribute `card` where it has one, else by making the model.

    ModelError as for `load`, and where `card` gives no ModelSpec.
    """
    factory = _import(name)
    card = getattr(factory, "card", None)
    if card is None:
        return load(name, arguments, "cpu").spec
    try:
        spec = call(name, card, arguments, "cpu")
    except PathologyError:
        raise
    except Exception as error:  # foreign code again
        raise ModelError(f"model {name}: its card failed with {type(error).__name__}: {error}; correct it") from error
    if not isinstance(spec, ModelSpec):
        raise ModelError(f"model {name}: its card gives a {type(spec).__name__}; return a ModelSpec")
    return replace(spec, sha256=_sha256(name, factory, arguments, spec.sha256))


def _import(name: str) -> Callable[..., object]:
    return imported(f"model {name}", name, "function that returns a Model")


def _sha256(name: str, factory: Callable[..., object], arguments: Mapping[str, Argument], stated: str) -> str:
    modules = {name.partition(":")[0], getattr(factory, "__module__", None) or ""} - {""}
    digest = hashlib.sha256(json.dumps([name, sorted(arguments.items()), stated]).encode())
    for module in sorted(modules):
        loaded = importlib.import_module(module)
        source = inspect.getsourcefile(loaded) or getattr(loaded, "__file__", None)
        if source is not None:
            digest.update(Path(source).read_bytes())
    return digest.hexdigest()
