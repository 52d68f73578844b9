"""Model folders: a card, `model.toml`, beside weights in one of four formats.

Promise: weights are loaded from the very bytes that have the card's sha256. Safetensors and ONNX load freely; what runs code
when it is loaded (TorchScript, .pt2, and an architecture that is not a class of networks) only after the user has trusted it by
hash, and the safe way is never tried first to fall back on the other.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pathology.device import check_allowed
from pathology.errors import ModelError, one_line
from pathology.job import Precision
from pathology.model import Model, ModelSpec
from pathology.models import timm_folder
from pathology.models.card import CARD, Card, Weights, read_card
from pathology.models.network import TorchNetwork, on_its_device
from pathology.models.onnx import onnx_module
from pathology.models.refs import imported
from pathology.models.trust import require_trust
from pathology.models.weights import check_finite, fill, read_safetensors, read_script, read_weights

if TYPE_CHECKING:
    import torch


def load(folder: Path, device: str, precision: Precision = "fp32", compile: bool = False) -> Model:
    """The model in `folder`, ready on `device`. ModelError where it is not trusted, not valid or not loadable."""
    card = read_card(folder)
    if (risky := runs_code(folder, card)) is not None:
        require_trust(*risky)
    if card.precisions:
        check_allowed(card.spec.name, precision, card.precisions)
    if card.weights.format == "onnx" and device != "cpu":
        raise ModelError(f"model {card.spec.name} is ONNX, which runs on the CPU here; pass --device cpu")
    network = _network(folder, card, device)
    if card.channels == "bgr":
        network = _reversed_colours(network)
    mean, std = (v[::-1] if card.channels == "bgr" else v for v in (card.mean, card.std))
    loaded = TorchNetwork(
        card.spec,
        network,
        mean=mean,
        std=std,
        activation=card.activation,
        form=card.form,
        device=device,
        precision=precision,
        compile=compile,
    )
    return on_its_device(loaded)


def load_spec(folder: Path) -> ModelSpec:
    """The card of the model in `folder` as the pipeline sees it, without its weights. ModelError where it is not valid."""
    return read_card(folder).spec


def runs_code(folder: Path, card: Card) -> tuple[Path, str] | None:
    """The file in `folder` that has a say in what code runs when it is loaded, with its sha256; None where none has."""
    if card.weights.format in ("torchscript", "pt2"):
        return folder / card.weights.file, card.weights.sha256
    if card.weights.format == "safetensors" and not _is_network(card.weights.architecture):
        # A card could name any function, and any arguments.
        return folder / CARD, card.sha256
    return None


def architecture(name: str) -> Callable[..., object]:
    """What `package.module:factory` names. ModelError where it cannot be imported or called."""
    module_name = name.partition(":")[0]
    parts = module_name.split(".")
    if parts[0] in sys.stdlib_module_names or "__main__" in parts:
        # Importing runs a module, and a card may come from anyone: of those that every Python has, none holds a network.
        raise ModelError(
            f"architecture {name}: {module_name} holds no networks; name a torch.nn.Module of an installed package"
        )
    return imported(f"architecture {name}", name, "torch.nn.Module")


def build(weights: Weights) -> torch.nn.Module:
    """The network of a card's architecture, with weights of its own making. ModelError where that fails."""
    import torch

    if weights.architecture == timm_folder.FACTORY:
        return timm_folder.make(weights.arguments)
    factory = architecture(weights.architecture)
    try:
        network = factory(**weights.arguments)
    except Exception as error:  # foreign code
        raise ModelError(
            f"architecture {weights.architecture} failed with {type(error).__name__}: {one_line(error)}; correct its arguments"
        ) from error
    if not isinstance(network, torch.nn.Module):
        raise ModelError(f"architecture {weights.architecture} made a {type(network).__name__}, no torch.nn.Module")
    return network


def _network(folder: Path, card: Card, device: str) -> torch.nn.Module:
    import torch

    weights = card.weights
    data, name = read_weights(folder / weights.file, weights.sha256), f"{weights.file} of model {card.spec.name}"
    if weights.format == "onnx":
        beside = {weights.data: read_weights(folder / weights.data, weights.data_sha256)} if weights.data else {}
        return onnx_module(data, name, beside)
    if weights.format == "safetensors":
        state = read_safetensors(data, name)
        check_finite(state, name)
        network = build(weights)
        fill(network, state, name)
        return network
    if weights.format == "torchscript":
        loaded = read_script(data, name, device)
        check_finite(loaded.state_dict(), name)
        return loaded
    try:
        program = torch.export.load(io.BytesIO(data))
    except Exception as error:  # of a damaged file torch raises nearly anything
        raise ModelError(f"{name} cannot be loaded by torch ({one_line(error)}); fetch it again") from error
    check_finite(program.state_dict, name)
    return _exported(program, device)


def _exported(program: torch.export.ExportedProgram, device: str) -> torch.nn.Module:
    import torch
    from torch.export.passes import move_to_device_pass

    module = move_to_device_pass(program, device).module()

    class Exported(torch.nn.Module):
        """Out of sight of `eval` and `to`, which an exported program refuses: it stays as it was exported."""

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = module(tiles.contiguous())
            return answer

    return Exported()


def _is_network(name: str) -> bool:
    """Whether `name` stands for networks and nothing else: a class of them, or timm's by their names."""
    import torch

    if name == timm_folder.FACTORY:
        return True
    found = architecture(name)
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _reversed_colours(network: torch.nn.Module) -> torch.nn.Module:
    import torch

    class Reversed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tiles: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.network(tiles.flip(1))
            return answer

    return Reversed()
