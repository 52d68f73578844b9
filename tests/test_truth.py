"""The built-in model against what is known: planted regions of synthetic slides, counted nuclei, a real slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ngff import assert_valid
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from real_slides import cmu_small_region, histolytics_field
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pathology import Job, open_heatmap
from pathology.export.table import TileTable, read_parquet
from pathology.runner import run
from sample_data.generate import Truth, make_slide


def table_of(slide: Path, out: Path, model: str = "nuclei-density", slide_mpp: float | None = None) -> TileTable:
    """The tiles of a run with default options."""
    job = Job(slide=str(slide), slide_id="s", root=str(slide), model=model, out=str(out), slide_mpp=slide_mpp, threads=2)
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok", outcome.message
    (parquet,) = out.glob("slides/s/*/tiles.parquet")
    return read_parquet(parquet)


def against_truth(table: TileTable, truth: Truth) -> tuple[float, float, float]:
    """AUC of planted against other tiles; tiles from the centre of the hottest 5 % to the region's; share of them in it."""
    factor = 8
    mask = Image.new("1", (truth.size // factor, truth.size // factor))
    region = np.asarray(truth.region, np.float64)
    ImageDraw.Draw(mask).polygon([(x / factor, y / factor) for y, x in region], fill=1)
    planted = np.asarray(mask)
    centres = np.stack([table.miny + table.height / 2, table.minx + table.width / 2], axis=1)
    rows, cols = np.minimum(centres / factor, truth.size // factor - 1).astype(int).T
    inside = planted[rows, cols]
    scores = table.scores[:, 0]
    hottest = np.argsort(scores)[-max(1, len(scores) // 20) :]
    middle = (np.argwhere(planted).mean(axis=0) + 0.5) * factor
    off = np.abs(centres[hottest].mean(axis=0) - middle).max() / table.width[0]
    return float(roc_auc_score(inside, scores)), float(off), float(inside[hottest].mean())


@pytest.mark.parametrize(
    ("size", "seed"), [(3000, 7), *(pytest.param(12_000, s, marks=pytest.mark.slow) for s in (1, 2, 3, 4, 5))]
)
def test_planted_region_is_found(size: int, seed: int, tmp_path: Path) -> None:
    truth = make_slide(tmp_path / "s.svs", size, seed)
    auc, off, share = against_truth(table_of(tmp_path / "s.svs", tmp_path / "out"), truth)
    print(f"{size} px, seed {seed}: AUC {auc:.4f}, hottest 5 % centred {off:.2f} tiles off, {share:.0%} of them in the region")
    assert auc >= 0.95
    assert off <= 1.0


def counts(instances: NDArray[np.int32], side: int) -> NDArray[np.float64]:
    """(rows, cols) nuclei whose centre lies in each tile of `side` px."""
    ids, flat = np.unique(instances, return_inverse=True)
    area = np.bincount(flat.ravel())
    y, x = (np.bincount(flat.ravel(), axis.ravel()) / area for axis in np.indices(instances.shape))
    edges = np.arange(0, instances.shape[0] + 1, side)
    return np.histogram2d(y[ids > 0], x[ids > 0], bins=[edges, edges])[0]


def test_density_follows_counted_nuclei_through_the_whole_pipeline(tmp_path: Path) -> None:
    field = histolytics_field()
    table = table_of(field.path, tmp_path / "out", "nuclei-density?tile_px=100", slide_mpp=0.5)
    counted = counts(field.instances, 100)[table.miny // 100, table.minx // 100]
    correlation = float(spearmanr(table.scores[:, 0], counted)[0])
    print(f"{len(table)} tiles of 100 px: Spearman {correlation:.3f}")
    assert len(table) >= 220
    assert correlation >= 0.78


def test_real_slide_runs_and_its_store_is_valid(tmp_path: Path) -> None:
    table = table_of(cmu_small_region(), tmp_path / "out")
    (folder,) = tmp_path.glob("out/slides/s/nuclei-density")
    heatmap = open_heatmap(folder)
    scores = heatmap.levels[0].compute()
    assert np.count_nonzero(~np.isnan(scores)) == len(table) > 30
    assert 0.02 < np.nanmean(scores) < 0.4
    assert_valid(heatmap.path)
