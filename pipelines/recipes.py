"""Recipes: the whole of a run except slides and output, as TOML. Promise: a recipe sets defaults and nothing else.

Its keys are the options of `pathology run` without their dashes, so whatever the command line says comes first, and every value
is checked as if it had been typed. `pipelines/recipes/*.toml` are known by name; any other file by its path.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import click

from pathology.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

SCHEMA = 1
# What belongs to one run, and would be a trap in a file that is used again and again.
NEVER = {"out", "recipe", "overwrite", "retry-failed", "help"}


def recipe_option(run: Callable[[], click.Command]) -> Callable[[Command], Command]:
    """The option --recipe, whose file gives the defaults of the command's other options; `run` knows all keys there are."""

    def apply(context: click.Context, _: click.Parameter, name: str | None) -> None:
        if name is None:
            return
        try:
            values = read_recipe(name, run())
        except UsageError as error:
            raise click.UsageError(str(error), context) from error
        own = {parameter.name for parameter in context.command.params}
        context.default_map = {key: value for key, value in values.items() if key in own}  # `check` has some of them

    return click.option(
        "--recipe",
        is_eager=True,
        expose_value=False,
        callback=apply,
        metavar="NAME|FILE",
        help="Take the options not given here from a recipe; `pathology recipes` lists those that are known.",
    )


def read_recipe(name: str, run: click.Command) -> dict[str, Any]:
    """The values that a recipe gives, by the names of `run`'s parameters. UsageError for one that is not understood."""
    content = _content(name)
    keys = {
        option.removeprefix("--"): parameter
        for parameter in run.params
        for option in parameter.opts
        if option.startswith("--") and option.removeprefix("--") not in NEVER
    }
    if content.get("schema") != SCHEMA:
        raise UsageError(
            f"recipe {name} has schema {content.get('schema')!r}, this program knows {SCHEMA}; write schema = {SCHEMA}"
        )
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("schema", "description"):
            continue
        if key not in keys:
            why = "is given with the command, not in a recipe" if key in NEVER else "is no option of pathology run"
            raise UsageError(f"recipe {name}: {key} {why}; take it out")
        parameter = keys[key]
        if isinstance(value, list) != getattr(parameter, "multiple", False) and not isinstance(value, str):
            raise UsageError(f"recipe {name}: {key} = {value!r} is not what --{key} takes")
        values[str(parameter.name)] = [value] if getattr(parameter, "multiple", False) and isinstance(value, str) else value
    return values


def known_recipes() -> Iterator[tuple[str, str]]:
    """(name, description) of the recipes that come with the program."""
    for file in sorted(_folder().iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            name = file.name.removesuffix(".toml")
            yield name, str(_content(name).get("description", ""))


def _folder() -> Traversable:
    return resources.files("pipelines").joinpath("recipes")


def _content(name: str) -> dict[str, Any]:
    known = _folder().joinpath(f"{name}.toml")
    file: Traversable | Path = known if Path(name).name == name and known.is_file() else Path(name)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"recipe {name} is no TOML: {error}") from error
    except OSError as error:
        names = ", ".join(recipe for recipe, _ in known_recipes())
        raise UsageError(f"recipe {name} is neither known ({names}) nor a file that can be read ({error.strerror})") from error
