"""Blended maps beside MONAI's sliding-window inference, which is fetched for it: the same windows, the same result."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pathology import open_slide
from pathology.model import ModelSpec
from pathology.models.network import TorchNetwork
from pathology.stitch import Blend
from tests.real_slides import CACHE
from tests.slides import smooth_pixels, write_tiff
from tests.whole import heatmap, plan_for

MONAI, SHA256 = "monai==1.6.1", "dbd3b1dd309e752e0477ed73fde03b92f80ac74bfb8a8c4260f018b5d6ab2b0b"
TILE, SHAPE = 64, (256, 352)  # the last tiles end at the slide's edge: MONAI shifts those that would not

SCRIPT = """
import sys
import numpy as np
import torch
from monai.inferers import sliding_window_inference

pixels, weights, tile, overlap, mode, out = sys.argv[1:]
network = torch.jit.load(weights)
image = torch.from_numpy(np.load(pixels)).permute(2, 0, 1)[None].float() / 255
with torch.inference_mode():
    answer = sliding_window_inference(image, (int(tile),) * 2, 4, network, overlap=float(overlap), mode=mode)
np.save(out, answer[0].numpy())
"""


def monai() -> Path:
    """MONAI's wheel, unpacked in the cache: it needs only torch and numpy."""
    folder = CACHE / MONAI
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--dest",
                place,
            ]
            subprocess.run([*command, MONAI], check=True, stdin=subprocess.DEVNULL)
            (wheel,) = Path(place).glob("*.whl")
            if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
                raise ValueError(f"{wheel.name} has sha256 {found}, not {SHA256}")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(place, "unpacked"))
            Path(place, "unpacked").replace(folder)
    return folder


class Dense(nn.Module):
    """Two padded convolutions: near a tile's edge the answer depends on where the tile is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 3, 5, padding=2), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_blending_is_monais(tmp_path: Path, blend: Blend, overlap: float) -> None:
    torch.manual_seed(0)
    network = Dense().eval()
    pixels = smooth_pixels(*SHAPE)
    np.save(tmp_path / "pixels.npy", pixels)
    torch.jit.script(network).save(str(tmp_path / "network.pt"))
    arguments = [tmp_path / "pixels.npy", tmp_path / "network.pt", TILE, overlap, blend, tmp_path / "theirs.npy"]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, arguments)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(monai())},
        stdin=subprocess.DEVNULL,
    )
    theirs = np.load(tmp_path / "theirs.npy")
    spec = ModelSpec(
        name="dense", sha256="0", classes=("a", "b", "c"), mpp=0.5, tile_px=TILE, input_px=TILE, output_px=TILE, scores="value"
    )
    with open_slide(write_tiff(tmp_path / "s.tiff", [pixels])) as slide:
        plan = plan_for(slide, spec, TILE - round(overlap * TILE), block=3, blend=blend)
        ours = heatmap(slide, TorchNetwork(spec, network), plan)
    assert ours.shape == theirs.shape == (3, *SHAPE)
    assert ours.std() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Blending matters here: the network's own answer to the whole image is another near the tiles' edges.
    with torch.inference_mode():
        whole = network(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0].numpy()
    assert np.abs(whole - theirs).max() > 1e-3
