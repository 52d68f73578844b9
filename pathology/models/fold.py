"""Batch norms folded into the convolutions before them, which then answer in one pass what took two.

Promise: only what `torch.fx` sees to be one convolution, used once, whose answer goes to one norm, used once, and nowhere
else. Whatever cannot be traced stays as it is. Scores change in their last bits alone: float32 weights are multiplied
beforehand (Jacob et al., Quantization and training of neural networks, CVPR 2018, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fold_norms(network: torch.nn.Module) -> int:
    """Fold the norms of `network`, in evaluation mode, in place; how many."""
    from torch import fx, nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    if isinstance(network, fx.GraphModule):
        graph = network.graph
    else:
        try:
            graph = fx.Tracer().trace(network)
        except Exception:  # a forward that decides by values, or anything else of its author's: not for tracing
            return 0
    modules = dict(network.named_modules(remove_duplicate=False))
    uses = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    # Weights that the forward takes by themselves must stay what they are.
    taken = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        names = str(before.target), str(node.target)
        convolution, norm = (modules[name] for name in names)
        if (type(convolution), type(norm)) not in ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv1d, nn.BatchNorm1d)):
            continue
        if uses[id(convolution)] != 1 or uses[id(norm)] != 1 or taken & set(names) or norm.running_mean is None:
            continue
        if any(module._forward_hooks or module._forward_pre_hooks for module in (convolution, norm)):
            continue
        network.set_submodule(names[0], fuse_conv_bn_eval(convolution, norm))
        network.set_submodule(names[1], nn.Identity())
        folded += 1
    return folded
