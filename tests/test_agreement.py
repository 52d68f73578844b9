"""The arithmetic of benchmarks/agreement.py: what flips, how far scores are apart, and a head that a card can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks.agreement import agreement, change, fit, page, with_head
from pathology.models import load_model
from pathology.models.efficientnet import EfficientNetLite0

ALL = np.ones(6, np.bool_)


def test_flips_and_area_are_of_the_threshold() -> None:
    fp32 = np.array([0.1, 0.2, 0.499, 0.502, 0.8, 0.9])
    bf16 = np.array([0.1, 0.2, 0.501, 0.506, 0.8, 0.93])
    truth = np.array([False, False, True, False, True, True])
    found = agreement(fp32, bf16, truth, ALL)
    assert (found.tiles, found.flips, found.area) == (6, 1, (3, 4))
    assert (found.largest, found.mean) == (pytest.approx(0.03), pytest.approx((0.002 + 0.004 + 0.03) / 6))
    assert (found.nearest, found.within) == (pytest.approx(0.001), 2)
    assert change(found) == pytest.approx(1 / 3)
    assert found.auc == (pytest.approx(8 / 9), pytest.approx(8 / 9))  # one of nine pairs stands the wrong way round
    text = page({"own": found}, "Measured on paper.")
    assert "| tiles that flip (bound 0.1%) | 1 (16.67%) |" in text
    assert "| change of area (bound 0.5%) | 33.33% |" in text
    assert (
        "- own: missed. 1 of 6 tiles flip, 16.67% where 0.1% is the bound (a single tile is 16.67%); all lie near the "
        "threshold, within 0.0010 of it in fp32; the area changes by 33.33%, 0.5% is the bound."
    ) in text


def test_equal_scores_agree() -> None:
    scores = np.array([0.1, 0.5, 0.9, 0.2, 0.7, 0.6])
    found = agreement(scores, scores, scores > 0.55, ALL)
    assert (found.largest, found.mean, found.flips, found.nearest, change(found)) == (0, 0, 0, 0, 0)
    assert found.auc == (1, 1)
    assert "- own: both bounds are held." in page({"own": found}, "Measured on paper.")


def test_auc_is_of_the_judged_tiles_alone() -> None:
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.7, 0.3])
    truth = np.array([False, False, False, False, True, False])
    assert agreement(scores, scores, truth, np.array([False, False, True, True, True, True])).auc == (1, 1)
    assert agreement(scores, scores, truth, ALL).auc == (pytest.approx(3 / 5), pytest.approx(3 / 5))


def test_a_fitted_head_becomes_a_model_that_answers_as_it_does(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "features").mkdir()
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    save_file({k: v.numpy() for k, v in network.state_dict().items()}, folder / "features/weights.safetensors")
    tiles = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), np.uint8)
    tiles[::2] //= 2
    with torch.inference_mode():
        vectors = network((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() - 127) / 128).numpy()
    truth = np.arange(6) % 2 == 1
    weights, bias = fit(vectors, truth)
    again, _ = fit(vectors, truth)
    assert np.array_equal(weights, again)
    scores = load_model(str(with_head(folder / "features", folder, "head", weights, bias)))(tiles)[:, 0, 0, 0]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-(vectors.astype(np.float64) @ weights + bias))), atol=1e-5)
