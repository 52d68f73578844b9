"""A WSInfer model folder through the whole pipeline gives WSInfer's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image
from test_models import MEAN, STD, ResNet, config, scripted, sha256

from pathology import Job
from pathology.decide import DOUBT
from pathology.errors import UsageError
from pathology.export.table import read_parquet
from pathology.job import Precision
from pathology.models import add_model
from pathology.runner import run
from tests.slides import noise_pixels, pyramid, smooth_pixels, write_tiff

TILE_PX, SIDE = 40, 32  # px at 1 um/px, so 80 px of level 0; resized to 32


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_scores_of_300_tiles_are_those_of_wsinfers_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, tolerance: float
) -> None:
    monkeypatch.setenv("PATHOLOGY_HOME", str(tmp_path / "home"))
    pixels = (smooth_pixels(1200, 1600) // 2 + noise_pixels(1200, 1600) // 2).astype(np.uint8)
    slide = write_tiff(tmp_path / "s.svs", pyramid(pixels, (1, 4)), mpp=0.5)
    torch.manual_seed(3)
    network = ResNet(3).eval()
    # An untrained network leaves every tile in doubt: fp32 would decide all.
    monkeypatch.setitem(DOUBT, "bf16", 0.0)  # type: ignore[arg-type]
    folder = tmp_path / "resnet"
    folder.mkdir()
    steps = [
        {"name": "Resize", "arguments": {"size": SIDE}},
        {"name": "ToTensor"},
        {"name": "Normalize", "arguments": {"mean": list(MEAN), "std": list(STD)}},
    ]
    card = config(patch_size_pixels=TILE_PX, spacing_um_px=1.0, transform=steps)
    (folder / "config.json").write_text(json.dumps(card))
    scripted(network, folder / "torchscript_model.pt")
    add_model(folder, sha256(folder / "torchscript_model.pt"))

    job = Job(
        slide=str(slide),
        slide_id="s",
        root=str(slide),
        model=str(folder),
        out=str(tmp_path / "out"),
        tissue="none",
        precision=precision,
    )
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok", outcome.message
    other: Precision = "bf16" if precision == "fp32" else "fp32"
    with pytest.raises(UsageError, match=f"made otherwise \\(precision {precision} -> {other}\\)"):
        list(run([replace(job, precision=other)], "sync"))
    (parquet,) = (tmp_path / "out").glob("slides/s/*/tiles.parquet")
    table = read_parquet(parquet)
    assert len(table) == 300

    expected = np.empty_like(table.scores)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    with openslide.OpenSlide(slide) as opened, torch.inference_mode():
        for i in range(len(table)):
            place, size = (int(table.minx[i]), int(table.miny[i])), (int(table.width[i]), int(table.height[i]))
            image = opened.read_region(place, 0, size).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
            expected[i] = network(((x - mean) / std)[None]).softmax(1)[0].numpy()
    difference = np.abs(table.scores - expected).max()
    print(f"largest difference of {expected.size} scores: {difference:.2e}; spread of scores {np.ptp(expected, axis=0)}")
    assert difference < tolerance
    assert difference > 1e-4 or precision == "fp32"  # or nothing was computed in bf16
    assert np.ptp(expected, axis=0).min() > 1e-2  # a network that ignores its input would agree with anything
