"""References to models as users write them. Promise: what a reference says is used in full, or refused with what would be."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import parse_qsl

from pathology.errors import ModelError, one_line
from pathology.job import Precision

Argument = int | float | str
T = TypeVar("T")


def parse_ref(ref: str) -> tuple[str, dict[str, Argument]]:
    """`name?key=value&...` -> (name, {key: value}); what looks like a number becomes one. Raises ModelError."""
    name, mark, query = ref.partition("?")
    if not mark:
        return name, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        pairs = []
    if not pairs:
        raise ModelError(f"model {ref}: {query!r} are no arguments; write {name}?key=value&key=value")
    arguments = {key: _number_or_text(value) for key, value in pairs}
    if len(arguments) < len(pairs):
        raise ModelError(f"model {ref}: an argument is given twice; give each once")
    return name, arguments


def call(
    name: str,
    function: Callable[..., T],
    arguments: Mapping[str, Argument],
    device: str,
    precision: Precision = "fp32",
    compile: bool = False,
) -> T:
    """`function` called with `arguments`, and with `device`, `precision` and `compile` where it has such parameters.

    ModelError where they do not fit, and where it is asked for a precision or compiling without a parameter for it.
    """
    signature = inspect.signature(function)
    choices: dict[str, object] = {"device": device, "precision": precision, "compile": compile}
    known = [p for p in signature.parameters if p not in choices]
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    for choice in choices.keys() & arguments.keys():
        raise ModelError(f"model {name}: the {choice} is no argument of a model; choose it with --{choice}")
    if precision != "fp32" and "precision" not in signature.parameters:
        raise ModelError(f"model {name} is no torch network that could compute in {precision}; use --precision fp32 or auto")
    if compile and "compile" not in signature.parameters:
        raise ModelError(f"model {name} is no torch network that could be compiled; leave out --compile")
    given = {**arguments, **{k: v for k, v in choices.items() if k in signature.parameters}}
    try:
        bound = signature.bind(**given)
    except TypeError as error:
        raise ModelError(f"model {name}: {error}; {takes}") from error
    return function(*bound.args, **bound.kwargs)


def imported(what: str, name: str, wanted: str) -> Callable[..., object]:
    """The callable that `package.module:attribute` names. ModelError, for `what`, where it cannot be imported or is none."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module runs when imported, and may raise anything
        raise ModelError(
            f"{what}: {module_name} cannot be imported: {one_line(error)}; install its package where this program runs"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ModelError(f"{what}: {module_name} has no callable {attribute}; name a {wanted}")
    named: Callable[..., object] = found
    return named


def _number_or_text(text: str) -> Argument:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return text
