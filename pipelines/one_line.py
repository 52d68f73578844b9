"""Errors as commands print them. Promise: an error is one line, and the exit code tells of what kind it was."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import click

from pathology.errors import PathologyError
from pipelines.printing import printable

Command = TypeVar("Command", bound=Callable[..., Any])


def one_line_errors(command: Command) -> Command:
    """Show a PathologyError as one line and leave with its exit code; an error of a disk or share likewise, with 3."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except (PathologyError, OSError) as error:
            # Click ends quietly where nobody reads the answer any more.
            if click.get_current_context().find_root().obj or isinstance(error, BrokenPipeError):
                raise
            from pipelines.batch import ENVIRONMENT, exit_code

            with suppress(OSError):
                click.echo(f"pathology: {printable(' '.join(str(error).split()))}", err=True)
            sys.exit(exit_code(error) if isinstance(error, PathologyError) else ENVIRONMENT)

    return cast(Command, wrapped)
