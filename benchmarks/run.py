"""All benchmarks, or the parts that are named: each contestant in turn, several times over, then medians and ratios.

    python benchmarks/run.py [PART ...] [--runs 5]

Promise: what is compared ran alternately in one sitting. Results are kept as JSON in the cache; docs/benchmarks.md shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.measure import Cost, measure  # noqa: E402  # the paths above come first
from benchmarks.slides import build  # noqa: E402

CACHE = ROOT / ".cache" / "benchmarks"
HERE = ROOT / "benchmarks"
PYTHON = sys.executable
COMMAND = str(Path(sys.executable).parent / "pathology")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

# Versions that peers were asked for by; torch is pinned so that pip takes the CPU build there is.
PEERS = {
    "pyvips": ["pyvips[binary]==3.0.0", "numpy"],
    "wsinfer": ["torch==2.13.0", "wsinfer==0.6.1", "zarr<3", "openslide-python", "openslide-bin"],
}
# Installed beside them without their own requirements, which would replace torch.
PEERS_ALONE = {"wsinfer": ["torchvision==0.28.0"]}

# Slides that `whole` is restricted to, if any.
ASKED: list[str] = []

Row = dict[str, float | str]
Contestant = Callable[[], Cost]


def slide(name: str) -> Path:
    from real_slides import cmu_small_region

    return build(name, cmu_small_region(), CACHE / "slides")


def tiles(name: str) -> Path:
    """Level-0 corners of the slide's tissue tiles, as the pipeline plans them; the same list for every contestant."""
    path = CACHE / f"{name}.npy"
    if not path.exists():
        import numpy as np

        from pathology.job import Job
        from pathology.models import load_spec
        from pathology.readers import open_slide
        from pathology.worker import plan_slide

        job = Job(slide=str(slide(name)), slide_id=name, root="", model=model("tiny"), out=".")
        with open_slide(job.slide) as opened:
            _, plan = plan_slide(job, opened, load_spec(job.model))
        np.save(path, np.rint(plan.grid.l0_origins(plan.tiles)).astype(np.int64))
    return path


def tissue_mm2(name: str) -> float:
    """Unique tissue under the tiles of the list: by it recomputing is no gain."""
    import numpy as np

    return len(np.load(tiles(name))) * (224 * 0.5 / 1000) ** 2


def count(name: str) -> int:
    import numpy as np

    return len(np.load(tiles(name)))


def model(network: str) -> str:
    return f"benchmarks.models:{'dense' if network == 'unet' else 'classifier'}?network={network}"


def ours(name: str, network: str, *options: str, memory: bool = False) -> Cost:
    """The whole command, start to exit, into an empty folder."""
    out = CACHE / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [COMMAND, "run", str(slide(name)), "--model", model(network), "--out", str(out), *options]
    return measure(command, ENVIRONMENT, memory)


def plain(name: str, network: str, threads: int) -> Cost:
    scores = CACHE / "plain.npy"
    command = [PYTHON, str(HERE / "plain.py"), str(slide(name)), str(tiles(name)), str(scores), "--network", network]
    return measure([*command, "--threads", str(threads)], ENVIRONMENT)


def script(*arguments: str, python: str = PYTHON) -> dict[str, float]:
    cost = measure([python, *arguments], ENVIRONMENT)
    facts: dict[str, float] = json.loads(cost.output.strip().splitlines()[-1])
    return facts


def alternately(contestants: dict[str, Callable[[], Row]], runs: int) -> dict[str, Row]:
    """The median of each figure of each contestant over `runs` rounds, in each of which everyone has one turn."""
    rounds: dict[str, list[Row]] = {name: [] for name in contestants}
    for number in range(runs):
        for name, run in contestants.items():
            row = run()
            rounds[name].append(row)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            print(f"  {number + 1}/{runs}  {name:<34} {shown}", flush=True)
    return {name: {k: statistics.median(float(r[k]) for r in rows) for k in rows[0]} for name, rows in rounds.items()}


def timed(run: Contestant) -> Callable[[], Row]:
    def once() -> Row:
        cost = run()
        return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s}

    return once


# --- parts


def reading(runs: int) -> dict[str, dict[str, Row]]:
    """Reading alone, one thread, no model: milliseconds per 224-px tile."""
    found = {}
    vips = peer("pyvips")
    for name, mpp in (("s20", 0.5), ("s40", 0.25)):
        some = CACHE / f"{name}-some.npy"
        if not some.exists():
            import numpy as np

            np.save(some, np.load(tiles(name))[: 1200 if name == "s20" else 800])

        def one(reader: str, python: str = PYTHON, name: str = name, mpp: float = mpp, some: Path = some) -> Row:
            facts = script(str(HERE / "reading.py"), reader, str(slide(name)), str(some), "--mpp", str(mpp), python=python)
            return {"wall_ms": 1e3 * facts["wall_s"] / facts["tiles"], "cpu_ms": 1e3 * facts["cpu_s"] / facts["tiles"]}

        contestants: dict[str, Callable[[], Row]] = {
            "OpenSlide per tile": lambda one=one: one("openslide"),
            "ours, exact": lambda one=one: one("ours"),
        }
        if name == "s40":
            contestants["ours, fast-decode"] = lambda one=one: one("ours-fast")
        if vips:
            contestants["pyvips"] = lambda one=one: one("pyvips", vips)
        found[f"{name}: {'224 at 1:1' if name == 's20' else '448 -> 224'}"] = alternately(contestants, runs)
    return found


def whole(runs: int) -> dict[str, dict[str, Row]]:
    """The whole command with its default outputs, tiny CNN, against the plain script with its better number of threads."""
    found = {}
    for name in ASKED or ("s20small", "s20", "s40small", "s40"):
        contestants: dict[str, Callable[[], Row]] = {
            "plain script": timed(lambda name=name: plain(name, "tiny", 1)),
            "ours, exact": timed(lambda name=name: ours(name, "tiny")),
        }
        if name.startswith("s40"):
            contestants["ours, fast-decode"] = timed(lambda name=name: ours(name, "tiny", "--fast-decode"))
        found[name] = alternately(contestants, runs)
    return found


def resnet18(runs: int) -> dict[str, dict[str, Row]]:
    """The whole command with ResNet-18 on the 1,000-tile slide, and bf16 beside it."""
    contestants: dict[str, Callable[[], Row]] = {
        f"plain script, {threads} torch threads": timed(lambda threads=threads: plain("s20small", "resnet18", threads))
        for threads in (1, 2)
    }
    contestants["ours, fp32"] = timed(lambda: ours("s20small", "resnet18"))
    contestants["ours, bf16"] = timed(lambda: ours("s20small", "resnet18", "--precision", "bf16"))
    return {"s20small": alternately(contestants, runs)}


def roofs(runs: int) -> dict[str, dict[str, Row]]:
    """Decoding alone and the model alone, from scripts that import nothing of the pipeline: CPU ms per tile on one thread."""

    def decoding(name: str, side: int) -> Row:
        facts = script(str(HERE / "roofs.py"), "decode", str(slide(name)), str(tiles(name)), "--side", str(side))
        return {"cpu_ms": 1e3 * facts["cpu_s"] / facts["tiles"]}

    def modelling(network: str) -> Row:
        return {"cpu_ms": 1e3 * script(str(HERE / "roofs.py"), "model", network)["cpu_s"]}

    contestants: dict[str, Callable[[], Row]] = {
        "decode s20": lambda: decoding("s20", 224),
        "decode s40": lambda: decoding("s40", 448),
        "tiny CNN": lambda: modelling("tiny"),
        "ResNet-18": lambda: modelling("resnet18"),
    }
    return {"roofs": alternately(contestants, runs)}


def memory(runs: int) -> dict[str, dict[str, Row]]:
    """Peak memory, PSS summed over all processes of the command, beside what `check` printed."""
    found: dict[str, Row] = {}
    for network, name in (("tiny", "s40"), ("tiny", "s8g"), ("resnet50", "s20small"), ("unet", "s20small")):
        bound = json.loads(
            subprocess.run(
                [COMMAND, "check", str(slide(name)), "--model", model(network), "--json"],
                check=True,
                capture_output=True,
                text=True,
                env=ENVIRONMENT,
            ).stdout
        )["memory_bytes"]
        peaks = [ours(name, network, memory=True).peak_pss for _ in range(max(1, runs // 2))]
        found[f"{network} on {name}"] = {"peak_MB": statistics.median(peaks) / 1e6, "bound_MB": bound / 1e6}
        print(f"  {network} on {name}: {found[f'{network} on {name}']}", flush=True)
    return {"memory": found}


def twice(runs: int) -> dict[str, dict[str, Row]]:
    """Twice the tissue: seconds of the whole command on a slide with 20 % and one with 40 %, and on a small one."""
    contestants = {name: timed(lambda name=name: ours(name, "tiny")) for name in ("s40small", "s40half", "s40")}
    return {"twice": alternately(contestants, runs)}


def wsinfer(runs: int) -> dict[str, dict[str, Row]]:
    """WSInfer 0.6.1 and this project, whole commands, tiny CNN; tiles are what each finds tissue in."""
    python = peer("wsinfer")
    if python is None:
        return {}
    import torch

    from benchmarks.networks import MEAN, STD, make

    folder, slides = CACHE / "wsinfer-tiny", CACHE / "wsinfer-slides"
    folder.mkdir(exist_ok=True)
    slides.mkdir(exist_ok=True)
    torch.jit.trace(make("tiny"), torch.zeros(2, 3, 224, 224)).save(str(folder / "torchscript_model.pt"))
    transform = [
        {"name": "Resize", "arguments": {"size": 224}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": MEAN, "std": STD}},
    ]
    card = {"spec_version": "1.0", "architecture": "tiny", "num_classes": 2, "patch_size_pixels": 224, "spacing_um_px": 0.5}
    (folder / "config.json").write_text(json.dumps({**card, "class_names": ["a", "b"], "transform": transform}))
    shutil.rmtree(slides)
    slides.mkdir()
    (slides / "s40.svs").symlink_to(slide("s40"))

    def theirs() -> Row:
        out = CACHE / "out-wsinfer"
        shutil.rmtree(out, ignore_errors=True)
        command = [python, str(HERE / "wsinfer_run.py"), str(slides), str(out), "--model", str(folder)]
        cost = measure(command, ENVIRONMENT)
        done = sum(1 for _ in (out / "model-outputs-csv" / "s40.csv").open()) - 1
        return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "tiles": float(done), "wall_ms_per_tile": 1e3 * cost.wall_s / done}

    def mine(*options: str) -> Row:
        cost = ours("s40", "tiny", *options)
        done = count("s40")
        return {"wall_s": cost.wall_s, "cpu_s": cost.cpu_s, "tiles": float(done), "wall_ms_per_tile": 1e3 * cost.wall_s / done}

    contestants: dict[str, Callable[[], Row]] = {
        "WSInfer": theirs,
        "ours, exact": mine,
        "ours, fast-decode": lambda: mine("--fast-decode"),
    }
    return {"s40": alternately(contestants, runs)}


PARTS = {f.__name__: f for f in (reading, whole, resnet18, wsinfer, roofs, memory, twice)}


def peer(name: str) -> str | None:
    """The Python of a venv of a peer's own, made on first use; None, and the reason on record, where it cannot be had."""
    folder = CACHE / f"venv-{name}"
    python = folder / "bin" / "python"
    if (folder / "failed").exists():
        return None
    if not (folder / "ready").exists():
        subprocess.run([PYTHON, "-m", "venv", str(folder)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "-q", *PEERS[name]], capture_output=True, text=True, check=False
        )
        (folder / ("failed" if done.returncode else "ready")).write_text(done.stderr)
        if done.returncode:
            return None
    return str(python)


# --- the page


def write_page(results: dict[str, dict[str, dict[str, Row]]]) -> None:
    lines = [INTRODUCTION.format(machine=machine())]
    for part, function in PARTS.items():
        if part not in results:
            continue
        lines.append(f"\n## {(function.__doc__ or part).splitlines()[0].rstrip('.')}\n")
        for title, rows in results[part].items():
            names = list(next(iter(rows.values())))
            basis = next(iter(rows.values()))
            compare = part in ("reading", "whole", "resnet18", "wsinfer")
            head = ["", *names, *(f"x {k}" for k in names if compare)]
            if part == "whole":
                head += ["tiles/s", "mm2/s"]
            lines.append(f"{title}" + (f" ({count(title)} tiles)" if title in COUNTED else "") + "\n")
            lines.append("| " + " | ".join(head) + " |")
            lines.append("|---|" + "---:|" * (len(head) - 1))
            for name, row in rows.items():
                cells = [name, *(f"{row[k]:.4g}" for k in names)]
                if compare:
                    cells += [f"{float(basis[k]) / float(row[k]):.2f}" for k in names]
                if part == "whole":
                    wall = float(row["wall_s"])
                    cells += [f"{count(title) / wall:.0f}", f"{tissue_mm2(title) / wall:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        if part == "whole":
            lines += after_start(results[part])
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


COUNTED = ("s20", "s40", "s20small", "s40small")
INTRODUCTION = """# Benchmarks

Made by `make bench`: slides of real pixels (a CC0 Aperio slide, mirrored over 60 % glass; JPEG 4:2:2, quality 75, 240-px tiles,
levels 1/4/16), every contestant in turn, several rounds, medians. CPU seconds are of all processes of a command. "x" is the
first row's figure over this row's: above 1 is better. No GPU was at hand: its code is tested through a stand-in, not measured.

- `s20`: 20,160 x 20,160 px at 0.5 um/px; `s20small`: 10,800 x 10,800.
- `s40`: 60,000 x 50,400 px at 0.25 um/px, read at 0.5; `s40half`: with half the tissue; `s40small`: 21,600 x 21,600.
- `s8g`: 96,000 x 84,000 px at 0.25 um/px.

{machine}
"""


def machine() -> str:
    processor = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "imagecodecs", "pillow", "openslide-bin", "dask", "zarr"))
    return f"{len(os.sched_getaffinity(0))} cores ({processor}), Python {platform.python_version()}, {libraries}."


def after_start(parts: dict[str, dict[str, Row]]) -> list[str]:
    """Rates without start and end: the difference of two slides of one kind, tiles over seconds."""
    lines = ["After start-up: tiles and seconds of the larger slide less those of the smaller.\n"]
    lines += ["| | tiles/s | x wall |", "|---|---:|---:|"]
    for small, large in (("s20small", "s20"), ("s40small", "s40")):
        if small not in parts or large not in parts:
            continue
        basis = 0.0
        for name in parts[large]:
            seconds = float(parts[large][name]["wall_s"]) - float(parts[small][name]["wall_s"])
            rate = (count(large) - count(small)) / seconds
            basis = basis or rate
            lines.append(f"| {large}: {name} | {rate:.0f} | {rate / basis:.2f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write docs/benchmarks.md.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--slide", action="append", default=[], help="for `whole`: only this slide; several: repeat")
    options = parser.parse_args()
    ASKED.extend(options.slide)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: use 1 or more")
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = CACHE / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for part in options.parts or PARTS:
        print(f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}", flush=True)
        results.setdefault(part, {}).update(PARTS[part](options.runs))
        kept.write_text(json.dumps(results, indent=1))
    write_page(results)


if __name__ == "__main__":
    main()
