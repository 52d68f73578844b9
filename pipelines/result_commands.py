"""The commands `pathology status` and `pathology verify`: what is in an output folder. Heavy imports happen inside them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from pipelines.one_line import one_line_errors
from pipelines.option_types import Number
from pipelines.printing import printable


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--watch", metavar="SECONDS", type=Number(min=0, min_open=True), help="Look again so often, until the run ends.")
@one_line_errors
def status(folder: Path, as_json: bool, watch: float | None) -> None:
    """How far the runs that write to FOLDER are: slides done, failed and left, tiles a second, time left, and which process has
    what. Reads the events alone: safe at any time, also after a crash.
    """
    from pipelines.status import lines, read_status

    while True:
        state = read_status(folder, time.time())
        if as_json:
            click.echo(json.dumps(state.to_json()))
        else:
            for line in lines(state):
                click.echo(printable(line))
        if watch is None or not state.going:
            return
        time.sleep(watch)
        if not as_json:
            click.clear()


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each file that differs.")
@click.option("--repair", is_flag=True, help="Compute damaged results anew, and put files back that come out the same.")
@click.option("--verify-input", is_flag=True, help="Hash the slides as well, of results made with --hash-input.")
@one_line_errors
def verify(folder: Path, as_json: bool, repair: bool, verify_input: bool) -> None:
    """Hash every file of the results in FOLDER and name those that are not what was written, of heatmaps the chunks and where
    on the slide they lie, in level-0 px; exit 1 if there are any left.
    """
    from pathology.integrity import find_results, verify_inputs, verify_result
    from pipelines.verify import line, lines

    inputs = list(verify_inputs(folder)) if verify_input else []
    for difference in inputs:
        for text in [line(difference)] if as_json else lines(difference):
            click.echo(printable(text))
    if inputs:
        click.echo(f"{len(inputs)} files of slides differ or have no hash; copy them again, or run with --hash-input", err=True)
    found = left = 0
    for result in find_results(folder):
        differences = list(verify_result(result))
        found += len(differences)
        for difference in differences:
            for text in [line(difference)] if as_json else lines(difference):
                click.echo(printable(text))
        if differences and repair:
            left += _repair(result, as_json)
    if not found and not inputs and not as_json:
        click.echo("all files are as they were written")
    if found and not repair:
        click.echo(f"{found} files differ; --repair makes them again, or run with --overwrite", err=True)
    sys.exit(1 if inputs or (found and (left or not repair)) else 0)


def _repair(result: Path, quiet: bool) -> int:
    """Repair a result; how many of its files still differ."""
    from pathology.errors import EnvironmentFault, PathologyError
    from pathology.integrity import verify_result
    from pipelines.repair import repair

    try:
        for path in repair(result):
            if not quiet:
                click.echo(f"repaired    {printable(path)}")
    except EnvironmentFault:
        raise
    except PathologyError as error:
        click.echo(f"not repaired: {printable(error)}", err=True)
    return len(list(verify_result(result)))
