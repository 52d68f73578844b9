"""The command as tests call it, in their own process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from pipelines.cli import main


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])
