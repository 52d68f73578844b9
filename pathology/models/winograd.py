"""Convolutions of 3 x 3 px with many channels, in fewer multiplications than they have weights.

Promise: scores change in their last bits alone. Four neighbouring answers, 2 x 2, share the products of 4 x 4 pixels with the
weights: 16 multiplications for 36 (Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016, section 4.1).
Done in a copy that shares all other weights, for convolutions chosen by their shapes, never by a clock; the copy is taken only
if it answers a made-up tile as the original does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pathology.models.fold import alike
from pathology.models.packed import is_plain
from pathology.models.pieces import twin

if TYPE_CHECKING:
    import torch

# With fewer channels, bringing pixels to the products and answers back takes as long as what it saves.
CHANNELS = 256

# Squares of 4 x 4 px brought at once: as many as stay in the processor's caches, and no fewer than its products like.
SQUARES = 800

# From 3 weights in a row to 4, along either side.
WEIGHTS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def quicker(network: torch.nn.Module, tiles: torch.Tensor, at_once: int) -> torch.nn.Module:
    """`network`, on the CPU and in evaluation mode, with its large convolutions replaced; itself where that is not possible or
    not the same.

    tiles    (B, 3, H, W) as it takes them
    at_once  tiles of its calls: with other numbers of them it is right as well, and not as quick
    """
    import torch

    if not any(_fits(module) for module in network.modules()):
        return network
    try:
        changed = twin(network)
        sides: dict[torch.nn.Module, tuple[int, int]] = {}

        def look(module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
            sides[module] = max(sides.get(module, (0, 0)), (given[0].shape[2], given[0].shape[3]))

        hooks = [module.register_forward_pre_hook(look) for module in changed.modules() if _fits(module)]
        with torch.inference_mode():
            before = changed(tiles)
            for hook in hooks:
                hook.remove()
            chosen = {module: side for module, side in sides.items() if _squares(*side) <= SQUARES}
            for module, side in chosen.items():
                _replace(module, _pictures(at_once, *side) * _squares(*side))
            return changed if chosen and alike(before, changed(tiles)) else network
    except Exception:  # a torch without oneDNN, a forward that decides by values, anything else of its author's
        return network


def _fits(module: Any) -> bool:
    """Whether it is a convolution that gains from it, as far as its weights tell."""
    return is_plain(module) and min(module.in_channels, module.out_channels) >= CHANNELS and _fits_in_shape(module)


def _fits_in_shape(convolution: Any) -> bool:
    """Whether it does what is computed here: a forward may have set it otherwise since."""
    how = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return how == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _squares(height: int, width: int) -> int:
    """Of a picture."""
    return -(-height // 2) * -(-width // 2)


def _pictures(most: int, height: int, width: int) -> int:
    """Of so many, those that are computed at once."""
    return max(1, min(most, SQUARES // _squares(height, width)))


def _replace(convolution: Any, squares: int) -> None:
    """Have `convolution` compute so many squares at once, by 16 matrices of (K, C); its weights stay for who looks at them."""
    import torch

    once = torch.tensor(WEIGHTS, dtype=torch.float64)
    # (9, K * C): the weights of every pair of channels.
    weights = convolution.weight.detach().permute(2, 3, 0, 1).reshape(9, -1).double()
    for at, shares in enumerate(torch.kron(once, once)):
        matrix = (shares @ weights).float().view(convolution.out_channels, convolution.in_channels)
        convolution.register_buffer(f"matrix{at}", torch.ops.mkldnn._reorder_linear_weight(matrix, squares))
    convolution.__class__ = _kind()


def _convolved(pictures: torch.Tensor, matrices: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    """(N, C, H, W), 16 packed matrices and (K,) -> (N, H, W, K)."""
    import torch

    count, channels, height, width = pictures.shape
    down, across = -(-height // 2), -(-width // 2)
    pad = (0, 0, 1, 1 + 2 * across - width, 1, 1 + 2 * down - height)
    padded = torch.nn.functional.pad(pictures.permute(0, 2, 3, 1), pad)
    # Rows of squares first, columns after: the same four sums and differences.
    tall = padded.new_empty(4, count, down, padded.shape[2], channels)
    _spread([padded[:, at : at + 2 * down - 1 : 2] for at in range(4)], list(tall))
    squares = padded.new_empty(4, 4, count, down, across, channels)
    _spread([tall[:, :, :, at : at + 2 * across - 1 : 2] for at in range(4)], [squares[:, at] for at in range(4)])

    columns = []
    for at in range(4):
        # Of the products that all four answers hold once, one has the bias.
        rows = [_product(squares[row, at], matrices[4 * row + at], bias if row == at == 1 else None) for row in range(4)]
        _gather(rows, rows[:2])
        columns.append(rows)
    answers = padded.new_empty(count, down, 2, across, 2, columns[0][0].shape[-1])
    for row in range(2):
        _gather([column[row] for column in columns], [answers[:, :, row, :, column] for column in range(2)])
    return answers.view(count, 2 * down, 2 * across, -1)[:, :height, :width].contiguous()


def _spread(given: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Four neighbours along a side -> what is multiplied."""
    import torch

    torch.sub(given[0], given[2], out=out[0])
    torch.add(given[1], given[2], out=out[1])
    torch.sub(given[2], given[1], out=out[2])
    torch.sub(given[1], given[3], out=out[3])


def _product(pixels: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., C) and a packed (K, C) -> (..., K)."""
    import torch

    rows = pixels.view(-1, pixels.shape[-1])
    answer: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    return answer.view(*pixels.shape[:-1], -1)


def _gather(products: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Four products along a side -> two neighbouring answers. The first two are written over."""
    import torch

    torch.add(products[0].add_(products[1]), products[2], out=out[0])
    torch.sub(products[1].sub_(products[2]), products[3], out=out[1])


@functools.cache
def _kind() -> type[torch.nn.Module]:
    import torch

    class Winograd(torch.nn.Conv2d):
        """A convolution of 3 x 3 px, computed in squares."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if not len(input) or not _fits_in_shape(self):
                return super().forward(input)
            matrices = list(self.buffers())
            parts = torch.split(input, _pictures(len(input), input.shape[2], input.shape[3]))
            answers = [_convolved(part, matrices, self.bias) for part in parts]
            return (answers[0] if len(answers) == 1 else torch.cat(answers)).permute(0, 3, 1, 2)

    return Winograd
