"""The command `pathology`: parses, calls, prints. Promise: `--help` is instant, and an error is one line with its remedy.

Heavy imports happen inside the commands that need them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

import click

from pathology.export import KINDS
from pipelines.model_commands import models
from pipelines.one_line import one_line_errors
from pipelines.option_types import BatchSize, Bytes, Folder, Number, Shard
from pipelines.options import job_options, reader_options, seconds_option
from pipelines.printing import open_closed_streams, printable
from pipelines.recipes import known_recipes, recipe_option
from pipelines.result_commands import status, verify
from pipelines.stopping import stop_on_signals

EXIT_CODES = """\b
Exit codes: 0 all well; 1 slides failed or partial; 2 usage or model; 3 output, disk or device; 75 interrupted: run it again."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pathology-pipeline")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.pass_context
def main(context: click.Context, debug: bool) -> None:
    """Whole-slide inference: slides in, exact whole-slide heatmaps out. Research use only."""
    context.obj = debug


from_recipe = recipe_option(lambda: main.commands["run"])


@main.command(epilog=EXIT_CODES)
@click.argument("slides", nargs=-1, required=True, type=click.Path())
@click.option("--model", "models", multiple=True, required=True, help="A model's name, folder or factory; several: repeat.")
@click.option("--out", required=True, type=Folder(path_type=Path), help="Folder for results; run again to go on.")
@from_recipe
@job_options
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--threads", type=int, help="Torch threads on the CPU.  [default: measured]")
@click.option("--compile", is_flag=True, help="Let torch compile networks: slower to start, other last bits.")
@click.option(
    "--scheduler",
    default="processes",
    show_default=True,
    help="sync, threads, processes (for each device one that infers, and readers), or a Dask scheduler that runs: "
    "tls://HOST:PORT with certificates of Dask's configuration, or tcp://127.0.0.1:PORT.",
)
@click.option(
    "--dashboard", metavar="PORT", type=click.IntRange(0, 65535), help="Show Dask's dashboard on this port of 127.0.0.1."
)
@click.option("--export", "exports", multiple=True, type=click.Choice(KINDS), help="Write these as well.")
@click.option(
    "--on-bad-tile",
    type=click.Choice(["mask", "fail"]),
    default="mask",
    show_default=True,
    help="A tile that cannot be decoded: mask leaves it NaN, lists it, and calls the slide partial; fail fails the slide.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that are partial, or made with other parameters or files.")
@click.option("--retry-failed", is_flag=True, help="Try slides again that failed before.")
@click.option("--max-failures", type=click.IntRange(min=0), help="Stop after more than N failed or partial slides.")
@click.option(
    "--allow-failures",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Exit 0 with up to N failed or partial slides.",
)
@click.option("--hash-input", is_flag=True, help="Record the sha256 of each slide's whole files, for verify --verify-input.")
@click.option("--strict", is_flag=True, help="Refuse a slide whose regions were computed in different environments.")
@click.option(
    "--stage", metavar="DIR", type=Folder(file_okay=False, path_type=Path), help="Copy slides to this local disk first."
)
@click.option(
    "--stage-size",
    metavar="GIB",
    type=Number(min=0, min_open=True),
    default=64,
    show_default=True,
    help="Most GiB of slides there at once; a larger slide is read in place.",
)
@click.option(
    "--shard", metavar="I/N", type=Shard(), help="Only the I-th of N shares of the slides, by their ids; I from 1 to N."
)
@seconds_option(
    "--lease", 60, "Take over a slide from another process on this DIR when that showed no sign of life for so long."
)
@click.option(
    "--min-free",
    metavar="SIZE",
    type=Bytes(or_none=True),
    default="100M",
    show_default=True,
    help="Stop when less is free at DIR, and before a result that may not fit beside it; 0: go on until the disk is full.",
)
@seconds_option("--read-timeout", 300, "End a worker process in which a read of a slide does not come on for so long.")
@seconds_option("--region-timeout", 1800, "The same where nothing comes on: no tile read, none computed, nothing written.")
@click.option(
    "--memory-limit",
    type=Bytes(),
    help="The same where a device's processes hold more memory.  [default: 9/10 of all there is]",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@one_line_errors
def run(
    slides: tuple[str, ...],
    models: tuple[str, ...],
    device: str,
    threads: int | None,
    scheduler: str,
    dashboard: int | None,
    exports: tuple[str, ...],
    retry_failed: bool,
    max_failures: int | None,
    allow_failures: int,
    log_format: Literal["text", "json"],
    limit: int | None,
    overwrite: bool,
    hash_input: bool,
    strict: bool,
    stage: Path | None,
    stage_size: float,
    shard: tuple[int, int] | None,
    lease: float,
    min_free: int,
    read_timeout: float,
    region_timeout: float,
    memory_limit: int | None,
    **options: Any,
) -> None:
    """Compute heatmaps of SLIDES: files, folders (searched to the bottom), slide lists (.csv).

    Any number of processes, on any hosts, may work on one --out at the same time: each slide is done once.
    """
    stop = click.get_current_context().with_resource(stop_on_signals())
    if scheduler == "processes":
        from pathology.cores import core_count, reading_processes
        from pathology.process import load_behind, prestart

        prestart(reading_processes(core_count()))
        # Here numpy only plans: more threads of its linear algebra would spin on cores that the processes start on.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        load_behind("pipelines.batch")
    from pathology.watch import Limits
    from pipelines.batch import Conduct, run_batch
    from pipelines.fetch import require_fetched

    require_fetched(models)
    conduct = Conduct(
        scheduler=scheduler,
        dashboard=None if dashboard is None else str(dashboard),
        exports=exports,
        retry_failed=retry_failed,
        max_failures=max_failures,
        allow_failures=allow_failures,
        log_format=log_format,
        lease_s=lease,
        min_free=min_free,
        limits=Limits(read_timeout, region_timeout, memory_limit or 0),
    )
    settings = _settings(
        **options,
        device=device,
        threads=threads,
        overwrite=overwrite,
        strict=strict,
        hash_input=hash_input,
        stage=stage,
        stage_bytes=int(stage_size * 2**30),
    )
    entries = _slides(slides, limit, settings)
    if shard is not None:
        from pipelines.slides import share

        entries = share(entries, *shard)
    sys.exit(run_batch(entries, models, settings, conduct, stop))


@main.command(epilog=EXIT_CODES)
@click.argument("slides", nargs=-1, required=True, type=click.Path())
@click.option("--model", "models", multiple=True, help="Plan for this model; without one, slides are only opened.")
@from_recipe
@job_options
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
@one_line_errors
def check(slides: tuple[str, ...], models: tuple[str, ...], limit: int | None, as_json: bool, **options: Any) -> None:
    """Say what would run on SLIDES and what would fail: tiles, regions, bytes, memory, mpp and where it is from.

    Infers nothing but one batch of made-up tiles, whose memory is measured. "again": tiles computed twice because they straddle
    regions. "memory": of all processes of `run` with one worker.
    """
    from pipelines.check import COLUMNS, facts, row, table
    from pipelines.check import check as verdicts
    from pipelines.fetch import require_fetched

    require_fetched(models)
    settings = _settings(**options, out=Path("out"))
    rows: list[tuple[str, ...]] = [COLUMNS]
    fails = 0
    for verdict in verdicts(_slides(slides, limit, settings), models, settings):
        fails += verdict.info is None
        rows.append(row(verdict))
        if as_json:
            click.echo(json.dumps(facts(verdict)))
    if not as_json:
        for line in table(rows):
            click.echo(printable(line))
    sys.exit(1 if fails else 0)


@main.command()
@click.argument("slide", type=click.Path())
@click.option("--slide-mpp", type=Number(), help="um per px, where the file is silent or wrong.")
@click.option("--force", is_flag=True, help="Take --slide-mpp though the file states something more than 10 % different.")
@reader_options()[0]
@click.option("--json", "as_json", is_flag=True)
@one_line_errors
def info(slide: str, slide_mpp: float | None, force: bool, reader: Any, as_json: bool) -> None:
    """Show what is known of SLIDE: size, levels, resolution and its source, reader and why that one."""
    from pipelines.check import look

    known = asdict(look(Path(slide), slide_mpp, force, reader))
    if as_json:
        click.echo(json.dumps(known))
        return
    known["shape"] = "{} x {} px (height x width)".format(*known["shape"])
    known["reader"] += f": {known.pop('reader_why')}"
    known["mpp"] = f"{known['mpp']:.6g} um/px, from {known.pop('mpp_source')}"
    shapes, downsamples = known.pop("level_shapes"), known.pop("level_downsamples")
    for name, value in known.items():
        click.echo(f"{name:<12} {'unknown' if value is None else value}")
    for k, (shape, downsample) in enumerate(zip(shapes, downsamples, strict=True)):
        click.echo(f"level {k:<6} {shape[0]} x {shape[1]} px, 1/{downsample:g}")


@main.command()
@click.option("--model", required=True, help="A model's name, folder or factory.")
@click.option("--slide", required=True, type=click.Path(path_type=Path), help="A slide like those to be run.")
@click.option("--slide-mpp", type=Number(), help="Its resolution in um per px, where the file is silent or wrong.")
@click.option("--tiles", type=int, default=1000, show_default=True, help="Measure on so many tiles.")
@click.option("--overlap", type=float, default=0.0, show_default=True, help="As in run.")
@click.option(
    "--batch-size", type=BatchSize(), help="Tiles per model call, or auto.  [default: 32, fewer of tiles above 316 px]"
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16", "auto"]), default="fp32", show_default=True)
@click.option("--threads", type=int, help="Torch threads on the CPU.  [default: measured]")
@click.option("--num-workers", type=int, help="Threads that read tiles.  [default: measured]")
@reader_options()[0]
@reader_options()[1]
@one_line_errors
def benchmark(model: str, slide: Path, tiles: int, **options: Any) -> None:
    """Measure reading alone, MODEL alone, and the pipeline of both, on this machine and SLIDE."""
    from pathology.device import choose_device
    from pipelines.benchmark import benchmark as measured
    from pipelines.benchmark import lines
    from pipelines.config import cards, make_jobs
    from pipelines.slides import find_slides

    settings = _settings(**options, out=Path("out"))
    (job,) = make_jobs(find_slides([slide])[:1], cards([model], settings), settings, choose_device(settings.device))
    for line in lines(measured(job, max(2, tiles))):
        click.echo(line)


main.add_command(models)


@main.command()
@one_line_errors
def recipes() -> None:
    """List the recipes that `--recipe` knows by name."""
    for name, description in known_recipes():
        click.echo(f"{name:<24} {description}")


main.add_command(status)
main.add_command(verify)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", "kinds", multiple=True, required=True, type=click.Choice(["csv", "qupath", "png", "ngff-0.4"]))
@click.option("--slide", "slide_id", help="Only the slide of this id.")
@one_line_errors
def export(folder: Path, kinds: tuple[str, ...], slide_id: str | None) -> None:
    """Write tiles.csv, tiles.geojson (QuPath), heatmap-<class>.png or heatmap-0.4.ome.zarr (QuPath, Fiji) beside every result
    in FOLDER; of detections detections.csv and detections.geojson.
    """
    from pathology.errors import UsageError
    from pathology.export.result import export_result

    results = sorted(path.parent for path in folder.glob(f"slides/{slide_id or '*'}/*/result.json"))
    if not results:
        raise UsageError(
            f"{folder} holds no finished result{f' of slide {slide_id}' if slide_id else ''}; give a run's --out folder"
        )
    refused: list[UsageError] = []
    written = 0
    for result in results:
        for kind in kinds:
            try:
                paths = export_result(result, kind)
            except UsageError as error:
                refused.append(error)
                click.echo(f"left out: {printable(error)}", err=True)
                continue
            written += len(paths)
            for path in paths:
                click.echo(printable(path))
    if refused and not written:
        raise refused[0]


def _settings(num_workers: int | None, **options: Any) -> Any:
    from pipelines.config import Settings

    return Settings(readers=num_workers, **options)


def _slides(named: tuple[str, ...], limit: int | None, settings: Any) -> Any:
    from pipelines.slides import find_slides

    return find_slides(named, settings.out, pictures=settings.slide_mpp is not None)[:limit]


def console() -> NoReturn:
    """`main` as a program: what is on disk is whole, so the process ends without taking its libraries apart."""
    code: object = 0
    open_closed_streams()
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        traceback.print_exc()  # a bug; threads may still be in calls that nothing ends
    if isinstance(code, str):
        with suppress(OSError):
            click.echo(code, err=True)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read the output may be gone
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    console()
