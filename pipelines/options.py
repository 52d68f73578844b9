"""Options that several commands have alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipelines.option_types import BatchSize, Bytes, Number

Command = TypeVar("Command", bound=Callable[..., Any])


def seconds_option(name: str, default: int, text: str) -> Callable[[Command], Command]:
    """A time to wait, of a second at least."""
    return click.option(name, metavar="SECONDS", type=Number(min=1), default=default, show_default=True, help=text)


def reader_options() -> list[Callable[[Command], Command]]:
    """Options that decide which pixels a slide has."""
    return [
        click.option(
            "--reader",
            type=click.Choice(["auto", "direct", "openslide", "pillow"]),
            default="auto",
            show_default=True,
            help="What reads slides: direct (tiled TIFF, quickest), openslide, pillow (whole pictures), or the first that can.",
        ),
        click.option(
            "--fast-decode",
            is_flag=True,
            help="Decode JPEG at 1/2, 1/4 or 1/8 where a coarser picture is wanted: sooner, but not the exact mean.",
        ),
    ]


def job_options(command: Command) -> Command:
    """Options that decide what is computed; the same for `run` and `check`."""
    options = [
        click.option("--slide-mpp", type=Number(), help="The slides' resolution in um per px, if files are silent or wrong."),
        click.option("--force", is_flag=True, help="Take --slide-mpp though a file states something more than 10 % different."),
        click.option(
            "--overlap",
            type=float,
            default=0.0,
            show_default=True,
            help="Overlap of neighbouring tiles: a share of the tile below 1, pixels at the model's mpp from 1 on.",
        ),
        click.option(
            "--min-tissue", type=Number(), default=0.1, show_default=True, help="Share of a tile that must be tissue, 0 to 1."
        ),
        click.option(
            "--tissue",
            default="otsu",
            show_default=True,
            help="How tissue is found: otsu, none, model:NAME (a dense model that is run first), or a file of it: GeoJSON or a "
            "picture in which all but black is tissue.",
        ),
        click.option(
            "--roi",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="GeoJSON polygons, as QuPath exports them, outside which nothing is inferred.",
        ),
        click.option(
            "--blend",
            type=click.Choice(["hann", "gaussian", "constant"]),
            default="hann",
            show_default=True,
            help="Weights over a tile where dense answers overlap; gaussian is MONAI's.",
        ),
        click.option(
            "--heatmap-mpp",
            type=Number(),
            help="Coarsest um per pixel of dense maps: means are taken where the model runs.  [default: as it answers]",
        ),
        click.option(
            "--heatmap-dtype",
            type=click.Choice(["auto", "uint8", "float16", "float32"]),
            default="auto",
            show_default=True,
            help="How dense maps are stored; auto: probabilities as uint8 in steps of 1/254, values as float32.",
        ),
        click.option(
            "--batch-size",
            type=BatchSize(),
            help="Tiles per model call; auto: as many as make it quick and fit into memory, found by trying.  "
            "[default: 32, fewer of tiles above 316 px]",
        ),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16", "fp16", "auto"]),
            default="fp32",
            show_default=True,
            help="What torch networks compute in. auto: bf16 or fp16 on CUDA, fp32 elsewhere. Tiles whose class is then in "
            "doubt are computed again in fp32.",
        ),
        click.option("--num-workers", type=int, help="Threads that read tiles, for each device.  [default: measured]"),
        click.option(
            "--memory",
            type=Bytes(),
            help="Memory for a worker's tiles and canvases, as 512M or 2G.  [default: 1G, or a quarter of what is free]",
        ),
        *reader_options(),
        click.option("--limit", type=click.IntRange(min=1), help="Only the first N slides."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
