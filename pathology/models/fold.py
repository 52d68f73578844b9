"""Batch norms folded into the convolutions before them, which then answer in one pass what took two.

Promise: scores change in their last bits alone. Folded is only what `torch.fx` sees to be one convolution, used once, whose
answer goes to one norm, used once, and nowhere else; in a copy, which is taken only if it answers a made-up tile as the
original does. Weights are multiplied beforehand (Jacob et al., Quantization and training of neural networks, CVPR 2018,
section 3.2).
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

from pathology.models.pieces import twin

if TYPE_CHECKING:
    import torch

# By which the copy's answers may differ, as a share of the largest one: a hundred times the rounding of float32.
TOLERANCE = 1e-5


def folded(network: torch.nn.Module, tiles: torch.Tensor) -> torch.nn.Module:
    """`network`, in evaluation mode, with its norms folded; itself, untouched, where that is not possible or not the same.

    tiles  (B, 3, H, W) as it takes them
    """
    import torch

    if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return network
    try:
        changed = copy.deepcopy(network)
        if not _fold(changed):
            return network
        with torch.inference_mode():
            before, after = twin(network)(tiles), changed(tiles)
        same = alike(before, after)
    except Exception:  # a forward that decides by values, or anything else of its author's: not for folding
        return network
    return changed if same else network


def alike(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two answers to a tile are the same but for what rounding does."""
    return bool((before - after).abs().max() <= TOLERANCE * before.abs().max())


def _fold(network: torch.nn.Module) -> int:
    """Fold norms of `network` in place; how many."""
    from torch import fx, nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    graph = network.graph if isinstance(network, fx.GraphModule) else fx.Tracer().trace(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    names = Counter(id(module) for module in modules.values())
    uses = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # Weights that the forward takes by themselves must stay what they are.
    taken = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    count = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        places = str(before.target), str(node.target)
        convolution, norm = pair = tuple(modules[place] for place in places)
        if (type(convolution), type(norm)) not in ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv1d, nn.BatchNorm1d)):
            continue
        if any(uses[id(module)] != 1 or names[id(module)] != 1 or "forward" in vars(module) for module in pair):
            continue
        if taken & set(places) or norm.running_mean is None or norm.training:
            continue
        if any(module._forward_hooks or module._forward_pre_hooks for module in pair):
            continue
        network.set_submodule(places[0], fuse_conv_bn_eval(convolution, norm))
        network.set_submodule(places[1], nn.Identity())
        count += 1
    return count
