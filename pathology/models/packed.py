"""Weights of convolutions laid out once as oneDNN computes with them; left as they are, it lays them out anew at every call.

Promise: the same bits. It is done in a copy that shares all other weights, for convolutions that then answer made-up tiles as
before, bit for bit: small ones torch computes by itself, if of one picture. The copy is taken only if it, too, answers alike.
Convolution and ReLU could be one call as well, but that takes NaN for 0, and a broken network would pass for a sound one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pathology.models.pieces import twin

if TYPE_CHECKING:
    import torch


def packed(network: torch.nn.Module, tiles: torch.Tensor, at_once: int) -> torch.nn.Module:
    """`network`, on the CPU and in evaluation mode, with its convolutions packed; itself where that is not possible or not the
    same.

    tiles    (B, 3, H, W) as it takes them; of one the fewest convolutions are packed, and all of those in batches of any size
    at_once  tiles of its calls: with other numbers of them it is right as well, and not as quick
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # by their number torch decides which it computes itself: what is packed must not depend on it
    try:
        changed = _packed(network, tiles, at_once / len(tiles))
    except Exception:  # a torch without oneDNN, a forward that decides by values, anything else of its author's
        return network
    finally:
        torch.set_num_threads(threads)
    return changed


def _packed(network: torch.nn.Module, tiles: torch.Tensor, times: float) -> torch.nn.Module:
    import torch

    changed = twin(network)
    found = _Found(times)
    hooks = [module.register_forward_hook(found.try_one) for module in changed.modules() if is_plain(module)]
    with torch.inference_mode():
        before = changed(tiles)
        for hook in hooks:
            hook.remove()
        for module, weights in found.packed.items():
            _pack(module, weights)
        return changed if torch.equal(before, changed(tiles)) else network


class _Found:
    """Convolutions that can be packed, with their weights as packed. `times`: so many pictures more have their later calls."""

    def __init__(self, times: float) -> None:
        self._times = times
        self.packed: dict[torch.nn.Module, torch.Tensor] = {}

    def try_one(self, module: Any, given: tuple[torch.Tensor], answer: torch.Tensor) -> None:
        """A forward hook."""
        import torch

        count, *sides = given[0].shape
        how = (module.padding, module.stride, module.dilation, module.groups)
        weights = torch.ops.mkldnn._reorder_convolution_weight(module.weight, *how, (round(count * self._times), *sides))
        if module not in self.packed and torch.equal(_convolved(module, weights, given[0]), answer):
            self.packed[module] = weights


def _convolved(module: Any, weights: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """What a convolution answers, by packed weights."""
    import torch

    how = (module.padding, module.stride, module.dilation, module.groups)
    nothing_after: Any = ("none", [], "")
    answer: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(given, weights, module.bias, *how, *nothing_after)
    return answer


def is_plain(module: torch.nn.Module) -> bool:
    """Whether it is a convolution that does nothing more than its class says, and that nobody listens to."""
    import torch

    if type(module) is not torch.nn.Conv2d or "forward" in vars(module) or isinstance(module.padding, str):
        return False
    return module.padding_mode == "zeros" and not module._forward_hooks and not module._forward_pre_hooks


def _pack(module: Any, weights: torch.Tensor) -> None:
    """Put packed weights in the place of a convolution's."""
    del module.weight
    module.register_buffer("packed", weights)
    module.__class__ = _packed_class()


@functools.cache
def _packed_class() -> type[torch.nn.Module]:
    import torch

    class Packed(torch.nn.Conv2d):
        """A convolution whose weights are packed; who looks at them sees them as they were."""

        packed: torch.Tensor

        @property
        def weight(self) -> torch.Tensor:  # type: ignore[override]
            return self.packed.to_dense().contiguous(memory_format=torch.channels_last)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return _convolved(self, self.packed, input)

    return Packed
