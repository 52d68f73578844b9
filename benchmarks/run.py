"""All benchmarks, or the parts that are named: each contestant in turn, several rounds, then docs/benchmarks.md.

    python benchmarks/run.py                                             everything, about an hour and a half on two cores
    python benchmarks/run.py reading
    python benchmarks/run.py whole --network tiny --slide s40 --runs 3 --only ours --only plain
    python benchmarks/run.py whole --slide s40 --ours "--num-workers 1" --ours "--reader openslide"
    python benchmarks/run.py --quick                                     one round on the small slides, no page

Promise: what is compared ran alternately in one sitting. Rounds are kept as JSON in the cache, and a part that is measured anew
replaces its contests there; the page shows them all.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks import peers  # noqa: E402  # the paths above come first
from benchmarks.measure import Cost, measure  # noqa: E402
from benchmarks.page import EXACT, Rounds, Row, page  # noqa: E402
from benchmarks.slides import SLIDES, build  # noqa: E402
from pathology.process import VARIABLES  # noqa: E402

CACHE = ROOT / ".cache" / "benchmarks"
HERE = ROOT / "benchmarks"
PYTHON = sys.executable
COMMAND = str(Path(sys.executable).parent / "pathology")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
CORES = len(os.sched_getaffinity(0))

# What `whole` runs unless told otherwise: (network, slides). A heavy network takes minutes on more.
CONTESTS = {
    "tiny": ("s20small", "s20dot", "s20", "s40small", "s40dot", "s40half", "s40"),
    "resnet18": ("s20small", "s20dot", "s20"),
}
PEER_SLIDES = ("s20", "s40")  # where other tools take part, unless slides are named: they take minutes
READ_TILES = {"s20": 1200, "s40": 800}  # of the list's beginning, for `reading`

REMARKS = "## Of this sitting"  # written by hand

Contestant = Callable[[], Row]


@dataclass(frozen=True, slots=True)
class Choice:
    """What the command line asked for.

    networks, slides  empty: the part's own
    only              pieces of names of contestants; empty: all
    ours              sets of options with which `pathology run` takes part once more
    keep              told all rounds so far when one has ended
    """

    runs: int
    networks: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    keep: Callable[[Rounds], None] = lambda _: None


# --- slides and tiles


@functools.cache
def slide(name: str) -> Path:
    from real_slides import cmu_small_region

    return build(name, cmu_small_region(), CACHE / "slides")


@functools.cache
def tiles(name: str) -> Path:
    """Level-0 (y, x) of the corners of the slide's tissue tiles, as the pipeline plans them: the list the scripts are given."""
    path = CACHE / f"{name}.npy"
    if not path.exists():
        import numpy as np

        from pathology.job import Job
        from pathology.job_slide import plan_slide
        from pathology.models import load_spec
        from pathology.readers import open_slide

        job = Job(slide=str(slide(name)), slide_id=name, root="", model=model("tiny"), out=".")
        with open_slide(job.slide) as opened:
            _, plan = plan_slide(job, opened, load_spec(job.model))
        np.save(path, np.rint(plan.grid.l0_origins(plan.tiles)).astype(np.int64))
    return path


def first_tiles(name: str) -> Path:
    import numpy as np

    path = CACHE / f"{name}-first.npy"
    np.save(path, np.load(tiles(name))[: READ_TILES.get(name, 400)])
    return path


def model(network: str) -> str:
    return f"benchmarks.models:{'dense' if network == 'unet' else 'classifier'}?network={network}"


# --- contestants of whole runs


def ours(name: str, network: str, *options: str) -> Row:
    """The whole command, start to exit, into an empty folder."""
    out = emptied("ours")
    cost = measure([COMMAND, "run", str(slide(name)), "--model", model(network), "--out", str(out), *options], ENVIRONMENT)
    (record,) = out.glob("slides/*/*/result.json")
    plain_of = network.partition("&")[0]
    return {**seconds(cost), "tiles": float(json.loads(record.read_text())["tiles"]), **compared(record.parent, name, plain_of)}


def plain(name: str, network: str, threads: int) -> Row:
    import numpy as np

    scores = plain_scores(name, network)
    scores.unlink(missing_ok=True)
    command = [PYTHON, str(HERE / "plain.py"), str(slide(name)), str(tiles(name)), str(scores), "--network", network]
    cost = measure([*command, "--threads", str(threads)], ENVIRONMENT)
    return {**seconds(cost), "tiles": float(len(np.load(scores)))}


def peer(who: str, python: Path, name: str, network: str) -> Row:
    out, exported = emptied(who), peers.export(network, CACHE / f"export-{network}")
    command = (peers.wsinfer_command if who == "wsinfer" else peers.slide2vec_command)(python, slide(name), exported, out)
    cost = measure(command, {k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    return {**seconds(cost), "tiles": float(peers.tiles_done(who, out))}


@functools.cache
def tuned_threads(network: str, tries: int) -> int:
    """The better number of torch threads for the plain script, one or one a core: by the median of tries on 1,000 tiles."""
    if CORES == 1:
        return 1
    rounds = [{n: plain("s20small", network, n)["wall_s"] for n in (1, CORES)} for _ in range(tries)]
    middle = {n: statistics.median(each[n] for each in rounds) for n in rounds[0]}
    best = min(middle, key=lambda n: middle[n])
    found = ", ".join(f"{n}: {wall_s:.1f} s" for n, wall_s in middle.items())
    print(f"  torch threads of the plain script with {network}: {best} ({found})", flush=True)
    return best


def plain_scores(name: str, network: str) -> Path:
    return CACHE / f"plain-{name}-{network}.npy"


def compared(result: Path, name: str, network: str) -> Row:
    """Largest difference from the plain script's scores, and share of tiles of the same class, where it ran before."""
    import numpy as np
    import pyarrow.parquet as parquet

    theirs = plain_scores(name, network)
    if not theirs.exists():
        return {}
    table = parquet.read_table(result / "tiles.parquet").to_pydict()
    mine = np.stack([table.get(f"prob_{label}", table.get(label)) for label in ("a", "b")], axis=1)
    corners = np.stack([table["miny"], table["minx"]], axis=1)
    wanted, others = np.load(tiles(name)), np.load(theirs)
    order, order_of_wanted = np.lexsort(corners.T), np.lexsort(wanted.T)
    if not np.array_equal(corners[order], wanted[order_of_wanted]):
        raise SystemExit(f"{name}: other tiles were computed than those of {tiles(name)}; remove that list")
    a, b = mine[order], others[order_of_wanted]
    return {"difference": float(np.abs(a - b).max()), "agreement": float((a.argmax(1) == b.argmax(1)).mean())}


def seconds(cost: Cost) -> Row:
    return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s}


def emptied(who: str) -> Path:
    folder = CACHE / f"out-{who}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def script(*arguments: str, python: Path | str = PYTHON, variables: Mapping[str, str] | None = None) -> Row:
    """The JSON object that a script of this folder prints last. `variables`: of its environment, beside the usual ones."""
    cost = measure([str(python), *arguments], {**ENVIRONMENT, **(variables or {})})
    facts: Row = json.loads(cost.output.strip().splitlines()[-1])
    return facts


def takes_part(contestant: str, choice: Choice) -> bool:
    return not choice.only or any(piece in contestant for piece in choice.only)


def alternately(contests: dict[str, dict[str, Contestant]], choice: Choice) -> Rounds:
    """Every round of each contestant of all contests; in each round everyone has one turn, so that contests compare as well."""
    chosen = {
        title: {name: run for name, run in contestants.items() if takes_part(name, choice)}
        for title, contestants in contests.items()
    }
    rounds: Rounds = {title: {name: [] for name in contestants} for title, contestants in chosen.items() if contestants}
    for number in range(choice.runs):
        for title, contestants in chosen.items():
            for name, run in contestants.items():
                row = run()
                rounds[title][name].append(row)
                figures = "  ".join(f"{figure} {value:.4g}" for figure, value in row.items())
                print(f"  {number + 1}/{choice.runs}  {title:<18} {name:<20} {figures}", flush=True)
        choice.keep(rounds)
    return rounds


def available(choice: Choice, *names: str) -> dict[str, Path]:
    """Interpreters of the chosen peers that can be had; of the others the reason is printed and kept for the page."""
    found = {}
    for name in (n for n in names if takes_part(peers.PEERS[n].title, choice)):
        try:
            found[name] = peers.python_of(name, CACHE)
        except peers.Unavailable as error:
            print(f"  left out: {error}", flush=True)
            MISSING.add(str(error))
    return found


MISSING: set[str] = set()


# --- parts


def reading(choice: Choice) -> Rounds:
    """Reading alone, one thread, no model."""
    contests = {}
    for name in choice.slides or ("s20", "s40"):
        corners, mpp = str(first_tiles(name)), SLIDES[name].mpp

        def one(reader: str, python: Path | str = PYTHON, name: str = name, corners: str = corners, mpp: float = mpp) -> Row:
            # Ours as in the process that reads for a run.
            variables = VARIABLES["slides"] if reader.startswith("ours") else None
            asked = (reader, str(slide(name)), corners, "--mpp", str(mpp))
            return script(str(HERE / "reading.py"), *asked, python=python, variables=variables)

        contestants: dict[str, Contestant] = {"OpenSlide per tile": functools.partial(one, "openslide")}
        contestants[EXACT] = functools.partial(one, "ours")
        if mpp < 0.5:
            contestants["ours, fast-decode"] = functools.partial(one, "ours-fast")
        for who, python in available(choice, "pyvips").items():
            contestants[peers.PEERS[who].title] = functools.partial(one, who, python)
        contests[f"{name}, {round(224 * 0.5 / mpp)} to 224 px"] = contestants
    return alternately(contests, choice)


def roofs(choice: Choice) -> Rounds:
    """Decoding alone and models alone, from scripts that import nothing of the pipeline, one thread."""

    def decoding(name: str) -> Row:
        side = round(224 * 0.5 / SLIDES[name].mpp)
        facts = script(str(HERE / "roofs.py"), "decode", str(slide(name)), str(tiles(name)), "--side", str(side))
        return {"cpu_ms": 1e3 * facts["cpu_s"] / facts["tiles"]}

    def modelling(network: str) -> Row:
        return {"cpu_ms": 1e3 * script(str(HERE / "roofs.py"), "model", network)["cpu_s"]}

    contestants: dict[str, Contestant] = {
        f"decode {name}": functools.partial(decoding, name) for name in choice.slides or ("s20", "s40")
    }
    contestants |= {network: functools.partial(modelling, network) for network in choice.networks or tuple(CONTESTS)}
    return alternately({"roofs": contestants}, choice)


def whole(choice: Choice) -> Rounds:
    """The whole command, start to exit, with its default outputs."""
    contests = {}
    for network in choice.networks or tuple(CONTESTS):
        threads = tuned_threads(network, choice.runs) if takes_part("plain script", choice) else 1
        others = available(choice, "wsinfer", "slide2vec")
        for name in choice.slides or CONTESTS[network]:
            contestants: dict[str, Contestant] = {
                "plain script": functools.partial(plain, name, network, threads),
                EXACT: functools.partial(ours, name, network),
            }
            if SLIDES[name].mpp < 0.5:
                contestants["ours, fast-decode"] = functools.partial(ours, name, network, "--fast-decode")
            if network != "tiny" and name.endswith("small"):
                # Random weights leave every tile in doubt, which fp32 would then decide: what is measured is bf16 by itself.
                contestants["ours, bf16"] = functools.partial(ours, name, f"{network}&values=1", "--precision", "bf16")
            for options in choice.ours:
                contestants[f"ours {options}"] = functools.partial(ours, name, network, *shlex.split(options))
            for who, python in others.items() if name in choice.slides or name in PEER_SLIDES else ():
                contestants[peers.PEERS[who].title] = functools.partial(peer, who, python, name, network)
            contests[f"{network} on {name}"] = contestants
    return alternately(contests, choice)


def memory(choice: Choice) -> Rounds:
    """Peak memory of the whole command beside the bound that `check` states."""

    def peak(name: str, network: str, threads: int = 0) -> Row:
        if threads:
            command = [PYTHON, str(HERE / "plain.py"), str(slide(name)), str(tiles(name)), str(plain_scores(name, network))]
            command += ["--network", network, "--threads", str(threads)]
            return {"peak": float(measure(command, ENVIRONMENT, memory=True).peak_pss)}
        out = emptied("ours")
        asked = [str(slide(name)), "--model", model(network)]
        stated = json.loads(measure([COMMAND, "check", *asked, "--json"], ENVIRONMENT).output)["memory_bytes"]
        cost = measure([COMMAND, "run", *asked, "--out", str(out)], ENVIRONMENT, memory=True)
        return {"peak": float(cost.peak_pss), "bound": float(stated)}

    pairs = (("tiny", "s40"), ("tiny", "s8g"), ("resnet50", "s20small"), ("unet", "s20small"))
    contestants: dict[str, Contestant] = {
        f"{network} on {name}": functools.partial(peak, name, network)
        for network, name in pairs
        if network in (choice.networks or (network,)) and name in (choice.slides or (name,))
    }
    if not choice.slides or "s40" in choice.slides:
        contestants["plain script, tiny on s40"] = functools.partial(peak, "s40", "tiny", 1)
    return alternately({"memory": contestants}, choice)


def storage(choice: Choice) -> Rounds:
    """From the first region's start to the last one's end: from this disk, and with 5 ms more a read and 200 MB/s in all."""
    slow = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(HERE / "slow"), ENVIRONMENT["PYTHONPATH"]))}

    def inferring(name: str, environment: dict[str, str]) -> Row:
        out = emptied("ours")
        measure([COMMAND, "run", str(slide(name)), "--model", model("tiny"), "--out", str(out)], environment)
        lines = (line for log in (out / "events").glob("*.jsonl") for line in log.read_text().splitlines())
        events = [event for line in lines if (event := json.loads(line))["event"] in ("region-start", "region-done")]
        times = [event["time"] for event in events]
        return {"wall_s": max(times) - min(times), "tiles": float(sum(event.get("tiles", 0) for event in events))}

    contests = {}
    for name in choice.slides or ("s40",):
        disks = {"this disk": ENVIRONMENT, "slow storage": slow}
        contestants: dict[str, Contestant] = {disk: functools.partial(inferring, name, disks[disk]) for disk in disks}
        contests[f"tiny on {name}"] = contestants
    return alternately(contests, choice)


PARTS = {part.__name__: part for part in (reading, roofs, whole, storage, memory)}


def remarks(written: Path) -> str:
    """What a person wrote under the figures of the page that is there: it stays, and may want to be written anew."""
    _, heading, text = (written.read_text() if written.exists() else "").partition(f"\n{REMARKS}\n")
    return heading + text


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    names = ("torch", "imagecodecs", "pillow", "openslide-bin", "numpy", "dask", "zarr")
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Measured on {CORES} cores ({processor}), Python {platform.python_version()}, {libraries}."


def keep(path: Path, known: dict[str, Any], part: str, rounds: Rounds) -> None:
    """Put the rounds of a part in place of those `known` of the same contests, and write all to `path`."""
    known["parts"].setdefault(part, {}).update(rounds)
    known |= {"machine": machine(), "cores": CORES, "missing": sorted(MISSING | {*known["missing"]})}
    path.write_text(json.dumps(known, indent=1))


def quick(choice: Choice) -> None:
    """Every script once on small slides, to see that all still run."""
    for part, slides in ((reading, ("s20small", "s40small")), (roofs, ("s20small",)), (whole, ("s20small", "s40small"))):
        print(part.__doc__, flush=True)
        part(Choice(1, choice.networks or ("tiny",), choice.slides or slides, choice.only, choice.ours))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Run the benchmarks and write docs/benchmarks.md.",
        epilog="parts: " + "; ".join(f"{name}: {(part.__doc__ or '').rstrip('.')}" for name, part in PARTS.items()),
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--network", action="append", default=[], help="tiny, resnet18, ...; several: repeat")
    parser.add_argument("--slide", action="append", default=[], help=f"of {', '.join(SLIDES)}; several: repeat")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="contestants whose name holds TEXT")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="OPTIONS", help="`pathology run` with these takes part too"
    )
    parser.add_argument("--quick", action="store_true", help="one round on small slides, to try the scripts; writes no page")
    parser.add_argument("--page", action="store_true", help="write the page from kept rounds; measure nothing")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if unknown := sorted({*options.parts} - {*PARTS}):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(PARTS)}")
    if unknown := sorted({*options.slide} - {*SLIDES}):
        parser.error(f"--slide {', '.join(unknown)}: choose from {', '.join(SLIDES)}")
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: use 1 or more")
    choice = Choice(options.runs, *(tuple(v) for v in (options.network, options.slide, options.only, options.ours)))
    CACHE.mkdir(parents=True, exist_ok=True)
    if options.quick:
        quick(choice)
        return
    kept = CACHE / "rounds.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"parts": {}, "missing": []}
    for part in () if options.page else options.parts or PARTS:
        print(PARTS[part].__doc__, flush=True)
        PARTS[part](replace(choice, keep=functools.partial(keep, kept, known, part)))
    if "machine" not in known:
        parser.error(f"{kept} does not exist: nothing has been measured yet")
    written = ROOT / "docs" / "benchmarks.md"
    written.write_text(page(known["parts"], known["machine"], known["cores"], known["missing"]) + remarks(written))


if __name__ == "__main__":
    main()
