"""The benchmarks' networks as models of the pipeline: `--model benchmarks.models:classifier?network=tiny`.

Promise: the card says what the plain script does: 224 px at 0.5 um/px, ImageNet's mean and deviation, softmax.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from pathology.job import Precision
from pathology.model import Model, ModelSpec


def classifier(
    network: str = "tiny", values: bool = False, device: str = "cpu", precision: Precision = "fp32", compile: bool = False
) -> Model:
    """A tile classifier of two classes. `values`: its scores are none of classes, so that no tile is in doubt of its own."""
    return _model(network, _classifier_card(network, values), device, precision, compile)


def dense(
    network: str = "unet", tile_px: int = 512, device: str = "cpu", precision: Precision = "fp32", compile: bool = False
) -> Model:
    """Two classes for every pixel."""
    return _model(network, _dense_card(network, tile_px), device, precision, compile)


def _classifier_card(network: str = "tiny", values: bool = False) -> ModelSpec:
    card = _card(network, 224, 1)
    return replace(card, scores="value") if values else card


def _dense_card(network: str = "unet", tile_px: int = 512) -> ModelSpec:
    return _card(network, tile_px, tile_px)


# Cards without torch: a run's driver plans by them while its worker still loads it.
classifier.card = _classifier_card  # type: ignore[attr-defined]
dense.card = _dense_card  # type: ignore[attr-defined]


def _card(network: str, tile_px: int, output_px: int) -> ModelSpec:
    return ModelSpec(
        name=network,
        sha256=hashlib.sha256(f"benchmark {network} {tile_px}".encode()).hexdigest(),
        classes=("a", "b"),
        mpp=0.5,
        tile_px=tile_px,
        input_px=tile_px,
        output_px=output_px,
    )


def _model(network: str, spec: ModelSpec, device: str, precision: Precision, compile: bool) -> Model:
    from benchmarks.networks import MEAN, STD, make
    from pathology.models.network import TorchNetwork, on_its_device

    loaded = TorchNetwork(
        spec,
        make(network),
        mean=MEAN,
        std=STD,
        activation="softmax",
        device=device,
        precision=precision,
        compile=compile,
    )
    return on_its_device(loaded)
