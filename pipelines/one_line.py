"""Errors and names as commands print them. Promise: an error is one line, and any name can be printed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import click

from pathology.errors import PathologyError

Command = TypeVar("Command", bound=Callable[..., Any])


def one_line_errors(command: Command) -> Command:
    """Show a PathologyError as one line and leave with its exit code."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except PathologyError as error:
            if click.get_current_context().find_root().obj:
                raise
            from pipelines.batch import exit_code

            click.echo(f"pathology: {printable(error)}", err=True)
            sys.exit(exit_code(error))

    return cast(Command, wrapped)


def printable(value: object) -> str:
    """Text that any terminal takes: a file's name may hold bytes that are no text."""
    return str(value).encode("utf-8", "backslashreplace").decode()
