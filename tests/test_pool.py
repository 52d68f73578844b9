"""Coarser maps: means of the model's own pixels, on whatever device it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathology import Job, UsageError, open_heatmap
from pathology.geometry import Box
from pathology.model import Answer, Model, ModelSpec
from pathology.models.network import TorchNetwork
from pathology.models.pool import PooledQueuedModel, pooled, pooled_spec
from pathology.runner import run
from pathology.testing import identity
from tests.networks import Pixels
from tests.slides import noise_pixels

SPEC = ModelSpec("pixels", "0" * 64, ("r", "g", "b"), 0.5, 32, 32, output_px=32, scores="value", margin_px=5)


@pytest.mark.parametrize(
    ("mpp", "side", "margin"), [(None, 32, 5), (0.5, 32, 5), (0.99, 32, 5), (1, 16, 3), (3.9, 8, 2), (99, 4, 1)]
)
def test_pixels_are_the_largest_that_divide_a_tile_and_are_no_coarser(mpp: float | None, side: int, margin: int) -> None:
    found = pooled_spec(SPEC, mpp)
    assert (found.output_px, found.margin_px) == (side, margin)
    assert pooled_spec(replace(SPEC, margin_px=0), 99).output_px == 2


def test_other_models_stay_as_they_are_and_finer_pixels_are_refused() -> None:
    tile = replace(SPEC, output_px=1, margin_px=0)
    assert pooled_spec(tile, 8) is tile
    for mpp in (0.25, 0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=rf"heatmap mpp {mpp:g} is none that model pixels can answer; use 0\.5 or more"):
            pooled_spec(SPEC, mpp)


def blocks(values: NDArray[np.float32], side: int) -> NDArray[np.float64]:
    """(..., h, w) -> (..., side, side) means."""
    shape = (*values.shape[:-2], side, values.shape[-2] // side, side, values.shape[-1] // side)
    return values.astype(np.float64).reshape(shape).mean(axis=(-3, -1))


class Queued:
    """A model that works by itself."""

    def __init__(self, model: Model) -> None:
        self.spec, self.model = model.spec, model

    def __call__(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.model(tiles)

    def staging(self, batch_size: int) -> NDArray[np.uint8]:
        return np.zeros((batch_size, 32, 32, 3), np.uint8)

    def submit(self, tiles: NDArray[np.uint8]) -> Answer:
        answer = self.model(tiles)

        class Done:
            def result(self) -> NDArray[np.float32]:
                return answer

        return Done()


def test_means_by_hand_for_every_kind_of_model() -> None:
    tiles = np.stack([noise_pixels(32, 32, seed) for seed in range(3)])
    network = pooled(TorchNetwork(SPEC, Pixels()), 2)
    assert isinstance(network, TorchNetwork)
    np.testing.assert_allclose(network(tiles), blocks(tiles.transpose(0, 3, 1, 2) / np.float32(255), 8), atol=1e-6)
    exact = blocks(tiles.transpose(0, 3, 1, 2).astype(np.float32), 8).astype(np.float32)
    np.testing.assert_array_equal(pooled(identity(32), 2)(tiles), exact)
    queued = pooled(Queued(identity(32)), 2)
    assert isinstance(queued, PooledQueuedModel)
    np.testing.assert_array_equal(queued.submit(tiles).result(), exact)
    np.testing.assert_array_equal(queued(tiles), exact)


def pooled_job(slide: Path, out: Path) -> Job:
    model = "pathology.testing:identity?tile_px=32"
    return Job(slide=str(slide), slide_id="s", root=str(slide), model=model, out=str(out), tissue="none", heatmap_mpp=2.0)


def test_a_pooled_map_lies_where_the_slide_does(small_slide: Path, tmp_path: Path) -> None:
    """Identity model without overlap: the pooled heatmap is the slide's own means."""
    job = pooled_job(small_slide, tmp_path)
    (outcome,) = run([job], "sync")
    assert outcome.status == "ok", outcome.message
    heatmap = open_heatmap(job.result_folder("identity"))
    assert (heatmap.frame.mpp, heatmap.frame.shape) == (2.0, (50, 43))
    scores = heatmap.read(0, Box(0, 0, 50, 42))
    whole = noise_pixels(200, 170)[:, :168].astype(np.float64).reshape(50, 4, 42, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(scores, whole, atol=1e-4)
    with pytest.raises(UsageError, match="was made otherwise"):
        list(run([replace(job, heatmap_mpp=None)], "sync"))


def test_a_stride_that_is_no_whole_number_of_pixels_is_refused(small_slide: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no whole number of the 8 output pixels"):
        list(run([replace(pooled_job(small_slide, tmp_path), overlap=3)], "sync"))


def test_networks_are_pooled_before_their_answer_leaves_the_device() -> None:
    network = TorchNetwork(SPEC, Pixels())
    network.pool(pooled_spec(SPEC, 2))
    assert network._forward(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 8, 8)
