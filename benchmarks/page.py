"""docs/benchmarks.md from measured rounds. Promise: nothing is measured here: equal rounds, equal page.

A part's rounds are {title: {contestant: [row, row, ...]}}, one row of figures a round; ratios are to the first contestant.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

Row = dict[str, float]
Rounds = dict[str, dict[str, list[Row]]]
Medians = dict[str, Row]
Column = tuple[str, Callable[[Row, Row], str]]  # its head, and its cell of (row, basis)

EXACT = "ours, exact"
TILE_MM2 = (224 * 0.5 / 1000) ** 2

INTRODUCTION = """# Benchmarks

`make bench` builds the slides, runs every contestant in turn, several rounds in one sitting, and writes this page. Slides are
real pixels, a CC0 Aperio slide mirrored over 60 % glass: JPEG 4:2:2, quality 75, 240-px tiles, levels 1/4/16.

| slide | px | um/px | tissue |
|---|---:|---:|---:|
| `s20`, `s20dot` | 20,160 x 20,160 | 0.5 | 41 %, 8 % |
| `s20small` | 10,800 x 10,800 | 0.5 | 42 %: about 1,000 tiles |
| `s40`, `s40half`, `s40dot` | 60,000 x 50,400 | 0.25 | 41 %, 20 %, 8 % |
| `s40small` | 21,600 x 21,600 | 0.25 | 42 %: about 1,000 tiles |
| `s8g` | 96,000 x 84,000 | 0.25 | 41 % |

Models see 224 px at 0.5 um/px, from a 40x slide 448 px averaged to 224; weights are random, from a fixed seed. Figures are
medians; "spread" is the slowest less the fastest round, as a share of the median. Wall seconds are of the whole command, start
to exit; CPU seconds of all its processes. mm2 is unique tissue under the tiles a contestant computed, so that computing twice
is no gain; ratios (x) are of mm2 per second, wall or CPU, to the first row: above 1 is better.

- *plain script*: OpenSlide per tile, a torch DataLoader with 2 workers, the list of tiles given; threads tuned beforehand.
- *ours*: `pathology run` with its default outputs, tissue detection and pyramid included.
- *WSInfer*, *slide2vec*: their own commands and defaults, their own tissue and grids, hence other numbers of tiles. slide2vec
  chooses OpenSlide here: cuCIM, its first choice, wants CUDA.
- *GPU*: none was at hand for this page; that code is tested through a stand-in for a device, and not measured.
"""


def medians(rounds: Mapping[str, Sequence[Row]]) -> Medians:
    """The median of each figure of each contestant, and the wall time's spread as a share of it."""
    found: Medians = {}
    for name, rows in rounds.items():
        found[name] = {figure: statistics.median(row[figure] for row in rows) for figure in rows[0]}
        if "wall_s" in rows[0]:
            walls = [row["wall_s"] for row in rows]
            found[name]["spread"] = (max(walls) - min(walls)) / statistics.median(walls)
    return found


def after_start(large: Medians, small: Medians) -> Medians:
    """What the larger slide costs beyond the smaller one of the same kind: start-up, end and glass fall out.

    Only contestants measured on both; those whose difference is not above 0 were measured too coarsely and are left out.
    """
    found: Medians = {}
    for name in (n for n in large if n in small):
        row = {figure: large[name][figure] - small[name][figure] for figure in ("wall_s", "cpu_s", "tiles")}
        if min(row.values()) > 0:
            found[name] = row
    return found


def roof_share(row: Row, decode_ms: float, model_ms: float, cores: int) -> float:
    """Rate of `row` as a share of what all cores would do were they kept busy by bare decoding and the bare model alone."""
    return row["tiles"] / row["wall_s"] * (decode_ms + model_ms) / 1e3 / cores


def proportion(dot: Row, half: Row, full: Row) -> float:
    """Wall seconds per tile from the half slide to the full one, over those from the dot to the half: 1 is proportional."""
    upper = (full["wall_s"] - half["wall_s"]) / (full["tiles"] - half["tiles"])
    return upper / ((half["wall_s"] - dot["wall_s"]) / (half["tiles"] - dot["tiles"]))


def rate(row: Row, seconds: str) -> float:
    """Unique mm2 per second."""
    return row["tiles"] * TILE_MM2 / row[seconds]


def times(figure: Callable[[Row], float]) -> Callable[[Row, Row], str]:
    return lambda row, basis: f"{figure(row) / figure(basis):.2f}"


RATES: tuple[Column, ...] = (
    ("wall s", lambda row, _: f"{row['wall_s']:.2f}"),
    ("CPU s", lambda row, _: f"{row['cpu_s']:.2f}"),
    ("tiles", lambda row, _: f"{row['tiles']:.0f}"),
    ("tiles/s", lambda row, _: f"{row['tiles'] / row['wall_s']:.0f}"),
    ("mm2/s", lambda row, _: f"{rate(row, 'wall_s'):.2f}"),
    ("x wall", times(lambda row: rate(row, "wall_s"))),
    ("x CPU", times(lambda row: rate(row, "cpu_s"))),
)
SPREAD: Column = ("spread", lambda row, _: f"{row['spread']:.0%}")
DIFFERENCE: Column = (
    "largest difference of a score",
    lambda row, _: f"{row['difference']:.1e}" if "difference" in row else "",
)
AGREEMENT: Column = (
    "same class",
    lambda row, _: f"{row['agreement']:.2%}" if "agreement" in row else "",
)
READING: tuple[Column, ...] = (
    ("wall ms per tile", lambda row, _: f"{1e3 * row['wall_s'] / row['tiles']:.3f}"),
    ("CPU ms per tile", lambda row, _: f"{1e3 * row['cpu_s'] / row['tiles']:.3f}"),
    ("x wall", times(lambda row: rate(row, "wall_s"))),
    ("x CPU", times(lambda row: rate(row, "cpu_s"))),
    SPREAD,
)
ROOFS: tuple[Column, ...] = (
    ("CPU ms per tile", lambda row, _: f"{row['cpu_ms']:.3f}"),
    ("tiles/s on one core", lambda row, _: f"{1e3 / row['cpu_ms']:.0f}"),
)
STORAGE: tuple[Column, ...] = (
    ("wall s", lambda row, _: f"{row['wall_s']:.2f}"),
    ("tiles/s", lambda row, _: f"{row['tiles'] / row['wall_s']:.0f}"),
    ("x", times(lambda row: rate(row, "wall_s"))),
    SPREAD,
)
MEMORY: tuple[Column, ...] = (
    ("peak MB", lambda row, _: f"{row['peak'] / 1e6:.0f}"),
    ("bound MB", lambda row, _: f"{row['bound'] / 1e6:.0f}" if "bound" in row else ""),
    ("peak / bound", lambda row, _: f"{row['peak'] / row['bound']:.2f}" if "bound" in row else ""),
)


def table(rows: Medians, columns: Iterable[Column]) -> Iterator[str]:
    """Lines of Markdown; ratios are to the first row."""
    columns = tuple(columns)
    basis = next(iter(rows.values()))
    yield "| " + " | ".join(["", *(head for head, _ in columns)]) + " |"
    yield "|---|" + "---:|" * len(columns)
    for name, row in rows.items():
        yield "| " + " | ".join([name, *(cell(row, basis) for _, cell in columns)]) + " |"
    yield ""


def page(parts: Mapping[str, Rounds], machine: str, cores: int, notes: Sequence[str] = ()) -> str:
    """The whole page.

    parts    rounds by part: "reading", "whole", "roofs", "storage", "memory"; those that are missing are left out
    machine  what it was measured on, a line
    notes    contestants that could not run, and why, a line each
    """
    lines = [INTRODUCTION, machine, "", *(f"- {note}" for note in notes)]
    found = {part: {title: medians(rounds) for title, rounds in titles.items()} for part, titles in parts.items() if titles}
    if "reading" in found:
        lines += ["", "## Reading alone, one thread, no model", ""]
        for title, rows in found["reading"].items():
            lines += [f"{title}:", "", *table(rows, READING)]
    roofs = found.get("roofs", {})
    if roofs:
        lines += ["", "## The roofs: scripts that import nothing of ours, one thread", ""]
        lines += [
            "Decoding: every tile of the file under the list, once, by imagecodecs. Models: bare torch, its best batch.",
            "",
        ]
        lines += table(next(iter(roofs.values())), ROOFS)
    if "whole" in found:
        lines += ["", "## The whole command", ""]
        for title, rows in found["whole"].items():
            checked = [DIFFERENCE, AGREEMENT] if any("difference" in row for row in rows.values()) else []
            lines += [f"{title}:", "", *table(rows, [*RATES, SPREAD, *checked])]
        lines += _after_start(found["whole"], next(iter(roofs.values()), {}), cores)
        lines += _twice(found["whole"])
    if "storage" in found:
        lines += ["", "## Slow storage", ""]
        lines += ["5 ms more for each read and 200 MB/s in all; from the first region's start to the last one's end.", ""]
        for title, rows in found["storage"].items():
            lines += [f"{title}:", "", *table(rows, STORAGE)]
    if "memory" in found:
        lines += ["", "## Peak memory: PSS summed over all processes, ten samples a second, beside what `check` states", ""]
        lines += table(next(iter(found["memory"].values())), MEMORY)
    return "\n".join(lines).rstrip() + "\n"


def _after_start(whole: Mapping[str, Medians], roofs: Medians, cores: int) -> Iterator[str]:
    differences = {title: after_start(rows, whole.get(f"{title}dot", {})) for title, rows in whole.items()}
    if not any(differences.values()):
        return
    yield from ("", "## After start-up", "")
    yield "Tiles and seconds of a slide less those of the slide of the same size with a fifth of its tissue (`dot`)."
    yield f"Share of the roof: of what bare decoding and the bare model alone allow on {cores} cores, were none ever idle."
    yield ""
    for title, difference in differences.items():
        network, _, slide = title.partition(" on ")
        if not difference:
            continue
        yield from (f"{title}:", "", *table(difference, RATES))
        if EXACT in difference and f"decode {slide}" in roofs and network in roofs:
            share = roof_share(difference[EXACT], roofs[f"decode {slide}"]["cpu_ms"], roofs[network]["cpu_ms"], cores)
            yield from (f"Share of the roof, {EXACT}: {share:.2f}", "")


def _twice(whole: Mapping[str, Medians]) -> Iterator[str]:
    for title in [t for t in whole if t.endswith("half")]:
        full, dot = whole.get(title.removesuffix("half")), whole.get(title.removesuffix("half") + "dot")
        names = [n for n in whole[title] if full and dot and n in full and n in dot]
        if full and dot and names:
            yield from ("", "## Twice the tissue", "")
            yield "Seconds per tile from half the tissue to all of it, over those from a fifth to half: 1.00 is twice the time."
            yield ""
            for name in names:
                yield f"- {name}, {title.removesuffix('half')}: {proportion(dot[name], whole[title][name], full[name]):.2f}"
